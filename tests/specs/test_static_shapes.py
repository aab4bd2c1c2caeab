"""Programs for backends that compile each shape of a step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pytest
from claims_of_tests import EVERYTHING
from in_process import broken

from kvconform.explain.diagnosis.probes import probes
from kvconform.explain.diagnosis.trials import trials
from kvconform.explain.visibility.schedules import schedules
from kvconform.search.situations import Situations
from kvconform_backends.faults.controls import FixedSizes
from kvconform_specs.claimed import claimed
from kvconform_specs.claims import Claims
from kvconform_specs.clauses import ALL
from kvconform_specs.configs import CONFIGS
from kvconform_specs.errors import SpecError
from kvconform_specs.program import Append, Program, Reject, Truncate
from kvconform_specs.static_shapes import in_static_shapes, sizes_of
from kvconform_specs.strategies import drawn

SHAPES = Claims(
    profiles=("attention",),
    abilities=("uncached_forward", "length", "truncate", "fork", "reorder", "reset", "ragged", "empty_append", "mask"),
    overflow="refused",
    static_shapes=(1, 2, 4, 8, 16),
    max_chunk=16,
)
WINDOW, GQA = CONFIGS["attention-window"], CONFIGS["attention-gqa"]


def _appends(program: Program) -> list[Append]:
    return [step for step in program.steps if isinstance(step, Append)]


def test_an_append_is_split_and_keeps_its_tokens() -> None:
    long = Append("a", (13, 13), 5, ((0, 2, 9), (1, 12, 7)), masked=((0, 1), (1, 10)), in_place=True)
    split = _appends(in_static_shapes(Program(GQA, (long,)), SHAPES))
    assert [step.counts for step in split] == [(8, 8), (4, 4), (1, 1)]
    assert [step.substitutions for step in split] == [((0, 2, 9),), ((0, 2, 9),), ((0, 2, 9), (1, 12, 7))]
    assert [step.masked for step in split] == [((0, 1),), ((0, 1), (1, 10)), ((0, 1), (1, 10))]
    assert all(step.in_place and step.seed == 5 for step in split)


def test_ragged_rows_are_split_by_columns() -> None:
    ragged = Append("a", (5, 2, 0), 1, pad=("left", 3))
    split = _appends(in_static_shapes(Program(GQA, (Append("a", (1, 1, 1), 1), ragged)), SHAPES))
    assert [step.counts for step in split] == [(1, 1, 1), (4, 2, 0), (1, 0, 0)]
    once = replace(SHAPES, ragged_appends="first")
    assert _appends(in_static_shapes(Program(GQA, (replace(ragged, counts=(5, 2, 1)),)), once))[0].counts == (5, 2, 1)


def test_only_the_last_part_gives_the_last_position_alone() -> None:
    program = Program(CONFIGS["decoder-rope"], (Append("a", (3,), 1, last_only=True),))
    assert [step.last_only for step in _appends(in_static_shapes(program, SHAPES))] == [False, True]


def test_what_must_be_refused_for_its_size_keeps_it() -> None:
    beyond = Reject(Append("a", (GQA.capacity - 2,), 1))
    malformed = Reject(Append("a", (3,), 1), "rank")
    program = Program(GQA, (Append("a", (3,), 1), beyond, malformed, Truncate("a", 1)))
    split = in_static_shapes(program, SHAPES).steps
    assert split[2] == beyond
    assert split[3] == Reject(Append("a", (2,), 1), "rank")


def test_without_the_claim_a_program_is_as_it_was() -> None:
    program = Program(GQA, (Append("a", (13,), 5),))
    assert in_static_shapes(program, EVERYTHING) is program
    assert sizes_of(13, EVERYTHING) == (13,)
    assert sizes_of(13, SHAPES) == (8, 4, 1)


@pytest.mark.parametrize("name", ["attention-gqa", "attention-window"])
def test_few_shapes_reach_every_situation(name: str) -> None:
    """All that a backend is given by a run: programs of clauses, probes, trials and visibility maps."""
    config, shapes, cells = CONFIGS[name], set(), 0
    for clause in ALL:
        if not clause.concerns(config) or not all(map(SHAPES.can, clause.needs)):
            continue
        strategy, found = clause.strategy(config, SHAPES), Situations(clause, config, SHAPES)
        for case in drawn(strategy, 6):
            found.tried(case)
            for program in case.programs:
                assert claimed(program.steps, SHAPES), (clause.name, program)
                shapes |= {(len(step.counts), max(step.counts)) for step in _appends(program)}
        for case in found.further(strategy, 1):
            found.tried(case)
        assert not found.missing(), clause.name
        cells += 1
    told = [probe.program for probe in (*probes(config, SHAPES), *trials(config, SHAPES, range(16)))]
    told += [schedule.program(config, SHAPES, 1) for schedule in schedules(config, SHAPES)]
    for program in told:
        assert claimed(program.steps, SHAPES), program
        shapes |= {(len(step.counts), max(step.counts)) for step in _appends(program)}
    assert cells > 40
    assert len(told) > 40
    assert {columns for _rows, columns in shapes} <= {0, *SHAPES.static_shapes}
    assert {rows for rows, _columns in shapes} <= {1, 2, 3, 4}


@pytest.mark.parametrize(
    ("claims", "words"),
    [
        ({"static_shapes": (2, 4), "max_chunk": 4}, "claims.static_shapes: want positive integers with 1 among them"),
        ({"static_shapes": (1, 0), "max_chunk": 1}, "claims.static_shapes: want positive integers with 1 among them"),
        ({"static_shapes": (1, 4)}, "claims.max_chunk: want 4, the largest of claims.static_shapes, got None"),
    ],
)
def test_a_claim_that_cannot_be_kept_is_an_error(claims: dict[str, object], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        Claims(**claims)  # type: ignore[arg-type]


class Compiled(FixedSizes):
    configs: ClassVar = {"attention-gqa": GQA}


class EightIsWrong(Compiled):
    """The program for eight tokens was compiled for an empty cache."""

    def visible(self, t: int, s: int) -> Any:
        seen = super().visible(t, s)
        return seen & (np.arange(s) < t) if t == 8 else seen


def test_a_size_that_is_compiled_wrongly_is_found() -> None:
    assert "equivalence.chunks" in broken(EightIsWrong, ["equivalence.chunks", "shape.length"])
    assert not broken(Compiled, ["equivalence.chunks", "shape.length"])
