"""Running third-party code while a target is opened. It may raise anything; this is the only place that expects it."""

from __future__ import annotations

import dis
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from kvconform.errors import BackendUnavailable

MAX_MESSAGE = 300
"""Characters kept of a message."""
FRAMEWORKS = frozenset({"kvconform", "kvconform_backends", "kvconform_specs", "contextlib", "copy", "numpy", "torch"})


class ThirdPartyError(Exception):
    """An exception of third-party code, as one line.

    progress: the lines that were running in the third party's own files, outermost first: of two calls of one function,
    the larger one got further. deliberate: whether a ``raise`` or ``assert`` of those files raised it, not an operation
    on unfit numbers.
    """

    def __init__(self, sentence: str, progress: tuple[int, ...] = (), deliberate: bool = False) -> None:
        super().__init__(sentence)
        self.progress, self.deliberate = progress, deliberate


@contextmanager
def guarded() -> Iterator[None]:
    """Turns every exception except BackendUnavailable into ThirdPartyError."""
    try:
        yield
    except BackendUnavailable:
        raise
    except Exception as error:
        words = " ".join(str(error).split())[:MAX_MESSAGE] or "no message"
        frames = list(traceback.walk_tb(error.__traceback__))
        own = [(frame, line) for frame, line in frames if _foreign(frame)]
        last = error.__traceback__
        while last is not None and last.tb_next is not None:
            last = last.tb_next
        raised = last is not None and _foreign(last.tb_frame) and _raises(last.tb_frame, last.tb_lasti)
        deliberate = raised and error.__context__ is None
        raise ThirdPartyError(f"{type(error).__name__}: {words}", tuple(n for _frame, n in own), deliberate) from error


def _foreign(frame: FrameType) -> bool:
    """Whether a frame runs code of the third party: not ours, nor a framework's."""
    package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
    return package not in FRAMEWORKS and Path(frame.f_code.co_filename).suffix == ".py"


def _raises(frame: FrameType, at: int) -> bool:
    """Whether the instruction that the frame stopped at is a ``raise`` (an ``assert`` ends with one)."""
    return any(one.offset == at and one.opname == "RAISE_VARARGS" for one in dis.get_instructions(frame.f_code))


def largest(low: int, high: int, works: Callable[[int], bool]) -> int:
    """The largest of ``low`` to ``high`` that works, by bisection; ``low`` is known to work."""
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if works(middle) else (low, middle - 1)
    return low
