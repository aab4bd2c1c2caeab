"""The probes: a fixed battery of short programs that a broken backend is asked to run, so that it can be described.

They are the same for every backend, as far as its claims and its config allow: what a probe shows on one config can be
compared with what it shows on another. Each has streams of its own, so that what one leaves behind is foreign to the
next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from kvconform_specs.claims import Claims
from kvconform_specs.config import Config
from kvconform_specs.configs import LONG
from kvconform_specs.errors import SpecError
from kvconform_specs.program import (
    AliasHandle,
    Append,
    Close,
    Fork,
    Generate,
    Poison,
    Program,
    ReadCache,
    Reject,
    Reorder,
    Reset,
    Step,
    Truncate,
    UncachedForward,
    called,
)
from kvconform_specs.strategies import at_once, refusals, swapped

SEEN = "sees"
"""The name of the probe whose tokens are changed one by one."""
GENERATIONS = ("generation", "generation-rows")
"""The names of the probes in which the backend generates."""
SPREAD = 1000
"""The streams of one probe are those from its number times so many on."""
OTHER = 500
"""So far from a probe's first stream lie those of tokens that must differ from its first ones."""


@dataclass(frozen=True)
class Probe:
    """One program of the battery, and what it tries, in words."""

    name: str
    words: str
    program: Program


@dataclass(frozen=True)
class _Plan:
    """``steps`` gives the program's steps for a config and the probe's first stream; it may exceed the capacity, and
    is left out there."""

    name: str
    words: str
    steps: Callable[[Config, Claims, int], Sequence[Step]]
    needs: tuple[str, ...] = ()
    profiles: tuple[str, ...] = ("attention", "decoder", "hidden")
    windowed: bool = False


def probes(config: Config, claims: Claims) -> tuple[Probe, ...]:
    """Those of the battery that the config has room for and the claims allow, in its order."""
    return tuple(_probes(config, claims))


def _probes(config: Config, claims: Claims) -> Iterator[Probe]:
    for number, plan in enumerate(BATTERY):
        if config.profile not in plan.profiles or (plan.windowed and config.window is None):
            continue
        if not all(claims.can(need) for need in plan.needs):
            continue
        steps = tuple(plan.steps(config, claims, number * SPREAD))
        if not steps or not _claimed(steps, claims):
            continue
        try:
            program = Program(config, steps)
        except SpecError:  # it exceeds the capacity
            continue
        yield Probe(plan.name, plan.words, program)


def changes(probe: Probe) -> tuple[tuple[int, Program], ...]:
    """The probe's program with one token of row 0 changed, and the token's position: each position in turn."""
    length = sum(step.counts[0] for step in probe.program.steps if isinstance(step, Append))
    few = sorted({*range(min(length, 5)), length // 2, *range(max(length - 6, 0), length)})
    seed = next(step.seed for step in probe.program.steps if isinstance(step, Append)) + OTHER
    return tuple((position, swapped(probe.program, "a", 0, position, seed + position)) for position in few)


def _claimed(steps: Sequence[Step], claims: Claims) -> bool:
    """Whether batch, chunk, and live sequences stay within the claims."""
    live: set[str] = set()
    for step in map(called, steps):
        if isinstance(step, Append | UncachedForward):
            if len(step.counts) > (claims.max_batch or len(step.counts)):
                return False
            if isinstance(step, Append) and max(step.counts) > (claims.max_chunk or max(step.counts)):
                return False
        if isinstance(step, Append):
            live.add(step.seq)
        elif isinstance(step, Fork | AliasHandle):
            live.add(step.into)
        elif isinstance(step, Reorder) and len(step.rows) > (claims.max_batch or len(step.rows)):
            return False
        elif isinstance(step, Close):
            live.discard(step.seq)
        if len(live) > (claims.max_sequences or len(live)):
            return False
    return True


# --- how a battery is written ---
def grown(
    *sizes: int, seq: str = "a", rows: int = 1, seed: int = 0, distribution: str = "normal"
) -> tuple[Append, ...]:
    return tuple(Append(seq, (size,) * rows, seed, distribution=distribution) for size in sizes)


def _plain(name: str, words: str, *sizes: int, rows: int = 1) -> _Plan:
    return _Plan(name, words, lambda c, k, s: grown(*sizes, rows=rows, seed=s))


def _around(name: str, words: str, sizes: Callable[[int], tuple[int, ...]]) -> _Plan:
    """Sizes of appends that depend on the window."""
    return _Plan(name, words, lambda c, k, s: grown(*sizes(c.window or 0), seed=s), windowed=True)


def _ragged(*counts: tuple[int, ...], side: str | None = None) -> Callable[[Config, Claims, int], Sequence[Step]]:
    def steps(c: Config, k: Claims, s: int) -> Sequence[Step]:
        return tuple(
            Append("a", rows, s, pad=(side, s + OTHER) if side and len(set(rows)) > 1 else None) for rows in counts
        )

    return steps


def _reordered(rows: int, *orders: tuple[int, ...]) -> Callable[[Config, Claims, int], Sequence[Step]]:
    """After each reorder, rows grow by a decode step and a chunk."""

    def steps(c: Config, k: Claims, s: int) -> Sequence[Step]:
        made: list[Step] = list(grown(4, 1, rows=rows, seed=s))
        for number, order in enumerate(orders):
            made += [Reorder("a", order), *grown(1, 2, rows=len(order), seed=s + OTHER + 10 * number)]
        return made

    return steps


def _truncated(first: tuple[int, ...], to: int, then: tuple[int, ...]) -> Callable[..., Sequence[Step]]:
    return lambda c, k, s: (*grown(*first, seed=s), Truncate("a", to), *grown(*then, seed=s + OTHER))


def _reset(first: tuple[int, ...], then: tuple[int, ...]) -> Callable[..., Sequence[Step]]:
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


def _kept(c: Config, k: Claims, s: int) -> Sequence[Step]:
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


def _laid(layout: str, rows: int) -> Callable[[Config, Claims, int], Sequence[Step]]:
    def steps(c: Config, k: Claims, s: int) -> Sequence[Step]:
        made, length = [], 0
        for size in (4, 1, 3):
            own = tuple((row, at, s) for row in range(1, rows) for at in range(length, length + size))
            made.append(Append("a", (size,) * rows, s, own, layout=layout))
            length += size
        return made

    return steps


def _hidden(*steps: tuple[int, tuple[int, ...]], rows: int = 1) -> Callable[[Config, Claims, int], Sequence[Step]]:
    """Appends with a caller's mask: size, and the positions that it hides of the last row."""
    return lambda c, k, s: tuple(
        Append("a", (size,) * rows, s, masked=tuple((rows - 1, position) for position in positions))
        for size, positions in steps
    )


def _manner(distribution: str) -> Callable[[Config, Claims, int], Sequence[Step]]:
    return lambda c, k, s: grown(4, 1, 3, 1, seed=s, distribution=distribution)


def _some_mute(c: Config, k: Claims, s: int) -> Sequence[Step]:
    return (*grown(2, seed=s, distribution="zero_keys"), *grown(3, 1, seed=s), *grown(1, 1, seed=s + OTHER))


def _poisoned(*keys_and_values: tuple[str, str]) -> Callable[[Config, Claims, int], Sequence[Step]]:
    def steps(c: Config, k: Claims, s: int) -> Sequence[Step]:
        made: list[Step] = list(grown(3, seed=s))
        for keys, values in keys_and_values:
            made += [Poison("a", keys, values), *grown(1, 2, seed=s)]
        return made

    return steps


def _shared(shared: tuple[bool, ...]) -> Callable[[Config, Claims, int], Sequence[Step]]:
    sizes = (4, 1, 3, 1, 1, 2)
    return lambda c, k, s: tuple(Append("a", (size,), s, in_place=on) for size, on in zip(sizes, shared, strict=True))


def _read(c: Config, k: Claims, s: int) -> Sequence[Step]:
    made: list[Step] = []
    for step in grown(4, 1, 3, 1, rows=min(k.max_batch or 2, 2), seed=s):
        made += [step, ReadCache("a")]
    return made


def _whole(c: Config, k: Claims, s: int) -> Sequence[Step]:
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


def _square(c: Config, k: Claims, s: int) -> Sequence[Step]:
    """Counts that equal the number of heads, of KV heads, and of rows."""
    return (*grown(c.heads, 1, c.kv_heads, seed=s), Close("a"), *grown(2, 1, 2, rows=2, seq="b", seed=s + OTHER))


def _pages(c: Config, k: Claims, s: int) -> Sequence[Step]:
    p = k.page or 1
    return grown(*(size for size in (p - 1, 1, 1, p, p - 1, 1) if size), seed=s)


def _page_truncated(c: Config, k: Claims, s: int) -> Sequence[Step]:
    p = k.page or 1
    return (
        *grown(2 * p + 1, seed=s),
        Truncate("a", p),
        *grown(1, p, seed=s + OTHER),
        Truncate("a", p + 1),
        *grown(1, 1, seed=s + OTHER + 50),
    )


def _ragged_reordered(c: Config, k: Claims, s: int) -> Sequence[Step]:
    return (
        Append("a", (3, 5, 2), s),
        Reorder("a", (1, 2, 0)),
        *grown(1, 2, rows=3, seed=s + OTHER),
        Reorder("a", (2, 0)),
        *grown(1, rows=2, seed=s + OTHER + 10),
    )


def _ragged_read(c: Config, k: Claims, s: int) -> Sequence[Step]:
    return (Append("a", (3, 5, 2), s), ReadCache("a"), Append("a", (2, 0, 1), s), ReadCache("a"))


def _generations(c: Config, k: Claims, s: int) -> Sequence[Step]:
    return (Generate("g", (4,), s, new=5), Generate("g", (1,), s + OTHER, new=3), Generate("g", (7,), s, new=2))


def _generations_of_rows(c: Config, k: Claims, s: int) -> Sequence[Step]:
    return (Generate("g", (5, 5), s, new=3), Generate("g", (2, 2, 2), s + OTHER, new=4))


def _last(c: Config, k: Claims, s: int) -> Sequence[Step]:
    whole = (UncachedForward("x", (5,), s + OTHER, last_only=True),) if k.can("uncached_forward") else ()
    return (*_alone(4, 3, seed=s), *grown(1, seed=s), *whole, *_alone(3, 1, seed=s), *grown(2, seed=s))


def _last_of_rows(c: Config, k: Claims, s: int) -> Sequence[Step]:
    return (*_alone(5, 3, rows=2, seed=s), *grown(1, 2, rows=2, seed=s))


def _alone(*sizes: int, rows: int = 1, seed: int = 0) -> tuple[Append, ...]:
    """Appends that are asked for their last position alone."""
    return tuple(replace(step, last_only=True) for step in grown(*sizes, rows=rows, seed=seed))


ATTENTION = ("attention",)
BATTERY: tuple[_Plan, ...] = (
    _plain("prefill", "a prompt", 7),
    _plain("decode", "decode steps from the first token on", 1, 1, 1, 1, 1),
    _plain("prompt-decode", "a prompt, then decode steps", 5, 1, 1, 1),
    _plain("chunk", "a prompt and on it a chunk", 4, 3, 1),
    _plain("chunks", "chunks of several sizes", 2, 3, 1, 4, 2),
    _plain("long-decode", "decode steps on a longer past", 9, 1, 1, 1, 1),
    _plain("long", "a longer prompt, then all sizes", 17, 1, 5, 1),
    _plain("many", "many tokens one by one", *(1,) * 12),
    _plain("rows", "two rows", 5, 1, 3, 1, rows=2),
    _plain("rows-decode", "three rows that begin with a decode step", 1, 1, 3, 1, rows=3),
    _plain("rows-long", "three rows with a longer past", 9, 3, 1, 1, rows=3),
    _Plan(
        SEEN,
        "a prompt, a chunk and decode steps, one token changed at a time",
        lambda c, k, s: grown(max(4, (c.window or 0) - 1), 3, 1, 1, 1, seed=s),
    ),
    _Plan("after-another", "a sequence after another one has ended", _after_another),
    _Plan("interleaved", "two sequences in turns", _interleaved, ("two sequences",)),
    _Plan("shapes", "sequences of other shapes one after another", _shapes),
    _Plan("square", "counts that equal heads, KV heads, rows", _square),
    _Plan("reset", "a reset, then other tokens", _reset((6, 1), (3, 1, 1)), ("reset",)),
    _Plan("reset-long", "a reset of a longer sequence", _reset((12, 1), (1, 1, 3)), ("reset",)),
    _Plan(
        "reset-rows",
        "a reset of two rows",
        lambda c, k, s: (*grown(4, rows=2, seed=s), Reset("a"), *grown(2, 1, rows=2, seed=s + OTHER)),
        ("reset",),
    ),
    _Plan("truncate", "a truncation, then other tokens", _truncated((6,), 4, (1, 1, 2)), ("truncate",)),
    _Plan("truncate-to-zero", "a truncation to nothing", _truncated((5,), 0, (3, 1)), ("truncate",)),
    _Plan("truncate-to-all", "a truncation that keeps all", _truncated((5,), 5, (1, 2)), ("truncate",)),
    _Plan("truncate-long", "a truncation of a longer sequence", _truncated((9, 2), 3, (4, 1, 1)), ("truncate",)),
    _Plan("fork", "a fork whose two sides go on", _fork, ("fork", "two sequences")),
    _Plan("fork-closed", "a fork whose copy goes on and ends", _fork_closed, ("fork", "two sequences")),
    _Plan("kept", "a handle that two go on from", _kept, ("immutable", "two sequences")),
    _Plan("reorder", "two rows that change places", _reordered(2, (1, 0)), ("reorder",)),
    _Plan("reorder-cycle", "three rows that move in a cycle", _reordered(3, (1, 2, 0)), ("reorder",)),
    _Plan("reorder-repeats", "rows that are repeated", _reordered(3, (2, 2, 0), (1, 1, 0)), ("reorder",)),
    _Plan("reorder-sizes", "rows that are repeated, and dropped", _reordered(2, (0, 0, 1, 1), (3,)), ("reorder",)),
    _Plan(
        "ragged", "rows that grow by different counts", _ragged((3, 5, 2), (1, 1, 1), (3, 1, 1), (1, 1, 1)), ("ragged",)
    ),
    _Plan("ragged-idle", "rows that wait", _ragged((3, 5, 2), (0, 2, 0), (1, 1, 1), (2, 0, 1), (1, 1, 1)), ("ragged",)),
    _Plan(
        "staggered",
        "rows that arrive one after another",
        _ragged((4, 0, 0), (1, 3, 0), (1, 1, 2), (1, 1, 1)),
        ("ragged",),
    ),
    _Plan(
        "left-padding",
        "rows padded on the left",
        _ragged((3, 5, 2), (1, 1, 1), (1, 3, 1), (1, 1, 1), side="left"),
        ("left padding",),
    ),
    _Plan("to-capacity", "decode steps to the capacity", _to_capacity),
    _Plan("filled", "a chunk that fills the capacity", _filled),
    _Plan("overflow", "one token more than the capacity", _overflow, ("overflow refused",)),
    _Plan("refused", "calls that must be refused", _refused),
    _around("window-steps", "decode steps across the window", lambda w: (max(w - 2, 1), 1, 1, 1, 1, 1)),
    _around("window-prompt", "a prompt longer than the window", lambda w: (w + 1, 1, 1)),
    _around("window-twice", "decode steps across twice the window", lambda w: (max(2 * w - 1, 1), 1, 1, 1)),
    _around("window-chunk", "a chunk larger than the window", lambda w: (2, 2 * w + 1, 1, 1)),
    _around("window-full", "chunks on a full window", lambda w: (w, 2, w, 1)),
    _Plan(
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
    _Plan("large_queries", "large scores", _manner("large_queries"), profiles=ATTENTION),
    _Plan("zero_keys", "keys that are zero", _manner("zero_keys"), profiles=ATTENTION),
    _Plan("some-mute", "a prompt whose first keys are zero", _some_mute, profiles=ATTENTION),
    _Plan(
        "small_keys_large_values", "large values, small keys", _manner("small_keys_large_values"), profiles=ATTENTION
    ),
    _Plan("mask", "a caller's mask", _hidden((4, (1,)), (1, (1,)), (3, (2, 4)), (1, (0, 7))), ("mask",)),
    _Plan("mask-rows", "a caller's mask of one row", _hidden((3, (0,)), (3, (1, 4)), (1, (2,)), rows=2), ("mask",)),
    _Plan(
        "mask-all",
        "a caller's mask that hides all",
        _hidden((2, (0, 1)), (1, (0, 1, 2)), (2, (0, 1, 2, 3)), (1, ())),
        ("mask",),
    ),
    *(
        _Plan(f"layout-{name}", f"{name} inputs", _laid(name, 2 if name == "expanded" else 1), profiles=ATTENTION)
        for name in ("transposed", "sliced", "expanded")
    ),
    _Plan("shared", "the present in the memory of the past", _shared((True,) * 6), ("in_place",)),
    _Plan("own-memory", "the present in memory of its own", _shared((False,) * 6), ("in_place",)),
    _Plan(
        "shared-in-turns",
        "both kinds of memory in turns",
        _shared((False, True, True, False, True, False)),
        ("in_place",),
    ),
    _Plan("junk", "dead slots that hold junk", _poisoned(("junk", "junk"), ("junk", "none")), ("poison",)),
    _Plan(
        "nan", "dead slots that hold NaN", _poisoned(("nan", "none"), ("none", "nan")), ("poison", "poison-safe slots")
    ),
    _Plan(
        "infinite",
        "dead slots that hold infinity",
        _poisoned(("inf", "none"), ("none", "inf")),
        ("poison", "poison-safe slots"),
    ),
    _Plan("contents", "what the cache shows of itself", _read, ("contents",), profiles=ATTENTION),
    _Plan("full", "the cache-less forward, also while a sequence is open", _whole, ("uncached_forward",)),
    _Plan("pages", "lengths around a page", _pages, ("pages",)),
    _Plan("page-truncate", "a truncation to a page", _page_truncated, ("pages", "truncate")),
    _Plan("page-fork", "a fork in the middle of a page", _fork_page, ("pages", "fork", "two sequences")),
    _Plan("ragged-reorder", "rows of different lengths that change places", _ragged_reordered, ("ragged", "reorder")),
    _Plan(
        "ragged-contents",
        "what the cache shows of rows of different lengths",
        _ragged_read,
        ("ragged", "contents"),
        ATTENTION,
    ),
    _Plan("generation", "tokens that the backend generates on its own", _generations, ("generate",), ("decoder",)),
    _Plan(
        "generation-rows",
        "tokens that the backend generates for several rows",
        _generations_of_rows,
        ("generate", "two rows"),
        ("decoder",),
    ),
    _Plan("last", "calls that are asked for the last position alone", _last, ("last_only",), ("decoder",)),
    _Plan(
        "last-rows",
        "steps of two rows that are asked for the last position alone",
        _last_of_rows,
        ("last_only", "two rows"),
        ("decoder",),
    ),
)
"""The battery. New probes go to the end: a probe's streams follow from its place."""
