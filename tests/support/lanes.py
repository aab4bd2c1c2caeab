"""The fast lane: ``pytest -m "not slow"``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def slow_except(items: Iterable[Any], every: int) -> list[Any]:
    """Parameters of a test of which each ``every``-th, from the first on, is in the fast lane."""
    return [
        pytest.param(
            *(item if isinstance(item, tuple) and not hasattr(item, "_fields") else (item,)),
            marks=() if number % every == 0 else pytest.mark.slow,
        )
        for number, item in enumerate(items)
    ]
