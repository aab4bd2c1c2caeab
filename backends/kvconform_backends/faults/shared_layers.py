"""Faults of layers that read another layer's keys and values."""

from __future__ import annotations

import numpy as np

from kvconform_backends.faults.configs import SHARED
from kvconform_backends.faults.planted import Planted
from kvconform_backends.numpy.cache import Array, Cache

DECODE, DECODER = "equivalence.decode", "definition.decoder"


class SharedLayerAppendsAgain(
    Planted,
    breaks=(DECODE, DECODER, "shape.length"),
    kind="C13",
    bug="vllm-project/vllm-ascend/pull/11791",
    configs=SHARED,
):
    """A layer that shares a cache appends to it as well: each token is held twice."""

    def attend_shared(self, cache: Cache, layer: int, query: Array) -> Array:
        output, source, t = super().attend_shared(cache, layer, query), self.config.source_of(layer), query.shape[2]
        for held in (cache.keys, cache.values):
            held[source] = self.instead(np.concatenate([held[source], held[source][:, :, -t:]], axis=2), held[source])
        return output


class SharedLayerReadsItsNeighbour(
    Planted, breaks=(DECODER,), kind="C13", bug="ovg-project/kvcached/pull/472", configs=SHARED
):
    """A layer that shares a cache reads that of the layer before it instead of the one with the same window."""

    def attend_shared(self, cache: Cache, layer: int, query: Array) -> Array:
        self.layer, source = layer, self.config.source_of(layer)
        keys = self.instead(cache.keys[layer - 1], cache.keys[source])
        return self.on_all(query, keys, cache.values[layer - 1])


class SharedLayerLacksTheNewTokens(
    Planted, breaks=(DECODE, DECODER), kind="C13", bug="ml-explore/mlx-lm/issues/1384", conditional=True, configs=SHARED
):
    """In decode steps a layer that shares a cache reads it as it was before the step."""

    def attend_shared(self, cache: Cache, layer: int, query: Array) -> Array:
        source = self.config.source_of(layer)
        if query.shape[2] > 1 or cache.keys[source].shape[2] < 2:
            return super().attend_shared(cache, layer, query)
        self.layer, self.faulty = layer, self.faulty + 1
        return self.on_all(query, cache.keys[source][:, :, :-1], cache.values[source][:, :, :-1])


class UncachedForwardSharesNothing(
    Planted, breaks=(DECODE, "equivalence.chunks"), kind="C13", bug="ml-explore/mlx-lm/issues/1674", configs=SHARED
):
    """Without a cache a layer that should read another one's keys and values attends to the last own layer's."""

    def attend_shared(self, cache: Cache, layer: int, query: Array) -> Array:
        if self.cached:
            return super().attend_shared(cache, layer, query)
        own = self.config.caching[-1]
        self.layer = layer
        keys = self.instead(cache.keys[own], cache.keys[self.config.source_of(layer)])
        return self.on_all(query, keys, cache.values[own])
