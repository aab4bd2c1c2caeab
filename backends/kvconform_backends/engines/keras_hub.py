"""``keras-hub``: ``CachedMultiHeadAttention`` of keras-hub, whose cache is one array of fixed length, on JAX."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

os.environ.setdefault("KERAS_BACKEND", "jax")

import jax
from keras_hub.layers import CachedMultiHeadAttention

from kvconform_backends.engines.operator import SHAPES, FunctionalCache, padded
from kvconform_backends.numpy.cache import Array
from kvconform_specs.config import Config


class KerasHub(FunctionalCache):
    """The layer's projections are the identity, since queries, keys and values are given."""

    claims = replace(FunctionalCache.claims, static_shapes=SHAPES, max_chunk=max(SHAPES))
    options = ("default scale only",)

    @classmethod
    def refuses(cls, config: Config, device: str) -> str | None:
        return super().refuses(config, device) or ("the layer has no grouped heads" if config.group > 1 else None)

    def __init__(self, config: Config, weights: Mapping[str, Array], device: str = "cpu") -> None:
        super().__init__(config, weights, device)
        self.mha, row = CachedMultiHeadAttention(config.heads, config.head_dim), (1, 1, config.heads * config.head_dim)
        self.mha.build(row, row)
        for name in ("query", "key", "value", "output"):
            setattr(self.mha, f"_{name}_dense", lambda x: x)
        self.compiled = jax.jit(self.called)

    def called(self, rows: Any, seen: Any, cached: Mapping[str, Any]) -> Any:
        query, key, value = rows
        return self.mha(query, value, key, attention_mask=seen, **cached)

    def empty(self, batch: int) -> Any:
        c = self.config
        return np.zeros((batch, 2, c.capacity, c.heads, c.head_dim), np.float32)

    def put(self, cache: Any, *inputs: Array) -> Array:
        total, t = self.config.capacity, inputs[0].shape[2]
        seen = self.mask(total, total)[None, cache.offset : cache.offset + t]
        cached = {"cache": cache.held, "cache_update_index": cache.offset}
        output, cache.held = self.compiled([x.swapaxes(1, 2) for x in inputs], seen, cached)
        cache.offset += t
        return np.array(output).swapaxes(1, 2)

    def uncached_forward(self, *inputs: Array, **options: Any) -> Array:
        rows = [x.swapaxes(1, 2) for x in padded(self.config, inputs)]
        seen = self.mask(rows[0].shape[1], rows[0].shape[1])[None]
        return np.array(self.compiled(rows, seen, {})).swapaxes(1, 2)[:, :, : inputs[0].shape[2]]
