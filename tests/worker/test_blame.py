"""What comes from outside, or from a lack of memory, convicts no backend; what a backend does to itself does."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from killed import MARK
from places import SUPPORT

from kvconform.errors import Raised
from kvconform.judging.mismatch import Kind
from kvconform.judging.verdict import Outcome, Reason, Verdict
from kvconform.search import counterexample
from kvconform.search.cell import Cell, run_cell
from kvconform.search.effort import EFFORTS
from kvconform.worker import client as clients
from kvconform.worker import process as processes
from kvconform.worker.client import WorkerClient, WorkerSpec
from kvconform_specs.clauses import BY_NAME
from kvconform_specs.configs import config_named

CELL = Cell(BY_NAME["shape.output"], config_named("attention-gqa"), "attention-gqa")


def judged(name: str, folder: Path, python: str = sys.executable) -> Verdict:
    spec = WorkerSpec(f"{SUPPORT / 'killed.py'}:{name}", python=python, environment={MARK: str(folder / "mark")})
    with WorkerClient(spec) as client:
        return run_cell(CELL, client, EFFORTS["smoke"], 0, folder)


def kill_once(folder: Path, number: signal.Signals) -> threading.Thread:
    """Kills the process that writes its number to the file ``mark``."""

    def sidecar() -> None:
        ends, mark = time.monotonic() + 60, folder / "mark"
        while not mark.exists() and time.monotonic() < ends:
            time.sleep(0.01)
        os.kill(int(mark.read_text()), number)

    thread = threading.Thread(target=sidecar)
    thread.start()
    return thread


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_a_worker_that_is_killed_from_outside_is_inconclusive(number: signal.Signals, tmp_path: Path) -> None:
    thread = kill_once(tmp_path, number)
    found = judged("KilledInAStep", tmp_path)
    thread.join()
    assert (found.outcome, found.reason) == (Outcome.INCONCLUSIVE, Reason.KILLED)
    assert f"died of {number.name}" in found.sentence
    assert found.counterexample == ""


def test_a_build_that_is_killed_from_outside_is_tried_again(tmp_path: Path) -> None:
    thread = kill_once(tmp_path, signal.SIGKILL)
    found = judged("KilledInTheBuild", tmp_path)
    thread.join()
    assert found.outcome is Outcome.PASS


def test_a_start_that_is_killed_from_outside_is_tried_again(tmp_path: Path) -> None:
    file = tmp_path / "late.py"
    file.write_text("import killed\nkilled.wait_for_the_sidecar()\nLate = killed.NumpyCache\n")
    thread = kill_once(tmp_path, signal.SIGKILL)
    environment = {MARK: str(tmp_path / "mark"), "PYTHONPATH": str(SUPPORT)}
    with WorkerClient(WorkerSpec(f"{file}:Late", environment=environment)) as client:
        assert client.starts == 2
        assert run_cell(CELL, client, EFFORTS["smoke"], 0, tmp_path).outcome is Outcome.PASS
    thread.join()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind"), [("KillsItself", Kind.DIED), ("KillsItselfInTheBuild", Kind.NOT_BUILT)], ids=["step", "build"]
)
def test_a_backend_that_kills_itself_each_time_is_convicted(name: str, kind: Kind, tmp_path: Path) -> None:
    found = judged(name, tmp_path)
    assert found.outcome is Outcome.CRASH
    assert found.mismatch is not None
    assert found.mismatch.kind is kind
    assert found.mismatch.ended is not None
    assert found.mismatch.ended.signal == "SIGKILL"


def test_a_backend_that_kills_itself_at_its_nth_call_is_convicted_by_what_it_ran_before(tmp_path: Path) -> None:
    found = judged("KillsItselfAtTheFortiethCall", tmp_path)
    assert found.outcome is Outcome.CRASH
    assert found.mismatch is not None
    assert found.mismatch.ended is not None
    assert found.mismatch.ended.signal == "SIGKILL"
    assert found.mismatch.earlier_programs > 0
    stored = counterexample.read(tmp_path / found.counterexample)
    assert len(stored.before) == found.mismatch.earlier_programs


@pytest.mark.parametrize("counts", [range(1000), [None] * 1000], ids=["counted", "no count"])
@pytest.mark.parametrize("name", ["KillsItself", "KillsItselfInTheBuild"])
def test_where_the_out_of_memory_killer_may_have_been_at_work_nobody_is_convicted(
    name: str, counts: Sequence[int | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    following = iter(counts)
    for module in (clients, processes):
        monkeypatch.setattr(module, "oom_kills", lambda: next(following))
    found = judged(name, tmp_path)
    assert (found.outcome, found.reason) == (Outcome.INCONCLUSIVE, Reason.OUT_OF_MEMORY)


def test_a_backend_that_asks_for_more_memory_than_there_is_is_convicted(tmp_path: Path) -> None:
    found = judged("AsksForTooMuch", tmp_path)
    assert found.outcome is Outcome.FAIL
    assert found.mismatch is not None
    assert found.mismatch.error is not None
    assert found.mismatch.error.out_of_memory


def test_where_memory_is_short_a_failure_to_get_some_is_inconclusive(tmp_path: Path) -> None:
    assert judged("NeedsALot", tmp_path).outcome is Outcome.PASS
    short = tmp_path / "python"
    short.write_text(f'#!/bin/sh\nulimit -v 1000000\nexec "{sys.executable}" "$@"\n')
    short.chmod(0o755)
    found = judged("NeedsALot", tmp_path, str(short))
    assert (found.outcome, found.reason) == (Outcome.INCONCLUSIVE, Reason.OUT_OF_MEMORY)


@pytest.mark.parametrize(
    ("error", "memory"),
    [
        (MemoryError(), True),
        (RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"), True),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes"), True),
        (RuntimeError("bad_alloc: Failed to allocate memory for requested buffer of size 8"), True),
        (RuntimeError("index out of range"), False),
    ],
)
def test_an_error_about_memory_is_known_by_its_type_or_its_words(error: Exception, memory: bool) -> None:
    assert Raised.of(error).out_of_memory is memory
