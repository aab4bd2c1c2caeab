"""The record of a gate run, ``kv-gate/2``: raw rounds first; every median and every verdict follows from them.

Restarts are numbered through: those of the screen, then those of the confirmation.
"""

from __future__ import annotations

import math
from pathlib import Path
from statistics import median

import msgspec

from kvconform.bench import record
from kvconform.bench.analysis.intervals import interval, log_ratios, rank, times
from kvconform.bench.gate.decision import (
    CONFIRM,
    NOT_COMPARABLE,
    PASS,
    REGRESSION,
    RESTARTS,
    SCREEN,
    VERDICTS,
    Finding,
    find,
)
from kvconform.bench.record import Case, Round, TimedRun
from kvconform.bench.worker.gpu import default_mhz, kept
from kvconform.files import family_of, read_versioned

SCHEMA = "kv-gate/2"
BASE, HEAD = SIDES = ("base", "head")
"""The arms of each case, in this order."""
OK, BLOCKED = 0, 4
"""Exit codes: 4 if a case is a regression."""


class Trial(msgspec.Struct, frozen=True, array_like=True):
    """One case in one restart."""

    case: int
    """Index into ``cases``."""
    restart: int
    """Index of the restart of the workers; those of the screen come first."""
    rounds: int
    """Number of rounds in which both sides count."""
    d: float
    """Median over the rounds of log(time(head) / time(base)) (no unit)."""
    half_width: float | None
    """Half-width of the 95 % interval of ``d`` within the restart (no unit); null with too few rounds."""

    @property
    def stage(self) -> str:
        return SCREEN if self.restart < RESTARTS[SCREEN] else CONFIRM


class NotComparable(msgspec.Struct, frozen=True):
    """A case whose times cannot be compared, whatever else was measured."""

    case: int
    """Index into ``cases``."""
    why: str
    """The reason, one sentence."""


class CaseVerdict(msgspec.Struct, frozen=True):
    """The verdict on one case."""

    case: int
    """Index into ``cases``."""
    verdict: str
    """One of ``decision.VERDICTS``."""
    why: str = ""
    """The reason, one sentence; empty for a pass."""
    ratio: float | None = None
    """time(head) / time(base) in the stage that decided (no unit); null if not measured."""
    screen_p: float | None = None
    """p of the sign-flip test in the screen, in the direction of its median (no unit); null if not measured."""
    confirm_p: float | None = None
    """p of the sign-flip test in the confirmation, in the direction of its median (no unit); null if not measured."""
    spread: float | None = None
    """Standard deviation of ``d`` between the restarts of the screen (no unit); null if not measured."""

    def __post_init__(self) -> None:
        if self.verdict not in VERDICTS:
            raise ValueError(f"unknown verdict {self.verdict!r}; known: {', '.join(VERDICTS)}")
        if self.verdict == PASS and self.ratio is None:
            raise ValueError("a pass must have compared something")


class Side(msgspec.Struct, frozen=True):
    """One environment."""

    name: str
    """The environment as it was given: a git ref, ``.`` or an interpreter."""
    commit: str
    """The commit, with a ``+`` for a changed working tree; empty for an interpreter."""
    python: str
    """Path of the interpreter."""


class GateRecord(TimedRun, kw_only=True):
    """One run of the gate. Trials and verdicts follow from the rounds."""

    schema: str = SCHEMA
    backend: str
    """Name of the backend; its arms are called ``base`` and ``head``."""
    sides: dict[str, Side]
    """The two environments, ``base`` and ``head``."""
    trials: list[Trial] = msgspec.field(default_factory=list)
    """One for each case and restart."""
    not_comparable: list[NotComparable] = msgspec.field(default_factory=list)
    """Cases whose times cannot be compared, with the reason."""
    verdicts: list[CaseVerdict] = msgspec.field(default_factory=list)
    """One for each case."""

    def conclude(self) -> None:
        """Trials and verdicts from the raw rounds; blocks of a slow clock are in no trial."""
        fast, _ = kept(self.rounds, default_mhz(self.machine))
        mine: dict[int, list[Round]] = {}
        for block in fast:
            mine.setdefault(block.case, []).append(block)
        self.trials = [one for case, blocks in sorted(mine.items()) for one in trials(case, self.cases[case], blocks)]
        self.verdicts = [self._verdict(case) for case in range(len(self.cases))]

    def _verdict(self, case: int) -> CaseVerdict:
        why = next((one.why for one in self.not_comparable if one.case == case), "")
        if why:
            return CaseVerdict(case, NOT_COMPARABLE, why)
        mine = [one for one in self.trials if one.case == case]
        d = {stage: [one.d for one in mine if one.stage == stage] for stage in (SCREEN, CONFIRM)}
        widths = [math.inf if one.half_width is None else one.half_width for one in mine if one.stage == SCREEN]
        return _verdict_of(case, find(d[SCREEN], d[CONFIRM], widths))

    def write(self, path: Path) -> None:
        self.conclude()
        record.write(self, path)

    def lines(self) -> list[str]:
        """One line for each case."""
        return [_line(self.cases[verdict.case], verdict) for verdict in self.verdicts]

    @property
    def exit_code(self) -> int:
        """4 on a regression. What is inconclusive or not comparable is shown and does not block."""
        return BLOCKED if any(verdict.verdict == REGRESSION for verdict in self.verdicts) else OK


def trials(number: int, case: Case, blocks: list[Round]) -> list[Trial]:
    """One for each restart that has a whole round, from the blocks of one case."""
    found = []
    for restart, logs in log_ratios(times(case, blocks), arm=1, reference=0).items():
        half = None
        if rank(len(logs)):
            _, low, high = interval(logs)
            half = (high - low) / 2
        found.append(Trial(number, restart, len(logs), median(logs), half))
    return found


def _verdict_of(case: int, finding: Finding) -> CaseVerdict:
    last = finding.confirm or finding.screen
    screen_p, confirm_p = (
        None if stage is None else min(stage.slower, stage.faster) for stage in (finding.screen, finding.confirm)
    )
    ratio = None if last is None else math.exp(last.median)
    spread = None if finding.screen is None else finding.screen.spread
    return CaseVerdict(case, finding.verdict, finding.why, ratio, screen_p, confirm_p, spread)


def _line(case: Case, verdict: CaseVerdict) -> str:
    ratio = "" if verdict.ratio is None else f" x{verdict.ratio:.3f}"
    why = f": {verdict.why}" if verdict.why else ""
    return f"{case.preset}: {case.arms[0].phase}({case.depth}): {verdict.verdict}{ratio}{why}"


def is_record(path: Path) -> bool:
    """Whether a file is the record of a gate, of any version."""
    return family_of(path) == SCHEMA.partition("/")[0]


def read(path: Path) -> GateRecord:
    """Raises SpecError with one sentence if the file holds no record of a gate."""
    return read_versioned(path, GateRecord, SCHEMA, "record of a gate")
