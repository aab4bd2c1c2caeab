"""``module-buffers``: the attention modules own the cache, as in the decoder of *LLMs from scratch* (chapter 4, bonus).

Each keeps its cache in the buffers ``cache_k`` and ``cache_v``, which grow by concatenation, and counts its tokens. A
model holds one sequence at a time, of any number of rows, until the cache is reset.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, cat, nn

from kvconform_backends.abilities import without
from kvconform_backends.torch.decoder import Attend, LayerMask, LayerMasks, attend_to
from kvconform_backends.torch.eager import COMMON, Torch, copied
from kvconform_backends.validation import check_length, check_rows
from kvconform_specs.config import Config

Array = NDArray[Any]
Rows = int
"""The handle of a sequence is its number of rows; all other state is in the modules."""


class CachedAttention(nn.Module):
    """One layer's attention and its cache ``(b, g, s, d)``; both buffers are None while it is empty."""

    cache_k: Tensor | None
    cache_v: Tensor | None

    def __init__(self, config: Config, layer: int, layer_masks: LayerMasks) -> None:
        super().__init__()
        self.config, self.layer, self.layer_masks = config, layer, layer_masks
        self.reset_cache()

    def reset_cache(self) -> None:
        self.fill(None, None)

    def fill(self, keys: Tensor | None, values: Tensor | None) -> None:
        self.register_buffer("cache_k", keys, persistent=False)
        self.register_buffer("cache_v", values, persistent=False)
        self.position = 0 if keys is None else keys.shape[2]  # of the next token

    def forward(self, query: Tensor, key: Tensor, value: Tensor, use_cache: bool = True) -> Tensor:
        start, t = self.position if use_cache else 0, query.shape[2]
        if use_cache:
            if self.cache_k is not None and self.cache_v is not None:
                key, value = cat((self.cache_k, key), dim=2), cat((self.cache_v, value), dim=2)  # (b, g, s, d)
            else:
                key, value = key.clone(), value.clone()  # a view would keep the memory of the queries alive
            self.fill(key, value)
        return attend_to(self.config, self.layer_mask(start, t), query, key, value)

    def layer_mask(self, start: int, t: int) -> LayerMask:
        """The mask of ``t`` tokens after ``start`` cached ones."""
        return self.layer_masks.of_layer(self.layer, slice(start, start + t), start + t)


class ModuleBuffers(Torch):
    """A layer or a decoder whose attention modules own the cache."""

    cache_design = "concatenation"
    claims = replace(COMMON, abilities=without(COMMON, "fork", "mask"), max_sequences=1)
    module: ClassVar[type[CachedAttention]] = CachedAttention

    def __init__(self, config: Config, weights: Mapping[str, NDArray[np.float32]], device: str = "cpu") -> None:
        super().__init__(config, weights, device)
        self.layers = [self.module(config, layer, self.layer_masks).eval() for layer in range(config.layers)]

    def uncached_forward(self, *inputs: Array, last_only: bool = False) -> Array:
        return self.through(inputs, self.admit(inputs, None, 0), use_cache=False, last_only=last_only)

    def start(self, batch: int) -> Rows:
        return self.reset(batch)

    def step(
        self, cache: Rows, *inputs: Array, count_macs: bool = False, last_only: bool = False
    ) -> tuple[Array, Rows]:
        return self.through(inputs, self.admit(inputs, cache, self.held), True, count_macs, last_only), cache

    def through(
        self, inputs: tuple[Array, ...], t: int, use_cache: bool, count_macs: bool = False, last_only: bool = False
    ) -> Array:
        """The output for ``t`` tokens, with or without the cache."""
        start = self.held if use_cache else 0
        attend: Attend = lambda layer, q, k, v: self.layers[layer](q, k, v, use_cache)  # noqa: E731
        return self.run(inputs, slice(start, start + t), attend, count_macs, last_only)

    @property
    def held(self) -> int:
        """The number of cached tokens."""
        return self.layers[0].position

    def length(self, rows: Rows) -> list[int]:
        return [self.held] * rows

    def buffers(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of each layer; empty while the cache is."""
        return [(x.cache_k, x.cache_v) for x in self.layers if x.cache_k is not None and x.cache_v is not None]

    def contents(self, rows: Rows) -> list[list[tuple[Array, Array]]]:
        nothing = np.zeros((self.config.kv_heads, 0, self.config.head_dim), np.float32)
        held = [[(copied(k), copied(v)) for k, v in zip(*layer, strict=True)] for layer in self.buffers()]
        return held or [[(nothing, nothing)] * rows] * len(self.layers)

    def bytes(self, rows: Rows) -> int:
        return sum(x.untyped_storage().nbytes() for layer in self.buffers() for x in layer)

    def truncate(self, rows: Rows, length: int) -> Rows:
        check_length(length, self.held)
        for module, (k, v) in zip(self.layers, self.buffers(), strict=bool(self.held)):
            # copies: a view would keep the memory of dropped tokens alive
            module.fill(k[:, :, :length].clone(), v[:, :, :length].clone())
        return rows

    def reorder(self, cache: Rows, rows: list[int]) -> Rows:
        check_rows(rows, cache)
        for module, (k, v) in zip(self.layers, self.buffers(), strict=bool(self.held)):
            module.fill(k[rows], v[rows])
        return len(rows)

    def reset(self, rows: Rows) -> Rows:
        for module in self.layers:
            module.reset_cache()
        return rows
