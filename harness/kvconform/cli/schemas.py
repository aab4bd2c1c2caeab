"""The JSON Schema of each kind of file that kvconform writes or reads."""

from __future__ import annotations

from typing import Any

from kvconform.bench import record as speed
from kvconform.bench.counters import record as counters
from kvconform.bench.gate import record as gate
from kvconform.files import schema_of
from kvconform.mutation import record as audit
from kvconform.results import known_failures, results
from kvconform.search import counterexample

FILES: dict[str, tuple[str, type]] = {
    "results": (results.SCHEMA, results.Results),
    "counterexample": (counterexample.SCHEMA, counterexample.Counterexample),
    "known-failures": (known_failures.SCHEMA, known_failures.KnownFailuresFile),
    "audit": (audit.SCHEMA, audit.AuditRecord),
    "speed": (speed.SCHEMA, speed.Record),
    "speed-gate": (gate.SCHEMA, gate.GateRecord),
    "counters": (counters.SCHEMA, counters.Record),
}
"""By kind, the name and version of its schema, and the struct in the file; known failures are TOML, the others JSON."""


def json_schema(kind: str) -> dict[str, Any]:
    """The JSON Schema of a kind of file."""
    name, struct = FILES[kind]
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": name, **schema_of(struct)}
    schema["$defs"][struct.__name__]["properties"]["schema"]["const"] = name
    return schema


def file_name(kind: str) -> str:
    """The name of the file in ``docs/schema``."""
    return FILES[kind][0].replace("/", "-") + ".json"
