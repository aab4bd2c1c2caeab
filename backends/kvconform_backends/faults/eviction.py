"""A cache that is cut to its window after each step, one that is not, and quantised caches that take more bytes than
they claim."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from kvconform_backends.faults.configs import WINDOWED
from kvconform_backends.faults.planted import Planted
from kvconform_backends.numpy.cache import Array, NumpyCache
from kvconform_backends.numpy.ring import NumpyRing, Rings

BYTES, PRESENT = "accounting.bytes", "contents.present"


class CutToWindow(NumpyRing):
    """After each step a layer with a window keeps the tokens that the next query may see, and no others."""

    configs = WINDOWED
    claims = replace(NumpyRing.claims, abilities=(*NumpyRing.claims.abilities, "bytes"))

    def start(self, batch: int) -> Rings:
        made = NumpyCache.start(self, batch)
        return Rings(made.keys, made.values, 0)

    def held(self, cache: Any, layer: int, buffer: Array) -> Array:
        return self.loaded(buffer)

    def append(self, cache: Any, layer: int, key: Array, value: Array) -> tuple[Array, Array]:
        keys, values = NumpyCache.append(self, cache, layer, key, value)
        window = self.config.window_of(layer)
        if window is not None:
            first = max(keys.shape[2] - self.kept(window), 0)
            cache.keys[layer], cache.values[layer] = cache.keys[layer][:, :, first:], cache.values[layer][:, :, first:]
        return keys, values

    def kept(self, window: int) -> int:
        """The most tokens that a layer with that window keeps after a step."""
        return window - 1


class NeverEvicts(
    Planted,
    CutToWindow,
    breaks=(BYTES, PRESENT),
    kind="W7",
    bug="huggingface/transformers/issues/47900",
    configs=WINDOWED,
):
    """Every token is kept, and the mask hides those behind the window."""

    def kept(self, window: int) -> int:
        self.faulty += 1
        return self.config.capacity


class DecodeNeverEvicts(
    Planted,
    CutToWindow,
    breaks=(BYTES, PRESENT),
    kind="W7",
    bug="ml-explore/mlx-lm/issues/1914",
    conditional=True,
    configs=WINDOWED,
):
    """A prompt or a chunk is cut to the window, a decode step adds its token and cuts nothing."""

    new = 0

    def append(self, cache: Any, layer: int, key: Array, value: Array) -> tuple[Array, Array]:
        self.new = key.shape[2]
        return super().append(cache, layer, key, value)

    def kept(self, window: int) -> int:
        self.faulty += self.new == 1
        return self.config.capacity if self.new == 1 else super().kept(window)
