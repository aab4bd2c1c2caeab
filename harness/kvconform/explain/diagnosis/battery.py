"""The battery of probes: which programs describe a broken backend. Each plan gives the steps for a config."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvconform.explain.diagnosis import probe_steps as steps
from kvconform.explain.diagnosis.probe_steps import OTHER, Steps, grown
from kvconform_specs.program import Generate, Reset, Truncate


@dataclass(frozen=True)
class ProbePlan:
    """One probe.

    name: unique; the probe's streams follow from it. words: what the program does. needs: abilities and other things
    that claims must allow. windowed: whether it needs a window; contexts: whether it needs several contexts.
    """

    name: str
    words: str
    steps: Steps
    needs: tuple[str, ...] = ()
    profiles: tuple[str, ...] = ("attention", "decoder", "hidden")
    windowed: bool = False
    contexts: bool = False


def _plain(name: str, words: str, *sizes: int, rows: int = 1) -> ProbePlan:
    return ProbePlan(name, words, lambda c, k, s: grown(*sizes, rows=rows, seed=s))


def _around(name: str, words: str, sizes: Callable[[int], tuple[int, ...]]) -> ProbePlan:
    """Sizes of appends that depend on the window."""
    return ProbePlan(name, words, lambda c, k, s: grown(*sizes(c.window or 0), seed=s), windowed=True)


ATTENTION, TWO = ("attention",), ("two sequences",)
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
    ProbePlan("after-another", "a sequence after another was closed", steps.after_another),
    ProbePlan("interleaved", "two sequences that alternate", steps.interleaved, ("two sequences",)),
    ProbePlan("shapes", "sequences of different shapes, one after another", steps.shapes),
    ProbePlan("reset", "a reset, then other tokens", steps.reset((6, 1), (3, 1, 1)), ("reset",)),
    ProbePlan("reset-long", "a reset of a longer sequence", steps.reset((12, 1), (1, 1, 3)), ("reset",)),
    ProbePlan(
        "reset-rows",
        "a reset of two rows",
        lambda c, k, s: (*grown(4, rows=2, seed=s), Reset("a"), *grown(2, 1, rows=2, seed=s + OTHER)),
        ("reset",),
    ),
    ProbePlan("truncate", "a truncation, then other tokens", steps.truncated((6,), 4, (1, 1, 2)), ("truncate",)),
    ProbePlan("truncate-to-zero", "a truncation to 0 tokens", steps.truncated((5,), 0, (3, 1)), ("truncate",)),
    ProbePlan("truncate-to-all", "a truncation to the current length", steps.truncated((5,), 5, (1, 2)), ("truncate",)),
    ProbePlan(
        "truncate-long", "a truncation of a longer sequence", steps.truncated((9, 2), 3, (4, 1, 1)), ("truncate",)
    ),
    ProbePlan("fork", "a fork, both sides of which grow", steps.fork, ("fork", "two sequences")),
    ProbePlan("fork-closed", "a fork whose copy grows and is closed", steps.fork_closed, ("fork", "two sequences")),
    ProbePlan(
        "alias", "an older handle that grows beside the newer one", steps.aliased, ("immutable", "two sequences")
    ),
    ProbePlan("reorder", "two rows that are swapped", steps.reordered(2, (1, 0)), ("reorder",)),
    ProbePlan("reorder-cycle", "three rows that are permuted in a cycle", steps.reordered(3, (1, 2, 0)), ("reorder",)),
    ProbePlan("reorder-repeats", "a reorder that repeats rows", steps.reordered(3, (2, 2, 0), (1, 1, 0)), ("reorder",)),
    ProbePlan(
        "reorder-sizes", "reorders that repeat and drop rows", steps.reordered(2, (0, 0, 1, 1), (3,)), ("reorder",)
    ),
    ProbePlan(
        "ragged",
        "rows that grow by different counts",
        steps.ragged((3, 5, 2), (1, 1, 1), (3, 1, 1), (1, 1, 1)),
        ("ragged",),
    ),
    ProbePlan(
        "ragged-idle",
        "rows that pause",
        steps.ragged((3, 5, 2), (0, 2, 0), (1, 1, 1), (2, 0, 1), (1, 1, 1)),
        ("ragged",),
    ),
    ProbePlan(
        "staggered",
        "rows that start one after another",
        steps.ragged((4, 0, 0), (1, 3, 0), (1, 1, 2), (1, 1, 1)),
        ("ragged",),
    ),
    ProbePlan(
        "left-padding",
        "rows padded on the left",
        steps.ragged((3, 5, 2), (1, 1, 1), (1, 3, 1), (1, 1, 1), side="left"),
        ("left padding",),
    ),
    ProbePlan("to-capacity", "decode steps up to the capacity", steps.to_capacity),
    ProbePlan("filled", "a chunk that fills the capacity", steps.filled),
    ProbePlan("overflow", "appends beyond the capacity", steps.overflow, ("overflow refused",)),
    ProbePlan("refused", "malformed calls", steps.refused),
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
        ProbePlan(name.replace("_", "-"), words, steps.distributed(name), profiles=ATTENTION)
        for name, words in (
            ("large_queries", "large scores"),
            ("zero_keys", "keys that are zero"),
            ("small_keys_large_values", "large values, small keys"),
        )
    ),
    ProbePlan("mask", "a caller's mask", steps.masked((4, (1,)), (1, (1,)), (3, (2, 4)), (1, (0, 7))), ("mask",)),
    ProbePlan(
        "mask-rows", "a caller's mask of one row", steps.masked((3, (0,)), (3, (1, 4)), (1, (2,)), rows=2), ("mask",)
    ),
    *(
        ProbePlan(
            f"layout-{name}", f"{name} inputs", steps.laid(name, 2 if name == "expanded" else 1), profiles=ATTENTION
        )
        for name in ("transposed", "sliced", "expanded")
    ),
    ProbePlan("in-place", "a present that shares the memory of the past", steps.in_place((True,) * 6), ("in_place",)),
    ProbePlan(
        "in-place-alternating",
        "a present in shared and separate memory by turns",
        steps.in_place((False, True, True, False, True, False)),
        ("in_place",),
    ),
    ProbePlan(
        "junk", "unused slots that hold random numbers", steps.poisoned(("junk", "junk"), ("junk", "none")), ("poison",)
    ),
    ProbePlan(
        "nan",
        "unused slots that hold NaN",
        steps.poisoned(("nan", "none"), ("none", "nan")),
        ("poison", "poison-safe slots"),
    ),
    ProbePlan("contents", "reads of the cache", steps.contents, ("contents",), profiles=ATTENTION),
    ProbePlan(
        "uncached-forward", "the uncached forward, also while a sequence is open", steps.uncached, ("uncached_forward",)
    ),
    ProbePlan("pages", "lengths around the page size", steps.pages, ("pages",)),
    ProbePlan("page-fork", "a fork in the middle of a page", steps.fork_page, ("pages", "fork", "two sequences")),
    ProbePlan(
        "ragged-reorder", "rows of different lengths that are reordered", steps.ragged_reordered, ("ragged", "reorder")
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
    *(
        ProbePlan(f"context{'s' if name else ''}{name}", words, made, ("contexts", *needs), ("decoder",), contexts=True)
        for name, words, made, needs in (
            (
                "",
                "a prompt and decode steps in another context",
                lambda c, k, s: grown(5, 1, 1, 3, 1, seed=s, context=1),
                (),
            ),
            ("-closed", "the same tokens in two contexts, one after another", steps.closed_context, ()),
            ("-reset", "the same tokens in another context after a reset", steps.reset_context, ("reset",)),
            ("-in-turn", "two sequences that alternate, each in its context", steps.contexts_in_turn(False), TWO),
            ("-same", "the same tokens in two open sequences, each in its context", steps.contexts_in_turn(True), TWO),
            ("-uncached", "the uncached forward in another context", steps.uncached_in_context, ("uncached_forward",)),
            (
                "-generation",
                "generation after the same prompt in two contexts",
                steps.generated_in_contexts,
                ("generate",),
            ),
        )
    ),
    ProbePlan("last", "calls that return the last position only", steps.last, ("last_only",), ("decoder",)),
    ProbePlan(
        "last-rows",
        "steps of two rows that return the last position only",
        lambda c, k, s: (*steps.last_only(5, 3, rows=2, seed=s), *grown(1, 2, rows=2, seed=s)),
        ("last_only", "two rows"),
        ("decoder",),
    ),
)
