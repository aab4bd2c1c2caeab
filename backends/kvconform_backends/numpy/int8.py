"""``numpy-int8``: keys and values in 8 bits, except the newest tokens of each row.

Symmetric absmax quantisation (Dettmers et al. 2022, "LLM.int8()", 2208.07339, section 2) with one scale per token and
KV head, and a residual window in full precision (Liu et al. 2024, "KIVI", 2402.02750).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from kvconform.backend import Backend
from kvconform_backends.abilities import BASIC
from kvconform_backends.numpy.cache import Array, Cache, NumpyCache
from kvconform_backends.validation import check_rows
from kvconform_specs.claims import Claims

LARGEST = 127
RESIDUAL = 4


@dataclass(frozen=True)
class Tokens:
    """Keys or values of a layer: older tokens are ``codes * steps``; the newest, at most ``RESIDUAL``, are exact."""

    codes: Array  # (b, g, s - r, d) int8
    steps: Array  # (b, g, s - r, 1) float32
    recent: Array  # (b, g, r, d) float32

    @property
    def shape(self) -> tuple[int, int, int, int]:
        b, g, r, d = self.recent.shape
        return b, g, self.codes.shape[2] + r, d


class NumpyInt8(NumpyCache):
    """Truncate is not supported: the newest remaining tokens would not be exact.

    The uncached forward does not quantise.
    """

    cache_design = None  # memory traffic not modelled
    claims = Claims(
        profiles=("attention",),
        abilities=(*BASIC, "immutable", "mask", "bytes", "macs"),
        overflow="refused",
        kv_bits=8,
        residual=RESIDUAL,
    )

    def start(self, batch: int) -> Cache:
        shape = (batch, self.config.kv_heads, 0, self.config.head_dim)
        recent = np.zeros(shape, np.float32)
        empty = Tokens(recent.astype(np.int8), recent[..., :1], recent)
        return Cache([empty], [empty])

    truncate = Backend.truncate  # not implemented: the newest remaining tokens would not be exact

    def reorder(self, cache: Cache, rows: list[int]) -> Cache:
        check_rows(rows, len(cache.lengths))
        keys, values = (Tokens(x.codes[rows], x.steps[rows], x.recent[rows]) for x in (cache.keys[0], cache.values[0]))
        return Cache([keys], [values])

    def contents(self, cache: Cache) -> list[list[tuple[Array, Array]]]:
        return [list(zip(self.dequantised(cache.keys[0]), self.dequantised(cache.values[0]), strict=True))]

    def bytes(self, cache: Cache) -> int:
        held = (cache.keys[0], cache.values[0])
        return sum(x.codes.nbytes + x.steps.nbytes + x.recent.nbytes for x in held)

    def uncached_forward(self, *inputs: Array, **options: Any) -> Array:
        return NumpyCache(self.config, self.weights).uncached_forward(*inputs, **options)

    def append(self, cache: Cache, layer: int, key: Array, value: Array) -> tuple[Array, Array]:
        """Quantises first: a step attends to the contents that it leaves in the cache."""
        cache.keys[layer] = self.grown(cache.keys[layer], key)
        cache.values[layer] = self.grown(cache.values[layer], value)
        return self.dequantised(cache.keys[layer]), self.dequantised(cache.values[layer])

    def grown(self, past: Tokens, new: Array) -> Tokens:
        recent = np.concatenate([past.recent, new], axis=2)
        leaving = max(recent.shape[2] - RESIDUAL, 0)
        steps = self.steps(recent[:, :, :leaving])
        codes = self.quantised(recent[:, :, :leaving], steps)
        return Tokens(
            np.concatenate([past.codes, codes], axis=2),
            np.concatenate([past.steps, steps], axis=2),
            recent[:, :, leaving:],
        )

    def steps(self, x: Array) -> Array:
        """``(b, g, t, 1)``: the largest magnitude of each token and head, divided by ``LARGEST``."""
        return np.asarray(np.abs(x).max(axis=-1, keepdims=True) / np.float32(LARGEST))

    def quantised(self, x: Array, steps: Array) -> Array:
        return np.rint(x / np.where(steps == 0, np.float32(1), steps)).astype(np.int8)

    def dequantised(self, x: Tokens) -> Array:
        """``(b, g, s, d)`` float32."""
        return np.concatenate([x.codes * x.steps, x.recent], axis=2)
