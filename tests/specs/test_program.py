"""A program is data: legal or refused with one sentence, and it survives its own JSON."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from claims_of_tests import EVERYTHING
from hypothesis import given
from hypothesis import strategies as st

from kvconform_specs.claims import Claims
from kvconform_specs.clauses import ALL
from kvconform_specs.config import Config
from kvconform_specs.configs import CONFIGS, config_named
from kvconform_specs.errors import SpecError
from kvconform_specs.history import Histories
from kvconform_specs.program import (
    MAX_SEED,
    AliasHandle,
    Append,
    Close,
    Fork,
    Poison,
    Program,
    ReadCache,
    Reject,
    Reorder,
    Reset,
    Truncate,
    UncachedForward,
)

CONFIG = CONFIGS["attention-gqa"]


@given(st.data())
def test_a_program_survives_its_own_json(data: st.DataObject) -> None:
    config = data.draw(st.sampled_from(list(CONFIGS.values())), label="config")
    clause = data.draw(st.sampled_from([c for c in ALL if c.concerns(config)]), label="clause")
    for program in data.draw(clause.strategy(config, EVERYTHING), label="case").programs:
        assert Program.from_json(json.loads(json.dumps(program.to_json()))) == program


def test_every_step_of_the_language_survives_its_own_json() -> None:
    program = Program(
        CONFIG,
        (
            Append("a", (3, 2), 7, substitutions=((1, 0, 9),), needle=(7, 1)),
            UncachedForward("f", (4,), 8),
            Fork("a", "b"),
            Truncate("a", 1),
            Reorder("a", (1, 1, 0)),
            Reset("a"),
            Reject(Truncate("a", 5)),
            Reject(Append("a", (41, 41, 41), 3)),
            Reject(Append("a", (1, 1, 1), 3), "heads"),
            Reject(Reorder("a", (3,))),
            Append(
                "a", (2, 1, 0), 3, masked=((0, 1),), pad=("left", 4), layout="sliced", in_place=True, count_macs=True
            ),
            AliasHandle("b", "c"),
            ReadCache("c"),
            Poison("b", "junk", "nan"),
            Close("a"),
        ),
    )
    assert Program.from_json(json.loads(json.dumps(program.to_json()))) == program


def test_what_is_asked_for_its_last_position_alone_survives_its_own_json() -> None:
    decoder = CONFIGS["decoder-rope"]
    program = Program(
        decoder,
        (Append("a", (3, 3), 7, last_only=True), UncachedForward("f", (2,), 7, last_only=True), Append("a", (1, 1), 7)),
    )
    written = program.to_json()
    assert [step.pop("last_only", False) for step in written["steps"]] == [True, True, False]
    plain = tuple(
        replace(step, last_only=False) for step in program.steps if isinstance(step, Append | UncachedForward)
    )
    assert Program.from_json(written) == Program(decoder, plain), "a file from before there was such a step"
    assert Program.from_json(json.loads(json.dumps(program.to_json()))) == program


@pytest.mark.parametrize(
    ("config", "step", "words"),
    [
        (CONFIG, {"op": "append"}, r"steps\[0\]\.last_only: the attention profile gives an output for each token"),
        (
            CONFIGS["decoder-rope"],
            {"op": "uncached_forward", "counts": [2, 1]},
            r"steps\[0\]\.last_only: want equal counts, got \[2, 1\]",
        ),
        (CONFIGS["decoder-rope"], {"op": "generate"}, r"steps\[0\]\.last_only: a generation .* has no last position"),
    ],
)
def test_the_last_position_alone_is_asked_for_where_there_is_one(
    config: Config, step: dict[str, object], words: str
) -> None:
    asked = {"seq": "a", "counts": [2, 2], "seed": 0, "last_only": True, **step}
    with pytest.raises(SpecError, match=words):
        Program.from_json({"config": config.to_json(), "steps": [asked]})


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ([{"op": "apend"}], r"program\.steps\[0\]\.op: unknown op 'apend'; known: alias_handle, append, close"),
        (
            [{"op": "append", "seq": "a", "counts": [2], "sed": 1}],
            r"steps\[0\]\.sed: unknown field; known: context, count_macs, counts",
        ),
        ([{"op": "append", "seq": "a"}], r"steps\[0\]\.counts: is missing"),
        ([{"op": {"x": 1}, "seq": "a"}], r"steps\[0\]\.op: unknown op \{'x': 1\}"),
        (
            [{"op": "append", "seq": "a", "counts": ["1"], "seed": 0}],
            r"steps\[0\]\.counts: want a list of an integer, got \('1',\)",
        ),
        ([{"op": "append", "seq": "a", "counts": [1], "seed": True}], r"steps\[0\]\.seed: want an integer, got True"),
        (
            [{"op": "append", "seq": "a", "counts": [1], "seed": 0, "needle": [1]}],
            r"steps\[0\]\.needle: want \[an integer, an integer\] or null, got \(1,\)",
        ),
        (
            [{"op": "append", "seq": "a", "counts": [41], "seed": 0}],
            r"steps\[0\]\.counts: length 41 exceeds the capacity",
        ),
        ([{"op": "append", "seq": "a", "counts": [], "seed": 0}], r"steps\[0\]\.counts: want at least one row"),
        ([{"op": "truncate", "seq": "a", "length": 0}], r"steps\[0\]\.seq: no open sequence 'a'; open: none"),
        (
            [{"op": "append", "seq": "a", "counts": [2], "seed": 0}, {"op": "truncate", "seq": "a", "length": 3}],
            r"steps\[1\]\.length: cannot keep 3 of 2 tokens",
        ),
        (
            [{"op": "append", "seq": "a", "counts": [2], "seed": 0}, {"op": "reorder", "seq": "a", "rows": [1]}],
            r"steps\[1\]\.rows: want rows of 0\.\.0",
        ),
        (
            [
                {"op": "append", "seq": "a", "counts": [2], "seed": 0},
                {"op": "append", "seq": "a", "counts": [1, 1], "seed": 0},
            ],
            r"steps\[1\]\.counts: 2 rows for sequence 'a' of 1 rows",
        ),
        (
            [{"op": "reject", "step": {"op": "append", "seq": "a", "counts": [1], "seed": 0}}],
            r"steps\[0\]\.step: is legal; a reject step holds a call that must be refused",
        ),
        (
            [
                {"op": "append", "seq": "a", "counts": [2], "seed": 0},
                {"op": "reject", "step": {"op": "append", "seq": "a", "counts": [1, 1], "seed": 0}},
            ],
            r"steps\[1\]\.step\.counts: 2 rows for sequence 'a' of 1 rows; a rejected append exceeds the capacity",
        ),
        (
            [{"op": "append", "seq": "a", "counts": [2], "seed": 0, "layout": "diagonal"}],
            r"steps\[0\]\.layout: unknown value 'diagonal'; known: contiguous, transposed",
        ),
        (
            [{"op": "append", "seq": "a", "counts": [2], "seed": 0, "masked": [[0, 2]]}],
            r"steps\[0\]\.masked: no token at row 0, position 2",
        ),
        (
            [{"op": "append", "seq": "a", "counts": [2], "seed": 7 << 48}],
            rf"steps\[0\]\.seed: want a seed of 0\.\.{MAX_SEED}, got ",
        ),
        (
            [{"op": "append", "seq": "a", "counts": [2], "seed": 0}, {"op": "poison", "seq": "a", "keys": "acid"}],
            r"steps\[1\]\.keys: unknown poison 'acid'",
        ),
        (
            [{"op": "reject", "wrong": "smell", "step": {"op": "append", "seq": "a", "counts": [2], "seed": 0}}],
            r"steps\[0\]\.wrong: unknown value 'smell' for an append; known: dtype, rank",
        ),
        (
            [{"op": "reject", "wrong": "rank", "step": {"op": "append", "seq": "a", "counts": [41], "seed": 0}}],
            r"steps\[0\]\.step\.counts: length 41 exceeds .* a malformed append is otherwise legal",
        ),
        (
            [{"op": "reject", "step": {"op": "close", "seq": "a"}}],
            r"steps\[0\]\.step: want append, truncate or reorder, got close",
        ),
    ],
)
def test_a_step_that_is_not_legal_is_refused_with_its_place(steps: list[object], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        Program.from_json({"config": CONFIG.to_json(), "steps": steps})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"profile": "encoder"}, r"config\.profile: unknown value 'encoder'; known: attention, decoder"),
        ({"kv_heads": 4}, r"config\.kv_heads: 4 KV heads do not divide 6 query heads"),
        ({"window": 0}, r"config\.window: want an integer of at least 1, got 0"),
        ({"softcap": -1.0}, r"config\.softcap: must be positive"),
        ({"layers": 2}, r"config\.layers: the attention profile is one layer without positions or with alibi"),
        ({"colour": 1}, r"config\.colour: unknown field"),
    ],
)
def test_a_config_that_means_nothing_is_refused_with_its_place(change: dict[str, object], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        Config.from_json({**CONFIG.to_json(), **change})


def test_an_unknown_config_name_lists_the_known() -> None:
    with pytest.raises(SpecError, match=r"no config named 'attention-mqa'; known: attention-gqa, "):
        config_named("attention-mqa")


def test_claims_that_are_not_known_are_refused() -> None:
    with pytest.raises(SpecError, match=r"claims\.abilities: unknown value 'fly'; known: uncached_forward, length"):
        Claims(abilities=("fly",))


def test_the_sizes_of_a_point_are_pairwise_distinct() -> None:
    for name, config in CONFIGS.items():
        sizes = [config.heads, config.head_dim, config.capacity]
        sizes += [config.kv_heads] if config.group > 1 else []  # MHA is that the two are equal
        if config.profile == "decoder":
            sizes += [config.layers, config.width, config.vocabulary, *([config.mlp] if config.mlp else [])]
        assert len(set(sizes)) == len(sizes), name


def test_histories_are_what_the_steps_say() -> None:
    histories = Histories()
    for step in (
        Append("a", (2, 1), 10),
        Fork("a", "b"),
        Truncate("a", 1),
        Append("a", (1, 2), 20),
        Reorder("a", (1, 1, 0)),
        AliasHandle("b", "c"),
        Reset("b"),
    ):
        histories.apply(step)
    tokens = {
        name: [[(stream.seed, position) for stream, position in row] for row in rows]
        for name, rows in histories.rows.items()
    }
    assert tokens == {
        "a": [[(11, 0), (21, 1), (21, 2)], [(11, 0), (21, 1), (21, 2)], [(10, 0), (20, 1)]],
        "b": [[], []],
        "c": [[(10, 0), (10, 1)], [(11, 0)]],
    }
