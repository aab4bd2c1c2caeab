"""Hypothesis strategies for structure: shapes, steps and one seed, never tensor elements.

They build legal programs within a backend's claims, and use only what is claimed. Lists are drawn and then cut to the
capacity, so that they shrink well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any, TypeVar
from unittest.mock import patch

from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from hypothesis import seed as hypothesis_seed
from hypothesis import strategies as st
from hypothesis.internal.conjecture import providers
from hypothesis.strategies import SearchStrategy

from kvconform_specs.claims import Claims, edges
from kvconform_specs.clause import Case
from kvconform_specs.config import Config
from kvconform_specs.program import Append, Close, Fork, Program, Reject, Reorder, Reset, Step, Truncate

LONGEST_CHUNK = 9
LARGEST_BATCH = 3

Draw = Callable[..., Any]
"""The first argument of a composite strategy."""

T = TypeVar("T")
seeds = st.integers(0, 2**31 - 1)


def explore(
    strategy: SearchStrategy[T], trial: Callable[[T], None], examples: int, seed: int = 0, *, shrink: bool = False
) -> None:
    """Calls ``trial`` with up to ``examples`` values that Hypothesis draws with that seed, the simplest first.

    A trial fails by raising; the failure is shrunk if ``shrink``, and raised. This is the one place that runs
    Hypothesis, and the values depend on nothing but the strategy, the seed and Hypothesis' version.
    """

    @hypothesis_seed(seed)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        print_blob=False,
        suppress_health_check=list(HealthCheck),
        verbosity=Verbosity.quiet,
        report_multiple_bugs=False,
        phases=(Phase.generate, Phase.shrink) if shrink else (Phase.generate,),
    )
    @given(strategy)
    def run(value: T) -> None:
        trial(value)

    with _no_local_constants():
        run()


@contextmanager
def _no_local_constants() -> Iterator[None]:
    """Hypothesis 6.150 and newer mix literals of the loaded modules that are not installed into the integers that they
    draw: one seed would give other programs in a checkout than from a wheel, and beside other modules of the user."""
    internal: Any = providers
    name = "_get_local_constants"
    if not hasattr(internal, name):
        yield
        return
    none = internal.Constants()
    with patch.object(internal, name, lambda: none):
        internal.CONSTANTS_CACHE.cache.clear()  # what was cached holds such literals
        try:
            yield
        finally:
            internal.CONSTANTS_CACHE.cache.clear()


def drawn(strategy: SearchStrategy[T], number: int, seed: int = 0) -> list[T]:
    """The first values that Hypothesis draws from a strategy with that seed, ``number`` at most. The first is the
    simplest."""
    values: list[T] = []
    explore(strategy, values.append, number, seed)
    return values


def batches(claims: Claims) -> SearchStrategy[int]:
    return st.integers(1, min(claims.max_batch or LARGEST_BATCH, LARGEST_BATCH))


def counts(claims: Claims, longest: int = LONGEST_CHUNK) -> SearchStrategy[int]:
    """Numbers of new tokens; every other one is 1, a decode step."""
    longest = min(claims.max_chunk or longest, longest)
    return st.integers(-longest // 2, longest).map(lambda drawn: max(drawn, 1))


def splits(
    config: Config, claims: Claims, least: int = 1, most: int = 5, capacity: int | None = None
) -> SearchStrategy[tuple[int, ...]]:
    """Sizes of successive appends within the capacity; some end exactly at one of the ``edges``."""
    total = config.capacity if capacity is None else min(max(capacity, 1), config.capacity)
    lists = st.lists(counts(claims), min_size=least, max_size=most)
    ends = st.sampled_from((0, 0, *(edge for edge in edges(config, claims) if edge <= total)))
    return st.tuples(lists, ends).map(lambda drawn: fitted(landing(drawn[0], drawn[1], claims), total))


def steadily(config: Config, claims: Claims) -> SearchStrategy[tuple[int, ...]]:
    """Small appends up to the capacity: what a cache keeps is then far less than what it was given, if it evicts."""
    longest = min(claims.max_chunk or 3, 3)
    return st.integers(1, longest).map(lambda size: pieces(config.capacity, size))


def landing(sizes: list[int], end: int, claims: Claims) -> tuple[int, ...]:
    """The sizes, cut so that a decode step ends at ``end``; a prompt comes first if they are too few. 0: unchanged."""
    grown = (*at_once(max(end - sum(sizes), 0), claims), *sizes)
    stops = sorted({*accumulate(grown), end - 1, end} - {-1, 0})
    return tuple(b - a for a, b in pairwise((0, *stops)))


def fitted(sizes: Iterable[int], total: int) -> tuple[int, ...]:
    """The sizes in order, the last one cut, so that they sum to ``total`` at most."""
    ends = [min(end, total) for end in accumulate(sizes)]
    return tuple(b - a for a, b in pairwise((0, *ends)) if b > a)


def resplit(total: int, claims: Claims) -> SearchStrategy[tuple[int, ...]]:
    """Another way of splitting the same number of tokens."""
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
    seq: str, sizes: Iterable[int], batch: int, seed: int, needle: tuple[int, int] | None = None
) -> tuple[Append, ...]:
    return tuple(Append(seq, (size,) * batch, seed, needle=needle) for size in sizes)


def swapped(program: Program, seq: str, row: int, position: int, seed: int) -> Program:
    """The program with one token changed: that of ``row`` at ``position`` of sequence ``seq``."""
    steps: list[Step] = []
    length = 0
    for step in program.steps:
        if isinstance(step, Append) and step.seq == seq:
            if length <= position < length + step.counts[row]:
                step = replace(step, substitutions=(*step.substitutions, (row, position, seed)))
            length += step.counts[row]
        steps.append(step)
    return Program(program.config, tuple(steps))


@st.composite
def straight(draw: Draw, config: Config, claims: Claims, least: int = 1, most: int = 5) -> Program:
    """One sequence that only grows."""
    sizes: tuple[int, ...] = draw(splits(config, claims, least, most))
    return Program(config, appends("a", sizes, draw(batches(claims)), draw(seeds)))


def growing(config: Config, claims: Claims) -> SearchStrategy[Case]:
    return straight(config, claims).map(lambda program: Case((program,)))


def alone(program: Program, row: int) -> Program:
    """The program of one row of a program's appends."""
    steps = []
    for step in program.steps:
        assert isinstance(step, Append)
        swap = tuple((0, position, seed) for of, position, seed in step.substitutions if of == row)
        counts, nan = step.counts[row : row + 1], (0,) * (row in step.nan)
        steps.append(replace(step, counts=counts, nan=nan, seed=step.seed + row, substitutions=swap))
    return Program(program.config, tuple(step for step in steps if step.counts != (0,)))


def arranged(seq: str, sizes: Iterable[int], order: tuple[int, ...], seed: int) -> tuple[Append, ...]:
    """Appends whose row ``i`` reads the stream of row ``order[i]``: rows permuted, or all equal."""
    steps, length = [], 0
    for size in sizes:
        own = tuple(
            (row, at, seed + of) for row, of in enumerate(order) if row != of for at in range(length, length + size)
        )
        steps.append(Append(seq, (size,) * len(order), seed, own))
        length += size
    return tuple(steps)


@st.composite
def uneven(draw: Draw, config: Config, claims: Claims, side: str = "") -> tuple[Append, ...]:
    """Ragged appends to three rows or two; after the first, row 0 of three is neither the longest nor the shortest.

    side: that of the columns without a token; empty: right if it is claimed, else left.
    """
    side = side or ("right" if "right" in claims.padding else "left")
    once = claims.ragged_appends == "first"  # then no prompt is empty, and all rows continue alike
    batch, seed = min(claims.max_batch or 3, 3), draw(seeds)
    longest = min(claims.max_chunk or LONGEST_CHUNK, LONGEST_CHUNK)
    low = draw(st.integers(int(once), max(longest - 2, int(once))))
    middle = draw(st.integers(low + 1, max(longest - 1, low + 1)))
    high = draw(st.integers(middle + 1, max(longest, middle + 1)))
    counts: list[tuple[int, ...]] = [(middle, high, low)[:batch]]
    for _ in range(draw(st.integers(1, 4))):
        kind, size = draw(st.integers(0, 2)), draw(st.integers(1, longest))
        row = draw(st.integers(0, batch - 1))
        others = size if once else int(kind != 1)
        counts.append(
            (1,) * batch if kind == 0 else tuple(size if r == (row, 0)[kind - 1] else others for r in range(batch))
        )
    steps, lengths = [], (0,) * batch
    for number, grown in enumerate(counts):
        grown = tuple(min(c, config.capacity - n, longest) for c, n in zip(grown, lengths, strict=True))
        grown = (min(grown),) * batch if once and number else grown
        if max(grown) > 0:
            lengths = tuple(n + c for n, c in zip(lengths, grown, strict=True))
            pad = (side, seed + 31 + number) if len(set(grown)) > 1 else None
            steps.append(Append("a", grown, seed, pad=pad))
    return tuple(steps)


@st.composite
def detours(
    draw: Draw, config: Config, claims: Claims, sizes: tuple[int, ...], batch: int, seed: int
) -> tuple[Step, ...]:
    """Steps that leave sequence ``a`` with the same tokens as plain appends of ``sizes``, by detours."""
    steps: list[Step] = []
    length = mark = 0  # mark: the largest length so far, but for what a reset has forgotten
    ways = [way for way in ("truncate", "fork", "reorder", "reorder", "reset") if claims.can(way)]
    if (claims.max_sequences or 2) < 2 and "fork" in ways:
        ways.remove("fork")
    if "fork" in ways:
        ways.append("branch")
    if claims.overflow == "refused":
        ways.append("refuse")
    sure = draw(st.integers(0, len(sizes) - 1))  # before this append there is a detour, if any is claimed
    for number, size in enumerate(sizes):
        junk: int = draw(counts(claims, 3))
        way: str = draw(st.sampled_from(["on", *ways] if number != sure or not ways else ways))
        other = seed ^ 0x5A5A
        room = length + junk <= config.capacity
        if way == "truncate" and room and claims.keeps(max(mark, length + junk)) <= length:
            steps += [Append("a", (junk,) * batch, other), Truncate("a", length)]
            mark = max(mark, length + junk)
        elif way == "fork" and room and length:
            # what is appended to the original must not reach its copy; then the copy takes the original's name
            steps += [Fork("a", "f"), Append("a", (junk,) * batch, other), Close("a"), Fork("f", "a"), Close("f")]
        elif way == "branch" and room and length:
            # what is appended to the copy must not reach the original
            steps += [Fork("a", "f"), Append("a", (size,) * batch, seed)]
            steps += [Append("f", (junk,) * batch, other), Close("f")]
            length += size
            continue
        elif way == "reorder" and batch > 1 and length:
            turn = tuple((row + 1) % batch for row in range(batch))
            back = tuple((row - 1) % batch for row in range(batch))
            own = tuple((row, at, seed + turn[row]) for row in range(batch) for at in range(length, length + size))
            steps += [Reorder("a", turn), Append("a", (size,) * batch, seed, own), Reorder("a", back)]
            length += size
            continue
        elif way == "reset" and room:  # its tokens are appended again
            steps += [Append("a", (junk,) * batch, other), Reset("a")]
            steps += appends("a", at_once(length, claims), batch, seed)
        elif way == "refuse" and length and config.capacity - length < (claims.max_chunk or config.capacity):
            steps.append(Reject(Append("a", (config.capacity - length + 1,) * batch, other)))
        steps.append(Append("a", (size,) * batch, seed))
        length += size
    return tuple(steps)
