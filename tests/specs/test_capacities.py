"""No clause draws a program that exceeds the capacity, whatever that is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from claims_of_tests import EVERYTHING
from lanes import slow_except

from kvconform.search.situations import Situations
from kvconform_specs.claims import Claims
from kvconform_specs.clause import Clause
from kvconform_specs.clauses import ALL
from kvconform_specs.config import Config
from kvconform_specs.configs import CONFIGS
from kvconform_specs.program import Append, Program, UncachedForward
from kvconform_specs.strategies import drawn

CLAIMS = {
    "every ability": EVERYTHING,
    "short chunks": replace(EVERYTHING, max_chunk=3, max_batch=2, max_sequences=2, page=3, kv_bits=0, residual=0),
    "static shapes": replace(EVERYTHING, static_shapes=(1, 3, 8), max_chunk=8),
    "nothing but steps": Claims(profiles=("attention", "decoder"), max_batch=1, max_chunk=1, max_sequences=1),
}
CONFIG_NAMES = ("attention-window", "decoder-learned", "attention-gqa")


def _slow(*capacities: int) -> list[Any]:
    return [pytest.param(capacity, marks=pytest.mark.slow) for capacity in capacities]


@pytest.mark.slow
@pytest.mark.parametrize("capacity", [1, 9, *_slow(2, 3, 6, 13, 18, 23)])
def test_no_draw_exceeds_the_capacity(capacity: int) -> None:
    asked = 0
    for name in CONFIG_NAMES:
        config = _config(name, capacity)
        for clause in ALL:
            for claims in CLAIMS.values() if clause.concerns(config) else ():
                if _supported(clause, claims):
                    cases = drawn(clause.strategy(config, claims), 4, capacity)  # an illegal program raises SpecError
                    assert cases, clause.name
                    assert all(_computes(program) for case in cases for program in case.programs), clause.name
                    asked += 1
    assert asked > 150


@pytest.mark.parametrize("claims", slow_except(CLAIMS.values(), 4), ids=CLAIMS)
@pytest.mark.parametrize("capacity", [3, *_slow(1, 2, 5, 12, 40)])
def test_a_cell_reaches_every_situation_of_its_clause(capacity: int, claims: Claims) -> None:
    """At the smallest effort, with the further cases that are drawn for what is missing."""
    missed, asked = [], 0
    for name in CONFIG_NAMES:
        config = _config(name, capacity)
        for clause in ALL:
            if not clause.concerns(config) or not _supported(clause, claims):
                continue
            found = Situations(clause, config, claims)
            strategy = clause.strategy(config, claims)
            for case in drawn(strategy, 4, 0):
                found.tried(case)
            for case in found.further(strategy, 1):
                found.tried(case)
            missed += [(clause.name, name, words) for words in found.missing()]
            asked += len(found.counts)
    assert not missed
    assert asked


def test_every_clause_names_its_situations() -> None:
    assert [clause.name for clause in ALL if not clause.situations] == []


def _config(name: str, capacity: int) -> Config:
    """With contexts, if it is a decoder."""
    config = CONFIGS[name]
    return replace(config, capacity=capacity, contexts=3 if config.profile == "decoder" else 1)


def _supported(clause: Clause, claims: Claims) -> bool:
    return all(map(claims.can, clause.needs)) and (not clause.needs_any or any(map(claims.can, clause.needs_any)))


def _computes(program: Program) -> bool:
    return any(isinstance(step, Append | UncachedForward) for step in program.steps)
