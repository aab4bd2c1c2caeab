"""Files of records: written whole or not at all, and read by their schema.

A record is a struct with a field ``schema``. Its file is JSON with one line for each field, or for each entry of a
field that holds structures. A name that ends in ``.gz`` makes the file compressed. Fields that are lists of array-like
structs are stored as columns: an object with one list for each field of the struct, without those columns that hold
nothing but the default.
"""

from __future__ import annotations

import gzip
import os
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar, get_args, get_type_hints

import msgspec

from kvconform_specs.errors import SpecError


class Versioned(Protocol):
    """A struct that names its schema."""

    @property
    def schema(self) -> str: ...


Stored = TypeVar("Stored", bound=Versioned)


class _Head(msgspec.Struct):
    schema: str = ""


# --- records ---
def read_versioned(path: Path, kind: type[Stored], schema: str, noun: str) -> Stored:
    """The struct in a JSON file. Raises SpecError with one sentence where the file holds none of this version."""
    try:
        data = _content(path)
        found = msgspec.json.decode(data, type=_Head).schema or schema
        if found == schema:
            return _decoded(data, kind)
    except OSError as error:
        raise SpecError(str(path), f"cannot be read: {error.strerror or error}") from error
    except (ValueError, EOFError, zlib.error) as error:  # msgspec's own errors, and what a struct refuses
        raise SpecError(str(path), f"holds no {noun}: {error}") from error
    raise SpecError(f"{path}.schema", f"unknown schema {found!r}; known: {schema}")


def family_of(path: Path) -> str:
    """The name of a JSON file's schema, without its version; empty where the file has none."""
    try:
        return msgspec.json.decode(_content(path), type=_Head).schema.partition("/")[0]
    except (OSError, ValueError, EOFError, zlib.error):
        return ""


def write_versioned(path: Path, record: msgspec.Struct) -> None:
    """Writes the file, whole or not at all."""
    document = msgspec.to_builtins(record)
    for name, row in tables(type(record)).items():
        document[name] = _columns(getattr(record, name), row)
    data = _lines(document)
    write_atomically(path, gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


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


def _content(path: Path) -> bytes:
    return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()


def _decoded(data: bytes, kind: type[Stored]) -> Stored:
    columned = tables(kind)
    if not columned:
        return msgspec.json.decode(data, type=kind)
    document = msgspec.json.decode(data, type=dict[str, Any])
    for name in columned.keys() & document.keys():
        document[name] = _rows(document[name], columned[name])
    return msgspec.convert(document, type=kind)


def tables(kind: type) -> dict[str, type[msgspec.Struct]]:
    """The struct of each field that is stored as columns."""
    found = {name: get_args(hint) for name, hint in get_type_hints(kind).items()}
    return {
        name: row[0]
        for name, row in found.items()
        if len(row) == 1
        and isinstance(row[0], type)
        and issubclass(row[0], msgspec.Struct)
        and row[0].__struct_config__.array_like
    }


def _columns(rows: Sequence[msgspec.Struct], kind: type[msgspec.Struct]) -> dict[str, list[Any]]:
    """The values of each field; fields that hold nothing but the default are left out."""
    columns = {field.name: [getattr(row, field.name) for row in rows] for field in msgspec.structs.fields(kind)}
    return {
        field.name: columns[field.name]
        for field in msgspec.structs.fields(kind)
        if field.required or any(value != field.default for value in columns[field.name])
    }


def _rows(columns: object, kind: type[msgspec.Struct]) -> list[tuple[Any, ...]]:
    """The rows in columns, values in the order of the fields. Raises ValueError where a column is missing or short."""
    given = msgspec.convert(columns, dict[str, list[Any]])
    count, found = max(map(len, given.values()), default=0), []
    for field in msgspec.structs.fields(kind):
        if field.required and field.name not in given:
            raise ValueError(f"{kind.__name__} has no column {field.name!r}")
        found.append(given.get(field.name, [field.default] * count))
        if len(found[-1]) != count:
            raise ValueError(f"column {field.name!r} of {kind.__name__} has {len(found[-1])} values, not {count}")
    return list(zip(*found, strict=True))


def _lines(document: dict[str, Any]) -> bytes:
    """JSON with one line for each field, or for each entry of a field that holds structures."""
    return b"{\n" + b",\n".join(_field(name, value) for name, value in document.items()) + b"\n}\n"


def _field(name: str, value: object) -> bytes:
    encode = msgspec.json.encode
    head = b" " + encode(name) + b": "
    match value:
        case [dict() | list(), *_]:
            return head + b"[\n" + b",\n".join(b"  " + encode(entry) for entry in value) + b"\n ]"
        case dict() if any(isinstance(entry, dict | list) for entry in value.values()):
            entries = (b"  " + encode(key) + b": " + encode(entry) for key, entry in value.items())
            return head + b"{\n" + b",\n".join(entries) + b"\n }"
    return head + encode(value)
