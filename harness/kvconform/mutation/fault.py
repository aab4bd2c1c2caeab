"""Planted faults, and lists of them: ``module:LIST`` or ``path/file.py:LIST``.

A list holds backend classes that are wrong on purpose, addresses of such classes, and ``Fault`` objects. A class gives
its name, its docstring and, if it has them, the attributes ``clauses``, ``bug``, ``classes``, ``conditional`` and
``configs`` with the meaning that they have in ``Fault``. Backends import this module, so it needs only numpy.
"""

from __future__ import annotations

import inspect
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from kvconform.errors import BackendUnavailable
from kvconform.worker.registry import address_of, load, module_of
from kvconform_specs.errors import SpecError

MARKER = "faulty"
"""The key under which the runtime_info of a planted fault counts how often its faulty branch changed something."""


@dataclass(frozen=True)
class Fault:
    """One wrong backend.

    address: of the backend that has the fault. clauses: those that must detect it; if empty, any clause may. bug: link
    to the real bug that it is modelled on. sentence: what is wrong, and when. classes: the kinds of mistake that it
    stands for. conditional: it shows only after a trigger (a length, a distribution, a sequence of steps); otherwise it
    shows in every program that reaches the faulty code. configs: names of the configs on which it shows; if empty,
    every config that a clause concerns. marker: the key of its runtime_info that counts how often the fault changed
    something.
    """

    name: str
    address: str
    clauses: tuple[str, ...] = ()
    bug: str = ""
    sentence: str = ""
    classes: tuple[str, ...] = ()
    conditional: bool = False
    configs: tuple[str, ...] = ()
    marker: str = MARKER

    def __post_init__(self) -> None:
        for name in ("clauses", "classes", "configs"):
            value = getattr(self, name)
            if isinstance(value, str) or not all(isinstance(item, str) for item in value):
                raise SpecError(f"{self.name}.{name}", f"want a tuple of strings, got {value!r}")
            object.__setattr__(self, name, tuple(value))


def load_faults(address: str) -> tuple[Fault, ...]:
    """The faults of a list. Raises SpecError, whose sentence says what is wrong with the list."""
    module, colon, name = address.rpartition(":")
    if not colon or not module or not name:
        raise SpecError("faults", f"want module:LIST or path/file.py:LIST, got {address!r}")
    if os.getcwd() not in sys.path and "" not in sys.path:  # workers find modules in the working directory, too
        sys.path.insert(0, os.getcwd())
    try:
        items = getattr(module_of(module), name, None)
    except (ImportError, SyntaxError, BackendUnavailable) as error:
        raise SpecError("faults", f"{module} cannot be imported: {error}") from error
    if items is None:
        raise SpecError("faults", f"{module} has no {name!r}")
    if not isinstance(items, Sequence) or isinstance(items, str) or not items:
        raise SpecError("faults", f"{address} is no list of faults: want a list or tuple that holds at least one")
    faults = tuple(_fault(item, f"{address}[{number}]") for number, item in enumerate(items))
    names = [fault.name for fault in faults]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise SpecError("faults", f"{address} holds two faults named {twice[0]!r}")
    return faults


def named(kind: type) -> str:
    """``LastRowReadsFirst`` to ``last-row-reads-first``."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<!^)(?=[A-Z][a-z])", "-", kind.__name__).lower()


def sentence(kind: type) -> str:
    """The docstring in one line."""
    return " ".join(inspect.cleandoc(kind.__doc__ or "").split())


def _fault(item: Any, at: str) -> Fault:
    """The fault behind an entry of a list: an address, a class, or an object that has the attributes of ``Fault``."""
    address = None
    if isinstance(item, str):
        try:
            item, address = load(item), item
        except BackendUnavailable as error:
            raise SpecError(at, str(error)) from error
    if not isinstance(item, type):
        if isinstance(item, Fault):
            return item
        if not hasattr(item, "name") or not hasattr(item, "address"):
            raise SpecError(at, f"want a backend class, its address or a Fault, got {item!r}")
        return _of(item, at, name=item.name, address=item.address)
    own = vars(item).get("fault")
    if isinstance(own, Fault):
        return own
    if not hasattr(item, "claims"):
        raise SpecError(at, f"{item.__name__} declares no claims, so it is no backend")
    if address is None and getattr(sys.modules[item.__module__], item.__name__, None) is not item:
        raise SpecError(at, f"{item.__qualname__} is not at the top of {item.__module__}: a worker cannot import it")
    return _of(item, at, name=named(item), address=address or address_of(item), sentence=sentence(item))


def _of(item: Any, at: str, **known: Any) -> Fault:
    """A fault from what is known and the attributes that an item happens to have."""
    found = {field.name: getattr(item, field.name) for field in fields(Fault) if hasattr(item, field.name)}
    try:
        return Fault(**{**found, **known})
    except SpecError as error:
        raise SpecError(at, str(error)) from error
