"""The JSON Schema of each kind of file that kvconform writes or reads.

Descriptions are docstrings: of the structs, and the string below each of their fields.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterable
from dataclasses import is_dataclass
from itertools import pairwise
from typing import Any

import msgspec

from kvconform.bench import record as speed
from kvconform.bench.counters import record as counters
from kvconform.bench.gate import record as gate
from kvconform.files import tables
from kvconform.mutation import record as audit
from kvconform.results import known_failures, results
from kvconform.search import counterexample
from kvconform.serving import counterexample as serving
from kvconform.vectors import power
from kvconform.vectors import record as vectors

FILES: dict[str, tuple[str, type]] = {
    "results": (results.SCHEMA, results.Results),
    "counterexample": (counterexample.SCHEMA, counterexample.Counterexample),
    "serving-counterexample": (serving.SCHEMA, serving.ServingCounterexample),
    "known-failures": (known_failures.SCHEMA, known_failures.KnownFailuresFile),
    "audit": (audit.SCHEMA, audit.AuditRecord),
    "speed": (speed.SCHEMA, speed.Record),
    "speed-gate": (gate.SCHEMA, gate.GateRecord),
    "counters": (counters.SCHEMA, counters.Record),
    "vectors": (vectors.SCHEMA, vectors.Manifest),
    "vectors-power": (power.SCHEMA, power.Power),
    "answers": (vectors.ANSWERS_SCHEMA, vectors.Answers),
}
"""By kind, the name and version of its schema, and the struct in the file; known failures are TOML, the others JSON."""


def json_schema(kind: str) -> dict[str, Any]:
    """The JSON Schema of a kind of file."""
    name, struct = FILES[kind]
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": name, **_schema(struct)}
    schema["$defs"][struct.__name__]["properties"]["schema"]["const"] = name
    return schema


def file_name(kind: str) -> str:
    """The name of the file in ``docs/schema``."""
    return FILES[kind][0].replace("/", "-") + ".json"


def _tag_of(struct: Any) -> str | None:
    """The name of the property that tells structs of a union apart; a dataclass has none."""
    return struct.__struct_config__.tag_field if issubclass(struct, msgspec.Struct) else None


def _schema(kind: type) -> dict[str, Any]:
    """The schema of a struct's file."""
    schema, columned = msgspec.json.schema(kind), tables(kind)
    for struct in _structs(msgspec.inspect.type_info(kind), {}):
        definition, texts = schema["$defs"][struct.__name__], _descriptions(struct)
        definition["description"] = _plain(struct.__doc__ or "")
        if struct in columned.values():
            _as_columns(definition, struct)
        for name, part in definition["properties"].items():
            tag = "Which kind of record this is." if name == _tag_of(struct) else ""
            part["description"] = texts.get(name, tag)
    properties = schema["$defs"][kind.__name__]["properties"]
    for name, row in columned.items():
        properties[name] = {"description": properties[name]["description"], "$ref": f"#/$defs/{row.__name__}"}
    return schema


def _descriptions(struct: type) -> dict[str, str]:
    """The string below each field of a struct, by field."""
    found: dict[str, str] = {}
    for base in reversed(struct.__mro__):
        if base not in (object, msgspec.Struct) and (issubclass(base, msgspec.Struct) or is_dataclass(base)):
            (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
            assert isinstance(definition, ast.ClassDef)
            for field, below in pairwise(definition.body):
                match field, below:
                    case ast.AnnAssign(target=ast.Name(name)), ast.Expr(ast.Constant(str(text))):
                        found[name] = _plain(text)
    return found


def _plain(docstring: str) -> str:
    """A docstring in one line, with code as in Markdown."""
    return " ".join(docstring.split()).replace("``", "`")


def _structs(info: object, seen: dict[type, None]) -> dict[type, None]:
    """Every struct or dataclass in a type."""
    if isinstance(info, msgspec.inspect.StructType | msgspec.inspect.DataclassType):
        if info.cls in seen:
            return seen
        seen[info.cls] = None
    if isinstance(info, tuple):
        parts: Iterable[object] = info
    elif isinstance(info, msgspec.Struct):
        parts = (getattr(info, name) for name in info.__struct_fields__)
    else:
        parts = ()
    for part in parts:
        _structs(part, seen)
    return seen


def _as_columns(definition: dict[str, Any], row: type[msgspec.Struct]) -> None:
    """Turns the definition of a row into that of an object with one list for each field."""
    fields = msgspec.structs.fields(row)
    items = definition.pop("prefixItems")
    for key in ("minItems", "maxItems", "items"):
        definition.pop(key, None)
    definition["type"] = "object"
    definition["properties"] = {
        field.name: {"type": "array", "items": {k: v for k, v in item.items() if k != "default"}}
        for field, item in zip(fields, items, strict=True)
    }
    definition["required"] = [field.name for field in fields if field.required]
