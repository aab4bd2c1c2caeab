"""Every error that kvconform raises on purpose. Standard library only: a worker imports this module.

``EXIT_CODE`` is the exit code of the command line. ``conformance()`` raises the same errors; the pytest suite skips on
``Unavailable`` and fails on the others.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from kvconform_specs.errors import KvconformError, SpecError

__all__ = [
    "BackendLost",
    "BackendUnavailable",
    "BadArgument",
    "GpuBusy",
    "InvalidBackend",
    "KvconformError",
    "SpecError",
    "StaleEntry",
    "Unavailable",
    "UnknownClause",
    "WorkerDied",
    "WorkerTimeout",
]


class BadArgument(KvconformError, ValueError):
    """An argument, option or file is wrong (exit code 2).

    argument: its name. value: what was given. known: the accepted values, where they are a closed list.
    """

    def __init__(self, argument: str, value: object, known: Iterable[str] = (), sentence: str = "") -> None:
        self.argument, self.value, self.known = argument, value, tuple(known)
        super().__init__(sentence or f"unknown {argument} {value!r}; known: {', '.join(self.known)}")


class UnknownClause(BadArgument):
    """No clause, or no cell, matches a name."""


class InvalidBackend(KvconformError, ValueError):
    """A backend was loaded and is not a backend: its claims and its methods disagree (exit code 2)."""


class BackendUnavailable(KvconformError):
    """No backend can be started: the address is unknown, the backend fails to load, or it cannot run here (exit code 3).

    remedy: what to do about it, such as a command that installs what is missing; empty where there is none.
    """

    def __init__(self, sentence: str, remedy: str = "") -> None:
        super().__init__(f"{sentence}; {remedy}" if remedy else sentence)
        self.sentence, self.remedy = sentence, remedy


class Unavailable(BackendUnavailable):
    """This machine lacks something that a working backend needs: a device, a compiler, a package (exit code 3).

    A backend raises it in its constructor. In pytest it is a skip.
    """


class GpuBusy(Unavailable):
    """Another benchmark holds the GPU."""


class WorkerDied(KvconformError):
    """The worker process died while it ran a program.

    words: what happened. variant, step: where in the program; step -1: before the first one.
    """

    kind: ClassVar[str] = "crash"

    def __init__(self, words: str, variant: int = 0, step: int = -1) -> None:
        super().__init__(words)
        self.words, self.variant, self.step = words, variant, step


class WorkerTimeout(WorkerDied):
    """The worker process made no progress within the timeout and was killed."""

    kind = "timeout"


class BackendLost(KvconformError):
    """A backend can no longer be timed on a preset: which one, and why."""

    def __init__(self, backend: str, why: str) -> None:
        super().__init__(why)
        self.backend, self.why = backend, why


class StaleEntry(KvconformError):
    """A row of the known failures does not hold on this machine, with these versions or for this cell."""
