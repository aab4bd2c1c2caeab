"""Trying a fault under a clause: config by config, up to the first that convicts it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kvconform.budget import Budget
from kvconform.cell import Cell, run_cell
from kvconform.subject import Subject
from kvconform.verdict import Verdict
from kvconform_backends.faults.planted import Fault
from kvconform_specs.clause import Clause
from kvconform_specs.clauses import BY_NAME
from kvconform_specs.points import POINTS


@dataclass(frozen=True)
class Conviction:
    """What a clause found out about a fault. ``programs`` counts those of the configs that passed before, too."""

    fault: Fault
    verdict: Verdict
    programs: int


def cells(clause: Clause, configs: tuple[str, ...] = ()) -> Iterator[Cell]:
    """The cells of a clause, on the configs of these names that it concerns, or on all that it concerns."""
    for name, config in POINTS.items():
        if (not configs or name in configs) and clause.concerns(config):
            yield Cell(clause, config, name)


def convict(fault: Fault, clause: str, subject: Subject, budget: Budget, seed: int, folder: Path) -> Conviction:
    """The first verdict that is broken, or the last one."""
    programs = 0
    for cell in cells(BY_NAME[clause], fault.configs):
        verdict = run_cell(cell, subject, budget, seed, folder)
        programs += verdict.found_after or verdict.programs
        if verdict.outcome.broken:
            break
    return Conviction(fault, verdict, programs)
