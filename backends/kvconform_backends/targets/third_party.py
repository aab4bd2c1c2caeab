"""Running third-party code while a target is opened. It may raise anything; this is the only place that expects it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kvconform.errors import BackendUnavailable

MAX_MESSAGE = 300
"""Characters kept of a message."""


class ThirdPartyError(Exception):
    """An exception of third-party code, as one line."""


@contextmanager
def guarded() -> Iterator[None]:
    """Turns every exception except BackendUnavailable into ThirdPartyError."""
    try:
        yield
    except BackendUnavailable:
        raise
    except Exception as error:
        words = " ".join(str(error).split())[:MAX_MESSAGE] or "no message"
        raise ThirdPartyError(f"{type(error).__name__}: {words}") from error


def largest(low: int, high: int, works: Callable[[int], bool]) -> int:
    """The largest of ``low`` to ``high`` that works, by bisection; ``low`` is known to work."""
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if works(middle) else (low, middle - 1)
    return low
