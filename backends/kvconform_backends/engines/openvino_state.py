"""``openvino``: a stateful model on the CPU: keys and values are variables, and rows are reordered by ``beam_idx``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import openvino as ov

from kvconform_backends.engines.openvino_model import model
from kvconform_backends.engines.operator import OwnCache
from kvconform_backends.numpy.cache import Array
from kvconform_backends.validation import check_rows
from kvconform_specs.config import Config

FLOAT32 = {"KV_CACHE_PRECISION": "f32", "INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}


class OpenVino(OwnCache):
    claims = replace(OwnCache.claims, abilities=(*OwnCache.claims.abilities, "reorder"))
    options = ("alibi",)

    def __init__(self, config: Config, weights: Mapping[str, Array], device: str = "cpu") -> None:
        super().__init__(config, weights, device)
        self.compiled = ov.Core().compile_model(model(config), "CPU", FLOAT32)

    def start(self, batch: int) -> Any:
        return SimpleNamespace(request=self.compiled.create_infer_request(), batch=batch, offset=0, rows=range(batch))

    def put(self, cache: Any, *inputs: Array) -> Array:
        t = inputs[0].shape[2]
        bias = np.where(self.mask(t, cache.offset + t), np.float32(0), np.float32(-np.inf))[None, None]
        bias = bias + self.bias(t, cache.offset + t) if self.config.positions == "alibi" else bias
        feeds = dict(zip(("query", "key", "value"), inputs, strict=True))
        feeds |= {"mask": bias, "beam_idx": np.array(cache.rows, np.int32)}
        cache.offset, cache.rows = cache.offset + t, range(cache.batch)
        return np.array(cache.request.infer(feeds)[0])

    def trim(self, cache: Any, count: int) -> Any:
        return self.copied(cache, cache.offset - count)

    def fork(self, cache: Any) -> Any:
        return self.copied(cache, cache.offset)

    def copied(self, cache: Any, length: int) -> Any:
        """A request with the first tokens of another, and with its pending order of rows."""
        new = self.start(len(cache.rows))
        new.batch, new.offset, new.rows = cache.batch, length, cache.rows
        for state, old in zip(new.request.query_state(), cache.request.query_state(), strict=True):
            if cache.offset:
                state.state = ov.Tensor(np.ascontiguousarray(old.state.data[:, :, :length]))
        return new

    def reorder(self, cache: Any, rows: list[int]) -> Any:
        check_rows(rows, cache.batch)
        cache.rows, cache.batch = [cache.rows[row] for row in rows], len(rows)
        return cache
