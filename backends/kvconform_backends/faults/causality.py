"""Faults of the attention mask: which tokens a query sees."""

from __future__ import annotations

import numpy as np

from kvconform_backends.faults.configs import PLACED, WINDOWED
from kvconform_backends.faults.planted import Planted
from kvconform_backends.numpy.cache import Array, Cache

DECODE = "equivalence.decode"
ATTENTION = "definition.attention"
CHUNKS = "equivalence.chunks"
CALLER_MASK = "numerics.caller-mask"
VISIBILITY = "causality.visibility"

SEEING = ("causality.past-seen", "causality.visibility")
BLIND = ("causality.future-blind", "causality.visibility")
PARITY = ("definition.attention", "definition.decoder")


# --- causality ---
class TopLeft(Planted, breaks=(*SEEING, DECODE, ATTENTION), kind="M1", bug="pytorch/pytorch/issues/108108"):
    """The causal diagonal starts at the top left, as if nothing were cached: a decode step sees only the first key."""

    def mask(self, t: int, s: int) -> Array:
        return self.instead(self.seen(np.arange(t), s), super().mask(t, s))


class ChunkTopLeft(
    Planted, breaks=(*SEEING, CHUNKS), kind="M1", bug="sgl-project/sgl-kernel-xpu/issues/196", conditional=True
):
    """Chunks on a non-empty cache are masked from the top left; prompts and decode steps are correct."""

    def mask(self, t: int, s: int) -> Array:
        right = super().mask(t, s)
        return self.instead(self.seen(np.arange(t), s), right) if s > t > 1 else right


class LongDecodeTopLeft(
    Planted, breaks=SEEING[:1], kind="M1", bug="microsoft/onnxruntime/pull/27992", conditional=True
):
    """Decode steps on more than nine tokens run on another kernel, which masks from the top left."""

    def mask(self, t: int, s: int) -> Array:
        right = super().mask(t, s)
        return self.instead(self.seen(np.arange(t), s), right) if t == 1 and s > 10 else right


class NoMaskWithCache(Planted, breaks=(*BLIND, DECODE), kind="M2", bug="Mikyx-1/TinyLLM/issues/17"):
    """The causal mask is omitted whenever a cache is used: a prompt sees its own future."""

    def mask(self, t: int, s: int) -> Array:
        right = super().mask(t, s)
        return self.instead(np.ones((t, s), bool), right) if self.cached else right


class ChunkMaskSquare(Planted, breaks=(*SEEING, CHUNKS), kind="M2", bug="meta-llama/llama/issues/899"):
    """The mask of a chunk is square: the chunk sees itself and no cached token."""

    def mask(self, t: int, s: int) -> Array:
        right = super().mask(t, s)
        return self.instead(right & (np.arange(s) >= s - t), right) if s > t > 1 else right


class ChunkSeesAhead(Planted, breaks=(*BLIND, CHUNKS), kind="M2", bug="QwenLM/Qwen/issues/979", conditional=True):
    """Tokens of a chunk on a non-empty cache see each other's future."""

    def mask(self, t: int, s: int) -> Array:
        right = super().mask(t, s)
        return self.instead(right | (np.arange(s) >= s - t), right) if s > t > 1 else right


class AheadByOne(Planted, breaks=(*BLIND, ATTENTION), kind="M3", bug="pytorch/executorch/pull/2689"):
    """The start position is used as a count: each token also sees the next one."""

    def mask(self, t: int, s: int) -> Array:
        return self.instead(self.seen(np.arange(s - t, s) + 1, s), super().mask(t, s))


class DecodeSeesOneLess(Planted, breaks=SEEING, kind="M3", bug="pytorch/executorch/pull/2689", conditional=True):
    """A decode step does not see its own token."""

    def mask(self, t: int, s: int) -> Array:
        right = super().mask(t, s)
        return self.instead(right & (np.arange(s) < s - 1), right) if s > t == 1 and right.sum() > 1 else right


class TileSeesAhead(Planted, breaks=BLIND[:1], kind="X3", bug="tenstorrent/tt-metal/issues/48899", conditional=True):
    """Beyond 16 tokens, the causal mask has the granularity of a tile of 4 tokens."""

    def mask(self, t: int, s: int) -> Array:
        right, slots = super().mask(t, s), np.arange(s)
        tile = np.arange(s - t, s)[:, None] // 4 * 4 + 3
        return self.instead(right | (slots <= tile) & (slots >= s - t), right) if s > 16 else right


# --- the mask as a whole ---
class LastLayerSeesAhead(
    Planted, breaks=BLIND, kind="M4", bug="keras-team/keras/issues/23038", conditional=True, configs=PLACED
):
    """The last layer has no causal mask."""

    def mask(self, t: int, s: int) -> Array:
        right = super().mask(t, s)
        return self.instead(right | (self.behind(t, s) < 0), right) if self.layer == self.config.layers - 1 else right


class MaskReplacesWindow(
    Planted, breaks=(CALLER_MASK,), kind="M4", bug="enpasos/jax2onnx/pull/217", configs=WINDOWED[:2]
):
    """The caller's mask replaces the window instead of being combined with it."""

    def visible(self, t: int, s: int) -> Array:
        right = super().visible(t, s)
        if self.allowed is None:
            return right
        return self.instead((self.behind(t, s) >= 0) & self.allowed[:, None, None], right)


class ChunkMaskReplacesCausality(
    Planted, breaks=(CALLER_MASK,), kind="M4", bug="keras-team/keras/issues/23038", conditional=True
):
    """For chunks on a non-empty cache, the caller's mask replaces the causal mask."""

    def visible(self, t: int, s: int) -> Array:
        right = super().visible(t, s)
        if self.allowed is None or not s > t > 1:
            return right
        return self.instead(np.broadcast_to(self.allowed[:, None, None], right.shape), right)


class MaskFromBatch(Planted, breaks=(*BLIND, SEEING[0]), kind="M5", bug="sonos/torch-to-nnef/pull/217"):
    """The past length used for the mask is read from the batch axis."""

    def mask(self, t: int, s: int) -> Array:
        return self.instead(self.seen(np.arange(t) + self.batch, s), super().mask(t, s))


class CallerMaskCut(Planted, breaks=(CALLER_MASK,), kind="M5", bug="thu-nics/C2C/pull/19", conditional=True):
    """On a non-empty cache, the caller's mask is cut to the call's length: later positions become visible again."""

    def visible(self, t: int, s: int) -> Array:
        right = super().visible(t, s)
        if self.allowed is None or s == t:
            return right
        return self.instead(self.mask(t, s) & (self.allowed[:, None, None] | (np.arange(s) >= t)), right)


class LastRowReadsFirst(Planted, breaks=BLIND[:1], kind="H4", bug="onnx/onnx/pull/8353", conditional=True):
    """In the last row, slots after the eighth are read from row 0."""

    def append(self, cache: Cache, layer: int, key: Array, value: Array) -> tuple[Array, Array]:
        keys, values = super().append(cache, layer, key, value)
        if self.batch > 1 and keys.shape[2] > 8:
            keys, values = keys.copy(), values.copy()
            keys[-1, :, 8:], values[-1, :, 8:] = keys[0, :, 8:], values[0, :, 8:]
            self.faulty += 1
        return keys, values


# --- the window ---
class WindowTooLong(
    Planted, breaks=(*PARITY, VISIBILITY), kind="W1", bug="microsoft/onnxruntime/pull/25927", configs=WINDOWED
):
    """The window does not count the token itself: one token too many is visible."""

    def mask(self, t: int, s: int) -> Array:
        right = super().mask(t, s)
        return self.instead(right | (self.behind(t, s) == self.config.window_of(self.layer)), right)


class WindowTooShort(
    Planted,
    breaks=(*PARITY, "causality.past-seen"),
    kind="W1",
    bug="huggingface/transformers/issues/39408",
    configs=WINDOWED,
):
    """The window is one token too short."""

    def mask(self, t: int, s: int) -> Array:
        right, window = super().mask(t, s), self.config.window_of(self.layer)
        return right if window is None else self.instead(right & (self.behind(t, s) < window - 1), right)


class DecodeWindowTooLong(
    Planted,
    breaks=(*PARITY, DECODE),
    kind="W1",
    bug="vllm-project/vllm/issues/3385",
    conditional=True,
    configs=WINDOWED,
):
    """In decode steps, the window is one token too long."""

    def mask(self, t: int, s: int) -> Array:
        right, window = super().mask(t, s), self.config.window_of(self.layer)
        return self.instead(right | (self.behind(t, s) == window), right) if s > t == 1 else right


class DecodeWindowLost(
    Planted, breaks=PARITY, kind="W2", bug="onnxruntime/mobius/pull/371", conditional=True, configs=WINDOWED
):
    """Decode steps on more than nine tokens ignore the window: it is not passed to that kernel."""

    def mask(self, t: int, s: int) -> Array:
        right = super().mask(t, s)
        return self.instead(np.ones((t, s), bool), right) if t == 1 and s > 10 else right


class EvictedEarly(
    Planted,
    breaks=(VISIBILITY, ATTENTION),
    kind="W3",
    bug="huggingface/transformers/issues/37574",
    conditional=True,
    configs=WINDOWED[:2],
):
    """The oldest token is evicted one step early, when the window is exactly full."""

    def mask(self, t: int, s: int) -> Array:
        right = super().mask(t, s)
        return self.instead(right & (np.arange(s) > 0), right) if t == 1 and s == self.config.window else right


class WindowInChunk(
    Planted, breaks=(*SEEING, CHUNKS), kind="W5", bug="trymirai/lalamo/pull/200", conditional=True, configs=WINDOWED
):
    """The window is counted in rows of the chunk, not positions: on a non-empty cache it reaches the first token."""

    def mask(self, t: int, s: int) -> Array:
        right = super().mask(t, s)
        wrong = self.seen(np.arange(t), s)
        wrong[:, s - t :] = right[:, s - t :]
        return self.instead(wrong, right) if s > t > 1 and self.config.window_of(self.layer) else right
