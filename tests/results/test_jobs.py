"""A run in several processes finds what a run in one finds, cell by cell."""

from __future__ import annotations

import multiprocessing
import os
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
from places import SUPPORT
from small_runs import CONFIGS, FAULT, PLAN, without_times

from kvconform.judging.verdict import Outcome, Verdict
from kvconform.results.merge import vectors_of
from kvconform.run.jobs import in_processes
from kvconform.run.run import Plan, run_backend
from kvconform.search.effort import EFFORTS
from kvconform.worker.client import WorkerSpec


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["numpy", FAULT])
def test_results_counterexamples_and_vectors_do_not_depend_on_the_number_of_processes(
    backend: str, tmp_path: Path
) -> None:
    one, two = (
        run_backend("mine", WorkerSpec(backend), PLAN, tmp_path / str(n), execute=in_processes(n)) for n in (1, 2)
    )
    assert without_times(one) == without_times(two)
    assert len({verdict.config for verdict in two.verdicts}) == len(CONFIGS)
    assert any(verdict.outcome is Outcome.FAIL for verdict in two.verdicts) == (backend == FAULT)
    written = [{file.name: file.read_bytes() for file in (tmp_path / n / "failures").rglob("*.json")} for n in "12"]
    assert written[0] == written[1]
    arrays = [np.load(vectors_of(tmp_path / n / "mine.json")) for n in "12"]
    assert arrays[0].files == arrays[1].files
    assert all(np.array_equal(arrays[0][name], arrays[1][name]) for name in arrays[0].files)


@pytest.mark.slow
def test_verdicts_are_told_as_they_come_and_kept_in_the_order_of_the_suite(tmp_path: Path) -> None:
    told: list[Verdict] = []
    found = run_backend("mine", WorkerSpec("numpy"), PLAN, tmp_path, told.append, execute=in_processes(2))
    assert {verdict.key for verdict in told} == {verdict.key for verdict in found.verdicts}
    assert [verdict.key for verdict in found.verdicts] == [
        (clause, config)
        for config in CONFIGS
        for clause in dict.fromkeys(verdict.clause for verdict in found.verdicts)
        if (clause, config) in {verdict.key for verdict in told}
    ]


@pytest.mark.slow
def test_a_run_in_several_processes_goes_on_where_an_interrupted_one_stopped(tmp_path: Path) -> None:
    whole = run_backend("mine", WorkerSpec("numpy"), PLAN, tmp_path)
    marked = [msgspec.structs.replace(verdict, compared=123456) for verdict in whole.verdicts[::2]]
    msgspec.structs.replace(whole, verdicts=marked, finished=False).write(tmp_path / "mine.json")
    resumed = run_backend("mine", WorkerSpec("numpy"), PLAN, tmp_path, execute=in_processes(2))
    assert [verdict.compared for verdict in resumed.verdicts] == [
        123456 if at % 2 == 0 else verdict.compared for at, verdict in enumerate(whole.verdicts)
    ]
    assert resumed.finished


@pytest.mark.slow
def test_a_backend_that_cannot_run_here_is_unavailable_in_every_process(tmp_path: Path) -> None:
    plan, spec = Plan(EFFORTS["smoke"], clauses=("shape",), configs=CONFIGS), f"{SUPPORT / 'subjects.py'}:CannotRunHere"
    one, two = (run_backend("mine", WorkerSpec(spec), plan, tmp_path / str(n), execute=in_processes(n)) for n in (1, 2))
    assert one.unavailable == two.unavailable == "this backend needs a quantum computer; install one"
    assert (two.lacking, two.finished, two.exit_code) == (True, False, 3)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="it looks into /proc")
def test_a_killed_process_leaves_a_run_that_goes_on_and_no_process_behind(tmp_path: Path) -> None:
    plan = Plan(EFFORTS["smoke"], clauses=("shape.output",), configs=CONFIGS[:2])
    spec = WorkerSpec(
        f"{SUPPORT / 'killed.py'}:KillsWhoeverJudges", environment={"KVCONFORM_TEST_RUN": str(os.getpid())}
    )
    found = run_backend("mine", spec, plan, tmp_path, execute=in_processes(2))
    assert found.unavailable.startswith("one of the processes that judge configs ended unexpectedly")
    assert (found.exit_code, found.finished) == (3, False)
    assert not multiprocessing.active_children()
    whole = run_backend("mine", spec, plan, tmp_path)
    assert [verdict.outcome for verdict in whole.verdicts] == [Outcome.PASS, Outcome.PASS]
