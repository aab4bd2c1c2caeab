"""``flax``: ``flax.nnx.MultiHeadAttention`` and its cache, which takes one token at a time; compiled by ``jax.jit``."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import jax
import numpy as np
from flax import nnx

from kvconform_backends.engines.operator import ONE_BY_ONE, FunctionalCache, padded
from kvconform_backends.numpy.cache import Array
from kvconform_specs.config import Config


@partial(jax.jit, static_argnums=(0, 1))
def called(graph: Any, decode: bool, state: Any, rows: Any, seen: Any) -> tuple[Any, Any]:
    module = nnx.merge(graph, state)
    return module(*rows, mask=seen, decode=decode), nnx.state(module)


@cache
def fresh(batch: int, c: Config) -> Any:
    """The module, whose projections are identity matrices, with an empty cache, as graph and state."""
    wide, sizes = c.heads * c.head_dim, {"num_kv_heads": c.kv_heads, "in_kv_features": c.kv_heads * c.head_dim}
    module = nnx.MultiHeadAttention(c.heads, wide, **sizes, use_bias=False, decode=True, rngs=nnx.Rngs(0))
    for part in (module.query, module.key, module.value, module.out):
        kernel = part.kernel[...]
        part.kernel[...] = np.eye(round(kernel.size**0.5), dtype=np.float32).reshape(kernel.shape)
    module.init_cache((batch, c.capacity, wide))
    return nnx.split(module)


class FlaxCache(FunctionalCache):
    claims, options = ONE_BY_ONE, ("default scale only",)

    def empty(self, batch: int) -> Any:
        return fresh(batch, self.config)

    def put(self, cache: Any, *inputs: Array) -> Array:
        behind = cache.offset - np.arange(self.config.capacity)  # the module hides later slots itself
        cache.held, output = self.run_module(cache, True, inputs, behind < (self.config.window or behind.size))
        cache.offset += 1
        return output

    def uncached_forward(self, *inputs: Array, **options: Any) -> Array:
        wide = padded(self.config, inputs)
        seen = self.mask(wide[0].shape[2], wide[0].shape[2])
        return self.run_module(self.start(len(wide[0])), False, wide, seen)[1][:, :, : inputs[0].shape[2]]

    def run_module(self, cache: Any, decode: bool, inputs: Any, seen: Array) -> tuple[Any, Array]:
        rows = [x.swapaxes(1, 2).reshape(len(x), x.shape[2], -1) for x in inputs]
        output, state = called(cache.held[0], decode, cache.held[1], rows, seen.reshape(1, 1, -1, seen.shape[-1]))
        return (cache.held[0], state), self.split(np.asarray(output))
