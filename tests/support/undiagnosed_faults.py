"""Backends for diagnoses, addressed as ``tests/support/undiagnosed_faults.py:Name``."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from kvconform.worker.registry import load
from kvconform_backends.numpy.cache import Array, Cache, NumpyCache
from kvconform_backends.numpy.grouped import float8
from kvconform_specs.reference.quantisation import FLOAT8
from kvconform_specs.tensors import rounded

BlackBox: Any = load(f"{Path(__file__).parent / 'black_boxes.py'}:BlackBox")
"""By its file: in a worker, this folder is not on the path."""
HEADS = 3


class DecodeOnePercent(NumpyCache):
    """Outputs of decode steps are 1 % too large."""

    def attention(self, query: Array, keys: Array, values: Array) -> Array:
        right = super().attention(query, keys, values)
        decodes = query.shape[2] == 1 < keys.shape[2]
        return np.asarray(right * np.float32(1.01) if decodes else right)


class SecondHead(NumpyCache):
    """From the second row on, head 1 is negative."""

    def attention(self, query: Array, keys: Array, values: Array) -> Array:
        right = super().attention(query, keys, values)
        right[1:, 1] *= -1
        return right


class Prompt23(NumpyCache):
    """A prompt of exactly 23 tokens gives zeros; no probe has one."""

    def attention(self, query: Array, keys: Array, values: Array) -> Array:
        right = super().attention(query, keys, values)
        return right * np.float32(0) if query.shape[2] == keys.shape[2] == 23 else right


class AllButTheFirstProbe(NumpyCache):
    """Wrong in every output but those of a prompt of seven tokens, the first probe; nothing is shared."""

    def attention(self, query: Array, keys: Array, values: Array) -> Array:
        right = super().attention(query, keys, values)
        return right if query.shape[0] == 1 and query.shape[2] == keys.shape[2] == 7 else -right


class RaisesOnDecode(NumpyCache):
    """Every decode step raises."""

    def step(self, cache: Cache, *inputs: Array, **keywords: Any) -> tuple[Array, Cache]:
        if cache.length and inputs[0].shape[-1] == 1:
            raise ValueError("shapes differ")
        return super().step(cache, *inputs, **keywords)


class DiesOnChunks(NumpyCache):
    def step(self, cache: Cache, *inputs: Array, **keywords: Any) -> tuple[Array, Cache]:
        if cache.length and inputs[0].shape[2] > 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(cache, *inputs, **keywords)


class WrongLoop(NumpyCache):
    """Its steps are right; each token that it generates is one too large."""

    def generate(self, tokens: Array, new: int, **options: Any) -> Array:
        right = super().generate(tokens, new, **options)
        return np.asarray((right + 1) % self.config.vocabulary)


class BoxPast(BlackBox):
    """Knows in a step how many tokens are cached."""

    past: ClassVar[int] = 0

    def step(self, cache: tuple[Array, int], x: Array) -> tuple[Array, tuple[Array, int]]:
        self.past = cache[0].shape[1]
        try:
            return super().step(cache, x)
        finally:
            self.past = 0


class BoxWithoutNewest(BoxPast):
    """Cached steps do not see the newest cached token."""

    def seen(self, s: int, cached: bool) -> Array:
        right = super().seen(s, cached)
        if cached and self.past:
            right[self.past :, self.past - 1] = False
        return right


class BoxStale(BlackBox):
    """Every sequence sees what the process ran before, which is kept in an attribute of the class."""

    before: ClassVar[list[Array]] = []

    def step(self, cache: tuple[Array, int], x: Array) -> tuple[Array, tuple[Array, int]]:
        self.before.append(x)
        rows = np.concatenate(self.before, axis=1)
        return self.forward(rows, cached=True)[:, -x.shape[1] :], (np.concatenate([cache[0], x], axis=1), cache[1])


class BoxTopLeft(BoxPast):
    """Cached steps align the causal mask to the top left."""

    def seen(self, s: int, cached: bool) -> Array:
        right = super().seen(s, cached)
        if cached and self.past:
            right[self.past :] = np.tri(s - self.past, s, dtype=bool)
        return right


class BoxScaled(BlackBox):
    """Scores of cached steps are smaller than those of its own forward, in the last head."""

    def attention(self, q: Array, k: Array, v: Array, cached: bool) -> Array:
        if cached and q.shape[1] > 6:
            q = q * np.repeat(np.float32([*[1] * (HEADS - 1), 0.7]), q.shape[2] // HEADS)
        return super().attention(q, k, v, cached)


class BoxRight(BlackBox):
    def __init__(self, config: Any, weights: Mapping[str, Array], device: str) -> None:
        super().__init__(config, weights, device)


class HalfKeys(NumpyCache):
    """Keys and values are cached in bfloat16."""

    def stored(self, x: Array) -> Array:
        return np.asarray(rounded(super().stored(x), "bfloat16"))


class Float16Cache(NumpyCache):
    """Keys and values are cached in float16, as llama.cpp does if it is not told otherwise."""

    def stored(self, x: Array) -> Array:
        return np.asarray(rounded(super().stored(x), "float16"))


class Float16Weights(NumpyCache):
    """A checkpoint that was converted to float16 without notice; steps round nothing else."""

    def __init__(self, config: Any, weights: Mapping[str, Array], device: str) -> None:
        super().__init__(config, {name: rounded(x, "float16") for name, x in weights.items()}, device)


class EightBits(NumpyCache):
    """Keys and values are cached as integers of 8 bits, with a scale for each token and head."""

    largest = 127

    def stored(self, x: Array) -> Array:
        return quantised(super().stored(x), self.largest)


class FourBits(EightBits):
    largest = 7


def quantised(x: Array, largest: int) -> Array:
    scale = np.abs(x).max(axis=-1, keepdims=True, initial=1e-30) / largest
    return np.asarray((np.round(x / scale) * scale).astype(np.float32))


class Float8(NumpyCache):
    """Keys and values are cached in an 8-bit float, with a scale for each token and head."""

    scheme = "float8_e4m3"

    def stored(self, x: Array) -> Array:
        x = super().stored(x)
        scale = np.abs(x).max(axis=-1, keepdims=True, initial=1e-30) / FLOAT8[self.scheme][2]
        return np.asarray(float8(x / scale, self.scheme) * scale, np.float32)


class Float8Wide(Float8):
    scheme = "float8_e5m2"


class RowZero(NumpyCache):
    """Cached steps of every row see the cached tokens of row 0."""

    def append(self, cache: Cache, layer: int, key: Array, value: Array) -> tuple[Array, Array]:
        past = cache.length
        keys, values = (x.copy() for x in super().append(cache, layer, key, value))
        keys[:, :, :past], values[:, :, :past] = keys[:1, :, :past], values[:1, :, :past]
        return keys, values


class OldestDropped(NumpyCache):
    """A step on a cache reads it from its second token on."""

    def mask(self, t: int, s: int) -> Array:
        right = super().mask(t, s)
        right[:, 0] &= s == t
        return np.asarray(right)


class BoxHalf(BlackBox):
    """Cached steps, prompts included, round keys, values and what they give to float16."""

    def attention(self, q: Array, k: Array, v: Array, cached: bool) -> Array:
        if not cached:
            return super().attention(q, k, v, cached)
        q, k, v = (rounded(x, "float16") for x in (q, k, v))
        return rounded(super().attention(q, k, v, cached), "float16")


class BoxFloat16Cache(BlackBox):
    """Keys and values of the tokens of earlier steps are kept in float16."""

    past = 0

    def step(self, cache: Any, x: Array) -> tuple[Array, Any]:
        self.past = cache[0].shape[1]
        return super().step(cache, x)

    def attention(self, q: Array, k: Array, v: Array, cached: bool) -> Array:
        if cached:
            k, v = (np.concatenate([self.kept(x[:, : self.past]), x[:, self.past :]], axis=1) for x in (k, v))
        return super().attention(q, k, v, cached)

    def kept(self, x: Array) -> Array:
        return rounded(x, "float16")


class BoxBfloat16Cache(BoxFloat16Cache):
    def kept(self, x: Array) -> Array:
        return rounded(x, "bfloat16")
