"""A decoder of a kind that the definition does not express: judged by its own forward without a cache.

One layer keeps a recurrent state (linear attention with decay), the other one keys and values, with normalised queries
and keys; attention and MLP run in parallel. The cache is a dict that the caller passes back.
"""

import torch
from torch import nn
from torch.nn import functional


class Recurrent(nn.Module):
    """Linear attention: a state ``(b, h, d, d)`` that decays, whatever the length."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.qkv = heads, nn.Linear(width, 3 * width)

    def forward(self, x, state):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        outputs = []
        for t in range(x.shape[1]):
            state = 0.9 * state + k[:, :, t, :, None] * v[:, :, t, None, :]
            outputs.append(torch.einsum("bhd,bhde->bhe", q[:, :, t], state))
        return torch.stack(outputs, 2).transpose(1, 2).flatten(2), state


class Attention(nn.Module):
    """Causal attention whose queries and keys are normalised before the product."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.qkv = heads, nn.Linear(width, 3 * width)

    def forward(self, x, keys, values):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = functional.normalize(q, dim=-1), functional.normalize(k, dim=-1)
        keys, values = torch.cat([keys, k], 2), torch.cat([values, v], 2)
        t, s = q.shape[2], keys.shape[2]
        mask = torch.ones(t, s, dtype=torch.bool).tril(s - t)
        mixed = functional.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=8.0)
        return mixed.transpose(1, 2).flatten(2), keys, values


class Decoder(nn.Module):
    def __init__(self, vocab_size=61, width=32, heads=4):
        super().__init__()
        self.heads, self.embed = heads, nn.Embedding(vocab_size, width)
        self.recurrent, self.attention = Recurrent(width, heads), Attention(width, heads)
        mlps = [nn.Sequential(nn.Linear(width, 48), nn.GELU(), nn.Linear(48, width)) for _ in range(2)]
        self.mlps, self.norms = nn.ModuleList(mlps), nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.head = nn.Linear(width, vocab_size)

    def empty(self, x):
        b, d = x.shape[0], x.shape[2] // self.heads
        nothing = x.new_zeros(b, self.heads, 0, d)
        return {"state": x.new_zeros(b, self.heads, d, d), "keys": nothing, "values": nothing}

    def forward(self, input_ids, cache=None):
        x = self.embed(input_ids)
        cache = self.empty(x) if cache is None else cache
        y = self.norms[0](x)
        mixed, state = self.recurrent(y, cache["state"])
        x = x + mixed + self.mlps[0](y)  # attention and MLP in parallel
        y = self.norms[1](x)
        mixed, keys, values = self.attention(y, cache["keys"], cache["values"])
        x = x + mixed + self.mlps[1](y)
        return self.head(x), {"state": state, "keys": keys, "values": values}
