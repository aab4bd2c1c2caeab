"""mlx-lm's cache for a window and padded rows hides a token from a chunk behind two decode steps.

Two rows, of which the first has three columns of padding; the window has 5 tokens. The cache without a window is the
reference: its mask shows the same tokens."""

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import BatchKVCache, BatchRotatingKVCache

WINDOW, PADDING = 5, [3, 0]


def outputs(cache):
    made, rng = [], np.random.default_rng(0)
    for size in (5, 1, 1, 4):
        query, key, value = (mx.array(rng.normal(size=(2, 1, size, 8)).astype(np.float32)) for _ in range(3))
        mask = cache.make_mask(size, window_size=WINDOW)
        keys, values = cache.update_and_fetch(key, value)
        made.append(np.array(mx.fast.scaled_dot_product_attention(query, keys, values, scale=1.0, mask=mask)))
    return made


rotating, whole = outputs(BatchRotatingKVCache(WINDOW, PADDING)), outputs(BatchKVCache(PADDING))
for step in range(1, 4):
    off = np.abs(rotating[step] - whole[step]).max(axis=(1, 2, 3))
    print(f"step {step}, {rotating[step].shape[2]} tokens: row 0 off by {off[0]:.1g}, row 1 by {off[1]:.1g}")
