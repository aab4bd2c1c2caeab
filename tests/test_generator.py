"""The families of programs reach the situations that they claim to reach: one line for each."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import strategies as st
from hypothesis.errors import NoSuchExample

from kvconform_specs.claims import Claims
from kvconform_specs.clause import Case
from kvconform_specs.clauses import ALL, BY_NAME
from kvconform_specs.config import Config
from kvconform_specs.history import Histories
from kvconform_specs.points import POINTS
from kvconform_specs.program import Append, Close, Fork, Full, Program, Reject, Reorder, Reset, Truncate

GQA, WINDOW = POINTS["attention-gqa"], POINTS["attention-window"]
EVERYTHING = Claims(
    profiles=("attention", "decoder"),
    abilities=("full", "length", "truncate", "fork", "reorder", "reset", "ragged"),
    overflow="refused",
)
POOR = Claims(profiles=("attention", "decoder"), max_batch=1, max_chunk=4, max_sequences=1)


def lengths(program: Program) -> list[tuple[object, tuple[int, ...], tuple[int, ...]]]:
    """Each append with the rows' lengths before and after it."""
    histories, found = Histories(), []
    for step in program.steps:
        before = tuple(len(r) for r in histories.rows.get(getattr(step, "seq", ""), ()))
        histories.apply(step)
        if isinstance(step, Append):
            found.append((step, before or (0,) * len(step.counts), tuple(len(r) for r in histories.rows[step.seq])))
    return found


def chunk_on_a_cache(p: Program) -> bool:
    return any(max(step.counts) > 1 and max(before) > 0 for step, before, _ in lengths(p))


def second_sequence_shorter(p: Program) -> bool:
    totals: dict[str, int] = {}
    for step, _before, after in lengths(p):
        totals[step.seq] = max(after)
    return len(totals) > 1 and list(totals.values())[1] < next(iter(totals.values()))


def two_live_interleaved(p: Program) -> bool:
    names = [s.seq for s in p.steps if isinstance(s, Append)]
    return any(names[i] == names[i + 2] != names[i + 1] for i in range(len(names) - 2))


def not_its_own_inverse(p: Program) -> bool:
    return any(
        isinstance(s, Reorder) and len(s.rows) > 2 and sorted(s.rows) == list(range(len(s.rows)))
        and [s.rows[r] for r in s.rows] != list(range(len(s.rows)))
        for s in p.steps
    )  # fmt: skip


def repeats_a_row(p: Program) -> bool:
    return any(isinstance(s, Reorder) and len(set(s.rows)) < len(s.rows) for s in p.steps)


def reaches(length: int) -> Callable[[Program], bool]:
    return lambda p: any(max(after) == length for _s, _b, after in lengths(p))


W = WINDOW.window or 0


@pytest.mark.parametrize(
    ("clause", "config", "situation"),
    [
        ("shape.output", GQA, lambda p: any(step.counts == (1,) for step, _b, _a in lengths(p))),
        ("shape.length", GQA, lambda p: any(isinstance(s, Truncate) and s.length == 0 for s in p.steps)),
        ("shape.length", GQA, lambda p: any(len(set(step.counts)) > 1 for step, _b, _a in lengths(p))),
        ("shape.first-step", GQA, reaches(GQA.capacity)),
        ("shape.no-specialisation", GQA, lambda p: len({len(step.counts) for step, _b, _a in lengths(p)}) == 3),
        ("causality.future-blind", GQA, chunk_on_a_cache),
        ("causality.visibility", WINDOW, reaches(W + 1)),
        ("equivalence.chunks", WINDOW, lambda p: any(max(step.counts) > W for step, _b, _a in lengths(p))),
        *(("equivalence.chunks", WINDOW, reaches(n)) for n in (W - 1, W, W + 1, 2 * W, 3 * W)),
        *(
            ("equivalence.path", GQA, lambda p, kind=kind: any(isinstance(s, kind) for s in p.steps))
            for kind in (Truncate, Fork, Reorder, Reset, Reject, Close)
        ),
        ("equivalence.path", GQA, not_its_own_inverse),
        ("equivalence.decode", GQA, lambda p: sum(step.counts == (1,) * 3 for step, _b, _a in lengths(p)) > 5),
        ("equivalence.full-stable", GQA, lambda p: isinstance(p.steps[1], Full)),
        ("definition.attention", GQA, two_live_interleaved),
        ("definition.attention", GQA, not_its_own_inverse),
        (
            "definition.attention",
            GQA,
            lambda p: any(isinstance(s, Reorder) and len(set(s.rows)) < len(s.rows) for s in p.steps),
        ),
        ("definition.decoder", POINTS["decoder-rope"], chunk_on_a_cache),
        ("lifecycle.reset", GQA, chunk_on_a_cache),
        ("lifecycle.independent", GQA, two_live_interleaved),
        ("lifecycle.independent", GQA, second_sequence_shorter),
    ],
)
def test_the_family_reaches(clause: str, config: Config, situation: Callable[[Program], bool]) -> None:
    family = BY_NAME[clause].family(config, EVERYTHING)
    calm = settings(max_examples=3000, database=None, phases=(Phase.generate,), suppress_health_check=list(HealthCheck))
    try:
        case = find(family, lambda case: any(situation(p) for p in case.programs), settings=calm)
    except NoSuchExample:
        pytest.fail("not reached in 3000 cases")
    assert any(situation(program) for program in case.programs)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_families_stay_within_the_claims(data: st.DataObject) -> None:
    config = data.draw(st.sampled_from(list(POINTS.values())), label="config")
    clause = data.draw(st.sampled_from([c for c in ALL if c.concerns(config) and not c.needs]), label="clause")
    case: Case = data.draw(clause.family(config, POOR), label="case")
    for program in case.programs:
        live: set[str] = set()
        for step in program.steps:
            assert isinstance(step, Append | Close), step
            if isinstance(step, Append):
                live.add(step.seq)
                assert len(step.counts) == 1
                assert step.counts[0] <= 4
            else:
                live.discard(step.seq)
            assert len(live) <= 1


def test_every_clause_concerns_a_config() -> None:
    for clause in ALL:
        assert any(clause.concerns(config) for config in POINTS.values()), clause.name
