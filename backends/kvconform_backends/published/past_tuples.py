"""``past-tuples``: each layer's past is a tuple ``(key, value)``, passed to a step and returned grown.

It is None before the first step. The causal mask is aligned bottom-right: the last new token sees everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvconform_backends.abilities import without
from kvconform_backends.torch.decoder import Attend, attend_to
from kvconform_backends.torch.eager import COMMON, Torch, copied
from kvconform_backends.validation import check_length, check_rows

Array = NDArray[Any]
Layer = tuple[Tensor, Tensor]
"""The keys and values so far, ``(b, g, s, d)`` each."""
Past = tuple[int, Sequence[Layer | None]]
"""The number of rows, and the past of each layer."""


class PastTuples(Torch):
    """A layer or a decoder over tuples that are never modified: any of them can be continued."""

    cache_design = "concatenation"
    claims = replace(COMMON, abilities=(*without(COMMON, "mask"), "immutable"))

    def start(self, batch: int) -> Past:
        return batch, (None,) * self.config.layers

    def uncached_forward(self, *inputs: Array, last_only: bool = False) -> Array:
        t = self.admit(inputs, None, 0)
        attend: Attend = lambda layer, q, k, v: self.attend(layer, q, k, v, None)[0]  # noqa: E731
        return self.run(inputs, slice(0, t), attend, last_only=last_only)

    def step(self, past: Past, *inputs: Array, count_macs: bool = False, last_only: bool = False) -> tuple[Array, Past]:
        batch, layers = past
        start = tokens(past)
        t = self.admit(inputs, batch, start)
        present: list[Layer] = []

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            output, made = self.attend(layer, query, key, value, layers[layer])
            present.append(made)
            return output

        return self.run(inputs, slice(start, start + t), attend, count_macs, last_only), (batch, present)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, past_kv: Layer | None
    ) -> tuple[Tensor, Layer]:
        """One layer's attention: the mixed heads ``(b, h, t, d)`` and the layer's present."""
        keys, values = present = grown(key, value, past_kv)
        s = keys.shape[2]
        mask = self.layer_masks.of_layer(layer, slice(s - query.shape[2], s), s)
        return attend_to(self.config, mask, query, keys, values), present

    def length(self, past: Past) -> list[int]:
        return [tokens(past)] * past[0]

    def contents(self, past: Past) -> list[list[tuple[Array, Array]]]:
        c = self.config
        nothing = np.zeros((c.kv_heads, 0, c.head_dim), np.float32)
        return [
            [(copied(k), copied(v)) for k, v in zip(*layer, strict=True)] if layer else [(nothing, nothing)] * past[0]
            for layer in past[1]
        ]

    def bytes(self, past: Past) -> int:
        return sum(x.untyped_storage().nbytes() for layer in past[1] if layer is not None for x in layer)

    def truncate(self, past: Past, length: int) -> Past:
        check_length(length, tokens(past))
        # copies: a view would keep the memory of dropped tokens alive
        kept = [layer and (layer[0][:, :, :length].clone(), layer[1][:, :, :length].clone()) for layer in past[1]]
        return past[0], kept

    def fork(self, past: Past) -> Past:
        return past

    def reorder(self, past: Past, rows: list[int]) -> Past:
        check_rows(rows, past[0])
        return len(rows), [layer and (layer[0][rows], layer[1][rows]) for layer in past[1]]

    def reset(self, past: Past) -> Past:
        return self.start(past[0])


def grown(key: Tensor, value: Tensor, past_kv: Layer | None) -> Layer:
    """The past followed by the new tokens' keys and values ``(b, g, t, d)``."""
    if past_kv is None:
        return key.clone(), value.clone()  # a view would keep the memory of the queries alive
    return torch.cat((past_kv[0], key), dim=2), torch.cat((past_kv[1], value), dim=2)


def tokens(past: Past) -> int:
    """The number of tokens in each row."""
    layer = past[1][0]
    return 0 if layer is None else layer[0].shape[2]
