"""Mask edits: rules by which a query sees other tokens of its row than the causal mask and the window allow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvconform.explain.diagnosis.cache_edits import CachedToken

Flags = NDArray[np.bool_]
Numbers = NDArray[np.int64]
Rule = Callable[[Numbers, Numbers, Numbers, Numbers, int | None], Flags]
"""Takes the positions of queries ``i (s, 1)`` and keys ``j (1, s)``, the past and the count of the step that each query
belongs to, ``p`` and ``q (s, 1)``, and the window; returns which keys each query sees, ``(s, s)``."""
Steps = Callable[[Numbers, Numbers], Flags]
"""Takes ``p`` and ``q`` and returns the queries whose steps have the mistake."""


@dataclass(frozen=True)
class MaskEdit:
    """A wrong mask.

    words: completes "what the reference gives ...". classes: the ids of the mistakes that it may stand for; none where
    several different mistakes look like it. softcapped: further ids that maps may stand for under a config with a
    softcap, which undoes a mask that is applied before it.
    """

    words: str
    classes: tuple[str, ...]
    rule: Rule
    steps: Steps = lambda p, q: p >= 0
    softcapped: tuple[str, ...] = ()

    def seen(self, row: Sequence[CachedToken], window: int | None) -> Flags:
        past, count = (np.array([token[which] for token in row], np.int64) for which in (1, 2))
        return self.mask(past, count, window)

    def changed(self, row: Sequence[CachedToken], window: int | None) -> Flags:
        """Where the edited mask differs from the right one."""
        i = np.arange(len(row))
        return np.asarray(self.seen(row, window) != causal(i[:, None], i[None, :], window))

    def mask(self, past: Numbers, count: Numbers, window: int | None) -> Flags:
        """Which tokens each token sees ``(s, s)``; ``past`` and ``count (s,)``: of the step that each belongs to."""
        i, j, p, q = np.arange(len(past))[:, None], np.arange(len(past))[None, :], past[:, None], count[:, None]
        return np.where(self.steps(p, q), self.rule(i, j, p, q, window), causal(i, j, window))


def causal(i: Numbers, j: Numbers, window: int | None) -> Flags:
    """The right mask."""
    seen: Flags = j <= i
    return seen if window is None else seen & (j > i - window)


CACHED: Steps = lambda p, q: p > 0  # noqa: E731
PROMPTS: Steps = lambda p, q: p == 0  # noqa: E731
DECODES: Steps = lambda p, q: (p > 0) & (q == 1)  # noqa: E731
CHUNKS: Steps = lambda p, q: (p > 0) & (q > 1)  # noqa: E731
SINGLE: Steps = lambda p, q: q == 1  # noqa: E731
SEVERAL: Steps = lambda p, q: q > 1  # noqa: E731


def _wider(by: int) -> Rule:
    return lambda i, j, p, q, w: causal(i, j, None if w is None else w + by)


def _windowless(i: Numbers, j: Numbers, p: Numbers, q: Numbers, w: int | None) -> Flags:
    return causal(i, j, None)


def _top_left(i: Numbers, j: Numbers, p: Numbers, q: Numbers, w: int | None) -> Flags:
    return causal(i - p, j, w)


def _uncached(i: Numbers, j: Numbers, p: Numbers, q: Numbers, w: int | None) -> Flags:
    return causal(i, j, w) & (j >= p)


def _future(i: Numbers, j: Numbers, p: Numbers, q: Numbers, w: int | None) -> Flags:
    return causal(i, j, w) | ((j > i) & (j < p + q))


def _without_itself(i: Numbers, j: Numbers, p: Numbers, q: Numbers, w: int | None) -> Flags:
    return causal(i, j, w) & (j < i)


def _without_first(i: Numbers, j: Numbers, p: Numbers, q: Numbers, w: int | None) -> Flags:
    seen: Flags = causal(i, j, w) & ((j > 0) | (i == 0))
    return seen


def _evicted_early(i: Numbers, j: Numbers, p: Numbers, q: Numbers, w: int | None) -> Flags:
    """A step that fills the window exactly has lost the oldest token; later ones are right."""
    return causal(i, j, w) if w is None else causal(i, j, w) & ((j > 0) | (p + q != w))


def _newest_overwritten(delay: int) -> Rule:
    """The first decode step after a ring of ``w`` slots was filled is written over the newest token, ``w - 1``, and not
    over token 0, which stays until the slot is used again. delay: 0 where a step is written before it reads, else 1."""

    def rule(i: Numbers, j: Numbers, p: Numbers, q: Numbers, w: int | None) -> Flags:
        right = causal(i, j, w)
        if w is None or not bool(((p == w) & (q == 1)).any()):
            return right
        lost = np.where(i < 2 * w - 1, w - 1, w)  # token w itself, once its slot is the one of token 2 w - 1
        return np.where((i >= w + delay) & (i < 2 * w), (right & (j != lost)) | (j == 0), right)

    return rule


TOP_LEFT = "with the causal mask aligned to the top left"
STALE_SLOT = "with token 0 kept and the newest token overwritten when the window was exactly full"
LATER = "with the later tokens of the step visible"
MASK_EDITS: tuple[MaskEdit, ...] = (
    MaskEdit("without the newest cached token", (), lambda i, j, p, q, w: causal(i, j, w) & (j != p - 1)),
    MaskEdit("without token 0", (), _without_first),
    MaskEdit("without token 0, where tokens are cached", ("C1",), _without_first, CACHED),
    MaskEdit("without the cached tokens", (), _uncached),
    MaskEdit("without the cached tokens in steps of several tokens", ("M2",), _uncached, CHUNKS),
    MaskEdit(
        "on token 0 and the tokens of the step", (), lambda i, j, p, q, w: causal(i, j, w) & ((j >= p) | (j == 0))
    ),
    MaskEdit("on the token itself only", (), lambda i, j, p, q, w: (j == i) & (i >= 0)),
    MaskEdit(
        "without the earlier tokens of the step", (), lambda i, j, p, q, w: causal(i, j, w) & ((j < p) | (j == i))
    ),
    MaskEdit(TOP_LEFT, ("M1",), _top_left, CACHED),
    MaskEdit(f"{TOP_LEFT} in steps of several tokens", ("M1",), _top_left, CHUNKS),
    MaskEdit(f"{TOP_LEFT} in decode steps", ("M1",), _top_left, DECODES),
    MaskEdit(f"{LATER}, where tokens are cached", ("M2",), _future, CACHED, softcapped=("M11",)),
    MaskEdit(LATER, ("M2", "M4"), _future, softcapped=("M11",)),
    MaskEdit(f"{LATER} in prompts", ("M4",), _future, PROMPTS, softcapped=("M11",)),
    MaskEdit(
        "with the next token visible", ("M3",), lambda i, j, p, q, w: causal(i, j, w) | ((j == i + 1) & (j < p + q))
    ),
    MaskEdit("without the token itself", (), _without_itself),
    MaskEdit("without the token itself, where tokens are cached", (), _without_itself, CACHED),
    MaskEdit("without the token itself in decode steps", (), _without_itself, DECODES),
    MaskEdit("with a window larger by one", ("W1",), _wider(1)),
    MaskEdit("with a window smaller by one", ("W1",), _wider(-1)),
    MaskEdit("with a window larger by one in decode steps", ("W1",), _wider(1), SINGLE),
    MaskEdit("with a window smaller by one in decode steps", ("W1",), _wider(-1), SINGLE),
    MaskEdit("with a window larger by one in steps of several tokens", ("W1",), _wider(1), SEVERAL),
    MaskEdit("with a window smaller by one in steps of several tokens", ("W1",), _wider(-1), SEVERAL),
    MaskEdit("without the oldest token in steps that fill the window exactly", ("W3",), _evicted_early),
    MaskEdit("without the oldest token in decode steps that fill the window exactly", ("W3",), _evicted_early, SINGLE),
    *(MaskEdit(STALE_SLOT + after, ("W3",), _newest_overwritten(delay)) for delay, after in enumerate(("", ", later"))),
    MaskEdit("without a window", ("W2",), _windowless),
    MaskEdit("without a window in decode steps", ("W2",), _windowless, DECODES),
    MaskEdit("without a window in steps of several tokens", ("W2",), _windowless, SEVERAL),
    MaskEdit("without a window in prompts", ("W2",), _windowless, PROMPTS),
    MaskEdit("without a window, where tokens are cached", ("W2",), _windowless, CACHED),
    MaskEdit(
        "with the window of the step's last token",
        ("W4", "W5"),
        lambda i, j, p, q, w: (j <= i) if w is None else (j <= i) & (j > p + q - 1 - w),
    ),
    MaskEdit(
        "with the window of the step's first token",
        ("W5",),
        lambda i, j, p, q, w: (j <= i) if w is None else (j <= i) & (j > p - w),
    ),
)
