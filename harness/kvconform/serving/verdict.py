"""The verdict on one clause of one engine, from what a search has found."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from kvconform.judging.mismatch import Kind
from kvconform.judging.render import render
from kvconform.judging.verdict import Outcome, Reason, Verdict
from kvconform.search.cell import OUTCOMES
from kvconform.search.effort import Effort
from kvconform.serving.counterexample import ServingCounterexample
from kvconform.serving.noise import Calibration
from kvconform.serving.search import Search
from kvconform.serving.session import Session
from kvconform_specs import SUITE_VERSION
from kvconform_specs.clause import Level
from kvconform_specs.serving.clauses import CONFIG, Served, ServingClause
from kvconform_specs.serving.program import Program, described

Why = tuple[Reason, str]
NEED_BOUND = {Served.COLD, Served.PROMPT}
"""The relations that compare within the bound."""
EVIDENCE = {
    "hit": "the engine reported no token that was read from the prefix cache",
    "preemption": "the engine reported no preemption",
}


@dataclass
class Trial:
    """What is judged: one engine, under its address, with what was measured of it. ``history``: what it was sent."""

    session: Session
    gauge: Calibration
    address: str
    folder: Path
    effort: Effort
    seed: int
    history: list[Program]

    def judge(self, clause: ServingClause) -> Verdict:
        """Counterexamples go to the folder."""
        began = time.perf_counter()
        search = Search(clause, self.session, self.gauge, self.effort, self.seed, self.history)
        why = self._unsupported(clause)
        if why is not None:
            return self._verdict(search, began, Outcome.UNSUPPORTED, why)
        why = self._blind(clause)
        if why is not None:
            return self._verdict(search, began, Outcome.INCONCLUSIVE, why)
        search.run()
        if search.best is not None:
            return self._broken(search, began)
        if NEED_BOUND & set(clause.relations) and self.gauge.bound is None:
            reason = Reason.BLIND if self.gauge.changes else Reason.NO_REFERENCE
            return self._verdict(search, began, Outcome.INCONCLUSIVE, (reason, self.gauge.blind))
        why = self._not_exercised(search)
        return self._verdict(search, began, Outcome.NOT_EXERCISED if why else Outcome.PASS, why)

    def _unsupported(self, clause: ServingClause) -> Why | None:
        abilities = self.session.facts.abilities
        if clause.by_model and self.session.model is None:
            return Reason.ABILITY, "no model was given: --model DIRECTORY, the weights that the engine serves"
        missing = [need for need in clause.needs if need not in abilities]
        if missing:
            return Reason.ABILITY, f"the engine has no {', no '.join(missing)}"
        if clause.needs_any and abilities.isdisjoint(clause.needs_any):
            return Reason.ABILITY, f"the engine has none of {', '.join(clause.needs_any)}"
        return None if clause.possible(self.session.sizes) else (Reason.ABILITY, clause.otherwise)

    def _blind(self, clause: ServingClause) -> Why | None:
        """Why nothing could be compared; counts and refusals need no bound."""
        gauge = self.gauge
        reason = Reason.BLIND if gauge.changes else Reason.NO_REFERENCE
        needs = set(clause.relations)
        if needs <= NEED_BOUND and gauge.bound is None:
            return reason, gauge.blind
        model = self.session.model
        if clause.by_model and model is not None and model.power.blind:
            return Reason.BLIND, model.power.blind
        if Served.RESCORED in needs and gauge.decode_bound is None:
            return reason, gauge.blind or f"the floor of {gauge.floor:.2g} is too high for the effect of a wrong token"
        return None

    def _not_exercised(self, search: Search) -> Why | None:
        """Why a search that found nothing is no pass."""
        ended = "; a limit ended the clause before" if search.cut else ""
        if search.total.void and (search.lacking or not search.total.compared):
            words = f"{search.total.void} answers without the prefix cache were read from it all the same"
            return Reason.NO_REFERENCE, words
        if not search.total.compared:
            return (Reason.LIMIT if search.cut else Reason.NOTHING_COMPARED), f"nothing was compared{ended}"
        if search.lacking:
            return Reason.NO_EVIDENCE, " and ".join(EVIDENCE[kind] for kind in search.lacking) + ended
        if search.missing:
            return Reason.SITUATION, f"no program has {', nor '.join(search.missing)}{ended}"
        return None

    def _broken(self, search: Search, began: float) -> Verdict:
        assert search.best is not None
        broken = search.best.mismatch
        if search.clause.level is Level.SHOULD and broken.kind is not Kind.NO_ANSWER:
            return self._verdict(search, began, Outcome.REFUTED)  # what holds at times is no guarantee
        if broken.ended is not None and broken.ended.from_outside:
            reason = Reason.OUT_OF_MEMORY if broken.ended.oom else Reason.KILLED
            return self._verdict(search, began, Outcome.INCONCLUSIVE, (reason, render(broken)))
        if not search.best.confirmed and search.effort.shrink and broken.kind is not Kind.NO_ANSWER:
            words = f"failed once, and held when tried again, alone and after what ran before: {render(broken)}"
            return self._verdict(search, began, Outcome.INCONCLUSIVE, (Reason.NOT_CONFIRMED, words))
        return self._verdict(search, began, OUTCOMES[broken.ending])

    def _verdict(self, search: Search, began: float, outcome: Outcome, why: Why | None = None) -> Verdict:
        best = search.best if why is None else None
        judged = outcome is not Outcome.UNSUPPORTED
        return Verdict(
            clause=search.clause.name,
            config=CONFIG,
            backend=self.address,
            outcome=outcome,
            reason=None if why is None else why[0],
            mismatch=None if best is None else best.mismatch,
            sentence=why[1] if why is not None else "" if best is None else render(best.mismatch),
            steps="" if best is None else described(best.program),
            counterexample="" if best is None or not search.effort.shrink else self._stored(search, outcome),
            compared=search.total.compared,
            programs=search.programs,
            structures=search.programs,
            planned=len(search.planned),
            digest=digest(search.planned) if search.planned else "",
            cut=search.cut,
            situations=dict(search.situations) if judged else {},
            worst=search.total.worst,
            found_after=search.found_after,
            seconds=round(time.perf_counter() - began, 3),
        )

    def _stored(self, search: Search, outcome: Outcome) -> str:
        assert search.best is not None
        found = ServingCounterexample(
            suite=SUITE_VERSION,
            clause=search.clause.name,
            engine=self.address,
            outcome=outcome,
            mismatch=search.best.mismatch,
            sentence=render(search.best.mismatch),
            before=search.best.before,
            program=search.best.program,
            bound=self.gauge.bound or 0.0,
            reduced=search.reduced,
        )
        return found.write(self.folder).name


def digest(programs: Sequence[Program]) -> str:
    """16 hexadecimal digits: equal digests mean equal programs."""
    return hashlib.sha256(msgspec.json.encode(programs)).hexdigest()[:16]
