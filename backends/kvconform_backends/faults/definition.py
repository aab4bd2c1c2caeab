"""Faults of the arithmetic. Where they are uniform, the cache agrees with itself, and only the definition tells."""

from __future__ import annotations

import math

import numpy as np

from kvconform_backends.faults.controls import Static
from kvconform_backends.faults.equivalence import PLACED
from kvconform_backends.faults.planted import Planted
from kvconform_backends.numpy_cache import Array, Cache

PARITY = ("definition.attention", "definition.decoder")
SOFTCAP = ("attention-softcap", "decoder-softcap")
WINDOW = ("attention-window", "decoder-learned")


class WindowTooLong(
    Planted, breaks=(*PARITY, "causality.visibility"), bug="microsoft/onnxruntime/pull/25927", configs=WINDOW
):
    """The window leaves out the token itself when it counts: one token too many is visible."""

    def mask(self, t: int, s: int) -> Array:
        right, behind = super().mask(t, s), np.arange(s - t, s)[:, None] - np.arange(s)
        return self.instead(right | (behind == self.config.window), right)


class WindowTooShort(
    Planted, breaks=(*PARITY, "causality.past-seen"), bug="huggingface/transformers/issues/39408", configs=WINDOW
):
    """One token too few is visible in the window."""

    def mask(self, t: int, s: int) -> Array:
        right, behind = super().mask(t, s), np.arange(s - t, s)[:, None] - np.arange(s)
        return self.instead(right & (behind < (self.config.window or s) - 1), right) if self.config.window else right


class DecodeWindowTooLong(
    Planted, breaks=(*PARITY, "equivalence.decode"), bug="vllm-project/vllm/issues/3385", stealth=True, configs=WINDOW
):
    """The window is one token too long in decode steps alone."""

    def mask(self, t: int, s: int) -> Array:
        right, behind = super().mask(t, s), np.arange(s - t, s)[:, None] - np.arange(s)
        return self.instead(right | (behind == self.config.window), right) if s > t == 1 else right


class DecodeWindowLost(Planted, breaks=PARITY, bug="onnxruntime/mobius/pull/371", stealth=True, configs=WINDOW):
    """Decode steps on more than nine tokens see all of them: the window does not reach that kernel."""

    def mask(self, t: int, s: int) -> Array:
        right = super().mask(t, s)
        return self.instead(np.ones((t, s), bool), right) if t == 1 and s > 10 else right


class TailAttended(Planted, Static, breaks=(*PARITY, "equivalence.chunks"), bug="meta-pytorch/gpt-fast/issues/233"):
    """The whole static buffer is attended: zeros behind the valid tokens take their share."""

    valid = 0

    def append(self, cache: Cache, layer: int, key: Array, value: Array) -> tuple[Array, Array]:
        keys, _values = super().append(cache, layer, key, value)
        self.valid, self.faulty = keys.shape[2], self.faulty + (keys.shape[2] < self.config.capacity)
        return cache.keys[layer], cache.values[layer]

    def mask(self, t: int, s: int) -> Array:
        right = super().mask(t, self.valid)
        return np.concatenate([right, np.ones((t, s - self.valid), bool)], axis=1)


class LastTileAttended(Planted, Static, breaks=PARITY, bug="pytorch/pytorch/pull/169222", stealth=True):
    """A decode step reads its last tile of 4 slots to the end: one stale or empty slot more, when 3 are valid."""

    valid = 0

    def append(self, cache: Cache, layer: int, key: Array, value: Array) -> tuple[Array, Array]:
        keys, values = super().append(cache, layer, key, value)
        self.valid = s = keys.shape[2]
        if s > key.shape[2] == 1 and s % 4 == 3:
            self.faulty += 1
            return cache.keys[layer][:, :, : s + 1], cache.values[layer][:, :, : s + 1]
        return keys, values

    def mask(self, t: int, s: int) -> Array:
        return np.concatenate([super().mask(t, self.valid), np.ones((t, s - self.valid), bool)], axis=1)


class ValuesAreKeys(Planted, breaks=PARITY, bug="awslabs/sockeye/pull/731"):
    """The first step writes its keys as values."""

    def append(self, cache: Cache, layer: int, key: Array, value: Array) -> tuple[Array, Array]:
        first = cache.keys[layer].shape[2] == 0
        return super().append(cache, layer, key, self.instead(key, value) if first else value)


class ReorderMakesValuesKeys(Planted, breaks=PARITY, bug="huggingface/transformers/issues/34232", stealth=True):
    """Reorder rebuilds the values out of the keys."""

    def reorder(self, cache: Cache, rows: list[int]) -> Cache:
        right = super().reorder(cache, rows)
        return Cache(right.keys, [self.instead(k, v) for k, v in zip(right.keys, right.values, strict=True)])


class HeadsTiled(Planted, breaks=("definition.grouping", *PARITY), bug="onnx/onnx/pull/7274"):
    """KV heads are tiled as a block, not repeated one by one."""

    def kv_head(self) -> Array:
        return self.instead(np.arange(self.config.heads) % self.config.kv_heads, super().kv_head())


class HeadsByCount(Planted, breaks=("definition.grouping",), bug="PSAL-POSTECH/ONNXim/pull/34"):
    """The KV head is the query head over the number of KV heads, not over the size of their groups."""

    def kv_head(self) -> Array:
        c = self.config
        return self.instead(np.arange(c.heads) // c.kv_heads % c.kv_heads, super().kv_head())


class ChunkHeadsTiled(Planted, breaks=("definition.grouping",), bug="EricLBuehler/candle-vllm/pull/52", stealth=True):
    """KV heads are tiled where several tokens come on a cache that is not empty; prompt and decode step are right."""

    chunk = False

    def attend(self, cache: Cache, layer: int, query: Array, key: Array, value: Array) -> Array:
        self.chunk = query.shape[2] > 1 and cache.keys[layer].shape[2] > 0
        return super().attend(cache, layer, query, key, value)

    def kv_head(self) -> Array:
        right = super().kv_head()
        return self.instead(np.arange(self.config.heads) % self.config.kv_heads, right) if self.chunk else right


class ScaleIgnored(
    Planted, breaks=("definition.scale",), bug="flashinfer-ai/flashinfer/issues/1023", configs=("attention-softcap",)
):
    """A scale that is given has no effect: scores are multiplied by 1 / sqrt(d) all the same."""

    def scores(self, query: Array, keys: Array) -> Array:
        c = self.config
        given = np.float32(1 / math.sqrt(c.head_dim) / c.score_scale)
        return super().scores(self.instead(query * given, query), keys)


class ScaleTwice(Planted, breaks=("definition.scale", *PARITY), bug="sgl-project/sglang/pull/34765"):
    """The scale is applied when keys are written and again when they are read."""

    def scores(self, query: Array, keys: Array) -> Array:
        return super().scores(query, self.instead(keys * np.float32(self.config.score_scale), keys))


class DecodeScaleTwice(Planted, breaks=("definition.scale",), bug="sgl-project/sglang/pull/34765", stealth=True):
    """Decode steps apply the scale twice."""

    def scores(self, query: Array, keys: Array) -> Array:
        if keys.shape[2] > query.shape[2] == 1:
            query = self.instead(query * np.float32(self.config.score_scale), query)
        return super().scores(query, keys)


class ScaleOfPaddedHead(
    Planted,
    breaks=("definition.scale", "definition.decoder"),
    bug="microsoft/onnxruntime/pull/27992",
    stealth=True,
    configs=("decoder-learned", "decoder-softcap"),
):
    """The default scale is that of the head dim padded to a multiple of 8."""

    def scores(self, query: Array, keys: Array) -> Array:
        d = self.config.head_dim
        wrong = query * np.float32(math.sqrt(d / (-(-d // 8) * 8))) if self.config.scale is None else query
        return super().scores(self.instead(wrong, query), keys)


class SoftcapAfterMask(
    Planted, breaks=("definition.softcap", "causality.future-blind"), bug="onnx/onnx/issues/7865", configs=SOFTCAP
):
    """Softcap bends the masked scores: what is masked gets the weight of -softcap."""

    def scores(self, query: Array, keys: Array) -> Array:
        right, cap = super().scores(query, keys), self.config.softcap
        return right if cap is None or not self.bends(query, keys) else self.instead(np.maximum(right, -cap), right)

    def bends(self, query: Array, keys: Array) -> bool:
        return True


class ChunkSoftcapAfterMask(
    SoftcapAfterMask,
    breaks=("definition.softcap",),
    bug="microsoft/onnxruntime/pull/28370",
    stealth=True,
    configs=SOFTCAP,
):
    """Softcap bends the masked scores of several tokens on a cache that is not empty."""

    def bends(self, query: Array, keys: Array) -> bool:
        return bool(keys.shape[2] > query.shape[2] > 1)


class DecodeSoftcapLost(
    Planted, breaks=("definition.softcap",), bug="microsoft/onnxruntime/pull/28379", stealth=True, configs=SOFTCAP
):
    """Decode steps have no softcap."""

    def scores(self, query: Array, keys: Array) -> Array:
        right, c = super().scores(query, keys), self.config
        if c.softcap is None or not keys.shape[2] > query.shape[2] == 1:
            return right
        return self.instead(query @ keys.swapaxes(-1, -2) * np.float32(c.score_scale), right)


class RopeInterleaved(
    Planted,
    breaks=("definition.positions", "definition.decoder"),
    bug="vllm-project/vllm-ascend/pull/12780",
    configs=("decoder-rope",),
):
    """Rope turns neighbours, not halves; queries and keys alike, so that the cache agrees with itself."""

    def rotate(self, x: Array, positions: Array) -> Array:
        d = x.shape[-1]
        halves = np.arange(d).reshape(2, -1).T.reshape(-1)  # neighbours hold what would be d/2 apart
        wrong = super().rotate(x[..., np.argsort(halves)], positions)[..., halves]
        return self.instead(wrong, super().rotate(x, positions))


class RopeInHalfPrecision(
    Planted, breaks=("definition.positions",), bug="EleutherAI/gpt-neox/issues/1003", configs=("decoder-rope",)
):
    """Rope's angles are computed in half precision."""

    def rotate(self, x: Array, positions: Array) -> Array:
        half = x.shape[-1] // 2
        angle = positions[:, None].astype(np.float16) * np.float16(10000.0) ** (-np.arange(half) / half).astype(
            np.float16
        )
        cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
        a, b = x[..., :half], x[..., half:]
        wrong = np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
        return self.instead(wrong, super().rotate(x, positions))


class QueryAfterUpdate(
    Planted,
    breaks=("definition.positions",),
    bug="ml-explore/mlx-lm/issues/1805",
    stealth=True,
    configs=("decoder-rope",),
):
    """In a batch, queries turn by the offset after the update: by the chunk too far."""

    def rotate(self, x: Array, positions: Array) -> Array:
        right = super().rotate(x, positions)
        is_query = x.shape[1] == self.config.heads
        late = is_query and len(x) > 1 and positions[0] > 0
        return self.instead(super().rotate(x, positions + len(positions)), right) if late else right


class PositionsSaturate(
    Planted,
    breaks=("definition.positions", "definition.decoder"),
    bug="huggingface/transformers/pull/38156",
    stealth=True,
    configs=("decoder-learned",),
):
    """Positions count on from the sliding window's length, which saturates."""

    def positions(self, cache: Cache, t: int) -> Array:
        past = min(cache.length, self.config.window or cache.length)
        return self.instead(np.arange(past, past + t), super().positions(cache, t))


class ChunkAtLastPosition(
    Planted, breaks=("definition.positions",), bug="NVIDIA/TransformerEngine/pull/536", stealth=True, configs=PLACED
):
    """All tokens of a chunk on a cache that is not empty get the position of its last one."""

    def positions(self, cache: Cache, t: int) -> Array:
        right = super().positions(cache, t)
        return self.instead(right[-1:].repeat(t), right) if cache.length else right


class SecondDecodeTwice(
    Planted, breaks=("definition.positions",), bug="skyzh/tiny-llm/pull/46", stealth=True, configs=PLACED
):
    """From the second decode step in a row on, the offset has advanced by all tokens and not by the new ones."""

    twice = False
    steps: tuple[Cache, int] | None = None  # the cache of the last step, and how many decode steps made it

    def step(self, cache: Cache, *inputs: Array) -> tuple[Array, Cache]:
        same = self.steps is not None and self.steps[0] is cache
        before = self.steps[1] if self.steps is not None and same else 0
        self.twice = before > 0
        output, grown = super().step(cache, *inputs)
        self.steps = grown, before + (grown.length == cache.length + 1 and cache.length > 0)
        return output, grown

    def positions(self, cache: Cache, t: int) -> Array:
        right = super().positions(cache, t)
        far = np.minimum(right + cache.length - 1, self.config.capacity - 1)
        return self.instead(far, right) if self.twice else right
