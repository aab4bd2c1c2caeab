"""Files that are either whole or not there, and what a reader says of one that is neither."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Protocol, TypeVar

import msgspec

from kvconform_specs.errors import SpecError


class Versioned(Protocol):
    """A struct that names the schema that it was written by."""

    @property
    def schema(self) -> str: ...


Stored = TypeVar("Stored", bound=Versioned)


def read_versioned(path: Path, kind: type[Stored], schema: str, noun: str) -> Stored:
    """The struct in a JSON file. Raises SpecError with one sentence where the file holds none of this version."""
    try:
        found = msgspec.json.decode(path.read_bytes(), type=kind)
    except OSError as error:
        raise SpecError(str(path), f"cannot be read: {error.strerror}") from error
    except ValueError as error:  # msgspec's own errors, and what a struct refuses
        raise SpecError(str(path), f"holds no {noun}: {error}") from error
    if found.schema != schema:
        raise SpecError(f"{path}.schema", f"unknown schema {found.schema!r}; known: {schema}")
    return found


def family_of(path: Path) -> str:
    """The name of the schema that a JSON file was written by, without its version; empty where it tells none."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Family).schema.partition("/")[0]
    except (OSError, msgspec.DecodeError):
        return ""


class _Family(msgspec.Struct):
    schema: str = ""


def write_atomically(path: Path, data: bytes) -> None:
    """Writes beside ``path`` and renames, so that a reader or a crash never meets half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)  # a temporary file is its maker's alone; results are for others, too
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
