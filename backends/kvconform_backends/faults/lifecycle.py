"""Faults of the start, end and ownership of sequences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from kvconform_backends.faults.configs import DECODERS, LEARNED, ROPE
from kvconform_backends.faults.planted import Planted
from kvconform_backends.faults.positions import Placed, ahead
from kvconform_backends.numpy.cache import Array, Cache
from kvconform_backends.numpy.static import Buffers, NumpyStatic

RESET = "lifecycle.reset"
INDEPENDENT = "lifecycle.independent"


# --- reset ---
class ResetKeepsLength(
    Planted, breaks=(RESET, "shape.length", "equivalence.path"), kind="C6", bug="huggingface/transformers/pull/48509"
):
    """Reset zeroes keys and values but keeps the length."""

    def reset(self, cache: Cache) -> Cache:
        self.faulty += cache.length > 0
        return Cache([np.zeros_like(k) for k in cache.keys], [np.zeros_like(v) for v in cache.values])


class ResetKeepsPosition(
    Planted, breaks=(RESET,), kind="C6", bug="rasbt/LLMs-from-scratch/pull/925", conditional=True, configs=LEARNED
):
    """Reset empties the cache but not the position counter."""

    def fork(self, cache: Cache) -> Cache:
        return Placed.of(super().fork(cache), ahead(cache))

    def reset(self, cache: Cache) -> Cache:
        return Placed.of(super().reset(cache), ahead(cache) + cache.length)

    def positions(self, cache: Cache, t: int) -> Array:
        right = super().positions(cache, t)
        return self.instead(np.minimum(right + ahead(cache), self.config.capacity - 1), right)


class ResetFirstLayerOnly(
    Planted, breaks=(RESET,), kind="C6", bug="abetlen/llama-cpp-python/pull/2180", conditional=True, configs=DECODERS
):
    """Reset empties only the first layer."""

    def reset(self, cache: Cache) -> Cache:
        right = super().reset(cache)
        self.faulty += cache.length > 0
        return Cache([right.keys[0], *cache.keys[1:]], [right.values[0], *cache.values[1:]])


class LongResetKept(Planted, breaks=(RESET,), kind="C6", bug="Lightning-AI/litgpt/pull/1596", conditional=True):
    """Reset keeps the first token of a sequence of more than nine tokens."""

    def reset(self, cache: Cache) -> Cache:
        if cache.length > 9:
            self.faulty += 1
            return self.truncate(cache, 1)
        return super().reset(cache)


# --- several sequences, several layers ---
class OneCacheForAll(Planted, breaks=(INDEPENDENT,), kind="C7", bug="rajveer43/VeloxQuant-MLX/pull/59"):
    """All sequences of one batch size share a cache: the second starts where the first ended."""

    def start(self, batch: int) -> Cache:
        made: dict[int, Cache] = self.__dict__.setdefault("_made", {})
        if not self.cached:
            return super().start(batch)
        self.faulty += batch in made
        return made.setdefault(batch, super().start(batch))

    def fork(self, cache: Cache) -> Cache:
        return cache


class ClosedAreRecycled(Planted, breaks=(INDEPENDENT,), kind="C6", bug="EricLBuehler/candle-vllm/issues/6"):
    """A new sequence gets the uncleared cache of the last closed one, if that has the same number of rows."""

    closed: Cache | None = None

    def close(self, cache: Cache) -> None:
        self.closed = cache

    def start(self, batch: int) -> Cache:
        found, self.closed = (self.closed, None) if self.cached else (None, self.closed)
        if found is None or len(found.lengths) != batch:
            return super().start(batch)
        self.faulty += found.length > 0
        return found


@dataclass(eq=False)
class Owned(Cache):
    """A cache that records its sequence."""

    owner: object = None


def owned(cache: Cache, by: Cache) -> Cache:
    return Owned(cache.keys, cache.values, by.owner if isinstance(by, Owned) else None)


class LastWriterWins(
    Planted, breaks=(INDEPENDENT,), kind=("C7", "G2"), bug="ggml-org/llama.cpp/issues/27994", conditional=True
):
    """Position 0 belongs to the sequence that was stepped last, if that has the same number of rows."""

    last: Cache | None = None

    def start(self, batch: int) -> Cache:
        fresh = super().start(batch)
        return Owned(fresh.keys, fresh.values, object())

    def fork(self, cache: Cache) -> Cache:
        return owned(super().fork(cache), cache)

    def truncate(self, cache: Cache, length: int) -> Cache:
        return owned(super().truncate(cache, length), cache)

    def reorder(self, cache: Cache, rows: list[int]) -> Cache:
        return owned(super().reorder(cache, rows), cache)

    def step(self, cache: Cache, *inputs: Array, **options: Any) -> tuple[Array, Cache]:
        output, cache = super().step(cache, *inputs, **options)
        self.last = cache if self.cached else self.last
        return output, cache

    def append(self, cache: Cache, layer: int, key: Array, value: Array) -> tuple[Array, Array]:
        last, past = self.last, cache.keys[layer].shape[2]
        keys, values = super().append(cache, layer, key, value)
        other = isinstance(last, Owned) and isinstance(cache, Owned) and last.owner is not cache.owner
        if last is not None and other and past and last.length and len(last.keys[0]) == len(key):
            self.faulty += 1
            keys = np.concatenate([last.keys[layer][:, :, :1], keys[:, :, 1:]], axis=2)
        return keys, values


class LayersShareBuffers(
    Planted,
    NumpyStatic,
    breaks=("equivalence.decode", "definition.decoder"),
    kind="C7",
    bug="TrenTorch/TrenTorch/pull/141",
    conditional=True,
    configs=DECODERS,
):
    """All layers write into one pair of buffers: each attends to its own new tokens and the last layer's old ones."""

    def start(self, batch: int) -> Buffers:
        return self.merged(super().start(batch))

    def fork(self, cache: Any) -> Buffers:
        return self.merged(super().fork(cache))

    def reorder(self, cache: Any, rows: list[int]) -> Buffers:
        return self.merged(super().reorder(cache, rows))

    def merged(self, cache: Buffers) -> Buffers:
        layers = self.config.layers
        self.faulty += layers > 1 and cache.length > 0
        return Buffers(cache.keys[-1:] * layers, cache.values[-1:] * layers, cache.written)


class LongSessionStays(
    Planted,
    breaks=("shape.no-specialisation",),
    kind=("P5", "C6"),
    bug="huggingface/transformers/pull/27227",
    conditional=True,
    configs=ROPE,
):
    """A sequence of more than 16 tokens stretches RoPE for itself and for every later sequence."""

    longest = 16

    def positions(self, cache: Cache, t: int) -> Array:
        right = super().positions(cache, t)
        self.longest = max(self.longest, cache.length + t)
        return self.instead(right * 16 / self.longest, right)
