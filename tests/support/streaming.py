"""Attention with sinks: a query sees the first ``SINKS`` tokens and the newest ``RECENT``; positions are those in the
cache. Keys are cached before they are rotated, and rotated by their place at each step."""

from __future__ import annotations

import torch
from torch import Tensor, nn

SINKS, RECENT = 2, 5
Past = tuple[Tensor, Tensor]


class Streaming(nn.Module):
    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.d = heads, width // heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, past: Past | None = None, use_cache: bool = False) -> tuple[Tensor, Past | None]:
        if not use_cache:
            return self.whole(x), None
        outputs = []
        for token in x.split(1, 1):
            y, past = self.token(token, past)
            outputs.append(y)
        return torch.cat(outputs, 1), past

    def whole(self, x: Tensor) -> Tensor:
        """Without a cache: each query by itself."""
        q, k, v = self.projected(x)
        outputs = []
        for i in range(x.shape[1]):
            seen = torch.arange(i + 1)
            seen = seen if i < SINKS + RECENT else torch.cat([seen[:SINKS], seen[-RECENT:]])
            places = torch.arange(len(seen))
            scores = self.rotate(q[:, :, i : i + 1], places[-1:]) @ self.rotate(k[:, :, seen], places).transpose(2, 3)
            outputs.append((scores / self.d**0.5).softmax(-1) @ v[:, :, seen])
        return self.joined(torch.cat(outputs, 2))

    def token(self, x: Tensor, past: Past | None) -> tuple[Tensor, Past]:
        q, k, v = self.projected(x)
        if past is not None:
            k, v = torch.cat([self.kept(past[0]), k], 2), torch.cat([self.kept(past[1]), v], 2)
        places = torch.arange(k.shape[2])
        scores = self.rotate(q, places[-1:]) @ self.rotate(k, places).transpose(2, 3) / self.d**0.5
        return self.joined(scores.softmax(-1) @ v), (k, v)

    def projected(self, x: Tensor) -> Tensor:
        return self.qkv(x).view(len(x), x.shape[1], 3, self.heads, self.d).permute(2, 0, 3, 1, 4)

    def joined(self, y: Tensor) -> Tensor:
        return self.out(y.transpose(1, 2).flatten(2))

    def rotate(self, x: Tensor, places: Tensor) -> Tensor:
        half = self.d // 2
        angle = places[:, None] / 100.0 ** (torch.arange(half) / half)
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    def kept(self, old: Tensor) -> Tensor:
        """What is left of a full cache when one token more comes."""
        return old if old.shape[2] < SINKS + RECENT else torch.cat([old[:, :, :SINKS], old[:, :, -(RECENT - 1) :]], 2)


class NewKeyNotShifted(Streaming):
    """Keys are cached rotated. When one is evicted, the kept ones are turned back by one place, but the new one is
    rotated by a place too many (https://github.com/huggingface/transformers/issues/35350)."""

    def token(self, x: Tensor, past: Past | None) -> tuple[Tensor, Past]:
        q, k, v = self.projected(x)
        at = torch.tensor([0 if past is None else past[0].shape[2]])
        q, k = self.rotate(q, at), self.rotate(k, at)
        if past is not None:
            kept = self.kept(past[0])
            if past[0].shape[2] == SINKS + RECENT:
                turned = self.rotate(kept[:, :, SINKS:], torch.full((RECENT - 1,), -1))
                kept = torch.cat([kept[:, :, :SINKS], turned], 2)
            k, v = torch.cat([kept, k], 2), torch.cat([self.kept(past[1]), v], 2)
        scores = q @ k.transpose(2, 3) / self.d**0.5
        return self.joined(scores.softmax(-1) @ v), (k, v)
