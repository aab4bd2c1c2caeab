"""Backends that are killed or get no memory, addressed as ``tests/support/killed.py:Name``."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np

from kvconform_backends.numpy.cache import Cache, NumpyCache

MARK = "KVCONFORM_TEST_MARK"
"""The environment variable that names a file: a process that finds none writes its number there and waits."""


def _deep(cache: Cache, inputs: tuple[Any, ...]) -> bool:
    return cache.length + inputs[-1].shape[-2 if len(inputs) == 3 else -1] > 3


def wait_for_the_sidecar() -> None:
    mark = Path(os.environ[MARK])
    if not mark.exists():
        mark.with_suffix(".new").write_text(str(os.getpid()))
        mark.with_suffix(".new").rename(mark)
        time.sleep(60)


class KilledInAStep(NumpyCache):
    """Right; waits once, in a step, to be killed."""

    def step(self, cache: Cache, *inputs: Any) -> tuple[Any, Cache]:
        if _deep(cache, inputs):
            wait_for_the_sidecar()
        return super().step(cache, *inputs)


class KilledInTheBuild(NumpyCache):
    """Right; waits once, while it is built, to be killed."""

    def __init__(self, *given: Any) -> None:
        wait_for_the_sidecar()
        super().__init__(*given)


class KillsItself(NumpyCache):
    def step(self, cache: Cache, *inputs: Any) -> tuple[Any, Cache]:
        if _deep(cache, inputs):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(cache, *inputs)


class KillsItselfAtTheFortiethCall(NumpyCache):
    """Of its process, whatever the calls are."""

    calls = 0

    def step(self, cache: Cache, *inputs: Any) -> tuple[Any, Cache]:
        KillsItselfAtTheFortiethCall.calls += 1
        if self.calls == 40:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(cache, *inputs)


class KillsItselfInTheBuild(NumpyCache):
    def __init__(self, *given: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class AsksForTooMuch(NumpyCache):
    """A size computed wrongly: no machine has so much memory."""

    def step(self, cache: Cache, *inputs: Any) -> tuple[Any, Cache]:
        if _deep(cache, inputs):
            np.zeros(1 << 57)
        return super().step(cache, *inputs)


class NeedsALot(NumpyCache):
    """Right, where there is 1 GiB to be had."""

    def step(self, cache: Cache, *inputs: Any) -> tuple[Any, Cache]:
        if _deep(cache, inputs):
            np.empty(1 << 27)
        return super().step(cache, *inputs)


class KillsWhoeverJudges(NumpyCache):
    """Right; kills the process that judges it, unless that is the one whose number ``KVCONFORM_TEST_RUN`` gives."""

    def step(self, cache: Cache, *inputs: Any) -> tuple[Any, Cache]:
        fork_server = Path(f"/proc/{os.getppid()}/stat").read_text()
        judge = int(fork_server.rpartition(")")[2].split()[1])  # its parent
        if judge != int(os.environ["KVCONFORM_TEST_RUN"]):
            os.kill(judge, signal.SIGKILL)
        return super().step(cache, *inputs)
