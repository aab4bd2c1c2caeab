"""Faults as defined by another project, addressed as ``tests/support/third_party_faults.py:MIXED``."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

from kvconform.mutation.fault import Fault
from kvconform_backends.numpy.cache import Cache, NumpyCache

BUG = "https://github.com/huggingface/optimum/issues/1913"


class LastOutputOnly(NumpyCache):
    """Only the last position's output
    comes back.
    """

    clauses = ("shape.output",)
    bug = BUG
    configs = ("attention-gqa",)

    def step(self, cache: Cache, *inputs: Any, **options: Any) -> tuple[Any, Cache]:
        output, cache = super().step(cache, *inputs, **options)
        return output[..., -1:, :], cache


class Doubled(NumpyCache):
    """From the fourth token on, outputs are doubled."""

    clauses = ["definition.attention", "shape.length"]  # noqa: RUF012 - lists are allowed; the second clause holds here
    classes = ("M11",)
    conditional = True
    configs = ("attention-gqa",)

    def step(self, cache: Cache, *inputs: Any, **options: Any) -> tuple[Any, Cache]:
        output, cache = super().step(cache, *inputs, **options)
        return output * (1 + (cache.length > 3)), cache


class Raises(NumpyCache):
    """A step raises beyond the third token."""

    clauses = ("definition.attention", "shape.output", "capacity.full")
    configs = ("attention-gqa",)

    def step(self, cache: Cache, *inputs: Any, **options: Any) -> tuple[Any, Cache]:
        output, cache = super().step(cache, *inputs, **options)
        if cache.length > 3:
            self.fail()
        return output, cache

    def fail(self) -> None:
        raise RuntimeError("the cache is haunted")


class Dies(Raises):
    """A step ends the process beyond the third token."""

    clauses = ("definition.attention",)

    def fail(self) -> None:
        os._exit(7)


class NeverRan(Doubled):
    """It reports that its faulty path never ran."""

    clauses = ["definition.attention"]  # noqa: RUF012

    def runtime_info(self) -> dict[str, Any]:
        return {"faulty": 0}


class Right(NumpyCache):
    """A correct backend."""

    clauses = ("shape.output",)
    configs = ("attention-gqa",)


class NoBackend:
    """It declares no claims."""


def local() -> type:
    class Hidden(NumpyCache):
        """It is defined inside a function."""

    return Hidden


HERE = f"{__file__}:"
MIXED = (
    LastOutputOnly,
    HERE + "Doubled",
    Fault("by-fault", HERE + "Raises", ("shape.output",), conditional=True),
    SimpleNamespace(name="by-attributes", address=HERE + "Right", clauses=("shape.output",)),
)
ALL = (LastOutputOnly, Doubled, Raises, Dies, NeverRan, Right)
SURVIVING = [LastOutputOnly, Right]
CONTROLS = (Right,)
EMPTY: tuple[type, ...] = ()
NUMBER = 7
TWICE = (Right, HERE + "Right")
NOT_A_FAULT = (Right, 7)
NOT_A_BACKEND = (NoBackend,)
NOT_THERE = (HERE + "Absent",)
HIDDEN = (local(),)
ONE_STRING = (Fault("right", HERE + "Right"), SimpleNamespace(name="string", address="a", clauses="shape.output"))
UNKNOWN_CLAUSE = (Fault("odd", HERE + "Right", ("shape.colour",)),)
UNKNOWN_CONFIG = (Fault("odd", HERE + "Right", configs=("attention-cubic",)),)
