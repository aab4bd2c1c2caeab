"""Faults of truncate, fork and reorder."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvconform_backends.faults.configs import DECODERS, PLACED
from kvconform_backends.faults.controls import InPlace
from kvconform_backends.faults.planted import Planted
from kvconform_backends.faults.positions import Placed, ahead
from kvconform_backends.numpy.cache import Array, Cache
from kvconform_backends.numpy.static import Buffers, NumpyStatic

TRUNCATE = "lifecycle.truncate"
PATH = "equivalence.path"
LENGTH = "shape.length"
DECODER = "definition.decoder"
TRUNCATE_RANGE = "lifecycle.truncate-range"
TRUNCATE_WHOLE = "lifecycle.truncate-whole"
FORK = "lifecycle.fork"
OUTLIVES = "lifecycle.fork-outlives"
REORDER = "lifecycle.reorder"

PARITY = ("definition.attention", "definition.decoder")


# --- truncate ---
class TruncateIgnored(Planted, breaks=(TRUNCATE, PATH, LENGTH), kind=("C8", "C9"), bug="ml-explore/mlx-lm/pull/1109"):
    """Truncate does nothing."""

    def truncate(self, cache: Cache, length: int) -> Cache:
        self.faulty += super().truncate(cache, length).length < cache.length
        return cache


class TruncateDropsSoMany(Planted, breaks=(TRUNCATE, PATH), kind="C8", bug="ml-explore/mlx-lm/pull/1868"):
    """Truncate treats its argument as the number of tokens to drop."""

    def truncate(self, cache: Cache, length: int) -> Cache:
        right = super().truncate(cache, length)
        self.faulty += cache.length != 2 * length
        return super().truncate(cache, cache.length - right.length)


class TruncateToZeroIgnored(
    Planted,
    breaks=(TRUNCATE, PATH, LENGTH, *PARITY),
    kind="C8",
    bug="huggingface/transformers/issues/47433",
    conditional=True,
):
    """Truncate to length zero keeps all tokens."""

    def truncate(self, cache: Cache, length: int) -> Cache:
        if length == 0:
            self.faulty += cache.length > 0
            return cache
        return super().truncate(cache, length)


class TruncateByPage(
    Planted, breaks=(TRUNCATE, PATH, LENGTH), kind="C3", bug="Blaizzy/mlx-vlm/pull/2036", conditional=True
):
    """Truncate keeps whole pages of 4 tokens."""

    def truncate(self, cache: Cache, length: int) -> Cache:
        super().truncate(cache, length)  # refuses an invalid length
        kept = min(cache.length, -(-length // 4) * 4)
        self.faulty += kept != length
        return super().truncate(cache, kept)


class TruncateKeepsPosition(
    Planted,
    breaks=(TRUNCATE, PATH, DECODER),
    kind="C8",
    bug="NVIDIA/kvpress/pull/114",
    conditional=True,
    configs=PLACED,
):
    """Truncate drops keys and values but does not reset the position counter."""

    def fork(self, cache: Cache) -> Cache:
        return Placed.of(super().fork(cache), ahead(cache))

    def reorder(self, cache: Cache, rows: list[int]) -> Cache:
        return Placed.of(super().reorder(cache, rows), ahead(cache))

    def truncate(self, cache: Cache, length: int) -> Cache:
        return Placed.of(super().truncate(cache, length), ahead(cache) + cache.length - length)

    def positions(self, cache: Cache, t: int) -> Array:
        right = super().positions(cache, t)
        return self.instead(np.minimum(right + ahead(cache), self.config.capacity - 1), right)


class TruncateKeepsMaskOffset(
    TruncateKeepsPosition, breaks=(TRUNCATE,), kind="M5", bug="lablup/mlxcel/issues/421", conditional=True
):
    """The mask of a chunk after a truncate uses an offset that only grows: the chunk sees its own future."""

    offset = 0

    def attend(self, cache: Cache, layer: int, query: Array, key: Array, value: Array) -> Array:
        self.offset = ahead(cache)
        return super().attend(cache, layer, query, key, value)

    def positions(self, cache: Cache, t: int) -> Array:
        return np.arange(cache.length, cache.length + t)

    def mask(self, t: int, s: int) -> Array:
        right = super().mask(t, s)
        return self.instead(self.seen(np.arange(s - t, s) + self.offset, s), right) if t > 1 else right


class TruncateNothingClearsAll(
    Planted, NumpyStatic, breaks=(TRUNCATE_WHOLE,), kind="C8", bug="huggingface/transformers/issues/30312"
):
    """Truncate clears as many slots from the end as tokens go, by a negative index: where none goes, it clears all."""

    def truncate(self, cache: Any, length: Any) -> Buffers:
        kept = super().truncate(cache, length)
        for row, (was, n) in enumerate(zip(cache.written, kept.written, strict=True)):
            gone = int(was - n)
            self.faulty += gone == 0 < int(was)
            for x in (*kept.keys, *kept.values):
                x[row, :, :was][:, -gone:] = 0
        return kept


class TruncateSlices(Planted, breaks=(TRUNCATE_RANGE,), kind="C8", bug="huggingface/transformers/issues/30312"):
    """Truncate is a Python slice: a negative length counts from the end, and a length beyond the end keeps all."""

    def truncate(self, cache: Cache, length: int) -> Cache:
        self.faulty += not 0 <= length <= cache.length
        return Cache([k[:, :, :length] for k in cache.keys], [v[:, :, :length] for v in cache.values])


class TruncateBeyondKeepsAll(
    Planted, breaks=(TRUNCATE_RANGE,), kind="C8", bug="ml-explore/mlx-lm/pull/1868", conditional=True
):
    """Truncate to exactly one token more than the length does nothing; other invalid lengths are refused."""

    def truncate(self, cache: Cache, length: int) -> Cache:
        if length != cache.length + 1:
            return super().truncate(cache, length)
        self.faulty += 1
        return cache


class RefusedTruncateForgets(
    Planted, breaks=(TRUNCATE_RANGE,), kind="C12", bug="ml-explore/mlx-lm/pull/1868", conditional=True
):
    """A truncate beyond the end is refused, but only after the newest token was dropped."""

    def truncate(self, cache: Cache, length: int) -> Cache:
        if length > cache.length:
            self.faulty += 1
            cache.keys[:] = [k[:, :, :-1] for k in cache.keys]
            cache.values[:] = [v[:, :, :-1] for v in cache.values]
        return super().truncate(cache, length)


# --- fork ---
class ForkIsAlias(Planted, InPlace, breaks=(FORK, PATH), kind="C11", bug="huggingface/transformers/issues/20299"):
    """A fork returns the original handle, and steps modify the handle in place."""

    def target(self, cache: Any, in_place: bool) -> Buffers:
        return cache  # type: ignore[no-any-return]

    def fork(self, cache: Any) -> Buffers:
        self.faulty += 1
        return cache  # type: ignore[no-any-return]


class ForkShares(
    Planted, InPlace, breaks=(FORK, PATH), kind="C11", bug="ggml-org/llama.cpp/issues/3802", conditional=True
):
    """A fork has its own length but shares the buffers: what one branch writes, the other reads."""

    def fork(self, cache: Any) -> Buffers:
        self.faulty += cache.length > 0
        return Buffers(cache.keys, cache.values, cache.written.copy())


class ForkCopiesFirstLayer(
    Planted,
    InPlace,
    breaks=(FORK, PATH),
    kind="C11",
    bug="huggingface/transformers/issues/20299",
    conditional=True,
    configs=DECODERS,
):
    """A fork copies the first layer and shares all others."""

    def fork(self, cache: Any) -> Buffers:
        own = super().fork(cache)
        self.faulty += cache.length > 0
        return Buffers([own.keys[0], *cache.keys[1:]], [own.values[0], *cache.values[1:]], own.written)


class Late(Buffers):
    """Buffers of another sequence until the first append. ``right``: what the fork should hold."""

    right: Buffers


class ForkCopiesLate(
    Planted, InPlace, breaks=(OUTLIVES,), kind="C11", bug="ggml-org/llama.cpp/issues/3802", conditional=True
):
    """A fork copies the buffers at its first append: until then the original writes into what the fork holds."""

    def fork(self, cache: Any) -> Late:
        return self.late(cache, cache.right if isinstance(cache, Late) else super().fork(cache))

    def truncate(self, cache: Any, length: Any) -> Buffers:
        kept = super().truncate(cache, length)
        return self.late(kept, cache.right) if isinstance(cache, Late) else kept

    def reset(self, cache: Any) -> Buffers:
        empty = super().reset(cache)
        return self.late(empty, cache.right) if isinstance(cache, Late) else empty

    def late(self, cache: Buffers, right: Buffers) -> Late:
        made = Late(cache.keys, cache.values, cache.written.copy())
        made.right = right
        return made

    def target(self, cache: Any, in_place: bool) -> Buffers:
        if not isinstance(cache, Late):
            return super().target(cache, in_place)
        for held, right in zip((*cache.keys, *cache.values), (*cache.right.keys, *cache.right.values), strict=True):
            self.instead(np.where(self.live(cache), held, 0), np.where(self.live(cache), right, 0))
        return super().fork(cache)


# --- reorder ---
class ReorderIgnored(Planted, breaks=(REORDER, *PARITY), kind="C10", bug="awslabs/sockeye/pull/731"):
    """The result of reorder is discarded: only the number of rows changes."""

    def reorder(self, cache: Cache, rows: list[int]) -> Cache:
        right = super().reorder(cache, rows)
        return Cache(*(self.unmoved(*xs, rows) for xs in ((cache.keys, right.keys), (cache.values, right.values))))

    def unmoved(self, old: list[Array], right: list[Array], rows: list[int]) -> list[Array]:
        stay = np.arange(len(rows)) % len(old[0])
        return [self.instead(x[stay], y) for x, y in zip(old, right, strict=True)]


class ReorderKeysOnly(ReorderIgnored, breaks=(REORDER, *PARITY), kind="C10", bug="awslabs/sockeye/pull/731"):
    """Reorder permutes the keys but not the values."""

    def reorder(self, cache: Cache, rows: list[int]) -> Cache:
        right = Planted.reorder(self, cache, rows)
        return Cache(right.keys, self.unmoved(cache.values, right.values, rows))


class ReorderAlongTokens(
    ReorderIgnored, breaks=(REORDER,), kind=("C10", "H2"), bug="PaddlePaddle/PaddleNLP/issues/6672"
):
    """Reorder permutes tokens instead of rows: it indexes the token axis."""

    def unmoved(self, old: list[Array], right: list[Array], rows: list[int]) -> list[Array]:
        stay, s = np.arange(len(rows)) % len(old[0]), old[0].shape[2]
        turned = [*rows, *range(len(rows), s)] if s > max(*rows, len(rows)) else list(range(s))
        return [self.instead(x[stay][:, :, turned], y) for x, y in zip(old, right, strict=True)]


class ReorderSkipsLastLayer(
    ReorderIgnored,
    breaks=(REORDER, PATH, DECODER),
    kind="C10",
    bug="huggingface/transformers/issues/46612",
    conditional=True,
    configs=DECODERS,
):
    """Reorder skips the last layer."""

    def reorder(self, cache: Cache, rows: list[int]) -> Cache:
        right = Planted.reorder(self, cache, rows)
        last = [self.unmoved(x[-1:], y[-1:], rows) for x, y in ((cache.keys, right.keys), (cache.values, right.values))]
        return Cache([*right.keys[:-1], *last[0]], [*right.values[:-1], *last[1]])


class ReorderInverted(
    Planted, breaks=(REORDER, PATH), kind="C10", bug="huggingface/transformers/issues/46612", conditional=True
):
    """Reorder moves row ``i`` to ``rows[i]``: correct for swaps, inverted for a cycle of three."""

    def reorder(self, cache: Cache, rows: list[int]) -> Cache:
        right = super().reorder(cache, rows)
        if sorted(rows) != list(range(len(cache.lengths))):
            return right
        self.faulty += list(np.argsort(rows)) != list(rows)
        return super().reorder(cache, [int(row) for row in np.argsort(rows)])


class RepeatsIgnored(ReorderIgnored, breaks=(REORDER,), kind="C10", bug="awslabs/sockeye/pull/731", conditional=True):
    """Reorder does nothing if a row is repeated."""

    def reorder(self, cache: Cache, rows: list[int]) -> Cache:
        return super().reorder(cache, rows) if len(set(rows)) < len(rows) else Planted.reorder(self, cache, rows)


class RepeatsTiled(
    Planted,
    breaks=(REORDER,),
    kind="C11",
    bug="jadore801120/attention-is-all-you-need-pytorch/pull/22",
    conditional=True,
):
    """Reorder tiles repeated rows as a block: 0 1 0 instead of 0 0 1."""

    def reorder(self, cache: Cache, rows: list[int]) -> Cache:
        tiled = [int(row) for row in np.resize(list(dict.fromkeys(rows)), len(rows))]
        self.faulty += tiled != list(rows)
        return super().reorder(cache, tiled)


class ReorderKeepsLengths(
    Planted, NumpyStatic, breaks=(LENGTH,), kind=("C10", "M7"), bug="jundot/omlx/issues/2172", conditional=True
):
    """Reorder that drops rows moves keys and values but keeps the lengths of the first rows."""

    def reorder(self, cache: Any, rows: list[int]) -> Buffers:
        right = super().reorder(cache, rows)
        if len(rows) == len(cache.written):
            return right
        stay = np.arange(len(rows)) % len(cache.written)
        return Buffers(right.keys, right.values, self.instead(cache.written[stay], right.written))
