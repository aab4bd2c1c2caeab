"""Faults of memory layout: views read as if dense, and axes identified by their sizes."""

from __future__ import annotations

import numpy as np
from numpy.lib.stride_tricks import as_strided

from kvconform_backends.faults.configs import LAYERS
from kvconform_backends.faults.planted import Planted
from kvconform_backends.numpy.cache import Array, Cache

STRIDES = "layout.strides"
EQUAL_SIZES = "layout.equal-sizes"


def dense(x: Array) -> Array:
    """The consecutive numbers in memory at ``x``; ``x`` itself if it is dense or broadcast."""
    if 0 in x.strides or x.flags.c_contiguous:
        return x
    strides = np.cumprod((1, *x.shape[:0:-1]))[::-1] * x.itemsize
    return as_strided(x, x.shape, tuple(int(n) for n in strides), writeable=False)


# --- strides ---
class ReadAsDense(Planted, breaks=(STRIDES,), kind="H3", bug="pytorch/pytorch/issues/112577"):
    """Inputs that are views are read as if they were contiguous."""

    def run(self, cache: Cache, inputs: tuple[Array, ...], mask: Array | None = None) -> Array:
        return super().run(cache, tuple(self.instead(dense(x), x) for x in inputs), mask)


class DecodeValuesReadAsDense(
    Planted, breaks=(STRIDES,), kind="H3", bug="torch-spyre/torch-spyre/issues/4331", conditional=True, configs=LAYERS
):
    """The values of a decode step are read as if they were contiguous."""

    def append(self, cache: Cache, layer: int, key: Array, value: Array) -> tuple[Array, Array]:
        return super().append(cache, layer, key, self.instead(dense(value), value) if key.shape[2] == 1 else value)


class SharedKeysScaledForEach(
    Planted, breaks=(STRIDES,), kind="H3", bug="pytorch/pytorch/issues/191937", conditional=True, configs=LAYERS
):
    """Keys broadcast across rows are scaled in place, once per row."""

    def append(self, cache: Cache, layer: int, key: Array, value: Array) -> tuple[Array, Array]:
        if key.strides[0] == 0 and self.batch > 1:
            key = self.instead(key * np.float32(2 ** (self.batch - 1)), key)
        return super().append(cache, layer, key, value)


class MaskOfFirstRow(
    Planted,
    breaks=("numerics.caller-mask",),
    kind="H3",
    bug="pytorch/pytorch/pull/184180",
    conditional=True,
    configs=LAYERS,
):
    """The row stride of the caller's mask is ignored: the first row's mask is used for all."""

    def visible(self, t: int, s: int) -> Array:
        right = super().visible(t, s)
        return right if self.allowed is None else self.instead(np.broadcast_to(right[:1], right.shape), right)


# --- equal sizes ---
class HeadsTakenForTokens(
    Planted, breaks=(EQUAL_SIZES,), kind="H2", bug="ByteDance-Seed/VeOmni/pull/162", configs=LAYERS
):
    """If the number of new tokens equals the number of KV heads, keys are read as (tokens, heads)."""

    def append(self, cache: Cache, layer: int, key: Array, value: Array) -> tuple[Array, Array]:
        square = key.shape[1] == key.shape[2]
        return super().append(cache, layer, self.instead(key.swapaxes(1, 2), key) if square else key, value)


class SquareBatchTurned(
    Planted, breaks=(EQUAL_SIZES,), kind="H2", bug="PaddlePaddle/PaddleNLP/issues/6672", conditional=True
):
    """In a chunk on a non-empty cache with as many tokens as rows, rows and tokens are swapped."""

    def append(self, cache: Cache, layer: int, key: Array, value: Array) -> tuple[Array, Array]:
        if cache.keys[layer].shape[2] and key.shape[0] == key.shape[2]:
            value = self.instead(value.swapaxes(0, 2), value)
        return super().append(cache, layer, key, value)


class RepeatedAlongTokens(
    Planted,
    breaks=(EQUAL_SIZES,),
    kind="H2",
    bug="PrimeIntellect-ai/prime-rl/pull/2681",
    conditional=True,
    configs=LAYERS,
):
    """Decode steps on as many tokens as there are KV heads repeat values along the token axis."""

    def attention(self, query: Array, keys: Array, values: Array) -> Array:
        square = query.shape[2] == 1 < values.shape[1] == values.shape[2]
        return super().attention(query, keys, self.instead(values.swapaxes(1, 2), values) if square else values)
