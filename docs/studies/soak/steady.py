"""A long run of one worker: memory and file descriptors, of the worker and of its parent."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from statistics import median

import msgspec

from kvconform.worker.client import WorkerClient, WorkerSpec
from kvconform_specs.configs import CONFIGS
from kvconform_specs.program import Append, Close, Program, Truncate

PAGE = os.sysconf("SC_PAGE_SIZE")
PROGRAMS = tuple(
    Program(
        CONFIGS["attention-gqa"], (Append("a", (first,), seed), Truncate("a", 1), Append("a", (2,), seed), Close("a"))
    )
    for seed, first in enumerate((1, 3, 5, 8))
)


class Steady(msgspec.Struct, frozen=True, kw_only=True):
    """Medians over the second quarter and over the last quarter of a run."""

    programs: int
    """How many programs the worker ran."""
    worker_mib: tuple[float, float]
    """Resident memory of the worker, in MiB (2^20 bytes)."""
    parent_mib: tuple[float, float]
    """Resident memory of the parent, in MiB (2^20 bytes)."""
    worker_files: tuple[float, float]
    """How many file descriptors the worker has open."""
    parent_files: tuple[float, float]
    """How many file descriptors the parent has open."""


def soak(number: int, backend: str = "numpy", say: Callable[[str], None] = print) -> Steady:
    every, seen = max(1, number // 200), []
    with WorkerClient(WorkerSpec(backend)) as client:
        client.build(PROGRAMS[0].config)
        for at in range(number):
            client.run(PROGRAMS[at % len(PROGRAMS)], (0,))
            if at % every == 0:
                assert client.process is not None
                seen.append((*_use(client.process), *_use(os.getpid())))
            if at % (number // 10 or 1) == 0:
                say(f"{at} programs: {seen[-1]}")
    second, last = seen[len(seen) // 4 : len(seen) // 2], seen[-(len(seen) // 4) :]
    pairs = [tuple(round(median(row[column] for row in part), 1) for part in (second, last)) for column in range(4)]
    worker, worker_files, parent, parent_files = pairs
    return Steady(
        programs=number,
        worker_mib=worker,  # type: ignore[arg-type]
        parent_mib=parent,  # type: ignore[arg-type]
        worker_files=worker_files,  # type: ignore[arg-type]
        parent_files=parent_files,  # type: ignore[arg-type]
    )


def _use(process: int) -> tuple[float, float]:
    """Resident memory in MiB and open file descriptors of a process."""
    place = Path(f"/proc/{process}")
    return int((place / "statm").read_text().split()[1]) * PAGE / 2**20, float(len(list((place / "fd").iterdir())))
