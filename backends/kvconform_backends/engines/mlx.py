"""``mlx`` and ``mlx-rotating``: the caches of mlx-lm, and the attention that its models call with them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.base import scaled_dot_product_attention
from mlx_lm.models.cache import KVCache, RotatingKVCache, trim_prompt_cache

from kvconform_backends.abilities import without
from kvconform_backends.engines.operator import OwnCache
from kvconform_backends.numpy.cache import Array
from kvconform_specs.config import Config


class MlxCache(OwnCache):
    """``KVCache``: buffers that grow by 256 slots. The mask is the cache's own, made before the update."""

    claims = replace(OwnCache.claims, abilities=(*OwnCache.claims.abilities, "contents"))
    options = ("sink",)

    def start(self, batch: int) -> Any:
        return self.of_batch(KVCache(), batch)

    def of_batch(self, cache: Any, batch: int) -> Any:
        cache.batch = batch
        return cache

    def put(self, cache: Any, *inputs: Array) -> Array:
        c, (query, key, value) = self.config, map(mx.array, inputs)
        sinks = None if c.sink is None else mx.array(self.sink()[:, 0, 0])
        seen = cache.make_mask(query.shape[2], window_size=c.window, return_array=False)
        keys, values = cache.update_and_fetch(key, value)
        return np.array(scaled_dot_product_attention(query, keys, values, cache, c.score_scale, seen, sinks))

    def trim(self, cache: Any, count: int) -> Any:
        trim_prompt_cache([cache], count)
        return cache

    def contents(self, cache: Any) -> list[list[tuple[Array, Array]]]:
        if cache.keys is None:
            empty = np.zeros((self.config.kv_heads, 0, self.config.head_dim), np.float32)
            return [[(empty, empty)] * cache.batch]
        return [list(zip(*map(np.array, cache.keys_and_values()), strict=True))]


class MlxRotating(MlxCache):
    """``RotatingKVCache``, as models with a sliding window make it."""

    claims = replace(OwnCache.claims, abilities=without(OwnCache.claims, "truncate"), retention="window")

    @classmethod
    def refuses(cls, config: Config, device: str) -> str | None:
        return super().refuses(config, device) or (None if config.window else "it is the cache of layers with a window")

    def start(self, batch: int) -> Any:
        return self.of_batch(RotatingKVCache(max_size=self.config.window), batch)
