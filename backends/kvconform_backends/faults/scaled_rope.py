"""Faults of scaled rotary factors, and of those that change with the number of tokens."""

from __future__ import annotations

import numpy as np

from kvconform_backends.faults.configs import LONGROPE, SCALED
from kvconform_backends.faults.planted import Planted
from kvconform_backends.numpy.cache import Array, Cache
from kvconform_backends.rotary import attention_factor

POSITIONS, DECODE, DECODER = "definition.positions", "equivalence.decode", "definition.decoder"


class Rotated(Planted):
    """Base class: keys are rotated before they are cached."""

    def append(self, cache: Cache, layer: int, key: Array, value: Array) -> tuple[Array, Array]:
        past, total = cache.keys[layer].shape[2], int(np.max(self.totals))
        self.faulty += any(past > 0 and past < length <= total for length in self.config.changes_at)
        return super().append(cache, layer, self.rotate(key, self.places_now), value)

    def on_all(self, query: Array, keys: Array, values: Array) -> Array:
        return self.attention(self.rotate(query, self.places_now), keys, values)


class CachedKeysKeepShortFactors(
    Rotated,
    breaks=(POSITIONS, DECODE, "equivalence.chunks", DECODER),
    kind="P5",
    bug="huggingface/transformers/issues/33129",
    conditional=True,
    configs=LONGROPE,
):
    """Keys are rotated before they are cached: those of before the switch to the long factors keep the short ones."""


class FactorsOfTheChunk(
    Planted,
    breaks=(POSITIONS, DECODE, DECODER),
    kind="P5",
    bug="vllm-project/vllm/issues/27414",
    conditional=True,
    configs=LONGROPE,
):
    """Short or long factors are chosen by the number of new tokens instead of all: decode steps have the short ones."""

    def on_all(self, query: Array, keys: Array, values: Array) -> Array:
        right = self.totals
        changed = [self.of(length) for length in (query.shape[2], int(np.max(right)))]
        self.totals = query.shape[2]
        self.faulty += changed[0] != changed[1]
        try:
            return super().on_all(query, keys, values)
        finally:
            self.totals = right

    def of(self, length: int) -> int:
        return sum(length >= at for at in self.config.changes_at)


class AttentionFactorLostAtDecode(
    Planted,
    breaks=(POSITIONS, DECODE, DECODER),
    kind="M11",
    bug="vllm-project/vllm/pull/48351",
    conditional=True,
    configs=SCALED,
):
    """The attention factor of the scaled rope is part of the prompt's tables only: decode steps have none."""

    def rotate(self, x: Array, positions: Array) -> Array:
        right = super().rotate(x, positions)
        wrong = right / np.float32(attention_factor(self.config))
        return self.instead(wrong, right) if positions.shape[-1] == 1 and positions.max() > 0 else right


class AttentionFactorIgnored(
    Planted, breaks=(POSITIONS, DECODER), kind="M11", bug="vllm-project/vllm/pull/48351", configs=SCALED
):
    """The scaled rope has no attention factor."""

    def rotate(self, x: Array, positions: Array) -> Array:
        right = super().rotate(x, positions)
        return self.instead(right / np.float32(attention_factor(self.config)), right)


class SwitchOneTokenLate(
    Planted,
    breaks=(POSITIONS, DECODER),
    kind="P5",
    bug="ggml-org/llama.cpp/issues/24875",
    conditional=True,
    configs=LONGROPE,
):
    """The long factors are used from one token later on."""

    def on_all(self, query: Array, keys: Array, values: Array) -> Array:
        right = self.totals
        self.totals = np.maximum(right - 1, 1)
        self.faulty += int(np.max(right)) in self.config.changes_at
        try:
            return super().on_all(query, keys, values)
        finally:
            self.totals = right
