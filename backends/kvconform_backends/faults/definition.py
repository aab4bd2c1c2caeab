"""Faults of the arithmetic. Uniform ones are consistent with themselves: only the definition exposes them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from kvconform_backends.faults.configs import SOFTCAPPED, WITH_SINK
from kvconform_backends.faults.planted import Planted
from kvconform_backends.numpy.cache import Array, Cache
from kvconform_backends.numpy.layers import MINUS_INFINITY, NumpyLayers

GROUPING = "definition.grouping"
SCALE = "definition.scale"
SOFTCAP = "definition.softcap"
BIAS = "definition.bias"
DECODE = "equivalence.decode"
SINK = "definition.sink"

PARITY = ("definition.attention", "definition.decoder")
PLAIN = ("attention-gqa", "decoder-rope")


# --- scores and weights ---
class KvHeadsTiled(Planted, breaks=(GROUPING, *PARITY), kind="H1", bug="onnx/onnx/pull/7274"):
    """KV heads are tiled as a block instead of repeated one by one."""

    def kv_head(self) -> Array:
        return self.instead(np.arange(self.config.heads) % self.config.kv_heads, super().kv_head())


class HeadsByCount(Planted, breaks=(GROUPING,), kind="H1", bug="PSAL-POSTECH/ONNXim/pull/34"):
    """The KV head is the query head divided by the number of KV heads instead of by the group size."""

    def kv_head(self) -> Array:
        c = self.config
        return self.instead(np.arange(c.heads) // c.kv_heads % c.kv_heads, super().kv_head())


class ChunkHeadsTiled(Planted, breaks=(GROUPING,), kind="H1", bug="EricLBuehler/candle-vllm/pull/52", conditional=True):
    """KV heads are tiled for chunks on a non-empty cache; prompts and decode steps are correct."""

    chunk = False

    def attend(self, cache: Cache, layer: int, query: Array, key: Array, value: Array) -> Array:
        self.chunk = query.shape[2] > 1 and cache.keys[layer].shape[2] > 0
        return super().attend(cache, layer, query, key, value)

    def kv_head(self) -> Array:
        right = super().kv_head()
        return self.instead(np.arange(self.config.heads) % self.config.kv_heads, right) if self.chunk else right


class GivenScaleIgnored(
    Planted, breaks=(SCALE,), kind="M11", bug="flashinfer-ai/flashinfer/issues/1023", configs=("attention-softcap",)
):
    """A given scale is ignored: scores are always multiplied by 1 / sqrt(d)."""

    def scores(self, query: Array, keys: Array) -> Array:
        c = self.config
        given = np.float32(1 / math.sqrt(c.head_dim) / c.score_scale)
        return super().scores(self.instead(query * given, query), keys)


class ScaleTwice(Planted, breaks=(SCALE, *PARITY), kind="M11", bug="sgl-project/sglang/pull/34765"):
    """The scale is applied when keys are written and again when they are read."""

    def scores(self, query: Array, keys: Array) -> Array:
        return super().scores(query, self.instead(keys * np.float32(self.config.score_scale), keys))


class DecodeScaleTwice(Planted, breaks=(SCALE,), kind="M11", bug="sgl-project/sglang/pull/34765", conditional=True):
    """Decode steps apply the scale twice."""

    def scores(self, query: Array, keys: Array) -> Array:
        if keys.shape[2] > query.shape[2] == 1:
            query = self.instead(query * np.float32(self.config.score_scale), query)
        return super().scores(query, keys)


class ScaleOfPaddedHead(
    Planted,
    breaks=(SCALE, "definition.decoder"),
    kind="M11",
    bug="microsoft/onnxruntime/pull/27992",
    conditional=True,
    configs=("decoder-learned", "decoder-softcap"),
):
    """The default scale uses the head dim padded to a multiple of 8."""

    def scores(self, query: Array, keys: Array) -> Array:
        d = self.config.head_dim
        wrong = query * np.float32(math.sqrt(d / (-(-d // 8) * 8))) if self.config.scale is None else query
        return super().scores(self.instead(wrong, query), keys)


class AsIf(Planted):
    """Base class: computes the scores of a modified config."""

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
        """Whether the fault affects a step of ``t`` tokens that makes ``s`` in all."""
        return True

    def scores(self, query: Array, keys: Array) -> Array:
        right = super().scores(query, keys)
        return self.instead(self.wrong(query, keys), right) if self.concerned(query.shape[2], keys.shape[2]) else right


class SoftcapAfterMask(
    AsIf, breaks=(SOFTCAP, "causality.future-blind"), kind="M11", bug="onnx/onnx/issues/7865", configs=SOFTCAPPED
):
    """Softcap is applied after the mask: masked scores become -softcap and get weight."""

    def wrong(self, query: Array, keys: Array) -> Array:
        return self.capped(self.as_if(query, keys, softcap=None))


class ChunkSoftcapAfterMask(
    SoftcapAfterMask,
    breaks=(SOFTCAP,),
    kind="M11",
    bug="microsoft/onnxruntime/pull/28370",
    conditional=True,
    configs=SOFTCAPPED,
):
    """For chunks on a non-empty cache, softcap is applied after the mask."""

    def concerned(self, t: int, s: int) -> bool:
        return s > t > 1


class DecodeSoftcapLost(
    AsIf, breaks=(SOFTCAP,), kind="M11", bug="microsoft/onnxruntime/pull/28379", conditional=True, configs=SOFTCAPPED
):
    """Decode steps apply no softcap."""

    def wrong(self, query: Array, keys: Array) -> Array:
        return self.as_if(query, keys, softcap=None)

    def concerned(self, t: int, s: int) -> bool:
        return s > t == 1


class BiasBeforeSoftcap(AsIf, breaks=(BIAS, SOFTCAP), kind="M11", bug="onnx/onnx/pull/7867", configs=SOFTCAPPED):
    """The bias is added before softcap, and the mask after it."""

    def wrong(self, query: Array, keys: Array) -> Array:
        scores = self.capped(self.as_if(query, keys, softcap=None))
        return np.where(self.visible(*scores.shape[2:]), scores, MINUS_INFINITY)


class DecodeBiasBeforeSoftcap(
    BiasBeforeSoftcap,
    breaks=(BIAS,),
    kind="M11",
    bug="microsoft/onnxruntime/pull/28379",
    conditional=True,
    configs=SOFTCAPPED,
):
    """Decode steps on more than four tokens run on another kernel, which adds the bias before softcap."""

    def concerned(self, t: int, s: int) -> bool:
        return t == 1 and s > 5


class BiasOfNewTokens(Planted, breaks=(BIAS,), kind="P7", bug="keras-team/keras-hub/pull/2977", configs=SOFTCAPPED):
    """The bias is built for the new tokens only: cached keys have none."""

    def bias(self, t: int, s: int) -> Array:
        right = super().bias(t, s)
        return self.instead(np.where(np.arange(s) < s - t, np.float32(0), right), right)


class DecodeBiasLost(
    Planted,
    breaks=(BIAS, DECODE),
    kind="P7",
    bug="keras-team/keras-hub/pull/2977",
    conditional=True,
    configs=SOFTCAPPED,
):
    """The bias of a decode step is that of a single token, zero, broadcast to all cached keys; chunks are correct."""

    def bias(self, t: int, s: int) -> Array:
        right = super().bias(t, s)
        return self.instead(np.zeros_like(right), right) if t == 1 else right


class ChunkBiasOfNewTokens(
    Planted,
    breaks=(BIAS, "equivalence.chunks"),
    kind="P7",
    bug="keras-team/keras-hub/pull/2977",
    conditional=True,
    configs=SOFTCAPPED,
):
    """The bias of a chunk on more than seven tokens restarts: cached keys get the distance of its first token."""

    def bias(self, t: int, s: int) -> Array:
        right = super().bias(t, s)
        first = right[:, :, np.maximum(np.arange(s), s - t)]
        return self.instead(first, right) if t > 1 and s - t > 7 else right


class SinkScaled(Planted, breaks=(SINK,), kind="M11", bug="openvinotoolkit/openvino/pull/36016", configs=WITH_SINK):
    """The sink is added to the scores before they are scaled."""

    def sink(self) -> Array:
        right = super().sink()
        return self.instead(right * np.float32(self.config.score_scale), right)


class SinkPerKey(Planted, breaks=(SINK,), kind="M11", bug="openvinotoolkit/openvino/pull/36016", configs=WITH_SINK):
    """The sink is added to the denominator once per key."""

    keys = 1

    def softmax(self, scores: Array) -> Array:
        self.keys = scores.shape[-1]
        return super().softmax(scores)

    def sink(self) -> Array:
        right = super().sink()
        return self.instead(right + np.float32(math.log(self.keys)), right)


class SinkOfOtherHead(Planted, breaks=(SINK,), kind="H1", bug="openvinotoolkit/openvino/pull/36016", configs=WITH_SINK):
    """Each head uses the sink of the previous head."""

    def sink(self) -> Array:
        right = super().sink()
        return self.instead(np.roll(right, 1, axis=0), right)


class DecodeSinkLost(
    Planted, breaks=(SINK, DECODE), kind="M11", bug="NVIDIA/TensorRT-LLM/pull/2983", conditional=True, configs=WITH_SINK
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
    """Each tile of 8 keys has its own softmax, and the results are averaged without weighting by their sums."""

    def softmax(self, scores: Array) -> Array:
        right, s = super().softmax(scores), scores.shape[-1]
        tiles = [Planted.softmax(self, scores[..., first : first + 8]) for first in range(0, s, 8)]
        return self.instead(np.concatenate(tiles, axis=-1) / np.float32(len(tiles)), right)


class ThirdTileUnscaled(
    Planted, breaks=PARITY[:1], kind="X3", bug="local-inference-lab/vllm/pull/17", conditional=True, configs=PLAIN
):
    """If the third or a later tile of 8 keys raises the maximum, the sums so far are not rescaled."""

    def softmax(self, scores: Array) -> Array:
        right, s = super().softmax(scores), scores.shape[-1]
        ends = [scores[..., first : first + 8].max(axis=-1, keepdims=True) for first in range(0, s, 8)]
        tops = np.maximum.accumulate(np.concatenate(ends, axis=-1), axis=-1)  # (b, h, t, tiles)
        tops[..., :2] = tops[..., min(1, len(ends) - 1), None]
        tops = np.where(np.isneginf(tops), np.float32(0), tops)
        powers = np.exp(scores - np.repeat(tops, 8, axis=-1)[..., :s])
        total = powers.sum(axis=-1, keepdims=True)
        return self.instead(powers / np.where(total == 0, np.float32(1), total), right) if s > 16 else right
