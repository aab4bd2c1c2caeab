"""The record of counts, ``kv-counters/1``, and what follows from them by arithmetic alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from kvconform.files import family_of, read_versioned
from kvconform_specs.claims import Claims
from kvconform_specs.config import Config
from kvconform_specs.costs import multiply_adds, slots

SCHEMA = "kv-counters/1"

COUNTERS = {
    "multiply_adds": "multiply-adds of matrix products",
    "positions": "query positions whose multiply-adds a step takes for each new token",
    "operators": "operators dispatched, or nodes run",
    "allocated": "bytes newly allocated",
    "memcpy": "copies between devices",
    "bend": "how far multiply-adds at three depths are from a line",
    "graphs": "graphs compiled",
    "recompilations": "graphs compiled along a decode loop",
    "graph_breaks": "graph breaks",
}
"""What is counted, in the order of a record. A backend that does not count something has no such counter."""
PHASES = {
    "decode": "one token at a depth, with the cache",
    "prefill": "all tokens into an empty cache",
    "recompute": "one token more than the depth, without a cache",
    "growth": "from the first depth of a decode step to the last",
    "loop": "decode steps one after another",
}


class Count(msgspec.Struct, frozen=True, omit_defaults=True):
    """One count."""

    preset: str
    """Name of the preset."""
    backend: str
    """Name of the backend."""
    phase: str
    """What was counted: a step, or a whole loop."""
    depth: int
    """Number of tokens in the cache or in the prompt; 0 if the count is of several depths."""
    counter: str
    """Name of the counter, a key of ``COUNTERS``."""
    value: int
    """The count, in the unit of its counter."""
    kinds: dict[str, int] = {}
    """The part of each operator or node in ``value``, in the unit of the counter; empty if the count has no parts."""

    @property
    def key(self) -> tuple[str, str, str, int, str]:
        return self.preset, self.backend, self.phase, self.depth, self.counter

    @property
    def words(self) -> str:
        """``small, eager: decode at 64: operators``."""
        where = f" at {self.depth}" if self.depth else ""
        return f"{self.preset}, {self.backend}: {self.phase}{where}: {self.counter}"


class Missing(msgspec.Struct, frozen=True):
    """A backend that has no counts on a preset."""

    preset: str
    """Name of the preset."""
    backend: str
    """Name of the backend."""
    why: str
    """The reason, one sentence."""


class Record(msgspec.Struct, kw_only=True):
    """What was counted. Counting again gives the same record, byte by byte."""

    schema: str = SCHEMA
    """Name and version of this schema."""
    presets: dict[str, dict[str, Any]]
    """By name, config and depths of each preset."""
    claims: dict[str, dict[str, Any]] = {}
    """By backend, its claims."""
    by: dict[str, dict[str, str]] = {}
    """By backend, versions of the software that its counts depend on."""
    counts: list[Count] = []
    """The counts."""
    missing: list[Missing] = []
    """Backends without counts, with the reason."""


def read(path: Path) -> Record:
    """Raises SpecError with one sentence if the file holds no counts of this version."""
    return read_versioned(path, Record, SCHEMA, "counts")


def is_record(path: Path) -> bool:
    return family_of(path) == SCHEMA.partition("/")[0]


def attention_of(config: Config) -> int:
    """Multiply-adds of one position's attention for each slot that it reads."""
    return multiply_adds(config, 0, 1, keys=1) - multiply_adds(config, 0, 1, keys=0)


def positions(decode: Count, config: Config, claims: Claims) -> Count:
    """The number of query positions that a decode step's multiply-adds are enough for, rounded up: 1, or it computes
    more than the new token. The slots that one position reads are as claimed; with a window it may read fewer."""
    one = multiply_adds(config, decode.depth, 1, keys=slots(claims, config, decode.depth + 1))
    return msgspec.structs.replace(decode, counter="positions", value=-(-decode.value // one), kinds={})


def growth(decodes: Iterable[Count]) -> Iterator[Count]:
    """The growth of each count of a decode step from the first depth to the last, and ``bend``: how far a middle one is
    from the line between these, times their distance so that it is an integer. Affine counts have none."""
    found: dict[str, list[Count]] = defaultdict(list)
    for one in decodes:
        found[one.counter].append(one)
    for counter, (first, *middle, last) in ((name, each) for name, each in found.items() if len(each) > 1):
        kinds = {kind: last.kinds.get(kind, 0) - first.kinds.get(kind, 0) for kind in {*first.kinds, *last.kinds}}
        grown = {kind: n for kind, n in sorted(kinds.items()) if n}
        rise = last.value - first.value
        yield msgspec.structs.replace(first, phase="growth", depth=0, value=rise, kinds=grown)
        if counter == "multiply_adds":
            bends = [
                abs((one.value - first.value) * (last.depth - first.depth) - rise * (one.depth - first.depth))
                for one in middle
            ]
            yield Count(first.preset, first.backend, "growth", 0, "bend", max(bends, default=0))
