"""The power of a set of vectors: which planted faults, run as a runner, it detects.

A fault counts as shown by outputs if the set has vectors of a clause that must detect it. As in an audit, an exception
detects no fault for a clause about numbers, and a detection counts only if the faulty path ran.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec

from kvconform.errors import BackendUnavailable, BadArgument
from kvconform.files import read_versioned, write_versioned
from kvconform.judging.render import render
from kvconform.mutation.audit import REFUSALS
from kvconform.mutation.fault import Fault
from kvconform.vectors import record
from kvconform.vectors.answer import refuse, refused, run, skipped
from kvconform.vectors.choose import WIDE
from kvconform.vectors.features import unsupported, without
from kvconform.vectors.judge import checked, stored
from kvconform.vectors.record import Answers, Manifest, Vector
from kvconform.worker.client import WorkerClient, WorkerSpec
from kvconform_specs.clauses import BY_NAME

SCHEMA = "kvconform-vectors-power/1"


class Tried(msgspec.Struct, frozen=True, kw_only=True):
    """One fault, run as a runner."""

    fault: str
    """Name of the fault."""
    shown: bool
    """Whether the set has vectors of a clause that must detect it."""
    detected_by: str
    """Name of the vector that detected it; empty where none did."""
    sentence: str
    """What was wrong, or why it was not tried or not detected."""


class Power(msgspec.Struct, kw_only=True):
    """What a set of vectors detects."""

    schema: str = SCHEMA
    """The name and version of this schema."""
    suite: str
    """The version of the clauses."""
    digest: str
    """The digest of the set."""
    vectors: int = 0
    """How many vectors the set has."""
    bytes: int = 0
    """The bytes of all its files."""
    shown: int = 0
    """How many of the faults outputs can show."""
    detected: int = 0
    """How many of these were detected."""
    faults: list[Tried] = []
    """The faults, in the order of their list."""

    def write(self, path: Path) -> None:
        write_versioned(path, self)


def read(path: Path) -> Power:
    """Raises SpecError with one sentence where the file holds no such record."""
    return read_versioned(path, Power, SCHEMA, "power of vectors")


def power(folder: Path, faults: Sequence[Fault], tell: Callable[[Tried], None] = lambda _: None) -> Power:
    """Tries a set of vectors on faults."""
    manifest = record.read(folder)
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    found = Power(suite=manifest.suite, digest=manifest.digest, vectors=len(manifest.vectors), bytes=sum(sizes))
    for fault in faults:
        found.faults.append(tried(folder, manifest, fault))
        tell(found.faults[-1])
    found.shown = sum(one.shown for one in found.faults)
    found.detected = sum(one.shown and bool(one.detected_by) for one in found.faults)
    return found


def tried(folder: Path, manifest: Manifest, fault: Fault) -> Tried:
    """Tries the vectors of a set on one fault, up to the first that detects it."""
    vectors = list(_vectors(manifest, fault))
    body = Tried(fault=fault.name, shown=bool(vectors), detected_by="", sentence="no vector detects it")
    if not vectors:
        return msgspec.structs.replace(body, sentence="no vectors of its clauses on its configs")
    try:
        with WorkerClient(WorkerSpec(fault.address)) as client:
            refuse(client.claims)
            told = Answers(runner=fault.name, digest=manifest.digest, unsupported=unsupported(client.claims))
            for vector in vectors:
                config = record.config_of(manifest, vector)
                if skipped(manifest, vector, told) or refused(client, config) is not None:
                    continue
                sentence = _detected(folder, manifest, vector, client, told)
                if sentence and client.runtime_info(config).get(fault.marker) != 0:
                    return msgspec.structs.replace(body, detected_by=vector.name, sentence=sentence)
    except (BackendUnavailable, BadArgument) as error:
        return msgspec.structs.replace(body, shown=False, sentence=f"not tried: {error}")
    return body


def _vectors(manifest: Manifest, fault: Fault) -> Iterator[Vector]:
    """The vectors that may detect a fault: those of the clauses that must, in their order."""
    for name in fault.clauses or manifest.clauses:
        for vector in manifest.vectors:
            if vector.clause == name and (not fault.configs or vector.config in fault.configs):
                yield vector


def _detected(folder: Path, manifest: Manifest, vector: Vector, client: WorkerClient, told: Answers) -> str:
    """What is wrong in the answers to a vector, where it counts; or nothing."""
    refusals = BY_NAME[vector.clause].chapter in REFUSALS
    traces = run(manifest, vector, client, told)
    failure = told.failures.pop(vector.name, None)
    if failure is not None:
        return failure.message if refusals else ""
    case, claims = record.case_of(manifest, vector), without(WIDE, set(told.unsupported))
    mismatch = checked(manifest, vector, case, traces, stored(folder, manifest, vector), claims).mismatch
    return "" if mismatch is None or (mismatch.raised and not refusals) else render(mismatch)
