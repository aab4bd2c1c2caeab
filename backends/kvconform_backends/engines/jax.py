"""``jax``: ``jax.nn.dot_product_attention`` on buffers of the capacity, each step compiled by ``jax.jit``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from kvconform_backends.engines.operator import StaticOperator
from kvconform_backends.numpy.cache import Array
from kvconform_backends.numpy.static import Buffers
from kvconform_backends.validation import check_rows
from kvconform_specs.config import Config


class JaxAttention(StaticOperator):
    """Buffers are JAX arrays; a step scatters its tokens into them and attends to the whole capacity behind a mask."""

    claims = replace(StaticOperator.claims, sees_nothing="finite")
    options = ("alibi",)

    def __init__(self, config: Config, weights: Mapping[str, Array], device: str = "cpu") -> None:
        super().__init__(config, weights, device)
        self.compiled, self.scattered = jax.jit(self.attend_all), jax.jit(scattered)

    def attend_all(self, query: Any, keys: Any, values: Any, seen: Any, bias: Any) -> Any:
        heads_last = (x.swapaxes(1, 2) for x in (query, keys, values))
        scale = self.config.score_scale
        return jax.nn.dot_product_attention(*heads_last, bias=bias, mask=seen, scale=scale).swapaxes(1, 2)

    def attention(self, query: Array, keys: Any, values: Any) -> Array:
        t, s = query.shape[2], keys.shape[2]
        bias = self.bias(t, s) if self.config.positions == "alibi" else None
        return np.array(self.compiled(query, keys, values, self.visible(t, s), bias))

    def append(self, cache: Any, layer: int, key: Array, value: Array) -> tuple[Any, Any]:
        slots = np.where(self.places < 0, self.config.capacity, self.places)  # beyond the end: dropped
        for buffers, new in ((cache.keys, key), (cache.values, value)):
            buffers[layer] = self.scattered(buffers[layer], new, slots)
        return cache.keys[layer], cache.values[layer]

    def reorder(self, cache: Any, rows: list[int]) -> Buffers:
        check_rows(rows, len(cache.written))
        keys, values = ([x[np.array(rows)] for x in buffers] for buffers in (cache.keys, cache.values))
        return Buffers(keys, values, cache.written[rows])

    def stored(self, x: Array) -> Any:
        return jnp.asarray(x)

    def loaded(self, x: Any) -> Array:
        return np.asarray(x)


def scattered(buffer: Any, new: Any, slots: Any) -> Any:
    """Buffer ``(b, g, capacity, d)`` with the columns of ``new`` ``(b, g, t, d)`` in slots ``(b, t)``."""
    return jax.vmap(lambda held, one, at: held.at[:, at].set(one, mode="drop"))(buffer, new, slots)
