"""Faults that confuse the length, position or slot of one row with those of another."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvconform_backends.faults.configs import LAYERS, PLACED
from kvconform_backends.faults.planted import Planted
from kvconform_backends.numpy.cache import Array, Cache
from kvconform_backends.numpy.paged import PAGE, NumpyPaged
from kvconform_backends.numpy.static import Buffers, NumpyStatic

ROW_SOLO = "batch.row-solo"
PERMUTATION = "batch.permutation"
RAGGED = "batch.ragged"
STAGGERED = "batch.staggered"
NAN_ISOLATED = "batch.nan-isolated"
PADDING = "batch.padding"
LEFT_PADDING = "batch.left-padding"


# --- rows of equal length: row-solo, permutation ---
class Misplacing(Planted, NumpyStatic):
    """Base class: tokens are written to the cells that ``cells`` returns."""

    def cells(self, rows: Array, slots: Array) -> tuple[Array, Array]:
        raise NotImplementedError

    def append(self, cache: Any, layer: int, key: Array, value: Array) -> tuple[Array, Array]:
        rows, columns = np.nonzero(self.places >= 0)
        into, slots = self.cells(rows, self.places[rows, columns])
        for buffer, new in ((cache.keys[layer], key), (cache.values[layer], value)):
            buffer[into, :, slots] = self.stored(new)[rows, :, columns]
        return self.cleared(cache, cache.keys[layer]), self.cleared(cache, cache.values[layer])


class RowsLandInFirst(
    Misplacing, breaks=(ROW_SOLO, PERMUTATION), kind="H4", bug="Dao-AILab/flash-attention/issues/772"
):
    """Tokens of the last row of a batch are written into the first row."""

    def cells(self, rows: Array, slots: Array) -> tuple[Array, Array]:
        return self.instead(np.where(rows == self.batch - 1, 0, rows), rows), slots


class CellNumberWraps(
    Misplacing, breaks=(ROW_SOLO, PERMUTATION), kind="H4", bug="pytorch/pytorch/issues/162588", conditional=True
):
    """Row and slot are combined into one index that wraps at 100: late slots of the third row alias the first."""

    def cells(self, rows: Array, slots: Array) -> tuple[Array, Array]:
        numbers = rows * self.config.capacity + slots
        wrapped = self.instead(numbers % 100, numbers)
        return wrapped // self.config.capacity, wrapped % self.config.capacity


class RowCounterRunsOn(
    Planted, breaks=(ROW_SOLO, PERMUTATION), kind="P3", bug="turboderp/exllama/pull/101", configs=PLACED
):
    """Positions are counted across the rows of a step: each row starts where the previous one ended."""

    def positions(self, cache: Cache, t: int) -> Array:
        right = np.broadcast_to(super().positions(cache, t), (len(cache.lengths), t))
        return self.instead((right + t * np.arange(len(right))[:, None]) % self.config.capacity, right)


# --- ragged ---
class FirstRowsLength(
    Planted, NumpyStatic, breaks=(RAGGED, STAGGERED), kind="M7", bug="microsoft/onnxruntime/pull/29247"
):
    """The mask built from the first row's length is used for every row."""

    def behind(self, t: int, s: int) -> Array:
        right = super().behind(t, s)
        return self.instead(np.broadcast_to(right[:1], right.shape), right)


class DecodeFirstRowsLength(
    Planted, NumpyStatic, breaks=(RAGGED,), kind="M7", bug="microsoft/onnxruntime/pull/29752", conditional=True
):
    """Decode steps in which all rows grow use the first row's length if no row exceeds it by more than 4."""

    def behind(self, t: int, s: int) -> Array:
        right, ends = super().behind(t, s), self.places.max(axis=1)
        if t > 1 or ends.min() < 0 or ends.max() > ends[0] + 4:
            return right
        return self.instead(np.broadcast_to(right[:1], right.shape), right)


class DroppedRowStays(
    Planted, NumpyStatic, breaks=(RAGGED,), kind="M7", bug="jundot/omlx/issues/2172", conditional=True
):
    """The first step after dropping the longest row still writes at that row's end."""

    dropped = 0

    def start(self, batch: int) -> Buffers:
        self.dropped = 0
        return super().start(batch)

    def reorder(self, cache: Any, rows: list[int]) -> Buffers:
        kept, end = super().reorder(cache, rows), int(cache.written.max())
        self.dropped = end if end > kept.length else 0
        return kept

    def place(self, lengths: Array, counts: Array, t: int, padding: str) -> Array:
        right, end = super().place(lengths, counts, t, padding), self.dropped
        self.dropped = 0
        if not end:
            return right
        moved = np.minimum(right - lengths[:, None] + end, self.config.capacity - 1)
        return self.instead(np.where(right >= 0, moved, -1), right)


# --- padding ---
class PaddingAdvances(Planted, NumpyStatic, breaks=(PADDING, RAGGED), kind=("M4", "M7"), bug="jax-ml/jax/issues/23349"):
    """Every row takes all columns of a step: padding columns are counted as tokens."""

    def admit(
        self, cache: Cache, inputs: tuple[Array, ...], counts: Array | None = None, mask: Array | None = None
    ) -> Array:
        right = super().admit(cache, inputs, counts, mask)
        t = inputs[0].shape[1 if len(inputs) == 1 else 2]
        return self.instead(np.full_like(right, t), right) if cache.length + t <= self.config.capacity else right


class IdleRowOverwritten(
    Planted, NumpyStatic, breaks=(PADDING,), kind=("C1", "H4"), bug="microsoft/onnxruntime/pull/29002", conditional=True
):
    """If a row gets no token in a step, its newest token is overwritten: its slot is the new length minus one."""

    def append(self, cache: Any, layer: int, key: Array, value: Array) -> tuple[Array, Array]:
        rows = np.nonzero((self.places < 0).all(axis=1) & (cache.written > 0))[0]
        self.faulty += len(rows)
        for buffer, new in ((cache.keys[layer], key), (cache.values[layer], value)):
            buffer[rows, :, cache.written[rows] - 1] = self.stored(new)[rows, :, 0]
        return super().append(cache, layer, key, value)


# --- left-padding ---
class PaddingHasPositions(
    Planted, NumpyStatic, breaks=(LEFT_PADDING,), kind="P3", bug="ndif-team/nnsight/pull/673", configs=PLACED
):
    """Positions count the columns of a step, including left padding."""

    def positions(self, cache: Any, t: int) -> Array:
        right = super().positions(cache, t)
        past = cache.written - (right >= 0).sum(axis=1)
        counted = np.minimum(past[:, None] + np.arange(t), self.config.capacity - 1)
        return self.instead(np.where(right >= 0, counted, right), right)


class DecodeAtLongestPosition(
    Planted,
    NumpyStatic,
    breaks=(LEFT_PADDING, RAGGED),
    kind="P3",
    bug="unslothai/unsloth/pull/3795",
    conditional=True,
    configs=PLACED,
):
    """Decode steps give every row the position of the longest row."""

    def positions(self, cache: Any, t: int) -> Array:
        right = super().positions(cache, t)
        return self.instead(np.where(right >= 0, right.max(), right), right) if t == 1 else right


class MaskOffsetByPadding(
    Planted, NumpyStatic, breaks=(LEFT_PADDING,), kind="M5", bug="lablup/mlxcel/pull/76", conditional=True
):
    """The mask of a left-padded step is shifted by the number of padding columns in the row."""

    def behind(self, t: int, s: int) -> Array:
        right, first = super().behind(t, s), (self.places >= 0).argmax(axis=1)
        return self.instead(right - first[:, None, None, None], right)


# --- staggered ---
class LateRowAtLongest(Planted, NumpyStatic, breaks=(STAGGERED, RAGGED), kind="M7", bug="jundot/omlx/issues/2172"):
    """Each row is written where the longest row ends."""

    def place(self, lengths: Array, counts: Array, t: int, padding: str) -> Array:
        right, last = super().place(lengths, counts, t, padding), self.config.capacity - 1
        wrong = super().place(np.full_like(lengths, lengths.max()), counts, t, padding)
        return self.instead(np.minimum(wrong, last), right)


class PausedRowAdvances(
    Planted, NumpyStatic, breaks=(STAGGERED,), kind="M7", bug="huggingface/optimum/pull/1381", conditional=True
):
    """A row that pauses while others decode grows by a slot that was never written."""

    def run(self, cache: Any, inputs: tuple[Array, ...], mask: Array | None = None) -> Array:
        output = super().run(cache, inputs, mask)
        if self.places.shape[1] == 1:
            longer = np.minimum(cache.written + (self.places[:, 0] < 0), self.config.capacity)
            cache.written = self.instead(longer, cache.written)
        return output


# --- NaN of another row or sequence ---
def weightless(values: Array) -> Array:
    """The sum of values ``(..., tokens, d)``, each with a weight of zero: ``(..., 1, d)``."""
    with np.errstate(invalid="ignore"):
        return np.asarray((np.float32(0) * values).sum(axis=-2, keepdims=True))


class RowsPacked(Planted, breaks=(NAN_ISOLATED,), kind="M9", bug="ml-explore/mlx/pull/2608", configs=LAYERS):
    """All rows are one packed sequence: the mask gives the values of other rows a weight of zero, and multiplies."""

    def attention(self, query: Array, keys: Array, values: Array) -> Array:
        right = super().attention(query, keys, values)
        return self.instead(right + weightless(values).sum(axis=0)[self.kv_head()], right)


class PaddedWithFirstPage(
    Planted,
    NumpyPaged,
    breaks=(NAN_ISOLATED, "contents.nan-removed"),
    kind=("M9", "G2"),
    bug="nod-ai/amd-shark-ai/pull/665",
    conditional=True,
    configs=LAYERS,
):
    """Block tables are padded with page 0, whose values get a weight of zero: NaN in that page reaches every row."""

    def attention(self, query: Array, keys: Array, values: Array) -> Array:
        right = super().attention(query, keys, values)
        return self.instead(right + weightless(self.loaded(self.values[self.layer][0]))[self.kv_head()], right)


class FreedPageReadWhole(
    Planted,
    NumpyPaged,
    breaks=("contents.nan-removed", "contents.poison-safe"),
    kind=("M9", "G1"),
    bug="vllm-project/vllm/pull/936",
    conditional=True,
    configs=LAYERS,
):
    """The last page of a row is loaded whole: what a freed sequence left behind the row's end gets a weight of zero."""

    slack: Array  # of the page that was read last: of the values

    def read(self, pool: Array, table: list[int], n: int) -> Array:
        whole = super().read(pool, table, len(table) * PAGE)
        self.slack = whole[:, n:]
        return whole[:, :n]

    def attention(self, query: Array, keys: Array, values: Array) -> Array:
        right = super().attention(query, keys, values)
        return self.instead(right + weightless(self.slack)[self.kv_head()], right)
