"""Cells that fail for one raised error are concluded together: one is shrunk, the others run its program."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest

from kvconform.errors import Raised
from kvconform.judging.mismatch import Kind, Mismatch
from kvconform.judging.verdict import Outcome, Verdict
from kvconform.results.results import Results
from kvconform.run import check
from kvconform.search.cell import Cell, run_cell
from kvconform.search.counterexample import read, replayed
from kvconform.search.effort import EFFORTS
from kvconform.worker.client import WorkerClient, WorkerSpec
from kvconform_specs.clause import Case
from kvconform_specs.clauses import BY_NAME
from kvconform_specs.configs import config_named

CONFIG = "attention-gqa"
CLAUSES = ("shape.output", "equivalence.decode", "lifecycle.truncate", "batch.row-solo")
TWO_ERRORS = """
from kvconform_backends.numpy.cache import NumpyCache
class TwoErrors(NumpyCache):
    def step(self, cache, *inputs, **keywords):
        if cache.length > 2:
            raise RuntimeError(f"no room for {cache.length} tokens")
        return super().step(cache, *inputs, **keywords)
    def truncate(self, cache, length):
        raise RuntimeError("cannot truncate")
"""


def judge(client: WorkerClient, clause: str, folder: Path) -> Verdict:
    return run_cell(Cell(BY_NAME[clause], config_named(CONFIG), CONFIG), client, EFFORTS["smoke"], 0, folder)


def alone(address: str, clause: str, folder: Path) -> Verdict:
    with WorkerClient(WorkerSpec(address)) as client:
        return judge(client, clause, folder)


def facts(verdict: Verdict) -> tuple[object, ...]:
    assert verdict.mismatch is not None
    assert verdict.mismatch.error is not None
    return (
        verdict.clause,
        verdict.outcome,
        verdict.mismatch.kind,
        verdict.mismatch.error.pattern,
        verdict.digest,
        verdict.programs,
        verdict.found_after,
    )


@pytest.fixture
def address(tmp_path: Path) -> str:
    (tmp_path / "two_errors.py").write_text(TWO_ERRORS)
    return f"{tmp_path / 'two_errors.py'}:TwoErrors"


def test_a_known_error_is_confirmed_without_new_processes_and_its_verdicts_are_those_of_a_cell_alone(
    address: str, tmp_path: Path
) -> None:
    with WorkerClient(WorkerSpec(address)) as client:
        found = [judge(client, CLAUSES[0], tmp_path)]
        starts = client.starts
        found += [judge(client, clause, tmp_path) for clause in CLAUSES[1:] if clause != "lifecycle.truncate"]
        assert client.starts == starts
        cases = [read(tmp_path / one.counterexample) for one in found]
        assert len({str(one.case) for one in cases}) == 1
        assert len({one.sentence for one in found}) == 1
        for one, case in zip(found, cases, strict=True):  # each file replays by itself
            again = replayed(BY_NAME[one.clause], client, [], Case.from_json(case.case))
            assert again == one.mismatch
    assert [facts(one) for one in found] == [facts(alone(address, one.clause, tmp_path / "alone")) for one in found]


def test_another_error_is_searched_for_itself(address: str, tmp_path: Path) -> None:
    with WorkerClient(WorkerSpec(address)) as client:
        known = judge(client, "shape.output", tmp_path)
        other = judge(client, "lifecycle.truncate", tmp_path)
        assert len(client.raised) == 2
    assert known.mismatch is not None
    assert known.mismatch.error is not None
    assert known.mismatch.error.message.startswith("no room for")
    assert facts(other) == facts(alone(address, "lifecycle.truncate", tmp_path / "alone"))


def test_an_error_that_needs_earlier_programs_is_not_known(tmp_path: Path) -> None:
    (tmp_path / "second.py").write_text(
        "from kvconform_backends.numpy.cache import NumpyCache\nstarted = []\nclass Second(NumpyCache):\n"
        "    def start(self, batch):\n        started.append(batch)\n"
        "        if len(started) > 3: raise RuntimeError('full')\n        return super().start(batch)\n"
    )
    with WorkerClient(WorkerSpec(f"{tmp_path / 'second.py'}:Second")) as client:
        found = judge(client, "shape.output", tmp_path)
        assert found.mismatch is not None
        assert found.mismatch.earlier_programs > 0
        assert not client.raised


def raised(clause: str, message: str) -> Verdict:
    mismatch = Mismatch(kind=Kind.RAISED, program=0, step=0, call="append 1 to a", error=Raised("ValueError", message))
    return Verdict(clause=clause, config=CONFIG, backend="x", outcome=Outcome.FAIL, mismatch=mismatch, sentence=message)


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        (("shape 3 is wrong", "shape 4 is wrong"), ["  by the same error: shape.length"]),
        (("shape 3 is wrong", "no room"), []),
    ],
)
def test_a_check_prints_failures_by_one_error_together(
    messages: Sequence[str], expected: list[str], tmp_path: Path
) -> None:
    found = Results(suite="0", backend="x", device="cpu", dtypes=[], effort="pr", seed=0, started="now")
    verdicts = [raised(clause, words) for clause, words in zip(("shape.output", "shape.length"), messages, strict=True)]
    printed = [*check.lines(msgspec.structs.replace(found, verdicts=verdicts), tmp_path)]
    assert [line for line in printed if "same error" in line] == expected
    assert sum(line.startswith("broken: ") for line in printed) == 2 - len(expected)
