"""Faults of captured and replayed steps, of memory shared by past and present, and of tiles."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from kvconform_backends.faults.planted import Planted
from kvconform_backends.numpy.cache import Array, Cache, NumpyCache
from kvconform_backends.numpy.static import Buffers, NumpyStatic
from kvconform_specs.config import Config

TILES = "numerics.tiles"

GROWTH, ALIASING, GRAPHS = (("capture.growth",), ("capture.aliasing",), ("capture.graphs",))
TILE = 8


# --- replays ---
class MemoryCaptured(
    Planted, NumpyStatic, breaks=(*GROWTH, "shape.no-specialisation"), kind="X1", bug="NVIDIA/TensorRT-LLM/pull/18769"
):
    """A step reads the keys and values that were captured for its batch size and token count."""

    def append(self, cache: Any, layer: int, key: Array, value: Array) -> tuple[Array, Array]:
        captured: dict[Hashable, tuple[Array, Array]] = self.__dict__.setdefault("_captured", {})
        keys, values = super().append(cache, layer, key, value)
        old_keys, old_values = captured.setdefault((layer, *key.shape), (keys, values))
        return self.instead(old_keys, keys), self.instead(old_values, values)


class PlanCounts(
    Planted, breaks=GROWTH, kind=("X1", "C7"), bug="flashinfer-ai/flashinfer/issues/2511", conditional=True
):
    """Decode steps of one batch size share a plan that counts on from the last prompt of any sequence."""

    planned: Mapping[int, int] = {}

    def mask(self, t: int, s: int) -> Array:
        right = super().mask(t, s)
        if not self.cached:
            return right
        if self.layer == 0:
            past = self.planned.get(self.batch, s - 1) + 1 if t == 1 < s else s
            self.planned = {**self.planned, self.batch: past}
        past = self.planned[self.batch] - t
        return self.instead(self.seen(np.arange(past, past + t), s), right) if t == 1 < s else right


class BucketCaptured(Planted, breaks=GROWTH, kind="X1", bug="paiml/aprender/pull/2030", conditional=True):
    """The number of eight-key tiles that a decode step reads is captured per batch size: later tiles are never read."""

    captured: Mapping[int, int] = {}

    def mask(self, t: int, s: int) -> Array:
        right = super().mask(t, s)
        if t > 1 or s <= TILE:
            return right
        if self.batch not in self.captured:
            self.captured = {**self.captured, self.batch: -(-s // TILE) * TILE}
        return self.instead(right & (np.arange(s) < self.captured[self.batch]), right)


# --- graphs ---
class Captures(NumpyCache):
    """Captures one graph per size class: one row or several, one token or several."""

    claims = replace(NumpyCache.claims, abilities=(*NumpyCache.claims.abilities, "graph_count"), max_graphs=4)

    def __init__(self, config: Config, weights: Mapping[str, Array], device: str = "cpu") -> None:
        super().__init__(config, weights, device)
        self.captures: set[Hashable] = set()

    def admit(self, cache: Cache, inputs: tuple[Array, ...], *others: Any, **named: Any) -> Array:
        counts = super().admit(cache, inputs, *others, **named)
        self.captures.add(self.shape(len(counts), int(counts[0]), cache.length))
        return counts

    def shape(self, batch: int, t: int, past: int) -> Hashable:
        """The key under which a graph is stored."""
        return batch == 1, t == 1

    def graph_count(self) -> int:
        return len(self.captures)


class GraphForEachLength(Planted, Captures, breaks=GRAPHS, kind="X2", bug="huggingface/optimum/issues/1913"):
    """The past length is a constant of the graph: each length captures another graph."""

    def shape(self, batch: int, t: int, past: int) -> Hashable:
        self.faulty += past > 0
        return super().shape(batch, t, past), past


class GraphForEachBucket(Planted, Captures, breaks=GRAPHS, kind="X2", bug="paiml/aprender/pull/2030", conditional=True):
    """Beyond eight tokens, each power of two needs a graph of its own."""

    def shape(self, batch: int, t: int, past: int) -> Hashable:
        self.faulty += past + t > TILE
        return super().shape(batch, t, past), max(past + t - 1, TILE - 1).bit_length()


# --- past and present ---
class PresentWithoutPast(
    Planted, NumpyStatic, breaks=(*ALIASING, "equivalence.decode"), kind="C5", bug="microsoft/onnxruntime/pull/27108"
):
    """If the present has its own memory, the past is not copied into it: it holds only the new tokens."""

    def target(self, cache: Any, in_place: bool) -> Buffers:
        made = super().target(cache, in_place)
        if not in_place:
            for x in (*made.keys, *made.values):
                self.faulty += bool(x.any())
                x[...] = 0
        return made


class SharesMemory(Planted, NumpyStatic):
    """Base class: ``shared`` tells whether past and present share memory in this step."""

    shared = False

    def target(self, cache: Any, in_place: bool) -> Buffers:
        self.shared = in_place
        return super().target(cache, in_place)


class WrittenBeforeRead(
    SharesMemory, breaks=ALIASING, kind="C5", bug="microsoft/onnxruntime/pull/23315", conditional=True
):
    """If past and present share memory, the new tokens overwrite the first slots before these are read."""

    def append(self, cache: Any, layer: int, key: Array, value: Array) -> tuple[Array, Array]:
        past = int(cache.written.min()) - key.shape[2]
        if self.shared and past > 0:
            self.faulty += 1
            for buffer, new in ((cache.keys[layer], key), (cache.values[layer], value)):
                buffer[:, :, : min(past, key.shape[2])] = self.stored(new)[:, :, :past]
        return super().append(cache, layer, key, value)


class BoundCrosswise(SharesMemory, breaks=ALIASING, kind="C5", bug="pytorch/TensorRT/pull/4445", conditional=True):
    """If past and present share memory, new keys go to the value buffer and new values to the key buffer."""

    def append(self, cache: Any, layer: int, key: Array, value: Array) -> tuple[Array, Array]:
        self.faulty += self.shared
        return super().append(cache, layer, *((value, key) if self.shared else (key, value)))


class PastWritten(
    Planted,
    NumpyStatic,
    breaks=(*ALIASING, "contents.old-handle"),
    kind=("C5", "C4"),
    bug="microsoft/onnxruntime/issues/26064",
    conditional=True,
):
    """The present overwrites the past's memory even if it must have its own: an old handle sees the new tokens."""

    def target(self, cache: Any, in_place: bool) -> Buffers:
        self.faulty += not in_place and bool(cache.written.any())
        return super().target(cache, True)


# --- tiles ---
class ThirdTileMerged(
    Planted, breaks=(TILES, "definition.attention"), kind="X3", bug="local-inference-lab/vllm/pull/17", conditional=True
):
    """Tiles of eight keys are merged by their sums; from the third on, tiles are not rescaled to the common maximum."""

    def softmax(self, scores: Array) -> Array:
        right = super().softmax(scores)
        s = scores.shape[-1]
        if s <= 2 * TILE:
            return right
        top = scores.max(axis=-1, keepdims=True)
        tiles = np.split(scores, range(TILE, s, TILE), axis=-1)
        own = np.concatenate([np.broadcast_to(x.max(axis=-1, keepdims=True), x.shape) for x in tiles], axis=-1)
        own = np.where((np.arange(s) < 2 * TILE) | ~np.isfinite(own), top, own)
        wrong = right * np.exp(np.where(np.isfinite(top), top - own, np.float32(0)))
        total = wrong.sum(axis=-1, keepdims=True)
        share = right.sum(axis=-1, keepdims=True) / np.where(total == 0, np.float32(1), total)
        return self.instead((wrong * share).astype(np.float32), right)


class StraddlingTileSkipped(
    Planted, breaks=(TILES, "causality.past-seen"), kind="X3", bug="pytorch/executorch/pull/9105", conditional=True
):
    """A chunk on a non-empty cache skips the tile of eight keys that the diagonal crosses, unless it is the last."""

    def mask(self, t: int, s: int) -> Array:
        right = super().mask(t, s)
        query, key = np.arange(s - t, s)[:, None], np.arange(s)
        crossed = (key // TILE == query // TILE) & (query % TILE < TILE - 1) & (query // TILE < (s - 1) // TILE)
        return self.instead(right & ~crossed, right) if s > t > 1 else right
