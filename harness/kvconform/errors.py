"""Every error that kvconform raises on purpose. Standard library only: a worker imports this module.

``EXIT_CODE`` is the exit code of the command line. ``conformance()`` raises the same errors; the pytest suite skips on
``Unavailable`` and fails on the others.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from kvconform_specs.errors import KvconformError, SpecError

__all__ = [
    "BackendLost",
    "BackendUnavailable",
    "BadArgument",
    "Exit",
    "GpuBusy",
    "InvalidBackend",
    "KvconformError",
    "Raised",
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
    """A backend cannot be started: its address is unknown, it fails to load, or it cannot run here (exit code 3).

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


@dataclass(frozen=True)
class Raised:
    """An exception, as it came from a backend."""

    type: str
    """Name of the exception's type."""
    message: str
    """What the exception said, at most 500 characters."""
    out_of_memory: bool = False
    """Whether it says that memory could not be had."""

    def __str__(self) -> str:
        return f"{self.type}: {self.message}"

    @property
    def pattern(self) -> tuple[str, str]:
        """Type and message without their numbers: shapes and positions differ between programs that raise one error."""
        return self.type, re.sub(r"\d+", "0", self.message)

    @classmethod
    def of(cls, error: Exception) -> Raised:
        message = (str(error).strip() or "no message")[:500]
        memory = isinstance(error, MemoryError) or any(words in message for words in OUT_OF_MEMORY)
        return cls(type(error).__name__, message.encode(errors="replace").decode(), memory)  # no lone surrogate in JSON


OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "Failed to allocate memory", "RESOURCE_EXHAUSTED")
"""What torch (CUDA, CPU), ONNX Runtime and XLA say where memory cannot be had: they have no type of their own for it
everywhere."""
OWN_FAULT = ("SIGABRT", "SIGBUS", "SIGFPE", "SIGILL", "SIGPIPE", "SIGSEGV", "SIGSYS", "SIGTRAP")
"""The signals that a process brings on itself by a fault. Any other one was sent, by someone else or by ``os.kill``."""


@dataclass(frozen=True)
class Exit:
    """How a worker process ended: with a status, by a signal, or killed because it made no progress."""

    status: int | None = None
    """Exit status of a process that ended without a signal; no unit."""
    signal: str = ""
    """Name of the signal that ended the process, such as `SIGSEGV`."""
    timeout: float | None = None
    """Seconds without progress after which the process was killed; null where it ended before."""
    oom: bool = False
    """Whether the system's out-of-memory killer may have ended it: it was at work, or its count cannot be read."""
    stderr: str = ""
    """Last line that the process wrote to its standard error, at most 200 characters."""

    @property
    def from_outside(self) -> bool:
        """Whether a signal ended it that a fault of the process does not raise."""
        return bool(self.signal) and self.signal not in OWN_FAULT

    def __str__(self) -> str:
        if self.timeout is not None:
            return f"no answer within {self.timeout:g} s"
        how = f"died of {self.signal}" if self.signal else f"ended with exit status {self.status}"
        return f"the process {how}" + (f" ({self.stderr})" if self.stderr else "")


class WorkerDied(KvconformError):
    """The worker process died, or the backend raised outside a step.

    stage: what the worker was doing: a step, the build of the backend, the target's own uncached forward, or another
    message. error or ended: the exception, or how the process ended. variant, step: where in the program; call: the
    step in words, empty where no step was running.
    """

    def __init__(
        self,
        stage: Literal["step", "build", "reference", "message"],
        error: Raised | None = None,
        ended: Exit | None = None,
        variant: int = 0,
        step: int = -1,
        call: str = "",
    ) -> None:
        self.stage, self.error, self.ended = stage, error, ended
        self.variant, self.step, self.call = variant, step, call
        place = f"step {step} ({call}): " if call else ""
        super().__init__(f"{place}{STAGES[stage]}{error or ended}")

    @property
    def from_outside(self) -> bool:
        """Whether a signal ended the process that a fault of the process does not raise."""
        return self.ended is not None and self.ended.from_outside


STAGES = {"step": "", "build": "could not be built: ", "reference": "its own uncached forward failed: ", "message": ""}
"""What the message of a WorkerDied begins with."""


class WorkerTimeout(WorkerDied):
    """The worker process made no progress within the timeout and was killed."""


class BackendLost(KvconformError):
    """A backend can no longer be timed on a preset: which one, and why."""

    def __init__(self, backend: str, why: str) -> None:
        super().__init__(why)
        self.backend, self.why = backend, why


class StaleEntry(KvconformError):
    """A row of the known failures does not hold on this machine, with these versions or for this cell."""
