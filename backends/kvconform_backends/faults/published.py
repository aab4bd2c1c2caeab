"""Published torch caches as they were published: each has the mistake of its source and no other.

``past-tuples`` is a notebook (two listings of its attention, and its generation), ``module-buffers`` the decoder of a
book, ``list-cache`` an article. Features that the sources lack (windows, softcaps, sinks) are refused.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from kvconform_backends.abilities import without
from kvconform_backends.faults.planted import MARKER
from kvconform_backends.greedy import greedy
from kvconform_backends.numpy.cache import Array
from kvconform_backends.published.list_cache import ListCache, Lists
from kvconform_backends.published.module_buffers import CachedAttention, ModuleBuffers, Rows
from kvconform_backends.published.past_tuples import Layer, PastTuples, grown
from kvconform_backends.torch.decoder import LayerMask, positive_scale
from kvconform_backends.torch.eager import Torch
from kvconform_specs.config import Config


class Plain(Torch):
    """What the sources support: causal attention only. ``faulty`` counts how often the mistake mattered."""

    faulty = 0

    @classmethod
    def refuses(cls, config: Config, device: str) -> str | None:
        for asked in ("window", "softcap", "sink"):
            if getattr(config, asked) is not None:
                return f"the listing has no {asked}"
        return "the listing has no alibi" if config.positions == "alibi" else super().refuses(config, device)

    def runtime_info(self) -> dict[str, Any]:
        return {**super().runtime_info(), MARKER: self.faulty}


class FirstListing(Plain, PastTuples):
    """``is_causal=True`` always: torch aligns it top-left, so a decode step sees only the first key."""

    claims = replace(PastTuples.claims, abilities=without(PastTuples.claims, "macs"))

    def is_causal(self, past: int, t: int) -> bool:
        self.faulty += past > 0
        return True

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, past_kv: Layer | None
    ) -> tuple[Tensor, Layer]:
        c, t = self.config, query.shape[2]
        keys, values = present = grown(key, value, past_kv)
        causal = self.is_causal(keys.shape[2] - t, t)
        sign, scale = positive_scale(c)
        mixed = functional.scaled_dot_product_attention(
            query * sign, keys, values, is_causal=causal, scale=scale, enable_gqa=c.group > 1
        )
        return mixed, present


class SecondListing(FirstListing):
    """``is_causal=(past_kv is None)``: a chunk on a non-empty cache has no mask and sees its own future."""

    def is_causal(self, past: int, t: int) -> bool:
        self.faulty += past > 0 and t > 1
        return past == 0


class PrefillTwice(Plain, PastTuples):
    """Generation runs the prefill twice and continues from its token without keeping that token."""

    def generate(self, tokens: Array, new: int, **options: Any) -> Array:
        for _ in range(2):
            output, past = self.step(self.start(len(tokens)), tokens, **options)
        newest, kept = picked(output), []
        for _ in range(new):
            output, past = self.step(past, newest, **options)
            newest = picked(output)
            kept.append(newest)
        made = np.concatenate(kept, axis=1)  # (b, new)
        self.faulty += not np.array_equal(made, greedy(self, tokens, new, **options))
        return made


class SquareMask(CachedAttention):
    """A mask of as many keys as queries. It fits without a cache and, by broadcasting, for a single query with one."""

    def layer_mask(self, start: int, t: int) -> LayerMask:
        return LayerMask(0, start + t, torch.ones(t, t, dtype=torch.bool, device=self.layer_masks.device).tril())


class ChunkOnCache(Plain, ModuleBuffers):
    """The mask is cut to the new tokens, ``mask[:t, :t]``: a chunk on a non-empty cache raises an exception."""

    module = SquareMask

    def step(self, cache: Rows, *inputs: Array, **options: Any) -> tuple[Array, Rows]:
        before = self.held
        self.faulty += before > 0 and inputs[0].shape[-2 if len(inputs) == 3 else 1] > 1
        return super().step(cache, *inputs, **options)


KV_CACHE: dict[Config, Lists] = {}
"""The article's cache, one per process (here: one per config, so that configs do not interfere)."""


class GlobalList(Plain, ListCache):
    """The lists are global and never cleared: a second prompt reads the keys of the first."""

    claims = replace(
        ListCache.claims, abilities=("uncached_forward", "length"), max_batch=1, max_sequences=1, overflow="undefined"
    )

    @classmethod
    def refuses(cls, config: Config, device: str) -> str | None:
        return super().refuses(config, device) if config.profile == "attention" else "the article has only one layer"

    def check_room(self, length: int, t: int) -> None:
        """There is no capacity."""

    def start(self, batch: int) -> Lists:
        cache = KV_CACHE.setdefault(self.config, super().start(batch))
        self.faulty += cache.length > 0
        return cache


def picked(output: Array) -> Array:
    """The greedy token of each row, ``(b, 1)``."""
    ids: Array = output[:, -1:].argmax(axis=-1).astype(np.int64)
    return ids
