"""Diagnoses: evidence about which tokens outputs see names a mistake, other mistakes get their smallest condition, and
a clean backend gets nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import numpy as np
import pytest
from lanes import slow_except
from naming_rates import named
from places import SUPPORT

from kvconform.explain import visibility
from kvconform.explain.diagnosis import Diagnosis, decided, diagnose, edits, map_matches
from kvconform.explain.diagnosis.battery import BATTERY
from kvconform.explain.diagnosis.cache_edits import CacheModel, views
from kvconform.explain.diagnosis.coded_cache import Coded
from kvconform.explain.diagnosis.conditions import condition
from kvconform.explain.diagnosis.mask_edits import MASK_EDITS, MaskEdit, causal
from kvconform.explain.diagnosis.mistakes import MISTAKES
from kvconform.explain.diagnosis.probe_steps import OTHER
from kvconform.explain.diagnosis.probes import STREAMS, first_stream, probes
from kvconform.explain.diagnosis.record import Condition, EditMatch, Leak
from kvconform.explain.diagnosis.symptoms import EARLIER_PROGRAM, OutputCell
from kvconform.explain.diagnosis.text import condition as condition_words
from kvconform.explain.diagnosis.text import edit as edit_words
from kvconform.explain.diagnosis.text import precision as precision_words
from kvconform.explain.diagnosis.text import sentence
from kvconform.explain.diagnosis.trials import trials
from kvconform.explain.visibility import Map
from kvconform.mutation.fault import load_faults
from kvconform.worker.client import WorkerClient, WorkerSpec
from kvconform.worker.registry import load
from kvconform_backends.faults import classes
from kvconform_specs.claims import Claims, Precision
from kvconform_specs.clause import Case
from kvconform_specs.configs import CONFIGS
from kvconform_specs.history import seen_by
from kvconform_specs.program import (
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
from kvconform_specs.quantisers import Quantiser
from kvconform_specs.reference.quantisation import quantisation_error

FAULTS = {fault.name: fault for fault in load_faults("kvconform_backends.faults:FAULTS")}


def diagnosed(
    address: str, config: str = "attention-gqa", cases: Sequence[Case] = (), mapped: bool = False
) -> Diagnosis | None:
    with WorkerClient(WorkerSpec(address)) as client:
        its = {**CONFIGS, **client.configs}[config]
        return diagnose(client, its, cases, visibility.maps(client, its) if mapped else [])


def of(name: str) -> str:
    return f"{SUPPORT / 'undiagnosed_faults.py'}:{name}"


# --- names ---
@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "config", "mistake", "words"),
    [
        (
            "top-left",
            "attention-gqa",
            "M1",
            "every wrong output is what the reference gives with the causal mask aligned",
        ),
        ("chunk-top-left", "decoder-rope", "M1", "aligned to the top left in steps of several tokens"),
        (
            "chunk-sees-ahead",
            "decoder-rope",
            "M2",
            "with the later tokens of the step visible, where tokens are cached",
        ),
        ("window-too-long", "attention-window", "W1", "what the reference gives with a window larger by one"),
        ("evicted-early", "attention-window", "W3", "without the oldest token in decode steps that fill the window"),
        ("newest-slot-overwritten", "attention-window", "W3", "with token 0 kept and the newest token overwritten"),
        ("truncate-ignored", "attention-gqa", "C8", "what the reference gives if a truncation is ignored"),
        (
            "reorder-ignored",
            "attention-gqa",
            "C10",
            "33 of 42 wrong outputs are what the reference gives if a reorder is",
        ),
        ("published-global-list", "attention-gqa", "C6", "with the tokens of all earlier programs in front"),
    ],
)
def test_a_planted_fault_is_named_by_an_edit(fault: str, config: str, mistake: str, words: str) -> None:
    found = diagnosed(FAULTS[fault].address, config)
    assert found is not None
    assert found.mistake == mistake
    assert mistake in FAULTS[fault].classes
    assert found.edit is not None
    assert found.edit.right_too
    assert found.map is None
    assert words in sentence(found)
    assert sentence(found).startswith(f'matches "{MISTAKES[mistake].words}" ({mistake}, {MISTAKES[mistake].bug}): ')
    assert sentence(found).endswith(MISTAKES[mistake].remedy)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "mistake", "schedules"),
    [("TopLeftMask", "M1", ["chunked", "decode", "rows", "sequences"]), ("UnmaskedChunk", "M2", ["chunked", "rows"])],
)
def test_a_published_listing_is_named_by_its_maps(name: str, mistake: str, schedules: list[str]) -> None:
    pytest.importorskip("torch", reason="the listings are in torch")
    found = diagnosed(f"py:{SUPPORT / 'published_listings.py'}:{name}", "decoder-self", mapped=True)
    assert found is not None
    assert (found.mistake, found.bug) == (mistake, MISTAKES[mistake].bug)
    assert found.map is not None
    assert (found.map.mistakes, found.map.schedules) == ([mistake], schedules)
    assert f"the visibility maps ({', '.join(schedules)}) show attention with" in sentence(found)


@pytest.mark.slow
def test_a_right_mask_is_not_named() -> None:
    pytest.importorskip("torch", reason="the listings are in torch")
    assert diagnosed(f"py:{SUPPORT / 'published_listings.py'}:RightMask", "decoder-self", mapped=True) is None


@pytest.mark.parametrize("backend", ["numpy", "numpy-static"])
def test_a_clean_backend_gets_no_diagnosis(backend: str) -> None:
    assert diagnosed(backend) is None


@pytest.mark.slow
def test_a_loop_that_is_wrong_on_right_steps_is_named() -> None:
    for address in (FAULTS["published-generation"].address, of("WrongLoop")):
        found = diagnosed(address, "decoder-rope")
        assert found is not None
        assert (found.mistake, found.generation_only) == ("L1", True)
        assert "only greedy generation is wrong, its steps are right; first wrong probe (greedy gen" in sentence(found)


def test_every_mistake_is_a_class_of_the_catalogue_with_one_of_its_bugs() -> None:
    for name, mistake in MISTAKES.items():
        assert mistake.words == classes.CLASSES[name].partition(": ")[2]
        assert mistake.bug in {fault.bug for fault in FAULTS.values() if name in fault.classes}
        assert mistake.remedy.endswith(".")
        assert ". " not in mistake.remedy


@pytest.mark.slow
def test_a_wrong_name_is_rare() -> None:
    outcomes = [outcome for _fault, _config, outcome, _words in named(list(FAULTS.values())[::24])]
    assert len(outcomes) > 6
    assert "wrong" not in outcomes


# --- without a name ---
def test_an_unknown_mistake_is_not_named_but_has_a_condition() -> None:
    found = diagnosed(of("DecodeOnePercent"))
    assert found is not None
    assert (found.mistake, found.bug, found.edit) == ("", "", None)
    assert found.condition is not None
    assert found.condition.exact
    assert found.condition.predicates == ["in decode steps (q = 1 with past > 0)"]
    assert sentence(found).startswith(
        "matches no known mistake: only in decode steps (q = 1 with past > 0); first wrong"
    )


def test_the_condition_names_the_rows_and_the_diagnosis_the_heads() -> None:
    found = diagnosed(of("SecondHead"))
    assert found is not None
    assert found.mistake == ""
    assert found.condition is not None
    assert found.condition.predicates == ["with row ≠ 0"]
    assert found.heads == [1]
    assert "right ones); only in head 1; first wrong probe (two rows): step 0" in sentence(found)


def test_a_backend_that_dies_has_a_diagnosis() -> None:
    found = diagnosed(of("DiesOnChunks"))
    assert found is not None
    assert found.mistake == ""
    assert found.first is not None
    assert "died of SIGKILL" in found.first.sentence


def test_a_counterexample_serves_as_a_probe() -> None:
    case = Case((Program(CONFIGS["attention-gqa"], (Append("a", (23,), 0), Append("a", (1,), 0))),))
    assert diagnosed(of("Prompt23")) is None
    found = diagnosed(of("Prompt23"), cases=(case,))
    assert found is not None
    assert found.mistake == ""
    assert "first wrong probe (a counterexample): step 0 (append 23 to a), row 0, position 0" in sentence(found)


def test_a_counterexample_may_append_nothing() -> None:
    steps = (Append("a", (3, 3), 0), Append("a", (0, 0), 0), Append("a", (1, 1), 0))
    found = diagnosed(of("DecodeOnePercent"), cases=(Case((Program(CONFIGS["attention-gqa"], steps),)),))
    assert found is not None
    assert found.condition is not None
    assert found.condition.predicates == ["in decode steps (q = 1 with past > 0)"]


def test_a_counterexample_may_read_a_decoder_s_cache() -> None:
    steps = (Append("a", (3, 3), 0), ReadCache("a"), Append("a", (1, 1), 0), ReadCache("a"))
    case = Case((Program(CONFIGS["decoder-rope"], steps),))
    found = diagnosed(of("RaisesOnDecode"), "decoder-rope", (case,))
    assert found is not None
    assert found.first is not None
    assert "raised ValueError: shapes differ" in found.first.sentence


# --- black boxes ---
def test_a_black_box_is_named_by_its_maps() -> None:
    found = diagnosed(of("BoxTopLeft"), "hidden-self", mapped=True)
    assert found is not None
    assert found.mistake == "M1"
    assert found.map is not None


def test_a_black_box_is_named_by_an_edit() -> None:
    found = diagnosed(of("BoxStale"), "hidden-self")
    assert found is not None
    assert found.mistake == "C6"
    assert "every wrong output is what the reference gives with the tokens of all earlier programs in" in sentence(
        found
    )


def test_an_edit_that_many_mistakes_look_like_is_reported_without_a_name() -> None:
    found = diagnosed(of("BoxWithoutNewest"), "hidden-self")
    assert found is not None
    assert found.mistake == ""
    assert "every first wrong output is what the reference gives without the newest cached token" in sentence(found)


def test_a_clean_black_box_gets_no_diagnosis() -> None:
    assert diagnosed(of("BoxRight"), "hidden-self", mapped=True) is None


def test_a_black_box_with_an_unknown_mistake_is_not_named() -> None:
    found = diagnosed(of("BoxScaled"), "hidden-self", mapped=True)
    assert found is not None
    assert found.mistake == ""
    assert "with length after the step ≥ 7" in sentence(found)


def test_a_reference_that_sees_the_future_is_the_diagnosis() -> None:
    found = diagnosed(f"{SUPPORT / 'mapped_subjects.py'}:BoxWithoutAMask", "decoder-self", mapped=True)
    assert found == Diagnosis(reference_wrong=True)
    assert sentence(found).startswith("the reference itself is wrong: the target's uncached forward gives tokens other")
    assert "decode" not in sentence(found)


# --- evidence ---
@pytest.mark.parametrize("name", [of("DecodeOnePercent"), FAULTS["kv-heads-tiled"].address])
def test_outputs_that_no_tokens_give_match_no_edit(name: str) -> None:
    found = diagnosed(name, mapped=True)
    assert found is not None
    assert (found.mistake, found.edit, found.map) == ("", None, None)


def test_edits_stand_for_known_mistakes_and_a_right_cache_changes_nothing() -> None:
    assert {name for edit in edits.EDITS for name in edit.classes} | {"L1", "P5"} == set(MISTAKES)
    assert len({edit.words for edit in edits.EDITS}) == len(edits.EDITS)
    for probe in probes(CONFIGS["attention-window"], load("numpy-static").claims):
        for view, rows in zip(views(probe.program, CacheModel()), seen_by(probe.program), strict=True):
            assert rows is None or (view is not None and tuple(tuple(t[0] for t in row) for row in view) == rows)


def test_a_mistake_is_named_where_all_evidence_agrees() -> None:
    none = frozenset[str]()
    assert decided([none, none]) == ""
    assert decided([frozenset({"M1"}), none]) == "M1"
    assert decided([frozenset({"W4", "W5"}), none]) == ""
    assert decided([frozenset({"W4", "W5"}), frozenset({"W5"})]) == "W5"
    assert decided([frozenset({"M1"}), frozenset({"C6"})]) == ""


def test_the_best_edits_name_what_they_have_in_common() -> None:
    def match(mistakes: list[str], matched: int, right_too: bool = True) -> EditMatch:
        return EditMatch(words="", mistakes=mistakes, matched=matched, wrong=10, right_too=right_too)

    assert edits.named([]) == frozenset()
    assert edits.named([match(["M1"], 10)]) == {"M1"}
    assert edits.named([match(["M1"], 4)]) == frozenset()
    assert edits.named([match(["W1"], 10), match(["W1", "W3"], 10)]) == {"W1"}
    assert edits.named([match(["W1"], 10), match([], 10)]) == frozenset()
    assert edits.named([match(["W1"], 10), match(["W2"], 10, right_too=False), match(["W3"], 9)]) == {"W1"}
    assert edit_words(match([], 5)) == "5 of 10 wrong outputs are what the reference gives , all that this changes"


def shown(schedule: str, sizes: list[int], *seen: str) -> Map:
    wanted = ["x" * (i + 1) + "." * (len(seen) - i - 1) for i in range(len(seen))]
    return Map(schedule=schedule, sizes=sizes, wanted=wanted, seen=list(seen))


@pytest.mark.parametrize(
    ("seen", "mistakes"),
    [
        (("x...", "x...", "x...", "x..."), {"M1"}),
        (("x...", "x...", "x...", "xx.."), set()),  # no known mask
        (("x...", "xx..", "xxx.", "xxxx"), set()),  # right
        (("x...", ".x..", ".xx.", ".xxx"), set()),  # token 0 may be hidden in all steps, or in those with a cache
        (("x...", "xx..", "xxx.", "xxx."), set()),  # too few differences
        (("x...", "x...", "xx..", "xxx."), set()),  # several mistakes look like a token that does not see itself
    ],
)
def test_the_map_of_decode_steps_names_a_mask(seen: tuple[str, ...], mistakes: set[str]) -> None:
    claims = load("numpy").claims
    found = map_matches.matches([shown("decode", [1] * 4, *seen)], CONFIGS["attention-gqa"], claims)
    assert map_matches.named(found) == mistakes


def test_every_map_must_show_what_the_edit_predicts() -> None:
    claims, config = load("numpy").claims, CONFIGS["attention-gqa"]
    decode, right = shown("decode", [1] * 4, *["x..."] * 4), shown("chunked", [2, 2], "x...", "xx..", "xxx.", "xxxx")
    assert map_matches.named(map_matches.matches([decode], config, claims)) == {"M1"}
    found = map_matches.matches([decode, right], config, claims)
    assert [one.words for one in found] == ["with the causal mask aligned to the top left in decode steps"]
    wrong = shown("chunked", [2, 2], "x...", "xx..", "x...", "xxx.")
    assert map_matches.matches([decode, wrong], config, claims) == []


def test_an_oldest_token_that_is_missing_wherever_tokens_are_cached_was_not_kept() -> None:
    claims, config = load("numpy").claims, CONFIGS["attention-gqa"]
    decode = shown("decode", [1] * 4, "x...", ".x..", ".xx.", ".xxx")
    kept, lost = (
        shown("prefill", [4], "x...", *lines) for lines in (("xx..", "xxx.", "xxxx"), (".x..", ".xx.", ".xxx"))
    )
    assert map_matches.named(map_matches.matches([decode, kept], config, claims)) == {"C1"}
    assert map_matches.named(map_matches.matches([decode, lost], config, claims)) == frozenset()
    later = shown("chunked", [2, 2], "x...", "xx..", "xxx.", ".xxx")  # not at every length
    assert map_matches.matches([decode, kept, later], config, claims) == []


@pytest.mark.slow
@pytest.mark.parametrize("mapped", [False, True])
def test_a_past_without_its_oldest_token_is_named(mapped: bool) -> None:
    found = diagnosed(of("OldestDropped"), mapped=mapped)
    assert found is not None
    assert found.mistake == "C1"
    assert "without token 0, where tokens are cached" in sentence(found)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["window-too-long", "window-too-short", "window-never-applied", "newest-slot-overwritten"]
)
def test_maps_name_mistakes_at_the_edge_of_a_window(name: str) -> None:
    found = diagnosed(FAULTS[name].address, "attention-window", mapped=True)
    assert found is not None
    assert found.mistake in FAULTS[name].classes
    assert found.map is not None
    assert found.map.mistakes == [found.mistake]


@pytest.mark.slow
def test_the_masks_of_several_layers_compose() -> None:
    found = diagnosed(FAULTS["chunk-sees-ahead"].address, "decoder-rope", mapped=True)
    assert found is not None
    assert found.map is not None
    assert found.map.mistakes == ["M2"]


def test_a_map_shows_leaks_between_rows_and_sequences() -> None:
    def leak(schedule: str, *pairs: tuple[int, int]) -> Leak | None:
        seen = ["".join("x" if (q, k) in pairs or q == k else "." for k in range(3)) for q in range(3)]
        return map_matches.leak([Map(schedule=schedule, sizes=[1], wanted=["x..", ".x.", "..x"], seen=seen, rows=3)])

    assert leak("sequences") is None
    assert leak("sequences", (1, 0), (2, 0)) == Leak(between="earlier sequences", mistakes=["C6", "M6"])
    assert leak("sequences", (1, 0), (0, 1)) == Leak(between="open sequences", mistakes=["C7"])
    assert leak("rows", (1, 0)) == Leak(between="rows", mistakes=["H2", "H4"])


SCHEDULES = (("prefill", (8,)), ("chunked", (3, 2, 1, 2)), ("decode", (1,) * 9))


def masked(edit: MaskEdit, schedule: str, sizes: Sequence[int], window: int) -> Map:
    """What a backend with the edited mask would show."""
    past, count = np.repeat([0, *accumulate(sizes)][:-1], sizes), np.repeat(sizes, sizes)
    place = np.arange(sum(sizes))
    right = causal(place[:, None], place[None, :], window)
    wanted, seen = (
        ["".join(".x"[cell] for cell in row) for row in mask.astype(int)]
        for mask in (right, edit.mask(past, count, window))
    )
    return Map(schedule=schedule, sizes=list(sizes), wanted=wanted, seen=seen)


def test_no_two_mask_edits_with_different_mistakes_show_the_same_maps() -> None:
    claims, config = load("numpy").claims, CONFIGS["attention-window"]
    assert config.window is not None
    for edit in MASK_EDITS:
        if not edit.classes:
            continue
        maps = [masked(edit, schedule, sizes, config.window) for schedule, sizes in SCHEDULES]
        found = map_matches.matches(maps, config, claims)
        if sum(len(one.differences) for one in maps) < map_matches.MIN_CELLS:
            assert found == []
            continue
        assert edit.words in [one.words for one in found]
        assert map_matches.named(found) <= set(edit.classes), edit.words


# --- probes ---
@pytest.mark.parametrize("backend", ["numpy", "numpy-static", "numpy-ring", "numpy-paged", "numpy-int8", "eager"])
@pytest.mark.parametrize("config", ["attention-window", "decoder-rope"])
def test_probes_stay_within_the_claims(backend: str, config: str) -> None:
    claims = load(backend).claims
    battery = list(probes(CONFIGS[config], claims))
    assert len(battery) >= 24
    for step in (step for probe in battery for step in probe.program.steps):
        if isinstance(step, Reset):
            assert claims.can("reset")
        if isinstance(step, Append | UncachedForward):
            assert claims.can("ragged") or len(set(step.counts)) == 1
        if isinstance(step, Reject):
            assert claims.can("overflow refused") or claims.can("refusal") or claims.can("truncate")


def test_one_row_one_sequence_and_short_chunks_are_enough_to_probe() -> None:
    claims = replace(load("numpy").claims, max_batch=1, max_sequences=1, max_chunk=3, abilities=("length",))
    battery = list(probes(CONFIGS["decoder-rope"], claims))
    assert {"decode", "many", "to-capacity"} <= {probe.name for probe in battery}
    appends = [step for probe in battery for step in probe.program.steps if isinstance(step, Append)]
    assert max(max(step.counts) for step in appends) <= 3
    assert max(len(step.counts) for step in appends) == 1


def test_every_probe_has_its_own_name_and_streams() -> None:
    names = [plan.name for plan in BATTERY]
    assert len(set(names)) == len(names)
    assert len({first_stream(name) for name in names}) == len(names)
    claims = load("numpy-static").claims
    seen: dict[int, str] = {}
    for config in ("attention-window", "decoder-learned"):
        for probe in probes(CONFIGS[config], claims):
            for step in probe.program.steps:
                if isinstance(step, Append | UncachedForward):
                    for row in range(len(step.counts)):
                        assert seen.setdefault(step.seed + row, probe.name) == probe.name
    assert STREAMS > OTHER


# --- conditions ---
def cells(wrong: str, **facts: str) -> list[OutputCell]:
    """A cell for each character: ``x`` is wrong; each fact gives its numbers, a digit each."""
    plain = {"q": 1, "past": 0, "position": 0, "batch": 1, "row": 0, "longest": 1, "last row": 1, "length": 1}
    plain["reached"] = 1
    return [
        OutputCell(
            step=0,
            row=0,
            column=0,
            wrong=letter == "x",
            raised=False,
            first=True,
            facts=plain | {name.replace("_", " "): int(digits[place]) for name, digits in facts.items()},
        )
        for place, letter in enumerate(wrong)
    ]


@pytest.mark.parametrize(
    ("wrong", "facts", "words"),
    [
        ("..xx", {"q": "1341", "past": "0055"}, "only with past > 0"),
        ("..x.", {"q": "1331", "past": "0055"}, "only with q > 1 and past > 0"),
        ("..xx", {"row": "0011", "batch": "1222"}, "only with row ≠ 0"),
        (".x.x", {"q": "2112", "after_a_reset": "0101", "past": "0404"}, "only with past > 0"),
        ("...x", {"decodes": "0112", "past": "0457"}, "only from the second decode step on"),
        ("..xx", {"length": "5595", "reached": "5599"}, "only with a largest length so far ≥ 9"),
        ("xxxx", {}, "wrong in every output"),
    ],
)
def test_the_smallest_condition_separates_wrong_from_right(wrong: str, facts: dict[str, str], words: str) -> None:
    found = condition(cells(wrong, **facts), CONFIGS["attention-gqa"])
    assert found is not None
    assert found.exact
    assert condition_words(found) == words


def test_a_window_is_a_condition_where_the_config_has_one() -> None:
    found = condition(cells("...xx", position="23456"), CONFIGS["attention-window"])
    assert found is not None
    assert found.predicates == ["once length > window"]


def test_without_a_separating_condition_there_is_none() -> None:
    assert condition(cells("x.x.x."), CONFIGS["attention-gqa"]) is None
    assert condition(cells("....", past="0123"), CONFIGS["attention-gqa"]) is None


def test_a_condition_that_nearly_separates_is_rendered_with_its_counts() -> None:
    found = condition(
        cells("." + "x" * 9 + "." * 9, q="2" + "12" * 9, past="1" * 10 + "0" * 9), CONFIGS["attention-gqa"]
    )
    assert found == Condition(predicates=["with past > 0"], wrong=9, right=10, wrong_met=9, right_met=1)
    assert condition_words(found) == "mostly with past > 0 (9 of 9 wrong outputs and 1 of 10 right ones)"


def test_outputs_that_are_wrong_nearly_everywhere_have_no_condition() -> None:
    found = condition(cells("x" * 9 + "." + "x" * 10), CONFIGS["attention-gqa"])
    assert found is not None
    assert condition_words(found) == "wrong in 19 of 20 outputs"


def test_later_wrong_outputs_of_a_sequence_do_not_hide_the_condition_of_the_first() -> None:
    later = [replace(cell, first=False) for cell in cells("xx", q="11", past="78")]
    found = condition([*cells("..x..", q="13311", past="00555"), *later], CONFIGS["attention-gqa"])
    assert found is not None
    assert condition_words(found) == "only with q > 1 and past > 0, and in later outputs of the same sequence"


def test_an_earlier_program_is_a_condition_only_where_a_fresh_process_is_right() -> None:
    found = diagnosed("tests/support/subjects.py:GlobalCache")
    assert found is not None
    assert found.condition is not None
    assert EARLIER_PROGRAM in found.condition.predicates
    found = diagnosed(of("AllButTheFirstProbe"))
    assert found is not None
    assert found.condition is None or EARLIER_PROGRAM not in found.condition.predicates


# --- conditions on other programs ---
def conditional(name: str) -> str:
    return f"{SUPPORT / 'conditional_faults.py'}:{name}"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("LengthFrom13", "only with length after the step ≥ 13"),
        ("ChunkFrom4", "only with past > 0 and q ≥ 4"),
        ("CountIsHeads", "only with q = 6"),
    ],
)
def test_a_condition_names_what_matters_and_no_more(name: str, words: str) -> None:
    found = diagnosed(conditional(name))
    assert found is not None
    assert found.condition is not None
    assert condition_words(found.condition) == words


def test_a_condition_that_no_words_say_is_not_replaced_by_one_that_is_near() -> None:
    found = diagnosed(conditional("OddPast"))
    assert found is not None
    assert found.condition is None


def test_trials_are_the_same_each_time_and_reach_what_claims_allow() -> None:
    config, claims = CONFIGS["attention-gqa"], load("numpy-static").claims
    drawn = list(trials(config, claims, range(64)))
    assert drawn == list(trials(config, claims, range(64)))
    assert len(drawn) > 50
    assert list(trials(config, claims, range(8, 16))) == [one for one in drawn if 8 <= int(one.name.split()[1]) < 16]
    steps = [step for one in drawn for step in one.program.steps]
    assert {Append, Truncate, Reset, Reorder, Fork, Close, Poison, UncachedForward, Reject} <= set(map(type, steps))
    plain = replace(claims, abilities=("length",), max_batch=1, max_sequences=1, max_chunk=2, overflow="undefined")
    for probe in trials(config, plain, range(32)):
        assert {type(step) for step in probe.program.steps} <= {Append, Close}
        assert max(max(step.counts) for step in probe.program.steps if isinstance(step, Append)) <= 2


@pytest.mark.slow
def test_the_condition_of_a_cache_that_evicts_wrongly_is_the_length() -> None:
    pytest.importorskip("torch", reason="the modules are in torch")
    assert diagnosed(f"py:{SUPPORT / 'streaming.py'}:Streaming", "hidden-self") is None
    found = diagnosed(f"py:{SUPPORT / 'streaming.py'}:NewKeyNotShifted", "hidden-self")
    assert found is not None
    assert found.condition is not None
    assert found.condition.predicates == ["with length ≥ 8"]
    assert found.condition.exact


# --- rotary factors that change with the length ---
def test_keys_that_keep_the_factors_of_a_shorter_length_are_named_and_other_mistakes_about_factors_are_not() -> None:
    found = diagnosed(FAULTS["cached-keys-keep-short-factors"].address, "decoder-longrope")
    assert found is not None
    assert found.mistake == "P5"
    assert "only with tokens cached before the length at which outputs of earlier tokens change" in sentence(found)
    other = diagnosed(FAULTS["factors-of-the-chunk"].address, "decoder-longrope")
    assert other is not None
    assert other.mistake == ""


@pytest.mark.slow
def test_a_module_whose_keys_keep_the_factors_of_a_shorter_length_is_named() -> None:
    pytest.importorskip("torch", reason="the modules are in torch")
    found = diagnosed(f"py:{SUPPORT / 'length_dependent.py'}:Stale", "decoder-self")
    assert found is not None
    assert found.mistake == "P5"


# --- contexts ---
@pytest.mark.parametrize(
    ("fault", "words"),
    slow_except(
        [
            (
                "stored-by-tokens",
                "first wrong probe (the same tokens in two contexts, one after another): step 3 (append 5",
            ),
            ("long-stored-by-tokens", "only with a prompt that was first run in another context; first wrong probe"),
            ("context-of-the-prompt", "only after a prompt in another context; first wrong probe"),
            ("context-of-the-prefill-only", "only with past > 0 and in a context other than 0; first wrong probe"),
            (
                "generation-keeps-context",
                "only greedy generation is wrong, its steps are right; first wrong probe (gen",
            ),
        ],
        5,
    ),
)
def test_a_mistake_about_contexts_is_described_by_contexts(fault: str, words: str) -> None:
    found = diagnosed(FAULTS[fault].address, "decoder-rope")
    assert found is not None
    assert sentence(found).startswith(f"matches no known mistake: {words}")


def test_only_configs_and_backends_with_contexts_are_probed_in_several() -> None:
    def contexts(config: str, claims: Claims) -> set[int]:
        drawn = [*probes(CONFIGS[config], claims), *trials(CONFIGS[config], claims, range(8))]
        steps = [step for probe in drawn for step in probe.program.steps]
        return {step.context for step in steps if isinstance(step, Append | UncachedForward)}

    claims = load("numpy").claims
    assert contexts("decoder-rope", claims) == {0, 1, 2}
    assert contexts("decoder-learned", claims) == contexts("attention-gqa", claims) == {0}
    without = replace(claims, abilities=tuple(one for one in claims.abilities if one != "contexts"))
    assert contexts("decoder-rope", without) == {0}


# --- precision ---
@pytest.mark.parametrize(
    ("name", "config", "words"),
    slow_except(
        [
            ("Float16Cache", "attention-gqa", "within the bounds of float32 and a float16 cache"),
            ("Float16Cache", "decoder-learned", "within the bounds of float32 and a float16 cache"),
            ("HalfKeys", "attention-gqa", "within the bounds of float32 and a bfloat16 cache"),
            ("HalfKeys", "decoder-learned", "within the bounds of float32 and a bfloat16 cache"),
            ("EightBits", "attention-gqa", "within the bounds of float32 and an 8-bit cache"),
            ("EightBits", "decoder-learned", "within the bounds of float32 and an 8-bit cache"),
            ("EightBits", "decoder-rope", "within the bounds of float32 and an 8-bit cache"),
            ("FourBits", "decoder-rope", "within the bounds of float32 and a 4-bit cache"),
            ("Float8", "attention-gqa", "within the bounds of float32 and a float8_e4m3 cache"),
            ("Float8", "decoder-rope", "within the bounds of float32 and a float8_e4m3 cache"),
            ("Float8Wide", "decoder-learned", "within the bounds of float32 and a float8_e5m2 cache"),
            ("Float16Weights", "decoder-learned", "within the bounds of float16"),
            ("BoxHalf", "hidden-self", "within the bounds of float16"),
            ("BoxFloat16Cache", "hidden-self", "within the bounds of float32 and a float16 cache"),
            ("BoxBfloat16Cache", "hidden-self", "within the bounds of float32 and a bfloat16 cache"),
        ],
        6,
    ),
)
def test_a_lower_precision_is_told_by_the_bounds_that_it_keeps(name: str, config: str, words: str) -> None:
    found = diagnosed(of(name), config)
    assert found is not None
    assert found.precision is not None
    assert precision_words(found.precision) == words
    assert words in sentence(found)


@pytest.mark.parametrize(
    ("address", "config"),
    slow_except(
        [
            (of("SecondHead"), "attention-gqa"),
            (of("DecodeOnePercent"), "attention-gqa"),
            (conditional("ChunkFrom4"), "attention-gqa"),
            (FAULTS["bits-reinterpreted"].address, "attention-gqa"),
            (FAULTS["decode-in-bfloat16"].address, "attention-gqa"),
            (FAULTS["attention-factor-ignored"].address, "decoder-longrope"),
            (FAULTS["bias-of-new-tokens"].address, "attention-softcap"),
        ],
        4,
    ),
)
def test_what_rounding_does_not_explain_has_no_precision(address: str, config: str) -> None:
    found = diagnosed(address, config)
    assert found is not None
    assert found.precision is None


@pytest.mark.parametrize(("bits", "scheme"), [(8, "integer"), (4, "integer"), (8, "float8_e4m3"), (8, "float8_e5m2")])
def test_a_coded_cache_is_as_far_off_as_its_quantiser_says_and_no_nearer(bits: int, scheme: str) -> None:
    x = np.random.default_rng(0).normal(size=(3, 50, 16))
    largest = quantisation_error(x, Precision(kv_bits=bits, quantiser=Quantiser(scheme)))
    off = np.abs(Coded(bits, scheme).cached(x, "keys") - x)
    assert np.all(off <= largest)
    assert np.max(off / largest) > 0.9
    assert np.all(Coded(bits, scheme).cached(np.zeros((2, 4)), "keys") == 0)


@pytest.mark.parametrize("mapped", [False, True])
def test_the_keys_of_another_row_have_a_name(mapped: bool) -> None:
    found = diagnosed(of("RowZero"), mapped=mapped)
    assert found is not None
    assert found.mistake == "H4"
    assert "what the reference gives with the cached tokens of row 0" in sentence(found)
    assert found.leak == (Leak(between="rows", mistakes=["H2", "H4"]) if mapped else None)
