"""Past tuples as intended: a layer takes the keys and values of the past, and returns them with the new ones appended.

The causal mask is aligned to the bottom right of the scores: the last new token sees every key. Check it:

    kvconform check examples/published/past_tuples.py:PastTuples
"""

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention


class PastTuples(nn.Module):
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
        s = k.shape[2]
        seen = torch.ones(t, s, dtype=torch.bool, device=x.device).tril(s - t)
        y = scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return self.out(y.transpose(1, 2).reshape(b, t, d_model)), (k, v)
