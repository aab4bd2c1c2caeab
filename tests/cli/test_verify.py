"""``verify`` agrees with what was found and not with what was written into the file afterwards."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import kvconform
from msgspec.structs import replace

from kvconform.errors import BadArgument
from kvconform.judging.verdict import Outcome, Verdict
from kvconform.results.results import read
from kvconform.run.run import Plan, cells
from kvconform.run.verify import Agreement, compared, sample
from kvconform.search.effort import EFFORTS
from kvconform.worker.client import WorkerClient, WorkerSpec

BROKEN = "kvconform_backends.faults.causality:TopLeft"
PART = ("--effort", "smoke", "--config", "attention-gqa", "--clause", "shape", "--clause", "equivalence.decode")
FAILED = "equivalence.decode"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("verify")
    kvconform("run", "-b", BROKEN, *PART, folder=place)
    return place


def forged(folder: Path, change: Callable[[Verdict], Verdict], **more: Any) -> str:
    """The results with other verdicts, in a file beside them."""
    found = read(folder / "results" / "TopLeft.json")
    path = folder / "results" / "forged.json"
    replace(found, verdicts=[change(one) for one in found.verdicts], **more).write(path)
    return str(path)


def verified(folder: Path, file: str, *options: str) -> tuple[int, dict[str, Any]]:
    done = kvconform("verify", file, "--sample", "100", "--json", *options, folder=folder)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def agreements(found: dict[str, Any]) -> dict[str, str]:
    return {one["clause"]: one["agreement"] for one in found["cells"]}


@pytest.mark.slow
def test_what_was_found_is_found_again(folder: Path) -> None:
    code, found = verified(folder, "results/TopLeft.json")
    assert (code, found["exit_code"], found["notes"]) == (0, 0, [])
    assert set(agreements(found).values()) == {"agrees"}
    assert len(found["cells"]) == found["of"] > 3
    done = kvconform("verify", "results/TopLeft.json", "--sample", "2", "--seed", "5", folder=folder)
    assert f"agrees: {FAILED} [attention-gqa]: fail\n" in done.stdout  # half of the sample are failures
    words = f"TopLeft: 2 of {found['of']} decided cells were run again (--seed 5): 2 agree\n"
    assert done.stdout.endswith(words)


@pytest.mark.slow
def test_a_pass_in_place_of_a_failure_and_a_count_that_is_too_large_are_found(folder: Path) -> None:
    def change(verdict: Verdict) -> Verdict:
        if verdict.clause == FAILED:
            return replace(verdict, outcome=Outcome.PASS, mismatch=None, sentence="", compared=9)
        return replace(verdict, compared=verdict.compared + (verdict.clause == "shape.output"))

    code, found = verified(folder, forged(folder, change))
    assert code == 1
    assert {clause for clause, words in agreements(found).items() if words == "differs"} == {FAILED, "shape.output"}


@pytest.mark.slow
def test_another_backend_than_the_file_says_differs(folder: Path) -> None:
    code, found = verified(folder, "results/TopLeft.json", "-b", "numpy")
    assert code == 1
    failed = {verdict.clause for verdict in read(folder / "results" / "TopLeft.json").failures}
    assert {clause for clause, words in agreements(found).items() if words == "differs"} == failed
    assert found["notes"][0].startswith("source is ")


@pytest.mark.slow
def test_other_programs_are_said_as_such_and_decide_nothing(folder: Path) -> None:
    code, found = verified(folder, forged(folder, lambda verdict: replace(verdict, digest="another")))
    assert code == 5
    assert set(agreements(found).values()) == {"other programs"}


@pytest.mark.slow
def test_a_file_of_another_suite_or_without_decided_cells_is_refused(folder: Path) -> None:
    done = kvconform("verify", forged(folder, lambda one: one, suite="0.0.1"), folder=folder)
    assert done.returncode == 2
    assert done.stderr.startswith("kvconform: the file is of suite 0.0.1, this is suite ")
    found = read(folder / "results" / "TopLeft.json")
    with pytest.raises(BadArgument, match="the file has no decided cell"):
        sample(replace(found, verdicts=[]), 3, 0)


@pytest.mark.slow
def test_a_sample_depends_on_its_seed_alone_and_is_without_repetitions(folder: Path) -> None:
    found = read(folder / "results" / "TopLeft.json")
    for number in range(1, 12):
        keys = sample(found, number, 3)
        assert keys == sample(found, number, 3)
        assert len(set(keys)) == len(keys) <= number
        assert number == 1 or any(clause == FAILED for clause, _ in keys)
    assert len({tuple(sample(found, 2, seed)) for seed in range(20)}) > 1


def test_a_failure_that_only_its_counterexample_shows_agrees(folder: Path) -> None:
    """As after an earlier cell of the whole run, which the sample has not run."""
    (was,) = [one for one in read(folder / "results" / "TopLeft.json").verdicts if one.clause == FAILED]
    (cell,) = cells(Plan(EFFORTS["smoke"], clauses=(FAILED,), configs=("attention-gqa",)))
    now = replace(was, outcome=Outcome.PASS, mismatch=None, sentence="", compared=9)
    stored = folder / "results" / "failures" / "TopLeft"
    with WorkerClient(WorkerSpec(BROKEN)) as client:
        assert compared(was, now, cell, client, stored).agreement is Agreement.AGREES
        assert compared(was, now, cell, client, folder / "nowhere").agreement is Agreement.DIFFERS
    with WorkerClient(WorkerSpec("numpy")) as client:
        assert compared(was, now, cell, client, stored).agreement is Agreement.DIFFERS
