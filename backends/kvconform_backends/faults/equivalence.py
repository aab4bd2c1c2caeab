"""Faults of how a history came about: positions, chunks, detours, and the forward without a cache."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvconform_backends.faults.controls import Buffers, Static
from kvconform_backends.faults.planted import Planted
from kvconform_backends.numpy_cache import Array, Cache

PLACED = ("decoder-rope", "decoder-learned")
"""The configs whose decoder has positions."""


@dataclass
class Placed(Cache):
    """A cache whose positions run ahead of its length."""

    ahead: int = 0

    @classmethod
    def of(cls, cache: Cache, ahead: int) -> Placed:
        return cls(cache.keys, cache.values, ahead)


def ahead(cache: Cache) -> int:
    return cache.ahead if isinstance(cache, Placed) else 0


class PositionRestart(
    Planted,
    breaks=("equivalence.decode", "equivalence.chunks", "definition.positions"),
    bug="pytorch/executorch/pull/2010",
    configs=PLACED,
):
    """Each step's positions begin at 0."""

    def positions(self, cache: Cache, t: int) -> Array:
        return self.instead(np.arange(t), super().positions(cache, t))


class PageLost(
    Planted, breaks=("equivalence.decode", "equivalence.chunks"), bug="sgl-project/sglang/issues/22819", stealth=True
):
    """When the cached length is a multiple of the page of 4 tokens, its last page is not read."""

    def mask(self, t: int, s: int) -> Array:
        right, past = super().mask(t, s), s - t
        lost = (np.arange(s) >= past - 4) & (np.arange(s) < past)
        return self.instead(right & ~lost, right) if past and past % 4 == 0 else right


class ChunkWritesAtZero(
    Planted, Static, breaks=("equivalence.chunks",), bug="nntrainer/nntrainer/pull/3814", stealth=True
):
    """Several tokens on a cache that is not empty are written from slot 0 on."""

    def append(self, cache: Cache, layer: int, key: Array, value: Array) -> tuple[Array, Array]:
        keys, values = super().append(cache, layer, key, value)
        s, t = keys.shape[2], key.shape[2]
        if s > t > 1:
            self.faulty += 1
            cache.keys[layer][:, :, :t], cache.values[layer][:, :, :t] = key, value
        return keys, values


class TruncateIgnored(Planted, breaks=("equivalence.path", "shape.length"), bug="ml-explore/mlx-lm/pull/1109"):
    """Truncate does nothing."""

    def truncate(self, cache: Cache, length: int) -> Cache:
        self.faulty += super().truncate(cache, length).length < cache.length
        return cache


class TruncateToZeroIgnored(
    Planted,
    breaks=("equivalence.path", "shape.length", "definition.attention", "definition.decoder"),
    bug="huggingface/transformers/issues/47433",
    stealth=True,
):
    """Truncate to no tokens at all keeps every one."""

    def truncate(self, cache: Cache, length: int) -> Cache:
        if length == 0:
            self.faulty += cache.length > 0
            return cache
        return super().truncate(cache, length)


class TruncateByPage(
    Planted, breaks=("equivalence.path", "shape.length"), bug="Blaizzy/mlx-vlm/pull/2036", stealth=True
):
    """Truncate keeps whole pages of 4 tokens."""

    def truncate(self, cache: Cache, length: int) -> Cache:
        kept = min(cache.length, -(-length // 4) * 4)
        self.faulty += kept != length
        return super().truncate(cache, kept)


class TruncateKeepsPosition(
    Planted,
    breaks=("equivalence.path", "definition.decoder"),
    bug="NVIDIA/kvpress/pull/114",
    stealth=True,
    configs=PLACED,
):
    """Truncate forgets keys and values, but positions count on from what was there."""

    def start(self, batch: int) -> Cache:
        return Placed.of(super().start(batch), 0)

    def fork(self, cache: Cache) -> Cache:
        return Placed.of(super().fork(cache), ahead(cache))

    def reorder(self, cache: Cache, rows: list[int]) -> Cache:
        return Placed.of(super().reorder(cache, rows), ahead(cache))

    def truncate(self, cache: Cache, length: int) -> Cache:
        return Placed.of(super().truncate(cache, length), ahead(cache) + cache.length - length)

    def positions(self, cache: Cache, t: int) -> Array:
        right = super().positions(cache, t)
        return self.instead(np.minimum(right + ahead(cache), self.config.capacity - 1), right)


class ForkShares(Planted, Static, breaks=("equivalence.path",), bug="ggml-org/llama.cpp/issues/3802", stealth=True):
    """A fork has its own length, but shares the buffers: what one branch writes, the other reads."""

    def fork(self, cache: Cache) -> Buffers:
        self.faulty += cache.length > 0
        return Buffers(cache.keys, cache.values, cache.length)


class ReorderKeysOnly(Planted, breaks=("definition.attention", "definition.decoder"), bug="awslabs/sockeye/pull/731"):
    """Reorder moves the keys' rows and leaves the values'."""

    def reorder(self, cache: Cache, rows: list[int]) -> Cache:
        right = super().reorder(cache, rows)
        return Cache(right.keys, [self.instead(v, r) for v, r in zip(cache.values, right.values, strict=True)])


class ReorderSkipsLastLayer(
    Planted,
    breaks=("equivalence.path", "definition.decoder"),
    bug="huggingface/transformers/issues/46612",
    stealth=True,
):
    """Reorder leaves the last layer as it is."""

    def reorder(self, cache: Cache, rows: list[int]) -> Cache:
        right = super().reorder(cache, rows)
        keys, values = self.instead(cache.keys[-1], right.keys[-1]), cache.values[-1]
        return Cache([*right.keys[:-1], keys], [*right.values[:-1], values])


class RefusedAppends(Planted, breaks=("equivalence.path",), bug="ggml-org/llama.cpp/pull/9525", stealth=True):
    """A call that is refused for the capacity leaves its first token in the cache."""

    def step(self, cache: Cache, *inputs: Array) -> tuple[Array, Cache]:
        try:
            return super().step(cache, *inputs)
        except ValueError:
            if cache.length < self.config.capacity:
                self.faulty += 1
                cache.keys[:] = [np.concatenate([k, k[:, :, :1]], axis=2) for k in cache.keys]
                cache.values[:] = [np.concatenate([v, v[:, :, :1]], axis=2) for v in cache.values]
            raise


class FullUnmasked(Planted, breaks=("equivalence.full-stable",), bug="keras-team/keras/issues/23038"):
    """The forward without a cache has no causal mask."""

    def mask(self, t: int, s: int) -> Array:
        right = super().mask(t, s)
        return right if self.cached else self.instead(np.ones((t, s), bool), right)


class FullBaseByLength(
    Planted,
    breaks=("equivalence.full-stable",),
    bug="huggingface/transformers/issues/25104",
    stealth=True,
    configs=("decoder-rope",),
):
    """The forward without a cache stretches rope by the length, once that exceeds 12."""

    def rotate(self, x: Array, positions: Array) -> Array:
        right = super().rotate(x, positions)
        long = not self.cached and len(positions) > 12
        return self.instead(super().rotate(x, positions * 12 / len(positions)), right) if long else right


class FullGoesOn(
    Planted,
    breaks=("equivalence.full-stable",),
    bug="OpenNMT/CTranslate2/pull/1572",
    stealth=True,
    configs=("decoder-learned",),
):
    """The forward without a cache counts positions on from the sequence that was stepped last."""

    last = 0

    def step(self, cache: Cache, *inputs: Array) -> tuple[Array, Cache]:
        output, cache = super().step(cache, *inputs)
        self.last = cache.length if self.cached else self.last
        return output, cache

    def positions(self, cache: Cache, t: int) -> Array:
        right = super().positions(cache, t)
        return right if self.cached else self.instead(np.minimum(right + self.last, self.config.capacity - 1), right)


class FullAppends(
    Planted, breaks=("equivalence.full-stable",), bug="huggingface/transformers/issues/37078", stealth=True
):
    """The forward without a cache appends its first token to the sequence of as many rows that was stepped last."""

    last: Cache | None = None

    def step(self, cache: Cache, *inputs: Array) -> tuple[Array, Cache]:
        output, cache = super().step(cache, *inputs)
        last = self.last
        if self.cached:
            self.last = cache
        elif last is not None and len(last.keys[0]) == len(cache.keys[0]) and last.length < self.config.capacity:
            self.faulty += 1
            for layer in range(self.config.layers):
                self.append(last, layer, cache.keys[layer][:, :, :1], cache.values[layer][:, :, :1])
        return output, cache
