"""``run_cell``: one clause on one backend under one config.

A first failure freezes its variant, so that shrinking stays meaningful. What shrinking found is confirmed on a fresh
process; if it passes there, state has leaked from an earlier program, and the counterexample becomes the shortest
list of programs that fails on a fresh process.

Where a step raised what has been shrunk and confirmed for another clause, the program found there is run: if it raises
the same, it is the counterexample, and nothing is shrunk again.
"""

from __future__ import annotations

import time
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hypothesis.errors import Flaky
from hypothesis.strategies import SearchStrategy
from msgspec.structs import replace

from kvconform.errors import WorkerDied
from kvconform.judging.mismatch import Kind, Mismatch, died
from kvconform.judging.render import render
from kvconform.judging.verdict import Outcome, Reason, Verdict
from kvconform.search.blame import excuse
from kvconform.search.counterexample import Counterexample, attempt, frozen, replayed, steps
from kvconform.search.digest import digest
from kvconform.search.effort import GUARANTEE_SECONDS, GUARANTEE_TRIALS, REBUILDS, SHRINK_SECONDS, SHRINK_TRIALS, Effort
from kvconform.search.shrink import reduced_death, reduced_list
from kvconform.search.situations import FURTHER, Situations
from kvconform.worker.client import WorkerClient, unproven
from kvconform_specs import SUITE_VERSION
from kvconform_specs.clause import Case, Clause, Level
from kvconform_specs.config import Config
from kvconform_specs.program import Append, Program
from kvconform_specs.strategies import drawn, explore

OUTCOMES = {"": Outcome.FAIL, "crash": Outcome.CRASH, "timeout": Outcome.TIMEOUT}
Why = tuple[Reason, str]
"""Why a cell has no verdict, and that in words."""


Key = tuple[str, str]
"""The names of a cell's clause and config, as in ``Verdict.key``."""


@dataclass(frozen=True)
class Cell:
    """What is asked: a clause of a backend, under a config that has a name."""

    clause: Clause
    config: Config
    config_name: str

    @property
    def key(self) -> Key:
        return self.clause.name, self.config_name


class _Stop(Exception):
    """Tells Hypothesis that a trial broke the clause."""


def run_cell(cell: Cell, client: WorkerClient, effort: Effort, seed: int, folder: Path) -> Verdict:
    """Searches for a case that breaks the clause. Counterexamples go to ``folder``.

    Raises BackendUnavailable where the backend cannot run here at all.
    """
    began = time.perf_counter()
    search = _Search(cell, client, effort, seed, began)
    why = unsupported(cell, client)
    if why is None:
        try:
            refused = client.build(cell.config)
        except WorkerDied as death:
            smallest = Case((Program(cell.config, (Append("a", (1,), 0),)),))
            search.best = smallest, died(death)
            return search.conclude(folder)
        why = None if refused is None else (Reason.REFUSED, refused)
    if why is not None:
        return search.verdict(Outcome.UNSUPPORTED, why)
    search.run()
    runtime_info = client.runtime_info(cell.config)
    fallback = runtime_info.get("fallback")
    if fallback:  # also where it broke the clause: what broke it is not what the backend's name promises
        return search.verdict(Outcome.NOT_EXERCISED, (Reason.FALLBACK, f"not tested: {fallback}"))
    if search.best is not None:
        return search.conclude(folder)
    if search.compared == 0 and "failed" not in runtime_info:
        return search.verdict(Outcome.NOT_EXERCISED, (Reason.NOTHING_COMPARED, "nothing was compared"))
    missing = search.situations.missing()
    if missing:
        ended = "; time ended before" if search.cut else ""
        return search.verdict(
            Outcome.NOT_EXERCISED, (Reason.SITUATION, f"no program has {', nor '.join(missing)}{ended}")
        )
    unknown = unproven(runtime_info, client.spec.device)
    if unknown:
        return search.verdict(Outcome.NOT_EXERCISED, (Reason.UNKNOWN_RUNTIME, unknown))
    return search.verdict(Outcome.PASS)


def unsupported(cell: Cell, client: WorkerClient) -> Why | None:
    """Why the backend's claims leave this cell out, or None."""
    claims, config = client.claims, cell.config
    if claims.reference == "self" and cell.clause.blind and not client.reference_address:
        return Reason.REFERENCE, "the clause is about the reference, which is the target's own forward"
    if config.profile not in claims.profiles:
        return Reason.PROFILE, f"claims no {config.profile} profile"
    if config.dtype not in claims.dtypes:
        return Reason.DTYPE, f"claims no {config.dtype}"
    if claims.interface == "generation" and "generate" not in cell.clause.needs:
        return Reason.ABILITY, "only generates"
    missing = [need for need in cell.clause.needs if not claims.can(need)]
    if missing:
        return Reason.ABILITY, f"claims no {', no '.join(missing)}"
    if cell.clause.needs_any and not any(claims.can(need) for need in cell.clause.needs_any):
        return Reason.ABILITY, f"claims none of {', '.join(cell.clause.needs_any)}"
    return None


class _Search:
    """The state of one cell's search."""

    def __init__(self, cell: Cell, client: WorkerClient, effort: Effort, seed: int, began: float) -> None:
        self.cell, self.client, self.effort = cell, client, effort
        self.seed = zlib.crc32(f"{cell.clause.name} {cell.config_name} {seed}".encode())
        self.began = began
        self.planned: list[Case] = []  # as they are drawn, until one breaks the clause
        self.cut = False  # whether time ended before all of them were tried
        self.situations = Situations(cell.clause, cell.config, client.claims)
        self.compared = self.programs = self.structures = 0
        self.worst: float | None = None
        self.found_after: int | None = None
        self.best: tuple[Case, Mismatch] | None = None
        self.log: list[tuple[Program, tuple[int, ...]]] = []
        self.reduced = True
        self.known_error = False  # the same as in a cell before this one
        self.steps = ""  # of the smallest failure
        self._failed_at = 0.0
        self._starts = 0
        self._trials = 0

    def run(self) -> None:
        """Tries the planned cases, then further ones for the situations that none of them reached."""
        strategy = self.cell.clause.strategy(self.cell.config, self.client.claims)
        try:
            explore(
                strategy,
                self._first,
                self.effort.planned(self.cell.clause, self.cell.config_name),
                self.seed,
                shrink=self.effort.shrink,
            )
            for case in [] if self.cut else self.situations.further(strategy, self.seed + 1):
                self.trial(case)
        except (_Stop, Flaky):
            assert self.best is not None  # what it is worth is found out on a fresh process
            if self.effort.shrink and self.structures > len(self.planned):
                self._shrink_further(strategy)

    def _first(self, case: Case) -> None:
        if self.best is None:
            self.planned.append(case)
        self.trial(case)

    def _shrink_further(self, strategy: SearchStrategy[Case]) -> None:
        """Shrinks a failure of a further case: they are drawn again, until one fails."""
        with suppress(_Stop, Flaky):
            explore(strategy, self.trial, FURTHER, self.seed + 1, shrink=True)

    def trial(self, case: Case) -> None:
        if self.best is None:
            if time.perf_counter() - self.began > self.effort.seconds and self.programs:
                self.cut = True
                return
            variants = self.effort.seeds(self.cell.clause)
        elif self.known_error:
            return
        elif self._spent():
            self.reduced = False
            return
        else:
            variants = (self.best[1].variant,)
        tried = attempt(self.cell.clause, self.client, case, variants)
        if self.best is None:
            self.structures += 1
            self.programs += len(case.programs) * len(variants)
        if tried.mismatch is None:
            if self.best is None:
                self.situations.tried(case)
                self.compared += tried.compared
                if tried.worst is not None:
                    self.worst = max(self.worst or 0.0, tried.worst)
            return
        self._trials += 1
        if self.best is None:
            self._failed_at, self._starts = time.perf_counter(), self.client.starts
            self.found_after = self.programs
        if self.best is None or case.size <= self.best[0].size:
            known = None if self.best is not None else self._known(tried.mismatch)
            self.known_error = known is not None
            self.best = known or (case, tried.mismatch)
            self.log = list(self.client.log)
        raise _Stop

    def _known(self, broken: Mismatch) -> tuple[Case, Mismatch] | None:
        """The smallest case of the same error, from another clause, if it raises it in the live process."""
        case = self.client.raised.get(self._error(broken)) if self.effort.shrink and broken.error is not None else None
        again = None if case is None else attempt(self.cell.clause, self.client, case, (0,)).mismatch
        if case is None or again is None or again.error is None or self._error(again) != self._error(broken):
            return None
        return case, again

    def _error(self, broken: Mismatch) -> tuple[Config, tuple[str, str]]:
        assert broken.error is not None
        return self.cell.config, broken.error.pattern

    def _spent(self) -> bool:
        assert self.best is not None
        if not self.effort.shrink:
            return True
        if self.best[1].ending:
            return True  # each try costs a new process: shrink.reduced_death needs fewer
        must = self.cell.clause.level is Level.MUST
        trials, seconds = (SHRINK_TRIALS, SHRINK_SECONDS) if must else (GUARANTEE_TRIALS, GUARANTEE_SECONDS)
        return self._trials >= trials or time.perf_counter() - self._failed_at > seconds

    def conclude(self, folder: Path) -> Verdict:
        """Confirms the best case on a fresh process, or finds what must run before it."""
        assert self.best is not None
        case, broken = self.best
        alone = Case(tuple(frozen(program, broken.variant) for program in case.programs))
        why = excuse(self.cell.clause, self.client, alone, broken, self._earlier(alone))
        if why is not None:
            return self.verdict(Outcome.INCONCLUSIVE, why, broken)
        if not self.effort.shrink:
            return self.verdict(self._outcome(broken), mismatch=broken)
        if broken.ending:
            self.reduced = True
            case, broken = reduced_death(case, broken, self._dies)
        case = Case(tuple(frozen(program, broken.variant) for program in case.programs))
        before: list[Program] = []
        confirmed: Mismatch | None = replace(broken, variant=0)
        if self._outcome(broken) is not Outcome.REFUTED and not self.known_error:
            # what holds at times is no guarantee: once is enough for that
            confirmed = replayed(self.cell.clause, self.client, before, case)
        if confirmed is None:
            found = self._leak(case)
            if found is None:
                words = f"failed once and passed on fresh processes, alone and after what ran before: {render(broken)}"
                return self.verdict(Outcome.INCONCLUSIVE, (Reason.NOT_CONFIRMED, words), broken)
            before, confirmed = found
        outcome = self._outcome(confirmed)
        if outcome is Outcome.FAIL and confirmed.kind is Kind.RAISED and not before:
            self.client.raised.setdefault(self._error(confirmed), case)
        counterexample = Counterexample(
            suite=SUITE_VERSION,
            clause=self.cell.clause.name,
            backend=self.client.spec.address,
            device=self.client.spec.device,
            outcome=outcome,
            mismatch=confirmed,
            sentence=render(confirmed),
            before=[program.to_json() for program in before],
            case=case.to_json(),
            reduced=self.reduced,
        )
        self.steps = steps(case, confirmed)
        return self.verdict(outcome, mismatch=confirmed, counterexample=counterexample.write(folder).name)

    def _outcome(self, broken: Mismatch) -> Outcome:
        if not broken.ending and self.cell.clause.level is Level.SHOULD:
            return Outcome.REFUTED
        return OUTCOMES[broken.ending]

    def _dies(self, case: Case) -> Mismatch | None:
        """One try of reducing a death, as long as its seconds last."""
        assert self.best is not None
        if self.client.starts - self._starts >= REBUILDS or time.perf_counter() - self._failed_at > self.effort.rebuild:
            self.reduced = False
            return None
        return attempt(self.cell.clause, self.client, case, (self.best[1].variant,)).mismatch

    def _earlier(self, case: Case) -> list[Program]:
        """What the process ran before the case, the oldest first."""
        ran = [frozen(program, variant) for program, variants in self._sent() for variant in variants]
        for program in case.programs:  # their last runs are the case itself; what ran before them may be alike
            if program in ran:
                del ran[len(ran) - 1 - ran[::-1].index(program)]
        return ran

    def _sent(self) -> list[tuple[Program, tuple[int, ...]]]:
        """What the process was sent until the failure; after a death, without what it never came to."""
        assert self.best is not None
        (case, broken), sent = self.best, list(self.log)
        if not broken.ending or broken.program is None:
            return sent
        fatal = case.programs[broken.program]
        while sent and sent[-1][0] != fatal:
            sent.pop()
        if sent:
            variants = sent[-1][1]
            sent[-1] = fatal, variants[: variants.index(broken.variant) + 1]
        return sent

    def _leak(self, case: Case) -> tuple[list[Program], Mismatch] | None:
        """The shortest list of earlier programs after which the case fails on a fresh process."""
        earlier = self._earlier(case)
        starts, began = self.client.starts, time.perf_counter()

        def spent() -> bool:
            return self.client.starts - starts > REBUILDS or time.perf_counter() - began > self.effort.rebuild

        def fails(before: list[Program]) -> Mismatch | None:
            if spent():
                self.reduced = False
                return None
            return replayed(self.cell.clause, self.client, before, case)

        shorten = self.client.leaks < self.effort.leaks
        length = 1 if shorten else len(earlier)
        while True:
            if spent():  # time decides how short the list becomes, not whether there is one: all of them are tried
                length = len(earlier)
            suffix = earlier[-length:]
            broken = replayed(self.cell.clause, self.client, suffix, case)
            if broken is not None:
                self.client.leaks += 1
                self.reduced = self.reduced and shorten
                return reduced_list(suffix, broken, fails) if shorten else (suffix, broken)
            if length >= len(earlier):
                return None
            length *= 2

    def _planned(self) -> list[Case]:
        """Every case that this cell draws, also those behind one that broke the clause: they are drawn again."""
        if self.best is None:
            return self.planned
        if not self.effort.shrink:  # an audit compares no runs
            return []
        strategy = self.cell.clause.strategy(self.cell.config, self.client.claims)
        return drawn(strategy, self.effort.planned(self.cell.clause, self.cell.config_name), self.seed)

    def verdict(
        self, outcome: Outcome, why: Why | None = None, mismatch: Mismatch | None = None, counterexample: str = ""
    ) -> Verdict:
        reason, sentence = why or (None, "" if mismatch is None else render(mismatch))
        planned = [] if outcome is Outcome.UNSUPPORTED else self._planned()
        return Verdict(
            clause=self.cell.clause.name,
            config=self.cell.config_name,
            backend=self.client.spec.address,
            outcome=outcome,
            reason=reason,
            mismatch=mismatch,
            sentence=sentence,
            steps=self.steps,
            counterexample=counterexample,
            compared=self.compared,
            programs=self.programs,
            structures=self.structures,
            planned=len(planned),
            digest=digest(planned, self.effort.seeds(self.cell.clause)) if planned else "",
            cut=self.cut,
            situations={} if outcome is Outcome.UNSUPPORTED else self.situations.counts,
            worst=self.worst,
            found_after=self.found_after,
            seconds=round(time.perf_counter() - self.began, 3),
        )
