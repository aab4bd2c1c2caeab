"""``list-cache``: each token's key and value is a list entry; every step stacks the lists.

The lists belong to the sequence. A program-wide list that is never cleared is in the fault catalogue
(``faults/published.py``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvconform_backends.abilities import without
from kvconform_backends.torch.decoder import attend_to
from kvconform_backends.torch.eager import COMMON, Torch, copied
from kvconform_backends.validation import check_length, check_rows

Array = NDArray[Any]
Tokens = list[Tensor]
"""One entry ``(b, g, d)`` per token. Entries are never modified, so that copies of a list may share them."""


@dataclass
class Lists:
    """The keys and values of each layer, one list each."""

    batch: int
    keys: list[Tokens]
    values: list[Tokens]

    @property
    def length(self) -> int:
        return len(self.keys[0])


class ListCache(Torch):
    """A layer or a decoder over lists of tokens."""

    cache_design = "concatenation"
    claims = replace(COMMON, abilities=without(COMMON, "mask"))

    def start(self, batch: int) -> Lists:
        return Lists(batch, [[] for _ in range(self.config.layers)], [[] for _ in range(self.config.layers)])

    def step(
        self, cache: Lists, *inputs: Array, count_macs: bool = False, last_only: bool = False
    ) -> tuple[Array, Lists]:
        start = cache.length
        s = start + self.admit(inputs, cache.batch, start)
        layer_masks = self.layer_masks.of(slice(start, s), s)

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            # t entries of (b, g, d); a view would keep the memory of the queries alive
            cache.keys[layer] += [token.clone() for token in key.unbind(2)]
            cache.values[layer] += [token.clone() for token in value.unbind(2)]
            keys, values = torch.stack(cache.keys[layer], dim=2), torch.stack(cache.values[layer], dim=2)
            return attend_to(self.config, layer_masks[layer], query, keys, values)

        return self.run(inputs, slice(start, s), attend, count_macs, last_only), cache

    def length(self, cache: Lists) -> list[int]:
        return [cache.length] * cache.batch

    def contents(self, cache: Lists) -> list[list[tuple[Array, Array]]]:
        nothing = np.zeros((cache.batch, self.config.kv_heads, 0, self.config.head_dim), np.float32)
        stacked = [
            [copied(torch.stack(x, dim=2)) if x else nothing for x in kept] for kept in (cache.keys, cache.values)
        ]
        return [list(zip(keys, values, strict=True)) for keys, values in zip(*stacked, strict=True)]

    def bytes(self, cache: Lists) -> int:
        return sum(token.untyped_storage().nbytes() for kept in (*cache.keys, *cache.values) for token in kept)

    def truncate(self, cache: Lists, length: int) -> Lists:
        check_length(length, cache.length)
        for kept in (*cache.keys, *cache.values):
            del kept[length:]
        return cache

    def fork(self, cache: Lists) -> Lists:
        return Lists(cache.batch, [list(kept) for kept in cache.keys], [list(kept) for kept in cache.values])

    def reorder(self, cache: Lists, rows: list[int]) -> Lists:
        check_rows(rows, cache.batch)
        for kept in (*cache.keys, *cache.values):
            kept[:] = [token[rows] for token in kept]
        cache.batch = len(rows)
        return cache

    def reset(self, cache: Lists) -> Lists:
        for kept in (*cache.keys, *cache.values):
            kept.clear()
        return cache
