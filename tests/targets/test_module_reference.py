"""A module that is judged by another module with the same weights: ``check file.py:A --reference file.py:B``."""

from __future__ import annotations

from pathlib import Path

import pytest
from places import SUPPORT

from kvconform.explain.diagnosis import text
from kvconform.explain.diagnosis.disagreements import agrees, disagreement
from kvconform.explain.diagnosis.record import Diagnosis
from kvconform.judging.verdict import Outcome
from kvconform.run.check import addresses
from kvconform.run.run import plan_for, run_backend
from kvconform.worker.client import WorkerClient, WorkerSpec

pytest.importorskip("torch", reason="modules are torch's")
pytestmark = pytest.mark.slow
FILE = SUPPORT / "windowed_modules.py"
ORIGINAL = f"{FILE}:NeverEvicts"


def address(name: str) -> str:
    (found,) = addresses(f"{FILE}:{name}", {}, ORIGINAL)
    return found


def test_a_module_that_computes_the_same_is_judged_by_the_other_and_conforms(tmp_path: Path) -> None:
    clauses = ("definition.decoder", "equivalence.decode", "equivalence.chunks", "shape.length")
    found = run_backend("model", WorkerSpec(address("Evicts")), plan_for("smoke", clauses=clauses), tmp_path)
    outcomes = {verdict.clause: verdict.outcome for verdict in found.verdicts}
    assert {outcomes[name] for name in clauses[:3]} == {Outcome.PASS}
    assert found.target is not None
    assert found.target.reference == f"py:{ORIGINAL}"


def test_a_lost_window_is_found_and_is_no_mistake_of_the_cache() -> None:
    with WorkerClient(WorkerSpec(address("LosesItsWindow"))) as client:
        (config,) = client.configs.values()
        assert not agrees(client, config)
        found = disagreement(client, config, [])
    assert found is not None
    assert found.first_token == 6, "the first that does not see all before it"
    assert "this is no mistake of the cache" in text.sentence(Diagnosis(disagreement=found))
