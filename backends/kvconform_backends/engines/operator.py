"""Base classes of adapters to an engine's attention: the cache and its bookkeeping are numpy's, or the engine's own."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np

from kvconform_backends.abilities import BASIC, without
from kvconform_backends.numpy.cache import Array, NumpyCache
from kvconform_backends.numpy.static import NumpyStatic
from kvconform_backends.validation import check_inputs, check_length
from kvconform_specs.claims import Claims
from kvconform_specs.config import Config

SHAPES = (1, 2, 4, 8, 16, 256)
"""The sizes of appends that a compiler is given; the largest is for the configs of long contexts alone."""


class Operator(NumpyCache):
    """Keys and values grow by concatenation. A subclass overrides ``attention``, or ``attend`` if the engine's operator
    appends as well. options: which of a config's ``softcap``, ``sink`` and ``alibi`` the operator has."""

    claims = Claims(
        profiles=("attention",),
        abilities=(*BASIC, "truncate", "immutable", "empty_append", "mask", "bytes"),
        overflow="refused",
    )
    options: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def refuses(cls, config: Config, device: str) -> str | None:
        return lacking(config, cls.options)

    def start(self, batch: int) -> Any:
        return super().start(batch)

    def run(self, cache: Any, inputs: tuple[Array, ...], mask: Array | None = None) -> Array:
        if not inputs[0].size:  # an append without a token
            return np.zeros(inputs[0].shape, np.float32)
        return super().run(cache, inputs, mask)

    def beyond_causality(self, t: int, s: int) -> Array | None:
        """What the ``t`` newest of ``s`` tokens see, with four axes: bool, or float32 with the bias; None where that is
        causality alone."""
        if self.config.window is None and self.allowed is None and self.config.positions != "alibi":
            return None
        mask = self.visible(t, s)
        if self.config.positions == "alibi":
            mask = np.where(mask, self.bias(t, s), np.float32(-np.inf)).astype(np.float32)
        return mask.reshape((1,) * (4 - mask.ndim) + mask.shape)

    def runtime_info(self) -> dict[str, Any]:
        return {"device": "cpu"}


class StaticOperator(NumpyStatic):
    """Buffers of the capacity; steps have few shapes. A subclass overrides ``attention``: it is given whole buffers and
    hides by ``visible`` what is not a token."""

    claims = Claims(
        profiles=("attention",),
        abilities=(*BASIC, "truncate", "truncate_rows", "immutable", "ragged", "empty_append", "mask", "bytes"),
        overflow="refused",
        padding=("right", "left"),
        memory="capacity",
        max_chunk=max(SHAPES),
        static_shapes=SHAPES,
    )
    options: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def refuses(cls, config: Config, device: str) -> str | None:
        return lacking(config, cls.options)

    def run(self, cache: Any, inputs: tuple[Array, ...], mask: Array | None = None) -> Array:
        if not inputs[0].size:
            return np.zeros(inputs[0].shape, np.float32)
        return super().run(cache, inputs, mask)

    def uncached_forward(self, *inputs: Array, **options: Any) -> Array:
        b, t = inputs[0].shape[0], inputs[0].shape[2]
        wide = padded(self.config, inputs)
        return self.step(self.start(b), *wide, counts=np.full(b, t), **options)[0][:, :, :t]

    def cleared(self, cache: Any, buffer: Any) -> Any:
        """The buffer as it is: whether unused slots matter is up to the operator."""
        return buffer

    def runtime_info(self) -> dict[str, Any]:
        return {"device": "cpu"}


class OwnCache(Operator):
    """An engine's own cache, which has the attributes ``batch`` and ``offset``, the number of tokens. A subclass makes
    one in ``start`` and overrides ``put`` and ``trim``, and ``fork`` where a deep copy will not do."""

    claims = replace(
        Operator.claims, abilities=without(Operator.claims, "reorder", "mask", "immutable", "bytes", "contents")
    )

    def put(self, cache: Any, query: Array, key: Array, value: Array) -> Array:
        """Appends one token or more, and attends."""
        raise NotImplementedError

    def trim(self, cache: Any, count: int) -> Any:
        """Removes the last ``count`` tokens, at least one."""
        raise NotImplementedError

    def step(self, cache: Any, *inputs: Array, **options: Any) -> tuple[Array, Any]:
        t = check_inputs(self.config, cache.batch, inputs)
        if cache.offset + t > self.config.capacity:
            raise ValueError(f"{cache.offset} + {t} tokens exceed the capacity of {self.config.capacity}")
        return self.put(cache, *inputs) if t else np.zeros(inputs[0].shape, np.float32), cache

    def truncate(self, cache: Any, length: int) -> Any:
        check_length(length, cache.offset)
        return self.trim(cache, cache.offset - length) if length < cache.offset else cache

    def length(self, cache: Any) -> list[int]:
        return [int(cache.offset)] * int(cache.batch)

    def free_slots(self, cache: Any) -> list[int]:
        return [self.config.capacity - length for length in self.length(cache)]

    def fork(self, cache: Any) -> Any:
        return copy.deepcopy(cache)

    def reset(self, cache: Any) -> Any:
        return self.start(cache.batch)


class FunctionalCache(OwnCache):
    """A cache whose contents, ``held``, are replaced by each step and never changed."""

    def empty(self, batch: int) -> Any:
        raise NotImplementedError

    def start(self, batch: int) -> Any:
        return SimpleNamespace(held=self.empty(batch), batch=batch, offset=0)

    def fork(self, cache: Any) -> Any:
        return copy.copy(cache)

    def trim(self, cache: Any, count: int) -> Any:
        return SimpleNamespace(held=cache.held, batch=cache.batch, offset=cache.offset - count)


ONE_BY_ONE = replace(OwnCache.claims, abilities=without(OwnCache.claims, "truncate"), static_shapes=(1,), max_chunk=1)
"""The claims of a cache that takes one token at a time and cannot go back."""


def padded(config: Config, inputs: tuple[Array, ...]) -> list[Array]:
    """The inputs of a forward without a cache, up to the next power of two tokens, so that there are few shapes."""
    t = inputs[0].shape[2]
    more = min(1 << (t - 1).bit_length(), config.capacity) - t
    return [np.pad(x, [(0, 0), (0, 0), (0, more), (0, 0)]) for x in inputs]


def lacking(config: Config, options: tuple[str, ...]) -> str | None:
    """Why an operator with these options does not support a config, or None."""
    asked = {
        "scale": "default scale only" in options and config.scale is not None,
        "softcap": config.softcap,
        "sink": config.sink,
        "alibi": config.positions == "alibi",
    }
    missing = [name for name, value in asked.items() if value and name not in options]
    return f"the operator has no {', no '.join(missing)}" if missing else None
