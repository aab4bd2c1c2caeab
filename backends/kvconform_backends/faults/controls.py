"""Caches that look wrong and are right. They must pass every clause: what convicts one of them is a false alarm."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvconform_backends.numpy_cache import Array, Cache, NumpyCache


class RopeFromSeven(NumpyCache):
    """Rope counts from 7: queries and keys turn by the same angle more, which no score feels."""

    def rotate(self, x: Array, positions: Array) -> Array:
        return super().rotate(x, positions + 7)


class NewestFirst(NumpyCache):
    """The newest token lies in slot 0, and the mask is turned round with it."""

    def append(self, cache: Cache, layer: int, key: Array, value: Array) -> tuple[Array, Array]:
        cache.keys[layer] = np.concatenate([key[:, :, ::-1], cache.keys[layer]], axis=2)
        cache.values[layer] = np.concatenate([value[:, :, ::-1], cache.values[layer]], axis=2)
        return cache.keys[layer], cache.values[layer]

    def mask(self, t: int, s: int) -> Array:
        return super().mask(t, s)[:, ::-1]

    def truncate(self, cache: Cache, length: int) -> Cache:
        if not 0 <= length <= cache.length:
            raise ValueError(f"cannot keep {length} of {cache.length} tokens")
        first = cache.length - length
        return Cache([k[:, :, first:] for k in cache.keys], [v[:, :, first:] for v in cache.values])


@dataclass
class Buffers(Cache):
    """Keys and values of every layer, ``(b, g, capacity, d)`` each, of which ``written`` slots count."""

    written: int = 0

    @property
    def length(self) -> int:
        return self.written


class Static(NumpyCache):
    """Buffers of the capacity, written in place. What was forgotten stays in its slot, and is never read."""

    def start(self, batch: int) -> Buffers:
        c = self.config
        made = [np.zeros((batch, c.kv_heads, c.capacity, c.head_dim), np.float32) for _ in range(2 * c.layers)]
        return Buffers(made[::2], made[1::2])

    def fork(self, cache: Cache) -> Buffers:
        return Buffers([k.copy() for k in cache.keys], [v.copy() for v in cache.values], cache.length)

    def truncate(self, cache: Cache, length: int) -> Cache:
        if not 0 <= length <= cache.length:
            raise ValueError(f"cannot keep {length} of {cache.length} tokens")
        return Buffers(cache.keys, cache.values, length)

    def reorder(self, cache: Cache, rows: list[int]) -> Cache:
        return Buffers([k[rows] for k in cache.keys], [v[rows] for v in cache.values], cache.length)

    def reset(self, cache: Cache) -> Cache:
        return Buffers(cache.keys, cache.values, 0)

    def append(self, cache: Cache, layer: int, key: Array, value: Array) -> tuple[Array, Array]:
        assert isinstance(cache, Buffers)
        past, s = cache.written, cache.written + key.shape[2]
        cache.keys[layer][:, :, past:s] = key
        cache.values[layer][:, :, past:s] = value
        if layer == self.config.layers - 1:
            cache.written = s
        return cache.keys[layer][:, :, :s], cache.values[layer][:, :, :s]
