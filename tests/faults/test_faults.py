"""Every planted fault is detected by its clauses, for what was planted; clean caches are not."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from lanes import slow_except

from kvconform.judging.verdict import Outcome
from kvconform.mutation.audit import AuditPlan, audit_fault, cells
from kvconform.mutation.fault import Fault, load_faults
from kvconform.search.cell import run_cell
from kvconform.search.effort import EFFORTS, Effort
from kvconform.worker.client import WorkerClient, WorkerSpec
from kvconform_backends.faults import CONTROLS, FAULTS
from kvconform_backends.faults.classes import CLASSES, NOT_EXPRESSIBLE
from kvconform_specs.clauses import ALL, BY_NAME
from kvconform_specs.configs import CONFIGS

SMOKE = EFFORTS["smoke"]
BRIEF = Effort("brief", 4, 4, 60.0)
RIGHT = load_faults("kvconform_backends.faults:CONTROLS")
CLEAN = [  # test_backends.py has the numpy backends on every config, and an audit all controls
    (control, config) for control in RIGHT for config in control.configs or ("attention-window", "decoder-rope")
]


@pytest.mark.parametrize("fault", slow_except(FAULTS, 50), ids=lambda fault: fault.name)
def test_each_clause_that_a_fault_names_kills_it_for_what_was_planted(fault: Fault) -> None:
    if fault.address.partition(":")[0].endswith("published") and importlib.util.find_spec("torch") is None:
        pytest.skip("the published listings need torch")
    audited = audit_fault(fault, AuditPlan((SMOKE,)))
    assert [trial.clause for trial in audited.trials] == list(fault.clauses), audited.unavailable
    assert not audited.missed(SMOKE.name), fault.sentence
    assert any(trial.ran for trial in audited.trials), f"its runtime_info has no {fault.marker!r}"


@pytest.mark.slow
@pytest.mark.parametrize(("control", "config"), slow_except(CLEAN, 25), ids=lambda word: getattr(word, "name", word))
def test_what_only_looks_wrong_breaks_no_clause(control: Fault, config: str, tmp_path: Path) -> None:
    clean = replace(control, configs=(config,))
    with WorkerClient(WorkerSpec(control.address)) as client:
        verdicts = [run_cell(cell, client, BRIEF, 0, tmp_path) for clause in ALL for cell in cells(clean, clause)]
    quiet = {Outcome.PASS, Outcome.UNSUPPORTED, Outcome.REFUTED}
    assert not [verdict for verdict in verdicts if verdict.outcome not in quiet]
    assert any(verdict.outcome is Outcome.PASS for verdict in verdicts)


@pytest.mark.parametrize("conditional", [False, True], ids=["unconditional", "conditional"])
@pytest.mark.parametrize("clause", [clause.name for clause in ALL])
def test_every_clause_has_a_fault_that_it_must_detect(clause: str, conditional: bool) -> None:
    assert [fault.name for fault in FAULTS if clause in fault.clauses and fault.conditional is conditional]


@pytest.mark.parametrize("kind", CLASSES)
def test_every_class_of_mistakes_has_a_fault_or_a_reason(kind: str) -> None:
    planted = [fault.name for fault in FAULTS if kind in fault.classes]
    assert bool(planted) is not (kind in NOT_EXPRESSIBLE), f"{CLASSES[kind]}: {planted or 'no fault'}"


def test_reasons_are_for_classes_that_there_are() -> None:
    assert set(NOT_EXPRESSIBLE) <= set(CLASSES)
    assert len(CLASSES) == 52


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_stands_for_a_class_of_mistakes(fault: Fault) -> None:
    assert fault.classes
    assert set(fault.classes) <= set(CLASSES)


def test_the_audit_reads_the_catalogue_as_it_is() -> None:
    assert load_faults("kvconform_backends.faults:FAULTS") == FAULTS
    assert [control.address.partition(":")[2] for control in RIGHT] == [kind.__name__ for kind in CONTROLS]
    assert all(control.sentence for control in RIGHT)


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
    assert set(fault.configs) <= set(CONFIGS)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_shows_on_a_config_that_its_clauses_concern(fault: Fault) -> None:
    assert all(any(cells(fault, BY_NAME[clause])) for clause in fault.clauses)


def test_the_table_of_faults_imports_no_framework() -> None:
    code = "import sys, kvconform_backends.faults; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "onnx", "onnxruntime"} & set(loaded)
