"""Decoders whose rotary factors depend on the number of tokens, so that their forward is no function of the prefix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

ORIGINAL = 12


class Stale(nn.Module):
    """Keys are cached after rotation, so that those of before the switch keep their old angles."""

    layers = 2

    def __init__(self, vocab_size: int = 61, width: int = 32, heads: int = 4, max_seq_len: int = 40) -> None:
        super().__init__()
        self.heads, self.d, self.max_seq_len = heads, width // heads, max_seq_len
        self.embed, self.head = nn.Embedding(vocab_size, width), nn.Linear(width, vocab_size)
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(self.layers))
        self.out = nn.ModuleList(nn.Linear(width, width) for _ in range(self.layers))

    def factors(self, total: int) -> Tensor:
        """LongRoPE: short factors up to the original length, long ones beyond."""
        half = self.d // 2
        return torch.ones(half) if total <= ORIGINAL else torch.arange(1, half + 1) * 1.5

    def rotate(self, x: Tensor, start: int, total: int) -> Tensor:
        half = self.d // 2
        powers = self.factors(total) * 100.0 ** (torch.arange(half) / half)
        angle = torch.arange(start, start + x.shape[2])[:, None] / powers
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    def forward(self, input_ids: Tensor, past_key_values: Any = None) -> Any:
        b, t = input_ids.shape
        start = 0 if past_key_values is None else past_key_values[0][0].shape[2]
        x, present = self.embed(input_ids), []
        for i, (qkv, out) in enumerate(zip(self.qkv, self.out, strict=True)):
            q, k, v = qkv(x).view(b, t, 3, self.heads, self.d).permute(2, 0, 3, 1, 4)
            past = None if past_key_values is None else past_key_values[i]
            mixed, layer = self.attend(q, k, v, past, start)
            present.append(layer)
            x = x + out(mixed.transpose(1, 2).flatten(2))
        return self.head(x), present

    def attend(self, q: Tensor, k: Tensor, v: Tensor, past: Any, start: int) -> Any:
        total = start + q.shape[2]
        q, k = self.rotate(q, start, total), self.rotate(k, start, total)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        return self.mixed(q, k, v, start), (k, v)

    def mixed(self, q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(start)
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class Recomputed(Stale):
    """The past holds the ids as well: a step that crosses the switch computes all keys and values again."""

    def forward(self, input_ids: Tensor, past_key_values: Any = None) -> Any:
        ids, layers = past_key_values if past_key_values is not None else (input_ids[:, :0], None)
        t, ids = input_ids.shape[1], torch.cat([ids, input_ids], 1)
        crosses = ids.shape[1] - t <= ORIGINAL < ids.shape[1]
        logits, present = super().forward(ids, None) if crosses else super().forward(input_ids, layers)
        return logits[:, -t:], (ids, present)


class StaleLast(Stale):
    """Gives the last position alone."""

    def forward(self, input_ids: Tensor, past_key_values: Any = None) -> Any:
        logits, present = super().forward(input_ids, past_key_values)
        return logits[:, -1:], present


class RecomputedLast(Recomputed):
    """Gives the last position alone."""

    def forward(self, input_ids: Tensor, past_key_values: Any = None) -> Any:
        logits, present = super().forward(input_ids, past_key_values)
        return logits[:, -1:], present


class NtkStale(Stale):
    """One layer with dynamic NTK: beyond the original length the base grows with every token; keys keep the angles of
    the length at which they were cached."""

    layers = 1

    def factors(self, total: int) -> Tensor:
        half = self.d // 2
        growth = max(2.0 * total / ORIGINAL - 1.0, 1.0) ** (self.d / (self.d - 2))
        return growth ** (torch.arange(half) / half)


class Ntk(NtkStale):
    """Keys are cached before rotation, and all are rotated in each step."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, past: Any, start: int) -> Any:
        total = start + q.shape[2]
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        return self.mixed(self.rotate(q, start, total), self.rotate(k, 0, total), v, start), (k, v)
