"""The maps show what each output sees: the exact differences of faults, none of what is right; text and picture tell
each of them."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import mapped_subjects
import msgspec
import numpy as np
import pytest
from lanes import slow_except
from places import SUPPORT

from kvconform.errors import WorkerDied
from kvconform.explain.visibility import FORBIDDEN, REQUIRED, Map, maps
from kvconform.explain.visibility.measure import SEEDS
from kvconform.explain.visibility.schedules import Schedule, schedules
from kvconform.explain.visibility.text import LEGEND, MARKS, coverage, drawing, listed, title, words
from kvconform.mutation.fault import load_faults
from kvconform.worker.client import WorkerClient, WorkerSpec
from kvconform.worker.execute import feeds_of
from kvconform_backends.numpy.cache import Array, NumpyCache
from kvconform_reports.view import maps as pictures
from kvconform_specs.config import Config
from kvconform_specs.configs import CONFIGS, LONG
from kvconform_specs.program import Program

SHORT = {name: config for name, config in CONFIGS.items() if config.capacity < LONG}
"""A map has 24 tokens at most: of a long context it shows nothing that a short one does not."""
FAULTS, SUBJECTS = "kvconform_backends.faults", str(SUPPORT / "mapped_subjects.py")


def mapped(address: str, config: str | Config = "attention-gqa") -> dict[str, Map]:
    with WorkerClient(WorkerSpec(address)) as client:
        wanted = {**CONFIGS, **client.configs}[config] if isinstance(config, str) else config
        return {one.schedule: one for one in maps(client, wanted)}


def cells(kind: str, *places: tuple[int, Iterable[int]]) -> set[tuple[int, int, str]]:
    return {(query, key, kind) for query, keys in places for key in keys}


# --- what is right ---
CLEAN = ["numpy", "numpy-static", "numpy-ring", "numpy-paged", "numpy-int8"]
CLEAN += [control.address for control in load_faults(f"{FAULTS}:CONTROLS")]


@pytest.mark.slow
@pytest.mark.parametrize("address", slow_except(CLEAN, 16), ids=lambda address: address.rpartition(":")[2])
def test_what_is_right_sees_what_it_must_under_every_schedule_and_config(address: str) -> None:
    with WorkerClient(WorkerSpec(address)) as client:
        looked = 0
        for name, config in SHORT.items():
            for one in maps(client, config):
                assert one.right, (name, words(one))
                expected = f"{title(one)}: as expected within {len(one.wanted) // one.rows} tokens"
                looked += 1
                if client.claims.kv_bits:  # a change may be smaller than the steps of quantisation
                    assert words(one).startswith(expected)
                    continue
                assert not one.unresolved, (name, words(one))
                assert words(one) == expected
    assert looked >= 12


def test_a_right_black_box_is_right_and_its_window_is_read_off_its_own_forward() -> None:
    found = mapped(f"{SUBJECTS}:Box", "decoder-self")
    assert [one.right for one in found.values()] == [True] * 6
    banded = ["".join("x" if 0 <= i - j < 4 else "." for j in range(8)) for i in range(8)]
    assert all(found[name].wanted == found[name].seen == banded for name in ("full", "prefill", "chunked", "decode"))


# --- faults, cell by cell ---
def test_a_mask_from_the_top_left_shows_decode_steps_the_first_token_alone() -> None:
    found = mapped(f"{FAULTS}.causality:TopLeft")
    assert found["full"].right
    assert found["prefill"].right
    assert set(found["decode"].differences) == cells(REQUIRED, *((i, range(1, i + 1)) for i in range(1, 8)))
    assert words(found["decode"]) == "decode: tokens 1–7 do not see the tokens from 1 to their own, only token 0"
    missed = [(3, (1, 2, 3)), (4, (2, 3, 4)), (5, range(1, 6)), (6, range(1, 7)), (7, range(2, 8))]
    assert set(found["chunked"].differences) == cells(REQUIRED, *missed)


@pytest.mark.parametrize("config", ["attention-gqa", "decoder-rope"])
def test_a_chunk_that_sees_its_future_is_wrong_where_it_is_on_a_cache_and_only_there(config: str) -> None:
    found = mapped(f"{FAULTS}.causality:ChunkSeesAhead", config)
    assert {name for name, one in found.items() if not one.right} == {"chunked", "rows"}
    assert found["chunked"].differences == [(3, 4, FORBIDDEN), (6, 7, FORBIDDEN)]
    assert found["rows"].differences == [(3, 4, FORBIDDEN), (8, 9, FORBIDDEN)]
    context = " in context 0" if CONFIGS[config].contexts > 1 else ""
    assert words(found["chunked"]) == f"chunked 3+2+1+2{context}: tokens 3 and 6 see the next token (their future)"
    assert words(found["rows"]) == f"rows 2+1+2{context}: in rows 0 and 1 token 3 sees token 4 (its future)"


@pytest.mark.parametrize(
    ("name", "kind", "back", "sentence"),
    [
        ("WindowTooLong", FORBIDDEN, 5, "tokens 5–7 see the token 5 back (out of reach)"),
        ("WindowTooShort", REQUIRED, 4, "tokens 4–7 do not see the token 4 back"),
    ],
)
def test_a_window_that_is_off_by_one_shows_one_diagonal(name: str, kind: str, back: int, sentence: str) -> None:
    found = mapped(f"{FAULTS}.causality:{name}", "attention-window")
    for schedule in ("full", "prefill", "chunked", "decode"):
        assert found[schedule].differences == [(i, i - back, kind) for i in range(back, 8)]
        assert words(found[schedule]) == f"{title(found[schedule])}: {sentence}"


def test_a_window_in_some_layers_bans_nothing_that_the_others_show() -> None:
    found = mapped(f"{FAULTS}.causality:WindowTooLong", "decoder-learned")
    assert all(one.right for one in found.values())
    assert found["decode"].wanted[7] == "xxxxxxxx"


def test_a_decode_step_that_drops_its_own_token_misses_the_diagonal() -> None:
    found = mapped(f"{FAULTS}.causality:DecodeSeesOneLess")
    assert found["decode"].differences == [(i, i, REQUIRED) for i in range(1, 8)]
    assert words(found["decode"]) == "decode: tokens 1–7 do not see themselves"
    assert found["chunked"].differences == [(5, 5, REQUIRED)]
    assert found["prefill"].right


def test_a_ring_that_drops_the_newest_of_a_full_window_keeps_what_it_should_evict() -> None:
    found = mapped(f"{FAULTS}.window:NewestSlotOverwritten", "attention-window")
    for schedule in ("chunked", "decode"):
        wrong = cells(FORBIDDEN, (6, [0]), (7, [0])) | cells(REQUIRED, (6, [4]), (7, [4]))
        assert set(found[schedule].differences) == wrong


def test_a_row_that_is_written_into_another_is_seen_there() -> None:
    found = mapped(f"{FAULTS}.batch:RowsLandInFirst")
    assert [name for name, one in found.items() if not one.right] == ["rows"]
    lost = [*((i, range(i + 1)) for i in range(5)), *((5 + i, range(5, 6 + i)) for i in range(5))]
    leaked = [(i, range(5, 6 + i)) for i in range(5)]
    assert set(found["rows"].differences) == cells(REQUIRED, *lost) | cells(FORBIDDEN, *leaked)
    assert "in row 0 tokens 0–4 see the tokens from 0 to their own of row 1" in words(found["rows"])


# --- state that stays behind ---
def test_a_cache_that_nobody_clears_shows_its_older_sequence_to_the_newer_one() -> None:
    found = mapped("tests/support/subjects.py:GlobalCache")
    assert list(found) == ["full", "prefill", "sequences"]
    assert not found["prefill"].right
    assert words(found["prefill"]).startswith("prefill: not repeatable: the output of")
    assert set(found["prefill"].seen) == {"????????"}
    assert found["prefill"].wanted[2] == "xxx....."
    one = found["sequences"]
    assert set(one.differences) == cells(FORBIDDEN, *((i, (0, 1, 2)) for i in (6, 7, 8)))
    assert words(one).startswith("sequences 2+1: in sequence 2 tokens 0–2 see tokens 0–2 of sequence 0; each run is")


def test_what_differs_from_run_to_run_within_its_bound_is_no_difference() -> None:
    found = mapped(f"{SUBJECTS}:Whispers")
    assert all(one.right for one in found.values())
    assert "differs between runs of the same tokens, within its bound" in words(found["prefill"])


def test_nothing_is_told_of_what_differs_from_run_to_run() -> None:
    found = mapped(f"{SUBJECTS}:Shouts")
    assert list(found) == ["prefill", "sequences"]
    for one in found.values():
        assert not one.right
        assert not one.differences
        assert set("".join(one.seen)) == {"?"}


# --- what ends a schedule, and what leaves it out ---
def test_an_exception_leaves_the_outputs_blank_from_there_on() -> None:
    found = mapped(f"{SUBJECTS}:RefusesChunks")
    assert found["prefill"].right
    one = found["chunked"]
    assert one.seen[:3] == one.wanted[:3]
    assert one.seen[3:] == [" " * 8] * 5
    assert one.wanted[7] == "x" * 8
    assert not one.right
    assert not one.differences
    stopped = "step 1 (append 2 to a): raised RuntimeError: masks <&> tokens\x00 of other sizes"
    assert one.stopped == stopped
    assert words(one) == f"chunked 3+2+1+2: no output of tokens 3–7; stopped at {stopped}"


def test_what_ends_the_process_is_raised() -> None:
    with (
        WorkerClient(WorkerSpec(f"{SUBJECTS}:Dies")) as client,
        pytest.raises(WorkerDied, match=r"step 0 \(uncached_forward 8 to a\)"),
    ):
        maps(client, CONFIGS["attention-gqa"])


def test_outputs_that_are_no_numbers_cannot_be_told() -> None:
    one = mapped(f"{SUBJECTS}:DividesByZero")["decode"]
    assert one.seen == [*one.wanted[:4], "?" * 8, *one.wanted[5:]]
    assert not one.right
    assert words(one) == "decode: the output of token 4 is not finite"


@pytest.mark.parametrize("config", ["attention-gqa", "decoder-rope"])
def test_a_backend_that_gives_the_last_output_has_a_map_of_those(config: str) -> None:
    found = mapped(f"{SUBJECTS}:LastAlone", config)
    assert all(one.right for one in found.values())
    assert found["full"].seen[0] == "x......."
    assert found["prefill"].wanted == found["prefill"].seen == [" " * 8] * 7 + ["x" * 8]
    assert [i for i, line in enumerate(found["chunked"].wanted) if line.strip()] == [2, 4, 5, 7]
    assert words(found["prefill"]) == "prefill: as expected within 8 tokens"


def test_schedules_stay_within_the_claims() -> None:
    alone = mapped(f"{SUBJECTS}:OneByOne")
    assert {name: one.sizes for name, one in alone.items()} == {"decode": [1] * 8, "sequences": [1, 1, 1]}
    twos = mapped(f"{SUBJECTS}:InTwos")
    assert {name: one.sizes for name, one in twos.items()} == {
        "prefill": [2],
        "chunked": [2, 2, 1, 2, 1],
        "decode": [1] * 8,
        "rows": [2, 1, 2],
        "sequences": [2, 1],
    }
    assert all(one.right for one in (*alone.values(), *twos.values()))


def test_schedules_are_longer_than_a_window_and_no_longer_than_the_capacity() -> None:
    def sizes(least: int = 0, **changes: Any) -> list[int]:
        config = replace(CONFIGS["attention-window"], **changes)
        return [schedule.length for schedule in schedules(config, NumpyCache.claims, least) if schedule.rows == 1]

    assert sizes(window=None) == sizes(window=5) == sizes(least=5) == [8] * 4
    assert sizes(window=7) == [10] * 4
    assert sizes(window=16) == [19] * 4
    assert sizes(window=30) == [24] * 4
    assert sizes(window=30, capacity=6) == [6] * 4
    assert sizes(least=17) == [17] * 4
    assert sizes(least=17, capacity=12) == [12] * 4
    assert sizes(least=90) == [24] * 4


def test_a_failure_beyond_eight_tokens_is_in_the_map() -> None:
    assert all(one.right for one in mapped(f"{SUBJECTS}:NoOldest").values())
    with WorkerClient(WorkerSpec(f"{SUBJECTS}:NoOldest")) as client:
        decode = next(one for one in maps(client, CONFIGS["attention-gqa"], 15) if one.schedule == "decode")
    assert words(decode) == "decode: tokens 13 and 14 do not see token 0"


def test_what_a_backend_does_not_take_has_no_maps() -> None:
    with WorkerClient(WorkerSpec("numpy-ring")) as client:
        assert maps(client, CONFIGS["attention-gqa"]) == []
        assert maps(client, replace(CONFIGS["decoder-learned"], dtype="bfloat16")) == []
        assert maps(client, mapped_subjects.Box.configs["decoder-self"]) == []


# --- what can be resolved ---
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_needles_resolve_what_has_no_weight_else_and_without_them_it_is_neither_right_nor_wrong(dtype: str) -> None:
    sharp = Config("attention", heads=4, kv_heads=2, head_dim=8, scale=60.0, dtype=dtype)
    with WorkerClient(WorkerSpec("numpy")) as client:
        found = {one.schedule: one for one in maps(client, sharp)}
    assert all(one.right for one in found.values())
    assert {name for name, one in found.items() if one.unresolved} == {"full"}  # whose queries nothing can aim
    full = found["full"]
    assert words(full) == f"full: as expected within 8 tokens; {full.unresolved} cells are not resolvable"
    assert full.unresolved == "".join(full.wanted).count("?")


@pytest.mark.parametrize("vocabulary", [2, 3])
def test_a_changed_token_is_another_one_however_few_there_are(vocabulary: int) -> None:
    config = replace(CONFIGS["decoder-rope"], vocabulary=vocabulary)
    schedule = Schedule("decode", (1,) * 8)
    for seed in SEEDS:
        tokens = fed(schedule.program(config, NumpyCache.claims, seed))
        for position in range(8):
            changed = fed(schedule.program(config, NumpyCache.claims, seed, position))
            assert np.flatnonzero(changed != tokens).tolist() == [position]


def fed(program: Program) -> Array:
    """The token ids that the steps of a program hand over, one after another."""
    return np.concatenate([inputs[0][0, 0] for inputs, _keywords in feeds_of(program, (0,))])


# --- black boxes ---
def test_a_black_box_is_wrong_where_it_is_not_its_own_forward() -> None:
    found = mapped(f"{SUBJECTS}:BoxTopLeft", "decoder-self")
    assert found["full"].right
    assert words(found["decode"]) == (
        "decode: tokens 4–7 do not see the tokens from 3 back to the one before; "
        "tokens 2 and 3 do not see the tokens from 1 to the one before; tokens 4–7 see token 0 (out of reach)"
    )


def test_a_black_box_whose_cache_shows_more_than_its_own_forward_is_seen_to() -> None:
    found = mapped(f"{SUBJECTS}:BoxWithALongerWindow", "decoder-self")
    assert found["prefill"].right
    assert found["decode"].differences == [(i, i - 4, FORBIDDEN) for i in range(4, 8)]


def test_a_truth_that_sees_the_future_is_a_finding() -> None:
    found = mapped(f"{SUBJECTS}:BoxWithoutAMask", "decoder-self")
    ahead = cells(FORBIDDEN, *((i, range(i + 1, 8)) for i in range(7)))
    assert set(found["full"].differences) == set(found["prefill"].differences) == ahead
    assert words(found["full"]) == "full: tokens 0–6 see the tokens from the next one to 7 (their future)"


# --- text and picture ---
EACH = Map(
    schedule="rows",
    sizes=[2, 1],
    rows=2,
    wanted=["x.....", "xx....", "xxx...", "...x..", "...?x.", "...xxx"],
    seen=["x.....", "xx...x", "x-x...".replace("-", "."), "...xx.", "...xx.", "      "],
    stopped="step 1 (append 1 to a of 2 rows): raised <b>&\x00\ud800",
    notes=["something else"],
)


def test_words_tell_each_difference_and_everything_else_that_is_known() -> None:
    assert words(EACH) == (
        "rows 2+1: in row 0 token 1 sees token 2 of row 1; in row 0 token 2 does not see token 1, only tokens 0 and 2; "
        "in row 1 token 0 sees token 1 (its future); no output of token 2 of row 1; "
        f"stopped at {EACH.stopped}; something else; 1 cell is not resolvable"
    )


def test_maps_of_a_backend_with_several_contexts_say_that_they_are_of_one() -> None:
    found = [*mapped("numpy", "decoder-rope").values()]
    assert {one.context for one in found} == {0}
    assert words(found[0]).startswith(f"{found[0].schedule} in context 0: as expected")
    assert coverage(found).endswith("; all in context 0")
    assert coverage(found).count("context") == 1
    assert "context" not in coverage([EACH]) + words(EACH)
    without = mapped("numpy", "decoder-learned")
    assert {one.context for one in without.values()} == {None}


def test_text_marks_each_difference_where_it_is_and_at_its_line_s_end() -> None:
    lines = drawing(EACH).splitlines()
    assert lines[0] == words(EACH)
    assert lines[1].split() == ["expected", "seen"]
    assert lines[2].split() == ["0", "1", "2"] * 4
    body = [line.removesuffix("  <") for line in lines[3:]]
    assert [line.endswith("<") for line in lines[3:]] == [False, True, True, True, False, False]
    start = lines[2].index("0")
    seen = [line[start:].split() for line in body]
    assert seen[1] == list("xx....xx...+")
    assert seen[2] == list("xxx...x-x...")
    assert seen[3] == list("...x.....x+.")
    assert seen[5] == list("...xxx")
    assert all(mark in LEGEND for mark in MARKS.values())


def test_numbers_side_by_side_are_told_as_a_range() -> None:
    assert [listed(numbers) for numbers in ([3], [3, 6], [0, 1, 3, 6], [5, 6, 7], [0, 2, 3, 4])] == [
        "3",
        "3 and 6",
        "0, 1, 3 and 6",
        "5–7",
        "0 and 2–4",
    ]


def test_a_picture_is_valid_xml_with_the_words_as_its_description() -> None:
    svg = ET.fromstring(pictures.drawing(EACH))
    assert svg.get("role") == "img"
    assert svg.findtext("title") == "Visibility map: rows 2+1"
    told = pictures.words(EACH)
    assert svg.findtext("desc") == told == words(EACH).replace("\x00", "�").replace("\ud800", "�")
    assert "style" not in {name for node in svg.iter() for name in node.attrib}  # the report's policy lets none pass


def test_a_picture_marks_each_difference_by_a_shape_of_its_own() -> None:
    def shapes(one: Map) -> dict[str, int]:
        paths = "".join(node.get("d", "") for node in ET.fromstring(pictures.drawing(one)).iter("path"))
        # a disc, a dashed frame, a square, a dot
        return {
            kind: paths.count(part)
            for kind, part in zip("+-x.", ("a7 7 0 1 0 14 0", "h12v12", "h9v9", "h0"), strict=True)
        }

    wanted = "".join(EACH.wanted)
    assert shapes(EACH) == {
        "+": 2,
        "-": 1,
        "x": wanted.count("x") + "".join(EACH.seen).count("x") - 2,
        ".": wanted.count(".") + "".join(EACH.seen).count(".") - 1,
    }
    assert shapes(msgspec.structs.replace(EACH, seen=EACH.wanted)) == {"+": 0, "-": 0, "x": 22, ".": 48}


def test_a_picture_of_a_fault_tells_what_the_text_tells() -> None:
    for one in mapped(f"{FAULTS}.causality:TopLeft").values():
        svg = ET.fromstring(pictures.drawing(one))
        assert svg.findtext("desc") == words(one)
        assert [node.text for node in svg.iter("text")].count("expected") == 1


def test_the_legend_names_every_mark() -> None:
    svg = ET.fromstring(pictures.legend())
    assert [node.text for node in svg.iter("text")] == [
        "sees",
        "does not see",
        "?",
        "unknown",
        "sees and must not",
        "does not see and must",
    ]
