"""Faults of the arithmetic. Where they are uniform, the cache agrees with itself, and only the definition tells."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from kvconform_backends.faults.planted import Planted
from kvconform_backends.numpy.cache import Array, Cache
from kvconform_backends.numpy.layers import MINUS_INFINITY, NumpyLayers

PARITY = ("definition.attention", "definition.decoder")
SOFTCAP = ("attention-softcap", "decoder-softcap")
SINK = ("attention-sink",)
PLAIN = ("attention-gqa", "decoder-rope")


# --- scores and weights ---
class KvHeadsTiled(Planted, breaks=("definition.grouping", *PARITY), kind="H1", bug="onnx/onnx/pull/7274"):
    """KV heads are tiled as a block, not repeated one by one."""

    def kv_head(self) -> Array:
        return self.instead(np.arange(self.config.heads) % self.config.kv_heads, super().kv_head())


class HeadsByCount(Planted, breaks=("definition.grouping",), kind="H1", bug="PSAL-POSTECH/ONNXim/pull/34"):
    """The KV head is the query head over the number of KV heads, not over the size of their groups."""

    def kv_head(self) -> Array:
        c = self.config
        return self.instead(np.arange(c.heads) // c.kv_heads % c.kv_heads, super().kv_head())


class ChunkHeadsTiled(
    Planted, breaks=("definition.grouping",), kind="H1", bug="EricLBuehler/candle-vllm/pull/52", conditional=True
):
    """KV heads are tiled where several tokens come on a cache that is not empty; prompt and decode step are right."""

    chunk = False

    def attend(self, cache: Cache, layer: int, query: Array, key: Array, value: Array) -> Array:
        self.chunk = query.shape[2] > 1 and cache.keys[layer].shape[2] > 0
        return super().attend(cache, layer, query, key, value)

    def kv_head(self) -> Array:
        right = super().kv_head()
        return self.instead(np.arange(self.config.heads) % self.config.kv_heads, right) if self.chunk else right


class GivenScaleIgnored(
    Planted,
    breaks=("definition.scale",),
    kind="M11",
    bug="flashinfer-ai/flashinfer/issues/1023",
    configs=("attention-softcap",),
):
    """A scale that is given has no effect: scores are multiplied by 1 / sqrt(d) all the same."""

    def scores(self, query: Array, keys: Array) -> Array:
        c = self.config
        given = np.float32(1 / math.sqrt(c.head_dim) / c.score_scale)
        return super().scores(self.instead(query * given, query), keys)


class ScaleTwice(Planted, breaks=("definition.scale", *PARITY), kind="M11", bug="sgl-project/sglang/pull/34765"):
    """The scale is applied when keys are written and again when they are read."""

    def scores(self, query: Array, keys: Array) -> Array:
        return super().scores(query, self.instead(keys * np.float32(self.config.score_scale), keys))


class DecodeScaleTwice(
    Planted, breaks=("definition.scale",), kind="M11", bug="sgl-project/sglang/pull/34765", conditional=True
):
    """Decode steps apply the scale twice."""

    def scores(self, query: Array, keys: Array) -> Array:
        if keys.shape[2] > query.shape[2] == 1:
            query = self.instead(query * np.float32(self.config.score_scale), query)
        return super().scores(query, keys)


class ScaleOfPaddedHead(
    Planted,
    breaks=("definition.scale", "definition.decoder"),
    kind="M11",
    bug="microsoft/onnxruntime/pull/27992",
    conditional=True,
    configs=("decoder-learned", "decoder-softcap"),
):
    """The default scale is that of the head dim padded to a multiple of 8."""

    def scores(self, query: Array, keys: Array) -> Array:
        d = self.config.head_dim
        wrong = query * np.float32(math.sqrt(d / (-(-d // 8) * 8))) if self.config.scale is None else query
        return super().scores(self.instead(wrong, query), keys)


class AsIf(Planted):
    """Base of what computes the scores that another config has."""

    def as_if(self, query: Array, keys: Array, **changes: Any) -> Array:
        true = self.config
        self.config = replace(true, **changes)
        try:
            return NumpyLayers.scores(self, query, keys)
        finally:
            self.config = true

    def capped(self, scores: Array) -> Array:
        cap = np.float32(self.config.softcap or np.inf)
        return np.asarray(cap * np.tanh(scores / cap))

    def wrong(self, query: Array, keys: Array) -> Array:
        raise NotImplementedError

    def concerned(self, t: int, s: int) -> bool:
        """Whether a step of ``t`` tokens, of ``s`` then, is one of those that the fault is in."""
        return True

    def scores(self, query: Array, keys: Array) -> Array:
        right = super().scores(query, keys)
        return self.instead(self.wrong(query, keys), right) if self.concerned(query.shape[2], keys.shape[2]) else right


class SoftcapAfterMask(
    AsIf,
    breaks=("definition.softcap", "causality.future-blind"),
    kind="M11",
    bug="onnx/onnx/issues/7865",
    configs=SOFTCAP,
):
    """Softcap bends the masked scores: what is masked gets the weight of -softcap."""

    def wrong(self, query: Array, keys: Array) -> Array:
        return self.capped(self.as_if(query, keys, softcap=None))


class ChunkSoftcapAfterMask(
    SoftcapAfterMask,
    breaks=("definition.softcap",),
    kind="M11",
    bug="microsoft/onnxruntime/pull/28370",
    conditional=True,
    configs=SOFTCAP,
):
    """Softcap bends the masked scores of several tokens on a cache that is not empty."""

    def concerned(self, t: int, s: int) -> bool:
        return s > t > 1


class DecodeSoftcapLost(
    AsIf,
    breaks=("definition.softcap",),
    kind="M11",
    bug="microsoft/onnxruntime/pull/28379",
    conditional=True,
    configs=SOFTCAP,
):
    """Decode steps have no softcap."""

    def wrong(self, query: Array, keys: Array) -> Array:
        return self.as_if(query, keys, softcap=None)

    def concerned(self, t: int, s: int) -> bool:
        return s > t == 1


class BiasBeforeSoftcap(
    AsIf, breaks=("definition.bias", "definition.softcap"), kind="M11", bug="onnx/onnx/pull/7867", configs=SOFTCAP
):
    """Softcap bends the biased scores, before the mask."""

    def wrong(self, query: Array, keys: Array) -> Array:
        scores = self.capped(self.as_if(query, keys, softcap=None))
        return np.where(self.visible(*scores.shape[2:]), scores, MINUS_INFINITY)


class DecodeBiasBeforeSoftcap(
    BiasBeforeSoftcap,
    breaks=("definition.bias",),
    kind="M11",
    bug="microsoft/onnxruntime/pull/28379",
    conditional=True,
    configs=SOFTCAP,
):
    """Softcap bends the biased scores of decode steps on more than four tokens, which run on another kernel."""

    def concerned(self, t: int, s: int) -> bool:
        return t == 1 and s > 5


class BiasOfNewTokens(
    Planted, breaks=("definition.bias",), kind="P7", bug="keras-team/keras-hub/pull/2977", configs=SOFTCAP
):
    """The bias is built from the new tokens alone: cached keys have none."""

    def bias(self, t: int, s: int) -> Array:
        right = super().bias(t, s)
        return self.instead(np.where(np.arange(s) < s - t, np.float32(0), right), right)


class DecodeBiasLost(
    Planted,
    breaks=("definition.bias", "equivalence.decode"),
    kind="P7",
    bug="keras-team/keras-hub/pull/2977",
    conditional=True,
    configs=SOFTCAP,
):
    """A decode step's bias is that of one token, zero, and is spread over all cached keys; chunks are right."""

    def bias(self, t: int, s: int) -> Array:
        right = super().bias(t, s)
        return self.instead(np.zeros_like(right), right) if t == 1 else right


class ChunkBiasOfNewTokens(
    Planted,
    breaks=("definition.bias", "equivalence.chunks"),
    kind="P7",
    bug="keras-team/keras-hub/pull/2977",
    conditional=True,
    configs=SOFTCAP,
):
    """The bias of several tokens on more than seven starts anew with them: all cached keys are as far as the first."""

    def bias(self, t: int, s: int) -> Array:
        right = super().bias(t, s)
        first = right[:, :, np.maximum(np.arange(s), s - t)]
        return self.instead(first, right) if t > 1 and s - t > 7 else right


class SinkScaled(
    Planted, breaks=("definition.sink",), kind="M11", bug="openvinotoolkit/openvino/pull/36016", configs=SINK
):
    """The sink joins the scores before they are scaled."""

    def sink(self) -> Array:
        right = super().sink()
        return self.instead(right * np.float32(self.config.score_scale), right)


class SinkPerKey(
    Planted, breaks=("definition.sink",), kind="M11", bug="openvinotoolkit/openvino/pull/36016", configs=SINK
):
    """The sink joins the denominator once for each key."""

    keys = 1

    def softmax(self, scores: Array) -> Array:
        self.keys = scores.shape[-1]
        return super().softmax(scores)

    def sink(self) -> Array:
        right = super().sink()
        return self.instead(right + np.float32(math.log(self.keys)), right)


class SinkOfOtherHead(
    Planted, breaks=("definition.sink",), kind="H1", bug="openvinotoolkit/openvino/pull/36016", configs=SINK
):
    """Each head has the sink of the one before it."""

    def sink(self) -> Array:
        right = super().sink()
        return self.instead(np.roll(right, 1, axis=0), right)


class DecodeSinkLost(
    Planted,
    breaks=("definition.sink", "equivalence.decode"),
    kind="M11",
    bug="NVIDIA/TensorRT-LLM/pull/2983",
    conditional=True,
    configs=SINK,
):
    """Decode steps have no sink."""

    alone = False

    def softmax(self, scores: Array) -> Array:
        self.alone = scores.shape[-1] > scores.shape[-2] == 1
        return super().softmax(scores)

    def sink(self) -> Array:
        right = super().sink()
        return self.instead(np.full_like(right, MINUS_INFINITY), right) if self.alone else right


class TilesAveraged(Planted, breaks=PARITY, kind="X3", bug="local-inference-lab/vllm/pull/17", configs=PLAIN):
    """Tiles of 8 keys have a softmax each, and their results are averaged, whatever their scores sum up to."""

    def softmax(self, scores: Array) -> Array:
        right, s = super().softmax(scores), scores.shape[-1]
        tiles = [Planted.softmax(self, scores[..., first : first + 8]) for first in range(0, s, 8)]
        return self.instead(np.concatenate(tiles, axis=-1) / np.float32(len(tiles)), right)


class ThirdTileUnscaled(
    Planted, breaks=PARITY[:1], kind="X3", bug="local-inference-lab/vllm/pull/17", conditional=True, configs=PLAIN
):
    """When the third tile of 8 keys, or a later one, raises the maximum, what was summed up is not scaled down."""

    def softmax(self, scores: Array) -> Array:
        right, s = super().softmax(scores), scores.shape[-1]
        ends = [scores[..., first : first + 8].max(axis=-1, keepdims=True) for first in range(0, s, 8)]
        tops = np.maximum.accumulate(np.concatenate(ends, axis=-1), axis=-1)  # (b, h, t, tiles)
        tops[..., :2] = tops[..., min(1, len(ends) - 1), None]
        tops = np.where(np.isneginf(tops), np.float32(0), tops)
        powers = np.exp(scores - np.repeat(tops, 8, axis=-1)[..., :s])
        total = powers.sum(axis=-1, keepdims=True)
        return self.instead(powers / np.where(total == 0, np.float32(1), total), right) if s > 16 else right
