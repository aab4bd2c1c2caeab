"""The record of a speed run, ``kv-latency/1``: raw rounds first; every summary is recomputable from them."""

from __future__ import annotations

from typing import Any

import msgspec

SCHEMA = "kv-latency/1"


class Arm(msgspec.Struct, frozen=True):
    """Who does what: ``prefill`` of n tokens into an empty cache, ``decode`` of one token at depth n, ``recompute`` of
    all n + 1 tokens anew (all positions projected to logits): by the backend's own cache-less forward, or where it
    claims none by a prefill into an empty cache."""

    backend: str
    phase: str


class Case(msgspec.Struct, frozen=True):
    """Arms that are timed against one another in the same rounds. ``depth``: n. ``steps``: k, calls in one block."""

    preset: str
    depth: int
    batch: int
    arms: list[Arm]
    steps: int


class Round(msgspec.Struct, frozen=True, array_like=True):
    """One timed block: indices of case, round, place in the round's random order, and arm; then wall and CPU
    nanoseconds of the block's k steps, and involuntary context switches meanwhile (recorded, never filtered)."""

    case: int
    round: int
    place: int
    arm: int
    ns: int
    cpu_ns: int
    nivcsw: int


class Summary(msgspec.Struct, frozen=True):
    """One arm of one case: nanoseconds per step. ``low``, ``high``: 95 % order-statistic interval of the median."""

    case: int
    arm: int
    n: int
    median: float
    q1: float
    q3: float
    low: float
    high: float


class Ratio(msgspec.Struct, frozen=True):
    """Median of the paired ratios time(arm) / time(reference) within rounds, with its 95 % interval."""

    case: int
    arm: int
    reference: int
    ratio: float
    low: float
    high: float
    n: int
    valid: bool
    why_invalid: str = ""


class Excluded(msgspec.Struct, frozen=True):
    """A backend that got no time for a preset, and why: not conformant, unsupported, crashed.

    ``phase``: only this phase has no time, and the others have; empty: none has.
    """

    backend: str
    preset: str
    why: str
    phase: str = ""


class Record(msgspec.Struct, kw_only=True):
    """One speed run. ``load``: 1-minute load average at start and end. ``software``: versions by backend."""

    schema: str = SCHEMA
    suite: str
    started: str
    device: str
    machine: dict[str, Any]
    software: dict[str, Any]
    protocol: dict[str, Any]
    load: list[float]
    presets: dict[str, Any]
    cases: list[Case] = []
    rounds: list[Round] = []
    summaries: list[Summary] = []
    ratios: list[Ratio] = []
    excluded: list[Excluded] = []
    seconds: float = 0.0
    finished: bool = False
