"""Mismatches and reasons that were never found, for verdicts that are written by hand."""

from __future__ import annotations

from typing import Any

from kvconform.errors import Exit, Raised
from kvconform.judging.mismatch import Kind, Mismatch
from kvconform.judging.verdict import Outcome, Reason

WRONG = Mismatch(
    kind=Kind.PARITY,
    program=1,
    step=2,
    call="append 1 to a of 2 rows",
    row=1,
    position=7,
    column=0,
    part="head",
    head=3,
    element=5,
    got=-0.4482,
    want=-0.4266,
    bound=7.4e-07,
)
RAISED = Mismatch(kind=Kind.RAISED, program=0, step=1, call="append 1 to a", error=Raised("RuntimeError", "no"))
DIED = Mismatch(kind=Kind.DIED, program=0, step=3, call="reset a", ended=Exit(signal="SIGSEGV"))
TIMED_OUT = Mismatch(kind=Kind.TIMED_OUT, program=0, step=2, call="append 1 to a", ended=Exit(timeout=30.0))


def cause(outcome: Outcome) -> dict[str, Any]:
    """The fields of a verdict that its outcome demands."""
    match outcome:
        case Outcome.FAIL | Outcome.REFUTED | Outcome.KNOWN_FAILURE:
            return {"mismatch": WRONG}
        case Outcome.CRASH:
            return {"mismatch": DIED}
        case Outcome.TIMEOUT:
            return {"mismatch": TIMED_OUT}
        case Outcome.UNSUPPORTED:
            return {"reason": Reason.ABILITY}
        case Outcome.NOT_EXERCISED:
            return {"reason": Reason.FALLBACK}
        case Outcome.INCONCLUSIVE:
            return {"reason": Reason.NOT_CONFIRMED}
    return {}
