"""Black boxes in numpy, correct and wrong, addressed as ``tests/support/black_boxes.py:Name``."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from kvconform_specs.claims import Claims
from kvconform_specs.config import Config
from kvconform_specs.program import Program

Array = NDArray[Any]
Cache = tuple[Array, int]
"""Hidden states of the past ``(b, s, width)``, and the number of rows."""
WIDTH, HEADS, DIM = 12, 3, 4


class BlackBox:
    """Two layers of attention over hidden states. It caches the inputs, which is slow but correct."""

    claims = Claims(profiles=("hidden",), abilities=("uncached_forward", "length", "reset"), reference="self")
    configs: ClassVar[dict[str, Config]] = {
        "hidden-self": Config("hidden", heads=HEADS, kv_heads=HEADS, head_dim=DIM, width=WIDTH, capacity=24)
    }
    recognised = "hidden states in and out, written for a test"
    assumed: tuple[str, ...] = ("no more than 24 tokens are tried",)
    source = __file__
    noise: tuple[float, float, int] | None = None

    def __init__(self, config: Config, weights: Mapping[str, Array], device: str) -> None:
        assert not weights
        drawn = np.random.default_rng(0)
        self.weights = [drawn.normal(0, 0.4, (WIDTH, WIDTH)).astype(np.float32) for _ in range(8)]

    def start(self, batch: int) -> Cache:
        return np.zeros((batch, 0, WIDTH), np.float32), batch

    def step(self, cache: Cache, x: Array) -> tuple[Array, Cache]:
        past = np.concatenate([cache[0], x], axis=1)
        return self.forward(past, cached=True)[:, cache[0].shape[1] :], (past, cache[1])

    def uncached_forward(self, x: Array) -> Array:
        if self.noise is not None:
            storage, accumulation, seed = self.noise
            x = self.shaken(x, storage + accumulation * np.sqrt(WIDTH), np.random.default_rng(seed))
        return self.forward(x, cached=False)

    def forward(self, x: Array, cached: bool) -> Array:
        for layer in range(2):
            q, k, v, o = self.weights[4 * layer : 4 * layer + 4]
            x = x + self.attention(x @ q, x @ k, x @ v, cached) @ o
        return x

    def attention(self, q: Array, k: Array, v: Array, cached: bool) -> Array:
        b, s, _ = q.shape
        heads = [y.reshape(b, s, HEADS, DIM).swapaxes(1, 2) for y in (q, k, v)]
        scores = heads[0] @ heads[1].swapaxes(2, 3) / np.float32(2)
        scores = np.where(self.seen(s, cached), scores, np.float32(-1e9))
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        mixed = weights @ heads[2] / weights.sum(axis=-1, keepdims=True)
        return mixed.swapaxes(1, 2).reshape(b, s, WIDTH).astype(np.float32)

    def seen(self, s: int, cached: bool) -> NDArray[np.bool_]:
        return np.tri(s, dtype=bool)

    def length(self, cache: Cache) -> list[int]:
        return [cache[0].shape[1]] * cache[1]

    def reset(self, cache: Cache) -> Cache:
        return self.start(cache[1])

    def perturbed(self, storage: float, accumulation: float, seed: int) -> BlackBox:
        other, drawn = copy.copy(self), np.random.default_rng(seed)
        size = storage + accumulation * np.sqrt(WIDTH)
        other.weights = [self.shaken(w, size, drawn) for w in self.weights]
        other.noise = storage, accumulation, seed
        return other

    @staticmethod
    def shaken(x: Array, size: float, drawn: np.random.Generator) -> Array:
        return np.asarray(x * (1 + size * drawn.uniform(-1, 1, x.shape)), np.float32)

    def script_setup(self) -> str:
        return "from black_boxes import BlackBox\nbackend = BlackBox(None, {}, 'cpu')"

    def script(self, program: Program, tag: str) -> str:
        raise NotImplementedError


class DropsOldest(BlackBox):
    """From the sixth token on, the cached path does not see the oldest one."""

    def seen(self, s: int, cached: bool) -> NDArray[np.bool_]:
        seen = super().seen(s, cached)
        if cached and s > 5:
            seen[5:, 0] = False
        return seen


class OffBy(BlackBox):
    """Scores of the cached path are wrong by a ten-thousandth."""

    def attention(self, q: Array, k: Array, v: Array, cached: bool) -> Array:
        return super().attention(q * np.float32(1 + 1e-4 * cached), k, v, cached)


class NotCausal(BlackBox):
    """Both its uncached forward and its cached path let a token see the next one: its reference is unreliable."""

    def seen(self, s: int, cached: bool) -> NDArray[np.bool_]:
        return np.tri(s, k=1, dtype=bool)


class Perturbed(BlackBox):
    """Its uncached forward prepends the tokens of the last cached step."""

    left: Array | None = None

    def step(self, cache: Cache, x: Array) -> tuple[Array, Cache]:
        output, grown = super().step(cache, x)
        self.left = grown[0]
        return output, grown

    def uncached_forward(self, x: Array) -> Array:
        if self.left is None or len(self.left) != len(x):
            return super().uncached_forward(x)
        return self.forward(np.concatenate([self.left, x], axis=1), cached=False)[:, self.left.shape[1] :]


class Wavers(BlackBox):
    """Correct, but the rounding of each output depends on all tokens of the call, as with shared expert products."""

    def forward(self, x: Array, cached: bool) -> Array:
        last = np.float32(2.0**-22) * np.sign(x[:, -1:, :1])
        return np.asarray(super().forward(x, cached) * (1 + last), np.float32)


class Raises(BlackBox):
    """Its uncached forward raises on more than nine tokens."""

    def uncached_forward(self, x: Array) -> Array:
        if x.shape[1] > 9:
            raise ValueError("at most nine tokens")
        return super().uncached_forward(x)
