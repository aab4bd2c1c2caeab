"""The situations that a cell has reached, and further cases for those that it has missed."""

from __future__ import annotations

from contextlib import suppress

from hypothesis.strategies import SearchStrategy

from kvconform_specs.claims import Claims
from kvconform_specs.clause import Case, Clause
from kvconform_specs.config import Config
from kvconform_specs.situations import Situation, walk
from kvconform_specs.strategies import explore

FURTHER = 400
"""How many further cases are drawn for missing situations; only those that reach one are run."""


class Situations:
    """Counts, for one cell, the judged cases that reached each situation of the clause."""

    def __init__(self, clause: Clause, config: Config, claims: Claims) -> None:
        self.claims = claims
        self.all = {one.words: one for one in clause.situations if one.possible(config, claims)}
        self.counts = dict.fromkeys(self.all, 0)

    def tried(self, case: Case) -> None:
        """A case was judged, and held."""
        for words in self.reached(case, self.all):
            self.counts[words] += 1

    def reached(self, case: Case, among: dict[str, Situation]) -> list[str]:
        walks = [walk(program, self.claims) for program in case.programs]
        return [words for words, one in among.items() if one.reached(walks)]

    def missing(self) -> list[str]:
        return [words for words, count in self.counts.items() if not count]

    def further(self, strategy: SearchStrategy[Case], seed: int) -> list[Case]:
        """Cases that reach what is missing, among the ``FURTHER`` ones that the strategy gives with that seed."""
        missing = {words: self.all[words] for words in self.missing()}
        found: list[Case] = []

        def look(case: Case) -> None:
            reached = self.reached(case, missing)
            found.extend([case] if reached else [])
            for words in reached:
                del missing[words]
            if not missing:
                raise _Complete

        if missing:
            with suppress(_Complete):
                explore(strategy, look, FURTHER, seed)
        return found


class _Complete(Exception):
    """Nothing is missing any more."""
