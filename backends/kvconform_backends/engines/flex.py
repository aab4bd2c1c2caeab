"""``flex`` and ``flex-compiled``: PyTorch's FlexAttention on keys and values that grow by concatenation."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from kvconform_backends.engines.operator import Operator, StaticOperator
from kvconform_backends.numpy.cache import Array


class FlexEager(Operator):
    """Causality, window and the caller's mask are a ``mask_mod``; softcap and ALiBi are a ``score_mod``."""

    options = ("softcap", "alibi")

    def attention(self, query: Array, keys: Array, values: Array) -> Array:
        t, s = query.shape[2], keys.shape[2]
        # seen by row, of which there may be one for all; the closures read it as FlexAttention reads any tensor
        seen = torch.tensor(np.broadcast_to(self.visible(t, s), (len(query), 1, t, s))[:, 0])
        heads = torch.arange(1, self.config.heads + 1)
        slopes = -(2.0 ** (-8 * heads / self.config.heads)) if self.config.positions == "alibi" else None
        behind = torch.tensor(np.broadcast_to(self.behind(t, s), (len(query), 1, t, s))[:, 0]).float()

        def mask_mod(row: Tensor, head: Tensor, at: Tensor, key: Tensor) -> Tensor:
            return seen[row, at, key]

        def score_mod(score: Tensor, row: Tensor, head: Tensor, at: Tensor, key: Tensor) -> Tensor:
            if self.config.softcap is not None:
                score = self.config.softcap * torch.tanh(score / self.config.softcap)
            return score if slopes is None else score + slopes[head] * behind[row, at, key]

        mask = create_block_mask(mask_mod, len(query), None, t, s, device="cpu")
        changed = self.config.softcap is not None or slopes is not None
        q, k, v = (torch.tensor(np.ascontiguousarray(x)) for x in (query, keys, values))
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is meant to be compiled
            return np.asarray(self.computed(q, k, v, score_mod if changed else None, mask))

    def computed(self, query: Tensor, keys: Tensor, values: Tensor, score_mod: Any, mask: Any) -> Tensor:
        gqa = self.config.group > 1
        made = flex_attention(query, keys, values, score_mod, mask, self.config.score_scale, enable_gqa=gqa)
        assert isinstance(made, Tensor)
        return made


class FlexCompiled(StaticOperator):
    """The same by ``torch.compile``, on buffers of the capacity."""

    options = FlexEager.options
    attention = FlexEager.attention
    computed = torch.compile(FlexEager.computed, dynamic=False)
