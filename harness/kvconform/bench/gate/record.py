"""The record of a gate run, ``kv-gate/1``: raw blocks first; every median and every verdict follows from them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import msgspec

from kvconform.bench.analysis.intervals import interval, rank
from kvconform.bench.gate.sign_flip import CONFIRM, NOT_COMPARABLE, PASS, REGRESSION, SCREEN, VERDICTS, Finding, find
from kvconform.bench.worker.gpu import default_mhz, kept
from kvconform.files import family_of, read_versioned, write_atomically

SCHEMA = "kv-gate/1"
BASE, HEAD = "base", "head"
SIDES = (BASE, HEAD)
OK, BLOCKED = 0, 4
"""Exit codes: 4 where a case is a regression."""


class GateCase(msgspec.Struct, frozen=True):
    """What is compared: ``phase`` (of ``record.PHASES``) at ``depth`` tokens of a preset, batch 1."""

    preset: str
    phase: str
    depth: int

    def __str__(self) -> str:
        return f"{self.preset}: {self.phase}({self.depth})"


class GateBlock(msgspec.Struct, frozen=True, array_like=True):
    """One timed block: case, stage, restart, round, place in the round's random order, side (0 base, 1 head), steps in
    the block (the same for both sides of a restart), wall and CPU nanoseconds, involuntary context switches; on a GPU
    its clock and what held it down, as in ``record.Round``."""

    case: int
    stage: str
    restart: int
    round: int
    place: int
    side: int
    steps: int
    ns: int
    cpu_ns: int
    nivcsw: int
    sm_mhz: int = 0
    throttle: int = 0


class Trial(msgspec.Struct, frozen=True, array_like=True):
    """What one restart says of one case: ``d``, the median of log(head / base) over ``rounds`` rounds, and the
    half-width of its interval within the restart; None with too few rounds for one."""

    case: int
    stage: str
    restart: int
    rounds: int
    d: float
    half_width: float | None


class Lasting(msgspec.Struct, frozen=True):
    """A case that has no verdict on its times, and one sentence why: it lasts, whatever else was measured."""

    case: int
    why: str


class CaseVerdict(msgspec.Struct, frozen=True):
    """``verdict``: one of ``signs.VERDICTS``; ``why``: a sentence, empty for a pass. ``ratio``: time(head) / time(base)
    of the stage that decided. p: of the direction that its median has; spread: standard deviation of d between the
    restarts of the screen. None: not measured."""

    case: int
    verdict: str
    why: str = ""
    ratio: float | None = None
    screen_p: float | None = None
    confirm_p: float | None = None
    spread: float | None = None

    def __post_init__(self) -> None:
        if self.verdict not in VERDICTS:
            raise ValueError(f"unknown verdict {self.verdict!r}; known: {', '.join(VERDICTS)}")
        if self.verdict == PASS and self.ratio is None:
            raise ValueError("a pass must have compared something")


class Side(msgspec.Struct, frozen=True):
    """One environment. ``name``: as it was asked for; ``commit``: empty where an interpreter was given.
    ``environment``: versions, as its worker tells them."""

    name: str
    commit: str
    python: str
    environment: dict[str, str] = {}


class GateRecord(msgspec.Struct, kw_only=True):
    """One run of the gate. ``load``: 1-minute load average before each restart and at the end. ``finished``: False
    where it was interrupted or its time ran out."""

    schema: str = SCHEMA
    suite: str
    started: str
    backend: str
    device: str
    machine: dict[str, Any]
    protocol: dict[str, Any]
    presets: dict[str, Any]
    sides: dict[str, Side]
    load: list[float]
    cases: list[GateCase] = []
    blocks: list[GateBlock] = []
    trials: list[Trial] = []
    lasting: list[Lasting] = []
    verdicts: list[CaseVerdict] = []
    seconds: float = 0.0
    finished: bool = False

    def conclude(self) -> None:
        """Trials and verdicts from the raw blocks; those of a slow clock are kept here, and are in no trial."""
        self.trials = trials(kept(self.blocks, default_mhz(self.machine))[0])
        self.verdicts = verdicts(self)

    def write(self, path: Path) -> None:
        self.conclude()
        write_atomically(path, msgspec.json.format(msgspec.json.encode(self), indent=1))

    def lines(self) -> list[str]:
        """One line for each case."""
        return [_line(self.cases[verdict.case], verdict) for verdict in self.verdicts]

    @property
    def exit_code(self) -> int:
        """4 on a regression. Nothing else blocks: what is inconclusive or not comparable is told."""
        return BLOCKED if any(verdict.verdict == REGRESSION for verdict in self.verdicts) else OK


def trial(case: int, stage: str, restart: int, blocks: Sequence[GateBlock]) -> Trial | None:
    """From the blocks of one case in one restart; None without a single whole round."""
    rounds: dict[int, dict[int, int]] = defaultdict(dict)
    for block in blocks:
        rounds[block.round][block.side] = block.ns
    logs = [math.log(ns[1] / ns[0]) for ns in rounds.values() if len(ns) == 2]
    if not logs:
        return None
    half = None
    if rank(len(logs)):
        _, low, high = interval(logs)
        half = (high - low) / 2
    return Trial(case, stage, restart, len(logs), median(logs), half)


def trials(blocks: Sequence[GateBlock]) -> list[Trial]:
    """One for each case and restart, in the order in which they were made."""
    by_restart: dict[tuple[int, str, int], list[GateBlock]] = defaultdict(list)
    for block in blocks:
        by_restart[block.case, block.stage, block.restart].append(block)
    made = (trial(*key, found) for key, found in by_restart.items())
    return [one for one in made if one is not None]


def verdicts(record: GateRecord) -> list[CaseVerdict]:
    """One for each case, from the trials and from what lasts."""
    why = {lasting.case: lasting.why for lasting in reversed(record.lasting)}  # the first reason is told
    found = []
    for case in range(len(record.cases)):
        if case in why:
            found.append(CaseVerdict(case, NOT_COMPARABLE, why[case]))
            continue
        mine = [one for one in record.trials if one.case == case]
        d = {stage: [one.d for one in mine if one.stage == stage] for stage in (SCREEN, CONFIRM)}
        widths = [math.inf if one.half_width is None else one.half_width for one in mine if one.stage == SCREEN]
        found.append(_told(case, find(d[SCREEN], d[CONFIRM], widths)))
    return found


def _told(case: int, finding: Finding) -> CaseVerdict:
    last = finding.confirm or finding.screen
    screen_p, confirm_p = (
        None if stage is None else min(stage.slower, stage.faster) for stage in (finding.screen, finding.confirm)
    )
    return CaseVerdict(
        case,
        finding.verdict,
        finding.why,
        None if last is None else math.exp(last.median),
        screen_p,
        confirm_p,
        None if finding.screen is None else finding.screen.spread,
    )


def _line(case: GateCase, verdict: CaseVerdict) -> str:
    ratio = "" if verdict.ratio is None else f" x{verdict.ratio:.3f}"
    return f"{case}: {verdict.verdict}{ratio}{': ' * bool(verdict.why)}{verdict.why}"


def is_record(path: Path) -> bool:
    """Whether a file is the record of a gate, of any version."""
    return family_of(path) == SCHEMA.partition("/")[0]


def read(path: Path) -> GateRecord:
    """Raises SpecError with one sentence where the file holds no record of a gate."""
    return read_versioned(path, GateRecord, SCHEMA, "record of a gate")
