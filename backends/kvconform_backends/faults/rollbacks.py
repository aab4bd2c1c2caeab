"""A ring with slots to spare, which can undo its last tokens, and faults of truncations that follow one another or
that keep another length of each row."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from kvconform_backends.faults.configs import WINDOWED
from kvconform_backends.faults.planted import Planted
from kvconform_backends.numpy.cache import Array, Cache
from kvconform_backends.numpy.ring import NumpyRing, Rings
from kvconform_backends.numpy.static import Buffers, NumpyStatic
from kvconform_backends.validation import check_length, check_lengths

SLACK = 6
"""Slots of a ring beside those of the window."""
ROLLBACK, LIMIT = "lifecycle.rollback", "lifecycle.rollback-limit"
ROWS = "batch.rollback"
EMPTY = "shape.empty-append"


@dataclass
class MarkedRings(Rings):
    """``mark``: the largest length so far. A ring of ``n`` slots holds the tokens from ``mark - n`` on."""

    mark: int


class SlackRing(NumpyRing):
    """A ring of ``SLACK`` slots more than the window can undo that many tokens, in one truncation or in several."""

    configs = WINDOWED
    claims = replace(
        NumpyRing.claims,
        abilities=(*NumpyRing.claims.abilities, "truncate", "empty_append"),
        rollback=SLACK,
        too_deep="refused",
    )

    def start(self, batch: int) -> MarkedRings:
        made = super().start(batch)
        return MarkedRings(made.keys, made.values, 0, 0)

    def fork(self, cache: Any) -> MarkedRings:
        made = super().fork(cache)
        return MarkedRings(made.keys, made.values, cache.written, cache.mark)

    def reorder(self, cache: Any, rows: list[int]) -> MarkedRings:
        made = super().reorder(cache, rows)
        return MarkedRings(made.keys, made.values, cache.written, cache.mark)

    def truncate(self, cache: Any, length: int) -> MarkedRings:
        check_length(length, cache.written)
        if length < cache.mark - SLACK:
            raise ValueError(f"cannot go back to {length} from {cache.mark}: at most {SLACK} tokens are undone")
        kept: MarkedRings = cache
        for layer in self.layers():
            if self.size(layer) is None:
                kept.keys[layer] = kept.keys[layer][:, :, :length]
                kept.values[layer] = kept.values[layer][:, :, :length]
        kept.written = length
        return kept

    def step(self, cache: Any, *inputs: Array, **options: Any) -> tuple[Array, Rings]:
        output, cache = super().step(cache, *inputs, **options)
        cache.mark = max(cache.mark, cache.written)
        return output, cache

    def size(self, layer: int) -> int | None:
        window = self.config.window_of(layer)
        return None if window is None else window + SLACK

    def oldest(self, cache: Any, size: int) -> int:
        return max(int(cache.mark) - size, 0)


# --- one truncation after another ---
class SpareSlotsDropped(
    Planted,
    SlackRing,
    breaks=(ROLLBACK,),
    kind="C9",
    bug="ml-explore/mlx-lm/issues/1776",
    conditional=True,
    configs=WINDOWED,
):
    """A truncation keeps the tokens of the window alone: one is exact, the next one misses the oldest tokens."""

    def truncate(self, cache: Any, length: int) -> MarkedRings:
        kept = super().truncate(cache, length)
        for layer in self.layers():
            size, window = self.size(layer), self.config.window_of(layer)
            if size is not None and window is not None:
                gone = self.slots(np.arange(self.oldest(kept, size), max(length - window, 0)), size)
                self.faulty += gone.size > 0
                kept.keys[layer][:, :, gone] = 0
                kept.values[layer][:, :, gone] = 0
        return kept


class MarkTurnedBack(
    Planted,
    SlackRing,
    breaks=(LIMIT,),
    kind="C9",
    bug="ml-explore/mlx-lm/issues/1776",
    conditional=True,
    configs=WINDOWED,
):
    """The limit is counted from the length after the last truncation: a second one reaches overwritten slots."""

    def truncate(self, cache: Any, length: int) -> MarkedRings:
        kept = super().truncate(cache, length)
        self.faulty += kept.mark > length
        kept.mark = length
        return kept


class AnyDepthAccepted(
    Planted, SlackRing, breaks=(LIMIT,), kind="C9", bug="ml-explore/mlx-lm/pull/1109", configs=WINDOWED
):
    """A truncation of any depth is accepted, whether the ring still holds the tokens or not."""

    def truncate(self, cache: Any, length: int) -> MarkedRings:
        check_length(length, cache.written)
        self.faulty += length < cache.mark - SLACK
        mark, cache.mark = cache.mark, length
        kept = super().truncate(cache, length)
        kept.mark = mark
        return kept


# --- another length for each row ---
class RowsRollBackAlike(Planted, NumpyStatic, breaks=(ROWS,), kind="M7", bug="Blaizzy/mlx-vlm/issues/1155"):
    """Every row keeps as many tokens as the row that keeps most: the others keep rejected ones."""

    def truncate(self, cache: Any, length: Any) -> Buffers:
        lengths = check_lengths(length, cache.written)
        return super().truncate(cache, self.instead(np.minimum(lengths.max(), cache.written), lengths).tolist())


class WhollyKeptLosesOne(
    Planted, NumpyStatic, breaks=(ROWS,), kind="C8", bug="Blaizzy/mlx-vlm/issues/1155", conditional=True
):
    """A row that keeps all its tokens, while another one does not, loses its last."""

    def truncate(self, cache: Any, length: Any) -> Buffers:
        lengths = check_lengths(length, cache.written)
        whole = (lengths == cache.written) & (lengths > 0) & (lengths < cache.written).any()
        return super().truncate(cache, self.instead(lengths - whole, lengths).tolist())


# --- an append without a token ---
class EmptyAppendCounts(Planted, breaks=(EMPTY,), kind="C3", bug="huggingface/transformers/issues/36151"):
    """An append without a token stores a token of zeros."""

    def append(self, cache: Cache, layer: int, key: Array, value: Array) -> tuple[Array, Array]:
        if key.shape[2]:
            return super().append(cache, layer, key, value)
        self.faulty += 1
        zeros = np.zeros((*key.shape[:2], 1, key.shape[3]), np.float32)
        return super().append(cache, layer, zeros, zeros)


class LongEmptyAppendForgets(
    Planted, breaks=(EMPTY,), kind="C3", bug="huggingface/transformers/issues/36151", conditional=True
):
    """An append without a token to more than eight tokens removes the newest."""

    def append(self, cache: Cache, layer: int, key: Array, value: Array) -> tuple[Array, Array]:
        keys, values = super().append(cache, layer, key, value)
        if not key.shape[2] and keys.shape[2] > 8:
            self.faulty += 1
            cache.keys[layer], cache.values[layer] = cache.keys[layer][:, :, :-1], cache.values[layer][:, :, :-1]
        return keys, values
