"""A stored counterexample of a serving engine, run again."""

from __future__ import annotations

import secrets
from contextlib import closing

import msgspec

from kvconform.judging.mismatch import Kind, Mismatch
from kvconform.serving.counterexample import ServingCounterexample
from kvconform.serving.judge import judged
from kvconform.serving.noise import Calibration, calibrate
from kvconform.serving.process import EngineDied, opened
from kvconform.serving.registry import referenced
from kvconform.serving.search import AGAIN
from kvconform.serving.session import Limits, Session
from kvconform_specs.serving.clauses import BY_NAME


def replayed(found: ServingCounterexample, address: str, limits: Limits) -> Mismatch | None:
    """What breaks now, under token ids that the engine has not seen. It is tried several times: what depends on the
    ids, or on other requests in time, does not fail each time.

    Raises BackendUnavailable, Spent.
    """
    address, model = referenced(address)
    model, by_model = model or referenced(found.engine)[1], BY_NAME[found.clause].by_model
    engine = opened(address)
    try:
        with closing(Session(engine, limits, secrets.randbits(31), model, by_model=by_model)) as session:
            gauge = calibrate(session)
            tries = (_once(found, session, gauge) for _ in range(AGAIN))
            return next((mismatch for mismatch in tries if mismatch is not None), None)
    finally:
        engine.close()


def _once(found: ServingCounterexample, session: Session, gauge: Calibration) -> Mismatch | None:
    clause, ran = BY_NAME[found.clause], [*found.before, found.program]
    for number, program in enumerate(ran):
        try:
            mismatch = judged(clause, program.renamed(session.fresh()), session, gauge).mismatch
        except EngineDied as death:
            return Mismatch(kind=Kind.NO_ANSWER, program=0, error=death.error, ended=death.ended)
        if mismatch is not None:
            return msgspec.structs.replace(mismatch, earlier_programs=number)
    return None
