"""Faults of quantisers with groups, zero points and 8-bit floats."""

from __future__ import annotations

import numpy as np

from kvconform_backends.faults.planted import Planted
from kvconform_backends.numpy.cache import Array, Cache
from kvconform_backends.numpy.grouped import Float8, GroupsOfFour, Held, Kivi, ZeroPoint, float8

PROMPT, DECODE, SCALES, NEWEST = (f"quantised.{name}" for name in ("prefill", "decode", "scales", "residual"))


class ZeroPointForgotten(Planted, ZeroPoint, breaks=(PROMPT, DECODE), kind="Q1", bug="sgl-project/sglang/pull/3034"):
    """Codes are multiplied by their step, and the zero point is not subtracted."""

    def dequantised(self, x: Held) -> Array:
        right = super().dequantised(x)
        wrong = np.concatenate([x.codes * x.steps, x.recent], axis=2).astype(np.float32, copy=False)
        return self.instead(wrong, right)


class ZeroPointOfTheTokenBefore(
    Planted, Kivi, breaks=(DECODE, SCALES), kind="Q1", bug="sgl-project/sglang/pull/26852", conditional=True
):
    """Values quantised by a decode step count from the smallest number of the token before."""

    def append(self, cache: Cache, layer: int, key: Array, value: Array) -> tuple[Array, Array]:
        keys, values = super().append(cache, layer, key, value)
        held = cache.values[layer]
        if value.shape[2] > 1 or held.lows.shape[2] < 2:
            return keys, values
        lows = np.concatenate([held.lows[:, :, :-1], held.lows[:, :, -2:-1]], axis=2)
        cache.values[layer] = Held(held.codes, held.steps, lows, held.recent)
        return keys, self.instead(self.dequantised(cache.values[layer]), values)


class GroupScaleOfItsFirstTokens(
    Planted, Kivi, breaks=(DECODE, NEWEST), kind="Q1", bug="sgl-project/sglang/pull/34765", conditional=True
):
    """The scales of a group that decode steps fill are those of half its tokens: the later ones are clipped."""

    alone = False

    def append(self, cache: Cache, layer: int, key: Array, value: Array) -> tuple[Array, Array]:
        self.alone = key.shape[2] == 1
        return super().append(cache, layer, key, value)

    def scale(self, x: Array, along: int) -> tuple[Array, Array]:
        low, step = super().scale(x, along)
        if along != 2 or not self.alone:
            return low, step
        first_low, first_step = super().scale(x[:, :, : x.shape[2] // 2], along)
        return self.instead(first_low, low), self.instead(first_step, step)


class ScaleOfTheFirstGroup(
    Planted, GroupsOfFour, breaks=(PROMPT, DECODE), kind="Q1", bug="microsoft/onnxruntime/pull/32284"
):
    """All groups of a head are read with the scale of its first."""

    def dequantised(self, x: Held) -> Array:
        first = Held(x.codes, x.steps[..., :1] + np.zeros_like(x.steps), x.lows, x.recent)
        return self.instead(super().dequantised(first), super().dequantised(x))


class Float8Overflows(Planted, Float8, breaks=(PROMPT, DECODE), kind="Q1", bug="openvinotoolkit/openvino/pull/36751"):
    """The scale is rounded down to a power of two, and what is then too large is not clipped: it becomes NaN."""

    def rounded_codes(self, x: Array, low: Array, step: Array) -> Array:
        right = super().rounded_codes(x, low, step)
        smaller = np.ldexp(np.float32(1), np.frexp(step)[1] - 1).astype(np.float32)
        return self.instead(float8(x / smaller, self.quantiser.scheme), right)


class UnfinishedGroupLost(
    Planted, Kivi, breaks=(NEWEST, DECODE), kind="Q2", bug="rajveer43/VeloxQuant-MLX/pull/89", conditional=True
):
    """When decode steps fill a group, its first token is quantised twice and its last one is lost."""

    def grown(self, past: Held, new: Array, axis: str) -> Held:
        right = super().grown(past, new, axis)
        size = right.codes.shape[2] - past.codes.shape[2]
        if axis != "channel" or new.shape[2] > 1 or size < 2:
            return right
        codes = np.concatenate([right.codes[:, :, : -size + 1], right.codes[:, :, -size:-1]], axis=2)
        return Held(self.instead(codes, right.codes), right.steps, right.lows, right.recent)
