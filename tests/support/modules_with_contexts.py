"""Small decoders whose sequences have a context (an adapter, or encoder states), right and wrong ones.

Addressed as ``tests/support/modules_with_contexts.py:Name``. They need torch, and do not use this package.
"""

# mypy: ignore-errors
from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as sdpa


def split(x, heads):
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)  # (b, h, t, d)


class Decoder(nn.Module):
    """One layer. A subclass says which adapter each row has, and what prompts are stored by."""

    def __init__(self, vocab_size=61, width=32, heads=4, max_seq_len=40):
        super().__init__()
        self.heads, self.max_seq_len, self.store = heads, max_seq_len, {}
        self.embed, self.position = nn.Embedding(vocab_size, width), nn.Embedding(max_seq_len, width)
        self.qkv, self.out, self.head = (nn.Linear(width, n) for n in (3 * width, width, vocab_size))
        self.down, self.up = nn.Parameter(torch.randn(3, width, 4) / 4), nn.Parameter(torch.randn(3, 4, 3 * width) / 4)

    def key(self, row, adapter):
        return tuple(row.tolist()), int(adapter)

    def run(self, ids, adapter, past, use_cache, x=None):
        """``adapter``: (b,)."""
        start, new = 0 if past is None else past[0].shape[2], ids.shape[1]
        x = self.embed(ids) if x is None else x
        x = x + self.position(torch.arange(start, start + new))
        made = self.qkv(x) + torch.einsum("btw,bwr,bro->bto", x, self.down[adapter], self.up[adapter])
        query, key, value = (split(part, self.heads) for part in made.chunk(3, dim=-1))
        if use_cache and past is None:
            rows = zip(ids, adapter, key, value, strict=True)
            held = [self.store.setdefault(self.key(row, a), (k, v)) for row, a, k, v in rows]
            key, value = (torch.stack(parts) for parts in zip(*held, strict=True))
        if past is not None:
            key, value = torch.cat([past[0], key], 2), torch.cat([past[1], value], 2)
        mask = torch.ones(new, start + new, dtype=torch.bool).tril(start)
        x = x + self.out(sdpa(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2))
        return self.head(x), (key, value)


# --- adapters ---
class SetAdapter(Decoder):
    """The adapter is set by a method, as in PEFT; prompts are stored by tokens and adapter."""

    active = 0

    def set_adapter(self, number):
        self.active = number

    def forward(self, input_ids, past=None, use_cache=False):
        return self.run(input_ids, torch.full((len(input_ids),), self.active), past, use_cache)


class StoredByTokens(SetAdapter):
    """Prompts are stored by tokens alone."""

    def key(self, row, adapter):
        return tuple(row.tolist())


class TwoAdapters(SetAdapter):
    """There is no third adapter."""

    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Parameter(self.down[:2].detach()), nn.Parameter(self.up[:2].detach())


class NamedAdapters(SetAdapter):
    """The method takes a name."""

    def __init__(self):
        super().__init__()
        self.adapters = {"default": 0, "legal": 1, "medical": 2}

    def set_adapter(self, name):
        self.active = self.adapters[name]


class AdapterIds(Decoder):
    """The adapter of each row is an argument of every call; prompts are stored by tokens and adapter."""

    def forward(self, input_ids, past=None, use_cache=False, adapter_ids=None):
        adapter = torch.zeros(len(input_ids), dtype=torch.long) if adapter_ids is None else adapter_ids
        return self.run(input_ids, adapter.expand(len(input_ids)), past, use_cache)


class IdsStoredByTokens(AdapterIds):
    def key(self, row, adapter):
        return tuple(row.tolist())


class OneAdapterForAll(Decoder):
    """The adapter is a number; decode steps use that of the last prompt."""

    active = 0

    def forward(self, input_ids, past=None, use_cache=False, adapter: int = 0):
        if use_cache and past is None:
            self.active = adapter
        used = self.active if use_cache else adapter
        return self.run(input_ids, torch.full((len(input_ids),), used), past, use_cache)


class AdapterOfThePrompt(Decoder):
    """Cached steps after the prompt have no adapter."""

    def forward(self, input_ids, past=None, use_cache=False, adapter: int = 0):
        used = adapter if past is None else 0
        return self.run(input_ids, torch.full((len(input_ids),), used), past, use_cache)


class Ignored(Decoder):
    """Its adapters are never used."""

    def set_adapter(self, number):
        self.active = number

    def forward(self, input_ids, past=None, use_cache=False):
        return self.run(input_ids, torch.zeros(len(input_ids), dtype=torch.long), past, use_cache)


class ToldByAToken(Decoder):
    """No argument tells the adapter: the first token does, and says nothing else."""

    def forward(self, input_ids, past=None, use_cache=False):
        adapter = (input_ids[:, 0] >= 30).long() if past is None else past[2]
        x = self.embed(input_ids)
        x = torch.cat([x[:, :1] * 0, x[:, 1:]], 1) if past is None else x
        logits, present = self.run(input_ids, adapter, past and past[:2], use_cache, x)
        return logits, (*present, adapter)

    def key(self, row, adapter):
        return tuple(row[1:].tolist()), int(adapter)


class TokenNotInTheKey(ToldByAToken):
    def key(self, row, adapter):
        return tuple(row[1:].tolist())


# --- encoder states ---
class CrossAttention(nn.Module):
    """Self-attention with a past, and cross-attention to an encoder's states of another width, whose keys and values
    are part of the past."""

    def __init__(self, vocab_size=53, width=24, heads=3, encoder_width=20, max_seq_len=32):
        super().__init__()
        self.heads, self.max_seq_len, self.encoder_width = heads, max_seq_len, encoder_width
        self.embed, self.position = nn.Embedding(vocab_size, width), nn.Embedding(max_seq_len, width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.cross_q, self.cross_kv = nn.Linear(width, width), nn.Linear(encoder_width, 2 * width)
        self.cross_out, self.head = nn.Linear(width, width), nn.Linear(width, vocab_size)

    def cross(self, states, past, use_cache):
        if past is not None:
            return past[2:]
        return tuple(split(part, self.heads) for part in self.cross_kv(states).chunk(2, dim=-1))

    def forward(self, input_ids, encoder_hidden_states, past_key_values=None, use_cache=False):
        past = past_key_values
        start, new = 0 if past is None else past[0].shape[2], input_ids.shape[1]
        x = self.embed(input_ids) + self.position(torch.arange(start, start + new))
        query, key, value = (split(part, self.heads) for part in self.qkv(x).chunk(3, dim=-1))
        if past is not None:
            key, value = torch.cat([past[0], key], 2), torch.cat([past[1], value], 2)
        mask = torch.ones(new, start + new, dtype=torch.bool).tril(start)
        x = x + self.out(sdpa(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2))
        keys, values = self.cross(encoder_hidden_states, past, use_cache)
        x = x + self.cross_out(sdpa(split(self.cross_q(x), self.heads), keys, values).transpose(1, 2).flatten(2))
        present = (key, value, keys, values)
        return self.head(x), present if use_cache else None


class CrossKeysOfTheFirst(CrossAttention):
    """Cross keys and values are computed once, and kept for all sequences of as many rows."""

    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.kept = {}

    def cross(self, states, past, use_cache):
        made = super().cross(states, past, use_cache)
        return self.kept.setdefault(len(states), made) if use_cache and past is None else made


class OptionalStates(CrossAttention):
    """Without states there is no cross-attention, and a decode step is called without them upstream."""

    def forward(self, input_ids, past=None, use_cache=False, memory=None):
        if memory is None:
            memory = torch.zeros(len(input_ids), 1, self.encoder_width)
        return super().forward(input_ids, memory, past, use_cache)


class StatesOfThisCallOnly(OptionalStates):
    """Cross keys of a cached step are those of the last prompt of any sequence."""

    last = None

    def cross(self, states, past, use_cache):
        if not use_cache:
            return super().cross(states, None, use_cache)
        if past is None:
            self.last = super().cross(states, None, use_cache)
        return tuple(x[:1].expand(len(states), -1, -1, -1) for x in self.last)


class EncoderOutputs(CrossAttention):
    """The states are the first of several outputs."""

    def forward(self, input_ids, encoder_outputs, past_key_values=None, use_cache=False):
        return super().forward(input_ids, encoder_outputs[0], past_key_values, use_cache)


class OwnsCrossCache(CrossAttention):
    """The module owns its cache; a reset empties all of it."""

    past = None

    def reset_cache(self):
        self.past = None

    def forward(self, input_ids, use_cache=False, encoder_hidden_states=None):
        logits, present = super().forward(input_ids, encoder_hidden_states, self.past if use_cache else None, True)
        self.past = present if use_cache else self.past
        return logits


class ResetKeepsCrossKeys(OwnsCrossCache):
    """A reset empties the self-attention's keys alone."""

    crossed = None

    def cross(self, states, past, use_cache):
        return super().cross(states, past, use_cache) if self.crossed is None else self.crossed

    def forward(self, input_ids, use_cache=False, encoder_hidden_states=None):
        kept, self.crossed = self.crossed, self.crossed if use_cache else None
        if use_cache and kept is not None and kept[0].shape[0] != len(input_ids):
            kept = self.crossed = None
        logits = super().forward(input_ids, use_cache, encoder_hidden_states)
        self.crossed = self.past[2:] if use_cache else kept
        return logits


class AttentionLayer(nn.Module):
    """Hidden states in; the adapter is an attribute."""

    def __init__(self, d_model=24, heads=3):
        super().__init__()
        self.heads, self.active_adapter = heads, 0
        self.qkv, self.out = nn.Linear(d_model, 3 * d_model), nn.Linear(d_model, d_model)
        self.down, self.up = nn.Parameter(torch.randn(3, d_model, 4)), nn.Parameter(torch.randn(3, 4, 3 * d_model) / 4)

    def forward(self, x, past=None):
        made = self.qkv(x) + x @ self.down[self.active_adapter] @ self.up[self.active_adapter]
        query, key, value = (split(part, self.heads) for part in made.chunk(3, dim=-1))
        if past is not None:
            key, value = torch.cat([past[0], key], 2), torch.cat([past[1], value], 2)
        mask = torch.ones(x.shape[1], key.shape[2], dtype=torch.bool).tril(key.shape[2] - x.shape[1])
        mixed = sdpa(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2)
        return self.out(mixed), (key, value)


class AdapterOfTheFirst(AttentionLayer):
    """Cached steps behind the first use the adapter of the first sequence."""

    first = None

    def forward(self, x, past=None):
        active, self.first = self.active_adapter, self.active_adapter if self.first is None else self.first
        self.active_adapter = active if past is None else self.first
        try:
            return super().forward(x, past)
        finally:
            self.active_adapter = active
