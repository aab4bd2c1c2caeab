"""A small decoder on token ids that owns its cache: preallocated buffers, ``use_cache=True``, ``reset_kv_cache()``."""

import torch
from torch import Tensor, nn
from torch.nn import functional


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, context_length: int) -> None:
        super().__init__()
        self.heads, self.context_length = heads, context_length
        self.qkv, self.output = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.register_buffer("cache_k", None, persistent=False)
        self.register_buffer("cache_v", None, persistent=False)

    def forward(self, x: Tensor, start: int, use_cache: bool) -> Tensor:
        b, t, _ = x.shape
        query, key, value = self.qkv(x).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # (b, h, t, d) each
        if use_cache:
            if self.cache_k is None:
                shape = (b, self.heads, self.context_length, key.shape[-1])
                self.cache_k, self.cache_v = key.new_zeros(shape), value.new_zeros(shape)
            self.cache_k[:, :, start : start + t], self.cache_v[:, :, start : start + t] = key, value
            key, value = self.cache_k[:, :, : start + t], self.cache_v[:, :, : start + t]
        mask = torch.ones(t, start + t, dtype=torch.bool, device=x.device).tril(start)  # (t, s)
        attended = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.output(attended.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, context_length: int) -> None:
        super().__init__()
        self.attention = Attention(width, heads, context_length)
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, start: int, use_cache: bool) -> Tensor:
        x = x + self.attention(self.norm_1(x), start, use_cache)
        return x + self.mlp(self.norm_2(x))


class Decoder(nn.Module):
    """Token ids ``(b, t)`` to logits ``(b, t, V)``. One sequence, of any batch, lives in it at a time."""

    def __init__(
        self, vocab_size: int = 61, width: int = 32, heads: int = 4, layers: int = 2, context_length: int = 32
    ) -> None:
        super().__init__()
        self.context_length = context_length
        self.tokens, self.positions = nn.Embedding(vocab_size, width), nn.Embedding(context_length, width)
        self.blocks = nn.ModuleList(Block(width, heads, context_length) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocab_size, bias=False)
        self.current_pos = 0

    def forward(self, ids: Tensor, use_cache: bool = False) -> Tensor:
        start = self.current_pos if use_cache else 0
        x = self.tokens(ids) + self.positions(torch.arange(start, start + ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x, start, use_cache)
        if use_cache:
            self.current_pos = start + ids.shape[1]
        return self.head(self.norm(x))

    def reset_kv_cache(self) -> None:
        self.current_pos = 0
        for block in self.blocks:
            block.attention.cache_k = block.attention.cache_v = None
