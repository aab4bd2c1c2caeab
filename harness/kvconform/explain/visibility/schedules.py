"""Schedules: the ways in which a few tokens are run, to measure what their outputs depend on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from kvconform_specs.claims import Claims
from kvconform_specs.config import Config
from kvconform_specs.program import Append, Close, Program, Step, UncachedForward
from kvconform_specs.tensors import Streams

TOKENS, MOST_TOKENS, PAST_WINDOW = 8, 24, 3
"""Tokens of a schedule: by default, at most, and beyond a window so that eviction shows."""
ROW_TOKENS, ROWS = 5, 2
SEQUENCE_TOKENS, NAMES = 3, "abc"
"""Tokens of each of two rows, and of each of the sequences of these names."""
OTHER, TRIES = 1_000_003, 32
"""How far the stream of a changed token is from the token's own, and how many streams are tried for another token."""


@dataclass(frozen=True)
class Schedule:
    """``sizes`` are the appends of each of ``rows`` rows or sequences; tokens are counted row by row."""

    name: str
    sizes: tuple[int, ...]
    rows: int = 1

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return sum(self.sizes)

    def program(
        self, config: Config, claims: Claims, seed: int, changed: int | None = None, aimed: int | None = None
    ) -> Program:
        """The schedule on streams ``seed + row``. changed: the token that is replaced. aimed: a token; each query
        points at the key at its position in its own row (attention profile)."""
        row, position = divmod(-1 if changed is None else changed, self.length)
        swap = () if changed is None else (row, position, other(config, seed + row, position))
        aim = None if aimed is None else (seed, aimed % self.length)
        if self.name == "full":
            return Program(config, (UncachedForward("a", self.sizes, seed, (swap,) if swap else ()),))
        if self.name != "sequences":
            return Program(config, tuple(self._appends("a", self.rows, seed, swap, aim)))
        parts = []
        for number, name in enumerate(NAMES):
            own = (0, *swap[1:]) if swap and row == number else ()
            there = None if aim is None else (seed + number, aim[1])
            parts.append(list(self._appends(name, 1, seed + number, own, there)))
        one, two, three = parts
        if claims.can("two sequences"):
            together = [step for both in zip(one, two, strict=True) for step in both]
            return Program(config, (*together, Close(NAMES[0]), *three))
        return Program(config, (*one, Close(NAMES[0]), *two, Close(NAMES[1]), *three))

    def _appends(
        self, seq: str, rows: int, seed: int, swap: tuple[int, ...], aim: tuple[int, int] | None
    ) -> Iterator[Step]:
        """``swap``: row, position and stream of the replaced token; empty: none is."""
        length = 0
        for size in self.sizes:
            here = bool(swap) and length <= swap[1] < length + size
            yield Append(seq, (size,) * rows, seed, ((swap[0], swap[1], swap[2]),) if here else (), aim)
            length += size


def schedules(config: Config, claims: Claims, least: int = 0) -> Iterator[Schedule]:
    """The schedules within a backend's claims, sequences last. ``least``: the tokens that a failure needs."""
    n = max(TOKENS, least, 0 if config.window is None else config.window + PAST_WINDOW)
    n = min(n, MOST_TOKENS, config.capacity)
    longest = claims.longest(n)
    if claims.can("uncached_forward"):
        yield Schedule("full", (n,))
    if claims.interface == "generation":
        return
    if longest > 1:
        yield Schedule("prefill", (longest,))
        yield Schedule("chunked", _cut((3, 2, 1), n, claims))
    yield Schedule("decode", (1,) * n)
    if claims.can("two rows"):
        yield Schedule("rows", _cut((2, 1), min(ROW_TOKENS, n), claims), ROWS)
    yield Schedule("sequences", _cut((2, 1), min(SEQUENCE_TOKENS, n), claims), len(NAMES))


def _cut(first: tuple[int, ...], n: int, claims: Claims) -> tuple[int, ...]:
    """``n`` tokens in these sizes and a rest, none longer than the claims allow."""
    sizes: list[int] = []
    for size in (*first, *(n,) * n):
        sizes.append(claims.longest(min(size, n - sum(sizes))))
    return tuple(size for size in sizes if size)


def other(config: Config, seed: int, position: int) -> int:
    """A stream with another token there; with a small vocabulary, the next stream may have the same token."""
    streams = Streams(config, position + 1, (0,))
    candidates = [seed + OTHER * further for further in range(1, TRIES)]
    mine = streams.tape(seed)[:, position]
    others = (one for one in candidates if not np.array_equal(streams.tape(one)[:, position], mine))
    return next(others, candidates[0])
