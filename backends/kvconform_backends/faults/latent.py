"""Faults of latent attention."""

from __future__ import annotations

import numpy as np

from kvconform_backends.faults.configs import LATENT
from kvconform_backends.faults.planted import Planted
from kvconform_backends.numpy.cache import Array, Cache

DECODE, CHUNKS, DECODER = "equivalence.decode", "equivalence.chunks", "definition.decoder"


class RotaryKeyNotCached(
    Planted, breaks=(DECODE, CHUNKS, DECODER), kind="C1", bug="sgl-project/sglang/pull/38666", configs=LATENT
):
    """Only the latent is written to the cache: the rotary keys of cached tokens are zero."""

    def on_all(self, query: Array, keys: Array, values: Array) -> Array:
        old = np.arange(values.shape[2])[:, None] < values.shape[2] - query.shape[2]
        return super().on_all(query, keys, self.instead(np.where(old, np.float32(0), values), values))


class RotaryKeyAtTheStart(
    Planted,
    breaks=(DECODE, DECODER, "definition.positions"),
    kind="P1",
    bug="pytorch/executorch/pull/2010",
    conditional=True,
    configs=LATENT,
):
    """In decode steps the rotary key is turned by position zero, the queries by their own."""

    def latent(self, layer: int, y: Array, positions: Array) -> tuple[Array, Array, Array]:
        query, latent, right = super().latent(layer, y, positions)
        if len(positions) > 1 or not positions.any():
            return query, latent, right
        return query, latent, self.instead(super().latent(layer, y, np.zeros_like(positions))[2], right)


class LatentNormalisedAgain(Planted, breaks=(DECODER,), kind="C1", bug="ml-explore/mlx-lm/pull/1509", configs=LATENT):
    """The latent is normalised when it is written, and again when it is read."""

    def on_all(self, query: Array, keys: Array, values: Array) -> Array:
        gain = self.weights[f"layers.{self.layer}.norm_latent"]
        return super().on_all(query, self.instead(self.norm(keys, gain), keys), values)


class CachedLatentsNormalisedAgain(
    Planted,
    breaks=(DECODE, CHUNKS, DECODER),
    kind="C1",
    bug="ml-explore/mlx-lm/pull/1509",
    conditional=True,
    configs=LATENT,
):
    """A step on a cache normalises the cached latents again, and stores them."""

    def append(self, cache: Cache, layer: int, key: Array, value: Array) -> tuple[Array, Array]:
        past = cache.keys[layer]
        if past.shape[2]:
            cache.keys[layer] = self.instead(self.norm(past, self.weights[f"layers.{layer}.norm_latent"]), past)
        return super().append(cache, layer, key, value)


class ScaleOfTheStillDims(
    Planted, breaks=("definition.scale", DECODER), kind="M11", bug="kekzl/imp/pull/802", configs=LATENT
):
    """Scores are divided by the root of the head dim without the rotary dims."""

    def scores(self, query: Array, keys: Array) -> Array:
        c = self.config
        wrong = query * np.float32(np.sqrt((c.head_dim + c.rotary_dim) / c.head_dim))
        return super().scores(self.instead(wrong, query), keys)
