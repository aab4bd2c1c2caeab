"""The strategies of programs reach the situations that they claim to reach: one line for each."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import strategies as st
from hypothesis.errors import NoSuchExample

from kvconform_specs.claims import ABILITIES, Claims
from kvconform_specs.clause import Case
from kvconform_specs.clauses import ALL, BY_NAME
from kvconform_specs.config import Config
from kvconform_specs.configs import CONFIGS
from kvconform_specs.history import Histories
from kvconform_specs.program import (
    LAYOUTS,
    MALFORMED,
    AliasHandle,
    Append,
    Close,
    Fork,
    Generate,
    Poison,
    Program,
    Reject,
    Reorder,
    Reset,
    Truncate,
    UncachedForward,
)

GQA, WINDOW = CONFIGS["attention-gqa"], CONFIGS["attention-window"]
ROPE = CONFIGS["decoder-rope"]
LONG, SINK = CONFIGS["attention-long"], CONFIGS["attention-sink"]
EVERYTHING = Claims(
    profiles=("attention", "decoder"),
    abilities=tuple(ABILITIES),
    overflow="refused",
    padding=("right", "left"),
    unused_slots="any",
    page=4,
    max_graphs=9,
    kv_bits=8,
    residual=4,
)
POOR = Claims(profiles=("attention", "decoder"), max_batch=1, max_chunk=4, max_sequences=1)


def lengths(program: Program) -> list[tuple[object, tuple[int, ...], tuple[int, ...]]]:
    """Each append with the rows' lengths before and after it."""
    histories, found = Histories(), []
    for step in program.steps:
        before = tuple(len(r) for r in histories.rows.get(getattr(step, "seq", ""), ()))
        histories.apply(step)
        if isinstance(step, Append):
            found.append((step, before or (0,) * len(step.counts), tuple(len(r) for r in histories.rows[step.seq])))
    return found


def chunk_on_a_cache(p: Program) -> bool:
    return any(max(step.counts) > 1 and max(before) > 0 for step, before, _ in lengths(p))


def second_sequence_shorter(p: Program) -> bool:
    totals: dict[str, int] = {}
    for step, _before, after in lengths(p):
        totals[step.seq] = max(after)
    return len(totals) > 1 and list(totals.values())[1] < next(iter(totals.values()))


def two_live_interleaved(p: Program) -> bool:
    names = [s.seq for s in p.steps if isinstance(s, Append)]
    return any(names[i] == names[i + 2] != names[i + 1] for i in range(len(names) - 2))


def not_its_own_inverse(p: Program) -> bool:
    return any(
        isinstance(s, Reorder)
        and len(s.rows) > 2
        and sorted(s.rows) == list(range(len(s.rows)))
        and [s.rows[r] for r in s.rows] != list(range(len(s.rows)))
        for s in p.steps
    )


def repeats_a_row(p: Program) -> bool:
    return any(isinstance(s, Reorder) and len(set(s.rows)) < len(s.rows) for s in p.steps)


def reaches(length: int) -> Callable[[Program], bool]:
    return lambda p: any(max(after) == length for _s, _b, after in lengths(p))


def steps(kind: type[Any], that: Callable[[Any], bool] = lambda s: True) -> Callable[[Program], bool]:
    return lambda p: any(isinstance(s, kind) and that(s) for s in p.steps)


def row_0_in_the_middle(p: Program) -> bool:
    return any(len(after) > 2 and min(after) < after[0] < max(after) for _s, _b, after in lengths(p))


def straddles_the_capacity(p: Program) -> bool:
    """A refused append that begins within the capacity and ends beyond it."""
    histories = Histories()
    for step in p.steps:
        if isinstance(step, Reject) and isinstance(step.step, Append) and not step.wrong:
            past = max((len(r) for r in histories.rows.get(step.step.seq, ())), default=0)
            if 0 < past < p.config.capacity and max(step.step.counts) > 1:
                return True
        histories.apply(step)
    return False


def one_more_than_full(p: Program) -> bool:
    histories = Histories()
    for step in p.steps:
        if isinstance(step, Reject) and isinstance(step.step, Append):
            rows = histories.rows.get(step.step.seq, ())
            if any(len(r) + max(step.step.counts) == p.config.capacity + 1 for r in rows):
                return True
        histories.apply(step)
    return False


def other_tokens_after_truncating_to(kept: Callable[[int, int], bool]) -> Callable[[Program], bool]:
    """``kept(tokens kept, tokens before)`` of a truncation that is followed by an append from another stream."""

    def situation(p: Program) -> bool:
        histories = Histories()
        for number, step in enumerate(p.steps[:-1]):
            rows, after = histories.rows.get(getattr(step, "seq", ""), ()), p.steps[number + 1]
            if isinstance(step, Truncate) and isinstance(after, Append) and after.seq == step.seq:
                seeds = {stream.seed for row in rows for stream, _position in row}
                if kept(step.length, len(rows[0])) and after.seed not in seeds:
                    return True
            histories.apply(step)
        return False

    return situation


def needle_among(depth: int) -> Callable[[Program], bool]:
    return lambda p: any(step.needle is not None and max(after) >= depth for step, _before, after in lengths(p))


def sees_nothing(p: Program) -> bool:
    """Some query of some row: everything up to its token is hidden."""
    return any(
        {position for of, position in step.masked if of == row} >= set(range(before[row] + 1))
        for step, before, _after in lengths(p)
        for row in range(len(step.counts))
    )


def in_manner(name: str) -> Callable[[Program], bool]:
    return steps(Append, lambda s: s.distribution == name)


def generations(p: Program) -> list[Generate]:
    return [step for step in p.steps if isinstance(step, Generate)]


def generates_to(length: int) -> Callable[[Program], bool]:
    return lambda p: any(step.counts[0] + step.new == length for step in generations(p))


def generates_amid_a_sequence(p: Program) -> bool:
    return (
        len(p.steps) > 2 and isinstance(p.steps[0], Append) and isinstance(p.steps[-1], Append) and generations(p) != []
    )


def asked_alone_before_another(p: Program) -> bool:
    """A chunk on a cache gives its last position alone, and a step behind it all of them."""
    grown = [(step, max(before) > 0) for step, before, _after in lengths(p) if isinstance(step, Append)]
    return any(
        a.last_only and cached and max(a.counts) > 1 and not b.last_only and max(b.counts) > 1
        for (a, cached), (b, _) in pairwise(grown)
    )


W = WINDOW.window or 0


@pytest.mark.parametrize(
    ("clause", "config", "situation"),
    [
        ("shape.output", GQA, lambda p: any(step.counts == (1,) for step, _b, _a in lengths(p))),
        ("shape.length", GQA, lambda p: any(isinstance(s, Truncate) and s.length == 0 for s in p.steps)),
        ("shape.length", GQA, lambda p: any(len(set(step.counts)) > 1 for step, _b, _a in lengths(p))),
        ("shape.first-step", GQA, reaches(GQA.capacity)),
        ("shape.no-specialisation", GQA, lambda p: len({len(step.counts) for step, _b, _a in lengths(p)}) == 3),
        ("causality.future-blind", GQA, chunk_on_a_cache),
        ("causality.visibility", WINDOW, reaches(W + 1)),
        ("equivalence.chunks", WINDOW, lambda p: any(max(step.counts) > W for step, _b, _a in lengths(p))),
        *(("equivalence.chunks", WINDOW, reaches(n)) for n in (W - 1, W, W + 1, 2 * W, 3 * W)),
        *(
            ("equivalence.path", GQA, lambda p, kind=kind: any(isinstance(s, kind) for s in p.steps))
            for kind in (Truncate, Fork, Reorder, Reset, Reject, Close)
        ),
        ("equivalence.path", GQA, not_its_own_inverse),
        ("equivalence.decode", GQA, lambda p: sum(step.counts == (1,) * 3 for step, _b, _a in lengths(p)) > 5),
        ("equivalence.full-stable", GQA, lambda p: isinstance(p.steps[1], UncachedForward)),
        ("equivalence.generation", ROPE, lambda p: any(a.counts == b.counts for a, b in pairwise(generations(p)))),
        ("equivalence.generation", ROPE, generates_amid_a_sequence),
        ("equivalence.generation", ROPE, steps(Generate, lambda s: len(s.counts) == 3 and s.counts[0] == 1)),
        ("equivalence.generation", ROPE, steps(Generate, lambda s: s.new == 8 and s.counts[0] == ROPE.capacity // 2)),
        ("equivalence.generation", ROPE, generates_to(ROPE.capacity)),
        *(("equivalence.generation", CONFIGS["decoder-learned"], generates_to(n)) for n in (4, 5, 6, 10)),
        ("equivalence.last-position", ROPE, asked_alone_before_another),
        ("equivalence.last-position", ROPE, steps(Append, lambda s: s.last_only and len(s.counts) == 3)),
        ("equivalence.last-position", ROPE, steps(UncachedForward, lambda s: s.last_only)),
        ("definition.attention", GQA, two_live_interleaved),
        ("definition.attention", GQA, not_its_own_inverse),
        (
            "definition.attention",
            GQA,
            lambda p: any(isinstance(s, Reorder) and len(set(s.rows)) < len(s.rows) for s in p.steps),
        ),
        ("definition.decoder", CONFIGS["decoder-rope"], chunk_on_a_cache),
        ("lifecycle.reset", GQA, chunk_on_a_cache),
        ("lifecycle.independent", GQA, two_live_interleaved),
        ("lifecycle.independent", GQA, second_sequence_shorter),
        ("capacity.full", GQA, reaches(GQA.capacity)),
        ("capacity.full", GQA, lambda p: any(max(s.counts) > 1 and max(a) == GQA.capacity for s, _b, a in lengths(p))),
        ("capacity.overflow", GQA, one_more_than_full),
        ("capacity.overflow", GQA, straddles_the_capacity),
        ("batch.ragged", GQA, row_0_in_the_middle),
        ("batch.ragged", GQA, steps(Reorder, lambda s: len(s.rows) < 3)),
        ("batch.left-padding", GQA, steps(Append, lambda s: s.pad is not None and s.pad[0] == "left")),
        ("batch.staggered", GQA, steps(Append, lambda s: 0 in s.counts)),
        ("batch.permutation", GQA, steps(Append, lambda s: len(s.counts) == 3)),
        ("lifecycle.truncate", GQA, other_tokens_after_truncating_to(lambda kept, was: kept == 0 < was)),
        ("lifecycle.truncate", GQA, other_tokens_after_truncating_to(lambda kept, was: kept == was > 0)),
        ("lifecycle.truncate", GQA, other_tokens_after_truncating_to(lambda kept, was: 0 < kept == was - 1)),
        ("lifecycle.truncate-range", GQA, steps(Reject, lambda s: isinstance(s.step, Truncate) and s.step.length < 0)),
        ("lifecycle.reorder", GQA, not_its_own_inverse),
        ("lifecycle.reorder", GQA, repeats_a_row),
        ("lifecycle.reorder", GQA, steps(Reorder, lambda s: len(s.rows) < 3)),
        *(("window.step-by-step", WINDOW, reaches(n)) for n in (W - 1, W, W + 1, 2 * W)),
        ("window.long-chunk", WINDOW, lambda p: any(max(s.counts) > W and max(b) > 0 for s, b, _a in lengths(p))),
        ("window.hybrid", CONFIGS["decoder-learned"], reaches(W + 1)),
        *(
            ("errors.malformed", GQA, steps(Reject, lambda s, wrong=wrong: s.wrong == wrong))
            for wrong in MALFORMED["attention"]
        ),
        ("errors.unchanged", GQA, steps(Reject, lambda s: isinstance(s.step, Reorder))),
        (
            "layout.equal-sizes",
            GQA,
            lambda p: any(max(a) == GQA.heads and max(s.counts) > 1 for s, _b, a in lengths(p)),
        ),
        ("layout.equal-sizes", GQA, steps(Append, lambda s: s.counts == (3, 3, 3))),
        ("layout.equal-sizes", GQA, steps(Append, lambda s: max(s.counts) == GQA.head_dim)),
        *(("layout.strides", GQA, steps(Append, lambda s, kind=kind: s.layout == kind)) for kind in LAYOUTS),
        *(("numerics.tiles", LONG, reaches(n)) for tile in (16, 64, 128) for n in (tile - 1, tile, tile + 1)),
        *(("numerics.long-context", LONG, needle_among(depth)) for depth in (1024, 4096)),
        ("numerics.large-scores", GQA, in_manner("large_queries")),
        ("numerics.zero-keys", GQA, in_manner("zero_keys")),
        ("quantised.scales", GQA, in_manner("small_keys_large_values")),
        ("numerics.empty-row", SINK, sees_nothing),
        ("numerics.empty-row", WINDOW, sees_nothing),
        ("contents.dead-slots", GQA, steps(Poison, lambda s: s.keys == "junk" and s.values == "none")),
        ("contents.poison-safe", GQA, steps(Poison, lambda s: s.values == "nan" and s.keys == "none")),
        ("contents.old-handle", GQA, steps(AliasHandle)),
        ("paging.boundary", GQA, reaches(4)),
        ("paging.boundary", GQA, reaches(5)),
        ("paging.copy-on-write", GQA, steps(Fork)),
        ("quantised.residual", GQA, reaches(5)),
        ("capture.growth", GQA, two_live_interleaved),
        ("capture.aliasing", GQA, steps(Append, lambda s: s.in_place)),
        ("accounting.affine", GQA, steps(Append, lambda s: s.count_macs)),
    ],
)
def test_the_family_reaches(clause: str, config: Config, situation: Callable[[Program], bool]) -> None:
    family = BY_NAME[clause].strategy(config, EVERYTHING)
    calm = settings(max_examples=3000, database=None, phases=(Phase.generate,), suppress_health_check=list(HealthCheck))
    try:
        case = find(family, lambda case: any(situation(p) for p in case.programs), settings=calm)
    except NoSuchExample:
        pytest.fail("not reached in 3000 cases")
    assert any(situation(program) for program in case.programs)


def test_a_needle_points_at_every_slot() -> None:
    seen: set[int] = set()

    def every(case: Case) -> bool:
        aims = {step.needle for step in case.programs[0].steps if isinstance(step, Append)}
        seen.update(aim[1] for aim in aims if aim is not None)
        return seen >= set(range(GQA.capacity))

    calm = settings(max_examples=3000, database=None, phases=(Phase.generate,), suppress_health_check=list(HealthCheck))
    with suppress(NoSuchExample):
        find(BY_NAME["causality.past-seen"].strategy(GQA, EVERYTHING), every, settings=calm)
    assert seen == set(range(GQA.capacity))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_families_stay_within_the_claims(data: st.DataObject) -> None:
    config = data.draw(st.sampled_from(list(CONFIGS.values())), label="config")
    clause = data.draw(st.sampled_from([c for c in ALL if c.concerns(config) and not c.needs]), label="clause")
    case: Case = data.draw(clause.strategy(config, POOR), label="case")
    for program in case.programs:
        live: set[str] = set()
        for step in program.steps:
            assert isinstance(step, Append | Close), step
            if isinstance(step, Append):
                live.add(step.seq)
                assert len(step.counts) == 1
                assert step.counts[0] <= 4
            else:
                live.discard(step.seq)
            assert len(live) <= 1


def test_every_clause_concerns_a_config() -> None:
    for clause in ALL:
        assert any(clause.concerns(config) for config in CONFIGS.values()), clause.name


def test_the_configs_cover_what_the_suite_speaks_of() -> None:
    """Deeper than one layer, head dims of every kind, and each option on and off."""
    configs = list(CONFIGS.values())
    assert any(c.layers >= 2 for c in configs)
    assert any(c.head_dim % 8 for c in configs)
    assert {c.group == 1 for c in configs} == {True, False}
    assert {c.kv_heads == 1 for c in configs} == {True, False}
    assert {c.positions for c in configs} == {"none", "learned", "rope", "alibi"}
    for option in ("window", "softcap", "sink", "scale"):
        assert {getattr(c, option) is None for c in configs} == {True, False}, option
    assert any(c.window_every > 1 and c.layers > 1 for c in configs)
