"""What a planted fault is: the simplest cache with one override that is wrong, and the count of how often it was."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from kvconform_backends.numpy_cache import Array, Cache, NumpyCache

MARKER = "faulty"
"""The witness of a planted fault counts under this key how often its faulty branch changed something."""

GITHUB = "https://github.com/"


@dataclass(frozen=True)
class Fault:
    """One row of the zoo.

    address: of the backend that has the fault. clauses: those that must convict it. configs: the names of those that
    it shows on; empty for every config that the clause concerns. bug: the real one that it is modelled on.
    sentence: what is wrong, and when. stealth: whether it waits for a trigger, or else shows wherever it can.
    """

    name: str
    address: str
    clauses: tuple[str, ...]
    bug: str
    sentence: str
    stealth: bool = False
    configs: tuple[str, ...] = ()
    marker: str = MARKER


class Planted(NumpyCache):
    """Base of the faults: a subclass that names the clauses it ``breaks`` is one, and its docstring is the sentence."""

    fault: ClassVar[Fault]

    def __init_subclass__(
        cls,
        *,
        breaks: tuple[str, ...] = (),
        bug: str = "",
        stealth: bool = False,
        configs: tuple[str, ...] = (),
        **others: Any,
    ) -> None:
        super().__init_subclass__(**others)
        if breaks:
            name = re.sub(r"(?<!^)(?=[A-Z])", "-", cls.__name__).lower()
            sentence = " ".join(inspect.cleandoc(cls.__doc__ or "").split())
            address = f"{cls.__module__}:{cls.__name__}"
            cls.fault = Fault(name, address, breaks, GITHUB + bug, sentence, stealth, configs)

    faulty = 0  # how often the fault changed something
    layer = 0  # that is attending
    batch = 1  # its rows
    cached = True  # not in the cache-less forward

    def attend(self, cache: Cache, layer: int, query: Array, key: Array, value: Array) -> Array:
        self.layer, self.batch = layer, query.shape[0]
        return super().attend(cache, layer, query, key, value)

    def full(self, *inputs: Array) -> Array:
        self.cached = False
        try:
            return super().full(*inputs)
        finally:
            self.cached = True

    def instead(self, wrong: Array, right: Array) -> Array:
        """The wrong array, counted where it differs from the right one."""
        self.faulty += not np.array_equal(wrong, right, equal_nan=True)
        return wrong

    def seen(self, i: Array, s: int) -> Array:
        """``(t, s)``: which of ``s`` tokens are visible from positions ``i`` ``(t,)``: the mask, were ``i`` right."""
        behind = i[:, None] - np.arange(s)
        return (behind >= 0) & (behind < (self.config.window or s + self.config.capacity))

    def witness(self) -> dict[str, Any]:
        return {**super().witness(), MARKER: self.faulty}


def faults_of(module: object) -> tuple[Fault, ...]:
    """The faults that a module plants, in its order."""
    kinds = [kind for kind in vars(module).values() if isinstance(kind, type) and "fault" in vars(kind)]
    return tuple(vars(kind)["fault"] for kind in kinds)
