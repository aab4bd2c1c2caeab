"""Faults that cost: memory that no token needs, and work that was done before."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from kvconform_backends.faults.planted import Planted
from kvconform_backends.numpy.cache import Array, Cache, NumpyCache
from kvconform_backends.numpy.paged import PAGE, NumpyPaged

COST = ("accounting.positions", "accounting.affine")


class RepeatedHeadsStored(
    Planted,
    breaks=("accounting.bytes",),
    kind="H1",
    bug="facebookresearch/lingua/issues/44",
    configs=("attention-gqa", "attention-window", "decoder-rope"),
):
    """Keys and values are stored once for each query head that reads them."""

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
    Planted, NumpyPaged, breaks=("accounting.bytes",), kind="G1", bug="vllm-project/vllm/pull/7380", conditional=True
):
    """A length that fills its pages exactly takes one page more than it needs."""

    def reserve(self, table: list[int], start: int, stop: int) -> None:
        super().reserve(table, start, stop)
        if stop > start and stop % PAGE == 0 and len(table) == stop // PAGE:
            self.faulty += 1
            table.append(self.take())


@dataclass(eq=False)
class Told(Cache):
    """A cache that knows the inputs that it was made from."""

    given: tuple[Array, ...] = ()


class Recomputed(Planted, breaks=COST, kind="C1", bug="huggingface/transformers/pull/30108"):
    """What a step stores is never found again: each step computes all tokens anew."""

    claims = replace(
        NumpyCache.claims,
        abilities=("uncached_forward", "length", "free_slots", "reset", "immutable", "macs", "refusal"),
    )

    def again(self, past: int, t: int) -> bool:
        return past > 0

    def start(self, batch: int) -> Cache:
        empty = super().start(batch)
        return Told(empty.keys, empty.values)

    def step(self, cache: Any, *inputs: Array, count_macs: bool = False) -> tuple[Array, Cache]:  # type: ignore[override]
        t = int(self.admit(cache, inputs)[0])
        axis = -1 if self.config.profile == "decoder" else -2
        pairs = zip(cache.given, inputs, strict=True) if cache.given else zip(inputs)
        whole = tuple(np.concatenate(pair, axis=axis) for pair in pairs)
        anew = self.again(cache.length, t)
        self.faulty += anew
        made = self.start(len(cache.lengths)) if anew else self.fork(cache)
        output = self.run(made, whole if anew else inputs)
        if count_macs:
            self.measured = self.products
        return output[..., -t:, :], Told(made.keys, made.values, whole)


class LongRecomputed(Recomputed, breaks=COST, kind="C1", bug="huggingface/transformers/pull/32929", conditional=True):
    """A step on more than twelve tokens does not find them, and computes them anew."""

    def again(self, past: int, t: int) -> bool:
        return past > 12
