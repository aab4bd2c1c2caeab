"""From a backend's address to its class: an installed name, ``module:Name``, ``path/file.py:Name``, or what a person
has, ``kind:target?{"option": ...}``: a kind of target is opened by what is installed for it."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from kvconform.backend import invalid
from kvconform.errors import BackendUnavailable, InvalidBackend, SpecError, Unavailable
from kvconform_specs.claims import Claims

GROUP = "kvconform.backends"
TARGETS = "kvconform.targets"
EXTRAS = {
    "gpt2-transformers": "hf",
    **dict.fromkeys(("module-buffers", "past-tuples", "list-cache"), "eager"),
    **dict.fromkeys(("sdpa-math", "sdpa-flash", "sdpa-efficient", "flex", "flex-compiled"), "torch"),
    **{name: name for name in ("onnx-reference", "ort-attention", "keras-hub")},
    "ort-gqa": "ort-attention",
}
"""The extra that a shipped backend needs, if its name differs from the backend's."""


@cache
def installed() -> dict[str, EntryPoint]:
    """Backends that installed distributions offer, by name; read once a process."""
    return {point.name: point for point in sorted(entry_points(group=GROUP), key=lambda p: p.name)}


@cache
def openers() -> dict[str, EntryPoint]:
    """What opens each kind of target: ``open(target, options)`` gives a ``backend.BlackBox`` or another backend."""
    return {point.name: point for point in sorted(entry_points(group=TARGETS), key=lambda p: p.name)}


STEERED = ("py",)
"""Kinds of targets that are called by trial: their openers take the claims from outside, which limit the trials."""


def open_target(kind: str, rest: str) -> Any:
    """The backend around a target. Raises BackendUnavailable, or Unavailable if a package is missing."""
    target, _, text = rest.partition("?")
    try:
        options = json.loads(text or "{}")
    except ValueError as error:
        raise BackendUnavailable(f"target {kind}:{rest}: the options are not valid JSON: {error}") from error
    claimed, reference = options.pop("claims", {}), options.pop("reference", "")
    try:
        opener = openers()[kind].load()
    except ModuleNotFoundError as missing:
        sentence = f"target {kind}:{target} needs {missing.name!r}"
        raise Unavailable(sentence, f"install it with: pip install 'kvconform[{kind}]'") from missing
    opened = opener(target, options | ({"claims": claimed} if claimed and kind in STEERED else {}))
    if claimed:
        opened = claiming(opened, claimed, f"{kind}:{target}")
    return compared(opened, reference, claimed, f"{kind}:{target}") if reference else opened


def claiming(backend: Any, claimed: Mapping[str, Any], address: str) -> Any:
    """A target with claims from outside in place of its own. Raises InvalidBackend if one has an unknown value."""
    if not hasattr(backend, "claims"):
        return backend  # and is refused for that
    try:
        claims = Claims.from_json({**backend.claims.to_json(), **claimed})
    except SpecError as error:
        raise InvalidBackend(f"{address}: {error}") from error
    told = ", ".join(f"{name}={value}" for name, value in claimed.items())
    words = f"it is claimed from outside: {told}"
    return _changed(backend, {"claims": claims, "assumed": (*getattr(backend, "assumed", ()), words)})


def compared(backend: Any, reference: str, claimed: Mapping[str, Any], address: str) -> Any:
    """A target that is judged by another artefact. The dtype of its cache is then what may have been changed, and is no
    claim unless it comes from outside. Raises BackendUnavailable for what is no black box."""
    if getattr(getattr(backend, "claims", None), "reference", "") != "self":
        raise BackendUnavailable(
            f"{address} is judged by the definition, with the suite's weights: it takes no reference"
        )
    claims = replace(backend.claims, cache_dtype=claimed.get("cache_dtype", ""))
    told = {"cache_dtype": backend.claims.cache_dtype} if claims != backend.claims else {}
    return _changed(backend, {"reference": reference, "claims": claims, **told})


def _changed(backend: Any, changed: Mapping[str, Any]) -> Any:
    """A target with other attributes."""
    if isinstance(backend, type):
        return type(backend.__name__, (backend,), {**changed, "__module__": backend.__module__})
    for name, value in changed.items():
        setattr(backend, name, value)
    return backend


def load(address: str) -> Any:
    """The backend class behind an address.

    Raises BackendUnavailable if the address is unknown or cannot be imported, Unavailable if an installed backend needs
    a package that is missing, InvalidBackend if what is found is not a backend (``backend.invalid``).
    """
    kind, colon, rest = address.partition(":")
    backend = open_target(kind, rest) if colon and kind in openers() else _imported(address)
    wrong = invalid(backend)
    if wrong:
        raise InvalidBackend(f"backend {address!r} {wrong}")
    return backend


def sources(address: str) -> list[str]:
    """The modules, files or dotted names, that are imported first for an address; nothing is imported."""
    kind, _, rest = address.partition(":")
    points = [found[name] for found, name in ((openers(), kind), (installed(), address)) if name in found]
    target = rest.partition("?")[0] if kind in openers() else address
    named = [point.value for point in points] + ([target] if ":" in target else [])
    return [module for module, _, _ in (one.rpartition(":") for one in named)]


def _imported(address: str) -> Any:
    target, named = address, False
    if ":" not in address:
        points = installed()
        if address not in points:
            raise BackendUnavailable(f"no backend named {address!r}; installed: {', '.join(points)}")
        target, named = points[address].value, True
    module, _, name = target.rpartition(":")
    try:
        found = module_of(module)
    except SpecError as error:  # claims or a config with a value that is not one of the known ones
        raise InvalidBackend(f"backend {address!r}: {error}") from error
    except ModuleNotFoundError as missing:
        root = (missing.name or "").partition(".")[0]
        if named and root != module.partition(".")[0]:
            sentence = f"backend {address!r} is not installed: it needs {root!r}"
            raise Unavailable(sentence, f"install it with: {_remedy(points[address])}") from missing
        raise BackendUnavailable(
            f"backend {address!r} cannot be imported: no module named {missing.name!r}"
        ) from missing
    for part in name.split("."):
        found = getattr(found, part, None)
    if found is None:
        raise BackendUnavailable(f"backend {address!r}: {module} has no {name!r}")
    return found


def _remedy(point: EntryPoint) -> str:
    """Our own backends have an extra each; what another distribution needs, its own dependencies say."""
    name = point.dist.name if point.dist is not None else "its distribution"
    extra = EXTRAS.get(point.name, point.name.partition("-")[0])
    return f"pip install 'kvconform[{extra}]'" if name == "kvconform" else f"pip install {name}"


def address_of(backend: type) -> str:
    """The address of a class: by its file unless its module is part of a package. Raises InvalidBackend if a worker
    could not import the class: it is local to a function, or was typed into an interpreter."""
    module = sys.modules[backend.__module__]
    name, file = backend.__qualname__, getattr(module, "__file__", None)
    if "<locals>" in name:
        raise InvalidBackend(
            f"{name} is defined inside a function, where a worker cannot import it: move it to a module"
        )
    if module.__name__ == "__main__" or module.__spec__ is None or "." not in module.__name__:
        if file is None:
            raise InvalidBackend(f"{name} is in no file, and a worker cannot import it: write it to a module")
        return f"{file}:{name}"
    return f"{backend.__module__}:{name}"


def module_of(module: str) -> Any:
    """Imports a module by its name, or by its file. Raises BackendUnavailable if there is no such file."""
    if not module.endswith(".py"):
        return importlib.import_module(module)
    path = Path(module).resolve()
    if not path.is_file():
        raise BackendUnavailable(f"no file {module}")
    spec = importlib.util.spec_from_file_location(f"kvconform_target_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found  # dataclasses look their module up here
    spec.loader.exec_module(found)
    return found
