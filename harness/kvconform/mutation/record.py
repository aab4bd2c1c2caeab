"""The record of an audit: a versioned JSON file, what it comes to, and the words for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import msgspec

from kvconform.files import read_versioned, write_atomically
from kvconform.judging.verdict import Outcome

SCHEMA = "kvconform-audit/2"


class AuditTrial(msgspec.Struct, frozen=True, kw_only=True):
    """One clause tried on one fault: an entry of the kill matrix.

    kills: it broke, the faulty path ran, and it broke for a reason of its own: see ``audit``. by: ``judgement`` of what
    came out, or ``exception`` (a legal step raised, the process died or hung); empty where the clause was not broken.
    config: that it was broken on, or the last one tried. programs, seconds: up to the first program that broke it, all
    configs together, without starting workers. ran: how often the faulty path changed something, where the backend
    tells.
    """

    effort: str
    clause: str
    outcome: Outcome
    kills: bool = False
    by: str = ""
    config: str = ""
    programs: int = 0
    seconds: float = 0.0
    ran: int | None = None
    sentence: str = ""


class Audited(msgspec.Struct, kw_only=True):
    """What was found out about one fault, or about a control. clauses: those that it names; none: any may kill it.

    unavailable: why it could not run here.
    """

    name: str
    address: str
    conditional: bool
    classes: tuple[str, ...]
    clauses: tuple[str, ...]
    bug: str
    sentence: str
    trials: list[AuditTrial] = []
    unavailable: str = ""

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
    """Faults of one kind under one effort; programs and seconds to the kill: median and largest, of those killed."""

    effort: str
    conditional: bool
    killed: int
    faults: int
    programs: tuple[float, float] | None
    seconds: tuple[float, float] | None


class AuditRecord(msgspec.Struct, kw_only=True):
    """What a file holds. faults: the address of their list. shard: ``i/n`` where it is one, else empty."""

    schema: str = SCHEMA
    suite: str
    faults: str
    efforts: list[str]
    seed: int
    names: list[str]
    every: bool
    shard: str
    started: str
    environment: dict[str, Any] = {}
    scores: list[Score] = []
    audited: list[Audited] = []
    controls: list[Audited] = []
    seconds: float = 0.0
    finished: bool = False

    def write(self, path: Path) -> None:
        write_atomically(path, msgspec.json.format(msgspec.json.encode(self), indent=1))


def read(path: Path) -> AuditRecord:
    """Raises SpecError with one sentence where the file holds no audit."""
    return read_versioned(path, AuditRecord, SCHEMA, "audit")


def schema() -> dict[str, Any]:
    """The JSON Schema of an audit's file."""
    return msgspec.json.schema(AuditRecord)


# --- what it comes to ---
def scores(record: AuditRecord) -> list[Score]:
    """Blatant and conditional faults apart, effort by effort; what could not run here counts nowhere."""
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


def _why(trial: AuditTrial) -> str:
    if trial.ran == 0:
        return f"{trial.outcome.value}: the faulty path never ran"
    return f"{trial.by}: {trial.sentence}" if trial.by else trial.outcome.value


def summary(record: AuditRecord) -> Iterator[str]:
    """The score, survivors, false alarms and what could not run."""
    for score in record.scores:
        if score.faults:
            words = f"{score.effort}, {'conditional' if score.conditional else 'unconditional'}: {score.killed} of {score.faults} killed"
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
