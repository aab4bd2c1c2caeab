"""``numpy``: the simplest correct cache, in float32, to be checked by eye. It grows by concatenation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvconform_specs.claims import Claims
from kvconform_specs.config import Config

Array = NDArray[Any]


@dataclass
class Cache:
    """Keys and values of every layer, ``(b, g, s, d)`` each."""

    keys: list[Array]
    values: list[Array]

    @property
    def length(self) -> int:
        return int(self.keys[0].shape[2])


class NumpyCache:
    """Attention and decoder over a cache that is plain arrays."""

    claims = Claims(
        profiles=("attention", "decoder"),
        abilities=("full", "length", "truncate", "fork", "reorder", "reset"),
        overflow="refused",
    )

    def __init__(self, config: Config, weights: Mapping[str, Array], device: str = "cpu") -> None:
        self.config, self.weights = config, weights

    # --- lifecycle ---
    def start(self, batch: int) -> Cache:
        c = self.config
        empty = np.zeros((batch, c.kv_heads, 0, c.head_dim), np.float32)
        return Cache([empty] * c.layers, [empty] * c.layers)

    def truncate(self, cache: Cache, length: int) -> Cache:
        if not 0 <= length <= cache.length:
            raise ValueError(f"cannot keep {length} of {cache.length} tokens")
        return Cache([k[:, :, :length] for k in cache.keys], [v[:, :, :length] for v in cache.values])

    def fork(self, cache: Cache) -> Cache:
        return Cache(list(cache.keys), list(cache.values))

    def reorder(self, cache: Cache, rows: list[int]) -> Cache:
        return Cache([k[rows] for k in cache.keys], [v[rows] for v in cache.values])

    def reset(self, cache: Cache) -> Cache:
        return self.start(cache.keys[0].shape[0])

    def length(self, cache: Cache) -> list[int]:
        return [cache.length] * cache.keys[0].shape[0]

    # --- arithmetic ---
    def step(self, cache: Cache, *inputs: Array) -> tuple[Array, Cache]:
        cache = self.fork(cache)
        if cache.length + inputs[-1].shape[-2 if len(inputs) == 3 else -1] > self.config.capacity:
            raise ValueError(f"capacity of {self.config.capacity} tokens exceeded")
        if len(inputs) == 3:
            return self.attend(cache, 0, *inputs), cache
        return self.decode(cache, inputs[0]), cache

    def full(self, *inputs: Array) -> Array:
        return self.step(self.start(inputs[0].shape[0]), *inputs)[0]

    def attend(self, cache: Cache, layer: int, query: Array, key: Array, value: Array) -> Array:
        """Appends key and value ``(b, g, t, d)`` to the layer and attends with query ``(b, h, t, d)``."""
        keys, values = self.append(cache, layer, key, value)  # (b, g, s, d)
        scores = self.scores(query, keys[:, self.kv_head()])
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
        return np.asarray(scores / scores.sum(axis=-1, keepdims=True) @ values[:, self.kv_head()])

    def append(self, cache: Cache, layer: int, key: Array, value: Array) -> tuple[Array, Array]:
        """Stores key and value ``(b, g, t, d)`` behind those that are there, and returns all of them."""
        cache.keys[layer] = np.concatenate([cache.keys[layer], key], axis=2)
        cache.values[layer] = np.concatenate([cache.values[layer], value], axis=2)
        return cache.keys[layer], cache.values[layer]

    def scores(self, query: Array, keys: Array) -> Array:
        """``(b, h, t, s)``: scaled, capped, then masked."""
        c = self.config
        scores = query @ keys.swapaxes(-1, -2) * np.float32(c.score_scale)
        if c.softcap is not None:
            scores = np.float32(c.softcap) * np.tanh(scores / np.float32(c.softcap))
        return np.where(self.mask(query.shape[2], keys.shape[2]), scores, np.float32(-np.inf))

    def kv_head(self) -> Array:
        """Which KV head each query head reads."""
        return np.arange(self.config.heads) // self.config.group

    def mask(self, t: int, s: int) -> Array:
        """``(t, s)``: which of ``s`` tokens each of the ``t`` newest sees."""
        i, j = np.arange(s - t, s)[:, None], np.arange(s)
        seen = j <= i
        return seen if self.config.window is None else seen & (i - j < self.config.window)

    def decode(self, cache: Cache, tokens: Array) -> Array:
        c, w = self.config, self.weights
        positions = self.positions(cache, tokens.shape[1])
        x = w["embed"][tokens]  # (b, t, width)
        if c.positions == "learned":
            x = x + w["position"][positions]
        for layer in range(c.layers):
            at = f"layers.{layer}."
            y = self.norm(x, w[at + "norm_attention"])
            q, k, v = (self.split(y @ w[at + name]) for name in ("query", "key", "value"))
            if c.positions == "rope":
                q, k = self.rotate(q, positions), self.rotate(k, positions)
            mixed = self.attend(cache, layer, q, k, v).swapaxes(1, 2).reshape(*x.shape[:2], -1)
            x = x + mixed @ w[at + "output"]
            if c.mlp:
                y = self.norm(x, w[at + "norm_mlp"])
                gate = y @ w[at + "gate"]
                x = x + (gate / (1 + np.exp(-gate)) * (y @ w[at + "up"])) @ w[at + "down"]
        return np.asarray(self.norm(x, w["norm_final"]) @ w["lm_head"])

    def positions(self, cache: Cache, t: int) -> Array:
        return np.arange(cache.length, cache.length + t)

    def split(self, x: Array) -> Array:
        """``(b, t, heads * d)`` to ``(b, heads, t, d)``."""
        return x.reshape(*x.shape[:2], -1, self.config.head_dim).swapaxes(1, 2)

    def rotate(self, x: Array, positions: Array) -> Array:
        half = x.shape[-1] // 2
        angle = positions[:, None] * 10000.0 ** (-np.arange(half) / half)
        cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
        a, b = x[..., :half], x[..., half:]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    def norm(self, x: Array, gain: Array) -> Array:
        return np.asarray(x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(1e-6)) * gain)

    def witness(self) -> dict[str, Any]:
        return {"numpy": np.__version__}
