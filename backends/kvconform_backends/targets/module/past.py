"""Inspects pasts of any structure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from kvconform_backends.targets.module.calls import leaves


def contents(past: Any) -> list[tuple[tuple[int, ...], bytes]]:
    """The shapes and bytes of its arrays, to detect changes in place."""
    arrays = [x.detach().cpu().float().numpy() if isinstance(x, Tensor) else x for x in leaves(past)]
    return [(x.shape, x.tobytes()) for x in arrays]


def sizes(value: Any, at: str = "past", deep: int = 5) -> Iterator[tuple[str, tuple[int, ...] | int]]:
    """The arrays and numbers in a past: their expressions, with shapes and values."""
    if isinstance(value, int) and not isinstance(value, bool):
        yield at, value
    elif isinstance(value, Tensor | np.ndarray):
        yield at, tuple(value.shape)
    elif deep and isinstance(value, Mapping):
        for key, item in value.items():
            yield from sizes(item, f"{at}[{key!r}]", deep - 1)
    elif deep and isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from sizes(item, f"{at}[{index}]", deep - 1)
    elif deep and hasattr(value, "__dict__"):
        for name, item in vars(value).items():
            yield from sizes(item, f"{at}.{name}", deep - 1)


def grown_axis(before: object, after: object) -> int | None:
    """The axis that grew by one, if no other axis changed."""
    if not isinstance(before, tuple) or not isinstance(after, tuple) or len(after) != len(before):
        return None
    grown = [axis for axis, (old, new) in enumerate(zip(before, after, strict=True)) if old != new]
    return grown[0] if len(grown) == 1 and after[grown[0]] == before[grown[0]] + 1 else None


def grows_by_one(before: Mapping[str, object], after: Mapping[str, object]) -> bool:
    """Whether no array changed its shape, or an axis of one grew by one."""
    changed = [at for at, size in before.items() if isinstance(size, tuple) and after.get(at) != size]
    return not changed or any(grown_axis(before[at], after.get(at)) is not None for at in changed)


def frozen(past: Any) -> bool:
    """Whether its items cannot be replaced."""
    return isinstance(past, Tensor) or (type(past) is tuple and all(map(frozen, past)))


def described(past: Any) -> str:
    if isinstance(past, Tensor | np.ndarray):
        return "one array"
    if isinstance(past, list | tuple):
        kind = type(past).__name__
        arrays = [hasattr(item, "shape") for item in past]
        if len(past) == 2 and all(arrays):
            return "one (key, value) pair"
        pairs = [isinstance(item, list | tuple) and len(item) == 2 for item in past]
        if past and all(pairs):
            return f"a {kind} of {len(past)} (key, value) pair" + "s" * (len(past) > 1)
        return f"a {kind} of {len(past)}"
    if isinstance(past, dict):
        return f"a dict of {', '.join(map(repr, list(past)[:4]))}"
    return f"an object of class {type(past).__name__}"
