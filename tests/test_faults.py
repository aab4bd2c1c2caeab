"""Every planted fault is convicted by its clauses, for what was planted; clean caches are not."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvconform.budget import BUDGETS
from kvconform.cell import run_cell
from kvconform.counterexample import Broken, read, replayed
from kvconform.subject import Launch, Subject
from kvconform.verdict import Outcome
from kvconform_backends.faults import CONTROLS, FAULTS, Fault
from kvconform_backends.faults.conviction import cells, convict
from kvconform_specs.clause import Case
from kvconform_specs.clauses import ALL, BY_NAME
from kvconform_specs.points import POINTS
from kvconform_specs.program import Program

SMOKE = BUDGETS["smoke"]
CHARGES = [
    pytest.param(fault, fault, clause, id=f"{fault.name}-{clause}", marks=pytest.mark.xdist_group(fault.name))
    for fault in FAULTS
    for clause in fault.clauses
]
ROPE, NEWEST, STATIC = CONTROLS
CLEAN = [
    ("numpy", "attention-window"),  # test_backends.py has it on every config
    (ROPE, "decoder-rope"),
    (NEWEST, "attention-window"),
    (NEWEST, "decoder-learned"),
    (STATIC, "attention-gqa"),
    (STATIC, "decoder-rope"),
]


@pytest.fixture(scope="module")
def subject(request: pytest.FixtureRequest) -> Iterator[Subject]:
    fault: Fault = request.param
    if fault.address.partition(":")[0].endswith("published") and importlib.util.find_spec("torch") is None:
        pytest.skip("the published listings need torch")
    with Subject(Launch(fault.address)) as started:
        yield started


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is convicted and by what is asked here; how small a counterexample becomes is asked in test_machine.py."""
    monkeypatch.setattr("kvconform.cell.SHRINK_TRIALS", 12)


@pytest.mark.parametrize(("subject", "fault", "clause"), CHARGES, indirect=["subject"])
def test_a_fault_is_convicted_for_what_was_planted(subject: Subject, fault: Fault, clause: str, tmp_path: Path) -> None:
    verdict = convict(fault, clause, subject, SMOKE, 0, tmp_path).verdict
    assert verdict.outcome is Outcome.FAIL, f"{fault.sentence} {verdict}"
    found = read(tmp_path / verdict.counterexample)
    case = Case.from_json(found.case)
    if found.before:  # otherwise the live process is the one that ran the counterexample, and nothing else
        before = [Program.from_json(program) for program in found.before]
        assert isinstance(replayed(BY_NAME[clause], subject, before, case), Broken)
    assert subject.witness(case.programs[0].config)[fault.marker] > 0


@pytest.mark.parametrize(("address", "config"), CLEAN, ids=lambda word: word.rpartition(":")[2])
def test_what_only_looks_wrong_passes_every_clause(address: str, config: str, tmp_path: Path) -> None:
    with Subject(Launch(address)) as subject:
        verdicts = [run_cell(cell, subject, SMOKE, 0, tmp_path) for clause in ALL for cell in cells(clause, (config,))]
    assert {verdict.outcome for verdict in verdicts} == {Outcome.PASS}, [v for v in verdicts if v.outcome.broken]


@pytest.mark.parametrize("stealth", [False, True], ids=["blatant", "stealth"])
@pytest.mark.parametrize("clause", [clause.name for clause in ALL])
def test_every_clause_has_a_fault_that_it_must_convict(clause: str, stealth: bool) -> None:
    assert [fault.name for fault in FAULTS if clause in fault.clauses and fault.stealth is stealth]


def test_faults_differ_in_name_and_address() -> None:
    assert len({fault.name for fault in FAULTS}) == len({fault.address for fault in FAULTS}) == len(FAULTS)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_names_a_real_bug_and_what_it_is(fault: Fault) -> None:
    site, *path = fault.bug.removeprefix("https://").split("/")
    assert site == "github.com"
    assert path[2] in ("issues", "pull")
    assert path[3].isdigit()
    assert fault.sentence.endswith(".")
    assert set(fault.clauses) <= set(BY_NAME)
    assert set(fault.configs) <= set(POINTS)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_shows_on_a_config_that_its_clauses_concern(fault: Fault) -> None:
    assert all(any(cells(BY_NAME[clause], fault.configs)) for clause in fault.clauses)


def test_the_table_of_faults_imports_no_framework() -> None:
    code = "import sys, kvconform_backends.faults; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "onnx", "onnxruntime"} & set(loaded)


def test_the_command_prints_how_many_programs_a_fault_needs() -> None:
    command = [sys.executable, "-m", "kvconform_backends.faults", "--seed", "1", "last-position-only"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    header, row = (line.split("\t") for line in lines)
    found = dict(zip(header, row, strict=True))
    assert (found["fault"], found["clause"], found["outcome"]) == ("last-position-only", "shape.output", "fail")
    assert int(found["programs"]) > 0
