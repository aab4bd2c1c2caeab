"""Hypothesis strategies for structure: shapes, steps and one seed, never tensor elements.

They build legal programs within a backend's claims and leave out what the claims leave out. Lists are drawn and then
cut to the capacity, so that they shrink well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import accumulate, pairwise

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from kvconform_specs.claims import Claims
from kvconform_specs.config import Config
from kvconform_specs.program import (
    Append,
    Close,
    Fork,
    Program,
    Reject,
    Reorder,
    Reset,
    Step,
    Truncate,
)  # fmt: skip

LONGEST_CHUNK = 9
LARGEST_BATCH = 3

seeds = st.integers(0, 2**31 - 1)


def batches(claims: Claims) -> SearchStrategy[int]:
    return st.integers(1, min(claims.max_batch or LARGEST_BATCH, LARGEST_BATCH))


def counts(claims: Claims, longest: int = LONGEST_CHUNK) -> SearchStrategy[int]:
    return st.integers(1, min(claims.max_chunk or longest, longest))


def splits(config: Config, claims: Claims, least: int = 1, most: int = 5) -> SearchStrategy[tuple[int, ...]]:
    """Sizes of successive appends, cut where they would exceed the capacity."""
    lists = st.lists(counts(claims), min_size=least, max_size=most)
    return lists.map(lambda drawn: fitted(drawn, config.capacity))


def fitted(sizes: Iterable[int], total: int) -> tuple[int, ...]:
    """The sizes in order, the last one cut, so that they sum to ``total`` at most."""
    ends = [min(end, total) for end in accumulate(sizes)]
    return tuple(b - a for a, b in pairwise((0, *ends)) if b > a)


def resplit(total: int, claims: Claims) -> SearchStrategy[tuple[int, ...]]:
    """Another way of cutting the same number of tokens."""
    longest = min(claims.max_chunk or LONGEST_CHUNK, LONGEST_CHUNK)
    return st.lists(counts(claims), max_size=6).map(
        lambda drawn: (*fitted(drawn, total), *pieces(total - sum(fitted(drawn, total)), longest))
    )


def pieces(total: int, longest: int) -> tuple[int, ...]:
    """``total`` in as few steps as the longest chunk allows."""
    return tuple(min(longest, total - done) for done in range(0, total, longest))


def at_once(total: int, claims: Claims) -> tuple[int, ...]:
    return pieces(total, claims.max_chunk or max(total, 1))


def appends(
    seq: str, sizes: Iterable[int], batch: int, seed: int, aim: tuple[int, int] | None = None
) -> tuple[Append, ...]:
    return tuple(Append(seq, (size,) * batch, seed, aim=aim) for size in sizes)


def swapped(program: Program, seq: str, row: int, position: int, seed: int) -> Program:
    """The program with one token changed: that of ``row`` at ``position`` of sequence ``seq``."""
    steps: list[Step] = []
    length = 0
    for step in program.steps:
        if isinstance(step, Append) and step.seq == seq:
            if length <= position < length + step.counts[row]:
                step = Append(seq, step.counts, step.seed, (*step.swap, (row, position, seed)), step.aim)
            length += step.counts[row]
        steps.append(step)
    return Program(program.config, tuple(steps))


@st.composite
def straight(draw: Callable[..., int], config: Config, claims: Claims, least: int = 1, most: int = 5) -> Program:
    """One sequence that only grows."""
    sizes: tuple[int, ...] = draw(splits(config, claims, least, most))  # type: ignore[assignment]
    return Program(config, appends("a", sizes, draw(batches(claims)), draw(seeds)))


@st.composite
def histories(draw: Callable[..., list[tuple[int, int, int]]], config: Config, claims: Claims) -> Program:
    """Any legal program over up to three live sequences, from what the backend claims to do.

    Drawn as a list of raw triples that a model of the lengths turns into legal steps; a triple that finds nothing
    legal to do is dropped.
    """
    drawn = draw(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 2), st.integers(0, 63)), min_size=1, max_size=9))
    first: int = draw(seeds)  # type: ignore[assignment]
    return Program(config, tuple(_Interpreter(config, claims, first).steps(drawn)))


class _Interpreter:
    """Turns raw triples ``(kind, sequence, number)`` into legal steps."""

    def __init__(self, config: Config, claims: Claims, seed: int) -> None:
        self.config, self.claims, self.seed = config, claims, seed
        self.rows: dict[str, tuple[int, ...]] = {}

    def steps(self, drawn: Iterable[tuple[int, int, int]]) -> Iterable[Step]:
        made = [step for kind, which, number in drawn if (step := self.step(kind, "abc"[which], number)) is not None]
        return made or [self.append("a", 0)]

    def step(self, kind: int, seq: str, number: int) -> Step | None:
        """Kinds 0-4 append; 5-9 truncate, fork, reorder, reset, close, or append where that is not claimed."""
        if seq not in self.rows and len(self.rows) >= (self.claims.max_sequences or 3):
            seq = next(iter(self.rows))
        rows = self.rows.get(seq)
        verb = ("truncate", "fork", "reorder", "reset", "close")[kind - 5] if kind >= 5 else "append"
        if rows is None or verb == "append" or (verb != "close" and not self.claims.can(verb)):
            return self.append(seq, number) if rows is None or max(rows) < self.config.capacity else None
        if verb == "truncate":
            length = number % (min(rows) + 1)
            self.rows[seq] = (length,) * len(rows)
            return Truncate(seq, length)
        if verb == "fork":
            free = [name for name in "abc" if name not in self.rows]
            if not free or len(self.rows) >= (self.claims.max_sequences or 3):
                return None
            self.rows[free[0]] = rows
            return Fork(seq, free[0])
        if verb == "reorder":
            picked = tuple((number // 4**i) % len(rows) for i in range(len(rows)))
            self.rows[seq] = tuple(rows[row] for row in picked)
            return Reorder(seq, picked)
        if verb == "reset":
            self.rows[seq] = (0,) * len(rows)
            return Reset(seq)
        del self.rows[seq]
        return Close(seq)

    def append(self, seq: str, number: int) -> Append:
        claims = self.claims
        largest = min(claims.max_batch or LARGEST_BATCH, LARGEST_BATCH)
        rows = self.rows.get(seq) or (0,) * (1 + number // 16 % largest)
        longest = min(claims.max_chunk or LONGEST_CHUNK, LONGEST_CHUNK, self.config.capacity - max(rows))
        grown = [1 + number % longest] * len(rows)
        if claims.can("ragged") and number >= 32:
            grown = [1 + (number // (row + 1)) % longest for row in range(len(rows))]
        self.rows[seq] = tuple(a + b for a, b in zip(rows, grown, strict=True))
        self.seed += 17  # another stream for each step: what was truncated does not come back by itself
        return Append(seq, tuple(grown), self.seed)


@st.composite
def detours(
    draw: Callable[..., int], config: Config, claims: Claims, sizes: tuple[int, ...], batch: int, seed: int
) -> tuple[Step, ...]:
    """Steps that leave sequence ``a`` with the same history as plain appends of ``sizes``, on a winding path."""
    steps: list[Step] = []
    length = 0
    ways = [way for way in ("truncate", "fork", "reorder", "reset") if claims.can(way)]
    if (claims.max_sequences or 2) < 2 and "fork" in ways:
        ways.remove("fork")
    if claims.overflow == "refused":
        ways.append("refuse")
    for size in sizes:
        junk: int = draw(counts(claims, 3))
        way: str = draw(st.sampled_from(["on", *ways]))  # type: ignore[assignment]
        other = seed ^ 0x5A5A
        room = length + junk <= config.capacity
        if way == "truncate" and room and length:
            steps += [Append("a", (junk,) * batch, other), Truncate("a", length)]
        elif way == "fork" and room and length:
            # what is appended to the original must not reach its copy; then the copy takes the original's name
            steps += [Fork("a", "f"), Append("a", (junk,) * batch, other), Close("a"), Fork("f", "a"), Close("f")]
        elif way == "reorder" and batch > 1 and length:
            turn = tuple((row + 1) % batch for row in range(batch))
            back = tuple((row - 1) % batch for row in range(batch))
            steps += [Reorder("a", turn), Reorder("a", back)]
        elif way == "reset" and room and not length:
            steps += [Append("a", (junk,) * batch, other), Reset("a")]
        elif way == "refuse" and length and claims.max_chunk is None:
            steps.append(Reject(Append("a", (config.capacity - length + 1,) * batch, other)))
        steps.append(Append("a", (size,) * batch, seed))
        length += size
    return tuple(steps)
