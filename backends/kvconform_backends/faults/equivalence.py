"""Faults that depend on how a history was built: positions, chunks, detours, and the uncached forward."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvconform_backends.faults.configs import LEARNED, ROPE
from kvconform_backends.faults.controls import InPlace
from kvconform_backends.faults.planted import Planted
from kvconform_backends.numpy.cache import Array, Cache
from kvconform_backends.numpy.static import NumpyStatic

CHUNKS = "equivalence.chunks"
FULL_STABLE = "equivalence.full-stable"

PARITY = ("definition.attention", "definition.decoder")


class PageLost(
    Planted, breaks=("equivalence.decode", CHUNKS), kind="G1", bug="sgl-project/sglang/issues/22819", conditional=True
):
    """If the cached length is a multiple of the page size of 4 tokens, the last page is not read."""

    def mask(self, t: int, s: int) -> Array:
        right, past = super().mask(t, s), s - t
        lost = (np.arange(s) >= past - 4) & (np.arange(s) < past)
        return self.instead(right & ~lost, right) if past and past % 4 == 0 else right


class ChunkWritesAtZero(
    Planted, InPlace, breaks=(CHUNKS,), kind="C1", bug="nntrainer/nntrainer/pull/3814", conditional=True
):
    """Chunks on a non-empty cache are written a second time, starting at slot 0."""

    def append(self, cache: Any, layer: int, key: Array, value: Array) -> tuple[Array, Array]:
        found, t = super().append(cache, layer, key, value), key.shape[2]
        if t > 1 and self.places.max() >= t:
            self.faulty += 1
            cache.keys[layer][:, :, :t], cache.values[layer][:, :, :t] = self.stored(key), self.stored(value)
        return found


class TailAttended(
    Planted,
    NumpyStatic,
    breaks=(*PARITY, CHUNKS, "shape.first-step"),
    kind="M6",
    bug="meta-pytorch/gpt-fast/issues/233",
):
    """The whole static buffer is attended to: zeros behind the valid tokens receive weight."""

    def mask(self, t: int, s: int) -> Array:
        right, last = super().mask(t, s), self.places.max(axis=1, initial=0)[:, None, None, None]
        return self.instead(right | (np.arange(s) > last), right)


class LastTileAttended(
    Planted, NumpyStatic, breaks=PARITY, kind="M6", bug="pytorch/pytorch/pull/169222", conditional=True
):
    """A decode step reads its last tile of 4 slots to the end: one stale or empty slot too many if 3 are valid."""

    def mask(self, t: int, s: int) -> Array:
        right, last = super().mask(t, s), self.places.max(axis=1, initial=0)[:, None, None, None]
        return self.instead(right | (last % 4 == 2) & (np.arange(s) == last + 1), right) if t == 1 else right


class ValuesAreKeys(Planted, breaks=PARITY, kind="C1", bug="awslabs/sockeye/pull/731"):
    """The first step writes its keys as values."""

    def append(self, cache: Cache, layer: int, key: Array, value: Array) -> tuple[Array, Array]:
        first = cache.keys[layer].shape[2] == 0
        return super().append(cache, layer, key, self.instead(key, value) if first else value)


class ReorderMakesValuesKeys(
    Planted,
    breaks=(*PARITY, "lifecycle.reorder"),
    kind="C1",
    bug="huggingface/transformers/issues/34232",
    conditional=True,
):
    """Reorder rebuilds the values from the keys."""

    def reorder(self, cache: Cache, rows: list[int]) -> Cache:
        right = super().reorder(cache, rows)
        return Cache(right.keys, [self.instead(k, v) for k, v in zip(right.keys, right.values, strict=True)])


class RefusedAppends(
    Planted, breaks=("equivalence.path",), kind="C12", bug="ggml-org/llama.cpp/pull/9525", conditional=True
):
    """A call refused for lack of capacity leaves its first token in the cache."""

    def step(self, cache: Cache, *inputs: Array, **options: Any) -> tuple[Array, Cache]:
        try:
            return super().step(cache, *inputs, **options)
        except ValueError:
            if cache.length < self.config.capacity:
                self.faulty += 1
                cache.keys[:] = [np.concatenate([k, k[:, :, :1]], axis=2) for k in cache.keys]
                cache.values[:] = [np.concatenate([v, v[:, :, :1]], axis=2) for v in cache.values]
            raise


class FullUnmasked(Planted, breaks=(FULL_STABLE,), kind="M4", bug="keras-team/keras/issues/23038"):
    """The uncached forward has no causal mask."""

    def mask(self, t: int, s: int) -> Array:
        right = super().mask(t, s)
        return right if self.cached else self.instead(np.ones((t, s), bool), right)


class FullBaseByLength(
    Planted,
    breaks=(FULL_STABLE,),
    kind="P5",
    bug="huggingface/transformers/issues/25104",
    conditional=True,
    configs=ROPE,
):
    """The uncached forward stretches RoPE by the length once that exceeds 12."""

    def rotate(self, x: Array, positions: Array) -> Array:
        right = super().rotate(x, positions)
        long = not self.cached and len(positions) > 12
        return self.instead(super().rotate(x, positions * 12 / len(positions)), right) if long else right


class FullGoesOn(
    Planted, breaks=(FULL_STABLE,), kind="P1", bug="OpenNMT/CTranslate2/pull/1572", conditional=True, configs=LEARNED
):
    """The uncached forward continues the positions of the sequence that was stepped last."""

    last = 0

    def step(self, cache: Cache, *inputs: Array, **options: Any) -> tuple[Array, Cache]:
        output, cache = super().step(cache, *inputs, **options)
        self.last = cache.length if self.cached else self.last
        return output, cache

    def positions(self, cache: Cache, t: int) -> Array:
        right = super().positions(cache, t)
        return right if self.cached else self.instead(np.minimum(right + self.last, self.config.capacity - 1), right)


class FullAppends(
    Planted, breaks=(FULL_STABLE,), kind="C4", bug="huggingface/transformers/issues/37078", conditional=True
):
    """The uncached forward appends its first token to the last stepped sequence with the same number of rows."""

    last: Cache | None = None

    def step(self, cache: Cache, *inputs: Array, **options: Any) -> tuple[Array, Cache]:
        output, cache = super().step(cache, *inputs, **options)
        last = self.last
        if self.cached:
            self.last = cache
        elif last is not None and len(last.keys[0]) == len(cache.keys[0]) and last.length < self.config.capacity:
            self.faulty += 1
            for layer in range(self.config.layers):
                self.append(last, layer, cache.keys[layer][:, :, :1], cache.values[layer][:, :, :1])
        return output, cache
