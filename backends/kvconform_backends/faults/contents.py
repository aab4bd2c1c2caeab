"""Faults of the stored contents: missing, swapped or moved entries, and unused slots."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvconform_backends.faults.capture import SharesMemory
from kvconform_backends.faults.configs import ROPE
from kvconform_backends.faults.planted import Planted
from kvconform_backends.numpy.cache import Array, Cache
from kvconform_backends.numpy.static import Buffers, NumpyStatic

ROUND_TRIP = "contents.round-trip"
ATTENTION = "definition.attention"
DECODE = "equivalence.decode"
PAST_UNCHANGED = "contents.past-unchanged"
OLD_HANDLE = "contents.old-handle"
DEAD_SLOTS = "contents.dead-slots"
POISON_SAFE = "contents.poison-safe"
NAN_REMOVED = "contents.nan-removed"
PRESENT = "contents.present"

BLOCK = 8
"""Slots that a kernel loads at once."""


def filled(written: Array) -> Array:
    """``(b, 1, 1, 1)``: the end of the last block that each row has started."""
    return np.asarray(-(-written // BLOCK) * BLOCK)[:, None, None, None]


# --- round-trip ---
class KeysInBothPlaces(Planted, breaks=(ROUND_TRIP, ATTENTION), kind="C1", bug="huggingface/transformers/issues/34232"):
    """The keys are stored both as keys and as values."""

    def append(self, cache: Cache, layer: int, key: Array, value: Array) -> tuple[Array, Array]:
        return super().append(cache, layer, key, self.instead(key, value))


class ChunkTailUnwritten(
    Planted, NumpyStatic, breaks=(ROUND_TRIP,), kind="C1", bug="huggingface/transformers/pull/30108", conditional=True
):
    """The last token of a chunk of more than four is attended to but never written back."""

    def append(self, cache: Any, layer: int, key: Array, value: Array) -> tuple[Array, Array]:
        attended = super().append(cache, layer, key, value)
        if key.shape[2] > 4:
            self.faulty += 1
            rows = np.nonzero(self.places[:, -1] >= 0)[0]
            for buffer in (cache.keys[layer], cache.values[layer]):
                buffer[rows, :, self.places[rows, -1]] = 0
        return attended


class PresentSwapped(Planted, breaks=(ROUND_TRIP,), kind="C5", bug="pytorch/TensorRT/pull/4445"):
    """The two outputs of equal shape are swapped: the values are reported as keys."""

    def contents(self, cache: Cache) -> list[list[tuple[Array, Array]]]:
        self.faulty += 1
        return [[(values, keys) for keys, values in rows] for rows in super().contents(cache)]


class PresentLacksPast(
    Planted, NumpyStatic, breaks=(ROUND_TRIP, DECODE), kind="C5", bug="microsoft/onnxruntime/pull/27108"
):
    """A present with its own memory receives only the new tokens: the past is not copied."""

    separate = True

    def target(self, cache: Any, in_place: bool) -> Buffers:
        self.separate = not in_place
        return super().target(cache, in_place)

    def run(self, cache: Any, inputs: tuple[Array, ...], mask: Array | None = None) -> Array:
        output = super().run(cache, inputs, mask)
        past = cache.written - (self.places >= 0).sum(axis=1)
        gone = np.arange(self.config.capacity)[:, None] < past[:, None, None, None]
        if self.separate:
            for buffers in (cache.keys, cache.values):
                buffers[:] = [self.instead(np.where(gone, np.zeros_like(x), x), x) for x in buffers]
        return output


class SharedWritesBeforeReading(
    SharesMemory, breaks=("capture.aliasing",), kind="C5", bug="microsoft/onnxruntime/pull/23315", conditional=True
):
    """If past and present share memory, the new values overwrite slot 0 before the past is read."""

    def append(self, cache: Any, layer: int, key: Array, value: Array) -> tuple[Array, Array]:
        if self.shared and (self.places[:, 0] > 0).all():
            self.faulty += 1
            cache.values[layer][:, :, 0] = self.stored(value)[:, :, 0]
        return super().append(cache, layer, key, value)


# --- past-unchanged ---
class KeysTurnedAgain(
    Planted, breaks=(PAST_UNCHANGED, DECODE), kind="P5", bug="NeuraLegion/shainet/pull/110", configs=ROPE
):
    """Every step rotates the cached keys by their positions again."""

    def append(self, cache: Cache, layer: int, key: Array, value: Array) -> tuple[Array, Array]:
        right = cache.keys[layer]
        cache.keys[layer] = self.instead(self.rotate(right, np.arange(right.shape[2])), right)
        return super().append(cache, layer, key, value)


class ChunkBeginsOnLast(
    Planted, NumpyStatic, breaks=(PAST_UNCHANGED,), kind="C1", bug="pytorch/executorch/pull/2689", conditional=True
):
    """A chunk on a non-empty cache is written one slot too early, over the last cached token."""

    def place(self, lengths: Array, counts: Array, t: int, padding: str) -> Array:
        right = super().place(lengths, counts, t, padding)
        moved = (right >= 0) & (lengths[:, None] > 0) & (t > 1)
        return self.instead(right - moved, right)


class KeysStretched(
    Planted,
    breaks=(PAST_UNCHANGED,),
    kind="P5",
    bug="huggingface/transformers/issues/25104",
    conditional=True,
    configs=ROPE,
):
    """When a sequence passes 16 tokens, the cached keys are rotated again, for a base that grows with the length."""

    def append(self, cache: Cache, layer: int, key: Array, value: Array) -> tuple[Array, Array]:
        right = cache.keys[layer]
        if right.shape[2] <= 16 < right.shape[2] + key.shape[2]:
            cache.keys[layer] = self.instead(self.rotate(right, 0.1 * np.arange(right.shape[2])), right)
        return super().append(cache, layer, key, value)


# --- old-handle ---
class StepWritesIntoPast(Planted, NumpyStatic, breaks=(OLD_HANDLE,), kind="C4", bug="MemTensor/MemOS/pull/2303"):
    """Every step writes into the buffers of the handle it was given, although that handle stays in use."""

    def target(self, cache: Any, in_place: bool) -> Buffers:
        self.faulty += not in_place
        return super().target(cache, True)


class ValuesOfLongPastShared(
    Planted, NumpyStatic, breaks=(OLD_HANDLE,), kind="C4", bug="huggingface/transformers/pull/32929", conditional=True
):
    """A step on more than four tokens copies its buffers except the values of the last layer."""

    def target(self, cache: Any, in_place: bool) -> Buffers:
        made = super().target(cache, in_place)
        if cache.length > 4 and not in_place:
            self.faulty += 1
            made.values[-1] = cache.values[-1]
        return made


# --- unused slots ---
class BufferAttended(
    Planted, NumpyStatic, breaks=(DEAD_SLOTS, ATTENTION), kind="M6", bug="meta-pytorch/gpt-fast/issues/233"
):
    """The whole buffer is attended to, including slots that hold no token."""

    dead: Array  # (b, 1, 1, capacity)

    def append(self, cache: Any, layer: int, key: Array, value: Array) -> tuple[Array, Array]:
        super().append(cache, layer, key, value)
        self.dead = self.attended(cache, key.shape[2]) & ~self.live(cache)[:, :, None, :, 0]
        return self.loaded(cache.keys[layer]), self.loaded(cache.values[layer])

    def attended(self, cache: Any, t: int) -> Array:
        """``(b, 1, 1, capacity)``: the slots included in the softmax."""
        return np.ones((1, 1, 1, self.config.capacity), bool)

    def mask(self, t: int, s: int) -> Array:
        right = super().mask(t, s)
        return self.instead(right | self.dead, right)


class LastBlockAttended(
    BufferAttended, breaks=(DEAD_SLOTS,), kind="M6", bug="pytorch/pytorch/pull/169222", conditional=True
):
    """Decode steps attend to their last block of 8 slots up to its end."""

    def attended(self, cache: Any, t: int) -> Array:
        return np.asarray((np.arange(self.config.capacity) < filled(cache.written)) & (t == 1))


# --- poison-safe ---
class NothingCleared(
    Planted, NumpyStatic, breaks=(POISON_SAFE, NAN_REMOVED), kind="M9", bug="pytorch/pytorch/issues/101967"
):
    """Scores of unused slots are masked, but their contents are still multiplied by a weight of zero."""

    def cleared(self, cache: Any, buffer: Array) -> Array:
        found = self.loaded(buffer)
        self.faulty += not np.isfinite(found).all()
        return found


class ValueTailLoaded(
    Planted,
    NumpyStatic,
    breaks=(POISON_SAFE, NAN_REMOVED),
    kind="M9",
    bug="Dao-AILab/flash-attention/issues/2374",
    conditional=True,
):
    """Unused keys are cleared; unused values are not, in the block of 8 slots that holds the row's last token."""

    def append(self, cache: Any, layer: int, key: Array, value: Array) -> tuple[Array, Array]:
        keys, values = super().append(cache, layer, key, value)
        block = np.arange(self.config.capacity)[:, None] < filled(cache.written)
        found = np.where(block, self.loaded(cache.values[layer]), values)
        self.faulty += not np.isfinite(found).all()
        return keys, found


class MaskAddedToDeadKeys(
    Planted,
    NumpyStatic,
    breaks=(POISON_SAFE,),
    kind=("M9", "M10"),
    bug="deepbeepmeep/Wan2GP/pull/1628",
    conditional=True,
):
    """Decode steps add minus infinity to the scores of unused keys, which leaves NaN unchanged."""

    def append(self, cache: Any, layer: int, key: Array, value: Array) -> tuple[Array, Array]:
        _keys, values = super().append(cache, layer, key, value)
        return self.loaded(cache.keys[layer]), values

    def scores(self, query: Array, keys: Array) -> Array:
        right = super().scores(query, keys)
        if query.shape[2] > 1:
            return right
        with np.errstate(invalid="ignore"):
            return self.instead(right + np.float32(0) * self.product(query, keys.swapaxes(-1, -2)), right)


# --- present ---
class CapacityShown(Planted, NumpyStatic, breaks=(PRESENT,), kind="C3", bug="ROCm/hip-ep/pull/989"):
    """The cache reports its whole buffers: the buffer size is used as the length."""

    def contents(self, cache: Any) -> list[list[tuple[Array, Array]]]:
        self.faulty += int(cache.written.min()) < self.config.capacity
        return [
            list(zip(self.loaded(k), self.loaded(v), strict=True))
            for k, v in zip(cache.keys, cache.values, strict=True)
        ]


class ShownAsFirstRow(
    Planted, NumpyStatic, breaks=(PRESENT,), kind=("C3", "M7"), bug="microsoft/onnxruntime/pull/29752", conditional=True
):
    """The cache reports as many tokens for each row as the first row holds."""

    def contents(self, cache: Any) -> list[list[tuple[Array, Array]]]:
        first = self.instead(np.full_like(cache.written, cache.written[0]), cache.written)
        return super().contents(Buffers(cache.keys, cache.values, first))
