"""``sdpa-math``, ``sdpa-flash`` and ``sdpa-efficient``: PyTorch's scaled dot-product attention, each
kernel alone, on keys and values that grow by concatenation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from kvconform.errors import Unavailable
from kvconform_backends.engines.operator import Operator
from kvconform_backends.numpy.cache import Array
from kvconform_specs.config import Config


class SdpaMath(Operator):
    """A prompt is computed with ``is_causal``, a single token without a mask, everything else with a mask."""

    kernel: ClassVar[SDPBackend] = SDPBackend.MATH
    options = ("alibi",)

    def __init__(self, config: Config, weights: Mapping[str, Array], device: str = "cpu") -> None:
        super().__init__(config, weights, device)
        try:
            self.attention(*(np.ones((1, h, 2, config.head_dim), np.float32) for h in self.heads))
        except RuntimeError as error:
            name = self.kernel.name.lower()
            raise Unavailable(f"torch {torch.__version__} has no kernel {name} here: {error}") from error

    @property
    def heads(self) -> tuple[int, int, int]:
        return self.config.heads, self.config.kv_heads, self.config.kv_heads

    def attention(self, query: Array, keys: Array, values: Array) -> Array:
        c, t, s = self.config, query.shape[2], keys.shape[2]
        options: dict[str, Any] = {"scale": c.score_scale, "enable_gqa": c.group > 1}
        mask = self.beyond_causality(t, s)
        if mask is None and 1 < t < s:
            mask = self.visible(t, s)[None, None]
        options["attn_mask"] = None if mask is None else torch.tensor(mask)
        options["is_causal"] = mask is None and t > 1
        with torch.inference_mode(), sdpa_kernel(self.kernel):
            q, k, v = (torch.from_numpy(np.ascontiguousarray(x)) for x in (query, keys, values))
            return np.asarray(scaled_dot_product_attention(q, k, v, **options))


class SdpaFlash(SdpaMath):
    kernel = SDPBackend.FLASH_ATTENTION


class SdpaEfficient(SdpaMath):
    kernel = SDPBackend.EFFICIENT_ATTENTION
