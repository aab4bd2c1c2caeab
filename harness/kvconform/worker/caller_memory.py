"""The caller's memory: the inputs of a step, as views of one piece of memory with guard bands, compared afterwards.

Inputs are tiny: all of it is compared, bit for bit, on every step of every program.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvconform_specs.tensors import laid

Array = NDArray[Any]
Where = Literal["inside", "before", "behind", "between"]

GUARD = 512
"""Bytes of the bands before, between and behind the arrays: more than any array's number, less than a page."""
ALIGNED = 64
"""Every array begins at a multiple of so many bytes from the start of the memory: it is aligned as a fresh array is."""
FILLED = 0xFF
"""What the bytes of bands hold, and of arrays after their use: NaN as a float, -1 as an integer, no bool."""


@dataclass(frozen=True)
class Overwritten:
    """The first number of an array, or of the memory around it, that is no longer what it was.

    where: ``inside`` the array at ``index``; ``before`` its first or ``behind`` its last number, by ``distance``
    numbers of its size; or ``between`` its numbers, in the gaps of a view. was, now: that number, where it is inside.
    later: it was still there when the step had returned.
    """

    array: str
    where: Where
    index: tuple[int, ...] = ()
    distance: int = 0
    was: float = 0.0
    now: float = 0.0
    later: bool = False


class _Placed(NamedTuple):
    name: str
    view: Array
    start: int
    stop: int


class CallerMemory:
    """Memory for the arrays of one step at a time."""

    def __init__(self, size: int) -> None:
        """``size``: in bytes, as ``room`` says."""
        self._memory = np.empty(size, np.uint8)
        self._placed: list[_Placed] = []
        self._before = b""

    def hand_over(self, arrays: Iterable[tuple[str, Array, str]]) -> list[Array]:
        """Views that hold these arrays, given by name, numbers and layout, between guard bands."""
        self._memory.fill(FILLED)
        placed: list[_Placed] = []
        start = stop = GUARD

        def new(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
            nonlocal stop
            stop = start + prod(shape) * dtype.itemsize
            return np.ndarray(shape, dtype, self._memory, start)

        for name, x, layout in arrays:
            placed.append(_Placed(name, laid(x, layout, new), start, stop))
            start = -(-(stop + GUARD) // ALIGNED) * ALIGNED
        self._placed, self._before = placed, self._memory.tobytes()
        return [one.view for one in placed]

    def overwritten(self) -> Overwritten | None:
        """What has changed since the arrays were handed over."""
        if self._memory.tobytes() == self._before:
            return None
        at = int(np.argmax(self._memory != np.frombuffer(self._before, np.uint8)))
        inside = next((placed for placed in self._placed if placed.start <= at < placed.stop), None)
        if inside is not None:
            return self._inside(inside)
        ends = [(at - placed.stop, "behind", placed) for placed in self._placed if placed.stop <= at]
        starts = [(placed.start - at - 1, "before", placed) for placed in self._placed if at < placed.start]
        distance, where, placed = min((*ends, *starts), key=lambda near: near[0])
        numbers = distance // placed.view.itemsize + 1
        return Overwritten(placed.name, "behind" if where == "behind" else "before", distance=numbers)

    def _inside(self, placed: _Placed) -> Overwritten:
        view = placed.view
        offset = view.__array_interface__["data"][0] - self._memory.__array_interface__["data"][0]
        before: Array = np.ndarray(view.shape, view.dtype, self._before, offset, view.strides)
        return changed(placed.name, before, view) or Overwritten(placed.name, "between")

    def overwrite(self) -> None:
        """The caller uses its memory for something else."""
        self._memory.fill(FILLED)


def room(arrays: Iterable[tuple[str, Array, str]]) -> int:
    """Bytes of memory that hold these arrays with their bands, in any layout."""
    sizes = [x.nbytes * (1 if layout == "contiguous" else 3) for _name, x, layout in arrays]  # sliced: 2 n + 1 for n
    return sum(sizes) + (len(sizes) + 1) * (GUARD + ALIGNED)


def changed(name: str, before: Array, now: Array) -> Overwritten | None:
    """The first number of an array that differs in a bit from what it was; None where all are the same."""
    if before.shape != now.shape or before.dtype != now.dtype:
        return Overwritten(name, "inside")
    bits = [np.frombuffer(x.tobytes(), np.uint8).reshape(-1, x.itemsize) for x in (before, now)]
    differs = (bits[0] != bits[1]).any(axis=1)
    if not differs.any():
        return None
    index = tuple(int(i) for i in np.unravel_index(int(differs.argmax()), before.shape))
    return Overwritten(name, "inside", index, was=float(before[index]), now=float(now[index]))
