"""``numpy``: the simplest correct cache. It grows by concatenation; no step modifies its handle.

The attention profile also stores keys and values in 16 bits, computes in float32 and rounds its outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from kvconform.backend import Backend, CacheDesign
from kvconform_backends.abilities import BASIC
from kvconform_backends.greedy import greedy
from kvconform_backends.numpy.layers import Array, NumpyLayers
from kvconform_backends.rotary import lacking
from kvconform_backends.validation import check_counts, check_inputs, check_length, check_rows
from kvconform_specs.claims import Claims
from kvconform_specs.config import DTYPES, Config
from kvconform_specs.tensors import rounded

__all__ = ["Array", "Cache", "NumpyCache"]


@dataclass(eq=False)
class Cache:
    """Stored keys and values of every layer, ``(b, g, s, d)`` each."""

    keys: list[Any]
    values: list[Any]

    @property
    def length(self) -> int:
        """The length of the longest row."""
        return int(self.keys[0].shape[2])

    @property
    def lengths(self) -> Array:
        """The length of each row."""
        return np.full(self.keys[0].shape[0], self.length)


@dataclass(eq=False)
class RaggedCache(Cache):
    """A cache whose rows have different lengths, ``written``."""

    written: Array

    @property
    def length(self) -> int:
        return int(self.written.max())

    @property
    def lengths(self) -> Array:
        return self.written


class NumpyCache(NumpyLayers, Backend):
    """Attention and decoder over plain arrays."""

    cache_design: CacheDesign | None = "concatenation"
    claims = Claims(
        profiles=("attention", "decoder"),
        abilities=(
            *BASIC,
            *("truncate", "immutable", "empty_append", "mask", "bytes", "macs", "generate", "last_only", "contexts"),
        ),
        dtypes=DTYPES,
        overflow="refused",
    )

    designs: tuple[str, ...] = ("rotary", "kv_source", "latent")  # see ``rotary.lacking``
    measured = 0  # multiply-adds of the last count_macs step

    @classmethod
    def refuses(cls, config: Config, device: str) -> str | None:
        if config.profile == "decoder" and config.dtype != "float32":
            return "the decoder supports float32 only"
        return lacking(config, *cls.designs)

    # --- lifecycle ---
    def start(self, batch: int) -> Cache:
        c = self.config
        if c.latent:  # the latents are in place of the keys, the rotary keys in place of the values
            latents, rotary = (np.zeros((batch, 1, 0, size), np.float32) for size in (c.latent, c.rotary_dim))
            return Cache([latents] * c.layers, [rotary] * c.layers)
        empty = self.stored(np.zeros((batch, c.kv_heads, 0, c.head_dim), np.float32))
        return Cache([empty] * c.layers, [empty] * c.layers)

    def truncate(self, cache: Cache, length: int) -> Cache:
        check_length(length, cache.length)
        return Cache([k[:, :, :length] for k in cache.keys], [v[:, :, :length] for v in cache.values])

    def fork(self, cache: Cache) -> Cache:
        return Cache(list(cache.keys), list(cache.values))

    def reorder(self, cache: Cache, rows: list[int]) -> Cache:
        check_rows(rows, len(cache.lengths))
        return Cache([k[rows] for k in cache.keys], [v[rows] for v in cache.values])

    def reset(self, cache: Cache) -> Cache:
        return self.start(len(cache.lengths))

    # --- introspection ---
    def length(self, cache: Cache) -> list[int]:
        return [int(n) for n in cache.lengths]

    def free_slots(self, cache: Cache) -> list[int]:
        return [self.config.capacity - int(n) for n in cache.lengths]

    def contents(self, cache: Cache) -> list[list[tuple[Array, Array]]]:
        return [
            list(zip(self.loaded(cache.keys[layer]), self.loaded(cache.values[layer]), strict=True))
            for layer in self.config.caching
        ]

    def bytes(self, cache: Cache) -> int:
        return sum(x.nbytes for x in (*cache.keys, *cache.values))

    def macs(self) -> int:
        return self.measured

    def runtime_info(self) -> dict[str, Any]:
        return {"numpy": np.__version__}

    # --- steps ---
    def step(
        self,
        cache: Cache,
        *inputs: Array,
        mask: Array | None = None,
        count_macs: bool = False,
        last_only: bool = False,
        context: int = 0,
    ) -> tuple[Array, Cache]:
        self.admit(cache, inputs, mask=mask)
        cache, self.last_only, self.context = self.fork(cache), last_only, context
        output = self.run(cache, inputs, mask)
        if count_macs:
            self.measured = self.products
        return output, cache

    def admit(
        self, cache: Cache, inputs: tuple[Array, ...], counts: Array | None = None, mask: Array | None = None
    ) -> Array:
        """``(b,)``: the number of tokens added to each row. Raises TypeError or ValueError, before any write, if the
        cache cannot take the inputs."""
        batch, counts = len(cache.lengths), self.counts(cache, inputs, counts)
        s = int((cache.lengths + counts).max())
        if s > self.config.capacity:
            raise ValueError(f"{s} tokens exceed the capacity of {self.config.capacity}")
        if mask is not None and (mask.dtype != np.bool_ or mask.shape != (batch, s)):
            raise ValueError(f"expected a bool mask {(batch, s)}, got {mask.dtype} {mask.shape}")
        return counts

    def counts(self, cache: Cache, inputs: tuple[Array, ...], counts: Array | None) -> Array:
        """``(b,)``: the number of tokens that well-formed inputs add to each row."""
        batch = len(cache.lengths)
        t = check_inputs(self.config, batch, inputs)
        return np.full(batch, t) if counts is None else np.array(check_counts(counts, batch, t))

    def uncached_forward(self, *inputs: Array, **options: Any) -> Array:
        return self.step(self.start(inputs[0].shape[0]), *inputs, **options)[0]

    def generate(self, tokens: Array, new: int, **options: Any) -> Array:
        return greedy(self, tokens, new, **options)

    def run(self, cache: Cache, inputs: tuple[Array, ...], mask: Array | None = None) -> Array:
        """The outputs for validated inputs, whose keys and values are appended to ``cache``."""
        self.allowed, self.products = mask, 0
        if self.config.profile == "decoder":
            return self.decode(cache, inputs[0])
        return rounded(self.attend(cache, 0, *inputs), self.config.dtype)

    # --- keys and values ---
    def attend(self, cache: Cache, layer: int, query: Array, key: Array, value: Array) -> Array:
        """Appends key and value ``(b, g, t, d)`` to the layer and attends with query ``(b, h, t, d)``."""
        self.layer = layer
        return self.on_all(query, *self.append(cache, layer, key, value))

    def attend_shared(self, cache: Cache, layer: int, query: Array) -> Array:
        self.layer, source = layer, self.config.source_of(layer)
        return self.on_all(query, self.loaded(cache.keys[source]), self.loaded(cache.values[source]))

    def on_all(self, query: Array, keys: Array, values: Array) -> Array:
        """Attention on everything that a layer holds. Keys whose angles change with the length are cached unrotated."""
        if self.config.latent:
            return self.absorbed(query, keys, values)
        if self.config.changes_at:
            query, keys = self.rotate(query, self.places_now), self.rotate(keys, np.arange(keys.shape[2]))
        return self.attention(query, keys, values)

    def append(self, cache: Cache, layer: int, key: Array, value: Array) -> tuple[Array, Array]:
        """Appends key and value ``(b, g, t, d)`` and returns all keys and values."""
        cache.keys[layer] = np.concatenate([cache.keys[layer], self.stored(key)], axis=2)
        cache.values[layer] = np.concatenate([cache.values[layer], self.stored(value)], axis=2)
        return self.loaded(cache.keys[layer]), self.loaded(cache.values[layer])

    def stored(self, x: Array) -> Array:
        """float32 in the cache's representation: the config's dtype, bfloat16 as the upper 16 bits."""
        if self.config.dtype == "float16":
            return x.astype(np.float16)
        if self.config.dtype == "bfloat16":
            return (rounded(x, "bfloat16").view(np.uint32) >> 16).astype(np.uint16)
        return x

    def loaded(self, x: Array) -> Array:
        """Stored numbers as float32."""
        if self.config.dtype == "bfloat16":
            return (x.astype(np.uint32) << 16).view(np.float32)
        return x.astype(np.float32, copy=False)
