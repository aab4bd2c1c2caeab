"""``mlx-batch`` and ``mlx-batch-rotating``: mlx-lm's caches for prompts of different lengths, padded on the left."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import BatchKVCache, BatchRotatingKVCache

from kvconform_backends.abilities import without
from kvconform_backends.engines.mlx import MlxCache, MlxRotating
from kvconform_backends.numpy.cache import Array
from kvconform_backends.validation import check_counts, check_inputs, check_length, check_rows


class MlxBatch(MlxCache):
    more = (*MlxCache.claims.abilities, "ragged", "reorder")
    claims = replace(MlxCache.claims, abilities=more, padding=("left",), ragged_appends="first")

    def start(self, batch: int) -> Any:
        return self.of_batch(BatchKVCache([0] * batch), batch)

    def step(self, cache: Any, *inputs: Array, counts: Array | None = None, padding: str = "left") -> Any:  # type: ignore[override]
        t = check_inputs(self.config, cache.batch, inputs)
        new = np.full(cache.batch, t) if counts is None else np.array(check_counts(counts, cache.batch, t))
        longest = int((np.array(self.length(cache)) + new).max())
        if longest > self.config.capacity:
            raise ValueError(f"{longest} tokens exceed the capacity of {self.config.capacity}")
        if counts is not None:
            cache.prepare(left_padding=(t - new).tolist())
        return self.put(cache, *inputs) if t else np.zeros(inputs[0].shape, np.float32), cache

    def length(self, cache: Any) -> list[int]:
        return [int(length) for length in np.array(cache.offset)]

    def truncate(self, cache: Any, length: int) -> Any:
        held, *others = sorted(set(self.length(cache)))
        check_length(length, held)
        if others:
            raise ValueError("trim cannot cut rows of different lengths to one length")
        return self.trim(cache, held - length) if length < held else cache

    def reorder(self, cache: Any, rows: list[int]) -> Any:
        check_rows(rows, cache.batch)
        cache.filter(mx.array(rows))
        return self.of_batch(cache, len(rows))

    def contents(self, cache: Any) -> list[list[tuple[Array, Array]]]:
        rows = [MlxCache.start(self, 1) if cache.keys is None else cache.extract(row) for row in range(cache.batch)]
        return [[super(MlxBatch, self).contents(row)[0][0] for row in rows]]


class MlxBatchRotating(MlxBatch):
    claims = replace(MlxBatch.claims, abilities=without(MlxBatch.claims, "truncate", "contents"), retention="window")
    refuses = MlxRotating.refuses

    def start(self, batch: int) -> Any:
        return self.of_batch(BatchRotatingKVCache(self.config.window, [0] * batch), batch)
