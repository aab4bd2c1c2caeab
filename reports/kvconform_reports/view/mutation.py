"""The audit for the report: mutation scores, survivors, and the kill matrix of faults by clauses."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kvconform.mutation import record as audit_record
from kvconform.mutation.record import Audited, AuditRecord, AuditTrial
from kvconform_reports.view.outcomes import address, percent, short, when
from kvconform_specs.clauses import BY_NAME

PITCH, LEFT, TOP = 13, 208, 132  # pixels between marks, and for the names of faults and clauses
LONGEST_NAME = 36


@dataclass(frozen=True)
class Score:
    effort: str
    kind: str
    killed: int
    faults: int
    share: str
    programs: str
    seconds: str


@dataclass(frozen=True)
class Missed:
    """A surviving fault, or a detected control, with the clauses responsible. ``trials``: (clause, reason)."""

    name: str
    kind: str
    sentence: str
    bug: str
    link: str
    efforts: str
    trials: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Matrix:
    """Faults by clauses for one effort, as SVG paths. ``killed``: by a clause listed for the fault; ``also``: by
    another clause; ``missed``: not killed by a listed clause."""

    effort: str
    width: int
    height: int
    clauses: tuple[tuple[int, str], ...]
    faults: tuple[tuple[int, str], ...]
    bands: str
    killed: str
    also: str
    missed: str
    left: int = LEFT
    top: int = TOP


@dataclass(frozen=True)
class Fault:
    """One fault, for each effort: (the first kill, other killing clauses, listed clauses that missed it)."""

    name: str
    kind: str
    sentence: str
    bug: str
    link: str
    efforts: tuple[tuple[str, AuditTrial | None, tuple[str, ...], tuple[str, ...]], ...]


@dataclass(frozen=True)
class Mutation:
    facts: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    scores: tuple[Score, ...]
    survivors: tuple[Missed, ...]
    alarms: tuple[Missed, ...]
    controls: int
    unavailable: tuple[tuple[str, str], ...]
    matrices: tuple[Matrix, ...]
    faults: tuple[Fault, ...]


def mutation(record: AuditRecord, suites: Iterable[str] = ()) -> Mutation:
    """``suites``: the suite versions of the results in the same report."""
    notes = [] if record.finished else ["This audit did not finish: the following is incomplete."]
    if record.shard:
        notes.append(f"This is shard {record.shard} of an audit.")
    if record.names:
        notes.append(f"Only faults whose name starts with {' or '.join(record.names)} were audited.")
    if others := sorted(set(suites) - {record.suite}):
        notes.append(f"The audit is for suite {record.suite}, the results are for suite {', '.join(others)}.")
    every = (*record.audited, *record.controls)
    return Mutation(
        facts=(
            ("faults", record.faults),
            ("suite", record.suite),
            ("seed", str(record.seed)),
            (
                "clauses tried",
                ", ".join(record.clauses) or ("all" if record.clauses else "those listed for each fault"),
            ),
            ("started", when(record.started)),
        ),
        notes=tuple(notes),
        scores=tuple(_score(score) for score in record.scores if score.faults),
        survivors=tuple(_survivors(record)),
        alarms=tuple(_missed(one, one.alarms, "") for one in record.controls if one.alarms),
        controls=sum(not one.unavailable for one in record.controls),
        unavailable=tuple((one.name, one.unavailable) for one in every if one.unavailable),
        matrices=tuple(_matrix(record, effort) for effort in record.efforts if any(a.trials for a in record.audited)),
        faults=tuple(_fault(one, record.efforts) for one in record.audited if not one.unavailable),
    )


def _score(score: audit_record.Score) -> Score:
    programs, seconds = (
        f"{form.format(pair[0])}, at most {form.format(pair[1])}" if pair else ""
        for pair, form in ((score.programs, "{:g}"), (score.seconds, "{:.2f}"))
    )
    kind, share = "conditional" if score.conditional else "unconditional", percent(score.killed, score.faults)
    return Score(score.effort, kind, score.killed, score.faults, share, programs, seconds)


def _survivors(record: AuditRecord) -> Iterable[Missed]:
    """Faults that some effort did not kill, with the trials of the last such effort."""
    efforts: dict[str, list[str]] = {}
    faults = {}
    for effort in record.efforts:
        for one in audit_record.survivors(record, effort):
            efforts.setdefault(one.name, []).append(effort)
            faults[one.name] = one
    for name, one in faults.items():
        last = efforts[name][-1]
        tried = [trial for trial in one.trials if trial.effort == last and trial.clause in (one.clauses or ())]
        yield _missed(one, tried, ", ".join(efforts[name]))


def _missed(one: Audited, trials: Sequence[AuditTrial], efforts: str) -> Missed:
    why = tuple((trial.clause, _why(trial)) for trial in trials)
    link = address(one.bug)
    return Missed(one.name, _kind(one), one.sentence, short(link) or one.bug, link, efforts, why)


def _why(trial: AuditTrial) -> str:
    where = f" under {trial.config}" if trial.config else ""
    if trial.ran == 0:
        return f"{trial.outcome.value}{where}: the faulty path never ran"
    return f"{trial.outcome.value}{where}" + (f": {trial.sentence}" if trial.sentence else "")


def _kind(one: Audited) -> str:
    return ", ".join(("conditional" if one.conditional else "unconditional", *one.classes))


def _matrix(record: AuditRecord, effort: str) -> Matrix:
    audited = [one for one in record.audited if not one.unavailable]
    tried = {trial.clause for one in audited for trial in one.trials if trial.effort == effort}
    clauses = [name for name in BY_NAME if name in tried] + sorted(tried - set(BY_NAME))
    column = {name: LEFT + PITCH * i for i, name in enumerate(clauses)}
    killed, also, missed = [], [], []
    width = LEFT + PITCH * len(clauses) + 72  # the last name is slanted to the right
    for number, one in enumerate(audited):
        y = PITCH * number
        for trial in (trial for trial in one.trials if trial.effort == effort):
            x, named = column[trial.clause], not one.clauses or trial.clause in one.clauses
            if trial.kills and named:
                killed.append(f"M{x + 2} {y + 2}h9v9h-9z")
            elif trial.kills:
                also.append(f"M{x + 5} {y + 5}h3v3h-3z")
            elif named:
                missed.append(f"M{x + 3} {y + 3}l7 7m0-7l-7 7")
    return Matrix(
        effort=effort,
        width=width,
        height=PITCH * len(audited),
        clauses=tuple((column[name], name) for name in clauses),
        faults=tuple((PITCH * i, _cut(one.name)) for i, one in enumerate(audited)),
        bands="".join(f"M0 {PITCH * i}h{width}v{PITCH}h-{width}z" for i in range(0, len(audited), 2)),
        killed="".join(killed),
        also="".join(also),
        missed="".join(missed),
    )


def _cut(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"


def _fault(one: Audited, efforts: Sequence[str]) -> Fault:
    found = []
    for effort in efforts:
        first = one.kill(effort)
        others = (t.clause for t in one.trials if t.kills and t.effort == effort and (not first or t is not first))
        found.append((effort, first, tuple(others), tuple(trial.clause for trial in one.missed(effort))))
    link = address(one.bug)
    return Fault(one.name, _kind(one), one.sentence, short(link) or one.bug, link, tuple(found))
