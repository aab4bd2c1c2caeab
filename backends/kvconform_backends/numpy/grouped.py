"""Quantised caches with scales of groups: by token along the head dim or by channel over tokens, with and without zero
points, in integers and in 8-bit floats.

After KIVI (Liu et al. 2024, 2402.02750): a channel's scale belongs to ``group`` tokens, and the newest stay exact
until their group is full. 8-bit floats after Micikevicius et al. 2022 (2209.05433). These classes are small on purpose,
to compare your own quantiser with.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from kvconform.backend import Backend
from kvconform_backends.abilities import without
from kvconform_backends.numpy.cache import Array, Cache, NumpyCache
from kvconform_backends.numpy.int8 import NumpyInt8
from kvconform_backends.validation import check_rows
from kvconform_specs.quantisers import Quantiser

LARGEST = {"float8_e4m3": 448.0, "float8_e5m2": 57344.0}
SIGNIFICAND = {"float8_e4m3": 4, "float8_e5m2": 3}
LOWEST_EXPONENT = {"float8_e4m3": -6, "float8_e5m2": -14}


@dataclass(frozen=True)
class Held:
    """Keys or values of a layer: older tokens are ``codes * steps + lows``, ``(b, g, n, d)`` each with the scales of a
    group repeated; the newest are exact, ``(b, g, r, d)``."""

    codes: Array
    steps: Array
    lows: Array
    recent: Array

    @property
    def shape(self) -> tuple[int, int, int, int]:
        b, g, r, d = self.recent.shape
        return b, g, self.codes.shape[2] + r, d

    def of(self, rows: list[int]) -> Held:
        return Held(self.codes[rows], self.steps[rows], self.lows[rows], self.recent[rows])


class Grouped(NumpyCache):
    """Base class. Truncate is not supported, as in ``numpy-int8``; the uncached forward does not quantise."""

    cache_design = None  # memory traffic not modelled
    configs = ("attention-gqa", "attention-window")
    claims = replace(NumpyInt8.claims, residual=0, abilities=without(NumpyInt8.claims, "bytes"))

    @property
    def quantiser(self) -> Quantiser:
        return self.claims.quantiser

    def start(self, batch: int) -> Cache:
        recent = np.zeros((batch, self.config.kv_heads, 0, self.config.head_dim), np.float32)
        return Cache([Held(recent, recent, recent, recent)], [Held(recent, recent, recent, recent)])

    truncate = Backend.truncate  # not implemented: tokens of a full group are no longer exact

    def reorder(self, cache: Cache, rows: list[int]) -> Cache:
        check_rows(rows, len(cache.lengths))
        return Cache([cache.keys[0].of(rows)], [cache.values[0].of(rows)])

    def contents(self, cache: Cache) -> list[list[tuple[Array, Array]]]:
        return [list(zip(self.dequantised(cache.keys[0]), self.dequantised(cache.values[0]), strict=True))]

    def uncached_forward(self, *inputs: Array, **options: Any) -> Array:
        return NumpyCache(self.config, self.weights).uncached_forward(*inputs, **options)

    def append(self, cache: Cache, layer: int, key: Array, value: Array) -> tuple[Array, Array]:
        """Quantises first: a step attends to the contents that it leaves in the cache."""
        cache.keys[layer] = self.grown(cache.keys[layer], key, self.quantiser.keys)
        cache.values[layer] = self.grown(cache.values[layer], value, self.quantiser.values)
        return self.dequantised(cache.keys[layer]), self.dequantised(cache.values[layer])

    def grown(self, past: Held, new: Array, axis: str) -> Held:
        recent = np.concatenate([past.recent, new], axis=2)
        leaving = max(recent.shape[2] - self.claims.residual, 0)
        if axis == "channel":
            leaving -= leaving % (self.quantiser.group or 1)
        coded = self.coded(recent[:, :, :leaving], axis)
        held = (past.codes, past.steps, past.lows)
        codes, steps, lows = (np.concatenate(pair, axis=2) for pair in zip(held, coded, strict=True))
        return Held(codes, steps, lows, recent[:, :, leaving:])

    def coded(self, x: Array, axis: str) -> tuple[Array, Array, Array]:
        """Codes, steps and lows of tokens ``(b, g, t, d)``, the last two repeated for every number of a group."""
        along = 2 if axis == "channel" else 3
        size = self.quantiser.group or x.shape[along]
        starts = range(0, x.shape[along], size)
        parts = [self.of_group(np.take(x, range(i, min(i + size, x.shape[along])), along), along) for i in starts]
        if not x.shape[2]:
            return x, x, x
        codes, steps, lows = (np.concatenate([part[i] for part in parts], axis=along) for i in range(3))
        return codes, steps, lows

    def of_group(self, x: Array, along: int) -> tuple[Array, Array, Array]:
        low, step = self.scale(x, along)
        safe = np.where(step == 0, np.float32(1), step)
        return self.rounded_codes(x, low, safe), step + np.zeros_like(x), low + np.zeros_like(x)

    def scale(self, x: Array, along: int) -> tuple[Array, Array]:
        """The number that code zero stands for, and the step, of a group along an axis."""
        q, bits = self.quantiser, self.claims.kv_bits
        top = np.abs(x).max(axis=along, keepdims=True)
        if q.scheme in LARGEST:
            return np.zeros_like(top), top / np.float32(LARGEST[q.scheme])
        if q.zero_point == "none":
            return np.zeros_like(top), top / np.float32(2 ** (bits - 1) - 1)
        low, high = x.min(axis=along, keepdims=True), x.max(axis=along, keepdims=True)
        if q.zero_point == "integer":
            low, high = np.minimum(low, np.float32(0)), np.maximum(high, np.float32(0))
        step = (high - low) / np.float32(2**bits - 1)
        if q.zero_point == "integer":
            low = np.rint(low / np.where(step == 0, np.float32(1), step)) * step
        return low, step

    def rounded_codes(self, x: Array, low: Array, step: Array) -> Array:
        q, bits = self.quantiser, self.claims.kv_bits
        if q.scheme in LARGEST:
            return float8(np.clip(x / step, -LARGEST[q.scheme], LARGEST[q.scheme]), q.scheme)
        if q.zero_point == "none":
            return np.rint(x / step)
        return np.clip(np.rint((x - low) / step), 0, 2**bits - 1)

    def dequantised(self, x: Held) -> Array:
        """``(b, g, s, d)`` float32."""
        return np.concatenate([x.codes * x.steps + x.lows, x.recent], axis=2).astype(np.float32, copy=False)


def float8(x: Array, scheme: str) -> Array:
    """Rounded to nearest even in an 8-bit float, held as float32; what is too large becomes NaN."""
    _significand, exponent = np.frexp(x)
    unit = np.ldexp(np.float32(1), np.maximum(exponent - 1, LOWEST_EXPONENT[scheme]) - SIGNIFICAND[scheme] + 1)
    made = np.rint(x / unit) * unit
    return np.where(np.abs(made) > LARGEST[scheme], np.float32(np.nan), made).astype(np.float32)


def claimed(bits: int = 8, residual: int = 0, **fields: Any) -> Any:
    return replace(Grouped.claims, kv_bits=bits, residual=residual, quantiser=Quantiser(**fields))


class GroupsOfFour(Grouped):
    """Symmetric 8-bit integers, one scale for every four numbers of a head."""

    claims = claimed(group=4)


class Kivi(Grouped):
    """4-bit integers that count from the smallest number; keys by channel in groups of four tokens, values by token."""

    claims = claimed(bits=4, keys="channel", group=4, zero_point="minimum")


class ZeroPoint(Grouped):
    """8-bit integers with an integer that stands for zero, one scale for each token and head; three exact tokens."""

    claims = claimed(residual=3, zero_point="integer")


class Float8(Grouped):
    """8-bit floats of four bits of significand."""

    claims = claimed(scheme="float8_e4m3")


class Float8Wide(Grouped):
    """8-bit floats of three bits of significand, one scale for every four numbers of a head."""

    claims = claimed(scheme="float8_e5m2", group=4)


CONTROLS = (GroupsOfFour, Kivi, ZeroPoint, Float8, Float8Wide)
