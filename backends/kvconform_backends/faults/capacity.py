"""Faults at the capacity: the last slot, what comes after it, and how much room there is."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvconform_backends.faults.planted import Planted
from kvconform_backends.numpy.cache import Array, Cache, check_counts
from kvconform_backends.numpy.static import NumpyStatic
from kvconform_backends.validation import check_inputs


# --- full ---
class LastSlotNotRead(Planted, NumpyStatic, breaks=("capacity.full",), kind="C2", bug="pytorch/executorch/pull/5227"):
    """The last slot of the buffer is never read: its token does not see itself."""

    def mask(self, t: int, s: int) -> Array:
        right = super().mask(t, s)
        return self.instead(right & (np.arange(s) < s - 1), right)


class DecodeToFullClamps(
    Planted,
    NumpyStatic,
    breaks=("capacity.full",),
    kind="C2",
    bug="huggingface/transformers/issues/32503",
    conditional=True,
):
    """A decode step that fills the cache writes over the last token but one; a chunk that fills it is right."""

    def append(self, cache: Any, layer: int, key: Array, value: Array) -> tuple[Array, Array]:
        right, last = self.places, self.config.capacity - 1
        if key.shape[2] == 1:
            self.places = self.instead(np.where(right == last, last - 1, right), right)
        attended = super().append(cache, layer, key, value)
        self.places = right
        return attended


# --- overflow ---
class OverflowGrows(Planted, breaks=("capacity.overflow",), kind="C2", bug="huggingface/transformers/issues/30351"):
    """Nothing asks for the capacity: a cache that grows by concatenation grows beyond it."""

    def admit(
        self, cache: Cache, inputs: tuple[Array, ...], counts: Array | None = None, mask: Array | None = None
    ) -> Array:
        batch = len(cache.lengths)
        counts = check_counts(counts, batch, check_inputs(self.config, batch, inputs))
        self.faulty += int((cache.lengths + counts).max()) > self.config.capacity
        return counts


class StraddlingCut(
    Planted,
    NumpyStatic,
    breaks=("capacity.overflow", "errors.unchanged"),
    kind="C2",
    bug="Dao-AILab/flash-attention/issues/638",
    conditional=True,
):
    """A full cache refuses; a chunk that straddles the capacity is cut to what there is room for, in silence."""

    def admit(
        self, cache: Cache, inputs: tuple[Array, ...], counts: Array | None = None, mask: Array | None = None
    ) -> Array:
        batch = len(cache.lengths)
        right = check_counts(counts, batch, check_inputs(self.config, batch, inputs))
        cut = np.minimum(right, self.config.capacity - cache.lengths)
        return super().admit(cache, inputs, counts, mask) if cut.max() == 0 else self.instead(cut, right)


class RefusedAfterWrapping(
    Planted,
    NumpyStatic,
    breaks=("capacity.overflow",),
    kind=("C2", "C12"),
    bug="Dao-AILab/flash-attention/issues/638",
    conditional=True,
    configs=("attention-gqa", "attention-window", "attention-softcap", "attention-sink"),
):
    """An append beyond the capacity is refused when its last tokens have been written over the first ones."""

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


# --- room ---
class RoomOfAllocation(Planted, breaks=("capacity.room",), kind="C3", bug="Blaizzy/mlx-vlm/pull/2036"):
    """The room is what lies behind the allocated width, which grows by 8 tokens at a time."""

    def free_slots(self, cache: Cache) -> list[int]:
        right = super().free_slots(cache)
        wrong = [max(self.config.capacity - -(-int(n) // 8) * 8, 0) for n in cache.lengths]
        self.faulty += wrong != right
        return wrong


class RoomOfWindow(
    Planted,
    breaks=("capacity.room",),
    kind=("C3", "W6"),
    bug="huggingface/transformers/pull/48510",
    conditional=True,
    configs=("attention-window", "attention-sink", "decoder-learned"),
):
    """The room is counted by the layer with the window, whose length stays where the window is full."""

    def free_slots(self, cache: Cache) -> list[int]:
        right = super().free_slots(cache)
        wrong = [self.config.capacity - min(int(n), self.config.window or int(n)) for n in cache.lengths]
        self.faulty += wrong != right
        return wrong


class RoomOfLongestRow(
    Planted,
    NumpyStatic,
    breaks=("capacity.room",),
    kind=("C3", "M7"),
    bug="microsoft/onnxruntime/pull/20521",
    conditional=True,
):
    """Every row has the room that the longest has."""

    def free_slots(self, cache: Any) -> list[int]:
        right = super().free_slots(cache)
        self.faulty += min(right) != max(right)
        return [min(right)] * len(right)
