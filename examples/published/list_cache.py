"""A list cache in the style of an article: the key and value of each token go into a global list, never cleared.

The outputs for the first prompt are right. The second prompt reads the keys of the first. Check it as published and as
intended:

    kvconform check examples/published/list_cache.py:ListAttention
    kvconform check examples/published/list_cache.py:OwnListAttention
"""

import torch
from torch import nn

KV_CACHE = []  # the mistake: all sequences share it


class ListAttention(nn.Module):
    def __init__(self, d_model=32):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(d_model, d_model) for _ in range(3))

    def entries(self):
        return KV_CACHE

    def forward(self, x, use_cache=False):  # (b, t, d_model)
        q, k, v = self.query(x), self.key(x), self.value(x)
        cache = self.entries() if use_cache else []
        outputs = []
        for i in range(x.shape[1]):
            cache.append((k[:, i], v[:, i]))
            keys = torch.stack([key for key, _ in cache], dim=1)  # (b, s, d_model)
            values = torch.stack([value for _, value in cache], dim=1)
            scores = q[:, i : i + 1] @ keys.transpose(1, 2) / keys.shape[-1] ** 0.5  # (b, 1, s)
            outputs.append(scores.softmax(-1) @ values)
        return torch.cat(outputs, dim=1)


class OwnListAttention(ListAttention):
    """As intended: the module owns the list, and can empty it."""

    def __init__(self, d_model=32):
        super().__init__(d_model)
        self.reset_cache()

    def reset_cache(self):
        self.cache = []

    def entries(self):
        return self.cache
