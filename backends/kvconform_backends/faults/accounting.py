"""Faults that waste memory or repeat earlier work."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from kvconform_backends.faults.planted import Planted
from kvconform_backends.numpy.cache import Array, Cache, NumpyCache
from kvconform_backends.numpy.paged import PAGE, NumpyPaged

BYTES = "accounting.bytes"

COST = ("accounting.positions", "accounting.affine")


class RepeatedHeadsStored(
    Planted,
    breaks=(BYTES,),
    kind="H1",
    bug="facebookresearch/lingua/issues/44",
    configs=("attention-gqa", "attention-window", "decoder-rope"),
):
    """Keys and values are stored once per query head instead of once per KV head."""

    def start(self, batch: int) -> Cache:
        empty = super().start(batch)
        return Cache([self.repeated(k) for k in empty.keys], [self.repeated(v) for v in empty.values])

    def append(self, cache: Cache, layer: int, key: Array, value: Array) -> tuple[Array, Array]:
        self.faulty += 1
        return super().append(cache, layer, self.repeated(key), self.repeated(value))

    def repeated(self, x: Array) -> Array:
        return np.repeat(x, self.config.group, axis=1)

    def kv_head(self) -> Array:
        return np.arange(self.config.heads)

    def contents(self, cache: Cache) -> list[list[tuple[Array, Array]]]:
        group = self.config.group
        return [[(k[::group], v[::group]) for k, v in rows] for rows in super().contents(cache)]


class PageTakenAhead(
    Planted, NumpyPaged, breaks=(BYTES,), kind="G1", bug="vllm-project/vllm/pull/7380", conditional=True
):
    """A sequence whose length fills its pages exactly allocates one page too many."""

    def reserve(self, table: list[int], start: int, stop: int) -> None:
        super().reserve(table, start, stop)
        if stop > start and stop % PAGE == 0 and len(table) == stop // PAGE:
            self.faulty += 1
            table.append(self.take())


@dataclass(eq=False)
class InputsCache(Cache):
    """A cache that keeps the inputs it was computed from."""

    given: tuple[Array, ...] = ()


class Recomputed(Planted, breaks=COST, kind="C1", bug="huggingface/transformers/pull/30108"):
    """Stored keys and values are never reused: each step recomputes all tokens."""

    claims = replace(
        NumpyCache.claims,
        abilities=("uncached_forward", "length", "free_slots", "reset", "immutable", "macs", "refusal"),
    )

    def again(self, past: int, t: int) -> bool:
        return past > 0

    def start(self, batch: int) -> Cache:
        empty = super().start(batch)
        return InputsCache(empty.keys, empty.values)

    def step(self, cache: Any, *inputs: Array, count_macs: bool = False) -> tuple[Array, Cache]:  # type: ignore[override]
        t = int(self.admit(cache, inputs)[0])
        axis = -1 if self.config.profile == "decoder" else -2
        pairs = zip(cache.given, inputs, strict=True) if cache.given else zip(inputs)
        whole = tuple(np.concatenate(pair, axis=axis) for pair in pairs)
        recompute = self.again(cache.length, t)
        self.faulty += recompute
        made = self.start(len(cache.lengths)) if recompute else self.fork(cache)
        output = self.run(made, whole if recompute else inputs)
        if count_macs:
            self.measured = self.products
        return output[..., -t:, :], InputsCache(made.keys, made.values, whole)


class LongRecomputed(Recomputed, breaks=COST, kind="C1", bug="huggingface/transformers/pull/32929", conditional=True):
    """A step on more than twelve cached tokens does not find them and recomputes them."""

    def again(self, past: int, t: int) -> bool:
        return past > 12
