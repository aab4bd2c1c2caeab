"""A float16 cache under a float32 model, and faults of such caches; a query that sees nothing gives the mean."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from kvconform_backends.abilities import without
from kvconform_backends.faults.configs import ROPE
from kvconform_backends.faults.planted import Planted
from kvconform_backends.numpy.cache import Array, Cache, NumpyCache
from kvconform_specs.config import Config
from kvconform_specs.tensors import rounded

PARITY = ("definition.attention", "definition.decoder")


class HalfCache(NumpyCache):
    """Keys and values are kept in float16, and everything is computed in float32."""

    claims = replace(NumpyCache.claims, dtypes=("float32",), cache_dtype="float16")

    def stored(self, x: Array) -> Array:
        return x.astype(np.float16)


class DecodeInBfloat16(Planted, HalfCache, breaks=PARITY, kind="C1", bug="oarriaga/paz/pull/415", conditional=True):
    """Tokens of decode steps are rounded to bfloat16 on their way into the float16 cache."""

    def append(self, cache: Cache, layer: int, key: Array, value: Array) -> tuple[Array, Array]:
        if key.shape[2] == 1:
            key, value = (self.instead(rounded(x, "bfloat16"), x) for x in (key, value))
        return super().append(cache, layer, key, value)


class BitsReinterpreted(Planted, HalfCache, breaks=PARITY, kind="C1", bug="vllm-project/vllm/pull/54338"):
    """The bits of float16 numbers are read as those of bfloat16 numbers."""

    def loaded(self, x: Array) -> Array:
        wrong = (x.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        return self.instead(wrong, super().loaded(x)) if self.cached else super().loaded(x)


class EightBitDecoder(NumpyCache):
    """A decoder whose keys and values are kept as 8-bit integers, with a scale for each token and head."""

    claims = replace(
        NumpyCache.claims,
        profiles=("decoder",),
        dtypes=("float32",),
        abilities=without(NumpyCache.claims, "bytes"),
        kv_bits=8,
    )
    designs: tuple[str, ...] = ("kv_source",)
    configs = ROPE

    def stored(self, x: Array) -> Array:
        steps = self.steps(x)
        return np.asarray(np.rint(x / np.where(steps == 0, np.float32(1), steps)) * steps)

    def steps(self, x: Array) -> Array:
        return np.asarray(np.abs(x).max(axis=-1, keepdims=True) / np.float32(127))


class ValuesWithStepsOfKeys(
    Planted, EightBitDecoder, breaks=("definition.decoder",), kind="Q1", bug="sgl-project/sglang/pull/26852"
):
    """Values are multiplied by the steps of the keys."""

    def append(self, cache: Cache, layer: int, key: Array, value: Array) -> tuple[Array, Array]:
        steps, own = self.steps(key), self.steps(value)
        return super().append(cache, layer, key, self.instead(self.stored(value) / own * steps, value))


class MeanOfMasked(NumpyCache):
    """A mask of the lowest finite number: a query that sees no key weighs all keys of the sequence alike."""

    claims = replace(NumpyCache.claims, sees_nothing="finite")

    @classmethod
    def refuses(cls, config: Config, device: str) -> str | None:
        return "a sink is not implemented" if config.sink is not None else super().refuses(config, device)

    def softmax(self, scores: Array) -> Array:
        lowest = np.finfo(np.float32).min
        scores = np.maximum(scores, lowest)
        powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
        return np.asarray(powers / powers.sum(axis=-1, keepdims=True))


class NothingIsNan(
    Planted, MeanOfMasked, breaks=("numerics.empty-row",), kind="M8", bug="pytorch/pytorch/issues/103963"
):
    """A query that sees no key gives NaN."""

    def softmax(self, scores: Array) -> Array:
        right, nothing = super().softmax(scores), np.isneginf(scores).all(axis=-1, keepdims=True)
        return self.instead(np.where(nothing, np.float32(np.nan), right), right)
