"""Faults of where a sequence begins and ends, and of what belongs to it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvconform_backends.faults.equivalence import TruncateKeepsPosition, Placed, ahead
from kvconform_backends.faults.planted import Planted
from kvconform_backends.numpy_cache import Array, Cache


class ResetKeepsLength(
    Planted, breaks=("lifecycle.reset", "shape.length", "equivalence.path"), bug="huggingface/transformers/pull/48509"
):
    """Reset fills keys and values with zeros, and keeps how many there are."""

    def reset(self, cache: Cache) -> Cache:
        self.faulty += cache.length > 0
        return Cache([np.zeros_like(k) for k in cache.keys], [np.zeros_like(v) for v in cache.values])


class ResetKeepsPosition(
    Planted, breaks=("lifecycle.reset",), bug="rasbt/LLMs-from-scratch/pull/925", stealth=True, configs=("decoder-learned",)
):
    """Reset empties the cache, and not the counter of positions."""

    def fork(self, cache: Cache) -> Cache:
        return Placed.of(super().fork(cache), ahead(cache))

    def reset(self, cache: Cache) -> Cache:
        return Placed.of(super().reset(cache), ahead(cache) + cache.length)

    def positions(self, cache: Cache, t: int) -> Array:
        right = super().positions(cache, t)
        return self.instead(np.minimum(right + ahead(cache), self.config.capacity - 1), right)


class ResetFirstLayerOnly(
    Planted,
    breaks=("lifecycle.reset",),
    bug="abetlen/llama-cpp-python/pull/2180",
    stealth=True,
    configs=("decoder-rope", "decoder-learned", "decoder-softcap"),
):
    """Reset empties the first layer only."""

    def reset(self, cache: Cache) -> Cache:
        right = super().reset(cache)
        self.faulty += cache.length > 0
        return Cache([right.keys[0], *cache.keys[1:]], [right.values[0], *cache.values[1:]])


class LongResetKept(Planted, breaks=("lifecycle.reset",), bug="Lightning-AI/litgpt/pull/1596", stealth=True):
    """Reset keeps the first token of a sequence of more than nine."""

    def reset(self, cache: Cache) -> Cache:
        if cache.length > 9:
            self.faulty += 1
            return self.truncate(cache, 1)
        return super().reset(cache)


class OneCacheForAll(Planted, breaks=("lifecycle.independent",), bug="rajveer43/VeloxQuant-MLX/pull/59"):
    """All sequences of one batch size are one list, made once: the second begins where the first ended."""

    def start(self, batch: int) -> Cache:
        made: dict[int, Cache] = self.__dict__.setdefault("_made", {})
        if not self.cached:
            return super().start(batch)
        self.faulty += batch in made
        return made.setdefault(batch, super().start(batch))

    def fork(self, cache: Cache) -> Cache:
        return cache


@dataclass
class Owned(Cache):
    """A cache that knows whose it is."""

    owner: object = None


class LastWriterWins(
    Planted, breaks=("lifecycle.independent",), bug="ggml-org/llama.cpp/issues/27994", stealth=True
):
    """Position 0 is mapped to the slot of whichever sequence wrote one last, if that has as many rows."""

    last: Owned | None = None

    def start(self, batch: int) -> Cache:
        fresh = super().start(batch)
        return Owned(fresh.keys, fresh.values, object())

    def fork(self, cache: Cache) -> Cache:
        assert isinstance(cache, Owned)
        return Owned(list(cache.keys), list(cache.values), cache.owner)
