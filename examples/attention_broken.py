"""The attention of attention.py with a common bug: ``is_causal=True`` with a cache."""

import torch
from torch import Tensor, nn
from torch.nn import functional

Past = tuple[Tensor, Tensor]


class Attention(nn.Module):
    """``(b, t, width)`` to the same shape; ``past_kv`` are keys and values ``(b, g, s, d)`` of all earlier tokens."""

    def __init__(self, width: int = 48, heads: int = 6, kv_heads: int = 2) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, width // heads
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, kv_heads * self.head_dim, bias=False)
        self.value = nn.Linear(width, kv_heads * self.head_dim, bias=False)
        self.output = nn.Linear(width, width, bias=False)

    def split(self, x: Tensor, heads: int) -> Tensor:
        return x.unflatten(-1, (heads, self.head_dim)).transpose(1, 2)  # (b, h, t, d)

    def forward(self, x: Tensor, past_kv: Past | None = None) -> tuple[Tensor, Past]:
        query = self.split(self.query(x), self.heads)
        keys, values = self.split(self.key(x), self.kv_heads), self.split(self.value(x), self.kv_heads)
        if past_kv is not None:
            keys = torch.cat([past_kv[0], keys], dim=2)  # (b, g, s, d)
            values = torch.cat([past_kv[1], values], dim=2)
        attended = functional.scaled_dot_product_attention(query, keys, values, is_causal=True, enable_gqa=True)
        return self.output(attended.transpose(1, 2).flatten(2)), (keys, values)
