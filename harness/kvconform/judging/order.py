"""The order in which failures are read: the one that says most about the mistake first."""

from __future__ import annotations

from collections.abc import Sequence

from kvconform.judging.every_clause import BY_NAME
from kvconform.judging.mismatch import Kind
from kvconform.judging.verdict import Reason, Verdict

REFERENCE_CLAUSE = "equivalence.full-stable"
"""What a reference forward must hold, so that other clauses can be judged by it."""
VALUES = (Kind.PARITY, Kind.AGREEMENT, Kind.FINITE, Kind.GENERATED, Kind.SAME_TOKEN, Kind.LOG_PROBABILITY, Kind.CHOICE)
"""A wrong number, beside the right one."""
MALFORMED = (Kind.NO_OUTPUT, Kind.NOT_NUMERIC, Kind.SHAPE, Kind.DTYPE, Kind.TOKEN_ID)
DEPENDENCES = (Kind.INSENSITIVE, Kind.SENSITIVE)
DIRECT = ("equivalence", "definition")
"""The chapters that state the law itself. A clause of another chapter names circumstances, which may play no part."""
PLACES = {name: place for place, name in enumerate(BY_NAME)}


def by_use(verdicts: Sequence[Verdict]) -> tuple[Verdict, ...]:
    """The broken ones of one backend's verdicts, the most useful to a reader first.

    First a reference that cannot be one; then exceptions, deaths first, and malformed outputs; then wrong numbers,
    those of direct clauses first; then what follows from wrong numbers. Among equals a failure in a program of its own
    comes before one that needs earlier programs, and one on few tokens and after few steps before one on many.
    """
    unjudged = {verdict.config for verdict in verdicts if verdict.reason is Reason.REFERENCE_BROKEN}
    return tuple(sorted((one for one in verdicts if one.outcome.broken), key=lambda one: _rank(one, unjudged)))


def _rank(verdict: Verdict, unjudged: set[str]) -> tuple[int, ...]:
    mismatch = verdict.mismatch
    assert mismatch is not None
    tokens = len(PLACES) if mismatch.position is None else mismatch.position
    return (
        _urgency(verdict, unjudged),
        mismatch.earlier_programs,
        tokens,
        -1 if mismatch.step is None else mismatch.step,
        mismatch.row or 0,
        PLACES.get(verdict.clause, len(PLACES)),
    )


def _urgency(verdict: Verdict, unjudged: set[str]) -> int:
    mismatch = verdict.mismatch
    assert mismatch is not None
    direct = verdict.clause.partition(".")[0] in DIRECT
    ranks = (
        mismatch.kind is Kind.REFERENCE_FAILED or (verdict.clause == REFERENCE_CLAUSE and verdict.config in unjudged),
        bool(mismatch.ending),
        mismatch.kind is Kind.RAISED,
        mismatch.kind in MALFORMED,
        mismatch.kind in VALUES and direct,
        mismatch.kind in VALUES,
        mismatch.kind in DEPENDENCES,
    )
    return next((place for place, holds in enumerate(ranks) if holds), len(ranks))
