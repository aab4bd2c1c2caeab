"""docs/engines.md is generated from docs/evidence/engines, and nothing on it is unconfirmed."""

from __future__ import annotations

import gzip
import re
from pathlib import Path

import pytest
from engine_results.collect import kept
from engine_results.page import ENGINES, EVIDENCE, PROGRAMS, findings, render, study
from mismatches import cause
from places import ROOT

from kvconform.judging.verdict import Outcome, Verdict
from kvconform.results.results import Results
from kvconform.worker.registry import installed
from kvconform_specs.clauses import BY_NAME
from kvconform_specs.configs import CONFIGS

STUDY, FINDINGS = study(), findings()
NAMES = [one["engine"] for one in STUDY]


def test_the_page_is_what_the_evidence_says() -> None:
    assert (ROOT / "docs" / "engines.md").read_text() == render(STUDY, FINDINGS)


def test_every_engine_is_an_installed_backend_that_is_described() -> None:
    assert set(NAMES) <= set(ENGINES)
    assert set(ENGINES) == {name for name, point in installed().items() if ".engines." in point.value}


def test_evidence_is_small_and_names_no_path_of_a_machine() -> None:
    files = sorted(file for file in EVIDENCE.rglob("*") if file.is_file())
    assert sum(file.stat().st_size for file in files) < 200_000
    for file in files:
        raw = file.read_bytes()
        told = (gzip.decompress(raw) if file.suffix == ".gz" else raw).decode()
        assert not re.search(r"(?<![\w.:/])/(?:home|root|tmp|usr|work|Users)/", told), file.name


@pytest.mark.parametrize("one", STUDY, ids=NAMES)
def test_every_failure_of_an_engine_is_a_finding_that_was_confirmed(one: dict[str, object]) -> None:
    mine = [found["cells"] for found in FINDINGS if found["engine"] == one["engine"]]
    known = {(clause, config) for cells in mine for config, clauses in cells.items() for clause in clauses}
    cells = one["cells"]
    assert isinstance(cells, dict)
    broken = {(clause, config) for config, its in cells.items() for clause, found in its.items() if found in BROKEN}
    assert broken == known


BROKEN = [outcome.value for outcome in Outcome if outcome.broken]


@pytest.mark.parametrize("found", FINDINGS, ids=lambda found: found["program"])
def test_a_finding_has_a_program_that_does_without_kvconform(found: dict[str, object]) -> None:
    program = (PROGRAMS / str(found["program"])).read_text()
    assert "kvconform" not in program
    assert found["printed"]
    cells = found["cells"]
    assert isinstance(cells, dict)
    assert set(cells) <= set(CONFIGS)
    assert {clause for clauses in cells.values() for clause in clauses} <= set(BY_NAME)
    assert found["link"] == "" or str(found["link"]).startswith("https://")
    compile(program, str(found["program"]), "exec")


def test_what_is_kept_of_a_run_is_on_the_page(tmp_path: Path) -> None:
    passed = Verdict(
        clause="shape.output", config="attention-gqa", backend="x", outcome=Outcome.PASS, programs=7, compared=1
    )
    why = {**cause(Outcome.FAIL), "sentence": "got 1"}
    failed = Verdict(clause="batch.row-solo", config="attention-gqa", backend="x", outcome=Outcome.FAIL, **why)
    results = Results(
        suite="0",
        backend="jax",
        device="cpu",
        dtypes=["float32"],
        effort="pr",
        seed=0,
        started="2026-11-30T10:00",
        verdicts=[passed, failed],
        environment={"jax": "9.9", "machine": "here", "platform": "there"},
        finished=True,
    )
    page = render([kept(results, "jax")], [])
    assert "by `jax.jit` | jax 9.9 | pr | 7 | 1 | 0 | 1 |" in page
    assert "| shape | 1/1 |" in page
    assert "| batch | 0/1 |" in page
    assert "| capture | – |" in page
