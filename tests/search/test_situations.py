"""A pass has tried what its clause says: cells draw on until each situation is reached, or are not exercised."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from kvconform.judging.verdict import Outcome, Reason
from kvconform.search.cell import Cell, run_cell
from kvconform.search.effort import CHECK, EFFORTS
from kvconform.worker.client import WorkerClient, WorkerSpec
from kvconform_specs import situations as reach
from kvconform_specs.clauses import BY_NAME
from kvconform_specs.configs import config_named

GQA = config_named("attention-gqa")
DROPPED = "kvconform_backends.faults.capacity:TokenAtFullDropped"


def test_a_cell_that_cannot_reach_a_situation_is_not_exercised_and_says_which(tmp_path: Path) -> None:
    never = reach.append("a sequence of no tokens", lambda visit: visit.longest == 0)
    clause = replace(BY_NAME["shape.output"], situations=(reach.DECODE, never))
    with WorkerClient(WorkerSpec("numpy")) as client:
        found = run_cell(Cell(clause, GQA, "attention-gqa"), client, EFFORTS["smoke"], 0, tmp_path)
    assert (found.outcome, found.reason) == (Outcome.NOT_EXERCISED, Reason.SITUATION)
    assert found.sentence == "no program has a sequence of no tokens"
    assert found.situations["a decode step on a cache"] > 0
    assert found.situations["a sequence of no tokens"] == 0


def test_a_cell_draws_on_for_a_situation_that_its_planned_cases_miss(tmp_path: Path) -> None:
    rare = reach.append("three rows of five tokens", lambda visit: visit.new == 5 and len(visit.after) == 3)
    clause = replace(BY_NAME["shape.output"], situations=(rare,), share=0.1)
    with WorkerClient(WorkerSpec("numpy")) as client:
        found = run_cell(Cell(clause, GQA, "attention-gqa"), client, EFFORTS["smoke"], 0, tmp_path)
    assert found.outcome is Outcome.PASS
    assert found.situations == {"three rows of five tokens": 1}
    assert (found.planned, found.structures) == (2, 3)


@pytest.mark.slow
def test_what_only_a_further_case_shows_is_shrunk_and_confirmed(tmp_path: Path) -> None:
    """The first two cases of this clause do not fill the cache."""
    full = reach.refused(
        "one token more, at the capacity", lambda v: v.past == v.config.capacity and v.new == 1, reach.always
    )
    clause = replace(BY_NAME["errors.unchanged"], situations=(full,), share=0.1)
    with WorkerClient(WorkerSpec(DROPPED)) as client:
        found = run_cell(Cell(clause, GQA, "attention-gqa"), client, EFFORTS["smoke"], 1, tmp_path)
    assert found.outcome is Outcome.FAIL
    assert found.structures == 3
    assert (tmp_path / found.counterexample).is_file()


def test_an_overflow_of_exactly_one_token_is_tried_with_every_seed(tmp_path: Path) -> None:
    with WorkerClient(WorkerSpec(DROPPED)) as client:
        cell = Cell(BY_NAME["capacity.overflow"], GQA, "attention-gqa")
        effort = replace(CHECK, shrink=False)
        outcomes = [run_cell(cell, client, effort, seed, tmp_path).outcome for seed in range(30)]
    assert outcomes == [Outcome.FAIL] * 30
