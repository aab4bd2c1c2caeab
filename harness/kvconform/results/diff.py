"""What moved between two runs of a backend: outcomes, coverage, claims, and how near errors come to their bounds.

What a cell came to is comparable only where both runs planned the same programs (``Verdict.digest``) on the same kind
of device, by the same suite: then the subject has changed. A pass under other programs is not compared. A failure under
other programs is a new failure: the subject breaks a clause, and the earlier run does not show that it did not before.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from typing import Any

import msgspec

from kvconform.judging.verdict import Outcome, Verdict
from kvconform.results.claims_diff import moved_claims
from kvconform.results.results import Results, counted


class Kind(Enum):
    """What moved. The order is that of reports: what a reader must act on comes first."""

    LOST_PASS = "lost pass"
    NEW_FAILURE = "new failure"
    LOST_CELL = "lost cell"
    FEWER_VALUES = "fewer values compared"
    NARROWED_CLAIM = "narrowed claim"
    UNAVAILABLE = "no longer available"
    LACKING = "cannot run here"
    STALE = "stale known failure"
    UNDECIDED = "undecided"
    OTHER_DEVICE = "other device"
    NOT_SELECTED = "not selected"
    FIXED = "fixed"
    OUTCOME = "changed outcome"
    NEW_CELL = "new cell"
    CHANGED_CLAIM = "changed claim"
    OTHER_SUITE = "other suite"
    OTHER_PROGRAMS = "other programs"
    CUT = "cut by the time limit"
    SOFTWARE = "other software"
    ERROR = "moved error"


class Difference(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One difference between two runs. Each kind sets the fields that it knows."""

    kind: Kind
    """What moved."""
    backend: str
    """Name of the backend."""
    clause: str = ""
    """Name of the clause, of a cell."""
    config: str = ""
    """Name of the config, of a cell."""
    was: Any = None
    """The outcome, number of compared values, value of the claim, or error in bounds, before; null: absent."""
    now: Any = None
    """The same, now."""
    name: str = ""
    """Name of the claim, or of the condition that differs."""
    lost: tuple[str, ...] = ()
    """What a claim that is a list no longer has."""
    under: tuple[str, ...] = ()
    """What else was asked than before, such as `other programs`; empty where the same was asked."""
    cells: int = 0
    """How many cells it concerns, where it concerns several."""
    of: int = 0
    """How many cells there are, in the run that is compared."""
    conditions: tuple[Difference, ...] = ()
    """Conditions that differ and explain why programs are others."""
    part: str = ""
    """Which part of the suite was judged, in words."""
    sentence: str = ""
    """What broke the clause, or why there is no verdict, in words."""


OTHER = "other programs"
NO_TIME = "programs that the baseline had no time for"
CONDITIONS = {"device": Kind.OTHER_DEVICE, "suite": Kind.OTHER_SUITE}
"""What makes passes incomparable, whatever the programs."""


def diff(before: Results, now: Results) -> list[Difference]:
    """The differences: outcomes, coverage, claims, and what could not be compared; in the order in which they are
    found."""
    found = [*_claims(before, now), *_conditions(before, now), *_software(before, now)]
    found += [Difference(kind=Kind.STALE, backend=now.backend, sentence=words) for words in now.stale]
    if now.unavailable and not before.unavailable:
        kind = Kind.LACKING if now.lacking else Kind.UNAVAILABLE
        return [*found, Difference(kind=kind, backend=now.backend, sentence=now.unavailable)]
    earlier = {verdict.key: verdict for verdict in before.verdicts}
    conditions = tuple(f"another {name}" for name in CONDITIONS if getattr(now, name) != getattr(before, name))
    other = cut = 0
    for verdict in now.verdicts:
        was = earlier.get(verdict.key)
        programs = () if was is None else _programs(verdict, was)
        found += _cell(now.backend, verdict, was, (*conditions, *programs))
        other += programs == (OTHER,)
        cut += verdict.cut
    whole = len(now.verdicts)
    if other:
        reasons = tuple(_reasons(before, now))
        kind = Kind.OTHER_PROGRAMS
        found.append(Difference(kind=kind, backend=now.backend, cells=other, of=whole, conditions=reasons))
    if cut:
        found.append(Difference(kind=Kind.CUT, backend=now.backend, cells=cut, of=whole))
    return [*found, *_gone(before, now)]


def _conditions(before: Results, now: Results) -> Iterator[Difference]:
    for name in CONDITIONS:
        yield from _condition(before, now, name)


def _condition(before: Results, now: Results, name: str) -> Iterator[Difference]:
    was, value = getattr(before, name), getattr(now, name)
    if was != value:
        kind = CONDITIONS.get(name, Kind.OTHER_PROGRAMS)
        yield Difference(kind=kind, backend=now.backend, name=name, was=was, now=value)


def _reasons(before: Results, now: Results) -> Iterator[Difference]:
    """Why cells may have other programs than before."""
    for name in ("suite", "effort", "seed"):
        yield from _condition(before, now, name)
    was, value = (results.environment.get("hypothesis") for results in (before, now))
    if was != value:
        yield Difference(kind=Kind.OTHER_PROGRAMS, backend=now.backend, name="hypothesis", was=was, now=value)
    if now.claims != before.claims:
        yield Difference(kind=Kind.OTHER_PROGRAMS, backend=now.backend, name="claims")
    if now.target is not None and before.target is not None and now.target.configs != before.target.configs:
        yield Difference(kind=Kind.OTHER_PROGRAMS, backend=now.backend, name="target.configs")


def _software(before: Results, now: Results) -> Iterator[Difference]:
    """Versions, and what else an environment names by a string, that both runs recorded."""
    for name in sorted(before.environment.keys() & now.environment.keys() - {"platform"}):
        was, value = before.environment[name], now.environment[name]
        if was != value and isinstance(was, str) and isinstance(value, str):
            yield Difference(kind=Kind.SOFTWARE, backend=now.backend, name=name, was=was, now=value)


def _programs(verdict: Verdict, was: Verdict) -> tuple[str, ...]:
    """In what the programs that decided this verdict differ from before; cells without programs do not tell."""
    if verdict.digest and was.digest and verdict.digest != was.digest:
        return (OTHER,)
    if was.cut and (verdict.found_after or 0) > was.programs:
        return (NO_TIME,)
    return ()


def _cell(backend: str, verdict: Verdict, was: Verdict | None, under: tuple[str, ...]) -> Iterator[Difference]:
    """What became of a cell. ``under``: what else was asked than before."""
    now, old = verdict.outcome, None if was is None else was.outcome

    def found(kind: Kind, *, told: bool = True, asked: tuple[str, ...] = ()) -> Difference:
        return Difference(
            kind=kind,
            backend=backend,
            clause=verdict.clause,
            config=verdict.config,
            was=None if old is None else old.value,
            now=now.value,
            under=asked,
            sentence=verdict.sentence if told else "",
        )

    if was is None or old is not Outcome.PASS:
        if now.broken and (old is None or not old.broken):
            yield found(Kind.NEW_FAILURE)
        elif not now.broken and old is not now:
            fixed = now is Outcome.PASS and old is not None and old.broken
            yield found(Kind.NEW_CELL if old is None else Kind.FIXED if fixed else Kind.OUTCOME, told=False)
    elif now is Outcome.PASS:
        if not under and not verdict.cut and verdict.compared < was.compared:
            yield msgspec.structs.replace(found(Kind.FEWER_VALUES), was=was.compared, now=verdict.compared)
        if not under and None not in (verdict.worst, was.worst) and verdict.worst != was.worst:
            yield msgspec.structs.replace(found(Kind.ERROR), was=was.worst, now=verdict.worst)
    elif now is Outcome.INCONCLUSIVE or (now is Outcome.NOT_EXERCISED and verdict.cut):
        yield found(Kind.UNDECIDED)
    elif not under:
        yield found(Kind.LOST_PASS)
    else:
        kind = Kind.NEW_FAILURE if now.broken else Kind.OUTCOME if now is Outcome.REFUTED else Kind.UNDECIDED
        yield found(kind, asked=under)


def _gone(before: Results, now: Results) -> Iterator[Difference]:
    """The cells that were not judged any more; together where this run is a part, or of another suite."""
    after = {verdict.key for verdict in now.verdicts}
    gone = [was for was in before.verdicts if was.key not in after and was.outcome is not Outcome.UNSUPPORTED]
    part = now.selection or (f"dtypes {', '.join(now.dtypes)}" if now.dtypes != before.dtypes else "")
    if gone and now.suite != before.suite:
        yield Difference(kind=Kind.OTHER_SUITE, backend=now.backend, cells=len(gone))
    elif gone and part:
        yield Difference(kind=Kind.NOT_SELECTED, backend=now.backend, cells=len(gone), part=part)
    else:
        for was in gone:
            yield Difference(
                kind=Kind.LOST_CELL, backend=now.backend, clause=was.clause, config=was.config, was=was.outcome.value
            )


def _claims(before: Results, now: Results) -> Iterator[Difference]:
    for moved in moved_claims(now.claims, before.claims):
        kind = Kind.NARROWED_CLAIM if moved.narrowed else Kind.CHANGED_CLAIM
        yield Difference(kind=kind, backend=now.backend, name=moved.name, was=moved.was, now=moved.now, lost=moved.lost)


# --- words ---
def words(difference: Difference) -> str:
    """A difference as a sentence."""
    one = difference
    cell = f"{one.clause} [{one.config}]"
    match one.kind:
        case Kind.STALE:
            return f"stale known failure: {one.sentence}"
        case Kind.UNAVAILABLE | Kind.LACKING:
            return f"{one.backend} is no longer available: {one.sentence}"
        case Kind.NARROWED_CLAIM | Kind.CHANGED_CLAIM if one.lost:
            return f"{one.backend} no longer claims {one.name}: {', '.join(one.lost)}"
        case Kind.NARROWED_CLAIM | Kind.CHANGED_CLAIM:
            verb = "narrowed" if one.kind is Kind.NARROWED_CLAIM else "changed"
            return f"{one.backend} {verb} {one.name} from {_said(one.was)} to {_said(one.now)}"
        case Kind.OTHER_DEVICE | Kind.OTHER_SUITE if one.name:
            return f"{_differs(one)}: passes are not compared"
        case Kind.SOFTWARE:
            return f"{one.name} is {one.now}, was {one.was}"
        case Kind.OTHER_SUITE:
            return f"{counted(one.cells, 'cell')} of the baseline not judged: the suites differ"
        case Kind.NOT_SELECTED:
            return f"{counted(one.cells, 'cell')} of the baseline not judged: only {one.part}"
        case Kind.OTHER_PROGRAMS:
            reasons = "; ".join(map(_differs, one.conditions)) or "the strategies have changed"
            return f"{one.cells} of {counted(one.of, 'cell')} had other programs: {reasons}"
        case Kind.CUT:
            cut = f"{one.cells} of {counted(one.of, 'cell')} cut"
            return f"{cut}: the time limit ended before all planned programs were judged"
        case Kind.LOST_CELL:
            return f"{cell}: was {one.was}, is gone"
        case Kind.FEWER_VALUES:
            return f"{cell}: compared {one.now} values, was {one.was}"
        case Kind.ERROR:
            return f"{cell}: the largest error is {one.now:.2g} bounds, was {one.was:.2g}"
    asked = f" under {' and '.join(one.under)}" if one.under else ""
    told = f": {one.sentence}" if one.sentence else ""
    return f"{cell}: {one.was or 'absent'} -> {one.now}{asked}{told}"


def _differs(condition: Difference) -> str:
    match condition.name:
        case "claims":
            return "the claims differ"
        case "target.configs":
            return "the target's configs differ"
    return f"{condition.name} is {condition.now}, in the baseline {condition.was}"


def _said(value: Any) -> str:
    return "unlimited" if value is None else str(value)
