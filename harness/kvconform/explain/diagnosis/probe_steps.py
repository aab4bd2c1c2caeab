"""The steps of probes: functions of a config, claims and the probe's first stream."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from kvconform_specs.any_history import refusals
from kvconform_specs.claims import Claims
from kvconform_specs.config import Config
from kvconform_specs.configs import LONG
from kvconform_specs.program import (
    AliasHandle,
    Append,
    Close,
    Fork,
    Generate,
    Poison,
    ReadCache,
    Reject,
    Reorder,
    Reset,
    Step,
    Truncate,
    UncachedForward,
)
from kvconform_specs.strategies import at_once

OTHER = 500
"""Distance of the streams that must differ from a probe's first ones."""
Steps = Callable[[Config, Claims, int], Sequence[Step]]
"""Takes a config, claims and the probe's first stream; no steps where the config has no such program."""


def grown(
    *sizes: int, seq: str = "a", rows: int = 1, seed: int = 0, distribution: str = "normal", context: int = 0
) -> tuple[Append, ...]:
    return tuple(Append(seq, (size,) * rows, seed, distribution=distribution, context=context) for size in sizes)


def ragged(*counts: tuple[int, ...], side: str | None = None) -> Steps:
    def steps(c: Config, k: Claims, s: int) -> Sequence[Step]:
        return tuple(
            Append("a", rows, s, pad=(side, s + OTHER) if side and len(set(rows)) > 1 else None) for rows in counts
        )

    return steps


def reordered(rows: int, *orders: tuple[int, ...]) -> Steps:
    """After each reorder, rows grow by a decode step and a chunk."""

    def steps(c: Config, k: Claims, s: int) -> Sequence[Step]:
        made: list[Step] = list(grown(4, 1, rows=rows, seed=s))
        for number, order in enumerate(orders):
            made += [Reorder("a", order), *grown(1, 2, rows=len(order), seed=s + OTHER + 10 * number)]
        return made

    return steps


def truncated(first: tuple[int, ...], to: int, then: tuple[int, ...]) -> Steps:
    return lambda c, k, s: (*grown(*first, seed=s), Truncate("a", to), *grown(*then, seed=s + OTHER))


def reset(first: tuple[int, ...], then: tuple[int, ...]) -> Steps:
    return lambda c, k, s: (*grown(*first, seed=s), Reset("a"), *grown(*then, seed=s + OTHER))


def after_another(c: Config, k: Claims, s: int) -> Sequence[Step]:
    return (*grown(6, 1, seed=s), Close("a"), *grown(3, 1, 1, seq="b", seed=s + OTHER))


def interleaved(c: Config, k: Claims, s: int) -> Sequence[Step]:
    def a(n: int) -> tuple[Append, ...]:
        return grown(n, seed=s)

    def b(n: int) -> tuple[Append, ...]:
        return grown(n, seq="b", seed=s + OTHER)

    return (*a(4), *b(3), *a(1), *b(1), *a(2), *b(1), *b(2), *a(1))


def fork(c: Config, k: Claims, s: int) -> Sequence[Step]:
    f = grown(2, 1, seq="f", seed=s + OTHER)
    return (*grown(5, seed=s), Fork("a", "f"), *grown(1, seed=s), *f, *grown(1, 2, seed=s))


def fork_closed(c: Config, k: Claims, s: int) -> Sequence[Step]:
    f = grown(1, 1, seq="f", seed=s + OTHER)
    return (*grown(4, 3, seed=s), Fork("a", "f"), *f, Close("f"), *grown(1, 3, seed=s))


def fork_page(c: Config, k: Claims, s: int) -> Sequence[Step]:
    p = k.page or 1
    f = grown(1, p, seq="f", seed=s + OTHER)
    return (*grown(p + 1, seed=s), Fork("a", "f"), *f, *grown(1, p, seed=s), Close("f"), *grown(1, seed=s))


def aliased(c: Config, k: Claims, s: int) -> Sequence[Step]:
    return (
        *grown(5, 1, seed=s),
        AliasHandle("a", "k"),
        *grown(2, seed=s),
        *grown(1, 1, seq="k", seed=s + OTHER),
        *grown(1, seed=s),
    )


def to_capacity(c: Config, k: Claims, s: int) -> Sequence[Step]:
    if c.capacity >= LONG:
        return ()
    return grown(*at_once(c.capacity - 2, k), 1, 1, seed=s)


def filled(c: Config, k: Claims, s: int) -> Sequence[Step]:
    if c.capacity >= LONG:
        return ()
    return grown(1, *at_once(c.capacity - 1, k), seed=s)


def overflow(c: Config, k: Claims, s: int) -> Sequence[Step]:
    if c.capacity >= LONG or (k.max_chunk or 2) < 2:
        return ()
    steps = grown(*at_once(c.capacity - 1, k), seed=s)
    return (*steps, Reject(Append("a", (2,), s + OTHER)), *grown(1, seed=s), Reject(Append("a", (1,), s + OTHER)))


def refused(c: Config, k: Claims, s: int) -> Sequence[Step]:
    steps: list[Step] = list(grown(3, rows=2, seed=s))
    for refused in refusals(c, k, "a", (3, 3), s + OTHER):
        if not (isinstance(refused.step, Append) and not refused.wrong):
            steps.append(refused)
    return (*steps, *grown(1, 2, rows=2, seed=s)) if len(steps) > 1 else ()


def laid(layout: str, rows: int) -> Steps:
    def steps(c: Config, k: Claims, s: int) -> Sequence[Step]:
        made, length = [], 0
        for size in (4, 1, 3):
            own = tuple((row, at, s) for row in range(1, rows) for at in range(length, length + size))
            made.append(Append("a", (size,) * rows, s, own, layout=layout))
            length += size
        return made

    return steps


def masked(*steps: tuple[int, tuple[int, ...]], rows: int = 1) -> Steps:
    """Appends with a caller's mask: size, and the positions of the last row that it masks."""
    return lambda c, k, s: tuple(
        Append("a", (size,) * rows, s, masked=tuple((rows - 1, position) for position in positions))
        for size, positions in steps
    )


def poisoned(*keys_and_values: tuple[str, str]) -> Steps:
    def steps(c: Config, k: Claims, s: int) -> Sequence[Step]:
        made: list[Step] = list(grown(3, seed=s))
        for keys, values in keys_and_values:
            made += [Poison("a", keys, values), *grown(1, 2, seed=s)]
        return made

    return steps


def in_place(flags: tuple[bool, ...]) -> Steps:
    sizes = (4, 1, 3, 1, 1, 2)
    return lambda c, k, s: tuple(Append("a", (size,), s, in_place=on) for size, on in zip(sizes, flags, strict=True))


def contents(c: Config, k: Claims, s: int) -> Sequence[Step]:
    made: list[Step] = []
    for step in grown(4, 1, 3, 1, rows=min(k.max_batch or 2, 2), seed=s):
        made += [step, ReadCache("a")]
    return made


def uncached(c: Config, k: Claims, s: int) -> Sequence[Step]:
    return (
        UncachedForward("x", (7,), s),
        *grown(4, seed=s),
        UncachedForward("y", (9,), s + OTHER),
        *grown(1, 2, seed=s),
        UncachedForward("z", (6,), s),
        UncachedForward("w", (2,), s),
    )


def shapes(c: Config, k: Claims, s: int) -> Sequence[Step]:
    two = min(k.max_batch or 2, 2)
    return (
        *grown(3, 1, seed=s),
        Close("a"),
        *grown(5, 1, seq="b", rows=two, seed=s + OTHER),
        Close("b"),
        *grown(2, 2, 1, seq="c", seed=s + 2 * OTHER - 100),
    )


def pages(c: Config, k: Claims, s: int) -> Sequence[Step]:
    p = k.page or 1
    return grown(*(size for size in (p - 1, 1, 1, p, p - 1, 1) if size), seed=s)


def ragged_reordered(c: Config, k: Claims, s: int) -> Sequence[Step]:
    return (
        Append("a", (3, 5, 2), s),
        Reorder("a", (1, 2, 0)),
        *grown(1, 2, rows=3, seed=s + OTHER),
        Reorder("a", (2, 0)),
        *grown(1, rows=2, seed=s + OTHER + 10),
    )


def last(c: Config, k: Claims, s: int) -> Sequence[Step]:
    whole = (UncachedForward("x", (5,), s + OTHER, last_only=True),) if k.can("uncached_forward") else ()
    return (*last_only(4, 3, seed=s), *grown(1, seed=s), *whole, *last_only(3, 1, seed=s), *grown(2, seed=s))


def last_only(*sizes: int, rows: int = 1, seed: int = 0) -> tuple[Append, ...]:
    """Appends that return the last position only."""
    return tuple(replace(step, last_only=True) for step in grown(*sizes, rows=rows, seed=seed))


def distributed(name: str) -> Steps:
    return lambda c, k, s: grown(4, 1, 3, 1, seed=s, distribution=name)


def closed_context(c: Config, k: Claims, s: int) -> Sequence[Step]:
    """The same tokens in another context after they were closed, and again in the first."""
    once, again = grown(5, 1, seed=s), grown(5, 1, 1, seq="b", seed=s, context=1)
    return (*once, Close("a"), *again, Close("b"), *grown(5, 1, 1, seq="c", seed=s))


def reset_context(c: Config, k: Claims, s: int) -> Sequence[Step]:
    return (*grown(4, 1, seed=s, context=1), Reset("a"), *grown(4, 1, 2, seed=s), Reset("a"), *grown(4, 1, seed=s))


def contexts_in_turn(same: bool) -> Steps:
    """Two sequences that alternate, each in a context of its own, on the same tokens or on others."""

    def steps(c: Config, k: Claims, s: int) -> Sequence[Step]:
        a = grown(4, 1, 2, 1, seed=s)
        b = grown(4, 1, 2, 1, seq="b", seed=s if same else s + OTHER, context=1)
        return tuple(step for pair in zip(a, b, strict=True) for step in pair)

    return steps


def uncached_in_context(c: Config, k: Claims, s: int) -> Sequence[Step]:
    def other(name: str, number: int) -> UncachedForward:
        return UncachedForward(name, (4,), s + OTHER + 10 * number, context=1)

    return (*grown(4, seed=s), other("x", 0), *grown(1, 2, seed=s), other("y", 1), *grown(1, 1, seed=s))


def generated_in_contexts(c: Config, k: Claims, s: int) -> Sequence[Step]:
    return tuple(Generate("g", (4,), s, new=4, context=context) for context in (1, 0, 1, 0))
