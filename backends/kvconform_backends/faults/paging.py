"""Faults of paged caches: the location of tokens, page boundaries, and shared pages."""

from __future__ import annotations

from typing import Any
from weakref import WeakSet

import numpy as np

from kvconform_backends.faults.configs import PLACED
from kvconform_backends.faults.planted import Planted
from kvconform_backends.numpy.cache import Array
from kvconform_backends.numpy.paged import PAGE, NumpyPaged, Tables

FORK = "lifecycle.fork"
OUTLIVES = "lifecycle.fork-outlives"

PLACEMENT = ("paging.placement",)
BOUNDARY = ("paging.boundary",)
COPY_ON_WRITE = ("paging.copy-on-write",)


class PoolReadInOrder(
    Planted, NumpyPaged, breaks=(*PLACEMENT, *COPY_ON_WRITE), kind="G2", bug="golang-design/accel/issues/10"
):
    """Tokens are written through the block table but read from consecutive pages after its first one."""

    def read(self, pool: Array, table: list[int], n: int) -> Array:
        first = table[0] if table else 0
        inside = [min(page, len(pool) - 1) for page in range(first, first + len(table))]
        return self.instead(super().read(pool, inside, n), super().read(pool, table, n))


class ChunkPlacedFromStart(
    Planted,
    NumpyPaged,
    breaks=(*PLACEMENT, "equivalence.chunks"),
    kind="G2",
    bug="vllm-project/vllm/pull/36580",
    conditional=True,
):
    """A chunk's pages are looked up by its own token numbers, from the start of the table."""

    def write(self, pool: Array, table: list[int], positions: Array, new: Array) -> None:
        if len(positions) > 1 and positions[0] >= PAGE:
            self.faulty += 1
            positions = positions - positions[0] // PAGE * PAGE
        super().write(pool, table, positions, new)


class ChunkPlacedOnPage(
    Planted,
    NumpyPaged,
    breaks=(*PLACEMENT, *BOUNDARY),
    kind=("G1", "G2"),
    bug="tanishqkumar/ssd/pull/22",
    conditional=True,
):
    """A chunk that starts inside a page is written from the beginning of that page."""

    def write(self, pool: Array, table: list[int], positions: Array, new: Array) -> None:
        if len(positions) > 1 and positions[0] % PAGE:
            self.faulty += 1
            positions = positions - positions[0] % PAGE
        super().write(pool, table, positions, new)


class MaskByPlace(
    Planted, NumpyPaged, breaks=PLACEMENT, kind="G2", bug="pytorch/pytorch/issues/182593", conditional=True
):
    """The causal mask compares locations in the pool: correct only while a sequence's pages are in order."""

    table: list[int]

    def read(self, pool: Array, table: list[int], n: int) -> Array:
        self.table = table
        return super().read(pool, table, n)

    def mask(self, t: int, s: int) -> Array:
        right = super().mask(t, s)
        place = np.array(self.table)[np.arange(s) // PAGE] * PAGE + np.arange(s) % PAGE
        return self.instead(right & (place <= place[s - t :, None]), right)


class WeakPrefixHash(
    Planted,
    NumpyPaged,
    breaks=PLACEMENT,
    kind="G3",
    bug="openvinotoolkit/openvino.genai/issues/3722",
    conditional=True,
    configs=PLACED,
):
    """A prompt's first page is shared with any other prompt whose tokens have the same hash, one of eight."""

    def step(self, cache: Any, *inputs: Array, **options: Any) -> tuple[Array, Tables]:
        fresh = cache.written == 0
        output, cache = super().step(cache, *inputs, **options)
        known: dict[int, int] = self.__dict__.setdefault("_known", {})
        for row in np.flatnonzero(fresh & (cache.written >= PAGE)):
            own, key = cache.tables[row][0], int(inputs[0][row, :PAGE].sum()) % 8
            page = known.setdefault(key, own)
            if page != own and self.uses[page]:
                self.faulty += any(not np.array_equal(pool[page], pool[own]) for pool in self.keys)
                self.share([page])
                self.release([own])
                cache.tables[row][0] = page
            else:
                known[key] = own
        return output, cache

    def release(self, pages: Any) -> None:
        super().release(pages)
        known: dict[int, int] = self.__dict__.setdefault("_known", {})
        for key in [key for key, page in known.items() if not self.uses[page]]:
            del known[key]


class LastPageReadWhole(
    Planted, NumpyPaged, breaks=(*BOUNDARY, "equivalence.decode"), kind=("G1", "M6"), bug="pytorch/pytorch/pull/160861"
):
    """The last page is read in full: its unused slots take part in the softmax."""

    held = 0

    def read(self, pool: Array, table: list[int], n: int) -> Array:
        self.held = int(n)
        return super().read(pool, table, len(table) * PAGE)

    def behind(self, t: int, s: int) -> Array:
        right = np.arange(self.held - t, self.held)[:, None] - np.arange(s)
        return self.instead(np.where(np.arange(s) < self.held, right, 0), right)


class FullPageForgotten(
    Planted, NumpyPaged, breaks=BOUNDARY, kind="G1", bug="sgl-project/sglang/issues/22819", conditional=True
):
    """A chunk that fills its last page exactly leaves that page to the next step, which does not write it."""

    def write(self, pool: Array, table: list[int], positions: Array, new: Array) -> None:
        end = int(positions[-1]) + 1
        if len(positions) > 1 and end % PAGE == 0:
            self.faulty += 1
            written = positions < end - PAGE
            positions, new = positions[written], new[:, written]
        super().write(pool, table, positions, new)


class TruncateFreesOpenPage(
    Planted, NumpyPaged, breaks=BOUNDARY, kind="G1", bug="Blaizzy/mlx-vlm/pull/2036", conditional=True
):
    """Truncating to a length inside a page replaces that page by another one."""

    def truncate(self, cache: Any, length: Any) -> Tables:
        kept = super().truncate(cache, length)
        for table, n in zip(kept.tables, kept.written, strict=True):
            if n % PAGE:
                fresh = self.take()
                self.release(table[-1:])
                table[-1] = fresh
                self.faulty += 1
        return kept


class WholePagesFreeLast(
    Planted,
    NumpyPaged,
    breaks=("lifecycle.truncate-whole",),
    kind=("G1", "C8"),
    bug="Blaizzy/mlx-vlm/pull/2036",
    conditional=True,
):
    """Truncating to a length of whole pages returns the last of them to the pool as if it were empty, and reads on."""

    def truncate(self, cache: Any, length: Any) -> Tables:
        kept = super().truncate(cache, length)
        for table, n in zip(kept.tables, kept.written, strict=True):
            if n and n % PAGE == 0:
                self.release(table[-1:])
                self.faulty += 1
        return kept


class ForkNotCounted(
    Planted, NumpyPaged, breaks=(*COPY_ON_WRITE, FORK), kind=("G3", "C11"), bug="ggml-org/llama.cpp/issues/3802"
):
    """A fork does not count its use of the pages: both sequences write into the half-full page."""

    def fork(self, cache: Any) -> Tables:
        self.faulty += cache.length > 0
        return self.opened([list(table) for table in cache.tables], cache.written.copy())


class CloseFreesShared(
    Planted,
    NumpyPaged,
    breaks=(*COPY_ON_WRITE, FORK),
    kind="G3",
    bug="sgl-project/sglang/issues/38319",
    conditional=True,
):
    """Closing a sequence returns its pages to the pool, including those that a fork still reads."""

    def close(self, cache: Any) -> None:
        held = {page for table in cache.tables for page in table}
        super().close(cache)
        shared = [page for page in held if self.uses[page]]
        self.faulty += bool(shared)
        self.unused += shared

    def take(self) -> int:
        page = super().take()
        self.unused = [other for other in self.unused if other != page]
        return page


class CopyWithoutValues(
    Planted,
    NumpyPaged,
    breaks=(*COPY_ON_WRITE, FORK),
    kind="G3",
    bug="huggingface/transformers/pull/34746",
    conditional=True,
):
    """Copy-on-write copies the keys of a shared page but not its values."""

    def copied(self, page: int) -> int:
        before = [pool.copy() for pool in self.values]
        copy = super().copied(page)
        for pool, old in zip(self.values, before, strict=True):
            pool[copy] = self.instead(old[copy] if copy < len(old) else np.zeros_like(pool[copy]), pool[copy])
        return copy


class ResetClearsShared(
    Planted, NumpyPaged, breaks=(OUTLIVES,), kind=("G3", "C11"), bug="vllm-project/vllm/issues/44701"
):
    """Reset fills the pages of its sequence with zeros, including those that a fork still reads."""

    def reset(self, cache: Any) -> Tables:
        held = [page for table in cache.tables for page in table]
        self.faulty += any(self.uses[page] > held.count(page) for page in held)
        for pool in (*self.keys, *self.values):
            pool[held] = 0
        return super().reset(cache)


class ForkOfForkNotCounted(
    Planted, NumpyPaged, breaks=(OUTLIVES,), kind=("G3", "C11"), bug="sgl-project/sglang/issues/38319", conditional=True
):
    """A fork counts its use of the pages, and a fork of a fork does not: it loses them with the one in the middle."""

    def fork(self, cache: Any) -> Tables:
        forks: WeakSet[Tables] = self.__dict__.setdefault("_forks", WeakSet())
        if cache in forks:
            self.faulty += cache.length > 0
            made = self.opened([list(table) for table in cache.tables], cache.written.copy())
        else:
            made = super().fork(cache)
        forks.add(made)
        return made
