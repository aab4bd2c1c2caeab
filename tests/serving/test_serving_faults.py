"""Each planted fault of a serving engine is detected by its clauses at the least effort; the clean engine is not."""

from __future__ import annotations

import importlib
import re
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from lanes import slow_except

from kvconform.judging.verdict import Outcome, Verdict
from kvconform.mutation.fault import Fault
from kvconform.search.effort import EFFORTS
from kvconform.serving.engine import Engine
from kvconform.serving.noise import calibrate
from kvconform.serving.session import Limits, Session
from kvconform.serving.verdict import Trial
from kvconform_backends.servers.toy import ToyEngine
from kvconform_backends.servers.toy_faults import FAULTS
from kvconform_backends.servers.toy_forward import ADDRESS
from kvconform_specs.clause import Level
from kvconform_specs.serving.clauses import BY_NAME, CLAUSES

SMOKE = replace(EFFORTS["smoke"], shrink=False)


def verdict(engine: Engine, clause: str, folder: Path, seed: int = 0) -> Verdict:
    with closing(Session(engine, Limits(requests=100_000, seconds=600.0), seed, ADDRESS)) as session:
        return Trial(session, calibrate(session), "toy", folder, SMOKE, seed, []).judge(BY_NAME[clause])


@pytest.mark.parametrize(
    ("fault", "clause"),
    slow_except([(fault, clause) for fault in FAULTS for clause in fault.clauses], 4),
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_a_fault_is_detected_by_its_clause(fault: Fault, clause: str, tmp_path: Path) -> None:
    module, _, name = fault.address.partition(":")
    found = verdict(getattr(importlib.import_module(module), name)(), clause, tmp_path)
    assert found.outcome is Outcome.FAIL, found.sentence


@pytest.mark.parametrize("clause", slow_except([one.name for one in CLAUSES if one.level is Level.MUST], 4))
def test_the_clean_engine_passes(clause: str, tmp_path: Path) -> None:
    found = verdict(ToyEngine(), clause, tmp_path)
    assert found.outcome is Outcome.PASS, found.sentence


def test_every_required_clause_has_a_fault_and_every_fault_names_a_clause_and_a_bug() -> None:
    broken = {clause for fault in FAULTS for clause in fault.clauses}
    assert {clause.name for clause in CLAUSES if clause.level is Level.MUST} <= broken
    assert broken <= BY_NAME.keys()
    for fault in FAULTS:
        assert re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+/(issues|pull)/\d+", fault.bug)
        assert fault.sentence.endswith(".")
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 15
    assert any(fault.conditional for fault in FAULTS)
