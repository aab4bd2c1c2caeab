"""Adapters that misbehave: whatever one does, its run ends with a verdict or a reason, and nothing else is harmed."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from kvconform.errors import KvconformError
from kvconform.run.run import plan_for, run_backend
from kvconform.worker.client import WorkerSpec
from kvconform_backends.numpy.cache import NumpyCache

PATIENCE = 5.0
"""Seconds without progress after which a worker is killed."""


def _raise(error: BaseException) -> Any:
    raise error


def _recurse(depth: int = 0) -> int:
    return _recurse(depth + 1)


def _close_pipes() -> None:
    for number in range(3):
        os.close(number)


WAYS: dict[str, Callable[[], Any]] = {
    "Raises": lambda: _raise(ValueError("no")),
    "RaisesALongMessage": lambda: _raise(ValueError("x" * 1_000_000)),
    "RaisesALoneSurrogate": lambda: _raise(ValueError("\udcff\x00\x1b[31m")),
    "RaisesKeyboardInterrupt": lambda: _raise(KeyboardInterrupt()),
    "RaisesMemoryError": lambda: _raise(MemoryError()),
    "RaisesStopIteration": lambda: _raise(StopIteration()),
    "Exits": lambda: sys.exit(3),
    "ExitsAtOnce": lambda: os._exit(3),
    "Aborts": os.abort,
    "Segfaults": lambda: ctypes.string_at(0),
    "KillsItself": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "Hangs": lambda: time.sleep(600),
    "HangsInALoop": lambda: [None for _ in iter(int, 1)],
    "Recurses": _recurse,
    "PrintsMuch": lambda: print("junk " * 100_000),
    "WritesToItsStandardOutput": lambda: os.write(1, b"\x00\xff junk"),
    "ClosesItsPipes": _close_pipes,
    "ReplacesStandardOutput": lambda: setattr(sys, "stdout", None),
    "StartsAThreadThatRaises": lambda: threading.Thread(target=lambda: 1 / 0).start(),
    "ChangesTheFolder": lambda: os.chdir("/"),
    "IgnoresSignals": lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN),
    "LosesItsEnvironment": os.environ.clear,
}
"""What a step does before it computes, by the name of the adapter."""
OUTPUTS: dict[str, Callable[[Any], Any]] = {
    "ReturnsNone": lambda out: None,
    "ReturnsText": lambda out: "out",
    "ReturnsObjects": lambda out: out.astype(object),
    "ReturnsAnotherShape": lambda out: out[..., :-1],
    "ReturnsNothingOfIt": lambda out: out[:0],
    "ReturnsNan": lambda out: np.full_like(out, np.nan),
    "ReturnsWholeNumbers": lambda out: out.astype(np.int8),
    "ReturnsComplexNumbers": lambda out: out.astype(complex),
}
"""What a step gives in place of its output."""


def _before(act: Callable[[], Any]) -> Callable[..., Any]:
    def step(self: NumpyCache, cache: Any, *inputs: Any, **options: Any) -> Any:
        act()
        return NumpyCache.step(self, cache, *inputs, **options)

    return step


def _instead(change: Callable[[Any], Any]) -> Callable[..., Any]:
    def step(self: NumpyCache, cache: Any, *inputs: Any, **options: Any) -> Any:
        output, grown = NumpyCache.step(self, cache, *inputs, **options)
        return change(output), grown

    return step


STEPS: dict[str, Callable[..., Any]] = {name: _before(act) for name, act in WAYS.items()} | {
    name: _instead(c) for name, c in OUTPUTS.items()
}
for _name, _step in STEPS.items():
    globals()[_name] = type(_name, (NumpyCache,), {"step": _step, "__module__": __name__})


class Adapter(msgspec.Struct, frozen=True, kw_only=True):
    """What came of one adapter."""

    name: str
    """What it does."""
    ending: str
    """The outcomes of its cells, or why it could not run, in words; `traceback` where the parent raised."""


def soak(folder: Path, names: Collection[str] = STEPS, say: Callable[[str], None] = print) -> list[Adapter]:
    """Judges adapters by two cells each. ``folder``: a scratch folder."""
    plan = plan_for("smoke", clauses=("shape.output", "equivalence.decode"), configs=("attention-gqa",))
    found = []
    for name in names:
        try:
            judged = run_backend(name, WorkerSpec(f"{__file__}:{name}", step_timeout=PATIENCE), plan, folder)
            outcomes = [f"{count} {outcome}" for outcome, count in judged.counts.items() if count]
            ending = ", ".join(outcomes) or f"refused: {judged.unavailable[:80]}"
        except KvconformError as error:
            ending = f"refused: {str(error)[:80]}"
        except Exception as error:  # noqa: BLE001
            ending = f"traceback: {type(error).__name__}: {str(error)[:80]}"
        say(f"{name}: {ending}")
        found.append(Adapter(name=name, ending=ending))
    return found
