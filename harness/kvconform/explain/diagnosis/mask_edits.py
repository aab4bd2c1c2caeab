"""Edits of what is seen: rules by which a query sees other tokens of its row than it must."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvconform.explain.diagnosis.cache_edits import Token

Flags = NDArray[np.bool_]
Numbers = NDArray[np.int64]
Rule = Callable[[Numbers, Numbers, Numbers, Numbers, int | None], Flags]
"""Queries ``i (s, 1)`` and keys ``j (1, s)`` by position, the past and the count of the step that each query was a
token of, ``(s, 1)``, and the window, to what is seen ``(s, s)``."""


@dataclass(frozen=True)
class SightEdit:
    """words: ``without the newest cached token``. classes: the mistakes that it stands for, by the catalogue's ids."""

    words: str
    classes: tuple[str, ...]
    rule: Rule

    def seen(self, row: Sequence[Token], window: int | None) -> Flags:
        return np.broadcast_to(self.rule(*_numbers(row), window), (len(row), len(row)))

    def right(self, row: Sequence[Token], window: int | None) -> Flags:
        i, j, _past, _count = _numbers(row)
        return _right(i, j, window)


def _numbers(row: Sequence[Token]) -> tuple[Numbers, Numbers, Numbers, Numbers]:
    i = np.arange(len(row))
    past, count = (np.array([token[which] for token in row], np.int64).reshape(-1, 1) for which in (1, 2))
    return i[:, None], i[None, :], past, count


def _right(i: Numbers, j: Numbers, window: int | None) -> Flags:
    return (j <= i) if window is None else (j <= i) & (j > i - window)


def _wider(by: int, chunks: bool = True, decodes: bool = True) -> Rule:
    """The window is so much larger; in steps of one token alone, or of several."""

    def rule(i: Numbers, j: Numbers, p: Numbers, q: Numbers, w: int | None) -> Flags:
        there = ((q > 1) & chunks) | ((q == 1) & decodes)
        return _right(i, j, w) if w is None else np.where(there, _right(i, j, w + by), _right(i, j, w))

    return rule


def _no_window(where: Callable[[Numbers, Numbers], Flags]) -> Rule:
    return lambda i, j, p, q, w: _right(i, j, w) | (where(p, q) & (j <= i))


SIGHTS: tuple[SightEdit, ...] = (
    SightEdit("without the newest cached token", (), lambda i, j, p, q, w: _right(i, j, w) & (j != p - 1)),
    SightEdit("without token 0", (), lambda i, j, p, q, w: _right(i, j, w) & ((j > 0) | (i == 0))),
    SightEdit("without what is cached", (), lambda i, j, p, q, w: _right(i, j, w) & (j >= p)),
    SightEdit(
        "on token 0 and the step's own tokens", (), lambda i, j, p, q, w: _right(i, j, w) & ((j >= p) | (j == 0))
    ),
    SightEdit("on the token alone", (), lambda i, j, p, q, w: (j == i) & (i >= 0)),
    SightEdit("without the step's earlier tokens", (), lambda i, j, p, q, w: _right(i, j, w) & ((j < p) | (j == i))),
    SightEdit(
        "with the causal mask at the top left",
        ("M1",),
        lambda i, j, p, q, w: np.where(p > 0, _right(i - p, j, w), _right(i, j, w)),
    ),
    SightEdit(
        "with the step's later tokens, where something is cached",
        ("M2",),
        lambda i, j, p, q, w: _right(i, j, w) | ((p > 0) & (j > i) & (j < p + q)),
    ),
    SightEdit(
        "with the step's later tokens", ("M2", "M4"), lambda i, j, p, q, w: _right(i, j, w) | ((j > i) & (j < p + q))
    ),
    SightEdit(
        "with all the tokens of prompts",
        ("M4",),
        lambda i, j, p, q, w: _right(i, j, w) | ((p == 0) & (j > i) & (j < q)),
    ),
    SightEdit("with the next token", ("M3",), lambda i, j, p, q, w: _right(i, j, w) | ((j == i + 1) & (j < p + q))),
    SightEdit("without the token itself", (), lambda i, j, p, q, w: _right(i, j, w) & (j < i)),
    SightEdit(
        "without the token itself, where something is cached",
        (),
        lambda i, j, p, q, w: _right(i, j, w) & ((j < i) | (p == 0)),
    ),
    SightEdit("with a window that is one larger", ("W1",), _wider(1)),
    SightEdit("with a window that is one smaller", ("W1",), _wider(-1)),
    SightEdit("with a window that is one larger in decode steps", ("W1", "W3"), _wider(1, chunks=False)),
    SightEdit("with a window that is one smaller in decode steps", ("W1", "W3"), _wider(-1, chunks=False)),
    SightEdit("with a window that is one larger in steps of several tokens", ("W1",), _wider(1, decodes=False)),
    SightEdit("with a window that is one smaller in steps of several tokens", ("W1",), _wider(-1, decodes=False)),
    SightEdit("without a window", ("W2",), _no_window(lambda p, q: q > 0)),
    SightEdit("without a window in decode steps", ("W2",), _no_window(lambda p, q: (q == 1) & (p > 0))),
    SightEdit("without a window in steps of several tokens", ("W2",), _no_window(lambda p, q: q > 1)),
    SightEdit("without a window in prompts", ("W2",), _no_window(lambda p, q: p == 0)),
    SightEdit("without a window where something is cached", ("W2",), _no_window(lambda p, q: p > 0)),
    SightEdit(
        "with the window of the step's last token",
        ("W4", "W5"),
        lambda i, j, p, q, w: _right(i, j, w) if w is None else (j <= i) & (j > p + q - 1 - w),
    ),
    SightEdit(
        "with the window of the step's first token",
        ("W5",),
        lambda i, j, p, q, w: _right(i, j, w) if w is None else (j <= i) & (j > p - w),
    ),
)
