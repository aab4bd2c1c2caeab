"""Faults of memory and axes: views that are read as if they were dense, and axes that are told by their sizes."""

from __future__ import annotations

import numpy as np
from numpy.lib.stride_tricks import as_strided

from kvconform_backends.faults.planted import Planted
from kvconform_backends.numpy.cache import Array, Cache

ATTENTION = ("attention-gqa", "attention-window", "attention-softcap", "attention-sink")


def dense(x: Array) -> Array:
    """The numbers that lie at ``x`` in memory one behind the other; ``x`` itself where it repeats some of them."""
    if 0 in x.strides or x.flags.c_contiguous:
        return x
    strides = np.cumprod((1, *x.shape[:0:-1]))[::-1] * x.itemsize
    return as_strided(x, x.shape, tuple(int(n) for n in strides), writeable=False)


# --- strides ---
class ReadAsDense(Planted, breaks=("layout.strides",), kind="H3", bug="pytorch/pytorch/issues/112577"):
    """Inputs that are views are read as if their numbers lay one behind the other."""

    def run(self, cache: Cache, inputs: tuple[Array, ...], mask: Array | None = None) -> Array:
        return super().run(cache, tuple(self.instead(dense(x), x) for x in inputs), mask)


class DecodeValuesReadAsDense(
    Planted,
    breaks=("layout.strides",),
    kind="H3",
    bug="torch-spyre/torch-spyre/issues/4331",
    conditional=True,
    configs=ATTENTION,
):
    """The values of a decode step are read as if their numbers lay one behind the other."""

    def append(self, cache: Cache, layer: int, key: Array, value: Array) -> tuple[Array, Array]:
        return super().append(cache, layer, key, self.instead(dense(value), value) if key.shape[2] == 1 else value)


class SharedKeysScaledForEach(
    Planted,
    breaks=("layout.strides",),
    kind="H3",
    bug="pytorch/pytorch/issues/191937",
    conditional=True,
    configs=ATTENTION,
):
    """Keys that all rows share are scaled in place, once for each row."""

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
    configs=ATTENTION,
):
    """The caller's mask is read without the stride of its rows: the first row's serves all."""

    def visible(self, t: int, s: int) -> Array:
        right = super().visible(t, s)
        return right if self.allowed is None else self.instead(np.broadcast_to(right[:1], right.shape), right)


# --- equal sizes ---
class HeadsTakenForTokens(
    Planted, breaks=("layout.equal-sizes",), kind="H2", bug="ByteDance-Seed/VeOmni/pull/162", configs=ATTENTION
):
    """Keys of as many new tokens as there are KV heads are taken for tokens before heads."""

    def append(self, cache: Cache, layer: int, key: Array, value: Array) -> tuple[Array, Array]:
        square = key.shape[1] == key.shape[2]
        return super().append(cache, layer, self.instead(key.swapaxes(1, 2), key) if square else key, value)


class SquareBatchTurned(
    Planted, breaks=("layout.equal-sizes",), kind="H2", bug="PaddlePaddle/PaddleNLP/issues/6672", conditional=True
):
    """A chunk of as many tokens as there are rows, on a cache that is not empty, has its rows and tokens swapped."""

    def append(self, cache: Cache, layer: int, key: Array, value: Array) -> tuple[Array, Array]:
        if cache.keys[layer].shape[2] and key.shape[0] == key.shape[2]:
            value = self.instead(value.swapaxes(0, 2), value)
        return super().append(cache, layer, key, value)


class RepeatedAlongTokens(
    Planted,
    breaks=("layout.equal-sizes",),
    kind="H2",
    bug="PrimeIntellect-ai/prime-rl/pull/2681",
    conditional=True,
    configs=ATTENTION,
):
    """Decode steps on as many tokens as there are KV heads repeat values along the tokens, for the heads of a group."""

    def attention(self, query: Array, keys: Array, values: Array) -> Array:
        square = query.shape[2] == 1 < values.shape[1] == values.shape[2]
        return super().attention(query, keys, self.instead(values.swapaxes(1, 2), values) if square else values)
