"""The battery of probes: which programs describe a broken backend. Each plan gives the steps for a config."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

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


@dataclass(frozen=True)
class ProbePlan:
    """One probe.

    name: unique; the probe's streams follow from it. words: what the program does. needs: abilities and other things
    that claims must allow. windowed: whether it needs a window.
    """

    name: str
    words: str
    steps: Steps
    needs: tuple[str, ...] = ()
    profiles: tuple[str, ...] = ("attention", "decoder", "hidden")
    windowed: bool = False


def grown(
    *sizes: int, seq: str = "a", rows: int = 1, seed: int = 0, distribution: str = "normal"
) -> tuple[Append, ...]:
    return tuple(Append(seq, (size,) * rows, seed, distribution=distribution) for size in sizes)


def _plain(name: str, words: str, *sizes: int, rows: int = 1) -> ProbePlan:
    return ProbePlan(name, words, lambda c, k, s: grown(*sizes, rows=rows, seed=s))


def _around(name: str, words: str, sizes: Callable[[int], tuple[int, ...]]) -> ProbePlan:
    """Sizes of appends that depend on the window."""
    return ProbePlan(name, words, lambda c, k, s: grown(*sizes(c.window or 0), seed=s), windowed=True)


def _ragged(*counts: tuple[int, ...], side: str | None = None) -> Steps:
    def steps(c: Config, k: Claims, s: int) -> Sequence[Step]:
        return tuple(
            Append("a", rows, s, pad=(side, s + OTHER) if side and len(set(rows)) > 1 else None) for rows in counts
        )

    return steps


def _reordered(rows: int, *orders: tuple[int, ...]) -> Steps:
    """After each reorder, rows grow by a decode step and a chunk."""

    def steps(c: Config, k: Claims, s: int) -> Sequence[Step]:
        made: list[Step] = list(grown(4, 1, rows=rows, seed=s))
        for number, order in enumerate(orders):
            made += [Reorder("a", order), *grown(1, 2, rows=len(order), seed=s + OTHER + 10 * number)]
        return made

    return steps


def _truncated(first: tuple[int, ...], to: int, then: tuple[int, ...]) -> Steps:
    return lambda c, k, s: (*grown(*first, seed=s), Truncate("a", to), *grown(*then, seed=s + OTHER))


def _reset(first: tuple[int, ...], then: tuple[int, ...]) -> Steps:
    return lambda c, k, s: (*grown(*first, seed=s), Reset("a"), *grown(*then, seed=s + OTHER))


def _after_another(c: Config, k: Claims, s: int) -> Sequence[Step]:
    return (*grown(6, 1, seed=s), Close("a"), *grown(3, 1, 1, seq="b", seed=s + OTHER))


def _interleaved(c: Config, k: Claims, s: int) -> Sequence[Step]:
    def a(n: int) -> tuple[Append, ...]:
        return grown(n, seed=s)

    def b(n: int) -> tuple[Append, ...]:
        return grown(n, seq="b", seed=s + OTHER)

    return (*a(4), *b(3), *a(1), *b(1), *a(2), *b(1), *b(2), *a(1))


def _fork(c: Config, k: Claims, s: int) -> Sequence[Step]:
    f = grown(2, 1, seq="f", seed=s + OTHER)
    return (*grown(5, seed=s), Fork("a", "f"), *grown(1, seed=s), *f, *grown(1, 2, seed=s))


def _fork_closed(c: Config, k: Claims, s: int) -> Sequence[Step]:
    f = grown(1, 1, seq="f", seed=s + OTHER)
    return (*grown(4, 3, seed=s), Fork("a", "f"), *f, Close("f"), *grown(1, 3, seed=s))


def _fork_page(c: Config, k: Claims, s: int) -> Sequence[Step]:
    p = k.page or 1
    f = grown(1, p, seq="f", seed=s + OTHER)
    return (*grown(p + 1, seed=s), Fork("a", "f"), *f, *grown(1, p, seed=s), Close("f"), *grown(1, seed=s))


def _aliased(c: Config, k: Claims, s: int) -> Sequence[Step]:
    return (
        *grown(5, 1, seed=s),
        AliasHandle("a", "k"),
        *grown(2, seed=s),
        *grown(1, 1, seq="k", seed=s + OTHER),
        *grown(1, seed=s),
    )


def _to_capacity(c: Config, k: Claims, s: int) -> Sequence[Step]:
    if c.capacity >= LONG:
        return ()
    return grown(*at_once(c.capacity - 2, k), 1, 1, seed=s)


def _filled(c: Config, k: Claims, s: int) -> Sequence[Step]:
    if c.capacity >= LONG:
        return ()
    return grown(1, *at_once(c.capacity - 1, k), seed=s)


def _overflow(c: Config, k: Claims, s: int) -> Sequence[Step]:
    if c.capacity >= LONG or (k.max_chunk or 2) < 2:
        return ()
    steps = grown(*at_once(c.capacity - 1, k), seed=s)
    return (*steps, Reject(Append("a", (2,), s + OTHER)), *grown(1, seed=s), Reject(Append("a", (1,), s + OTHER)))


def _refused(c: Config, k: Claims, s: int) -> Sequence[Step]:
    steps: list[Step] = list(grown(3, rows=2, seed=s))
    for refused in refusals(c, k, "a", (3, 3), s + OTHER):
        if not (isinstance(refused.step, Append) and not refused.wrong):
            steps.append(refused)
    return (*steps, *grown(1, 2, rows=2, seed=s)) if len(steps) > 1 else ()


def _laid(layout: str, rows: int) -> Steps:
    def steps(c: Config, k: Claims, s: int) -> Sequence[Step]:
        made, length = [], 0
        for size in (4, 1, 3):
            own = tuple((row, at, s) for row in range(1, rows) for at in range(length, length + size))
            made.append(Append("a", (size,) * rows, s, own, layout=layout))
            length += size
        return made

    return steps


def _masked(*steps: tuple[int, tuple[int, ...]], rows: int = 1) -> Steps:
    """Appends with a caller's mask: size, and the positions of the last row that it masks."""
    return lambda c, k, s: tuple(
        Append("a", (size,) * rows, s, masked=tuple((rows - 1, position) for position in positions))
        for size, positions in steps
    )


def _poisoned(*keys_and_values: tuple[str, str]) -> Steps:
    def steps(c: Config, k: Claims, s: int) -> Sequence[Step]:
        made: list[Step] = list(grown(3, seed=s))
        for keys, values in keys_and_values:
            made += [Poison("a", keys, values), *grown(1, 2, seed=s)]
        return made

    return steps


def _in_place(flags: tuple[bool, ...]) -> Steps:
    sizes = (4, 1, 3, 1, 1, 2)
    return lambda c, k, s: tuple(Append("a", (size,), s, in_place=on) for size, on in zip(sizes, flags, strict=True))


def _contents(c: Config, k: Claims, s: int) -> Sequence[Step]:
    made: list[Step] = []
    for step in grown(4, 1, 3, 1, rows=min(k.max_batch or 2, 2), seed=s):
        made += [step, ReadCache("a")]
    return made


def _uncached(c: Config, k: Claims, s: int) -> Sequence[Step]:
    return (
        UncachedForward("x", (7,), s),
        *grown(4, seed=s),
        UncachedForward("y", (9,), s + OTHER),
        *grown(1, 2, seed=s),
        UncachedForward("z", (6,), s),
        UncachedForward("w", (2,), s),
    )


def _shapes(c: Config, k: Claims, s: int) -> Sequence[Step]:
    two = min(k.max_batch or 2, 2)
    return (
        *grown(3, 1, seed=s),
        Close("a"),
        *grown(5, 1, seq="b", rows=two, seed=s + OTHER),
        Close("b"),
        *grown(2, 2, 1, seq="c", seed=s + 2 * OTHER - 100),
    )


def _pages(c: Config, k: Claims, s: int) -> Sequence[Step]:
    p = k.page or 1
    return grown(*(size for size in (p - 1, 1, 1, p, p - 1, 1) if size), seed=s)


def _ragged_reordered(c: Config, k: Claims, s: int) -> Sequence[Step]:
    return (
        Append("a", (3, 5, 2), s),
        Reorder("a", (1, 2, 0)),
        *grown(1, 2, rows=3, seed=s + OTHER),
        Reorder("a", (2, 0)),
        *grown(1, rows=2, seed=s + OTHER + 10),
    )


def _last(c: Config, k: Claims, s: int) -> Sequence[Step]:
    whole = (UncachedForward("x", (5,), s + OTHER, last_only=True),) if k.can("uncached_forward") else ()
    return (*_last_only(4, 3, seed=s), *grown(1, seed=s), *whole, *_last_only(3, 1, seed=s), *grown(2, seed=s))


def _last_only(*sizes: int, rows: int = 1, seed: int = 0) -> tuple[Append, ...]:
    """Appends that return the last position only."""
    return tuple(replace(step, last_only=True) for step in grown(*sizes, rows=rows, seed=seed))


def _distributed(name: str) -> Steps:
    return lambda c, k, s: grown(4, 1, 3, 1, seed=s, distribution=name)


ATTENTION = ("attention",)
BATTERY: tuple[ProbePlan, ...] = (
    _plain("prefill", "a prompt", 7),
    _plain("decode", "decode steps from token 0 on", 1, 1, 1, 1, 1),
    _plain("prompt-decode", "a prompt, then decode steps", 5, 1, 1, 1),
    _plain("chunk", "a prompt, then a chunk", 4, 3, 1),
    _plain("chunks", "chunks of several sizes", 2, 3, 1, 4, 2),
    _plain("long-decode", "decode steps on 9 cached tokens", 9, 1, 1, 1, 1),
    _plain("long", "a prompt of 17 tokens, then decode steps and a chunk", 17, 1, 5, 1),
    _plain("many", "12 decode steps", *(1,) * 12),
    _plain("rows", "two rows", 5, 1, 3, 1, rows=2),
    _plain("rows-decode", "three rows, starting with a decode step", 1, 1, 3, 1, rows=3),
    _plain("rows-long", "three rows with 9 cached tokens", 9, 3, 1, 1, rows=3),
    ProbePlan(
        "prompt-chunk-decode",
        "a prompt, a chunk and decode steps",
        lambda c, k, s: grown(max(4, (c.window or 0) - 1), 3, 1, 1, 1, seed=s),
    ),
    ProbePlan("after-another", "a sequence after another was closed", _after_another),
    ProbePlan("interleaved", "two sequences that alternate", _interleaved, ("two sequences",)),
    ProbePlan("shapes", "sequences of different shapes, one after another", _shapes),
    ProbePlan("reset", "a reset, then other tokens", _reset((6, 1), (3, 1, 1)), ("reset",)),
    ProbePlan("reset-long", "a reset of a longer sequence", _reset((12, 1), (1, 1, 3)), ("reset",)),
    ProbePlan(
        "reset-rows",
        "a reset of two rows",
        lambda c, k, s: (*grown(4, rows=2, seed=s), Reset("a"), *grown(2, 1, rows=2, seed=s + OTHER)),
        ("reset",),
    ),
    ProbePlan("truncate", "a truncation, then other tokens", _truncated((6,), 4, (1, 1, 2)), ("truncate",)),
    ProbePlan("truncate-to-zero", "a truncation to 0 tokens", _truncated((5,), 0, (3, 1)), ("truncate",)),
    ProbePlan("truncate-to-all", "a truncation to the current length", _truncated((5,), 5, (1, 2)), ("truncate",)),
    ProbePlan("truncate-long", "a truncation of a longer sequence", _truncated((9, 2), 3, (4, 1, 1)), ("truncate",)),
    ProbePlan("fork", "a fork, both sides of which grow", _fork, ("fork", "two sequences")),
    ProbePlan("fork-closed", "a fork whose copy grows and is closed", _fork_closed, ("fork", "two sequences")),
    ProbePlan("alias", "an older handle that grows beside the newer one", _aliased, ("immutable", "two sequences")),
    ProbePlan("reorder", "two rows that are swapped", _reordered(2, (1, 0)), ("reorder",)),
    ProbePlan("reorder-cycle", "three rows that are permuted in a cycle", _reordered(3, (1, 2, 0)), ("reorder",)),
    ProbePlan("reorder-repeats", "a reorder that repeats rows", _reordered(3, (2, 2, 0), (1, 1, 0)), ("reorder",)),
    ProbePlan("reorder-sizes", "reorders that repeat and drop rows", _reordered(2, (0, 0, 1, 1), (3,)), ("reorder",)),
    ProbePlan(
        "ragged", "rows that grow by different counts", _ragged((3, 5, 2), (1, 1, 1), (3, 1, 1), (1, 1, 1)), ("ragged",)
    ),
    ProbePlan(
        "ragged-idle", "rows that pause", _ragged((3, 5, 2), (0, 2, 0), (1, 1, 1), (2, 0, 1), (1, 1, 1)), ("ragged",)
    ),
    ProbePlan(
        "staggered",
        "rows that start one after another",
        _ragged((4, 0, 0), (1, 3, 0), (1, 1, 2), (1, 1, 1)),
        ("ragged",),
    ),
    ProbePlan(
        "left-padding",
        "rows padded on the left",
        _ragged((3, 5, 2), (1, 1, 1), (1, 3, 1), (1, 1, 1), side="left"),
        ("left padding",),
    ),
    ProbePlan("to-capacity", "decode steps up to the capacity", _to_capacity),
    ProbePlan("filled", "a chunk that fills the capacity", _filled),
    ProbePlan("overflow", "appends beyond the capacity", _overflow, ("overflow refused",)),
    ProbePlan("refused", "malformed calls", _refused),
    _around("window-steps", "decode steps across the window", lambda w: (max(w - 2, 1), 1, 1, 1, 1, 1)),
    _around("window-prompt", "a prompt longer than the window", lambda w: (w + 1, 1, 1)),
    _around("window-twice", "decode steps across two windows", lambda w: (max(2 * w - 1, 1), 1, 1, 1)),
    _around("window-chunk", "a chunk larger than the window", lambda w: (2, 2 * w + 1, 1, 1)),
    _around("window-full", "chunks after the window is full", lambda w: (w, 2, w, 1)),
    ProbePlan(
        "window-truncate",
        "a truncation after the window was full",
        lambda c, k, s: (
            *grown(2 * (c.window or 0), seed=s),
            Truncate("a", (c.window or 0) + 1),
            *grown(1, 2, 1, seed=s + OTHER),
        ),
        ("truncate",),
        windowed=True,
    ),
    *(
        ProbePlan(name.replace("_", "-"), words, _distributed(name), profiles=ATTENTION)
        for name, words in (
            ("large_queries", "large scores"),
            ("zero_keys", "keys that are zero"),
            ("small_keys_large_values", "large values, small keys"),
        )
    ),
    ProbePlan("mask", "a caller's mask", _masked((4, (1,)), (1, (1,)), (3, (2, 4)), (1, (0, 7))), ("mask",)),
    ProbePlan("mask-rows", "a caller's mask of one row", _masked((3, (0,)), (3, (1, 4)), (1, (2,)), rows=2), ("mask",)),
    *(
        ProbePlan(f"layout-{name}", f"{name} inputs", _laid(name, 2 if name == "expanded" else 1), profiles=ATTENTION)
        for name in ("transposed", "sliced", "expanded")
    ),
    ProbePlan("in-place", "a present that shares the memory of the past", _in_place((True,) * 6), ("in_place",)),
    ProbePlan(
        "in-place-alternating",
        "a present in shared and separate memory by turns",
        _in_place((False, True, True, False, True, False)),
        ("in_place",),
    ),
    ProbePlan(
        "junk", "unused slots that hold random numbers", _poisoned(("junk", "junk"), ("junk", "none")), ("poison",)
    ),
    ProbePlan(
        "nan",
        "unused slots that hold NaN",
        _poisoned(("nan", "none"), ("none", "nan")),
        ("poison", "poison-safe slots"),
    ),
    ProbePlan("contents", "reads of the cache", _contents, ("contents",), profiles=ATTENTION),
    ProbePlan(
        "uncached-forward", "the uncached forward, also while a sequence is open", _uncached, ("uncached_forward",)
    ),
    ProbePlan("pages", "lengths around the page size", _pages, ("pages",)),
    ProbePlan("page-fork", "a fork in the middle of a page", _fork_page, ("pages", "fork", "two sequences")),
    ProbePlan(
        "ragged-reorder", "rows of different lengths that are reordered", _ragged_reordered, ("ragged", "reorder")
    ),
    ProbePlan(
        "generation",
        "greedy generation",
        lambda c, k, s: (
            Generate("g", (4,), s, new=5),
            Generate("g", (1,), s + OTHER, new=3),
            Generate("g", (7,), s, new=2),
        ),
        ("generate",),
        ("decoder",),
    ),
    ProbePlan(
        "generation-rows",
        "greedy generation of several rows",
        lambda c, k, s: (Generate("g", (5, 5), s, new=3), Generate("g", (2, 2, 2), s + OTHER, new=4)),
        ("generate", "two rows"),
        ("decoder",),
    ),
    ProbePlan("last", "calls that return the last position only", _last, ("last_only",), ("decoder",)),
    ProbePlan(
        "last-rows",
        "steps of two rows that return the last position only",
        lambda c, k, s: (*_last_only(5, 3, rows=2, seed=s), *grown(1, 2, rows=2, seed=s)),
        ("last_only", "two rows"),
        ("decoder",),
    ),
)
