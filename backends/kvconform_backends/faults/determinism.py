"""Faults within every bound: the order of a sum, and so the last bits, depends on something irrelevant."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from typing import Any

import numpy as np

from kvconform_backends.abilities import without
from kvconform_backends.faults.configs import DECODERS, ROPE
from kvconform_backends.faults.planted import Planted
from kvconform_backends.numpy.cache import Array, Cache, NumpyCache
from kvconform_backends.numpy.layers import turned
from kvconform_specs.tensors import rounded

REPEATABLE, BATCH, CHUNK, TOKEN = (
    (f"determinism.{name}",) for name in ("repeatable", "batch-invariant", "chunk-invariant", "same-token")
)


class OneByOne(NumpyCache):
    """Each token is computed in a step of its own: a prompt has the same bits as decode steps."""

    claims = replace(
        NumpyCache.claims, abilities=without(NumpyCache.claims, "mask", "macs", "contexts", "empty_append")
    )
    designs = ("kv_source", "latent")  # not "rotary": the tokens of a call turn by the number of all of them
    together = 1  # tokens of the call

    def step(  # type: ignore[override]  # keywords according to its claims
        self, cache: Cache, *inputs: Array, last_only: bool = False
    ) -> tuple[Array, Cache]:
        self.together = int(self.admit(cache, inputs)[0])
        axis = -1 if self.config.profile == "decoder" else -2
        outputs = []
        for column in range(self.together):
            output, cache = super().step(cache, *(np.take(x, [column], axis=axis) for x in inputs))
            outputs.append(output)
        return outputs[-1] if last_only else np.concatenate(outputs, axis=-2), cache


class Splits(Planted):
    """Base class: sums over the values in several parts, as a merge of split keys does."""

    def parts(self, s: int) -> int:
        """The number of parts into which the sum over ``s`` keys is split."""
        return 1

    def attention(self, query: Array, keys: Array, values: Array) -> Array:
        right, s = super().attention(query, keys, values), keys.shape[2]
        if self.parts(s) == 1:
            return right
        weights, shared = self.softmax(self.scores(query, keys[:, self.kv_head()])), values[:, self.kv_head()]
        size = -(-s // self.parts(s))
        parts = [weights[..., at : at + size] @ shared[..., at : at + size, :] for at in range(0, s, size)]
        return self.instead(np.asarray(sum(parts[1:], start=parts[0])), right)


class SplitsByCall(Splits, breaks=REPEATABLE, kind="X4", bug="flashinfer-ai/flashinfer/pull/1675"):
    """Sums are split into one, two or three parts in turn: repeating a program gives different bits."""

    calls = 0

    def step(self, cache: Cache, *inputs: Array, **named: Any) -> tuple[Array, Cache]:
        self.calls += 1
        return super().step(cache, *inputs, **named)

    def parts(self, s: int) -> int:
        return self.calls % 3 + 1


class TunedAtFirst(Splits, breaks=REPEATABLE, kind="X4", bug="flashinfer-ai/flashinfer/pull/1675", conditional=True):
    """The first call for each shape beyond eight keys tries another kernel, which sums in two parts."""

    tuned: frozenset[Hashable] = frozenset()
    tuning = False

    def attention(self, query: Array, keys: Array, values: Array) -> Array:
        shapes = self.layer, query.shape, keys.shape
        self.tuning = shapes not in self.tuned
        self.tuned |= {shapes}
        return super().attention(query, keys, values)

    def parts(self, s: int) -> int:
        return 2 if self.tuning and s > 8 else 1


class SplitsByBatch(Splits, breaks=BATCH, kind="X4", bug="flashinfer-ai/flashinfer/issues/4647"):
    """The smaller the batch, the more parts its sums over keys are split into, one per idle worker."""

    def parts(self, s: int) -> int:
        return max(4 - self.batch, 1)


class LongSplitsByBatch(Splits, breaks=BATCH, kind="X4", bug="deepseek-ai/FlashMLA/issues/212", conditional=True):
    """More than twelve keys are summed in two parts if the batch has three rows."""

    def parts(self, s: int) -> int:
        return 2 if s > 12 and self.batch > 2 else 1


class SplitsByChunk(Splits, OneByOne, breaks=CHUNK, kind="X4", bug="lightseekorg/tokenspeed/issues/904"):
    """Decode steps sum in two parts and prompts in one, token by token."""

    def parts(self, s: int) -> int:
        return 2 if self.together == 1 else 1


class LongSplitsByChunk(
    Splits, OneByOne, breaks=CHUNK, kind="X4", bug="lightseekorg/tokenspeed/issues/904", conditional=True
):
    """More than eight keys are summed in parts as long as the call, if it has two to four tokens."""

    def parts(self, s: int) -> int:
        return -(-s // self.together) if s > 8 and 2 <= self.together <= 4 else 1


class DilutedByTail(
    Planted, breaks=(*TOKEN, "definition.decoder"), kind="M6", bug="meta-pytorch/gpt-fast/issues/233", configs=DECODERS
):
    """The softmax's denominator includes the unfilled slots of the buffer, at a score of zero."""

    def softmax(self, scores: Array) -> Array:
        right = super().softmax(scores)
        top = scores.max(axis=-1, keepdims=True)
        total = np.exp(scores - top).sum(axis=-1, keepdims=True)
        tail = (self.config.capacity - scores.shape[-1]) * np.exp(-top)
        return self.instead((right * total / (total + tail)).astype(np.float32), right)


class RopeTablesInHalf(
    Planted, breaks=TOKEN, kind="P4", bug="huggingface/transformers/issues/25681", conditional=True, configs=ROPE
):
    """RoPE's tables of cosines and sines are stored in bfloat16."""

    def rotate(self, x: Array, positions: Array) -> Array:
        half = x.shape[-1] // 2
        angle = positions[:, None] * 10000.0 ** (-np.arange(half) / half)
        cos, sin = (rounded(table.astype(np.float32), "bfloat16") for table in (np.cos(angle), np.sin(angle)))
        return self.instead(turned(x, cos, sin), super().rotate(x, positions))
