"""Published caches as they were published, over torch: each has the mistake of its source and no other.

``past-tuples`` is a notebook (two listings of its attention, and its generation), ``module-buffers`` the decoder of a
book, ``list-cache`` an article. What the sources do not have (windows, softcaps, sinks), they refuse. The catalogue names
them by their addresses (``faults/__init__.py``), so that importing it imports no framework.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from kvconform_backends.faults.planted import MARKER
from kvconform_backends.greedy import greedy
from kvconform_backends.numpy.cache import Array
from kvconform_backends.published.list_cache import ListCache, Lists
from kvconform_backends.published.module_buffers import CachedAttention, ModuleBuffers, Rows
from kvconform_backends.published.past_tuples import Layer, PastTuples, grown
from kvconform_backends.torch.decoder import Sight
from kvconform_specs.config import Config


class Plain:
    """What the sources have: causal attention and nothing else. ``faulty`` counts how often the mistake mattered."""

    faulty = 0

    @classmethod
    def refuses(cls, config: Config, device: str) -> str | None:
        for asked in ("window", "softcap", "sink"):
            if getattr(config, asked) is not None:
                return f"the listing has no {asked}"
        return "the listing has no alibi" if config.positions == "alibi" else None


class FirstListing(Plain, PastTuples):
    """``is_causal=True`` always: torch aligns it top-left, so a decode step sees the first key alone."""

    claims = replace(PastTuples.claims, abilities=tuple(a for a in PastTuples.claims.abilities if a != "macs"))

    def is_causal(self, past: int, t: int) -> bool:
        self.faulty += past > 0
        return True

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, past_kv: Layer | None
    ) -> tuple[Tensor, Layer]:
        c, t = self.config, query.shape[2]
        keys, values = present = grown(key, value, past_kv)
        causal = self.is_causal(keys.shape[2] - t, t)
        mixed = functional.scaled_dot_product_attention(
            query, keys, values, is_causal=causal, scale=c.score_scale, enable_gqa=c.group > 1
        )
        return mixed, present

    def runtime_info(self) -> dict[str, Any]:
        return {**super().runtime_info(), MARKER: self.faulty}


class SecondListing(FirstListing):
    """``is_causal=(past_kv is None)``: a chunk on a cache that is not empty has no mask, and sees its own future."""

    def is_causal(self, past: int, t: int) -> bool:
        self.faulty += past > 0 and t > 1
        return past == 0


class PrefillTwice(Plain, PastTuples):
    """Generation runs the prefill twice, and goes on from the token that the prefill gave without keeping it."""

    def generate(self, tokens: Array, new: int) -> Array:
        for _ in range(2):
            output, past = self.step(self.start(len(tokens)), tokens)
        newest, kept = picked(output), []
        for _ in range(new):
            output, past = self.step(past, newest)
            newest = picked(output)
            kept.append(newest)
        made = np.concatenate(kept, axis=1)  # (b, new)
        self.faulty += not np.array_equal(made, greedy(self, tokens, new))
        return made

    def runtime_info(self) -> dict[str, Any]:
        return {**super().runtime_info(), MARKER: self.faulty}


class SquareMask(CachedAttention):
    """A mask of as many keys as there are queries. It fits without a cache, and one query, by broadcasting, with it."""

    def sight(self, start: int, t: int) -> Sight:
        return Sight(0, start + t, torch.ones(t, t, dtype=torch.bool, device=self.sights.device).tril())


class ChunkOnCache(Plain, ModuleBuffers):
    """The mask is cut to the new tokens, ``mask[:t, :t]``: a chunk on a cache that is not empty raises an exception."""

    module = SquareMask

    def step(self, cache: Rows, *inputs: Array, **options: Any) -> tuple[Array, Rows]:
        before = self.held
        self.faulty += before > 0 and inputs[0].shape[-2 if len(inputs) == 3 else 1] > 1
        return super().step(cache, *inputs, **options)

    def runtime_info(self) -> dict[str, Any]:
        return {**super().runtime_info(), MARKER: self.faulty}


KV_CACHE: dict[Config, Lists] = {}
"""The article's cache, one a program (and, here, one a config, so that others are not in its way)."""


class GlobalList(Plain, ListCache):
    """The lists are global and nobody clears them: a second prompt reads the keys of the first."""

    claims = replace(
        ListCache.claims, abilities=("uncached_forward", "length"), max_batch=1, max_sequences=1, overflow="undefined"
    )

    @classmethod
    def refuses(cls, config: Config, device: str) -> str | None:
        return super().refuses(config, device) if config.profile == "attention" else "the article has one layer only"

    def check_room(self, length: int, t: int) -> None:
        """There is no capacity."""

    def start(self, batch: int) -> Lists:
        cache = KV_CACHE.setdefault(self.config, super().start(batch))
        self.faulty += cache.length > 0
        return cache

    def runtime_info(self) -> dict[str, Any]:
        return {**super().runtime_info(), MARKER: self.faulty}


def picked(output: Array) -> Array:
    """The greedy token of each row, ``(b, 1)``."""
    ids: Array = output[:, -1:].argmax(axis=-1).astype(np.int64)
    return ids
