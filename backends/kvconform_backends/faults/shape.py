"""Faults of output shapes and reported lengths."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvconform_backends.faults.planted import Planted
from kvconform_backends.numpy.cache import Array, Cache

OUTPUT = "shape.output"
LENGTH = "shape.length"
FIRST_STEP = "shape.first-step"
NO_SPECIALISATION = "shape.no-specialisation"


class LastPositionOnly(Planted, breaks=(OUTPUT,), kind="X2", bug="huggingface/optimum/issues/1913"):
    """The decode branch also serves the prompt: only the last position's output is returned."""

    def step(self, cache: Cache, *inputs: Array, **options: Any) -> tuple[Array, Cache]:
        output, cache = super().step(cache, *inputs, **options)
        return self.instead(output[..., -1:, :], output), cache


class SingleSqueezed(Planted, breaks=(OUTPUT,), kind="X2", bug="microsoft/onnxruntime/issues/26262", conditional=True):
    """One token of one row on a non-empty cache loses its batch axis."""

    def step(self, cache: Cache, *inputs: Array, **options: Any) -> tuple[Array, Cache]:
        past = cache.length
        output, cache = super().step(cache, *inputs, **options)
        if past and output.shape[0] == output.shape[-2] == 1:
            output = self.instead(output[0], output)
        return output, cache


class LengthCountsHeads(Planted, breaks=(LENGTH,), kind="H2", bug="fla-org/flash-linear-attention/issues/126"):
    """The length is read from the head axis."""

    def length(self, cache: Cache) -> list[int]:
        batch, heads = cache.keys[0].shape[:2]
        self.faulty += heads != cache.length
        return [heads] * batch


class LengthSaturates(
    Planted,
    breaks=(LENGTH,),
    kind="W6",
    bug="huggingface/transformers/pull/38156",
    conditional=True,
    configs=("attention-window", "decoder-learned"),
):
    """The reported length stops at the sliding window."""

    def length(self, cache: Cache) -> list[int]:
        reported = min(cache.length, self.config.window or cache.length)
        self.faulty += reported < cache.length
        return [reported] * cache.keys[0].shape[0]


class LengthAfterTruncate(Planted, breaks=(LENGTH,), kind="C8", bug="NVIDIA/kvpress/pull/114", conditional=True):
    """The reported length is not updated by truncate, only by the next append."""

    stale: tuple[Cache, int] | None = None

    def truncate(self, cache: Cache, length: int) -> Cache:
        kept = super().truncate(cache, length)
        self.stale = kept, cache.length
        return kept

    def length(self, cache: Cache) -> list[int]:
        reported = cache.length
        if self.stale is not None and self.stale[0] is cache:
            self.faulty += reported != self.stale[1]
            reported = self.stale[1]
        return [reported] * cache.keys[0].shape[0]


class FirstTokenUnwritten(
    Planted, breaks=(FIRST_STEP, "equivalence.decode"), kind="C1", bug="TrenTorch/TrenTorch/pull/192"
):
    """The first token's key and value are never written: its slot holds zeros."""

    def append(self, cache: Cache, layer: int, key: Array, value: Array) -> tuple[Array, Array]:
        if self.cached and cache.keys[layer].shape[2] == 0:
            key, value = self.instead(unwritten(key), key), unwritten(value)
        return super().append(cache, layer, key, value)


class SinglePromptUnwritten(
    Planted, breaks=(FIRST_STEP,), kind="C1", bug="TrenTorch/TrenTorch/pull/192", conditional=True
):
    """A prompt of one token is not written; longer prompts are."""

    def append(self, cache: Cache, layer: int, key: Array, value: Array) -> tuple[Array, Array]:
        if self.cached and cache.keys[layer].shape[2] == 0 and key.shape[2] == 1:
            key, value = self.instead(unwritten(key), key), unwritten(value)
        return super().append(cache, layer, key, value)


class PastBaked(Planted, breaks=(NO_SPECIALISATION,), kind="X2", bug="huggingface/transformers/issues/13175"):
    """The past length of the first step on a cache is traced as a constant and used for every later mask."""

    baked: int | None = None

    def mask(self, t: int, s: int) -> Array:
        right = super().mask(t, s)
        if s == t or not self.cached:
            return right
        self.baked = self.baked or s - t
        return self.instead(self.seen(np.arange(self.baked, self.baked + t), s), right)


class RowsOfFirstCall(
    Planted, breaks=(NO_SPECIALISATION,), kind="X2", bug="sonos/torch-to-nnef/pull/217", conditional=True
):
    """The batch size of the first call is traced as a constant: further rows read its last row's keys."""

    baked: int | None = None

    def scores(self, query: Array, keys: Array) -> Array:
        self.baked = self.baked or len(keys)
        rows = np.minimum(np.arange(len(keys)), self.baked - 1)
        return super().scores(query, self.instead(keys[rows], keys))


class CapturedByCount(
    Planted, breaks=(NO_SPECIALISATION,), kind="X1", bug="paiml/aprender/pull/2030", conditional=True
):
    """A captured step is looked up by batch and token count only, and replayed with the past length of its capture."""

    def mask(self, t: int, s: int) -> Array:
        right = super().mask(t, s)
        if not self.cached:
            return right
        past = self.captured.setdefault((self.batch, t), s - t)
        return self.instead(self.seen(np.arange(past, past + t), s), right)

    @property
    def captured(self) -> dict[tuple[int, int], int]:
        found: dict[tuple[int, int], int] = self.__dict__.setdefault("_captured", {})
        return found


def unwritten(x: Array) -> Array:
    """The tokens ``(b, g, t, d)`` with zeros in place of the first."""
    return np.concatenate([np.zeros_like(x[:, :, :1]), x[:, :, 1:]], axis=2)
