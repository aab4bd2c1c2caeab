"""One clause on one engine: programs are drawn and judged; a failure is tried again with other token ids and shrunk.

Nothing is restarted. Each trial renames the vocabulary of its program, so that its structure is the same and nothing of
it can be in the cache. What fails only after earlier programs is found by trying these again with it.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

from hypothesis.errors import Flaky
from msgspec.structs import replace

from kvconform.judging.mismatch import Kind, Mismatch
from kvconform.search.effort import Effort
from kvconform.serving.judge import Judged, judged
from kvconform.serving.noise import Calibration
from kvconform.serving.process import EngineDied, EngineGone
from kvconform.serving.session import Session, Spent
from kvconform_specs.serving.clauses import CONFIG, ServingClause
from kvconform_specs.serving.program import Own, Program, Reset, Together
from kvconform_specs.strategies import drawn, explore

FURTHER = 200
"""How many further programs are drawn for situations and evidence that the planned ones missed."""
AGAIN = 5
"""How often a failure is tried again with other token ids, before earlier programs are tried with it."""
SHRINK_TRIALS, SHRINK_SECONDS, SHRINK_DEATHS = 150, 15.0, 8
"""Shrinking a failure ends after so many trials, seconds or deaths of the engine's process, which starts again."""


@dataclass(frozen=True)
class Found:
    """A failure. ``before``: the programs that must run first. ``confirmed``: it failed again when it was tried
    again."""

    program: Program
    mismatch: Mismatch
    before: tuple[Program, ...] = ()
    confirmed: bool = False


class _Failed(Exception):
    """Tells Hypothesis that a program broke the clause."""


class Search:
    """The state of one clause's search. ``history``: the programs that the engine was sent, also for other clauses."""

    def __init__(
        self,
        clause: ServingClause,
        session: Session,
        gauge: Calibration,
        effort: Effort,
        seed: int,
        history: list[Program],
    ) -> None:
        self.clause, self.session, self.gauge, self.effort = clause, session, gauge, effort
        self.seed = zlib.crc32(f"{clause.name} {CONFIG} {seed}".encode())
        self.history = history
        self.total = Judged()  # of the programs that held
        self.programs = 0
        self.planned: list[Program] = []
        self.situations = {words: 0 for words, possible in clause.situations if possible(session.sizes)}
        self.best: Found | None = None
        self.found_after: int | None = None
        self.cut = False  # whether a limit ended it before all planned programs were judged
        self.reduced = True
        self._deaths = 0  # of the engine's process
        self.began = time.perf_counter()

    def run(self) -> None:
        """Tries the planned programs, then further ones for what is missing."""
        strategy, number = self.clause.strategy(self.session.sizes), max(2, self.effort.structures)
        self.planned = drawn(strategy, number, self.seed)
        try:
            for place, program in enumerate(self._programs()):
                if self.programs and time.perf_counter() - self.began > self.effort.seconds:
                    self.cut = True
                    return
                self.programs += 1
                if self._held(program):
                    continue
                if self.effort.shrink:
                    self._again(place if place < len(self.planned) else None)
                return
        except Spent:
            self.cut = self.cut or self.best is None
            self.reduced = False

    def _programs(self) -> Iterator[Program]:
        yield from self.planned
        if self.missing or self.lacking:
            further = drawn(self.clause.strategy(self.session.sizes), FURTHER, self.seed + 1)
            for number, program in enumerate(further):
                if program.about in self.missing or (self.lacking and number < len(self.planned)):
                    yield program

    @property
    def missing(self) -> list[str]:
        """The situations that no program was about."""
        return [words for words, count in self.situations.items() if not count]

    @property
    def lacking(self) -> list[str]:
        """The evidence that the engine has not given."""
        given = {"hit": self.total.hits, "preemption": self.total.preempted}
        return [kind for kind in self.clause.evidence if not given[kind]]

    def _held(self, program: Program) -> bool:
        found = self._judged(program)
        if found.mismatch is not None:
            self.found_after, self.best = self.programs, Found(program, found.mismatch)
            return False
        self.total.add(found)
        self.history.append(program)
        if program.about in self.situations:
            self.situations[program.about] += 1
        return True

    def _judged(self, program: Program) -> Judged:
        """The program under token ids that the engine has not seen."""
        try:
            return judged(self.clause, program.renamed(self.session.fresh()), self.session, self.gauge)
        except EngineGone:
            raise Spent from None
        except EngineDied as death:
            self._deaths += 1
            return Judged(Mismatch(kind=Kind.NO_ANSWER, program=0, error=death.error, ended=death.ended))

    # --- a failure ---
    def _again(self, place: int | None) -> None:
        """Tries it again, alone and then after what ran before, and makes it smaller."""
        assert self.best is not None
        program = self.best.program
        for _ in range(AGAIN):
            mismatch = self._judged(program).mismatch
            if mismatch is not None:
                self.best = Found(program, mismatch, confirmed=True)
                self._shrink(place)
                return
        self.best = self._after_others(program) or self.best

    def _after_others(self, program: Program) -> Found | None:
        """The shortest end of the history with which a program fails."""
        length = 1
        while True:
            ran = [*self.history[-length:], program]
            for number, one in enumerate(ran):
                mismatch = self._judged(one).mismatch
                if mismatch is not None:
                    before = tuple(ran[:number])
                    return Found(one, replace(mismatch, earlier_programs=number), before, confirmed=True)
            if length >= len(self.history):
                return None
            length *= 2

    def _shrink(self, place: int | None) -> None:
        """By Hypothesis, which draws the planned programs again, and then by leaving out steps and requests."""
        assert self.best is not None
        self._trials, self._ends = 0, time.perf_counter() + SHRINK_SECONDS
        if place is not None:
            self._skipped = place
            with suppress(_Failed, Flaky):
                strategy = self.clause.strategy(self.session.sizes)
                explore(strategy, self._trial, len(self.planned), self.seed, shrink=True)
        candidates = smaller(self.best.program)
        while (candidate := next(candidates, None)) is not None:
            if self._fails(candidate):
                candidates = smaller(self.best.program)

    def _trial(self, program: Program) -> None:
        if self._skipped > 0:
            self._skipped -= 1
        elif self._fails(program):
            raise _Failed

    def _fails(self, program: Program) -> bool:
        """Whether it fails; the smallest one that does is kept."""
        assert self.best is not None
        if self._trials >= SHRINK_TRIALS or self._deaths >= SHRINK_DEATHS or time.perf_counter() > self._ends:
            self.reduced = False
            return False
        self._trials += 1
        mismatch = self._judged(program).mismatch
        if mismatch is not None and program.size <= self.best.program.size:
            self.best = Found(program, mismatch, confirmed=True)
        return mismatch is not None


def smaller(program: Program) -> Iterator[Program]:
    """The program without one of its steps, or without one of the requests of a step, from the end."""
    pieces = [
        piece for step in program.steps if isinstance(step, Together) for ask in step.asks for piece in ask.prompt
    ]
    first = 1 + max((piece.step for piece in pieces if isinstance(piece, Own)), default=-1)  # none refers behind it
    for place in reversed(range(first, len(program.steps))):
        before, step, after = program.steps[:place], program.steps[place], program.steps[place + 1 :]
        if len(program.steps) > 1:
            yield replace(program, steps=(*before, *after))
        if not isinstance(step, Reset) and len(step.asks) > 1:
            for number in range(len(step.asks)):
                fewer = Together(asks=step.asks[:number] + step.asks[number + 1 :])
                yield replace(program, steps=(*before, fewer, *after))
