"""The flash kernel of PyTorch's attention on a CPU gives NaN with ``is_causal`` and a scale of 0 or below.

It writes minus infinity into the masked scores and scales them afterwards. With a mask as a tensor it is right."""

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

torch.manual_seed(0)
query, key, value = (torch.randn(1, 1, 3, 8) for _ in range(3))
mask = torch.ones(3, 3, dtype=torch.bool).tril()
for scale in (0.5, 0.0, -0.5):
    with sdpa_kernel(SDPBackend.MATH):
        right = functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        causal = functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
        masked = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    print(
        f"scale {scale}: is_causal gives {int(causal.isnan().sum())} NaN of {causal.numel()}, "
        f"a mask is off by {float((masked - right).abs().max()):.0e}"
    )
