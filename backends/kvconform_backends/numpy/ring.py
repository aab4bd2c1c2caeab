"""``numpy-ring``: layers with a window keep that many tokens in a ring; other layers keep everything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from kvconform.backend import Backend
from kvconform_backends.abilities import BASIC
from kvconform_backends.numpy.cache import Array, Cache, NumpyCache
from kvconform_backends.validation import check_rows
from kvconform_specs.claims import Claims
from kvconform_specs.config import DTYPES, Config


@dataclass
class Rings(Cache):
    """Layers with a window: ``(b, g, window, d)``, position ``p`` in slot ``p % window``; others: ``(b, g, s, d)``."""

    written: int

    @property
    def length(self) -> int:
        return self.written


class NumpyRing(NumpyCache):
    """Truncate is not supported: evicted tokens are gone. Steps modify their handle."""

    cache_design = None  # memory traffic not modelled
    designs: tuple[str, ...] = ()
    claims = Claims(
        profiles=("attention", "decoder"),
        abilities=(*BASIC, "mask", "last_only"),
        dtypes=DTYPES,
        overflow="refused",
        retention="window",
    )

    @classmethod
    def refuses(cls, config: Config, device: str) -> str | None:
        if config.window is None:
            return "the config has no window, so nothing is evicted"
        return super().refuses(config, device)

    # --- lifecycle ---
    def start(self, batch: int) -> Rings:
        c = self.config
        shapes = [(batch, c.kv_heads, self.size(layer) or 0, c.head_dim) for layer in range(c.layers)]
        keys, values = ([self.stored(np.zeros(shape, np.float32)) for shape in shapes] for _ in range(2))
        return Rings(keys, values, 0)

    truncate = Backend.truncate  # not implemented: evicted tokens are gone

    def fork(self, cache: Any) -> Rings:
        return Rings([k.copy() for k in cache.keys], [v.copy() for v in cache.values], cache.written)

    def reorder(self, cache: Any, rows: list[int]) -> Rings:
        check_rows(rows, len(cache.lengths))
        return Rings([k[rows] for k in cache.keys], [v[rows] for v in cache.values], cache.written)

    def contents(self, cache: Any) -> list[list[tuple[Array, Array]]]:
        shown = [[self.held(cache, layer, x[layer]) for x in (cache.keys, cache.values)] for layer in self.layers()]
        return [list(zip(keys, values, strict=True)) for keys, values in shown]

    # --- steps ---
    def step(  # type: ignore[override]  # keywords according to its claims
        self, cache: Any, *inputs: Array, mask: Array | None = None, last_only: bool = False
    ) -> tuple[Array, Rings]:
        counts, self.last_only = self.admit(cache, inputs, mask=mask), last_only
        output = self.run(cache, inputs, mask)
        cache.written += int(counts[0])
        return output, cache

    def append(self, cache: Any, layer: int, key: Array, value: Array) -> tuple[Array, Array]:
        """Returns the stored tokens followed by the new ones: a chunk attends before it evicts."""
        if self.config.window_of(layer) is None:
            return super().append(cache, layer, key, value)
        keys = np.concatenate([self.held(cache, layer, cache.keys[layer]), key], axis=2)
        values = np.concatenate([self.held(cache, layer, cache.values[layer]), value], axis=2)
        self.write(cache, layer, cache.keys[layer], key)
        self.write(cache, layer, cache.values[layer], value)
        return keys, values

    def held(self, cache: Any, layer: int, buffer: Array) -> Array:
        """The layer's tokens in logical order, as float32."""
        size = self.size(layer)
        if size is None:
            return self.loaded(buffer)
        positions = np.arange(self.oldest(cache, size), cache.written)
        return self.loaded(buffer[:, :, self.slots(positions, size)])

    def write(self, cache: Any, layer: int, ring: Array, new: Array) -> None:
        """Writes the newest of the new tokens ``(b, g, t, d)``, at most one per slot."""
        size, t = ring.shape[2], new.shape[2]
        columns = np.arange(max(t - size, 0), t)
        ring[:, :, self.slots(cache.written + columns, size)] = self.stored(new[:, :, columns])

    def size(self, layer: int) -> int | None:
        """Slots of the layer's ring; None for a layer that keeps everything."""
        return self.config.window_of(layer)

    def oldest(self, cache: Any, size: int) -> int:
        """The first position that a ring of that size still holds."""
        return max(int(cache.written) - size, 0)

    def slots(self, positions: Array, size: int) -> Array:
        return positions % size

    def visible(self, t: int, s: int) -> Array:
        """The caller's mask covers all positions, the keys only the newest ``s``."""
        seen = self.mask(t, s)
        return seen if self.allowed is None else seen & self.allowed[:, None, None, -s:]

    def layers(self) -> range:
        return range(self.config.layers)
