"""The machine survives whatever a backend does, and says in one line what it did."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mismatches import WRONG
from places import SUPPORT

from kvconform.errors import BackendUnavailable, Raised
from kvconform.judging.mismatch import Kind, Mismatch
from kvconform.judging.verdict import Outcome, Reason, Verdict
from kvconform.search.cell import Cell, run_cell
from kvconform.search.counterexample import read
from kvconform.search.effort import EFFORTS, Effort
from kvconform.worker.client import WorkerClient, WorkerSpec
from kvconform_specs.clauses import BY_NAME
from kvconform_specs.configs import config_named
from kvconform_specs.program import Program

SUBJECTS = SUPPORT / "subjects.py"


def address(name: str) -> str:
    return f"{SUBJECTS}:{name}"


def judged(
    name: str,
    folder: Path,
    clause: str = "definition.attention",
    config: str = "attention-gqa",
    step_timeout: float = 60.0,
    effort: Effort = EFFORTS["smoke"],
) -> Verdict:
    with WorkerClient(WorkerSpec(address(name), step_timeout=step_timeout)) as client:
        return run_cell(Cell(BY_NAME[clause], config_named(config), config), client, effort, 0, folder)


def replay(folder: Path, verdict: Verdict, *more: str) -> subprocess.CompletedProcess[str]:
    file = folder / verdict.counterexample
    command = [sys.executable, "-m", "kvconform", "replay", str(file), *more]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "outcome", "kind", "facts"),
    [
        ("Raises", Outcome.FAIL, Kind.RAISED, {"error": Raised("RuntimeError", "the cache is haunted")}),
        ("Segfaults", Outcome.CRASH, Kind.DIED, {"signal": "SIGSEGV", "status": None, "timeout": None}),
        ("Exits", Outcome.CRASH, Kind.DIED, {"signal": "", "status": 7, "timeout": None}),
        ("Hangs", Outcome.TIMEOUT, Kind.TIMED_OUT, {"signal": "", "status": None, "timeout": 0.5}),
        ("PrintsAndIsWrong", Outcome.FAIL, Kind.PARITY, {"row": 0, "program": 0, "variant": 0}),
    ],
)
def test_misbehaviour_is_a_verdict_with_a_shrunk_counterexample_that_replays(
    name: str, outcome: Outcome, kind: Kind, facts: dict[str, Any], tmp_path: Path
) -> None:
    verdict = judged(name, tmp_path, step_timeout=0.5)
    mismatch = verdict.mismatch
    assert mismatch is not None
    assert (verdict.outcome, mismatch.kind, mismatch.step) == (outcome, kind, 0)
    where: object = mismatch.ended or mismatch
    assert {field: getattr(where, field) for field in facts} == facts
    found = read(tmp_path / verdict.counterexample)
    assert (found.outcome, found.mismatch, found.sentence) == (outcome, mismatch, verdict.sentence)
    programs = [Program.from_json(program) for program in found.case]
    if name != "PrintsAndIsWrong":
        assert max(program.size[0] for program in programs) <= 2
        assert max(program.size[1] for program in programs) <= 4  # the trigger is the fourth token
    again = replay(tmp_path, verdict, "--step-timeout", "0.5")
    assert again.returncode == 1
    assert verdict.sentence in again.stdout


def test_words_that_are_no_text_can_still_be_written_down(tmp_path: Path) -> None:
    verdict = judged("RaisesSurrogates", tmp_path)
    assert read(tmp_path / verdict.counterexample).mismatch == verdict.mismatch
    assert verdict.mismatch is not None
    assert verdict.mismatch.error == Raised("RuntimeError", "half a ? pair")


def test_a_subject_that_prints_is_judged_as_if_it_were_silent(tmp_path: Path) -> None:
    verdict = judged("Prints", tmp_path)
    assert verdict.outcome is Outcome.PASS
    assert verdict.compared > 0


@pytest.mark.slow
def test_leaked_state_is_a_list_of_two_programs_that_replays_in_a_fresh_process(tmp_path: Path) -> None:
    verdict = judged("GlobalCache", tmp_path, clause="shape.first-step")
    assert verdict.outcome is Outcome.FAIL
    assert verdict.mismatch is not None
    assert verdict.mismatch.earlier_programs == 1
    found = read(tmp_path / verdict.counterexample)
    assert len(found.before) == 1
    assert len(found.case) == 1
    again = replay(tmp_path, verdict)
    assert again.returncode == 1
    assert verdict.sentence in again.stdout


@pytest.mark.slow
def test_leaked_state_is_a_failure_also_where_there_is_no_time_to_shorten_its_programs(tmp_path: Path) -> None:
    verdict = judged("GlobalCache", tmp_path, effort=replace(EFFORTS["smoke"], rebuild=0.0))
    assert verdict.outcome is Outcome.FAIL
    found = read(tmp_path / verdict.counterexample)
    assert not found.reduced
    assert len(found.before) > 1


@pytest.mark.slow
def test_after_a_crash_the_next_cell_is_judged(tmp_path: Path) -> None:
    with WorkerClient(WorkerSpec(address("Segfaults"))) as client:
        cells = [
            Cell(BY_NAME[c], config_named("attention-gqa"), "attention-gqa") for c in ("shape.output", "shape.length")
        ]
        verdicts = [run_cell(cell, client, EFFORTS["smoke"], 0, tmp_path) for cell in cells]
    assert [verdict.outcome for verdict in verdicts] == [Outcome.CRASH, Outcome.CRASH]


@pytest.mark.parametrize("name", ["FallsBack", "FallsBackAndRaises"])
def test_what_ran_as_a_fallback_was_not_tested(name: str, tmp_path: Path) -> None:
    verdict = judged(name, tmp_path)
    assert verdict.outcome is Outcome.NOT_EXERCISED
    assert verdict.sentence == "not tested: the fast path gave up and the slow one ran"


@pytest.mark.parametrize(
    ("name", "device", "outcome", "sentence"),
    [
        ("ClaimsCuda", "cpu", Outcome.PASS, ""),
        ("ClaimsCuda", "cuda", Outcome.NOT_EXERCISED, "cuda was requested, but runtime_info() does not report"),
        ("TellsTheCpu", "cuda", Outcome.NOT_EXERCISED, "not tested: cuda was requested, but cpu ran"),
        ("TellsItsGpu", "cuda", Outcome.PASS, ""),
        ("TellsItsGpu", "cpu", Outcome.NOT_EXERCISED, "not tested: cpu was requested, but cuda:1 ran"),
    ],
)
def test_a_result_is_of_the_device_that_its_witness_tells(
    name: str, device: str, outcome: Outcome, sentence: str, tmp_path: Path
) -> None:
    with WorkerClient(WorkerSpec(address(name), device=device)) as client:
        cell = Cell(BY_NAME["shape.output"], config_named("attention-gqa"), "attention-gqa")
        verdict = run_cell(cell, client, EFFORTS["smoke"], 0, tmp_path)
    assert verdict.outcome is outcome
    assert verdict.sentence.startswith(sentence)


@pytest.mark.parametrize("name", ["WitnessRaises", "WitnessIsNoJson", "WitnessDies"])
def test_a_witness_that_fails_is_no_pass(name: str, tmp_path: Path) -> None:
    verdict = judged(name, tmp_path)
    assert verdict.outcome is Outcome.NOT_EXERCISED
    assert verdict.sentence.startswith("cannot verify what ran: runtime_info() failed: ")


def test_a_step_that_gives_no_array_is_a_failure(tmp_path: Path) -> None:
    verdict = judged("GivesADictionary", tmp_path)
    assert verdict.outcome is Outcome.FAIL
    assert verdict.mismatch is not None
    assert (verdict.mismatch.kind, verdict.mismatch.got) == (Kind.NOT_NUMERIC, "dict")
    assert verdict.raised  # it keeps numbers from being judged, as an exception does


@pytest.mark.slow
def test_a_backend_that_cannot_be_built_leaves_a_counterexample_and_is_built_once(tmp_path: Path) -> None:
    with WorkerClient(WorkerSpec(address("CannotBeBuilt"))) as client:
        cells = [
            Cell(BY_NAME[c], config_named("attention-gqa"), "attention-gqa") for c in ("shape.output", "shape.length")
        ]
        verdicts = [run_cell(cell, client, EFFORTS["smoke"], 0, tmp_path) for cell in cells]
    for verdict in verdicts:
        assert verdict.outcome is Outcome.CRASH
        assert verdict.mismatch == Mismatch(kind=Kind.NOT_BUILT, error=Raised("RuntimeError", "no weights for me"))
        again = replay(tmp_path, verdict)
        assert again.returncode == 1
        assert verdict.sentence in again.stdout


def test_what_a_program_leaves_open_is_closed(tmp_path: Path) -> None:
    assert judged("OneSlot", tmp_path).outcome is Outcome.PASS


def test_what_the_machine_lacks_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(BackendUnavailable, match="needs a quantum computer; install one"):
        judged("CannotRunHere", tmp_path)


def test_an_undeclared_ability_is_unsupported(tmp_path: Path) -> None:
    verdict = judged("FewAbilities", tmp_path, clause="batch.left-padding")
    assert (verdict.outcome, verdict.reason) == (Outcome.UNSUPPORTED, Reason.ABILITY)
    assert verdict.sentence == "claims no left padding"


@pytest.mark.parametrize(
    ("outcome", "fields", "words"),
    [
        (Outcome.PASS, {}, "a pass must have compared something"),
        (Outcome.PASS, {"compared": 1, "reason": Reason.ABILITY}, "a reason is given if and only if"),
        (Outcome.FAIL, {"mismatch": WRONG}, "fail must say why"),
        (Outcome.FAIL, {"sentence": "so"}, "fail must have a mismatch"),
        (Outcome.KNOWN_FAILURE, {"sentence": "so"}, "known failure must have a mismatch"),
        (Outcome.REFUTED, {"sentence": "so", "mismatch": WRONG, "reason": Reason.ABILITY}, "a reason is given if and"),
        (Outcome.UNSUPPORTED, {"sentence": "so"}, "a reason is given if and only if there is no verdict"),
    ],
)
def test_a_verdict_that_lacks_what_its_outcome_needs_cannot_be_built(
    outcome: Outcome, fields: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        Verdict(clause="shape.output", config="attention-gqa", backend="x", outcome=outcome, **fields)


@pytest.mark.slow
def test_the_frozen_variant_is_the_one_that_replays(tmp_path: Path) -> None:
    """The stored seeds are the derived ones: the file needs no index beside it."""
    verdict = judged("PrintsAndIsWrong", tmp_path, clause="definition.attention")
    data = json.loads((tmp_path / verdict.counterexample).read_text())
    assert data["outcome"] == "fail"
    assert replay(tmp_path, verdict).stdout.startswith(f"definition.attention on {address('PrintsAndIsWrong')}: step")


def test_a_black_box_is_perturbed_by_as_much_as_each_message_asks() -> None:
    x = np.random.default_rng(0).normal(size=(1, 5, 12)).astype(np.float32)
    with WorkerClient(WorkerSpec(f"{SUPPORT / 'black_boxes.py'}:BlackBox")) as client:
        assert client.reference_forward is not None
        config = client.configs["hidden-self"]
        client.build(config)
        forward = client.reference_forward(config)
        right = forward(x, 0.0, 0.0, 0)
        off = [float(np.abs(forward(x, size, 0.0, 1) - right).max()) for size in (1e-3, 1e-2, 1e-3)]
    assert off[0] == off[2]
    assert off[1] == pytest.approx(10 * off[0], rel=0.1)
