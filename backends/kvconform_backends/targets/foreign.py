"""Code of others, while a target is opened: it may raise anything, and here is the one place that expects it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from kvconform.errors import BackendUnavailable

LONGEST = 300
"""Characters of a message that are told."""


class Raised(Exception):
    """What code of others raised, in one line."""


@contextmanager
def foreign() -> Iterator[None]:
    """Raises Raised for whatever is raised inside, except BackendUnavailable, which is an error of ours."""
    try:
        yield
    except BackendUnavailable:
        raise
    except Exception as error:
        raise Raised(f"{type(error).__name__}: {' '.join(str(error).split())[:LONGEST] or 'no message'}") from error
