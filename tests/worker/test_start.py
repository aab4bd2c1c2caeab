"""A forked worker is what a new process would be: it is judged, ends and is cleaned up in the same way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from places import SUPPORT

from kvconform.errors import BackendUnavailable, BadArgument, WorkerDied
from kvconform.results.results import Results
from kvconform.run.run import plan_for, run_backend
from kvconform.worker import start
from kvconform.worker.client import WorkerClient, WorkerSpec
from kvconform.worker.start import FORK, SPAWN, frameworks
from kvconform_specs.configs import config_named
from kvconform_specs.program import Append, Program

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux only")

SUBJECTS = SUPPORT / "subjects.py"
CONFIG = config_named("attention-gqa")
PROGRAM = Program(CONFIG, (Append("a", (5,), 0),))


@pytest.fixture(autouse=True)
def _no_servers_from_other_tests() -> Iterator[None]:
    start._close_all()
    yield
    start._close_all()


def client(name: str, method: str = FORK, step_timeout: float = 60.0) -> WorkerClient:
    return WorkerClient(WorkerSpec(f"{SUBJECTS}:{name}", start_method=method, step_timeout=step_timeout))


def judged(address: str, method: str, folder: Path) -> Results:
    plan = plan_for("smoke", clauses=["equivalence.decode", "lifecycle", "shape.output"], configs=["attention-gqa"])
    return run_backend("one", WorkerSpec(address, start_method=method, step_timeout=1.0), plan, folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    "address",
    [
        "numpy",
        "eager",
        "kvconform_backends.faults.published:FirstListing",
        *(f"{SUBJECTS}:{name}" for name in ("GlobalCache", "Raises", "Segfaults", "Exits", "PrintsAndIsWrong")),
    ],
)
def test_verdicts_do_not_depend_on_how_a_worker_was_started(address: str, tmp_path: Path) -> None:
    forked, spawned = (judged(address, method, tmp_path / method) for method in (FORK, SPAWN))
    told = [[msgspec.structs.replace(one, seconds=0.0) for one in found.verdicts] for found in (forked, spawned)]
    assert told[0] == told[1]
    assert any(verdict.digest for verdict in forked.verdicts)
    assert forked.environment == spawned.environment


@pytest.mark.parametrize(("name", "words"), [("Segfaults", "SIGSEGV"), ("Exits", "exit status 7")])
def test_how_a_forked_worker_ended_is_told_as_of_a_new_process(name: str, words: str) -> None:
    ends = []
    for method in (FORK, SPAWN):
        with client(name, method) as one:
            assert one.started.startswith(method)
            with pytest.raises(WorkerDied) as died:
                one.run(PROGRAM, (0,))
        assert words in str(died.value)
        ends.append(died.value.ended)
    assert ends[0] == ends[1]


def test_a_forked_worker_that_hangs_is_killed(tmp_path: Path) -> None:
    with client("Hangs", step_timeout=0.5) as one:
        number = one.process
        assert number is not None
        with pytest.raises(WorkerDied, match="no answer within"):
            one.run(PROGRAM, (0,))
        assert not Path(f"/proc/{number}").exists()


def test_a_fresh_worker_is_another_process_with_nothing_of_the_last(tmp_path: Path) -> None:
    file = tmp_path / "counts.py"
    file.write_text(
        "import sys, numpy\nfrom kvconform_backends.numpy.cache import NumpyCache\n"
        "class Counts(NumpyCache):\n    def runtime_info(self):\n"
        "        sys.count = getattr(sys, 'count', 0) + 1\n"
        "        return {'count': sys.count, 'number': numpy.random.rand()}\n"
    )
    with WorkerClient(WorkerSpec(f"{file}:Counts")) as one:
        found = []
        for _ in range(2):
            one.build(CONFIG)
            found.append(one.runtime_info(CONFIG))
            one.fresh()
        assert one.started == FORK
    assert [told["count"] for told in found] == [1, 1]
    assert found[0]["number"] != found[1]["number"]  # as those of two new processes


PARENT = """
import os, sys, time
from kvconform.worker.client import WorkerClient, WorkerSpec
from kvconform.worker import start
from kvconform_specs.configs import config_named
from kvconform_specs.program import Append, Program
one = WorkerClient(WorkerSpec(sys.argv[1]))
config = config_named("attention-gqa")
one.build(config)
one.send(Program(config, (Append("a", (5,), 0),)), (0,))
(server,) = start._servers.values()
print(one.process, server._process.pid, flush=True)
time.sleep(600)
"""


def gone(number: int) -> bool:
    ends = time.monotonic() + 20
    while time.monotonic() < ends:
        try:
            if Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True  # it has ended, and its new parent has not read its status yet
        except OSError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("victim", ["parent", "server"])
def test_whichever_process_is_killed_no_worker_is_left_even_one_that_hangs(victim: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, f"{SUBJECTS}:Hangs"], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        worker, server = map(int, parent.stdout.readline().split())
        os.kill(parent.pid if victim == "parent" else server, signal.SIGKILL)
        assert gone(worker)
        assert gone(server)
        parent.kill()


def test_an_import_that_starts_a_thread_leaves_new_processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "threaded.py").write_text(
        "import threading, time\nthreading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(start, "frameworks", lambda address: ("threaded",))
    with client("Prints") as one:
        assert one.started == ("spawn: importing frameworks started 1 thread, which a fork would not have")
        one.run(PROGRAM, (0,))
        one.fresh()
        assert one.started.startswith("spawn: ")


def test_a_server_that_ends_leaves_new_processes() -> None:
    with client("Prints") as one:
        (server,) = start._servers.values()
        server._process.kill()
        server._process.wait()
        one.fresh()
        assert one.started == "spawn: the process that imports frameworks ended"
        one.run(PROGRAM, (0,))


def test_a_device_is_never_used_in_a_fork() -> None:
    spec = WorkerSpec(f"{SUBJECTS}:ClaimsCuda", device="cuda")
    with WorkerClient(spec) as one:
        assert one.started == "spawn: cuda cannot be used after a fork"
    assert not start._servers


def test_an_interpreter_that_does_not_exist_is_one_sentence() -> None:
    with pytest.raises(BackendUnavailable, match=r"interpreter '/no/python' cannot be started"):
        WorkerClient(WorkerSpec("numpy", python="/no/python"))


def test_an_unknown_start_method_is_an_error() -> None:
    with pytest.raises(BadArgument, match="fork"):
        WorkerSpec("numpy", start_method="clone")


def test_one_server_serves_all_workers_of_one_environment_and_idle_ones_end() -> None:
    with client("Prints") as one, client("Prints") as other:
        assert len(start._servers) == 1
        assert one.process != other.process
    servers = []
    for number in range(start.IDLE + 2):
        with WorkerClient(WorkerSpec("numpy", environment={"NUMBER": str(number)})):
            servers.append(next(reversed(start._servers.values())))
    assert len(start._servers) == start.IDLE + 1
    assert servers[0]._process.returncode == 0


@pytest.mark.parametrize(
    ("address", "found"),
    [
        ("numpy", ()),
        ("eager", ("torch",)),
        ("compiled", ("torch",)),
        ("hf:a-directory", start.FRAMEWORKS["transformers"]),
        (f"py:{SUBJECTS}:Prints", ("torch",)),
        (f"{SUBJECTS}:Prints", ()),
        ("no-such-backend", ()),
        ("no.module:Name", ()),
    ],
)
def test_the_frameworks_of_a_backend_are_read_from_its_source(address: str, found: tuple[str, ...]) -> None:
    assert frameworks(address) == found
