"""``numpy-paged``: pages of four tokens in a pool shared by all sequences, and a block table per row.

After Kwon et al. 2023, "Efficient memory management for large language model serving with PagedAttention" (2309.06180).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import numpy as np

from kvconform_backends.abilities import BASIC
from kvconform_backends.numpy.cache import Array, NumpyCache, RaggedCache
from kvconform_backends.validation import check_lengths, check_rows
from kvconform_specs.claims import Claims
from kvconform_specs.config import DTYPES, Config

PAGE = 4


@dataclass(eq=False)
class Tables(RaggedCache):
    """``keys`` and ``values`` are the pools ``(pages, g, PAGE, d)`` of every layer, shared by all sequences;
    ``tables`` holds the pages of each row in logical order."""

    tables: list[list[int]]


class NumpyPaged(NumpyCache):
    """Forks share pages; a shared page is copied before a write. The page freed last is reused first. Steps modify
    their handle."""

    cache_design = None  # memory traffic not modelled
    claims = Claims(
        profiles=("attention", "decoder"),
        abilities=(*BASIC, "truncate", "truncate_rows", "ragged", "empty_append", "poison", "bytes", "last_only"),
        dtypes=DTYPES,
        overflow="refused",
        unused_slots="any",
        page=PAGE,
        memory="pages",
    )

    designs: tuple[str, ...] = ()
    places: Array  # (b, t): the position of each column of this step, -1 for padding

    def __init__(self, config: Config, weights: Mapping[str, Array], device: str = "cpu") -> None:
        super().__init__(config, weights, device)
        empty = self.stored(np.zeros((0, config.kv_heads, PAGE, config.head_dim), np.float32))
        self.keys, self.values = [empty] * config.layers, [empty] * config.layers
        self.uses: list[int] = []  # the number of block tables that use each page
        self.unused: list[int] = []  # a stack
        self.sequences: WeakSet[Tables] = WeakSet()

    # --- pages ---
    def take(self) -> int:
        """Allocates an unshared page in all layers."""
        if not self.unused:
            self.grow(max(len(self.uses), 8))
        page = self.unused.pop()
        self.uses[page] = 1
        return page

    def grow(self, more: int) -> None:
        known = len(self.uses)
        for pools in (self.keys, self.values):
            pools[:] = [np.concatenate([pool, np.zeros((more, *pool.shape[1:]), pool.dtype)]) for pool in pools]
        self.uses += [0] * more
        self.unused += reversed(range(known, known + more))

    def share(self, pages: Iterable[int]) -> None:
        for page in pages:
            self.uses[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        for page in pages:
            self.uses[page] -= 1
            if self.uses[page] == 0:
                self.unused.append(page)

    def reserve(self, table: list[int], start: int, stop: int) -> None:
        """Makes positions ``start`` to ``stop`` of the row writable."""
        for index in range(start // PAGE, pages(stop)):
            if index == len(table):
                table.append(self.take())
            elif self.uses[table[index]] > 1:
                table[index] = self.copied(table[index])

    def copied(self, page: int) -> int:
        copy = self.take()
        for pool in (*self.keys, *self.values):
            pool[copy] = pool[page]
        self.release([page])
        return copy

    # --- lifecycle ---
    def start(self, batch: int) -> Tables:
        return self.opened([[] for _ in range(batch)], np.zeros(batch, np.int64))

    def opened(self, tables: list[list[int]], written: Array) -> Tables:
        made = Tables(self.keys, self.values, written, tables)
        self.sequences.add(made)
        return made

    def close(self, cache: Any) -> None:
        self.sequences.discard(cache)
        for table in cache.tables:
            self.release(table)
            table.clear()

    def truncate(self, cache: Any, length: Any) -> Tables:
        kept: Tables = cache
        kept.written[:] = check_lengths(length, cache.written)
        for table, n in zip(kept.tables, kept.written, strict=True):
            self.release(table[pages(n) :])
            del table[pages(n) :]
        return kept

    def fork(self, cache: Any) -> Tables:
        for table in cache.tables:
            self.share(table)
        return self.opened([list(table) for table in cache.tables], cache.written.copy())

    def reorder(self, cache: Any, rows: list[int]) -> Tables:
        check_rows(rows, len(cache.tables))
        tables = [list(cache.tables[row]) for row in rows]
        for table in tables:
            self.share(table)
        self.close(cache)
        return self.opened(tables, cache.written[rows])

    def reset(self, cache: Any) -> Tables:
        self.close(cache)
        return self.start(len(cache.tables))

    # --- introspection ---
    def contents(self, cache: Any) -> list[list[tuple[Array, Array]]]:
        rows = list(zip(cache.tables, cache.written, strict=True))
        return [
            [(self.read(keys, table, n), self.read(values, table, n)) for table, n in rows]
            for keys, values in zip(self.keys, self.values, strict=True)
        ]

    def bytes(self, cache: Any) -> int:
        held = sum(len(table) for table in cache.tables)
        return sum(held * pool[:1].nbytes for pool in (*self.keys, *self.values)) if held else 0

    def poison(self, cache: Any, keys: float | None, values: float | None) -> None:
        live = self.live()[:, None, :, None]
        for number, pools in ((keys, self.keys), (values, self.values)):
            if number is not None:
                filling = self.stored(np.full(1, number, np.float32))
                for pool in pools:
                    pool[...] = np.where(live, pool, filling)

    def live(self) -> Array:
        """``(pages, PAGE)``: which slots hold a token of some sequence."""
        live = np.zeros((len(self.uses), PAGE), bool)
        for cache in self.sequences:
            for table, n in zip(cache.tables, cache.written, strict=True):
                live[np.array(table, int)[np.arange(n) // PAGE], np.arange(n) % PAGE] = True
        return live

    # --- steps ---
    def step(  # type: ignore[override]  # keywords according to its claims
        self, cache: Any, *inputs: Array, counts: Array | None = None, last_only: bool = False
    ) -> tuple[Array, Tables]:
        counts, self.last_only = self.admit(cache, inputs, counts), last_only
        columns = np.arange(inputs[0].shape[1 if len(inputs) == 1 else 2])
        self.places = np.where(columns < counts[:, None], cache.written[:, None] + columns, -1)
        for table, start, count in zip(cache.tables, cache.written, counts, strict=True):
            self.reserve(table, int(start), int(start + count))
        cache.written = cache.written + counts
        return self.run(cache, inputs), cache

    def uncached_forward(self, *inputs: Array, **options: Any) -> Array:
        cache = self.start(inputs[0].shape[0])
        try:
            return self.step(cache, *inputs, **options)[0]
        finally:
            self.close(cache)

    def positions(self, cache: Any, t: int) -> Array:
        return self.places

    def attend(self, cache: Any, layer: int, query: Array, key: Array, value: Array) -> Array:
        """Row by row, on exactly the tokens of the row."""
        self.layer = layer
        output = np.zeros_like(query)
        for row, (table, n) in enumerate(zip(cache.tables, cache.written, strict=True)):
            new = self.places[row] >= 0
            if new.any():
                self.write(cache.keys[layer], table, self.places[row, new], key[row][:, new])
                self.write(cache.values[layer], table, self.places[row, new], value[row][:, new])
                keys, values = self.read(cache.keys[layer], table, n), self.read(cache.values[layer], table, n)
                output[row][:, new] = self.attention(query[row : row + 1][:, :, new], keys[None], values[None])[0]
        return output

    def write(self, pool: Array, table: list[int], positions: Array, new: Array) -> None:
        """Writes tokens ``(g, t, d)`` to their slots."""
        pool[np.array(table)[positions // PAGE], :, positions % PAGE] = self.stored(new).swapaxes(0, 1)

    def read(self, pool: Array, table: list[int], n: int) -> Array:
        """The row's tokens ``(g, n, d)`` as float32."""
        found = pool[np.array(table, int)].swapaxes(0, 1)  # (g, pages, PAGE, d)
        return self.loaded(found.reshape(found.shape[0], -1, found.shape[3])[:, :n])


def pages(n: int) -> int:
    """The number of pages that ``n`` tokens take."""
    return -(-n // PAGE)
