"""Faults of sliding windows: their width, code paths that ignore them, and ring buffers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from kvconform_backends.faults.configs import LEARNED, WINDOWED
from kvconform_backends.faults.planted import Planted
from kvconform_backends.numpy.cache import Array
from kvconform_backends.numpy.ring import NumpyRing, Rings
from kvconform_backends.validation import check_length
from kvconform_specs.config import Config

WIDTH = "window.width"
HYBRID = "window.hybrid"
LONG_CHUNK = "window.long-chunk"
STEP_BY_STEP = "window.step-by-step"
TRUNCATE = "lifecycle.truncate"


# --- width ---
class RingOneSlotMore(
    Planted, NumpyRing, breaks=(WIDTH, "definition.attention"), kind="W1", bug="zml/zml/pull/763", configs=WINDOWED
):
    """Ring and mask have one slot more than the window: prompt, chunk and decode agree with each other."""

    def __init__(self, config: Config, weights: Mapping[str, Array], device: str = "cpu") -> None:
        super().__init__(replace(config, window=(config.window or 0) + 1), weights, device)

    def mask(self, t: int, s: int) -> Array:
        right, window = super().mask(t, s), self.config.window_of(self.layer)
        self.faulty += bool(window and (right & (self.behind(t, s) == window - 1)).any())
        return right


class ChunkWindowShort(
    Planted, breaks=(WIDTH,), kind="W1", bug="ml-explore/mlx-lm/pull/390", conditional=True, configs=WINDOWED
):
    """In chunks on a non-empty cache, the window is one token too short."""

    def mask(self, t: int, s: int) -> Array:
        right, window = super().mask(t, s), self.config.window_of(self.layer)
        return self.instead(right & (self.behind(t, s) < window - 1), right) if window and s > t > 1 else right


class WindowNeverApplied(
    Planted, breaks=(WIDTH, HYBRID), kind="W2", bug="huggingface/transformers/pull/35691", configs=WINDOWED
):
    """No layer applies its window."""

    def mask(self, t: int, s: int) -> Array:
        return self.instead(self.behind(t, s) >= 0, super().mask(t, s))


class PromptWindowLost(
    Planted, breaks=(LONG_CHUNK,), kind="W2", bug="sonos/tract/pull/2327", conditional=True, configs=WINDOWED
):
    """The first step of a sequence ignores the window; later steps apply it."""

    def mask(self, t: int, s: int) -> Array:
        right = super().mask(t, s)
        return self.instead(self.behind(t, s) >= 0, right) if s == t else right


class WindowLostWithMask(
    Planted,
    breaks=("numerics.caller-mask",),
    kind=("W2", "M4"),
    bug="enpasos/jax2onnx/pull/217",
    conditional=True,
    configs=WINDOWED[:2],
):
    """The caller's mask replaces the window."""

    def mask(self, t: int, s: int) -> Array:
        right = super().mask(t, s)
        return right if self.allowed is None else self.instead(self.behind(t, s) >= 0, right)


# --- step-by-step ---
class RingReadBySlot(
    Planted,
    NumpyRing,
    breaks=(STEP_BY_STEP, "contents.round-trip"),
    kind="W3",
    bug="EricLBuehler/mistral.rs/issues/246",
    configs=WINDOWED[:2],
):
    """A ring that has wrapped is read in slot order instead of token order."""

    def slots(self, positions: Array, window: int) -> Array:
        right = super().slots(positions, window)
        return self.instead(np.arange(window), right) if len(positions) == window else right

    def write(self, cache: Any, layer: int, ring: Array, new: Array) -> None:
        window, t = ring.shape[2], new.shape[2]
        columns = np.arange(max(t - window, 0), t)
        ring[:, :, (cache.written + columns) % window] = self.stored(new[:, :, columns])


class NewestSlotOverwritten(
    Planted,
    NumpyRing,
    breaks=(STEP_BY_STEP,),
    kind="W3",
    bug="huggingface/transformers/pull/38046",
    conditional=True,
    configs=WINDOWED,
):
    """A decode step at an exactly full window overwrites the newest token instead of evicting the oldest."""

    def write(self, cache: Any, layer: int, ring: Array, new: Array) -> None:
        window = ring.shape[2]
        if new.shape[2] == 1 and cache.written == window:
            self.faulty += 1
            ring[:, :, window - 1] = self.stored(new)[:, :, 0]
        else:
            super().write(cache, layer, ring, new)


class WindowOfStep(Planted, breaks=(STEP_BY_STEP,), kind="W5", bug="keras-team/keras-hub/pull/1738", configs=WINDOWED):
    """The window is limited to the step: a decode step sees only itself."""

    def mask(self, t: int, s: int) -> Array:
        right = super().mask(t, s)
        return self.instead(right & (self.behind(t, s) < t), right) if self.config.window_of(self.layer) else right


class ValidByWrappedSlot(
    Planted,
    NumpyRing,
    breaks=(STEP_BY_STEP,),
    kind="W5",
    bug="quic/efficient-transformers/pull/1235",
    conditional=True,
    configs=WINDOWED,
):
    """Once a ring has wrapped, a decode step treats the slots after its own as empty."""

    written = 0

    def append(self, cache: Any, layer: int, key: Array, value: Array) -> tuple[Array, Array]:
        self.written = cache.written
        return super().append(cache, layer, key, value)

    def mask(self, t: int, s: int) -> Array:
        right, window = super().mask(t, s), self.config.window_of(self.layer)
        if t > 1 or window is None or self.written < window:
            return right
        positions = np.arange(self.written + 1 - s, self.written + 1)
        return self.instead(right & (positions % window <= self.written % window), right)


# --- long-chunk ---
class ChunkEvictsFirst(
    Planted, NumpyRing, breaks=(LONG_CHUNK,), kind="W4", bug="Lightning-AI/litgpt/issues/2182", configs=WINDOWED
):
    """A chunk is written into the ring before it attends: its first queries miss the tokens it evicted."""

    slack = 1  # windows that remain when a chunk attends

    def append(self, cache: Any, layer: int, key: Array, value: Array) -> tuple[Array, Array]:
        keys, values = super().append(cache, layer, key, value)
        window = self.config.window_of(layer)
        if window is None or key.shape[2] == 1:
            return keys, values
        kept = slice(max(keys.shape[2] - self.slack * window, 0), None)
        return self.instead(keys[:, :, kept], keys), values[:, :, kept]


class RingTooSmallForChunk(
    ChunkEvictsFirst,
    breaks=(LONG_CHUNK,),
    kind="W4",
    bug="pytorch/executorch/pull/22358",
    conditional=True,
    configs=WINDOWED,
):
    """The ring has two windows of slots, too few for a chunk longer than one window."""

    slack = 2


class FirstOfDuplicatesWins(
    Planted,
    NumpyRing,
    breaks=(LONG_CHUNK,),
    kind="W4",
    bug="pytorch/executorch/pull/19213",
    conditional=True,
    configs=WINDOWED,
):
    """If a chunk is longer than the ring, each slot keeps the first token written to it instead of the last."""

    def write(self, cache: Any, layer: int, ring: Array, new: Array) -> None:
        window = ring.shape[2]
        self.faulty += new.shape[2] > window
        super().write(cache, layer, ring, new[:, :, :window])


# --- hybrid ---
class WindowInEveryLayer(
    Planted, breaks=(HYBRID, "definition.decoder"), kind="W6", bug="pytorch/executorch/pull/21635", configs=LEARNED
):
    """Layers without a window use that of the others."""

    def mask(self, t: int, s: int) -> Array:
        right = super().mask(t, s)
        return self.instead(right & (self.behind(t, s) < (self.config.window or s)), right)


class DecodeMaskOfFirstLayer(
    Planted, breaks=(HYBRID,), kind="W6", bug="huggingface/transformers/pull/39737", conditional=True, configs=LEARNED
):
    """Decode steps on more than twelve tokens use the first layer's mask for all layers."""

    def mask(self, t: int, s: int) -> Array:
        right, window = super().mask(t, s), self.config.window_of(0)
        return self.instead(self.behind(t, s) < window, right) if window and t == 1 and s > 13 else right


class RingTruncateIgnored(
    Planted,
    NumpyRing,
    breaks=(TRUNCATE, HYBRID, "lifecycle.rollback"),
    kind="C9",
    bug="ml-explore/mlx-lm/pull/1109",
    configs=WINDOWED,
):
    """A ring claims truncate but ignores it."""

    claims = replace(NumpyRing.claims, abilities=(*NumpyRing.claims.abilities, "truncate"))

    def truncate(self, cache: Any, length: int) -> Rings:
        check_length(length, cache.written)
        return self.cut(cache, length)

    def cut(self, cache: Rings, length: int) -> Rings:
        self.faulty += length < cache.written
        return cache


class RingPointerTurnedBack(
    RingTruncateIgnored,
    breaks=(TRUNCATE,),
    kind="C9",
    bug="ml-explore/mlx-lm/issues/1776",
    conditional=True,
    configs=WINDOWED,
):
    """Truncate moves the ring's pointer back: correct until the ring has wrapped, since evicted tokens are gone."""

    def cut(self, cache: Rings, length: int) -> Rings:
        window = self.config.window or 0
        self.faulty += (
            cache.written > window and 0 < length < cache.written - 1
        )  # stepping back by one needs no evicted token
        for layer in self.layers():
            if self.config.window_of(layer) is None:
                cache.keys[layer] = cache.keys[layer][:, :, :length]
                cache.values[layer] = cache.values[layer][:, :, :length]
        cache.written = length
        return cache
