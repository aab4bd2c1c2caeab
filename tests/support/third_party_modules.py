"""Small modules in the styles found in the wild, each with a different cache convention.

Addressed as ``tests/support/third_party_modules.py:Name``. They need torch and numpy, and do not use this package.
"""

# mypy: ignore-errors
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as sdpa


def split(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)  # (b, h, t, d)


def lower(new: int, total: int) -> Tensor:
    return torch.ones(new, total, dtype=torch.bool).tril(total - new)  # (t, s)


def rotated(x: Tensor, start: int) -> Tensor:
    half = x.shape[-1] // 2
    angles = torch.arange(start, start + x.shape[2])[:, None] / 10 ** (torch.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], dim=-1)


class Projections(nn.Module):
    """Base class of the attention modules; weights are large enough for sharp attention."""

    def __init__(self, width: int = 24, heads: int = 3, window: int = 0) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        nn.init.normal_(self.qkv.weight, std=0.3)

    def projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = (split(part, self.heads) for part in self.qkv(x).chunk(3, dim=-1))
        return query, key, value

    def joined(self, y: Tensor) -> Tensor:
        return self.out(y.transpose(1, 2).flatten(2))


# --- attention on hidden states, with a past argument ---
class LayerPast(Projections):
    """``use_cache`` returns a present in the layout (b, s, h, d), as in Falcon and many older models."""

    def forward(self, hidden_states, layer_past=None, use_cache=False):
        query, key, value = self.projected(hidden_states)
        key, value = key.transpose(1, 2), value.transpose(1, 2)
        if layer_past is not None:
            key, value = torch.cat([layer_past[0], key], 1), torch.cat([layer_past[1], value], 1)
        mask = lower(query.shape[2], key.shape[1])
        y = self.joined(sdpa(query, key.transpose(1, 2), value.transpose(1, 2), attn_mask=mask))
        return (y, (key, value)) if use_cache else (y, None)


class WantsAll(Projections):
    """Is given the whole sequence beside the past, and computes the tokens that are not in it."""

    def forward(self, x: Tensor, past: tuple[Tensor, Tensor] | None = None):
        new = x if past is None else x[:, past[0].shape[2] :]
        if not new.shape[1]:
            raise ValueError("the sequence is no longer than its past")
        query, key, value = self.projected(new)
        if past is not None:
            key, value = torch.cat([past[0], key], 2), torch.cat([past[1], value], 2)
        mask = lower(query.shape[2], key.shape[2])
        return self.joined(sdpa(query, key, value, attn_mask=mask)), (key, value)


class TwoPasts(Projections):
    def forward(self, x: Tensor, past_k: Tensor | None = None, past_v: Tensor | None = None) -> tuple[Tensor, ...]:
        query, key, value = self.projected(x)
        if past_k is not None and past_v is not None:
            key, value = torch.cat([past_k, key], 2), torch.cat([past_v, value], 2)
        return self.joined(sdpa(query, key, value, attn_mask=lower(query.shape[2], key.shape[2]))), key, value


class Stacked(Projections):
    """Keys and values in one tensor ``(2, b, h, s, d)``; attention weights are returned as well."""

    def forward(self, x: Tensor, kv_cache: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = self.projected(x)
        kv = torch.stack([key, value])
        kv = kv if kv_cache is None else torch.cat([kv_cache, kv], dim=3)
        mask = lower(x.shape[1], kv.shape[3])
        weights = (query @ kv[0].mT / query.shape[-1] ** 0.5).masked_fill(~mask, -torch.inf).softmax(-1)
        return self.joined(weights @ kv[1]), weights, kv


class MaskFromCaller(Projections):
    """The caller gives the mask; without one, everything is visible."""

    def forward(self, x: Tensor, mask: Tensor | None = None, past: tuple[Tensor, Tensor] | None = None):
        query, key, value = self.projected(x)
        if past is not None:
            key, value = torch.cat([past[0], key], 2), torch.cat([past[1], value], 2)
        scores = query @ key.mT / query.shape[-1] ** 0.5
        if mask is not None:
            scores = scores.masked_fill(mask == 0, -1e9)
        return self.joined(scores.softmax(-1) @ value), (key, value)


class KVCache:
    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        self.keys = keys if self.keys is None else torch.cat([self.keys, keys], 2)
        self.values = values if self.values is None else torch.cat([self.values, values], 2)
        return self.keys, self.values


class CacheObject(Projections):
    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        query, key, value = self.projected(x)
        if cache is not None:
            key, value = cache.update(key, value)
        return self.joined(sdpa(query, key, value, attn_mask=lower(x.shape[1], key.shape[2])))


class CroppedCache(KVCache):
    def crop(self, length: int) -> None:
        raise RuntimeError("nobody calls this")


class WithCrop(CacheObject):
    def forward(self, x: Tensor, cache: CroppedCache | None = None, seq_lens: Tensor | None = None) -> Tensor:
        return super().forward(x, cache)


class MakesCache(Projections):
    """A preallocated cache, created by a method of the module and filled by forward."""

    max_len = 30

    def make_cache(self, batch_size: int) -> dict[str, Tensor | int]:
        shape = (batch_size, self.heads, self.max_len, self.out.in_features // self.heads)
        return {"k": torch.zeros(shape), "v": torch.zeros(shape), "length": 0}

    def forward(self, x: Tensor, kv_cache: dict | None = None) -> Tensor:
        query, key, value = self.projected(x)
        if kv_cache is not None:
            start, end = kv_cache["length"], kv_cache["length"] + x.shape[1]
            if end > self.max_len:
                raise ValueError(f"{end} tokens do not fit into {self.max_len}")
            kv_cache["k"][:, :, start:end], kv_cache["v"][:, :, start:end] = key, value
            kv_cache["length"] = end
            key, value = kv_cache["k"][:, :, :end], kv_cache["v"][:, :, :end]
        return self.joined(sdpa(query, key, value, attn_mask=lower(x.shape[1], key.shape[2])))


class Rotary(Projections):
    """The caller gives the positions."""

    def forward(self, x: Tensor, pos: int, past: tuple[Tensor, Tensor] | None = None):
        query, key, value = self.projected(x)
        query, key = rotated(query, pos), rotated(key, pos)
        if past is not None:
            key, value = torch.cat([past[0], key], 2), torch.cat([past[1], value], 2)
        return self.joined(sdpa(query, key, value, attn_mask=lower(x.shape[1], key.shape[2]))), (key, value)


class QueryKeyValue(Projections):
    """Attention with separate arguments, as for cross-attention."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, past: list[Tensor] | None = None):
        (q, _, _), (_, k, _), (_, _, v) = self.projected(query), self.projected(key), self.projected(value)
        if past:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        return {"output": self.joined(sdpa(q, k, v, attn_mask=lower(q.shape[2], k.shape[2]))), "present": [k, v]}


class OneRow(Projections):
    """Takes a batch of one."""

    def forward(self, x: Tensor, past: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if x.shape[0] != 1:
            raise ValueError("one row at a time")
        whole = x if past is None else torch.cat([past, x], 1)  # past: the inputs of all earlier tokens
        query, key, value = self.projected(whole)
        y = self.joined(sdpa(query, key, value, is_causal=True))
        return y[:, -x.shape[1] :], whole


# --- plain functions and instances ---
_generator = torch.Generator().manual_seed(3)
W_QUERY, W_KEY, W_VALUE = (torch.randn(16, 16, generator=_generator) / 4 for _ in range(3))


def attend(x: Tensor, past: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """One head, no batch: ``(t, 16)``."""
    key, value = x @ W_KEY, x @ W_VALUE
    if past is not None:
        key, value = torch.cat([past[0], key]), torch.cat([past[1], value])
    scores = (x @ W_QUERY @ key.T / 4).masked_fill(~lower(len(x), len(key)), -torch.inf)
    return scores.softmax(-1) @ value, (key, value)


def in_numpy(x: np.ndarray, past: tuple[np.ndarray, np.ndarray] | None = None):
    """The same in numpy."""
    query, key, value = (x @ np.asarray(w) for w in (W_QUERY, W_KEY, W_VALUE))
    if past is not None:
        key, value = np.concatenate([past[0], key]), np.concatenate([past[1], value])
    scores = np.where(np.tri(len(x), len(key), len(key) - len(x), dtype=bool), query @ key.T / 4, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ value, (key, value)


ready = LayerPast()


# --- decoders on token ids ---
@dataclass
class Config:
    vocab_size: int = 53
    block_size: int = 24
    n_layer: int = 2
    n_head: int = 2
    n_embd: int = 20


@dataclass
class Output:
    logits: Tensor
    past_key_values: tuple[tuple[Tensor, Tensor], ...] | None


class Layer(Projections):
    def forward(self, x: Tensor, past: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        query, key, value = self.projected(x)
        if past is not None:
            key, value = torch.cat([past[0], key], 2), torch.cat([past[1], value], 2)
        return x + self.joined(sdpa(query, key, value, attn_mask=lower(x.shape[1], key.shape[2]))), (key, value)


class Embedded(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.wte, self.wpe = nn.Embedding(config.vocab_size, config.n_embd), nn.Embedding(24, config.n_embd)
        self.layers = nn.ModuleList(Layer(config.n_embd, config.n_head) for _ in range(config.n_layer))
        self.head = nn.Linear(config.n_embd, config.vocab_size)

    def through(self, ids: Tensor, start: int, pasts):
        x, presents = self.wte(ids) + self.wpe(torch.arange(start, start + ids.shape[1])), []
        for layer, past in zip(self.layers, pasts, strict=True):
            x, present = layer(x, past)
            presents.append(present)
        return self.head(x), presents


class LikeTransformers(Embedded):
    def forward(self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, use_cache=True):
        start = 0 if past_key_values is None else past_key_values[0][0].shape[2]
        logits, presents = self.through(input_ids, start, past_key_values or [None] * len(self.layers))
        return Output(logits, tuple(presents) if use_cache else None)


class ListOfPasts(Embedded):
    """The past is required: initially a list with None per layer. Only the last logits are returned."""

    def forward(self, idx: Tensor, kv_caches: list) -> tuple[Tensor, list]:
        start = 0 if kv_caches[0] is None else kv_caches[0][0].shape[2]
        logits, presents = self.through(idx, start, kv_caches)
        return logits[:, [-1]], presents


class Owned(nn.Module):
    """Base class: attention with buffers ``cache_k``, ``cache_v`` in the module."""

    heads, size = 2, 20

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(self.size, 3 * self.size), nn.Linear(self.size, self.size)
        nn.init.normal_(self.qkv.weight, std=0.3)
        self.cache_k: Tensor | None = None
        self.cache_v: Tensor | None = None

    def grown(self, x: Tensor, use_cache: bool) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = (split(part, self.heads) for part in self.qkv(x).chunk(3, dim=-1))
        if use_cache:
            if self.cache_k is not None and self.cache_v is not None:
                key, value = torch.cat([self.cache_k, key], 2), torch.cat([self.cache_v, value], 2)
            self.cache_k, self.cache_v = key, value
        return query, key, value

    def attended(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mask = lower(query.shape[2], key.shape[2])
        return self.out(sdpa(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2))


class ModuleBuffers(Owned):
    def forward(self, x: Tensor, use_cache: bool = False) -> Tensor:
        return self.attended(*self.grown(x, use_cache))

    def reset_cache(self) -> None:
        self.cache_k = self.cache_v = None


class AlwaysCaches(ModuleBuffers):
    def forward(self, x: Tensor) -> Tensor:
        return self.attended(*self.grown(x, True))


class StartPos(Owned):
    """A preallocated cache, written at ``start_pos``, as in the first Llama: position 0 starts a sequence."""

    max_seq_len = 26

    def forward(self, x: Tensor, start_pos: int) -> Tensor:
        query, key, value = (split(part, self.heads) for part in self.qkv(x).chunk(3, dim=-1))
        if self.cache_k is None or self.cache_v is None or start_pos == 0:
            shape = (x.shape[0], self.heads, self.max_seq_len, key.shape[-1])
            self.cache_k, self.cache_v = torch.zeros(shape), torch.zeros(shape)
        end = start_pos + x.shape[1]
        if end > self.max_seq_len:
            raise ValueError(f"{end} tokens do not fit into {self.max_seq_len}")
        self.cache_k[:, :, start_pos:end], self.cache_v[:, :, start_pos:end] = key, value
        return self.attended(query, self.cache_k[:, :, :end], self.cache_v[:, :, :end])


class InputPos(Owned):
    """Caches are set up before a sequence and written at ``input_pos``, as in gpt-fast."""

    max_seq_length = 26

    def setup_caches(self, max_batch_size: int, max_seq_length: int) -> None:
        shape = (max_batch_size, self.heads, max_seq_length, self.size // self.heads)
        self.cache_k, self.cache_v = torch.zeros(shape), torch.zeros(shape)

    def forward(self, x: Tensor, input_pos: Tensor) -> Tensor:
        assert self.cache_k is not None, "caches must be initialised first"
        query, key, value = (split(part, self.heads) for part in self.qkv(x).chunk(3, dim=-1))
        self.cache_k[:, :, input_pos], self.cache_v[:, :, input_pos] = key, value
        mask = torch.arange(self.cache_k.shape[2]) <= input_pos[:, None]  # (t, capacity)
        y = sdpa(query, self.cache_k, self.cache_v, attn_mask=mask)
        return self.out(y.transpose(1, 2).flatten(2))


class SetsCache(Owned):
    """With positions it uses a prepared cache, without them none, as in LitGPT."""

    max_seq_length = 22

    def set_kv_cache(self, batch_size: int, max_seq_length: int | None = None) -> None:
        shape = (batch_size, self.heads, max_seq_length or self.max_seq_length, self.size // self.heads)
        self.cache_k, self.cache_v = torch.zeros(shape), torch.zeros(shape)

    def clear_kv_cache(self) -> None:
        self.cache_k = self.cache_v = None

    def forward(self, x: Tensor, input_pos: Tensor | None = None) -> Tensor:
        if input_pos is None:
            return self.attended(*self.grown(x, False))
        if self.cache_k is None:
            raise TypeError("set_kv_cache() must be called first")
        return InputPos.forward(self, x, input_pos)


class UnusualName(CacheObject):
    """A past with an unusual name."""

    def forward(self, x: Tensor, pantry: KVCache | None = None) -> Tensor:
        return super().forward(x, pantry)


class FourRows(StartPos):
    """A preallocated cache of four rows."""

    max_batch_size = 4

    def forward(self, x: Tensor, start_pos: int) -> Tensor:
        if len(x) > self.max_batch_size:
            raise RuntimeError("at most four rows")
        return super().forward(x, start_pos)


# --- not recognisable ---
class Strange(Projections):
    def forward(self, x: Tensor, ledger: dict) -> Tensor:
        return x


class NoCache(Projections):
    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.projected(x)
        return self.joined(sdpa(query, key, value, is_causal=True))


class Needs(Projections):
    def __init__(self, width: int) -> None:
        super().__init__(width)
