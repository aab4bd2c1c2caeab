"""Unusual but correct caches. They must pass every clause: a clause that detects one of them is a false positive.

``configs``: the configs on which the cache differs from the plain one; default: all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from kvconform_backends.abilities import without
from kvconform_backends.faults.configs import LATENT, PLACED, ROPE, SOFTCAPPED
from kvconform_backends.numpy.cache import Array, Cache, NumpyCache
from kvconform_backends.numpy.paged import NumpyPaged
from kvconform_backends.numpy.static import Buffers, NumpyStatic
from kvconform_backends.validation import check_length, check_lengths
from kvconform_specs.config import Config

BLOCK = 3
"""Keys per block of the running softmax."""


class RopeFromSeven(NumpyCache):
    """RoPE counts from 7: queries and keys are rotated by the same additional angle, which cancels in the scores."""

    configs = ROPE

    def rotate(self, x: Array, positions: Array) -> Array:
        return super().rotate(x, positions + 7)


class DimsReversed(NumpyCache):
    """Keys are cached with reversed head dims, and queries are reversed accordingly."""

    designs: tuple[str, ...] = ()

    def attend(self, cache: Cache, layer: int, query: Array, key: Array, value: Array) -> Array:
        return super().attend(cache, layer, query[..., ::-1], key[..., ::-1], value)

    def contents(self, cache: Cache) -> list[list[tuple[Array, Array]]]:
        return [[(keys[..., ::-1], values) for keys, values in layer] for layer in super().contents(cache)]


class LatentExpanded(NumpyCache):
    """Latent attention expands every cached latent to keys and values in each step, and absorbs nothing."""

    claims = replace(NumpyCache.claims, abilities=without(NumpyCache.claims, "macs"))
    configs = LATENT

    def absorbed(self, query: Array, latents: Array, rotary: Array) -> Array:
        c = self.config
        up = self.weights[f"layers.{self.layer}.up"]
        keys, values = np.split((latents @ up).reshape(*latents.shape[:1], -1, c.heads, 2 * c.head_dim), 2, axis=-1)
        keys, values = keys.swapaxes(1, 2), values.swapaxes(1, 2)  # (b, h, s, d) each
        keys = np.concatenate([keys, np.broadcast_to(rotary, (*keys.shape[:-1], c.rotary_dim))], axis=-1)
        return np.asarray(self.softmax(self.scores(query, keys)) @ values)


class PromptStore(NumpyCache):
    """Keys and values of prompts are stored by their tokens and their context, and used again for the same prompt."""

    configs = ROPE
    designs: tuple[str, ...] = ("rotary", "kv_source")
    most = 256  # stored rows

    def __init__(self, config: Config, weights: Mapping[str, Array], device: str = "cpu") -> None:
        super().__init__(config, weights, device)
        self.store: dict[object, Array] = {}
        self.prompt: Array | None = None  # (b, t): the tokens of a step on an empty cache

    def run(self, cache: Cache, inputs: tuple[Array, ...], mask: Array | None = None) -> Array:
        self.prompt = inputs[0] if self.config.profile == "decoder" and cache.length == 0 else None
        return super().run(cache, inputs, mask)

    def key(self, row: Array) -> object:
        """What the keys and values of a prompt ``(t,)`` are stored by."""
        return row.tobytes(), self.context

    def stored_or(self, layer: int, row: Array, new: Array) -> Array:
        """The stored keys and values ``(2, g, t, d)`` of a prompt, or else these, which are stored."""
        while len(self.store) >= self.most:
            del self.store[next(iter(self.store))]
        return self.store.setdefault((layer, self.key(row)), new)

    def append(self, cache: Cache, layer: int, key: Array, value: Array) -> tuple[Array, Array]:
        if self.prompt is not None:
            rows = zip(self.prompt, key, value, strict=True)
            held = [self.stored_or(layer, row, np.stack([k, v])) for row, k, v in rows]
            key, value = np.stack(held, axis=1)
        return super().append(cache, layer, key, value)


class BiasByKey(NumpyCache):
    """The bias depends on the key's position only: the query's part is constant across its scores."""

    configs = SOFTCAPPED

    def bias(self, t: int, s: int) -> Array:
        return super().bias(t, s)[:, -1:]


class GeneratesWithoutACache(NumpyCache):
    """Generation recomputes everything for each token, and picks the last of several equal largest logits."""

    configs = PLACED

    def generate(self, tokens: Array, new: int, **options: Any) -> Array:
        prompt = tokens.shape[1]
        for _ in range(new):
            best = self.config.vocabulary - 1 - self.uncached_forward(tokens, **options)[:, -1:, ::-1].argmax(axis=-1)
            tokens = np.concatenate([tokens, best], axis=1)
        return tokens[:, prompt:]


class NewestFirst(NumpyCache):
    """The newest token is in slot 0; masks and biases are reversed accordingly."""

    designs: tuple[str, ...] = ()

    def append(self, cache: Cache, layer: int, key: Array, value: Array) -> tuple[Array, Array]:
        cache.keys[layer] = np.concatenate([self.stored(key)[:, :, ::-1], cache.keys[layer]], axis=2)
        cache.values[layer] = np.concatenate([self.stored(value)[:, :, ::-1], cache.values[layer]], axis=2)
        return self.loaded(cache.keys[layer]), self.loaded(cache.values[layer])

    def behind(self, t: int, s: int) -> Array:
        return super().behind(t, s)[:, ::-1]

    def visible(self, t: int, s: int) -> Array:
        seen = self.mask(t, s)
        return seen if self.allowed is None else seen & self.allowed[:, None, None, ::-1]

    def truncate(self, cache: Cache, length: int) -> Cache:
        check_length(length, cache.length)
        first = cache.length - length
        return Cache([k[:, :, first:] for k in cache.keys], [v[:, :, first:] for v in cache.values])

    def contents(self, cache: Cache) -> list[list[tuple[Array, Array]]]:
        return [[(k[:, ::-1], v[:, ::-1]) for k, v in layer] for layer in super().contents(cache)]


class ViewsKept(NumpyCache):
    """The keys and values of a prompt are not copied, as it claims: they stay in the memory of the caller."""

    claims = replace(NumpyCache.claims, inputs="kept")

    def append(self, cache: Cache, layer: int, key: Array, value: Array) -> tuple[Array, Array]:
        if cache.length:
            return super().append(cache, layer, key, value)
        cache.keys[layer], cache.values[layer] = self.stored(key), self.stored(value)
        return self.loaded(cache.keys[layer]), self.loaded(cache.values[layer])


@dataclass(eq=False)
class Columns(Cache):
    """Keys are stored as ``(b, g, d, s)``."""

    @property
    def length(self) -> int:
        return int(self.values[0].shape[2])


class KeysTransposed(NumpyCache):
    """Keys are stored transposed, in the layout of their product with a query."""

    designs: tuple[str, ...] = ("rotary",)

    def start(self, batch: int) -> Cache:
        made = super().start(batch)
        return Columns([k.swapaxes(2, 3) for k in made.keys], made.values)

    def truncate(self, cache: Cache, length: int) -> Cache:
        kept = super().truncate(cache, length)
        return Columns([k[..., :length] for k in cache.keys], kept.values)

    def fork(self, cache: Cache) -> Cache:
        return Columns(list(cache.keys), list(cache.values))

    def reorder(self, cache: Cache, rows: list[int]) -> Cache:
        moved = super().reorder(cache, rows)
        return Columns(moved.keys, moved.values)

    def contents(self, cache: Cache) -> list[list[tuple[Array, Array]]]:
        return [[(k.swapaxes(1, 2), v) for k, v in layer] for layer in super().contents(cache)]

    def append(self, cache: Cache, layer: int, key: Array, value: Array) -> tuple[Array, Array]:
        cache.keys[layer] = np.concatenate([cache.keys[layer], self.stored(key).swapaxes(2, 3)], axis=3)
        cache.values[layer] = np.concatenate([cache.values[layer], self.stored(value)], axis=2)
        return self.loaded(cache.keys[layer]).swapaxes(2, 3), self.loaded(cache.values[layer])


class MaskWhereNeeded(NumpyCache):
    """No window while it exceeds the length, no mask for single tokens, and a top-left mask for prompts."""

    def mask(self, t: int, s: int) -> Array:
        window = self.config.window_of(self.layer)
        if window is not None and s > window:
            return super().mask(t, s)
        return np.ones((1, s), bool) if t == 1 else np.tri(t, s, k=0 if t == s else s - t, dtype=bool)


class RunningSoftmax(NumpyCache):
    """The softmax is accumulated block by block with a running maximum (Milakov and Gimelshein 2018, 1805.02867)."""

    def attention(self, query: Array, keys: Array, values: Array) -> Array:
        scores = self.scores(query, keys[:, self.kv_head()])  # (b, h, t, s)
        values, sink = values[:, self.kv_head()], self.sink()
        top = np.broadcast_to(sink, (*scores.shape[:3], 1))
        total, mixed = np.exp(sink - finite(sink)), np.zeros_like(query)
        for first in range(0, scores.shape[3], BLOCK):
            block = scores[..., first : first + BLOCK]
            higher = np.maximum(top, block.max(axis=-1, keepdims=True))
            shrunk, powers = np.exp(top - finite(higher)), np.exp(block - finite(higher))
            total = total * shrunk + powers.sum(axis=-1, keepdims=True)
            mixed = mixed * shrunk + self.product(powers, values[:, :, first : first + BLOCK])
            top = higher
        return np.asarray(mixed / np.where(total == 0, np.float32(1), total))


class InPlace(NumpyStatic):
    """Buffers of the capacity, written in place. Truncated tokens stay in their slots and are never read."""

    claims = replace(NumpyStatic.claims, abilities=without(NumpyStatic.claims, "immutable", "in_place"))

    def target(self, cache: Any, in_place: bool) -> Buffers:
        return super().target(cache, True)

    def truncate(self, cache: Any, length: Any) -> Buffers:
        return Buffers(cache.keys, cache.values, check_lengths(length, cache.written))

    def reset(self, cache: Any) -> Buffers:
        return Buffers(cache.keys, cache.values, np.zeros_like(cache.written))


class StaleBehindMask(InPlace):
    """The whole buffer is attended to: stale slots have a score of minus infinity and are multiplied by zero."""

    claims = replace(InPlace.claims, unused_slots="finite")

    def cleared(self, cache: Any, buffer: Array) -> Array:
        return self.loaded(buffer)


class FixedSizes(InPlace):
    """A step is compiled for each of a few sizes beforehand, and takes no other number of tokens."""

    claims = replace(InPlace.claims, static_shapes=(1, 2, 4, 8, 16), max_chunk=16)

    def admit(
        self, cache: Any, inputs: tuple[Array, ...], counts: Array | None = None, mask: Array | None = None
    ) -> Array:
        admitted = super().admit(cache, inputs, counts, mask)
        t = inputs[0].shape[1 if self.config.profile == "decoder" else 2]
        if t and t not in self.claims.static_shapes:
            raise AssertionError(f"there is no program for {t} tokens")
        return admitted

    def uncached_forward(self, *inputs: Array, **options: Any) -> Array:
        return NumpyStatic(self.config, self.weights).uncached_forward(*inputs, **options)


class ScatteredPages(NumpyPaged):
    """Every second page of the pool is taken first, and the page freed last is reused last."""

    def __init__(self, config: Config, weights: Mapping[str, Array], device: str = "cpu") -> None:
        super().__init__(config, weights, device)
        self.grow(40)
        self.unused = self.unused[::2] + self.unused[1::2]

    def take(self) -> int:
        if self.unused:
            self.unused.append(self.unused.pop(0))
        return super().take()


def finite(x: Array) -> Array:
    """Replaces minus infinity by zero, since the difference of two infinities is NaN."""
    return np.where(np.isneginf(x), np.float32(0), x)
