"""From an engine's address to a running engine: an installed name, a URL, or ``engine:module:Class``.

The entry points of the group ``kvconform.engines`` are functions ``open(target, options) -> Engine``. One is named
``http``: its target is the URL. Another is reached by its own name, and its target is what follows the name and a
colon; it is empty where nothing does.
"""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from kvconform.errors import BackendUnavailable, BadArgument, InvalidBackend, Unavailable
from kvconform.serving.engine import Engine
from kvconform.worker.registry import module_of

GROUP = "kvconform.engines"
HTTP, URLS = "http", ("http://", "https://")
BY_CLASS = "engine:"


@cache
def engines() -> dict[str, EntryPoint]:
    """What opens each kind of engine, by name; read once a process."""
    return {point.name: point for point in sorted(entry_points(group=GROUP), key=lambda point: point.name)}


def is_engine(address: str) -> bool:
    """Whether an address names a serving engine rather than a backend or a target of another kind."""
    return address.startswith((*URLS, BY_CLASS)) or address.partition(":")[0].partition("?")[0] in engines()


def is_url(address: str) -> bool:
    return address.startswith(URLS)


def addressed(target: str, options: Mapping[str, Any]) -> str:
    """The address with these options and its own, as results and counterexamples name it; replay opens it again. Raises
    BadArgument."""
    bare, own = split(target)
    merged = {**own, **options}
    return bare + (f"?{json.dumps(merged, sort_keys=True)}" if merged else "")


def split(address: str) -> tuple[str, dict[str, Any]]:
    """An address without its options, and these. Raises BadArgument."""
    target, mark, text = address.partition("?{")
    try:
        return target, json.loads("{" + text) if mark else {}
    except ValueError as error:
        raise BadArgument("target", address, sentence=f"{target}: the options are not valid JSON: {error}") from None


def referenced(address: str) -> tuple[str, str]:
    """An address without its option ``reference``, and that: the address of the weights that the engine serves, such as
    ``hf:DIRECTORY``; empty where it has none. Raises BadArgument."""
    target, options = split(address)
    reference = options.pop("reference", "")
    return addressed(target, options), str(reference)


def of_directory(path: Path) -> str:
    """The address of the weights in a directory of transformers, with the logits of all tokens."""
    return f'hf:{path.resolve()}?{{"all_tokens": true}}'


def check_host(url: str, allow_remote: bool) -> None:
    """Raises BadArgument where a URL leads to another machine and that is not allowed."""
    host = urlsplit(url).hostname or ""
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost"
    if not local and not allow_remote:
        words = f"{host} is another machine: thousands of requests are sent to it only with --allow-remote"
        raise BadArgument("target", url, sentence=words)


def open_engine(address: str) -> Engine:
    """Raises BackendUnavailable where it cannot be reached or opened, Unavailable where a package is missing,
    InvalidBackend where it is no engine."""
    target, options = split(address)
    if target.startswith(BY_CLASS):
        return _of_class(target.removeprefix(BY_CLASS), options)
    kind, _, rest = (HTTP, "", target) if is_url(target) else target.partition(":")
    if kind not in engines():
        raise BackendUnavailable(f"no engine named {kind!r}; installed: {', '.join(engines())}")
    try:
        opened = engines()[kind].load()(rest, options)
    except ModuleNotFoundError as missing:
        raise Unavailable(f"engine {kind!r} needs {missing.name!r}", "install it") from missing
    except OSError as error:
        raise BackendUnavailable(f"{target} cannot be reached: {error}") from error
    if not isinstance(opened, Engine):
        raise InvalidBackend(f"engine {kind!r}: want a kvconform.serving.engine.Engine, got {type(opened).__name__}")
    return opened


def _of_class(target: str, options: Mapping[str, Any]) -> Engine:
    module, _, name = target.rpartition(":")
    try:
        kind = getattr(module_of(module), name, None)
    except ImportError as error:
        raise BackendUnavailable(f"engine {target}: {error}") from error
    if not isinstance(kind, type) or not issubclass(kind, Engine):
        raise InvalidBackend(f"engine {target}: want a subclass of kvconform.serving.engine.Engine")
    return kind(**options)
