"""Decoders of one attention layer that differ in the mask of cached steps only, as two well-known listings have it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

Past = tuple[Tensor, Tensor]


class RightMask(nn.Module):
    """Embedding, attention without positions, LM head; no residual connection."""

    def __init__(self, vocabulary: int = 60, width: int = 24, heads: int = 3) -> None:
        super().__init__()
        self.heads = heads
        self.embedding = nn.Embedding(vocabulary, width)
        self.project = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, vocabulary)

    def mask(self, t: int, s: int) -> Tensor | None:
        """Which of ``s`` tokens the ``t`` new ones see ``(t, s)``; None: all."""
        return torch.ones(t, s, dtype=torch.bool).tril(s - t)

    def forward(self, tokens: Tensor, past_kv: Past | None = None) -> tuple[Tensor, Past]:
        batch, t = tokens.shape
        parts = self.project(self.embedding(tokens)).chunk(3, dim=-1)
        query, key, value = (part.view(batch, t, self.heads, -1).transpose(1, 2) for part in parts)
        if past_kv is not None:
            key, value = torch.cat([past_kv[0], key], dim=2), torch.cat([past_kv[1], value], dim=2)
        attended = functional.scaled_dot_product_attention(query, key, value, attn_mask=self.mask(t, key.shape[2]))
        return self.output(attended.transpose(1, 2).flatten(2)), (key, value)


class TopLeftMask(RightMask):
    """``is_causal=True`` with a cache: pytorch/pytorch issue 108108."""

    def mask(self, t: int, s: int) -> Tensor | None:
        return torch.ones(t, s, dtype=torch.bool).tril()


class UnmaskedChunk(RightMask):
    """No mask where tokens are cached."""

    def mask(self, t: int, s: int) -> Tensor | None:
        return super().mask(t, s) if t == s else None
