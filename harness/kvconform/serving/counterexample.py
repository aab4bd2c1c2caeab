"""A counterexample of a serving engine: the shortest list of requests found that breaks a clause, as JSON."""

from __future__ import annotations

import zlib
from pathlib import Path

import msgspec

from kvconform.files import read_versioned, write_atomically
from kvconform.judging.mismatch import Mismatch
from kvconform.judging.verdict import Outcome
from kvconform_specs.serving.program import Program

SCHEMA = "kvconform-serving-counterexample/1"


class ServingCounterexample(msgspec.Struct, frozen=True, kw_only=True):
    """What a file holds: the shortest list of requests found that breaks a clause, and how."""

    schema: str = SCHEMA
    """Name and version of this format."""
    suite: str
    """Version of the suite that found it."""
    clause: str
    """Name of the clause."""
    engine: str
    """Address of the engine that broke it."""
    outcome: Outcome
    """What the cell came to."""
    mismatch: Mismatch
    """What broke the clause."""
    sentence: str
    """The mismatch in words, for people: nothing reads it."""
    before: tuple[Program, ...] = ()
    """Programs that must run first on the same engine, oldest first."""
    program: Program
    """The program that breaks the clause."""
    bound: float
    """The largest difference of log-probabilities that was no error, no unit."""
    reduced: bool = True
    """Whether shrinking came to its end."""

    def write(self, folder: Path) -> Path:
        programs = msgspec.json.encode([*self.before, self.program])
        path = folder / f"{self.clause}-{zlib.crc32(programs):08x}.json"
        write_atomically(path, msgspec.json.format(msgspec.json.encode(self), indent=1))
        return path


def read(path: Path) -> ServingCounterexample:
    """Raises SpecError with one sentence where the file is none."""
    return read_versioned(path, ServingCounterexample, SCHEMA, "counterexample of a serving engine")
