"""Two listings of one published notebook on past tuples, as published, over torch's own attention."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from kvconform_backends.eager import Eager, Past
from kvconform_backends.faults.planted import MARKER
from kvconform_backends.numpy_cache import Array
from kvconform_specs.config import Config


class FirstListing(Eager):
    """``is_causal=True`` always: torch aligns it top-left, so a decode step sees the first key alone."""

    claims = replace(Eager.claims, abilities=tuple(x for x in Eager.claims.abilities if x not in ("mask", "work")))
    faulty = 0

    @classmethod
    def refuses(cls, config: Config, device: str) -> str | None:
        for asked in ("window", "softcap", "sink"):
            if getattr(config, asked) is not None:
                return f"the listing has no {asked}"
        return "the listing has no alibi" if config.positions == "alibi" else None

    def is_causal(self, past: int, t: int) -> bool:
        self.faulty += past > 0
        return True

    def step(self, cache: Past, *inputs: Array) -> tuple[Array, Past]:  # type: ignore[override]
        batch, _, past, _ = cache[0][0].shape
        t = self.admit(inputs, batch, past)
        causal, c = self.is_causal(past, t), self.config
        grown: list[tuple[Tensor, Tensor]] = []

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            keys = torch.cat((cache[layer][0], key), dim=2)  # (b, g, s, d)
            values = torch.cat((cache[layer][1], value), dim=2)
            grown.append((keys, values))
            return functional.scaled_dot_product_attention(
                query, keys, values, is_causal=causal, scale=c.score_scale, enable_gqa=c.group > 1
            )

        output = self.run(inputs, self.places[past : past + t], attend)
        return output, tuple(grown)

    def witness(self) -> dict[str, Any]:
        return {**super().witness(), MARKER: self.faulty}


class SecondListing(FirstListing):
    """``is_causal=(past_kv is None)``: a chunk on a cache that is not empty has no mask, and sees its own future."""

    def is_causal(self, past: int, t: int) -> bool:
        self.faulty += past > 0 and t > 1
        return past == 0
