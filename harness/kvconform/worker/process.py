"""The process of a worker: what it is started with, and how it ended."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvconform.errors import Exit
from kvconform.host import oom_kills

TASKS = Path("/proc/self/task")
"""On Linux, a folder with an entry for each thread of this process."""
OWN = "KVCONFORM_"
"""With this begin the variables of the environment that are the harness's own."""


@contextmanager
def pinned(cpus: tuple[int, ...] | None) -> Iterator[None]:
    """A process that this thread starts meanwhile inherits these processors."""
    if cpus is None or not hasattr(os, "sched_setaffinity"):
        yield
        return
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def variables() -> dict[str, str]:
    """What every worker's environment has. One thread unless the caller says otherwise: the suite's tensors are small,
    and the parent computes the definition on another core meanwhile."""
    threads = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": "1"}
    return {"PYTHONHASHSEED": "0", "PYTHONUNBUFFERED": "1", **threads}


def exit_of(code: int, stderr: str, kills: int | None) -> Exit:
    """How a process ended that had this return code and last words. ``kills``: what ``oom_kills`` counted before."""
    if code >= 0:
        return Exit(code, stderr=stderr)
    now = oom_kills()
    oom = code == -signal.SIGKILL and (now is None or now != kills)
    return Exit(signal=signal.Signals(-code).name, oom=oom, stderr=stderr)
