"""The order of failures: the reference, exceptions, wrong numbers of direct clauses, small programs, the rest."""

from __future__ import annotations

from itertools import permutations
from typing import Any

from kvconform.errors import Exit, Raised
from kvconform.judging.mismatch import Kind, Mismatch
from kvconform.judging.order import by_use
from kvconform.judging.verdict import Outcome, Reason, Verdict


def broken(clause: str, kind: Kind, **facts: Any) -> Verdict:
    outcome = Outcome.CRASH if kind is Kind.DIED else Outcome.FAIL
    mismatch = Mismatch(kind=kind, **{"step": 1, "position": 4, **facts})
    return Verdict(clause=clause, config="c", backend="b", outcome=outcome, mismatch=mismatch, sentence=clause)


DIED = broken("layout.strides", Kind.DIED, ended=Exit(signal="SIGSEGV"), position=None)
RAISED = broken("batch.alone", Kind.RAISED, error=Raised("ValueError", "no"), position=None)
MALFORMED = broken("shape.output", Kind.SHAPE, position=None)
DECODE = broken("equivalence.decode", Kind.AGREEMENT, position=9, step=7)
SMALL = broken("shape.first-step", Kind.PARITY, position=1, step=0)
LARGE = broken("capacity.full", Kind.PARITY, position=17)
LEAKED = broken("shape.first-step", Kind.PARITY, position=0, step=0, earlier_programs=2)
SEEN = broken("causality.past-seen", Kind.SENSITIVE, position=1)
LENGTH = broken("shape.length", Kind.LENGTHS, position=None)
ORDERED = (DIED, RAISED, MALFORMED, DECODE, SMALL, LARGE, LEAKED, SEEN, LENGTH)


def test_the_order_is_that_of_use_whatever_the_order_of_judging() -> None:
    for first, second in permutations(ORDERED, 2):
        expected = tuple(sorted((first, second), key=ORDERED.index))
        assert by_use([first, second]) == expected
    assert by_use(ORDERED[::-1]) == ORDERED


def test_a_reference_that_others_cannot_be_judged_by_comes_first() -> None:
    reference = broken("equivalence.full-stable", Kind.AGREEMENT, position=12)
    unjudged = Verdict(
        clause="equivalence.decode",
        config="c",
        backend="b",
        outcome=Outcome.INCONCLUSIVE,
        reason=Reason.REFERENCE_BROKEN,
        sentence="not judged",
    )
    assert by_use([DIED, unjudged, reference]) == (reference, DIED)
    assert by_use([DIED, reference]) == (DIED, reference)


def test_what_is_not_broken_is_left_out() -> None:
    refuted = Verdict(
        clause="batch.invariant",
        config="c",
        backend="b",
        outcome=Outcome.REFUTED,
        mismatch=Mismatch(kind=Kind.BITWISE),
        sentence="differs",
    )
    passed = Verdict(clause="shape.output", config="c", backend="b", outcome=Outcome.PASS, compared=3)
    assert by_use([refuted, SMALL, passed]) == (SMALL,)
