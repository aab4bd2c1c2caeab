"""Past tuples as listed later in the same notebook: ``is_causal=(past_kv is None)``.

It is right for a prompt on an empty cache, and for a single token on a cache. A chunk of several tokens on a cache has
no mask: each token also sees the tokens after it. Check it:

    kvconform check examples/published/past_tuples_second.py:SecondListing
"""

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention


class SecondListing(nn.Module):
    def __init__(self, d_model=32, n_heads=4):
        super().__init__()
        self.n_heads = n_heads
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.out = nn.Linear(d_model, d_model)

    def forward(self, x, past_kv=None):  # (b, t, d_model), None or two of (b, n_heads, past, d_head)
        b, t, d_model = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.n_heads, -1).permute(2, 0, 3, 1, 4)
        if past_kv is not None:
            k = torch.cat([past_kv[0], k], dim=2)
            v = torch.cat([past_kv[1], v], dim=2)
        y = scaled_dot_product_attention(q, k, v, is_causal=past_kv is None)  # the mistake
        return self.out(y.transpose(1, 2).reshape(b, t, d_model)), (k, v)
