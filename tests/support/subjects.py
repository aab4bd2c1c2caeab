"""Backends that misbehave, each in one way, addressed as ``tests/support/subjects.py:Name``."""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from kvconform_backends.numpy.cache import Cache, NumpyCache
from kvconform_specs.claims import Claims


def _deep(cache: Cache, inputs: tuple[Any, ...]) -> bool:
    """The trigger of most of them: a step that ends beyond the third token."""
    return cache.length + inputs[-1].shape[-2 if len(inputs) == 3 else -1] > 3


class Raises(NumpyCache):
    def step(self, cache: Cache, *inputs: Any) -> tuple[Any, Cache]:
        if _deep(cache, inputs):
            raise RuntimeError("the cache is haunted")
        return super().step(cache, *inputs)


class Segfaults(NumpyCache):
    def step(self, cache: Cache, *inputs: Any) -> tuple[Any, Cache]:
        if _deep(cache, inputs):
            os.kill(os.getpid(), signal.SIGSEGV)
        return super().step(cache, *inputs)


class Exits(NumpyCache):
    def step(self, cache: Cache, *inputs: Any) -> tuple[Any, Cache]:
        if _deep(cache, inputs):
            sys.exit(7)
        return super().step(cache, *inputs)


class Hangs(NumpyCache):
    def step(self, cache: Cache, *inputs: Any) -> tuple[Any, Cache]:
        if _deep(cache, inputs):
            time.sleep(3600)
        return super().step(cache, *inputs)


class Prints(NumpyCache):
    """Correct, and noisy on every channel that it can reach."""

    def step(self, cache: Cache, *inputs: Any) -> tuple[Any, Cache]:
        print("a debug line", inputs[0].shape)
        os.write(1, b"\x00\x01raw bytes where frames would be\n")
        return super().step(cache, *inputs)


class PrintsAndIsWrong(Prints):
    def mask(self, t: int, s: int) -> Any:
        return np.ones((t, s), bool)


_POOL: dict[int, Cache] = {}


class Handle:
    """A cache that goes back to a global pool when it is dropped."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache

    def __del__(self) -> None:
        _POOL[self.cache.keys[0].shape[0]] = self.cache


class GlobalCache(NumpyCache):
    """Caches come from a global pool that nobody clears: right in the first program of a process, wrong in the next."""

    claims = Claims(profiles=("attention", "decoder"), abilities=("uncached_forward", "length"))

    def start(self, batch: int) -> Any:
        return Handle(_POOL.pop(batch, None) or super().start(batch))

    def step(self, cache: Any, *inputs: Any) -> tuple[Any, Any]:
        output, cache.cache = super().step(cache.cache, *inputs)
        return output, cache

    def uncached_forward(self, *inputs: Any) -> Any:
        return super().step(super().start(inputs[0].shape[0]), *inputs)[0]

    def length(self, cache: Any) -> list[int]:
        return super().length(cache.cache)


class OneSlot(NumpyCache):
    """Correct, with one slot that only ``close`` frees."""

    claims = Claims(profiles=("attention",), abilities=("uncached_forward", "length"), max_sequences=1)
    busy = False

    def start(self, batch: int) -> Cache:
        if self.busy:
            raise RuntimeError("no free slot")
        self.busy = True
        return super().start(batch)

    def uncached_forward(self, *inputs: Any) -> Any:
        return NumpyCache.step(self, NumpyCache.start(self, inputs[0].shape[0]), *inputs)[0]

    def close(self, cache: Cache) -> None:
        self.busy = False


class GivesADictionary(NumpyCache):
    def step(self, cache: Cache, *inputs: Any) -> tuple[Any, Cache]:
        output, cache = super().step(cache, *inputs)
        return {"logits": output}, cache


class WitnessRaises(NumpyCache):
    def runtime_info(self) -> dict[str, Any]:
        raise RuntimeError("I saw nothing")


class WitnessIsNoJson(NumpyCache):
    def runtime_info(self) -> dict[str, Any]:
        return {"graphs": np.int64(4)}


class WitnessDies(NumpyCache):
    def runtime_info(self) -> dict[str, Any]:
        os._exit(5)


class CannotBeBuilt(NumpyCache):
    def __init__(self, *_: Any) -> None:
        raise RuntimeError("no weights for me")


class ClaimsNothing(NumpyCache):
    claims = Claims()


class ShortChunks(NumpyCache):
    claims: ClassVar[Claims] = replace(NumpyCache.claims, max_chunk=2)


class FewAbilities(NumpyCache):
    claims = Claims(profiles=("attention",), abilities=("uncached_forward", "length", "truncate"))


class FallsBack(NumpyCache):
    def runtime_info(self) -> dict[str, Any]:
        return {"fallback": "the fast path gave up and the slow one ran"}


class ClaimsCuda(NumpyCache):
    """Claims a GPU, computes on the CPU, and says nothing of it."""

    claims = replace(NumpyCache.claims, devices=("cpu", "cuda"))
    tells: ClassVar[dict[str, Any]] = {}

    def runtime_info(self) -> dict[str, Any]:
        return self.tells


class TellsTheCpu(ClaimsCuda):
    tells: ClassVar[dict[str, Any]] = {"device": "cpu"}


class TellsItsGpu(ClaimsCuda):
    tells: ClassVar[dict[str, Any]] = {"device": "cuda:1"}


class FallsBackAndRaises(FallsBack):
    def step(self, cache: Cache, *inputs: Any) -> tuple[Any, Cache]:
        raise RuntimeError("recompile limit")


class CannotRunHere(NumpyCache):
    def __init__(self, *_: Any) -> None:
        from kvconform.errors import Unavailable

        raise Unavailable("this backend needs a quantum computer; install one")


class RaisesSurrogates(NumpyCache):
    def step(self, cache: Cache, *inputs: Any) -> tuple[Any, Cache]:
        raise RuntimeError("half a \ud800 pair")
