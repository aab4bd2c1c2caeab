"""The settings of a repository: ``kvconform.toml``, or ``[tool.kvconform]`` in ``pyproject.toml``.

They are defaults of options: what is given on the command line wins. Paths are relative to the file.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args

import msgspec

from kvconform.api import file_name
from kvconform.bench import record as speeds
from kvconform.errors import SpecError
from kvconform.files import family_of
from kvconform.mutation import record as audits
from kvconform.results import results
from kvconform.search.effort import EFFORTS
from kvconform.worker.client import DEVICES
from kvconform.worker.registry import openers
from kvconform.worker.start import START_METHODS
from kvconform_specs.config import DTYPES

OWN_FILE, SHARED_FILE, TABLE = "kvconform.toml", "pyproject.toml", "tool.kvconform"
FAMILIES = {schema.partition("/")[0] for schema in (results.SCHEMA, speeds.SCHEMA, audits.SCHEMA)}
"""The kinds of files that a report shows."""


class Settings(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """What a repository sets. Fields that are null leave the default of the option."""

    backends: list[str] = []
    """What is judged: addresses as for ``--backend``."""
    effort: str | None = None
    """How much ``kvconform run`` tries."""
    dtypes: list[str] | None = None
    """The dtypes of the configs."""
    device: str | None = None
    """The device."""
    seed: int | None = None
    """The seed of a run."""
    python: str | None = None
    """The interpreter of the workers."""
    step_timeout: float | None = None
    """Seconds without progress after which a worker is killed."""
    start_method: str | None = None
    """How workers are started."""
    results: str = "results"
    """The folder for results."""
    baseline: str | None = None
    """A results file, or a folder of them, with which results are compared."""
    known_failures: str | None = None
    """The TOML file of known failures."""


KEYS = {field.encode_name: field for field in msgspec.structs.fields(Settings)}
CHOICES: dict[str, Sequence[str]] = {
    "effort": (*EFFORTS,),
    "dtypes": DTYPES,
    "device": DEVICES,
    "start-method": START_METHODS,
}
"""The values of keys that have a closed list of them."""


def find(start: Path) -> Path | None:
    """The file with settings that is nearest above ``start``, not above the repository."""
    for folder in (start, *start.parents):
        if (folder / OWN_FILE).is_file():
            return folder / OWN_FILE
        if (folder / SHARED_FILE).is_file() and table(folder / SHARED_FILE) is not None:
            return folder / SHARED_FILE
        if (folder / ".git").exists():
            break
    return None


def table(file: Path) -> dict[str, Any] | None:
    """The table of settings in a file, or None where it has none. Raises SpecError if it cannot be read."""
    try:
        document = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SpecError(shown(file), f"cannot be read as TOML: {error}") from error
    if file.name == OWN_FILE:
        return document
    tools = document.get("tool")
    found = tools.get("kvconform") if isinstance(tools, dict) else None
    if found is None or isinstance(found, dict):
        return found
    raise SpecError("", f"{shown(file)}: [{TABLE}] must be a table, got {found!r}")


def shown(file: Path) -> str:
    """A file as seen from here."""
    return os.path.relpath(file)


def read(file: Path) -> Settings:
    """Raises SpecError with one sentence about the first key that is unknown or has a wrong value."""
    values: dict[str, Any] = {}
    for key, value in (table(file) or {}).items():
        at = f"{shown(file)}: {f'[{TABLE}] ' if file.name == SHARED_FILE else ''}{key}"
        if key not in KEYS:
            near = get_close_matches(key, KEYS, 1)
            raise SpecError(at, f"unknown key; {f'did you mean {near[0]}? ' if near else ''}known: {', '.join(KEYS)}")
        try:
            values[KEYS[key].name] = msgspec.convert(value, _kind(KEYS[key]))
        except msgspec.ValidationError as error:
            raise SpecError(at, f"{error}: {value!r}") from error
        for one in value if isinstance(value, list) else [value]:
            if one not in CHOICES.get(key, [one]):
                raise SpecError(at, f"unknown value {one!r}; known: {', '.join(CHOICES[key])}")
    return Settings(**values)


def _kind(field: msgspec.structs.FieldInfo) -> Any:
    """The type of a key's value: TOML has no null."""
    optional = isinstance(field.type, UnionType)
    return next(one for one in get_args(field.type) if one is not NoneType) if optional else field.type


def defaults(settings: Settings, folder: Path) -> dict[str, Any]:
    """The default of each parameter that the settings give, by command and by the name of the parameter, for click.
    ``folder``: that of the file."""

    def path(text: str | None) -> str | None:
        return None if text is None else os.path.relpath(folder / text)

    s = settings
    out = Path(os.path.relpath(folder / s.results))
    backends = [_address(text, folder) for text in s.backends]
    python = path(s.python) if s.python is not None and os.sep in s.python else s.python
    worker = {"python": python, "step_timeout": s.step_timeout, "start_method": s.start_method}
    timed = {"backend": backends, "device": s.device, "out": out, "python": [python] if python else None}
    run = {"effort": s.effort, "dtype": s.dtypes, "seed": s.seed}
    found: dict[str, Any] = {
        "run": {**worker, **run, **timed, "known_failures": path(s.known_failures)},
        "check": {**worker, "device": s.device, "seed": s.seed, "out": out / "check"},
        "replay": worker,
        "verify": {**worker, "out": out / "verify"},
        "demo": {"out": out / "demo"},
        "gate": {"files": _judged(backends, out), "baseline": path(s.baseline)},
        "diff": {"before": path(s.baseline), "after": out},
        "report": {"files": _all(out)},
        "audit": {"seed": s.seed, "out": out / "audit.json"},
        "bench": {**timed, "gate": timed, "counters": timed},
    }
    return {command: _given(values) for command, values in found.items()}


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _given(value) if isinstance(value, dict) else value
        for name, value in values.items()
        if value is not None and value != []
    }


def _address(text: str, folder: Path) -> str:
    """An address whose file is relative to ``folder``, as an address from here."""
    kind, colon, rest = text.partition(":")
    prefix, rest = (f"{kind}:", rest) if colon and kind in openers() else ("", text)
    target, mark, options = rest.partition("?")
    path, colon, name = target.rpartition(":") if ".py:" in target else (target, "", "")
    if path.endswith(".py") or (prefix in ("onnx:", "hf:") and (folder / path).exists()):
        path = os.path.relpath(folder / path)
    return f"{prefix}{path}{colon}{name}{mark}{options}"


def _judged(backends: Sequence[str], out: Path) -> Callable[[], list[str]]:
    """The results of the backends; of all that are there, if none are named."""

    def files() -> list[str]:
        named = [out / f"{file_name(backend)}.json" for backend in backends]
        return [str(file) for file in named] or _in(out, {results.SCHEMA.partition("/")[0]})

    return files


def _all(out: Path) -> Callable[[], list[str]]:
    return lambda: _in(out, FAMILIES)


def _in(out: Path, families: set[str]) -> list[str]:
    """The files of some kinds in a folder. Raises SpecError where there is none."""
    found = [str(file) for file in sorted(out.glob("*.json")) if family_of(file) in families]
    if not found:
        raise SpecError(str(out), "there are no results: kvconform run makes them")
    return found
