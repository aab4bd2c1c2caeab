"""``run_cell``: one clause on one backend under one config. The one function that drives Hypothesis.

A first failure freezes its variant, so that shrinking stays meaningful. What shrinking found is confirmed on a fresh
process; if it passes there, state has leaked from an earlier program, and the counterexample becomes the shortest
list of programs that fails on a fresh process.
"""

from __future__ import annotations

import time
import zlib
from dataclasses import dataclass
from pathlib import Path

from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from hypothesis import seed as hypothesis_seed
from hypothesis.errors import Flaky

from kvconform.errors import WorkerDied
from kvconform.judging.verdict import Outcome, Verdict
from kvconform.search.counterexample import Broken, Counterexample, attempt, frozen, replayed
from kvconform.search.counterexample import sentence as said
from kvconform.search.effort import GUARANTEE_SECONDS, GUARANTEE_TRIALS, REBUILDS, SHRINK_SECONDS, SHRINK_TRIALS, Effort
from kvconform.search.shrink import reduced_death, reduced_list
from kvconform.worker.client import WorkerClient, unproven
from kvconform_specs import SUITE_VERSION
from kvconform_specs.clause import Case, Clause, Level
from kvconform_specs.config import Config
from kvconform_specs.program import Append, Program

OUTCOMES = {"fail": Outcome.FAIL, "crash": Outcome.CRASH, "timeout": Outcome.TIMEOUT}


@dataclass(frozen=True)
class Cell:
    """What is asked: a clause of a backend, under a config that has a name."""

    clause: Clause
    config: Config
    config_name: str


class _Stop(Exception):
    """Tells Hypothesis that a trial broke the clause."""


def run_cell(cell: Cell, client: WorkerClient, effort: Effort, seed: int, folder: Path) -> Verdict:
    """Searches for a case that breaks the clause. Counterexamples go to ``folder``.

    Raises BackendUnavailable where the backend cannot run here at all.
    """
    began = time.perf_counter()
    search = _Search(cell, client, effort, seed, began)
    reason = unsupported(cell, client)
    if reason is None:
        try:
            refused = client.build(cell.config)
        except WorkerDied as death:
            smallest = Case((Program(cell.config, (Append("a", (1,), 0),)),))
            search.best = smallest, Broken(death.kind, death.words)
            return search.conclude(folder)
        reason = refused
    if reason is not None:
        return search.verdict(Outcome.UNSUPPORTED, reason)
    search.run()
    runtime_info = client.runtime_info(cell.config)
    fallback = runtime_info.get("fallback")
    if fallback:  # also where it broke the clause: what broke it is not what the backend's name promises
        return search.verdict(Outcome.NOT_EXERCISED, f"not tested: {fallback}")
    if search.best is not None:
        return search.conclude(folder)
    unknown = unproven(runtime_info, client.spec.device)
    if search.compared == 0 and "failed" not in runtime_info:
        unknown = "nothing was compared"
    if unknown:
        return search.verdict(Outcome.NOT_EXERCISED, unknown)
    return search.verdict(Outcome.PASS)


def unsupported(cell: Cell, client: WorkerClient) -> str | None:
    """Why the backend's claims leave this cell out, or None."""
    claims, config = client.claims, cell.config
    if claims.reference == "self" and cell.clause.blind:
        return "blind: it is about what the target is judged by, its own forward"
    if config.profile not in claims.profiles:
        return f"claims no {config.profile} profile"
    if config.dtype not in claims.dtypes:
        return f"claims no {config.dtype}"
    missing = [need for need in cell.clause.needs if not claims.can(need)]
    if missing:
        return f"claims no {', no '.join(missing)}"
    if cell.clause.needs_any and not any(claims.can(need) for need in cell.clause.needs_any):
        return f"claims none of {', '.join(cell.clause.needs_any)}"
    return None


class _Search:
    """The state of one cell's search."""

    def __init__(self, cell: Cell, client: WorkerClient, effort: Effort, seed: int, began: float) -> None:
        self.cell, self.client, self.effort = cell, client, effort
        self.seed = zlib.crc32(f"{cell.clause.name} {cell.config_name} {seed}".encode())
        self.began = began
        self.compared = self.programs = self.structures = 0
        self.worst: float | None = None
        self.found_after: int | None = None
        self.best: tuple[Case, Broken] | None = None
        self.log: list[tuple[Program, tuple[int, ...]]] = []
        self.reduced = True
        self._failed_at = 0.0
        self._starts = 0
        self._trials = 0

    def run(self) -> None:
        @hypothesis_seed(self.seed)
        @settings(
            max_examples=max(2, round(self.effort.structures * self.cell.clause.share)),
            deadline=None,
            database=None,
            print_blob=False,
            suppress_health_check=list(HealthCheck),
            verbosity=Verbosity.quiet,
            report_multiple_bugs=False,
            phases=(Phase.generate, Phase.shrink) if self.effort.shrink else (Phase.generate,),
        )
        @given(self.cell.clause.strategy(self.cell.config, self.client.claims))
        def search(case: Case) -> None:
            self.trial(case)

        try:
            search()
        except (_Stop, Flaky):
            assert self.best is not None  # what it is worth is found out on a fresh process

    def trial(self, case: Case) -> None:
        if self.best is None:
            if time.perf_counter() - self.began > self.effort.seconds and self.programs:
                return
            variants = tuple(range(min(self.effort.variants, self.cell.clause.variants)))
        elif self._spent():
            self.reduced = False
            return
        else:
            variants = (self.best[1].variant,)
        tried = attempt(self.cell.clause, self.client, case, variants)
        if self.best is None:
            self.structures += 1
            self.programs += len(case.programs) * len(variants)
        if not isinstance(tried, Broken):
            if self.best is None:
                self.compared += tried.compared
                if tried.worst is not None:
                    self.worst = max(self.worst or 0.0, tried.worst)
            return
        self._trials += 1
        if self.best is None:
            self._failed_at, self._starts = time.perf_counter(), self.client.starts
            self.found_after = self.programs
        if self.best is None or case.size <= self.best[0].size:
            self.best = case, tried
            self.log = list(self.client.log)
        raise _Stop

    def _spent(self) -> bool:
        assert self.best is not None
        if not self.effort.shrink:
            return True
        if self.best[1].kind != "fail":
            return True  # each try costs a new process: shrink.reduced_death needs fewer
        must = self.cell.clause.level is Level.MUST
        trials, seconds = (SHRINK_TRIALS, SHRINK_SECONDS) if must else (GUARANTEE_TRIALS, GUARANTEE_SECONDS)
        return self._trials >= trials or time.perf_counter() - self._failed_at > seconds

    def conclude(self, folder: Path) -> Verdict:
        """Confirms the best case on a fresh process, or finds what must run before it."""
        assert self.best is not None
        case, broken = self.best
        if not self.effort.shrink:
            return self.verdict(self._outcome(broken), broken.sentence)
        if broken.kind != "fail":
            self.reduced = True
            case, broken = reduced_death(case, broken, self._dies)
        case = Case(tuple(frozen(program, broken.variant) for program in case.programs))
        before: list[Program] = []
        if self._outcome(broken) is Outcome.REFUTED:
            confirmed: object = broken  # what holds at times is no guarantee: once is enough, on any process
        else:
            confirmed = replayed(self.cell.clause, self.client, before, case)
        if not isinstance(confirmed, Broken):
            found = self._leak(case)
            if found is None:
                words = f"failed once and passed on fresh processes, alone and after what ran before: {broken.sentence}"
                return self.verdict(Outcome.INCONCLUSIVE, words)
            before, confirmed = found
        outcome, sentence = self._outcome(confirmed), said(confirmed, before)
        name = (
            Counterexample(
                suite=SUITE_VERSION,
                clause=self.cell.clause.name,
                backend=self.client.spec.address,
                device=self.client.spec.device,
                sentence=sentence,
                outcome=outcome.value,
                before=[program.to_json() for program in before],
                case=case.to_json(),
                reduced=self.reduced,
            )
            .write(folder)
            .name
        )
        return self.verdict(outcome, sentence, name)

    def _outcome(self, broken: Broken) -> Outcome:
        if broken.kind == "fail" and self.cell.clause.level is Level.SHOULD:
            return Outcome.REFUTED
        return OUTCOMES[broken.kind]

    def _dies(self, case: Case) -> Broken | None:
        """One try of reducing a death, as long as its seconds last."""
        assert self.best is not None
        if self.client.starts - self._starts >= REBUILDS or time.perf_counter() - self._failed_at > self.effort.rebuild:
            self.reduced = False
            return None
        tried = attempt(self.cell.clause, self.client, case, (self.best[1].variant,))
        return tried if isinstance(tried, Broken) else None

    def _leak(self, case: Case) -> tuple[list[Program], Broken] | None:
        """The shortest list of earlier programs after which the case fails on a fresh process."""
        ran = [frozen(program, variant) for program, variants in self.log for variant in variants]
        for program in case.programs:  # their last runs are the case itself; what ran before them may be alike
            if program in ran:
                del ran[len(ran) - 1 - ran[::-1].index(program)]
        earlier = ran
        starts, began = self.client.starts, time.perf_counter()

        def fails(before: list[Program]) -> Broken | None:
            if self.client.starts - starts > REBUILDS or time.perf_counter() - began > self.effort.rebuild:
                self.reduced = False
                return None
            tried = replayed(self.cell.clause, self.client, before, case)
            return tried if isinstance(tried, Broken) else None

        shorten = self.client.leaks < self.effort.leaks
        length = 1 if shorten else len(earlier)
        while True:
            suffix = earlier[-length:]
            broken = fails(suffix)
            if broken is not None:
                self.client.leaks += 1
                self.reduced = self.reduced and shorten
                return reduced_list(suffix, broken, fails) if shorten else (suffix, broken)
            if length >= len(earlier):
                return None
            length *= 2

    def verdict(self, outcome: Outcome, sentence: str = "", counterexample: str = "") -> Verdict:
        return Verdict(
            clause=self.cell.clause.name,
            config=self.cell.config_name,
            backend=self.client.spec.address,
            outcome=outcome,
            sentence=sentence,
            counterexample=counterexample,
            compared=self.compared,
            programs=self.programs,
            structures=self.structures,
            worst=self.worst,
            found_after=self.found_after,
            seconds=round(time.perf_counter() - self.began, 3),
            raised=self.best is not None and self.best[1].raised,
        )
