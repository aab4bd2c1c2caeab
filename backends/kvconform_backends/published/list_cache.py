"""``list-cache``: each token's key and value is an entry of a list, and every step stacks the lists.

The lists belong to the sequence. A list of the whole program, which is never cleared, is in the fault catalogue
(``faults/published.py``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvconform_backends.torch.decoder import attend_to
from kvconform_backends.torch.eager import COMMON, Torch, copied
from kvconform_backends.validation import check_rows

Array = NDArray[Any]
Tokens = list[Tensor]
"""An entry for each token, ``(b, g, d)``; entries are never written again, so copies of a list may share them."""


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
    """A layer or a decoder around lists of tokens."""

    cache_design = "concatenation"
    claims = replace(COMMON, abilities=tuple(a for a in COMMON.abilities if a != "mask"))

    def start(self, batch: int) -> Lists:
        return Lists(batch, [[] for _ in range(self.config.layers)], [[] for _ in range(self.config.layers)])

    def step(
        self, cache: Lists, *inputs: Array, count_macs: bool = False, last_only: bool = False
    ) -> tuple[Array, Lists]:
        start = cache.length
        s = start + self.admit(inputs, cache.batch, start)
        sights = self.sights.of(slice(start, s), s)

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            # t entries of (b, g, d); views would keep the memory of the queries
            cache.keys[layer] += [token.clone() for token in key.unbind(2)]
            cache.values[layer] += [token.clone() for token in value.unbind(2)]
            keys, values = torch.stack(cache.keys[layer], dim=2), torch.stack(cache.values[layer], dim=2)
            return attend_to(self.config, sights[layer], query, keys, values)

        return self.run(inputs, slice(start, s), attend, count_macs, last_only), cache

    def length(self, cache: Lists) -> list[int]:
        return [cache.length] * cache.batch

    def free_slots(self, cache: Lists) -> list[int]:
        return [self.config.capacity - cache.length] * cache.batch

    def contents(self, cache: Lists) -> list[list[tuple[Array, Array]]]:
        nothing = np.zeros((cache.batch, self.config.kv_heads, 0, self.config.head_dim), np.float32)
        stacked = [
            [copied(torch.stack(x, dim=2)) if x else nothing for x in kept] for kept in (cache.keys, cache.values)
        ]
        return [list(zip(keys, values, strict=True)) for keys, values in zip(*stacked, strict=True)]

    def bytes(self, cache: Lists) -> int:
        return sum(token.untyped_storage().nbytes() for kept in (*cache.keys, *cache.values) for token in kept)

    def truncate(self, cache: Lists, length: int) -> Lists:
        if not 0 <= length <= cache.length:
            raise ValueError(f"cannot keep {length} of {cache.length} tokens")
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
