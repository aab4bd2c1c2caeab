"""Faults with large scores, empty rows, combined masks, odd head dims and long contexts."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvconform_backends.faults.configs import LONG, SOFTCAPPED
from kvconform_backends.faults.planted import Planted
from kvconform_backends.numpy.cache import Array, Cache
from kvconform_backends.numpy.layers import MINUS_INFINITY
from kvconform_backends.numpy.static import Buffers, NumpyStatic

LARGE_SCORES = "numerics.large-scores"
ZERO_KEYS = "numerics.zero-keys"
EMPTY_ROW = "numerics.empty-row"
CALLER_MASK = "numerics.caller-mask"
FINITE = "numerics.finite"
HEAD_DIM = "numerics.head-dim"
TILES = "numerics.tiles"
LONG_CONTEXT = "numerics.long-context"

UNCAPPED = ("attention-gqa", "attention-window", "attention-sink")
ODD = ("attention-softcap", "attention-sink", "decoder-learned", "decoder-softcap")
TILE = 64


# --- large scores ---
class MaximumNotSubtracted(
    Planted, breaks=(LARGE_SCORES,), kind="M10", bug="pytorch/pytorch/issues/109517", configs=UNCAPPED
):
    """The softmax does not subtract the maximum before the exponential."""

    def softmax(self, scores: Array) -> Array:
        right = super().softmax(scores)
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            powers = np.exp(scores)
            wrong = powers / (powers.sum(axis=-1, keepdims=True) + np.exp(self.sink()))
            return self.instead(np.where(scores.max(axis=-1, keepdims=True) == MINUS_INFINITY, right, wrong), right)


class MaximumFromZero(
    Planted, breaks=(LARGE_SCORES,), kind="M10", bug="pytorch/pytorch/issues/109517", conditional=True, configs=UNCAPPED
):
    """The running maximum starts at 0: if all scores are far below, every weight underflows."""

    def softmax(self, scores: Array) -> Array:
        right = super().softmax(scores)
        top = np.maximum(scores.max(axis=-1, keepdims=True), np.float32(0))
        powers = np.exp(scores - top)
        total = powers.sum(axis=-1, keepdims=True) + np.exp(self.sink() - top)
        wrong = powers / np.where(total == 0, np.float32(1), total)
        self.faulty += bool(((powers.sum(axis=-1) == 0) & (right.sum(axis=-1) > 0)).any())  # all of a row underflows
        return np.asarray(wrong)


# --- zero keys ---
class ZeroKeysAreEmpty(Planted, breaks=(ZERO_KEYS,), kind="C3", bug="huggingface/transformers/issues/30377"):
    """A slot whose key is zero is treated as unwritten."""

    def scores(self, query: Array, keys: Array) -> Array:
        right = super().scores(query, keys)
        written = self.written(np.asarray(keys.any(axis=(1, 3))))
        return self.instead(np.where(written[:, None, None], right, MINUS_INFINITY), right)

    def written(self, loud: Array) -> Array:
        """``(b, s)``: the slots treated as written, given those with a non-zero key."""
        return loud


class LeadingZeroKeysArePadding(
    ZeroKeysAreEmpty, breaks=(ZERO_KEYS,), kind="C3", bug="huggingface/transformers/issues/30377", conditional=True
):
    """Zero keys before the first non-zero one are treated as padding."""

    def written(self, loud: Array) -> Array:
        return np.asarray(np.arange(loud.shape[1]) >= loud.argmax(axis=1)[:, None])


# --- empty rows ---
class EmptyRowUnguarded(
    Planted,
    breaks=(EMPTY_ROW,),
    kind="M8",
    bug="pytorch/pytorch/issues/103749",
    configs=("attention-gqa", "attention-window", "attention-softcap"),
):
    """The softmax does not check for empty rows: a query that sees nothing gives zero over zero."""

    def softmax(self, scores: Array) -> Array:
        right = super().softmax(scores)
        empty = scores.max(axis=-1, keepdims=True) == MINUS_INFINITY
        return self.instead(np.where(empty, np.float32(np.nan), right), right)


class DecodeEmptyRowIsMean(
    Planted, breaks=(EMPTY_ROW,), kind="M8", bug="microsoft/onnxruntime/pull/28958", conditional=True
):
    """Decode steps mask with the lowest finite number: a query that sees nothing gives the mean of the values."""

    def softmax(self, scores: Array) -> Array:
        right = super().softmax(scores)
        empty = scores.max(axis=-1, keepdims=True) == MINUS_INFINITY
        mean = np.float32(1 / scores.shape[-1])
        return self.instead(np.where(empty, mean, right), right) if scores.shape[2] == 1 else right


class MinimaAdded(
    Planted, breaks=(EMPTY_ROW,), kind=("M10", "M8"), bug="huggingface/transformers/pull/27114", conditional=True
):
    """Two masks of the lowest finite number are added: a query that sees nothing sees what only one mask hides."""

    def visible(self, t: int, s: int) -> Array:
        right = super().visible(t, s)
        if self.allowed is None:
            return right
        once = self.mask(t, s) | self.allowed[:, None, None]
        return self.instead(np.where(right.any(axis=-1, keepdims=True), right, once), right)


# --- caller's mask ---
class MaskReplacesCausality(Planted, breaks=(CALLER_MASK,), kind="M4", bug="keras-team/keras/issues/23038"):
    """The caller's mask replaces the causal mask."""

    def mask(self, t: int, s: int) -> Array:
        right = super().mask(t, s)
        return right if self.allowed is None else self.instead(right | (self.behind(t, s) < 0), right)


class MaskOnFirstStepOnly(
    Planted, breaks=(CALLER_MASK,), kind="M4", bug="OpenNMT/OpenNMT-py/pull/2532", conditional=True
):
    """The caller's mask is applied only in the first step of a sequence."""

    def visible(self, t: int, s: int) -> Array:
        right = super().visible(t, s)
        return right if s == t else self.instead(np.broadcast_to(self.mask(t, s), right.shape), right)


class MaskTimesInfinity(Planted, breaks=(CALLER_MASK,), kind="M10", bug="onnx/onnx/pull/8068"):
    """The caller's mask is multiplied by minus infinity: allowed positions become NaN."""

    def scores(self, query: Array, keys: Array) -> Array:
        right = super().scores(query, keys)
        if self.allowed is None:
            return right
        with np.errstate(invalid="ignore"):
            return self.instead(right + (~self.allowed[:, None, None] * MINUS_INFINITY), right)


class CapAfterCallersMask(
    Planted,
    breaks=(CALLER_MASK,),
    kind="M11",
    bug="onnx/onnx/pull/7867",
    conditional=True,
    configs=("attention-softcap",),
):
    """Softcap follows the caller's mask, so that hidden scores become -softcap; the causal mask comes later."""

    def visible(self, t: int, s: int) -> Array:
        return self.mask(t, s)

    def scores(self, query: Array, keys: Array) -> Array:
        wrong = super().scores(query, keys)
        if self.allowed is None:
            return wrong
        c, seen = self.config, self.allowed[:, None, None]
        bent = self.bias(query.shape[2], keys.shape[2]) - np.float32(c.softcap or 0)
        capped = np.where(wrong == MINUS_INFINITY, wrong, bent)
        return np.asarray(np.where(seen, wrong, self.instead(capped, np.full_like(capped, MINUS_INFINITY))))


class BiasBeforeCap(
    Planted,
    breaks=("definition.softcap", "definition.bias"),
    kind="M11",
    bug="microsoft/onnxruntime/pull/28370",
    configs=SOFTCAPPED,
):
    """The bias is added before softcap: prompt, chunk and decode agree with each other."""

    def scores(self, query: Array, keys: Array) -> Array:
        c, (t, s) = self.config, (query.shape[2], keys.shape[2])
        right = super().scores(query, keys)
        cap = np.float32(c.softcap or 1)
        raw = query @ keys.swapaxes(-1, -2) * np.float32(c.score_scale) + self.bias(t, s)
        return self.instead(np.where(right == MINUS_INFINITY, right, cap * np.tanh(raw / cap)), right)


# --- finite ---
class BuffersUninitialised(
    Planted, NumpyStatic, breaks=(FINITE,), kind="M9", bug="flashinfer-ai/flashinfer/issues/941"
):
    """New buffers are uninitialised, possibly NaN, and unused slots are multiplied by a weight of zero."""

    def start(self, batch: int) -> Buffers:
        made = super().start(batch)
        for x in (*made.keys, *made.values):
            x[...] = self.stored(np.full(1, np.nan, np.float32))
        return made

    def cleared(self, cache: Any, buffer: Array) -> Array:
        return self.instead(self.loaded(buffer), super().cleared(cache, buffer))


class ResetUninitialised(
    BuffersUninitialised, breaks=(FINITE,), kind=("M9", "C6"), bug="vllm-project/vllm/pull/936", conditional=True
):
    """A reset sequence gets uninitialised buffers; a new one gets zeros."""

    def start(self, batch: int) -> Buffers:
        return NumpyStatic.start(self, batch)

    def reset(self, cache: Cache) -> Cache:
        return BuffersUninitialised.start(self, len(cache.lengths))


# --- head dim ---
class PaddedLanesSummed(Planted, breaks=(HEAD_DIM,), kind="H3", bug="pytorch/pytorch/issues/112577", configs=ODD):
    """A head is padded to a multiple of 8 lanes with copies of its first numbers, which enter the sums."""

    def scores(self, query: Array, keys: Array) -> Array:
        lanes = -self.config.head_dim % 8
        padded = np.concatenate([query, query[..., :lanes]], axis=-1)
        wrong = super().scores(padded, np.concatenate([keys, keys[..., :lanes]], axis=-1))
        return self.instead(wrong, super().scores(query, keys))


class OddHeadTopLeft(
    Planted, breaks=(HEAD_DIM,), kind="M1", bug="microsoft/onnxruntime/pull/27992", conditional=True, configs=ODD
):
    """If the head dim is no multiple of 8, a chunk on a cache runs on a kernel that masks from the top left."""

    def mask(self, t: int, s: int) -> Array:
        right = super().mask(t, s)
        return self.instead(self.seen(np.arange(t), s), right) if s > t > 1 and self.config.head_dim % 8 else right


# --- tiles ---
class MaskByTile(Planted, breaks=(TILES,), kind="X3", bug="pytorch/executorch/pull/9105", configs=LONG):
    """The causal mask has the granularity of a tile of 64 keys: a query sees all of its own tile."""

    def mask(self, t: int, s: int) -> Array:
        right = super().mask(t, s)
        tiles = np.arange(s) // TILE
        return self.instead(tiles[s - t :, None] >= tiles, right) if self.coarse(t, s) else right

    def coarse(self, t: int, s: int) -> bool:
        return True


class ChunkMaskByTile(
    MaskByTile, breaks=(TILES,), kind="X3", bug="tenstorrent/tt-metal/issues/48899", conditional=True, configs=LONG
):
    """Chunks on 64 or more cached tokens use a causal mask with tile granularity; the last query is unaffected."""

    def coarse(self, t: int, s: int) -> bool:
        return t > 1 and s - t >= TILE


class ThirdTileNotRescaled(
    Planted,
    breaks=(TILES, LONG_CONTEXT),
    kind="X3",
    bug="local-inference-lab/vllm/pull/17",
    conditional=True,
    configs=LONG,
):
    """From the third tile of 64 keys on, weights are relative to the tile's maximum instead of the overall one."""

    def softmax(self, scores: Array) -> Array:
        right, s = super().softmax(scores), scores.shape[-1]
        if s <= 2 * TILE:
            return right
        top = scores.max(axis=-1, keepdims=True)
        tops = [scores[..., i : i + TILE].max(axis=-1, keepdims=True) for i in range(2 * TILE, s, TILE)]
        factors = [np.exp(np.where(own == MINUS_INFINITY, 0, top - own)) for own in tops]
        wrong = right.copy()
        for number, factor in enumerate(factors):
            wrong[..., (number + 2) * TILE : (number + 3) * TILE] *= factor
        return self.instead(wrong / np.maximum(wrong.sum(axis=-1, keepdims=True), np.float32(1e-30)), right)


# --- long context ---
class IndexWraps(Planted, breaks=(LONG_CONTEXT,), kind="H4", bug="pytorch/pytorch/issues/162588", configs=LONG):
    """The slot index has ten bits: the values of late tokens are those of the first 1 024."""

    def attention(self, query: Array, keys: Array, values: Array) -> Array:
        read = values[:, :, np.arange(values.shape[2]) % 1024]
        return super().attention(query, keys, self.instead(read, values))


class FirstOfManyLost(
    Planted, breaks=(LONG_CONTEXT,), kind="X3", bug="pytorch/pytorch/pull/169222", conditional=True, configs=LONG
):
    """Decode steps on more than 1 024 tokens do not see the first one."""

    def mask(self, t: int, s: int) -> Array:
        right = super().mask(t, s)
        return self.instead(right & (np.arange(s) > 0), right) if t == 1 and s > 1024 else right
