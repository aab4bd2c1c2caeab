"""Faults at the capacity limit: the last slot, overflow, and the number of free slots."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvconform_backends.faults.configs import LAYERS, WINDOWED
from kvconform_backends.faults.planted import Planted
from kvconform_backends.numpy.cache import Array, Cache
from kvconform_backends.numpy.static import NumpyStatic

FULL = "capacity.full"
OVERFLOW = "capacity.overflow"
ROOM = "capacity.room"


# --- full ---
class LastSlotNotRead(Planted, NumpyStatic, breaks=(FULL,), kind="C2", bug="pytorch/executorch/pull/5227"):
    """The last slot of the buffer is never read: its token does not see itself."""

    def mask(self, t: int, s: int) -> Array:
        right = super().mask(t, s)
        return self.instead(right & (np.arange(s) < s - 1), right)


class DecodeToFullClamps(
    Planted, NumpyStatic, breaks=(FULL,), kind="C2", bug="huggingface/transformers/issues/32503", conditional=True
):
    """A decode step that fills the cache overwrites the second-to-last slot; a chunk that fills it is correct."""

    def append(self, cache: Any, layer: int, key: Array, value: Array) -> tuple[Array, Array]:
        right, last = self.places, self.config.capacity - 1
        if key.shape[2] == 1:
            self.places = self.instead(np.where(right == last, last - 1, right), right)
        attended = super().append(cache, layer, key, value)
        self.places = right
        return attended


# --- overflow ---
class OverflowGrows(Planted, breaks=(OVERFLOW,), kind="C2", bug="huggingface/transformers/issues/30351"):
    """The capacity is not checked: a cache that grows by concatenation grows beyond it."""

    def admit(
        self, cache: Cache, inputs: tuple[Array, ...], counts: Array | None = None, mask: Array | None = None
    ) -> Array:
        counts = self.counts(cache, inputs, counts)
        self.faulty += int((cache.lengths + counts).max()) > self.config.capacity
        return counts


class StraddlingCut(
    Planted,
    NumpyStatic,
    breaks=(OVERFLOW, "errors.unchanged"),
    kind="C2",
    bug="Dao-AILab/flash-attention/issues/638",
    conditional=True,
):
    """A full cache refuses; a chunk that crosses the capacity is silently cut to the free slots."""

    def admit(
        self, cache: Cache, inputs: tuple[Array, ...], counts: Array | None = None, mask: Array | None = None
    ) -> Array:
        right = self.counts(cache, inputs, counts)
        cut = np.minimum(right, self.config.capacity - cache.lengths)
        return super().admit(cache, inputs, counts, mask) if cut.max() == 0 else self.instead(cut, right)


class TokenAtFullDropped(
    Planted, NumpyStatic, breaks=(OVERFLOW,), kind="C2", bug="pytorch/executorch/pull/5227", conditional=True
):
    """A decode step on a full cache is not refused: its token is dropped. Longer chunks are refused."""

    def admit(
        self, cache: Cache, inputs: tuple[Array, ...], counts: Array | None = None, mask: Array | None = None
    ) -> Array:
        right = self.counts(cache, inputs, counts)
        if cache.lengths.min() == self.config.capacity and right.max() == 1:
            return self.instead(np.zeros_like(right), right)
        return super().admit(cache, inputs, counts, mask)


class RefusedAfterWrapping(
    Planted,
    NumpyStatic,
    breaks=(OVERFLOW,),
    kind=("C2", "C12"),
    bug="Dao-AILab/flash-attention/issues/638",
    conditional=True,
    configs=LAYERS,
):
    """An append beyond the capacity is refused, but only after its last tokens have overwritten the first slots."""

    def admit(
        self, cache: Cache, inputs: tuple[Array, ...], counts: Array | None = None, mask: Array | None = None
    ) -> Array:
        try:
            return super().admit(cache, inputs, counts, mask)
        except ValueError:
            over = cache.length + inputs[1].shape[2] - self.config.capacity
            if 0 < over <= inputs[1].shape[2]:
                self.faulty += 1
                for buffer, new in ((cache.keys[0], inputs[1]), (cache.values[0], inputs[2])):
                    buffer[:, :, :over] = self.stored(new[:, :, -over:])
            raise


# --- free slots ---
class RoomOfAllocation(Planted, breaks=(ROOM,), kind="C3", bug="Blaizzy/mlx-vlm/pull/2036"):
    """Free slots are counted from the allocated width, which grows by 8 tokens at a time."""

    def free_slots(self, cache: Cache) -> list[int]:
        right = super().free_slots(cache)
        wrong = [max(self.config.capacity - -(-int(n) // 8) * 8, 0) for n in cache.lengths]
        self.faulty += wrong != right
        return wrong


class RoomOfWindow(
    Planted,
    breaks=(ROOM,),
    kind=("C3", "W6"),
    bug="huggingface/transformers/pull/48510",
    conditional=True,
    configs=WINDOWED,
):
    """Free slots are counted on the windowed layer, whose length stops growing once the window is full."""

    def free_slots(self, cache: Cache) -> list[int]:
        right = super().free_slots(cache)
        wrong = [self.config.capacity - min(int(n), self.config.window or int(n)) for n in cache.lengths]
        self.faulty += wrong != right
        return wrong


class RoomOfLongestRow(
    Planted, NumpyStatic, breaks=(ROOM,), kind=("C3", "M7"), bug="microsoft/onnxruntime/pull/20521", conditional=True
):
    """Every row reports the free slots of the longest row."""

    def free_slots(self, cache: Any) -> list[int]:
        right = super().free_slots(cache)
        self.faulty += min(right) != max(right)
        return [min(right)] * len(right)
