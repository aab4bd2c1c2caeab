"""Faults of token positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from kvconform_backends.faults.configs import LEARNED, PLACED, ROPE
from kvconform_backends.faults.planted import Planted
from kvconform_backends.numpy.cache import Array, Cache
from kvconform_backends.numpy.layers import rotated, turned
from kvconform_specs.tensors import rounded

DECODE = "equivalence.decode"
POSITIONS = "definition.positions"
DECODER = "definition.decoder"


@dataclass(eq=False)
class Placed(Cache):
    """A cache whose positions are ahead of its length."""

    ahead: int = 0

    @classmethod
    def of(cls, cache: Cache, ahead: int) -> Placed:
        return cls(cache.keys, cache.values, ahead)


def ahead(cache: Cache) -> int:
    return cache.ahead if isinstance(cache, Placed) else 0


class PositionRestart(
    Planted,
    breaks=(DECODE, "equivalence.chunks", POSITIONS),
    kind="P1",
    bug="pytorch/executorch/pull/2010",
    configs=PLACED,
):
    """Positions start at 0 in each step."""

    def positions(self, cache: Cache, t: int) -> Array:
        return self.instead(np.arange(t), super().positions(cache, t))


class RopeInterleaved(
    Planted, breaks=(POSITIONS, DECODER), kind="P6", bug="vllm-project/vllm-ascend/pull/12780", configs=ROPE
):
    """RoPE rotates neighbouring dimensions instead of halves, in queries and keys alike (self-consistent)."""

    def rotate(self, x: Array, positions: Array) -> Array:
        d = x.shape[-1]
        halves = np.arange(d).reshape(2, -1).T.reshape(-1)  # neighbours hold what would be d/2 apart
        wrong = super().rotate(x[..., np.argsort(halves)], positions)[..., halves]
        return self.instead(wrong, super().rotate(x, positions))


class RopeInHalfPrecision(Planted, breaks=(POSITIONS,), kind="P4", bug="EleutherAI/gpt-neox/issues/1003", configs=ROPE):
    """RoPE's angles are computed in half precision."""

    def rotate(self, x: Array, positions: Array) -> Array:
        half = x.shape[-1] // 2
        powers = (-np.arange(half) / half).astype(np.float16)
        angle = positions[:, None].astype(np.float16) * np.float16(10000.0) ** powers
        return self.instead(rotated(x, angle), super().rotate(x, positions))


class QueryAfterUpdate(
    Planted, breaks=(POSITIONS,), kind="P2", bug="ml-explore/mlx-lm/issues/1805", conditional=True, configs=ROPE
):
    """In a batch, queries are rotated by the offset after the update, too far by the length of the chunk."""

    def rotate(self, x: Array, positions: Array) -> Array:
        right = super().rotate(x, positions)
        is_query = x.shape[1] == self.config.heads
        late = is_query and len(x) > 1 and positions[0] > 0
        return self.instead(super().rotate(x, positions + len(positions)), right) if late else right


class PositionsSaturate(
    Planted,
    breaks=(POSITIONS, DECODER),
    kind="W6",
    bug="huggingface/transformers/pull/38156",
    conditional=True,
    configs=LEARNED,
):
    """Positions continue from the sliding window's length, which saturates."""

    def positions(self, cache: Cache, t: int) -> Array:
        past = min(cache.length, self.config.window or cache.length)
        return self.instead(np.arange(past, past + t), super().positions(cache, t))


class ChunkAtLastPosition(
    Planted, breaks=(POSITIONS,), kind="P1", bug="NVIDIA/TransformerEngine/pull/536", conditional=True, configs=PLACED
):
    """All tokens of a chunk on a non-empty cache get the position of its last token."""

    def positions(self, cache: Cache, t: int) -> Array:
        right = super().positions(cache, t)
        return self.instead(right[-1:].repeat(t), right) if cache.length else right


class SecondDecodeTwice(
    Planted, breaks=(POSITIONS,), kind="P2", bug="skyzh/tiny-llm/pull/46", conditional=True, configs=PLACED
):
    """From the second consecutive decode step on, the offset has advanced by all tokens instead of the new ones."""

    twice = False
    steps: tuple[Cache, int] | None = None  # the cache of the last step, and how many decode steps made it

    def step(self, cache: Cache, *inputs: Array, **options: Any) -> tuple[Array, Cache]:
        same = self.steps is not None and self.steps[0] is cache
        before = self.steps[1] if self.steps is not None and same else 0
        self.twice = before > 0
        output, grown = super().step(cache, *inputs, **options)
        self.steps = grown, before + (grown.length == cache.length + 1 and cache.length > 0)
        return output, grown

    def positions(self, cache: Cache, t: int) -> Array:
        right = super().positions(cache, t)
        far = np.minimum(right + cache.length - 1, self.config.capacity - 1)
        return self.instead(far, right) if self.twice else right


class PositionsAdvanceTwice(
    Planted, breaks=(POSITIONS, DECODE), kind="P2", bug="skyzh/tiny-llm/pull/46", configs=PLACED
):
    """The offset is advanced by both the cache and the model."""

    def positions(self, cache: Cache, t: int) -> Array:
        right = super().positions(cache, t)
        return self.instead(np.minimum(right + cache.length, self.config.capacity - 1), right)


class CachedKeysTurnAgain(
    Planted, breaks=(POSITIONS, DECODE), kind="P5", bug="NeuraLegion/shainet/pull/110", configs=ROPE
):
    """Each step rotates the cached keys again by their own positions."""

    def append(self, cache: Cache, layer: int, key: Array, value: Array) -> tuple[Array, Array]:
        past = cache.keys[layer]
        cache.keys[layer] = self.instead(self.rotate(past, np.arange(past.shape[2])), past)
        return super().append(cache, layer, key, value)


class BaseGrowsWithLength(
    Planted,
    breaks=(POSITIONS, DECODE),
    kind="P5",
    bug="huggingface/transformers/issues/25104",
    conditional=True,
    configs=ROPE,
):
    """Beyond 10 tokens, RoPE is stretched by the length; cached keys keep their previous rotation."""

    def rotate(self, x: Array, positions: Array) -> Array:
        right, s = super().rotate(x, positions), int(positions[-1]) + 1
        return self.instead(super().rotate(x, positions * 10 / s), right) if s > 10 else right


class RopeTableGrownInHalf(
    Planted,
    breaks=("shape.first-step", POSITIONS, DECODER),
    kind="P4",
    bug="huggingface/transformers/issues/25681",
    conditional=True,
    configs=ROPE,
):
    """The table of cosines and sines is correct up to position 16; later entries are in bfloat16."""

    def rotate(self, x: Array, positions: Array) -> Array:
        half = x.shape[-1] // 2
        angle = positions[:, None] * 10000.0 ** (-np.arange(half) / half)
        table = np.stack([np.cos(angle), np.sin(angle)]).astype(np.float32)
        cos, sin = np.where(positions[:, None] < 16, table, rounded(table, "bfloat16"))
        return self.instead(turned(x, cos, sin), super().rotate(x, positions))


class RopeOfHeadDim(
    Planted, breaks=(POSITIONS, DECODER), kind="P6", bug="huggingface/transformers/issues/48630", configs=ROPE
):
    """RoPE's frequencies are theta^(-i / d) instead of theta^(-2 i / d), as if twice as many dims were rotated."""

    def rotate(self, x: Array, positions: Array) -> Array:
        half = x.shape[-1] // 2
        angle = positions[:, None] * 10000.0 ** (-np.arange(half) / (2 * half))
        return self.instead(rotated(x, angle), super().rotate(x, positions))


class LastPairStays(
    Planted,
    breaks=(POSITIONS, DECODER),
    kind="P6",
    bug="huggingface/transformers/issues/48630",
    conditional=True,
    configs=ROPE,
):
    """The last pair of dimensions, which rotates slowest, is not rotated: only distant tokens are affected."""

    def rotate(self, x: Array, positions: Array) -> Array:
        right, half = super().rotate(x, positions), x.shape[-1] // 2
        still = np.arange(x.shape[-1]) % half == half - 1
        return self.instead(np.where(still, x, right), right)
