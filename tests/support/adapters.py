"""Adapters that are written wrongly, or without the base class, addressed as ``tests/support/adapters.py:Name``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvconform import Backend, Claims, Config
from kvconform_backends.numpy.cache import Cache, NumpyCache

Array = NDArray[Any]


class Duck:
    """Correct, complete, and derived from nothing of kvconform; it leaves out every optional method."""

    claims = Claims(profiles=("attention",), abilities=("reset",))

    def __init__(self, config: Config, weights: Mapping[str, Array], device: str) -> None:
        self.inner = NumpyCache(config, weights, device)

    def start(self, batch: int) -> Cache:
        return self.inner.start(batch)

    def step(self, cache: Cache, *inputs: Array) -> tuple[Array, Cache]:
        return self.inner.step(cache, *inputs)

    def reset(self, cache: Cache) -> Cache:
        return self.inner.reset(cache)


class Outer:
    """A namespace."""

    class Nested(NumpyCache):
        """Correct, and not at the top of its module."""


class NoClaims:
    def start(self, batch: int) -> None:
        return None


class ClaimsADictionary(Duck):
    claims = {"profiles": ("attention",)}  # type: ignore[assignment] # noqa: RUF012


class NoStep:
    claims = Claims(profiles=("attention",))

    def __init__(self, config: Config, weights: Mapping[str, Array], device: str) -> None: ...

    def start(self, batch: int) -> None:
        return None


class NoConstructor:
    claims = Claims(profiles=("attention",))

    def start(self, batch: int) -> None:
        return None

    def step(self, cache: None, *inputs: Array) -> tuple[Array, None]:
        return np.zeros(1), None


class ClaimWithoutMethod(Duck):
    claims = Claims(profiles=("attention",), abilities=("reset", "truncate"))


class BaseClaimWithoutMethod(Backend):
    """The base class's default is not an implementation."""

    claims = Claims(profiles=("attention",), abilities=("length",))

    def __init__(self, config: Config, weights: Mapping[str, Array], device: str) -> None: ...

    def start(self, batch: int) -> None:
        return None

    def step(self, cache: None, *inputs: Any, **options: Any) -> tuple[Array, None]:
        return np.zeros(1), None


class MethodWithoutClaim(Duck):
    claims = Claims(profiles=("attention",))

    def reset(self, cache: Cache) -> Cache:
        return self.inner.reset(cache)


class MethodBelowTheClaims(Duck):
    """The claims are those of the base; the method is new."""

    def fork(self, cache: Cache) -> Cache:
        return self.inner.fork(cache)


class Narrowed(NumpyCache):
    """Claims less than its base, whose methods it inherits."""

    claims = replace(NumpyCache.claims, abilities=("reset",))
