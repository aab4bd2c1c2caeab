"""Small modules in the styles found in the wild, each with a bug in its cache.

Addressed as ``tests/support/third_party_faulty_modules.py:Name``.
"""

# mypy: ignore-errors
from __future__ import annotations

import torch
from third_party_modules import LayerPast, MakesCache, ModuleBuffers, Projections, StartPos, lower, rotated
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa


class ChunkSeesFuture(Projections):
    """A mask only without a past: correct token by token."""

    def forward(self, x: Tensor, past_kv: tuple[Tensor, Tensor] | None = None):
        query, key, value = self.projected(x)
        if past_kv is not None:
            key, value = torch.cat([past_kv[0], key], 2), torch.cat([past_kv[1], value], 2)
        return self.joined(sdpa(query, key, value, is_causal=past_kv is None)), (key, value)


class NeverReset(ModuleBuffers):
    """``reset_cache`` empties nothing."""

    def reset_cache(self) -> None:
        self.cache = None


class SquareMask(ModuleBuffers):
    """A square mask over the new tokens, which does not fit the scores of later chunks."""

    def forward(self, x: Tensor, use_cache: bool = False) -> Tensor:
        query, key, value = self.grown(x, use_cache)
        scores = query @ key.mT / query.shape[-1] ** 0.5
        if x.shape[1] > 1:
            scores.masked_fill_(~lower(x.shape[1], x.shape[1]), -torch.inf)
        return self.out((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))


KV_CACHE: list[tuple[Tensor, Tensor]] = []


class GlobalList(Projections):
    """A list that is never cleared."""

    def forward(self, x: Tensor, use_cache: bool = True) -> Tensor:
        query, key, value = self.projected(x)
        if use_cache:
            KV_CACHE.append((key, value))
            key, value = (torch.cat(parts, 2) for parts in zip(*KV_CACHE, strict=True))
        return self.joined(sdpa(query, key, value, attn_mask=lower(x.shape[1], key.shape[2])))


class RestartedPositions(Projections):
    def forward(self, x: Tensor, past: tuple[Tensor, Tensor] | None = None):
        query, key, value = self.projected(x)
        query, key = rotated(query, 0), rotated(key, 0)
        if past is not None:
            key, value = torch.cat([past[0], key], 2), torch.cat([past[1], value], 2)
        return self.joined(sdpa(query, key, value, attn_mask=lower(x.shape[1], key.shape[2]))), (key, value)


class RotatedTwice(Projections):
    """Keys are cached after their rotation, and all are rotated again at each call."""

    def forward(self, x: Tensor, past: tuple[Tensor, Tensor] | None = None):
        query, key, value = self.projected(x)
        start = 0 if past is None else past[0].shape[2]
        if past is not None:
            key, value = torch.cat([past[0], key], 2), torch.cat([past[1], value], 2)
        query, key = rotated(query, start), rotated(key, 0)
        return self.joined(sdpa(query, key, value, attn_mask=lower(x.shape[1], key.shape[2]))), (key, value)


class ForgetsOrder(Projections):
    """Positions restart if they are omitted."""

    def forward(self, x: Tensor, position_ids: Tensor | None = None, past: tuple[Tensor, Tensor] | None = None):
        query, key, value = self.projected(x)
        start = 0 if position_ids is None else int(position_ids.flatten()[0])
        query, key = rotated(query, start), rotated(key, start)
        if past is not None:
            key, value = torch.cat([past[0], key], 2), torch.cat([past[1], value], 2)
        return self.joined(sdpa(query, key, value, attn_mask=lower(x.shape[1], key.shape[2]))), (key, value)


class SharedRow(LayerPast):
    """Every row reads the past of the first."""

    def forward(self, hidden_states, layer_past=None, use_cache=False):
        if layer_past is not None:
            layer_past = tuple(part[:1].expand_as(part) for part in layer_past)
        return super().forward(hidden_states, layer_past, use_cache)


class Overwrites(LayerPast):
    """A step writes into the past it was given."""

    def forward(self, hidden_states, layer_past=None, use_cache=False):
        y, present = super().forward(hidden_states, layer_past, use_cache)
        if layer_past is not None and hidden_states.shape[1] > 2:
            layer_past[0].mul_(0.5)
        return y, present


class OffByOne(MakesCache):
    """A chunk is written one slot too early."""

    def forward(self, x: Tensor, kv_cache: dict | None = None) -> Tensor:
        if kv_cache is not None and kv_cache["length"] > 4:
            kv_cache["length"] -= 1
        return super().forward(x, kv_cache)


class CentresInPlace(LayerPast):
    """Its inputs lose their mean where they are."""

    def forward(self, hidden_states, layer_past=None, use_cache=False):
        hidden_states -= hidden_states.mean(-1, keepdim=True)
        return super().forward(hidden_states, layer_past, use_cache)


class ReadsUnusedSlots(StartPos):
    """The last slot of the buffer is added to every output: zeros, as long as nothing fills it."""

    def attended(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return super().attended(query, key, value) + self.cache_v[:, :, -1].flatten(1)[:, None]
