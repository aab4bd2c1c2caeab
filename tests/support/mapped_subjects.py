"""Backends for visibility maps, right or wrong in one way, addressed as ``tests/support/mapped_subjects.py:Name``."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from kvconform_backends.numpy.cache import Array, Cache, NumpyCache
from kvconform_specs.claims import Claims
from kvconform_specs.config import Config
from kvconform_specs.tensors import weights

MODEL = Config("decoder", 4, 2, 6, layers=1, width=14, vocabulary=37, positions="rope", window=4, seed=5)


class Box(NumpyCache):
    """A black box: a decoder with a window of its own, of which its config tells nothing."""

    claims = Claims(profiles=("decoder",), abilities=("uncached_forward", "length", "reset"), reference="self")
    configs: Mapping[str, Config] = {"decoder-self": replace(MODEL, window=None)}
    recognised, assumed, source = "a decoder", (), ""

    def __init__(self, config: Config, _weights: Mapping[str, Array], device: str) -> None:
        super().__init__(MODEL, weights(MODEL))

    def perturbed(self, storage: float, accumulation: float, seed: int) -> Box:
        noise, other = np.random.default_rng(seed), copy.copy(self)
        other.weights = {
            name: w
            * (1 + (storage + accumulation * np.sqrt(w.shape[0] if w.ndim > 1 else 1)) * noise.uniform(-1, 1, w.shape))
            for name, w in self.weights.items()
        }
        return other

    def uncached_forward(self, *inputs: Array) -> Array:
        return np.asarray(super().uncached_forward(*inputs), np.float32)


class BoxWithALongerWindow(Box):
    def mask(self, t: int, s: int) -> Array:
        behind = self.behind(t, s)
        return (behind >= 0) & (behind < (4 if s == t else 5))


class BoxWithoutAMask(Box):
    """Its own forward sees the future, so that it is no truth."""

    def mask(self, t: int, s: int) -> Array:
        return np.ones((t, s), bool)


class BoxTopLeft(Box):
    def mask(self, t: int, s: int) -> Array:
        return super().mask(t, s) if s == t else np.tri(t, s, dtype=bool)


class LastAlone(NumpyCache):
    """Gives the output of the newest token alone."""

    claims = Claims(profiles=("attention", "decoder"), abilities=("uncached_forward",), returns="last")

    def step(self, cache: Cache, *inputs: Array, **keywords: Any) -> tuple[Array, Cache]:
        output, cache = super().step(cache, *inputs, **keywords)
        return output[:, -1:] if self.config.profile == "decoder" else output[:, :, -1:], cache

    def uncached_forward(self, *inputs: Array) -> Array:
        return NumpyCache.step(self, self.start(inputs[0].shape[0]), *inputs)[0]


class OneByOne(NumpyCache):
    claims = Claims(profiles=("attention",), max_chunk=1, max_batch=1, max_sequences=1)


class InTwos(NumpyCache):
    claims = Claims(profiles=("attention",), max_chunk=2)


class RefusesChunks(NumpyCache):
    """Several tokens on a cache that is not empty are too much for its mask."""

    claims = Claims(profiles=("attention",))

    def step(self, cache: Cache, *inputs: Array, **keywords: Any) -> tuple[Array, Cache]:
        if cache.length and inputs[0].shape[2] > 1:
            raise RuntimeError("masks <&> tokens\x00 of other sizes")
        return super().step(cache, *inputs, **keywords)


class Dies(NumpyCache):
    def step(self, cache: Cache, *inputs: Array, **keywords: Any) -> tuple[Array, Cache]:
        raise SystemExit(3)


class Whispers(NumpyCache):
    """Outputs differ from run to run by a bit, as those of sums in any order."""

    claims = Claims(profiles=("attention",))

    def step(self, cache: Cache, *inputs: Array, **keywords: Any) -> tuple[Array, Cache]:
        output, cache = super().step(cache, *inputs, **keywords)
        ends = np.where(np.random.default_rng().random(output.shape) < 0.5, -np.inf, np.inf)
        return np.nextafter(output, ends.astype(np.float32)), cache


class Shouts(Whispers):
    """Outputs differ from run to run, and the token has no part in it."""

    def step(self, cache: Cache, *inputs: Array, **keywords: Any) -> tuple[Array, Cache]:
        output, cache = NumpyCache.step(self, cache, *inputs, **keywords)
        return output + np.random.default_rng().normal(size=output.shape).astype(np.float32), cache


class DividesByZero(NumpyCache):
    """The fifth token's output is no number."""

    def step(self, cache: Cache, *inputs: Array, **keywords: Any) -> tuple[Array, Cache]:
        past, t = cache.length, inputs[0].shape[2]
        output, cache = super().step(cache, *inputs, **keywords)
        if past <= 4 < past + t:
            output[:, :, 4 - past] = np.nan
        return output, cache


class NoOldest(NumpyCache):
    """From 14 cached and new tokens on, no cached step sees token 0."""

    def mask(self, t: int, s: int) -> Array:
        right = super().mask(t, s)
        right[:, 0] &= s < 14 or s == t
        return np.asarray(right)
