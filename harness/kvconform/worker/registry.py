"""From a backend's address to its class: an installed name, ``module:Name``, ``path/file.py:Name``, or what a person
has, ``kind:target?{"option": ...}``: a kind of target is opened by what is installed for it."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

GROUP = "kvconform.backends"
TARGETS = "kvconform.targets"
EXTRAS = {"gpt2-transformers": "hf", "module-buffers": "eager", "past-tuples": "eager", "list-cache": "eager"}
"""What brings what a backend of ours needs, where it is not called like the backend."""


class BackendError(Exception):
    """No such backend, not installed, or broken: three different sentences."""


def installed() -> dict[str, EntryPoint]:
    """Backends that installed distributions offer, by name."""
    return {point.name: point for point in sorted(entry_points(group=GROUP), key=lambda p: p.name)}


def openers() -> dict[str, EntryPoint]:
    """What opens each kind of target: ``open(target, options)`` gives a ``backend.BlackBox`` or another backend."""
    return {point.name: point for point in sorted(entry_points(group=TARGETS), key=lambda p: p.name)}


def open_target(kind: str, rest: str) -> Any:
    """The backend around a target. Raises BackendError with a sentence."""
    target, _, text = rest.partition("?")
    try:
        options = json.loads(text or "{}")
    except ValueError as error:
        raise BackendError(f"target {kind}:{rest}: its options are no JSON: {error}") from error
    try:
        opener = openers()[kind].load()
    except ModuleNotFoundError as missing:
        raise BackendError(
            f"target {kind}:{target} needs {missing.name!r}; install it with: pip install 'kvconform[{kind}]'"
        ) from missing
    return opener(target, options)


def load(address: str) -> Any:
    """The backend class behind an address. Raises BackendError with a sentence."""
    kind, colon, rest = address.partition(":")
    if colon and kind in openers():
        return open_target(kind, rest)
    target, named = address, False
    if ":" not in address:
        points = installed()
        if address not in points:
            raise BackendError(f"no backend named {address!r}; installed: {', '.join(points)}")
        target, named = points[address].value, True
    module, _, name = target.rpartition(":")
    try:
        found = module_of(module)
    except ModuleNotFoundError as missing:
        root = (missing.name or "").partition(".")[0]
        if named and root not in module.split("."):
            raise BackendError(
                f"backend {address!r} is not installed: it needs {root!r}; install it with: {_remedy(points[address])}"
            ) from missing
        raise BackendError(f"backend {address!r} cannot be imported: no module named {missing.name!r}") from missing
    backend = getattr(found, name, None)
    if backend is None:
        raise BackendError(f"backend {address!r}: {module} has no {name!r}")
    if not hasattr(backend, "claims"):
        raise BackendError(f"backend {address!r} declares no claims (an attribute ``claims = Claims(...)``)")
    return backend


def _remedy(point: EntryPoint) -> str:
    """Our own backends have an extra each; what another distribution needs, its own dependencies say."""
    name = point.dist.name if point.dist is not None else "its distribution"
    extra = EXTRAS.get(point.name, point.name.partition("-")[0])
    return f"pip install 'kvconform[{extra}]'" if name == "kvconform" else f"pip install {name}"


def address_of(backend: type) -> str:
    """The address of a class, by the file that it lies in unless its module is part of a package."""
    module = sys.modules[backend.__module__]
    if module.__name__ == "__main__" or module.__spec__ is None or "." not in module.__name__:
        file = getattr(module, "__file__", None)
        if file is not None:
            return f"{file}:{backend.__qualname__}"
    return f"{backend.__module__}:{backend.__qualname__}"


def module_of(module: str) -> Any:
    """Imports a module by its name, or by its file. Raises BackendError where there is no such file."""
    if not module.endswith(".py"):
        return importlib.import_module(module)
    path = Path(module).resolve()
    if not path.is_file():
        raise BackendError(f"no file {module}")
    spec = importlib.util.spec_from_file_location(f"kvconform_target_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found  # dataclasses look their module up here
    spec.loader.exec_module(found)
    return found
