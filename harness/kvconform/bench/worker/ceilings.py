"""The machine's ceilings for one decode step: how fast the same bytes are read, and the same products computed.

They are timed in the rounds of the case that they belong to, at its working-set size: a bandwidth measured at another
size is that of another level of the caches. Only numpy is needed here.

Which way of reading is the fastest depends on the size and on the machine, so that three are tried when a ceiling is
built. All are float32 products: a plain sum is limited by its additions as soon as the numbers lie in a cache. The
buffer is one allocation because a large one lies on huge pages where the system has them: small ones are slower.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvconform.bench.costs import cost
from kvconform_specs.config import Config

Array = NDArray[np.float32]
Pairs = list[tuple[Array, Array]]

PIECE = 1 << 20
"""Floats that one call reads at most, as many as a large matrix of weights has."""
COLUMNS = 4096
"""Of the matrices of the matrix-vector products."""
SIDE = 256
"""Of the square matrices that are multiplied: three of them lie in 768 KiB, a core's second-level cache."""
TRIALS = 5
"""Passes of each way of reading when a ceiling is built."""


def floats(bytes_min: int) -> int:
    """The number of float32 that ``read`` reads for so many bytes, rounded up to an even one."""
    return -(-max(bytes_min, 1) // 8) * 2


def products(flops: int) -> int:
    """The number of products of ``SIDE``-square matrices, ``2 SIDE^3`` FLOPs each, in ``multiply``, rounded up."""
    return max(1, -(-flops // (2 * SIDE**3)))


def excess(phase: str, bytes_min: int, flops: int) -> float:
    """The work of a call over the work that was needed, because of the rounding: at least 1."""
    return 4 * floats(bytes_min) / bytes_min if phase == "read" else products(flops) * 2 * SIDE**3 / flops


class Ceiling:
    """Random numbers, never zeros. ``way``: the way of reading that was the fastest here."""

    def __init__(self, bytes_min: int, flops: int) -> None:
        random = np.random.default_rng(0)
        whole = random.random(floats(bytes_min), dtype=np.float32)
        pieces = [whole[start : start + PIECE] for start in range(0, len(whole), PIECE)]
        ways = {name: way(pieces) for name, way in WAYS.items()}
        self.way = fastest({name: _reader(pairs) for name, pairs in ways.items()})
        left, right = (random.random((SIDE, SIDE), dtype=np.float32) for _ in range(2))
        self._calls = {"read": _reader(ways[self.way]), "multiply": _multiplier(left, right, products(flops))}

    @classmethod
    def of(cls, config: Config, depth: int, batch: int) -> Ceiling:
        """That of one decode step of ``batch`` rows at a depth."""
        return cls(*cost(config, "decode", depth, batch))

    def prepare(self, phase: str) -> None:
        """Outside the timed region: an untimed pass, as the untimed step before a block of decode steps."""
        self._calls[phase]()

    def call(self, phase: str) -> None:
        """Inside the timed region: ``read`` reads everything once, ``multiply`` computes all products."""
        self._calls[phase]()


def fastest(ways: dict[str, Callable[[], None]]) -> str:
    """The way whose median of ``TRIALS`` passes is the least; they are tried in turn, after one pass that warms up."""
    taken: dict[str, list[int]] = {name: [] for name in ways}
    for _ in range(TRIALS + 1):
        for name, call in ways.items():
            began = time.perf_counter_ns()
            call()
            taken[name].append(time.perf_counter_ns() - began)
    return min(taken, key=lambda name: median(taken[name][1:]))


def halves(pieces: list[Array]) -> Pairs:
    """Two streams of memory at once."""
    return [(piece[: len(piece) // 2], piece[len(piece) // 2 :]) for piece in pieces]


def itself(pieces: list[Array]) -> Pairs:
    """One stream of memory, which is both operands."""
    return [(piece, piece) for piece in pieces]


def rows(pieces: list[Array]) -> Pairs:
    """Matrices by one vector, which stays in the cache; a rest shorter than a row is multiplied with itself."""
    vector = np.linspace(-1, 1, COLUMNS, dtype=np.float32)
    pairs: Pairs = []
    for piece in pieces:
        full = len(piece) // COLUMNS * COLUMNS
        matrix, rest = piece[:full].reshape(-1, COLUMNS), piece[full:]
        pairs += [(matrix, vector)] if len(matrix) else []
        pairs += [(rest, rest)] if len(rest) else []
    return pairs


WAYS: dict[str, Callable[[list[Array]], Pairs]] = {
    "dot of halves": halves,
    "dot with itself": itself,
    "matrix-vector": rows,
}
"""Pairs of operands whose products read every number of the pieces once."""


def _reader(pairs: Pairs) -> Callable[[], None]:
    def read() -> None:
        for left, right in pairs:
            left @ right

    return read


def _multiplier(left: Array, right: Array, count: int) -> Callable[[], None]:
    result: NDArray[Any] = np.empty_like(left)

    def multiply() -> None:
        for _ in range(count):
            np.matmul(left, right, out=result)

    return multiply
