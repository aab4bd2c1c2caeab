"""Faults of what a token sees."""

from __future__ import annotations

import numpy as np

from kvconform_backends.faults.planted import Planted
from kvconform_backends.numpy_cache import Array, Cache

SEEING = ("causality.past-seen", "causality.visibility")
BLIND = ("causality.future-blind", "causality.visibility")


class TopLeft(
    Planted, breaks=(*SEEING, "equivalence.decode", "definition.attention"), bug="pytorch/pytorch/issues/108108"
):
    """The causal diagonal begins at the top left, as if nothing were cached: a decode step sees the first key alone."""

    def mask(self, t: int, s: int) -> Array:
        return self.instead(self.seen(np.arange(t), s), super().mask(t, s))


class NoMaskWithCache(Planted, breaks=(*BLIND, "equivalence.decode"), bug="Mikyx-1/TinyLLM/issues/17"):
    """The causal mask is left out wherever there is a cache: a prompt sees its own future."""

    def mask(self, t: int, s: int) -> Array:
        right = super().mask(t, s)
        return self.instead(np.ones((t, s), bool), right) if self.cached else right


class AheadByOne(Planted, breaks=(*BLIND, "definition.attention"), bug="pytorch/executorch/pull/2689"):
    """The start position is taken for a count: each token sees the next one too."""

    def mask(self, t: int, s: int) -> Array:
        return self.instead(self.seen(np.arange(s - t, s) + 1, s), super().mask(t, s))


class ChunkSeesAhead(Planted, breaks=(*BLIND, "equivalence.chunks"), bug="QwenLM/Qwen/issues/979", stealth=True):
    """Several tokens on a cache that is not empty see one another's future."""

    def mask(self, t: int, s: int) -> Array:
        right = super().mask(t, s)
        return self.instead(right | (np.arange(s) >= s - t), right) if s > t > 1 else right


class TileSeesAhead(Planted, breaks=BLIND[:1], bug="tenstorrent/tt-metal/issues/48899", stealth=True):
    """Past the first 16 tokens, the causal mask is only as fine as a tile of 4 tokens."""

    def mask(self, t: int, s: int) -> Array:
        right = super().mask(t, s)
        tile = np.arange(s - t, s) // 4 * 4 + 3
        return (
            self.instead(right | (np.arange(s) <= tile[:, None]) & (np.arange(s) >= s - t), right) if s > 16 else right
        )


class LastLayerSeesAhead(
    Planted,
    breaks=BLIND,
    bug="keras-team/keras/issues/23038",
    stealth=True,
    configs=("decoder-rope", "decoder-learned"),
):
    """The last layer's causal mask is never built."""

    def mask(self, t: int, s: int) -> Array:
        right = super().mask(t, s)
        if self.layer == self.config.layers - 1:
            return self.instead(right | (np.arange(s) > np.arange(s - t, s)[:, None]), right)
        return right


class LastRowReadsFirst(Planted, breaks=BLIND[:1], bug="onnx/onnx/pull/8353", stealth=True):
    """Slots past the eighth of the last row are those of row 0."""

    def append(self, cache: Cache, layer: int, key: Array, value: Array) -> tuple[Array, Array]:
        keys, values = super().append(cache, layer, key, value)
        if self.batch > 1 and keys.shape[2] > 8:
            keys, values = keys.copy(), values.copy()
            keys[-1, :, 8:], values[-1, :, 8:] = keys[0, :, 8:], values[0, :, 8:]
            self.faulty += 1
        return keys, values


class DecodeSeesOneLess(Planted, breaks=SEEING, bug="pytorch/executorch/pull/2689", stealth=True):
    """A decode step does not see its own token."""

    def mask(self, t: int, s: int) -> Array:
        right = super().mask(t, s)
        return self.instead(right & (np.arange(s) < s - 1), right) if s > t == 1 and right.sum() > 1 else right


class ChunkTopLeft(
    Planted, breaks=(*SEEING, "equivalence.chunks"), bug="sgl-project/sgl-kernel-xpu/issues/196", stealth=True
):
    """Several tokens on a cache that is not empty are masked from the top left; prompt and decode step are right."""

    def mask(self, t: int, s: int) -> Array:
        right = super().mask(t, s)
        return self.instead(self.seen(np.arange(t), s), right) if s > t > 1 else right


class LongDecodeTopLeft(Planted, breaks=SEEING[:1], bug="microsoft/onnxruntime/pull/27992", stealth=True):
    """A decode step on more than nine tokens runs on another kernel, which masks from the top left."""

    def mask(self, t: int, s: int) -> Array:
        right = super().mask(t, s)
        return self.instead(self.seen(np.arange(t), s), right) if t == 1 and s > 10 else right


class ChunkMaskSquare(Planted, breaks=(*SEEING, "equivalence.chunks"), bug="meta-llama/llama/issues/899"):
    """The mask of a chunk is square: it sees itself and nothing that is cached."""

    def mask(self, t: int, s: int) -> Array:
        right = super().mask(t, s)
        return self.instead(right & (np.arange(s) >= s - t), right) if s > t > 1 else right


class EvictedEarly(
    Planted,
    breaks=("causality.visibility", "definition.attention"),
    bug="huggingface/transformers/issues/37574",
    stealth=True,
    configs=("attention-window",),
):
    """The oldest token is evicted one step early, when the window is full exactly."""

    def mask(self, t: int, s: int) -> Array:
        right = super().mask(t, s)
        return self.instead(right & (np.arange(s) > 0), right) if t == 1 and s == self.config.window else right


class WindowInChunk(
    Planted,
    breaks=(*SEEING, "equivalence.chunks"),
    bug="trymirai/lalamo/pull/200",
    stealth=True,
    configs=("attention-window", "decoder-learned"),
):
    """The window is counted in rows of the chunk, not in positions: on a cache it reaches back to the first token."""

    def mask(self, t: int, s: int) -> Array:
        right = super().mask(t, s)
        wrong = self.seen(np.arange(t), s)
        wrong[:, s - t :] = right[:, s - t :]
        return self.instead(wrong, right) if s > t > 1 and self.config.window else right
