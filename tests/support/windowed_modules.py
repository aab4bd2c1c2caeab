"""Decoders with a sliding window, which keep more or fewer of the tokens that it hides.

Addressed as ``tests/support/windowed_modules.py:Name``. They need torch, and do not use this package.
"""

# mypy: ignore-errors
from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

WINDOW, LAYERS = 6, 2


class NeverEvicts(nn.Module):
    """Rotary positions; the mask hides what the past never drops. The past counts its tokens, evicted ones included."""

    window, kept = WINDOW, None

    def __init__(self, vocab_size=61, width=32, heads=4, max_seq_len=40):
        super().__init__()
        self.heads, self.d, self.max_seq_len = heads, width // heads, max_seq_len
        self.embed, self.head = nn.Embedding(vocab_size, width), nn.Linear(width, vocab_size)
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(LAYERS))
        self.out = nn.ModuleList(nn.Linear(width, width) for _ in range(LAYERS))

    def rotate(self, x, start):
        half = self.d // 2
        angle = torch.arange(start, start + x.shape[2])[:, None] / 100.0 ** (torch.arange(half) / half)
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    def forward(self, input_ids, past=None):
        b, t = input_ids.shape
        start = 0 if past is None else past["seen"]
        x, present = self.embed(input_ids), []
        for i, (qkv, out) in enumerate(zip(self.qkv, self.out, strict=True)):
            q, k, v = qkv(x).view(b, t, 3, self.heads, self.d).permute(2, 0, 3, 1, 4)
            q, k = self.rotate(q, start), self.rotate(k, start)
            if past is not None:
                k, v = torch.cat([past["kv"][i][0], k], 2), torch.cat([past["kv"][i][1], v], 2)
            s = k.shape[2]
            age = torch.arange(s - t, s)[:, None] - torch.arange(s)
            seen = (age >= 0) & (age < (self.window or s + 1))
            y = functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
            x = x + out(y.transpose(1, 2).flatten(2))
            first = 0 if self.kept is None else max(0, s - self.kept)
            present.append((k[:, :, first:], v[:, :, first:]))
        return self.head(x), {"kv": present, "seen": start + t}


class Evicts(NeverEvicts):
    kept = WINDOW - 1


class EvictsLate(NeverEvicts):
    kept = 20


class SeesAll(NeverEvicts):
    window = None


class LosesItsWindow(NeverEvicts):
    window = None
