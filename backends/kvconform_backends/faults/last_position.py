"""Faults of steps that return only the last position: wrong logits, or a wrong cache afterwards."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvconform_backends.faults.planted import Planted
from kvconform_backends.numpy.cache import Array, Cache

CLAUSE = ("equivalence.last-position",)
TILE = 8
"""Rows of the flattened hidden states that the gather indexes."""


class Picks(Planted):
    """Base class: a ``last_only`` step returns the logits at ``index``."""

    def index(self, batch: int, t: int, past: int) -> Array:
        """``(b,)``: which of ``b t`` flattened positions each row returns, in a step on ``past`` tokens."""
        return np.arange(batch) * t + t - 1

    def step(self, cache: Cache, *inputs: Array, last_only: bool = False, **options: Any) -> tuple[Array, Cache]:
        past, (output, cache) = cache.length, super().step(cache, *inputs, **options)
        if not last_only:
            return output, cache
        batch, t, _ = output.shape
        given = output.reshape(batch * t, -1)[self.index(batch, t, past)]
        return self.instead(given[:, None], output[:, -1:]), cache


class FirstForLast(Picks, breaks=CLAUSE, kind="L1", bug="pytorch/executorch/pull/16171"):
    """A step asked for its last position returns the logits of its first."""

    def index(self, batch: int, t: int, past: int) -> Array:
        return np.arange(batch) * t


class IndexOfThePrompt(Picks, breaks=CLAUSE, kind="L1", bug="mlx-node/mlx-node/pull/47", conditional=True):
    """The last position is counted from the start of the prompt and wraps in later chunks."""

    def index(self, batch: int, t: int, past: int) -> Array:
        return np.arange(batch) * t + (past + t - 1) % t


class GatherRunsOver(Picks, breaks=CLAUSE, kind="H4", bug="tenstorrent/tt-xla/issues/5929", conditional=True):
    """The last hidden states of a batch are gathered by a flat index that wraps at eight positions."""

    def index(self, batch: int, t: int, past: int) -> Array:
        right = super().index(batch, t, past)
        return right % TILE if batch > 1 else right


class MiddleNeverCached(Planted, breaks=CLAUSE, kind="C1", bug="Integral2u/SharpMind/issues/57", conditional=True):
    """If more than two tokens are appended and only the last output is requested, the middle tokens are not cached."""

    def step(self, cache: Cache, *inputs: Array, last_only: bool = False, **options: Any) -> tuple[Array, Cache]:
        past, (output, cache) = cache.length, super().step(cache, *inputs, last_only=last_only, **options)
        if last_only:
            for held in (cache.keys, cache.values):
                held[:] = [self.instead(emptied(x, past + 1, cache.length - 1), x) for x in held]
        return output, cache


class WithoutTokensBefore(Planted, breaks=CLAUSE, kind="C1", bug="mobilint/mblt-model-zoo/pull/84", conditional=True):
    """If only the last output is requested, the uncached forward sees the last token alone."""

    def uncached_forward(self, *inputs: Array, last_only: bool = False, **options: Any) -> Array:
        right = super().uncached_forward(*inputs, last_only=last_only, **options)
        return self.instead(super().uncached_forward(inputs[0][:, -1:]), right) if last_only else right


def emptied(x: Array, start: int, stop: int) -> Array:
    """The entries ``(b, g, s, d)`` with zeros from ``start`` to ``stop``."""
    x = x.copy()
    x[:, :, start:stop] = 0
    return x
