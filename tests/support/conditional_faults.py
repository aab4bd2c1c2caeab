"""Backends that are wrong under one known condition, addressed as ``tests/support/conditional_faults.py:FAULTS``.

What triggers each is written down in ``WHEN``, as the study of conditions tests it: no diagnosis names these mistakes.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from kvconform.mutation.fault import Fault
from kvconform_backends.numpy.cache import Array, Cache, NumpyCache


@dataclass(frozen=True)
class Call:
    """What a step knows: rows, new tokens, cached tokens, query heads, KV heads, head dim, and earlier steps."""

    b: int
    q: int
    past: int
    h: int
    g: int
    d: int
    steps: int
    decodes: int


When = Callable[[Call], bool]


class Conditional(NumpyCache):
    """A cached step whose call meets ``when`` has wrong outputs; nothing wrong is cached."""

    when: ClassVar[When] = staticmethod(lambda call: False)
    steps = decodes = 0

    def start(self, batch: int) -> Cache:
        cache = super().start(batch)
        cache.steps = cache.decodes = 0  # type: ignore[attr-defined]
        return cache

    def fork(self, cache: Cache) -> Cache:
        copy = super().fork(cache)
        copy.steps, copy.decodes = getattr(cache, "steps", 0), getattr(cache, "decodes", 0)  # type: ignore[attr-defined]
        return copy

    def uncached_forward(self, *inputs: Array, **options: Any) -> Array:
        return NumpyCache.step(self, self.start(inputs[0].shape[0]), *inputs, **options)[0]

    def step(self, cache: Cache, *inputs: Array, **options: Any) -> tuple[Array, Cache]:
        b, q, c, past = inputs[0].shape[0], inputs[0].shape[-2], self.config, cache.length
        steps, decodes = getattr(cache, "steps", 0), getattr(cache, "decodes", 0)
        output, cache = super().step(cache, *inputs, **options)
        cache.steps, cache.decodes = steps + 1, decodes + (q == 1)  # type: ignore[attr-defined]
        call = Call(b, q, past, c.heads, c.kv_heads, c.head_dim, steps, decodes)
        return (self.spoilt(output) if type(self).when(call) else output), cache

    def spoilt(self, output: Array) -> Array:
        return np.asarray(output * np.float32(1.1))


class Raising(Conditional):
    def spoilt(self, output: Array) -> Array:
        raise RuntimeError("no kernel for these sizes")


class Dying(Conditional):
    def spoilt(self, output: Array) -> Array:
        os.kill(os.getpid(), signal.SIGKILL)
        return output


WHEN: Mapping[str, tuple[type[Conditional], When]] = {
    "LengthFrom8": (Conditional, lambda c: c.past + c.q >= 8),
    "LengthFrom13": (Conditional, lambda c: c.past + c.q >= 13),
    "PastFrom5": (Conditional, lambda c: c.past >= 5),
    "PastFrom11": (Conditional, lambda c: c.past >= 11),
    "DecodeFrom9": (Conditional, lambda c: c.q == 1 and c.past >= 9),
    "ChunkFrom4": (Conditional, lambda c: c.q >= 4 and c.past > 0),
    "PromptFrom6": (Conditional, lambda c: c.q >= 6 and c.past == 0),
    "Chunk2": (Conditional, lambda c: c.q == 2 and c.past > 0),
    "Chunk3": (Conditional, lambda c: c.q == 3),
    "SecondDecode": (Conditional, lambda c: c.q == 1 and c.decodes >= 1),
    "ThirdStep": (Conditional, lambda c: c.steps == 2),
    "OddPast": (Conditional, lambda c: c.past % 2 == 1),
    "PastOfFour": (Conditional, lambda c: c.past > 0 and c.past % 4 == 0),
    "SeveralRows": (Conditional, lambda c: c.b > 1),
    "SeveralRowsCached": (Conditional, lambda c: c.b > 1 and c.past > 0),
    "ThreeRows": (Conditional, lambda c: c.b == 3),
    "RowsAreKVHeads": (Conditional, lambda c: c.b == c.g),
    "CountIsHeads": (Conditional, lambda c: c.q == c.h),
    "CountIsKVHeads": (Conditional, lambda c: c.q == c.g),
    "LengthIsHeadDim": (Conditional, lambda c: c.past + c.q == c.d),
    "CountIsPast": (Conditional, lambda c: c.q == c.past),
    "FirstStep": (Conditional, lambda c: c.steps == 0),
    "RaisesFrom10": (Raising, lambda c: c.past + c.q >= 10),
    "RaisesOnDecode": (Raising, lambda c: c.q == 1),
    "RaisesOnRows": (Raising, lambda c: c.b > 2),
    "DiesOnDecode": (Dying, lambda c: c.q == 1),
    "DiesFrom12": (Dying, lambda c: c.past + c.q >= 12),
    "DiesOnChunks": (Dying, lambda c: c.q > 1 and c.past > 0),
}
"""By name: the kind of failure, and when it shows."""
for _name, (_kind, _when) in WHEN.items():
    globals()[_name] = type(_name, (_kind,), {"when": staticmethod(_when), "__doc__": _name, "__module__": __name__})
FAULTS = tuple(
    Fault(name, f"{os.path.abspath(__file__)}:{name}", configs=("attention-gqa",), conditional=True) for name in WHEN
)
