"""Module buffers in the style of a book: attention modules that own their cache, and a mask cut to the new tokens.

A prompt on an empty cache is right, and so is a single token on a cache, because a mask of one by one broadcasts to any
row of scores. A chunk of several tokens on a cache fails on the shape of the mask. Check it as published and as
intended:

    kvconform check examples/published/module_buffers.py:Decoder
    kvconform check examples/published/module_buffers.py:Decoder --init '{"mended": true}'
"""

import torch
from torch import nn


class Attention(nn.Module):
    def __init__(self, d_model, n_heads, context_length, mended):
        super().__init__()
        self.mended = mended
        self.n_heads, self.d_head = n_heads, d_model // n_heads
        self.query, self.key, self.value = (nn.Linear(d_model, d_model, bias=False) for _ in range(3))
        self.out = nn.Linear(d_model, d_model)
        future = torch.ones(context_length, context_length, dtype=torch.bool).triu(1)
        self.register_buffer("future", future, persistent=False)
        self.reset_cache()

    def reset_cache(self):
        self.register_buffer("cache_k", None, persistent=False)
        self.register_buffer("cache_v", None, persistent=False)

    def forward(self, x, use_cache=False):  # (b, t, d_model)
        b, t, d_model = x.shape
        q, k, v = (
            project(x).view(b, t, self.n_heads, self.d_head).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        if use_cache:
            if self.cache_k is None:
                self.cache_k, self.cache_v = k, v
            else:
                self.cache_k, self.cache_v = torch.cat([self.cache_k, k], dim=2), torch.cat([self.cache_v, v], dim=2)
            k, v = self.cache_k, self.cache_v
        scores = q @ k.transpose(2, 3) / self.d_head**0.5  # (b, n_heads, t, s)
        s = k.shape[2]
        future = self.future[s - t : s, :s] if self.mended else self.future[:t, :t]  # the mistake
        scores = scores.masked_fill(future, -torch.inf)
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, t, d_model))


class Decoder(nn.Module):
    def __init__(self, vocab_size=97, d_model=32, n_heads=4, n_layers=2, context_length=40, mended=False):
        super().__init__()
        self.context_length = context_length
        self.tokens = nn.Embedding(vocab_size, d_model)
        self.positions = nn.Embedding(context_length, d_model)
        self.norms = nn.ModuleList(nn.LayerNorm(d_model) for _ in range(n_layers))
        self.layers = nn.ModuleList(Attention(d_model, n_heads, context_length, mended) for _ in range(n_layers))
        self.head = nn.Linear(d_model, vocab_size, bias=False)
        self.current_pos = 0

    def reset_kv_cache(self):
        self.current_pos = 0
        for layer in self.layers:
            layer.reset_cache()

    def forward(self, in_idx, use_cache=False):  # (b, t)
        t = in_idx.shape[1]
        start = self.current_pos if use_cache else 0
        if use_cache:
            self.current_pos += t
        x = self.tokens(in_idx) + self.positions(torch.arange(start, start + t, device=in_idx.device))
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x), use_cache=use_cache)
        return self.head(x)  # (b, t, vocab_size)
