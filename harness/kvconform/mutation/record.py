"""The record of an audit: a versioned JSON file, what it comes to, and the words for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import msgspec

from kvconform.files import read_versioned, write_versioned
from kvconform.judging.verdict import Outcome

SCHEMA = "kvconform-audit/2"


class AuditTrial(msgspec.Struct, frozen=True, kw_only=True):
    """One clause tried on one fault: an entry of the kill matrix."""

    effort: str
    """Name of the effort."""
    clause: str
    """Name of the clause."""
    outcome: Outcome
    """Outcome on the config that is named."""
    kills: bool = False
    """Whether the clause detected the fault: it was broken, the faulty path ran, and the fault was the cause."""
    by: str = ""
    """`judgement` if an output was wrong, `exception` if a legal step raised, the process died or hung; empty if the
    clause was not broken."""
    config: str = ""
    """Name of the config on which the clause was broken, or of the last one tried."""
    programs: int = 0
    """Number of programs, on all configs, up to the first that broke the clause."""
    seconds: float = 0.0
    """Time up to the first program that broke the clause, in seconds, without the start of workers."""
    ran: int | None = None
    """How often the faulty path changed something; null if the backend does not report it."""
    sentence: str = ""
    """What is wrong, or why there is no verdict; empty for a pass."""


class Audited(msgspec.Struct, kw_only=True):
    """What was found out about one fault, or about one clean backend."""

    name: str
    """Name of the class."""
    address: str
    """Address of the class."""
    conditional: bool
    """Whether the fault shows only under a condition."""
    classes: tuple[str, ...]
    """Classes of mistakes that the fault stands for."""
    clauses: tuple[str, ...]
    """Clauses that should detect the fault; empty: any."""
    bug: str
    """Link to the upstream bug that the fault is modelled on; empty without one."""
    sentence: str
    """What the fault does."""
    trials: list[AuditTrial] = []
    """The clauses tried."""
    unavailable: str = ""
    """Why it could not run here; empty if it ran."""

    def kill(self, effort: str) -> AuditTrial | None:
        """The trial that killed the fault with the fewest programs, among the clauses that it names."""
        return min((t for t in self._named(effort) if t.kills), key=lambda trial: trial.programs, default=None)

    def missed(self, effort: str) -> list[AuditTrial]:
        """The clauses that it names and that did not kill it."""
        return [trial for trial in self._named(effort) if self.clauses and not trial.kills]

    def _named(self, effort: str) -> list[AuditTrial]:
        return [t for t in self.trials if t.effort == effort and t.clause in (self.clauses or (t.clause,))]

    @property
    def alarms(self) -> list[AuditTrial]:
        """Of a control: what must not be there. A refuted guarantee is none: it is no non-conformance."""
        return [trial for trial in self.trials if trial.outcome.broken]


class Score(msgspec.Struct, frozen=True, kw_only=True):
    """How many faults of one kind were detected under one effort."""

    effort: str
    """Name of the effort."""
    conditional: bool
    """Whether the faults show only under a condition."""
    killed: int
    """Number of faults that were detected."""
    faults: int
    """Number of faults that ran."""
    programs: tuple[float, float] | None
    """Number of programs up to the detection: median and maximum; null if no fault was detected."""
    seconds: tuple[float, float] | None
    """Time up to the detection, in seconds: median and maximum; null if no fault was detected."""


class AuditRecord(msgspec.Struct, kw_only=True):
    """One audit: planted faults and clean backends, judged by clauses."""

    schema: str = SCHEMA
    """Name and version of this schema."""
    suite: str
    """Version of the suite."""
    faults: str
    """Address of the list of faults."""
    efforts: list[str]
    """Names of the efforts, in the order tried."""
    seed: int
    """Seed of the run."""
    names: list[str]
    """Prefixes that chose faults, or clauses of a fault; empty: all faults."""
    clauses: list[str]
    """Prefixes of the clauses that were tried on each fault; empty: those that a fault names."""
    shard: str
    """`i/n` for shard i of n; empty for a whole audit."""
    started: str
    """Date and time of the start, ISO 8601."""
    environment: dict[str, Any] = {}
    """Versions and machine, by name."""
    scores: list[Score] = []
    """Detected faults, by effort and kind."""
    audited: list[Audited] = []
    """The faults."""
    controls: list[Audited] = []
    """Clean backends, in which no clause may find a fault."""
    seconds: float = 0.0
    """Duration of the audit, in seconds."""
    finished: bool = False
    """Whether the audit was completed."""

    def write(self, path: Path) -> None:
        write_versioned(path, self)


def read(path: Path) -> AuditRecord:
    """Raises SpecError with one sentence where the file holds no audit."""
    return read_versioned(path, AuditRecord, SCHEMA, "audit")


# --- what it comes to ---
def scores(record: AuditRecord) -> list[Score]:
    """Unconditional and conditional faults apart, for each effort; faults that could not run here are not counted."""
    found = []
    for effort in record.efforts:
        for conditional in (False, True):
            faults = [one for one in record.audited if one.conditional is conditional and not one.unavailable]
            kills = [kill for one in faults if (kill := one.kill(effort)) is not None]
            programs, seconds = [kill.programs for kill in kills], [kill.seconds for kill in kills]
            score = Score(
                effort=effort,
                conditional=conditional,
                killed=len(kills),
                faults=len(faults),
                programs=(median(programs), max(programs)) if kills else None,
                seconds=(median(seconds), max(seconds)) if kills else None,
            )
            found.append(score)
    return found


def survivors(record: AuditRecord, effort: str) -> list[Audited]:
    return [one for one in record.audited if not one.unavailable and one.kill(effort) is None]


def exit_code(record: AuditRecord) -> int:
    """1 where a fault survives an effort or a control is detected, else 3 where one could not run here, else 0."""
    if any(survivors(record, effort) for effort in record.efforts) or any(one.alarms for one in record.controls):
        return 1
    return 3 if any(one.unavailable for one in (*record.audited, *record.controls)) else 0


# --- words ---
def lines(audited: Audited, efforts: Sequence[str]) -> Iterator[str]:
    """One line for each effort: what killed the fault and how fast, and which clauses that it names did not."""
    kind = ", ".join((*audited.classes, "conditional" if audited.conditional else "unconditional"))
    if audited.unavailable:
        yield f"{audited.name} ({kind}): not audited: {audited.unavailable}"
        return
    for effort in efforts:
        kill, missed = audited.kill(effort), audited.missed(effort)
        if kill is None:
            words = f"SURVIVES: {audited.sentence}"
        else:
            words = f"{kill.clause} [{kill.config}] after {kill.programs} programs, {kill.seconds:.2f} s"
        if missed:
            words += f" Missed by {'; '.join(f'{trial.clause} ({_why(trial)})' for trial in missed)}"
        yield f"{audited.name} ({kind}){'' if len(efforts) == 1 else f' {effort}'}: {words}"


def progress(fault: str, trial: AuditTrial) -> str:
    """One line for a clause that was tried on a fault."""
    if trial.kills:
        return (
            f"{fault}: {trial.clause} [{trial.config}] kills it after {trial.programs} programs, {trial.seconds:.2f} s"
        )
    return f"{fault}: {trial.clause} misses it after {trial.programs} programs ({_why(trial)})"


def _why(trial: AuditTrial) -> str:
    if trial.ran == 0:
        return f"{trial.outcome.value}: the faulty path never ran"
    return f"{trial.by}: {trial.sentence}" if trial.by else trial.outcome.value


def summary(record: AuditRecord) -> Iterator[str]:
    """The score, survivors, false alarms and what could not run."""
    for score in record.scores:
        if score.faults:
            kind = "conditional" if score.conditional else "unconditional"
            words = f"{score.effort}, {kind}: {score.killed} of {score.faults} killed"
            if score.programs is not None and score.seconds is not None:
                words += f"; programs to the kill: median {score.programs[0]:g}, at most {score.programs[1]:g}"
                words += f"; seconds: median {score.seconds[0]:.2f}, at most {score.seconds[1]:.2f}"
            yield words
    for effort in record.efforts:
        for one in survivors(record, effort):
            yield f"survives {effort}: {one.name}: {one.sentence}"
    for one in record.controls:
        for trial in one.alarms:
            yield f"false alarm: {one.name} ({one.sentence}): {trial.clause} [{trial.config}]: {trial.sentence}"
    for one in (*record.audited, *record.controls):
        if one.unavailable:
            yield f"not audited: {one.name}: {one.unavailable}"
