"""Diagnoses: a known mistake gets its name, an unknown one its signature, and a clean backend nothing."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import msgspec
import numpy as np
import pytest
from places import SUPPORT

from kvconform.explain.diagnosis import Diagnosis, across, diagnose, fingerprints
from kvconform.explain.diagnosis.cache_edits import Memory, remembered
from kvconform.explain.diagnosis.edits import EDITS, Explanation, explanations, kinds
from kvconform.explain.diagnosis.fingerprints import (
    FILE,
    LIKENESS,
    SHORT_CONFIGS,
    Evaluation,
    Match,
    Prints,
    catalogue,
    computed,
    decided,
    full,
    named,
    nearest,
)
from kvconform.explain.diagnosis.probe_run import SIGHT
from kvconform.explain.diagnosis.probes import BATTERY, OTHER, SEEN, SPREAD, changes, probes
from kvconform.explain.diagnosis.remedies import ADVICE
from kvconform.explain.diagnosis.signature import Condition, condition, sighted, told
from kvconform.explain.diagnosis.symptoms import Cell
from kvconform.explain.visibility import Map
from kvconform.mutation.fault import load_faults
from kvconform.worker.client import WorkerClient, WorkerSpec
from kvconform.worker.registry import load
from kvconform_backends.faults import classes
from kvconform_specs.clause import Case
from kvconform_specs.config import Config
from kvconform_specs.configs import CONFIGS
from kvconform_specs.history import seen_by
from kvconform_specs.program import Append, Program, Reject, Reset, UncachedForward

HERE = SUPPORT
FAULTS = {fault.name: fault for fault in load_faults(fingerprints.CATALOGUE)}


def diagnosed(address: str, config: str = "attention-gqa", cases: tuple[Case, ...] = ()) -> Diagnosis | None:
    with WorkerClient(WorkerSpec(address)) as client:
        return diagnose(client, client.configs.get(config) or CONFIGS[config], cases, [])


def of(name: str) -> str:
    return f"{HERE / 'undiagnosed_faults.py'}:{name}"


# --- names ---
@pytest.mark.parametrize(
    ("fault", "config", "kind", "words"),
    [
        ("top-left", "attention-gqa", "M1", "see only token 0 of what is cached"),
        ("chunk-sees-ahead", "attention-gqa", "M2", "chunks see their future"),
        ("window-too-long", "attention-window", "W1", "see one token more than the window"),
        ("closed-are-recycled", "attention-gqa", "C6", "first in decode steps from the first token on"),
        ("reset-keeps-length", "attention-gqa", "C6", "after a reset"),
        ("reorder-ignored", "attention-gqa", "C10", "after a reorder"),
        ("position-restart", "decoder-rope", "P1", "with past > 0"),
    ],
)
def test_a_planted_fault_is_named_by_its_outputs(fault: str, config: str, kind: str, words: str) -> None:
    found = diagnosed(FAULTS[fault].address, config)
    assert found is not None
    assert (found.named, found.exactly) == (kind, True)
    assert kind in FAULTS[found.fault].classes
    assert found.sentence.startswith("behaves exactly like ")
    assert f"({kind}, {FAULTS[found.fault].bug})" in found.sentence
    assert classes.CLASSES[kind].partition(": ")[2] in found.sentence
    assert ADVICE[kind] in found.sentence
    assert words in found.sentence


def test_a_fault_is_found_under_a_config_that_the_catalogue_lacks() -> None:
    config = Config("attention", heads=4, kv_heads=2, head_dim=6, capacity=32, seed=9)
    with WorkerClient(WorkerSpec(FAULTS["chunk-sees-ahead"].address)) as client:
        found = diagnose(client, config, [], [])
    assert found is not None
    assert (found.named, found.exactly) == ("M2", True)


@pytest.mark.parametrize("backend", ["numpy", "numpy-static"])
def test_a_clean_subject_gets_no_diagnosis(backend: str) -> None:
    assert diagnosed(backend) is None


def test_a_mistake_that_nobody_planted_is_not_named_but_has_a_signature() -> None:
    found = diagnosed(of("DecodeOnePercent"))
    assert found is not None
    assert (found.named, found.fault, found.bug, found.exactly) == ("", "", "", False)
    assert "only in decode steps (q = 1 with past > 0)" in found.signature
    assert found.sentence == f"like no known mistake: {found.signature}"


def test_the_signature_names_the_heads_and_the_rows() -> None:
    found = diagnosed(of("SecondHead"))
    assert found is not None
    assert found.named == ""
    assert "only with row ≠ 0" in found.signature
    assert "row 1, position 0, head 1: got" in found.signature


def test_a_subject_that_dies_has_a_signature() -> None:
    found = diagnosed(of("DiesOnChunks"))
    assert found is not None
    assert found.named == ""
    assert "died of SIGKILL" in found.signature


def test_a_counterexample_speaks_where_no_probe_does() -> None:
    case = Case((Program(CONFIGS["attention-gqa"], (Append("a", (23,), 0), Append("a", (1,), 0))),))
    assert diagnosed(of("Prompt23")) is None
    found = diagnosed(of("Prompt23"), cases=(case,))
    assert found is not None
    assert found.named == ""
    assert "first in a counterexample: step 0 (append 23 to a): row 0, position 0, every head" in found.signature


# --- black boxes ---
def test_a_black_box_is_named_by_its_pattern() -> None:
    found = diagnosed(of("BoxTopLeft"), "hidden-self")
    assert found is not None
    assert (found.named, found.exactly) == ("M1", False)
    assert found.sentence.startswith("behaves like (to ")
    assert "see only token 0 of what is cached" in found.sentence


def test_a_clean_black_box_gets_no_diagnosis() -> None:
    assert diagnosed(of("BoxRight"), "hidden-self") is None


def test_a_black_box_with_a_mistake_of_its_own_is_not_named() -> None:
    found = diagnosed(of("BoxScaled"), "hidden-self")
    assert found is not None
    assert found.named == ""
    assert "with length after the step ≥ 7" in found.signature


# --- what the truth gives on other tokens ---
def explained(name: str, config: str = "attention-gqa") -> list[Explanation]:
    client = load(FAULTS[name].address if name in FAULTS else name)
    found = fingerprints.examined(client, CONFIGS[config], {})
    assert found is not None
    return explanations(found.symptoms, CONFIGS[config], client.claims, None)


@pytest.mark.parametrize(
    ("fault", "config", "kind", "words"),
    [
        ("top-left", "attention-gqa", "M1", "every bad output is what the truth gives with the causal mask at the top"),
        ("chunk-sees-ahead", "decoder-rope", "M2", "later tokens, where something is cached"),
        ("window-too-long", "attention-window", "W1", "every bad output is what the truth gives with a window that is"),
        ("truncate-ignored", "attention-gqa", "C8", "every bad output is what the truth gives with what a truncation"),
        ("reorder-ignored", "attention-gqa", "C10", "33 of 42 bad outputs are what the truth gives with rows that are"),
        ("published-global-list", "attention-gqa", "C6", "with the tokens of all that ran before in front"),
    ],
)
def test_bad_outputs_are_what_the_truth_gives_on_other_tokens(fault: str, config: str, kind: str, words: str) -> None:
    found = explained(fault, config)
    assert words in found[0].words
    assert kinds(found) == {kind}
    assert found[0].right


@pytest.mark.parametrize("name", [of("DecodeOnePercent"), "kv-heads-tiled", "scale-ignored"])
def test_outputs_that_no_tokens_give_are_not_explained(name: str) -> None:
    assert explained(name) == []
    assert kinds([]) == frozenset()


def test_the_tokens_behind_a_black_box_are_told() -> None:
    found = diagnosed(of("BoxWithoutNewest"), "hidden-self")
    assert found is not None
    assert "every first bad output is what the truth gives without the newest cached token" in found.signature


def test_a_mistake_that_nobody_planted_is_named_by_its_tokens() -> None:
    found = diagnosed(of("BoxStale"), "hidden-self")
    assert found is not None
    assert (found.named, found.fault, found.bug, found.exactly) == ("C6", "", "", False)
    assert found.sentence.startswith("the tokens that it sees are those of ")
    assert "every bad output is what the truth gives with the tokens of all that ran before in front" in found.sentence
    assert ADVICE["C6"] in found.sentence


def test_edits_stand_for_known_classes_and_right_memories_change_nothing() -> None:
    assert {kind for edit in EDITS for kind in edit.classes} <= set(classes.CLASSES)
    assert len({edit.words for edit in EDITS}) == len(EDITS)
    for probe in probes(CONFIGS["attention-window"], load("numpy-static").claims):
        views, seen = remembered(probe.program, Memory()), seen_by(probe.program)
        for view, rows in zip(views, seen, strict=True):
            assert rows is None or (view is not None and tuple(tuple(t[0] for t in row) for row in view) == rows)


def test_the_tokens_that_are_seen_weigh_more_than_likeness_and_less_than_equal_outputs() -> None:
    assert decided("M1", True, frozenset({"C6"})) == "M1"
    assert decided("M1", False, frozenset({"C6"})) == "C6"
    assert decided("M1", False, frozenset({"C6", "C7"})) == "M1"
    assert decided("", False, frozenset({"C6", "C7"})) == ""


def test_a_map_shows_what_sequences_see_of_each_other() -> None:
    def crossing(*pairs: tuple[int, int]) -> str:
        wanted = ["x..", ".x.", "..x"]
        seen = ["".join("x" if (q, k) in pairs or q == k else "." for k in range(3)) for q in range(3)]
        return across([Map(schedule="sequences", sizes=[1], wanted=wanted, seen=seen, rows=3)])

    assert crossing() == ""
    assert crossing((1, 0), (2, 0)) == "C6"
    assert crossing((1, 0), (0, 1)) == "C7"


@pytest.mark.parametrize(("name", "exact"), [("published-generation", True), (of("OwnLoop"), False)])
def test_a_loop_that_is_wrong_on_right_steps_is_named(name: str, exact: bool) -> None:
    found = diagnosed(FAULTS[name].address if exact else name, "decoder-rope")
    assert found is not None
    assert (found.named, found.exactly) == ("L1", exact)
    assert "only in greedy generation; first in tokens that the backend generates on its own: step 0" in found.sentence
    assert found.sentence.count("step 0 (generate") == 1


# --- the margin ---
@lru_cache
def prints_of_catalogue() -> Prints:
    return Prints(list(catalogue().prints()))


def test_a_pattern_is_most_like_itself() -> None:
    for its in prints_of_catalogue().all[::97]:
        likeness = prints_of_catalogue().likeness(full(its))
        assert likeness[prints_of_catalogue().all.index(its)] == 1 == likeness.max()


def test_below_the_margin_nothing_is_named() -> None:
    top, chunk = (
        next(p for p in prints_of_catalogue().all if p.entry.name == name) for name in ("top-left", "chunk-sees-ahead")
    )
    diagonal = next(p for p in prints_of_catalogue().all if p.entry.name == "diagonal-from-zero")
    alone, twice = [Match(1.0, top), Match(0.5, chunk)], [Match(1.0, top), Match(0.9, diagonal), Match(0.5, chunk)]
    assert named(alone) is None
    assert named(twice) == ("M1", twice[0])
    assert named([Match(LIKENESS - 0.01, top), Match(0.9, diagonal)]) is None
    assert named([Match(1.0, top), Match(0.99, diagonal), Match(0.98, chunk)]) is None
    assert named([]) is None


def test_faults_that_are_named_by_others_alone_are_hardly_ever_named_wrongly() -> None:
    unseen, elsewhere = (prints_of_catalogue().evaluation[kind] for kind in ("unseen", "elsewhere"))
    assert unseen.wrong <= 0.03 * unseen.asked
    assert unseen.right > unseen.wrong
    assert elsewhere.wrong <= 0.03 * elsewhere.asked
    assert elsewhere.right > 0.3 * elsewhere.asked
    patterns, tokens, both = (
        prints_of_catalogue().evaluation[kind] for kind in ("unseen by outputs", "by edits", "unseen, with edits")
    )
    assert tokens.wrong <= 0.03 * tokens.asked
    assert both.wrong <= 0.03 * both.asked
    assert both.right > max(patterns.right, tokens.right)


def test_an_evaluation_says_its_shares() -> None:
    assert Evaluation(asked=8, right=4, wrong=1).words == "50.0% right, 12.5% wrong, 37.5% not named, of 8"


def test_the_stored_evaluation_is_that_of_the_stored_patterns() -> None:
    few = msgspec.structs.replace(prints_of_catalogue(), entries=prints_of_catalogue().entries[::6])
    found = fingerprints.evaluated(few)
    assert found["unseen"].asked == sum(len(entry.shown) for entry in few.entries)
    matches = nearest(
        full(prints_of_catalogue().all[0]),
        prints_of_catalogue(),
        lambda its: its.entry.name == prints_of_catalogue().all[0].entry.name,
    )
    assert all(match.found.entry.name != prints_of_catalogue().all[0].entry.name for match in matches)


# --- the catalogue ---
def test_the_catalogue_holds_every_planted_fault() -> None:
    assert {(e.name, e.address, e.classes, e.bug) for e in prints_of_catalogue().entries} == {
        (f.name, f.address, f.classes, f.bug) for f in FAULTS.values()
    }
    assert prints_of_catalogue().classes == classes.CLASSES


def test_a_sample_of_the_catalogue_is_current() -> None:
    sample = [FAULTS[name] for name in ("top-left", "truncate-ignored", "ring-one-slot-more", "places-from-zero")]
    again = computed(sample, SHORT_CONFIGS)
    mine = {(p.entry.name, p.config): (dict(p.pattern), p.asked) for p in again.prints()}
    stored = {(p.entry.name, p.config): (dict(p.pattern), p.asked) for p in prints_of_catalogue().prints()}
    assert len(mine) > 15
    assert mine == {key: value for key, value in stored.items() if key[0] in {fault.name for fault in sample}}


def test_the_catalogue_is_small() -> None:
    assert (Path(fingerprints.__file__).parent / FILE).stat().st_size < 310_000


def test_every_class_has_one_sentence_of_advice() -> None:
    assert list(ADVICE) == list(classes.CLASSES)
    assert all(words.endswith(".") and words.count(". ") == 0 for words in ADVICE.values())


# --- probes ---
@pytest.mark.parametrize("backend", ["numpy", "numpy-static", "numpy-ring", "numpy-paged", "numpy-int8", "eager"])
@pytest.mark.parametrize("config", ["attention-window", "decoder-rope"])
def test_probes_ask_for_what_is_claimed_alone(backend: str, config: str) -> None:
    claims = load(backend).claims
    asked = probes(CONFIGS[config], claims)
    assert len(asked) >= 24
    for step in (step for probe in asked for step in probe.program.steps):
        if isinstance(step, Reset):
            assert claims.can("reset")
        if isinstance(step, Append | UncachedForward):
            assert claims.can("ragged") or len(set(step.counts)) == 1
        if isinstance(step, Reject):
            assert claims.can("overflow refused") or claims.can("refusal") or claims.can("truncate")


def test_one_row_one_sequence_and_short_chunks_are_enough_to_probe() -> None:
    claims = replace(load("numpy").claims, max_batch=1, max_sequences=1, max_chunk=3, abilities=("length",))
    asked = probes(CONFIGS["decoder-rope"], claims)
    assert {"decode", "many", "to-capacity"} <= {probe.name for probe in asked}
    appends = [step for probe in asked for step in probe.program.steps if isinstance(step, Append)]
    assert max(max(step.counts) for step in appends) <= 3
    assert max(len(step.counts) for step in appends) == 1


def test_every_probe_has_a_name_and_streams_of_its_own() -> None:
    names = [plan.name for plan in BATTERY]
    assert len(set(names)) == len(names)
    claims = load("numpy-static").claims
    seen: dict[int, str] = {}
    for config in ("attention-window", "decoder-learned"):
        for probe in probes(CONFIGS[config], claims):
            for step in probe.program.steps:
                if isinstance(step, Append | UncachedForward):
                    for row in range(len(step.counts)):
                        assert seen.setdefault(step.seed + row, probe.name) == probe.name
    assert SPREAD > OTHER


def test_changed_tokens_cover_first_and_last_and_leave_the_sizes() -> None:
    probe = next(probe for probe in probes(CONFIGS["decoder-rope"], load("numpy").claims) if probe.name == SEEN)
    changed = changes(probe)
    positions = [position for position, _program in changed]
    assert positions == list(range(10))
    assert all(
        [getattr(s, "counts", None) for s in program.steps] == [getattr(s, "counts", None) for s in probe.program.steps]
        and program != probe.program
        for _position, program in changed
    )


# --- conditions ---
def cells(off: str, **facts: str) -> list[Cell]:
    """A cell for each character: ``x`` is off; each fact gives its numbers, a digit each."""
    plain = {"q": 1, "past": 0, "position": 0, "batch": 1, "row": 0, "longest": 1, "last row": 1, "length": 1}
    return [
        Cell(
            "p",
            0,
            0,
            0,
            "bad" if letter == "x" else "ok",
            True,
            plain | {name.replace("_", " "): int(digits[place]) for name, digits in facts.items()},
        )
        for place, letter in enumerate(off)
    ]


@pytest.mark.parametrize(
    ("off", "facts", "words"),
    [
        ("..xx", {"q": "1341", "past": "0055"}, "only with past > 0"),
        ("..x.", {"q": "1331", "past": "0055"}, "only with q > 1 and past > 0"),
        ("..xx", {"row": "0011", "batch": "1222"}, "only with row ≠ 0"),
        (".x.x", {"q": "2112", "after_a_reset": "0101", "past": "0404"}, "only with past > 0"),
        ("...x", {"decodes": "0112", "past": "0457"}, "only from the second decode step on"),
        ("xxxx", {}, "in every output"),
    ],
)
def test_the_smallest_condition_separates_bad_from_good(off: str, facts: dict[str, str], words: str) -> None:
    found = condition(cells(off, **facts), CONFIGS["attention-gqa"])
    assert found is not None
    assert (found.words, found.share) == (words, 1)


def test_a_window_is_a_condition_where_the_config_has_one() -> None:
    found = condition(cells("...xx", position="23456"), CONFIGS["attention-window"])
    assert found is not None
    assert found.words == "only once length > window"


def test_where_nothing_separates_nothing_is_said() -> None:
    assert condition(cells("x.x.x."), CONFIGS["attention-gqa"]) is None
    assert condition(cells("....", past="0123"), CONFIGS["attention-gqa"]) is None
    assert told(None) == ""


def test_what_comes_near_is_told_with_its_share() -> None:
    found = condition(
        cells("." + "x" * 9 + "." * 9, q="2" + "12" * 9, past="1" * 10 + "0" * 9), CONFIGS["attention-gqa"]
    )
    assert found == Condition("only with past > 0", 0.9, False, 9, 19)
    assert told(found) == "nearly always and only with past > 0 (90%)"


def test_what_is_off_nearly_everywhere_has_no_condition() -> None:
    found = condition(cells("x" * 9 + "." + "x" * 10), CONFIGS["attention-gqa"])
    assert told(found) == "in nearly every output (95%)"


def test_what_follows_a_first_mistake_does_not_hide_its_condition() -> None:
    later = [replace(cell, first=False) for cell in cells("xx", q="11", past="78")]
    found = condition([*cells("..x..", q="13311", past="00555"), *later], CONFIGS["attention-gqa"])
    assert found is not None
    assert told(found) == "only with q > 1 and past > 0, and what follows in the sequence"


def test_what_is_felt_is_told_for_prompts_chunks_and_decode_steps() -> None:
    #        n f i c 1 l c w j o
    prompt, chunk, decode = "xx..------", "xx........", "---x.xx---"
    assert sighted("..........") == ""
    words = sighted(prompt + chunk + decode * 3)
    assert sighted(prompt.replace("x", "m") + ".........." * 4) == "prompts see their future, at times"
    assert "decode steps see only the newest token of what is cached" in sighted("." * 20 + "----x.x---" * 3)
    assert words.startswith("prompts and chunks see their future; decode steps see only token 0 of what is cached")


def test_a_pattern_of_letters_knows_no_sizes() -> None:
    config = CONFIGS["attention-gqa"]
    other = replace(config, heads=4, kv_heads=2, head_dim=6, capacity=24)
    mine, its = (fingerprints.examined(load(FAULTS["top-left"].address), one, {}) for one in (config, other))
    assert mine is not None
    assert its is not None
    shared = mine.pattern.keys() & its.pattern.keys() - {"square", "loud"}
    assert SIGHT in shared
    assert np.mean([mine.pattern[name] == its.pattern[name] for name in shared]) > 0.9
