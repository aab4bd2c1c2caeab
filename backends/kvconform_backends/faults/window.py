"""Faults of windows: their width, the paths that forget them, and the rings that evict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from kvconform_backends.faults.planted import Planted
from kvconform_backends.numpy.cache import Array
from kvconform_backends.numpy.ring import NumpyRing, Rings
from kvconform_specs.config import Config

WINDOWS = ("attention-window", "attention-sink", "decoder-learned")
HYBRID = ("decoder-learned",)


# --- width ---
class RingOneSlotMore(
    Planted,
    NumpyRing,
    breaks=("window.width", "definition.attention"),
    kind="W1",
    bug="zml/zml/pull/763",
    configs=WINDOWS,
):
    """Ring and mask have one slot more than the window: prompt, chunk and decode agree on it."""

    def __init__(self, config: Config, weights: Mapping[str, Array], device: str = "cpu") -> None:
        super().__init__(replace(config, window=(config.window or 0) + 1), weights, device)

    def mask(self, t: int, s: int) -> Array:
        right, window = super().mask(t, s), self.config.window_of(self.layer)
        self.faulty += bool(window and (right & (self.behind(t, s) == window - 1)).any())
        return right


class ChunkWindowShort(
    Planted, breaks=("window.width",), kind="W1", bug="ml-explore/mlx-lm/pull/390", conditional=True, configs=WINDOWS
):
    """Several tokens on a cache that is not empty have a window of one token less."""

    def mask(self, t: int, s: int) -> Array:
        right, window = super().mask(t, s), self.config.window_of(self.layer)
        return self.instead(right & (self.behind(t, s) < window - 1), right) if window and s > t > 1 else right


class WindowNeverApplied(
    Planted,
    breaks=("window.width", "window.hybrid"),
    kind="W2",
    bug="huggingface/transformers/pull/35691",
    configs=WINDOWS,
):
    """No layer has a window any more."""

    def mask(self, t: int, s: int) -> Array:
        return self.instead(self.behind(t, s) >= 0, super().mask(t, s))


class PromptWindowLost(
    Planted, breaks=("window.long-chunk",), kind="W2", bug="sonos/tract/pull/2327", conditional=True, configs=WINDOWS
):
    """The first step of a sequence sees all of itself; the window holds from the second on."""

    def mask(self, t: int, s: int) -> Array:
        right = super().mask(t, s)
        return self.instead(self.behind(t, s) >= 0, right) if s == t else right


class WindowLostWithMask(
    Planted,
    breaks=("numerics.caller-mask",),
    kind=("W2", "M4"),
    bug="enpasos/jax2onnx/pull/217",
    conditional=True,
    configs=WINDOWS[:2],
):
    """A mask of the caller's takes the place of the window."""

    def mask(self, t: int, s: int) -> Array:
        right = super().mask(t, s)
        return right if self.allowed is None else self.instead(self.behind(t, s) >= 0, right)


# --- step-by-step ---
class RingReadBySlot(
    Planted,
    NumpyRing,
    breaks=("window.step-by-step", "contents.round-trip"),
    kind="W3",
    bug="EricLBuehler/mistral.rs/issues/246",
    configs=WINDOWS[:2],
):
    """A ring that has wrapped is read from its first slot to its last, as if that were the order of its tokens."""

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
    breaks=("window.step-by-step",),
    kind="W3",
    bug="huggingface/transformers/pull/38046",
    conditional=True,
    configs=WINDOWS,
):
    """The decode step that finds the window just full overwrites the newest token, and evicts none."""

    def write(self, cache: Any, layer: int, ring: Array, new: Array) -> None:
        window = ring.shape[2]
        if new.shape[2] == 1 and cache.written == window:
            self.faulty += 1
            ring[:, :, window - 1] = self.stored(new)[:, :, 0]
        else:
            super().write(cache, layer, ring, new)


class WindowOfStep(
    Planted, breaks=("window.step-by-step",), kind="W5", bug="keras-team/keras-hub/pull/1738", configs=WINDOWS
):
    """The window is no longer than the step: a decode step sees itself alone."""

    def mask(self, t: int, s: int) -> Array:
        right = super().mask(t, s)
        return self.instead(right & (self.behind(t, s) < t), right) if self.config.window_of(self.layer) else right


class ValidByWrappedSlot(
    Planted,
    NumpyRing,
    breaks=("window.step-by-step",),
    kind="W5",
    bug="quic/efficient-transformers/pull/1235",
    conditional=True,
    configs=WINDOWS,
):
    """Once a ring has wrapped, a decode step takes the slots behind its own for empty."""

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
    Planted, NumpyRing, breaks=("window.long-chunk",), kind="W4", bug="Lightning-AI/litgpt/issues/2182", configs=WINDOWS
):
    """A chunk is written into the ring and then attends the ring: its first queries miss what it evicted."""

    slack = 1  # windows that a chunk finds when it attends

    def append(self, cache: Any, layer: int, key: Array, value: Array) -> tuple[Array, Array]:
        keys, values = super().append(cache, layer, key, value)
        window = self.config.window_of(layer)
        if window is None or key.shape[2] == 1:
            return keys, values
        kept = slice(max(keys.shape[2] - self.slack * window, 0), None)
        return self.instead(keys[:, :, kept], keys), values[:, :, kept]


class RingTooSmallForChunk(
    ChunkEvictsFirst,
    breaks=("window.long-chunk",),
    kind="W4",
    bug="pytorch/executorch/pull/22358",
    conditional=True,
    configs=WINDOWS,
):
    """The ring has two windows of slots, too few for what a chunk of more than one window still needs."""

    slack = 2


class FirstOfDuplicatesWins(
    Planted,
    NumpyRing,
    breaks=("window.long-chunk",),
    kind="W4",
    bug="pytorch/executorch/pull/19213",
    conditional=True,
    configs=WINDOWS,
):
    """Where a chunk is longer than the ring, its first token for a slot stays there, and not its last."""

    def write(self, cache: Any, layer: int, ring: Array, new: Array) -> None:
        window = ring.shape[2]
        self.faulty += new.shape[2] > window
        super().write(cache, layer, ring, new[:, :, :window])


# --- hybrid ---
class WindowInEveryLayer(
    Planted,
    breaks=("window.hybrid", "definition.decoder"),
    kind="W6",
    bug="pytorch/executorch/pull/21635",
    configs=HYBRID,
):
    """Layers that should see everything have the window of the others."""

    def mask(self, t: int, s: int) -> Array:
        right = super().mask(t, s)
        return self.instead(right & (self.behind(t, s) < (self.config.window or s)), right)


class DecodeMaskOfFirstLayer(
    Planted,
    breaks=("window.hybrid",),
    kind="W6",
    bug="huggingface/transformers/pull/39737",
    conditional=True,
    configs=HYBRID,
):
    """Decode steps on more than twelve tokens make one mask, the first layer's, for all."""

    def mask(self, t: int, s: int) -> Array:
        right, window = super().mask(t, s), self.config.window_of(0)
        return self.instead(self.behind(t, s) < window, right) if window and t == 1 and s > 13 else right


class RingTruncateIgnored(
    Planted,
    NumpyRing,
    breaks=("lifecycle.truncate", "window.hybrid"),
    kind="C9",
    bug="ml-explore/mlx-lm/pull/1109",
    configs=WINDOWS,
):
    """A ring claims that it can be truncated, and does nothing."""

    claims = replace(NumpyRing.claims, abilities=(*NumpyRing.claims.abilities, "truncate"))

    def truncate(self, cache: Any, length: int) -> Rings:
        if not 0 <= length <= cache.written:
            raise ValueError(f"cannot keep {length} of {cache.written} tokens")
        return self.cut(cache, length)

    def cut(self, cache: Rings, length: int) -> Rings:
        self.faulty += length < cache.written
        return cache


class RingPointerTurnedBack(
    RingTruncateIgnored,
    breaks=("lifecycle.truncate",),
    kind="C9",
    bug="ml-explore/mlx-lm/issues/1776",
    conditional=True,
    configs=WINDOWS,
):
    """Truncate turns the ring's pointer back: right until it has wrapped, for what was evicted does not come back."""

    def cut(self, cache: Rings, length: int) -> Rings:
        window = self.config.window or 0
        self.faulty += cache.written > window and 0 < length < cache.written - 1  # one step back needs none of it
        for layer in self.layers():
            if self.config.window_of(layer) is None:
                cache.keys[layer] = cache.keys[layer][:, :, :length]
                cache.values[layer] = cache.values[layer][:, :, :length]
        cache.written = length
        return cache
