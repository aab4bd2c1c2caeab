"""``numpy-static``: buffers of the capacity, written in place; each row has its own length.

A step attends to the whole buffer. Unused slots are replaced by zeros before any multiplication, so that they may hold
anything.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kvconform_backends.abilities import BASIC
from kvconform_backends.numpy.cache import Array, NumpyCache, RaggedCache
from kvconform_backends.validation import check_lengths, check_rows
from kvconform_specs.claims import Claims
from kvconform_specs.config import DTYPES


class Buffers(RaggedCache):
    """Keys and values of every layer, ``(b, g, capacity, d)``; row ``r`` uses the first ``written[r]`` slots."""


class NumpyStatic(NumpyCache):
    """A step writes into a copy of the buffers, or into the given ones with ``in_place=True``."""

    cache_design = None  # memory traffic not modelled
    claims = Claims(
        profiles=("attention", "decoder"),
        abilities=(
            *BASIC,
            *("truncate", "truncate_rows", "immutable", "ragged", "empty_append", "mask"),
            *("poison", "in_place", "bytes", "last_only"),
        ),
        dtypes=DTYPES,
        overflow="refused",
        padding=("right", "left"),
        unused_slots="any",
        memory="capacity",
    )

    designs: tuple[str, ...] = ("rotary",)
    places: Array  # (b, t): the position of each column of this step, -1 for padding

    # --- lifecycle ---
    def start(self, batch: int) -> Buffers:
        c = self.config
        shape = (batch, c.kv_heads, c.capacity, c.head_dim)
        made = [self.stored(np.zeros(shape, np.float32)) for _ in range(2 * c.layers)]
        return Buffers(made[::2], made[1::2], np.zeros(batch, np.int64))

    def truncate(self, cache: Any, length: Any) -> Buffers:
        kept = self.fork(cache)
        kept.written[:] = check_lengths(length, cache.written)
        return kept

    def fork(self, cache: Any) -> Buffers:
        return Buffers([k.copy() for k in cache.keys], [v.copy() for v in cache.values], cache.written.copy())

    def reorder(self, cache: Any, rows: list[int]) -> Buffers:
        check_rows(rows, len(cache.written))
        return Buffers([k[rows] for k in cache.keys], [v[rows] for v in cache.values], cache.written[rows])

    # --- introspection ---
    def contents(self, cache: Any) -> list[list[tuple[Array, Array]]]:
        return [
            [(k[row, :, :n], v[row, :, :n]) for row, n in enumerate(cache.written)]
            for k, v in ((self.loaded(k), self.loaded(v)) for k, v in zip(cache.keys, cache.values, strict=True))
        ]

    def poison(self, cache: Any, keys: float | None, values: float | None) -> None:
        for number, buffers in ((keys, cache.keys), (values, cache.values)):
            if number is not None:
                filling = self.stored(np.full(1, number, np.float32))
                for x in buffers:
                    x[...] = np.where(self.live(cache), x, filling)

    # --- steps ---
    def step(  # type: ignore[override]  # keywords according to its claims
        self,
        cache: Any,
        *inputs: Array,
        counts: Array | None = None,
        padding: str = "right",
        mask: Array | None = None,
        in_place: bool = False,
        last_only: bool = False,
    ) -> tuple[Array, Buffers]:
        counts, self.last_only = self.admit(cache, inputs, counts, mask), last_only
        self.places = self.place(cache.written, counts, inputs[0].shape[-1 if len(inputs) == 1 else 2], padding)
        if mask is not None:
            mask = np.pad(mask, ((0, 0), (0, self.config.capacity - mask.shape[1])))
        grown = self.target(cache, in_place)
        grown.written = cache.written + counts
        return self.run(grown, inputs, mask), grown

    def place(self, lengths: Array, counts: Array, t: int, padding: str) -> Array:
        first = t - counts if padding == "left" else np.zeros_like(counts)
        number = np.arange(t) - first[:, None]  # index among the row's new tokens
        return np.where((number >= 0) & (number < counts[:, None]), lengths[:, None] + number, -1)

    def target(self, cache: Any, in_place: bool) -> Buffers:
        """The buffers that the step writes to."""
        return Buffers(cache.keys, cache.values, cache.written) if in_place else self.fork(cache)

    def append(self, cache: Any, layer: int, key: Array, value: Array) -> tuple[Array, Array]:
        rows, columns = np.nonzero(self.places >= 0)
        slots = self.places[rows, columns]
        for buffer, new in ((cache.keys[layer], key), (cache.values[layer], value)):
            buffer[rows, :, slots] = self.stored(new)[rows, :, columns]
        return self.cleared(cache, cache.keys[layer]), self.cleared(cache, cache.values[layer])

    def live(self, cache: Any) -> Array:
        """``(b, 1, capacity, 1)``: which slots hold a token."""
        return np.asarray(np.arange(self.config.capacity)[:, None] < cache.written[:, None, None, None])

    def cleared(self, cache: Any, buffer: Array) -> Array:
        """The buffer as float32, with zeros in unused slots."""
        return np.where(self.live(cache), self.loaded(buffer), np.float32(0))

    def behind(self, t: int, s: int) -> Array:
        """``(b, 1, t, s)``: negative, and so invisible, for unused slots and padding columns."""
        return self.places[:, None, :, None] - np.arange(s)

    def positions(self, cache: Any, t: int) -> Array:
        return self.places
