"""Base class of planted faults: a correct cache with one wrong override that counts its effects."""

from __future__ import annotations

from types import ModuleType
from typing import Any, ClassVar

import numpy as np

from kvconform.mutation.fault import MARKER, Fault, named, sentence
from kvconform_backends.numpy.cache import Array, Cache, NumpyCache

__all__ = ["GITHUB", "MARKER", "Fault", "Planted", "faults_of"]

GITHUB = "https://github.com/"


class Planted(NumpyCache):
    """Base class of the faults: a subclass that names the clauses it ``breaks`` is a fault; its docstring is the
    sentence.

    ``kind``: its class or classes, of ``classes.CLASSES``. Faults of another cache have that as their second base:
    ``class StaleTail(Planted, NumpyStatic, breaks=...)``.
    """

    fault: ClassVar[Fault]

    def __init_subclass__(
        cls,
        *,
        breaks: tuple[str, ...] = (),
        kind: str | tuple[str, ...] = (),
        bug: str = "",
        conditional: bool = False,
        configs: tuple[str, ...] = (),
        **others: Any,
    ) -> None:
        super().__init_subclass__(**others)
        if breaks:
            address, kinds = f"{cls.__module__}:{cls.__name__}", (kind,) if isinstance(kind, str) else kind
            cls.fault = Fault(named(cls), address, breaks, GITHUB + bug, sentence(cls), kinds, conditional, configs)

    faulty = 0  # how often the fault changed something
    batch = 1  # rows of the step
    cached = True  # False during uncached_forward

    def attend(self, cache: Cache, layer: int, query: Array, key: Array, value: Array) -> Array:
        self.layer, self.batch = layer, query.shape[0]
        return super().attend(cache, layer, query, key, value)

    def uncached_forward(self, *inputs: Array, **options: Any) -> Array:
        self.cached = False
        try:
            return super().uncached_forward(*inputs, **options)
        finally:
            self.cached = True

    def instead(self, wrong: Array, right: Array) -> Array:
        """Returns the wrong array, and counts it if it differs from the right one."""
        self.faulty += not np.array_equal(wrong, right, equal_nan=True)
        return wrong

    def seen(self, i: Array, s: int) -> Array:
        """``(t, s)``: which of ``s`` tokens are visible from positions ``i`` ``(t,)``: the mask if ``i`` were right."""
        behind = i[:, None] - np.arange(s)
        return (behind >= 0) & (behind < (self.config.window_of(self.layer) or s + self.config.capacity))

    def runtime_info(self) -> dict[str, Any]:
        return {**super().runtime_info(), MARKER: int(self.faulty)}


def faults_of(module: ModuleType) -> tuple[Fault, ...]:
    """The faults defined in a module, in order."""
    kinds = [kind for kind in vars(module).values() if isinstance(kind, type) and kind.__module__ == module.__name__]
    return tuple(vars(kind)["fault"] for kind in kinds if "fault" in vars(kind))
