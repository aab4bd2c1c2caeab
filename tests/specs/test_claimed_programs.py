"""What programs may do within claims that limit it: rollback, rows that part, padding and raggedness."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from lanes import slow_except

from kvconform_specs.any_history import any_history
from kvconform_specs.claimed import claimed
from kvconform_specs.claims import ABILITIES, Claims
from kvconform_specs.clauses import ALL, BY_NAME
from kvconform_specs.configs import CONFIGS
from kvconform_specs.costs import held_bytes, retained
from kvconform_specs.errors import SpecError
from kvconform_specs.program import Append, Close, Marks, Program, Reject, Step, Truncate
from kvconform_specs.reference.oracle import expect
from kvconform_specs.reference.quantisation import STORAGE, grid_error
from kvconform_specs.strategies import drawn

GQA, WINDOW = CONFIGS["attention-gqa"], CONFIGS["attention-window"]
EVERYTHING = Claims(profiles=("attention", "decoder"), abilities=tuple(ABILITIES), overflow="refused", page=4)
LIMITED = {
    "rollback of three": replace(EVERYTHING, rollback=3, too_deep="refused"),
    "left padding": replace(EVERYTHING, padding=("left",)),
    "ragged prompts": replace(EVERYTHING, ragged_appends="first", padding=("left",), retention="window", rollback=6),
    "static shapes": replace(EVERYTHING, static_shapes=(1, 2, 8), max_chunk=8),
    "static shapes and ragged prompts": replace(
        EVERYTHING, static_shapes=(1, 4), max_chunk=4, ragged_appends="first", padding=("left",)
    ),
    "no reset": replace(EVERYTHING, abilities=tuple(a for a in ABILITIES if a not in ("reset", "truncate_rows"))),
}


# --- strategies ---
@pytest.mark.parametrize("claims", slow_except(LIMITED.values(), 6), ids=LIMITED)
def test_no_clause_asks_for_more_than_is_claimed(claims: Claims) -> None:
    asked = 0
    for config in (GQA, WINDOW):
        for clause in ALL:
            if clause.concerns(config) and all(map(claims.can, clause.needs)):
                for case in drawn(clause.strategy(config, claims), 12, 5):
                    for program in case.programs:
                        assert claimed(program.steps, claims), (clause.name, program)
                        asked += 1
    assert asked > 500


def test_what_is_more_than_claimed_is_told_from_what_is_not() -> None:
    grown: tuple[Step, ...] = (Append("a", (9, 9), 1),)
    limited = replace(EVERYTHING, rollback=4)
    assert claimed((*grown, Truncate("a", 7), Truncate("a", 5)), limited)
    assert not claimed((*grown, Truncate("a", 7), Truncate("a", 4)), limited), "counted from the largest length"
    assert not claimed((*grown, Truncate("a", 5), Append("a", (1, 1), 2), Truncate("a", 4)), limited)
    assert claimed((*grown, Truncate("a", (5, 9))), limited)
    assert not claimed((*grown, Truncate("a", (9, 4))), limited)
    assert not claimed((*grown, Truncate("a", (9, 8))), LIMITED["no reset"]), "one length for each row"
    prompts = LIMITED["ragged prompts"]
    left = Append("a", (2, 3), 1, pad=("left", 5))
    assert claimed((left, Append("a", (1, 1), 1)), prompts)
    assert not claimed((replace(left, pad=None),), prompts), "columns without a token on the right"
    assert not claimed((left, replace(left, seed=2)), prompts), "only the first append"
    assert claimed((left, Close("a"), left), prompts)


def test_histories_truncate_again_after_a_ring_has_gone_round() -> None:
    def deeper(program: Program) -> bool:
        state, last = Marks(), None
        for step in program.steps:
            before = state.of(getattr(step, "seq", ""))
            if (
                isinstance(step, Truncate)
                and last == step.seq
                and min(mark for _n, mark in before) > (WINDOW.window or 0)
            ):
                return True
            if not isinstance(step, Reject):
                last = step.seq if isinstance(step, Truncate) else None
            state.apply(step)
        return False

    cases = drawn(any_history(WINDOW, EVERYTHING), 200)
    assert sum(deeper(case.programs[0]) for case in cases) >= 20


def test_a_limit_of_the_rollback_is_tried_where_a_refusal_can_be_demanded() -> None:
    clause = BY_NAME["lifecycle.rollback-limit"]
    ring = Claims(profiles=("attention",), abilities=("truncate",), retention="window", rollback=8)
    assert ring.can("limited rollback")
    assert not replace(ring, retention="all").can("limited rollback")
    assert replace(ring, retention="all", too_deep="refused").can("limited rollback")
    assert not replace(ring, rollback=None).can("limited rollback")
    depths = [
        mark - step.step.lengths(1)[0]
        for case in drawn(clause.strategy(WINDOW, ring), 60)
        for program in case.programs[1:]
        for step, mark in zip(program.steps, _marks(program), strict=True)
        if isinstance(step, Reject) and isinstance(step.step, Truncate)
    ]
    assert len(depths) > 20
    least = 8 + (WINDOW.window or 0) + 1  # what two windows and the rollback cannot hold
    assert min(depths) > least


def _marks(program: Program) -> list[int]:
    state, marks = Marks(), []
    for step in program.steps:
        state.apply(step)
        marks.append(max(mark for _length, mark in state.of("a")))
    return marks


# --- steps ---
def test_rows_are_truncated_apart_and_an_append_may_be_empty() -> None:
    steps = (
        Append("a", (3, 5), 7),
        Append("a", (0, 0), 7),
        Truncate("a", (3, 2)),
        Append("a", (1, 1), 9),
        Reject(Truncate("a", (4, 4))),
        Reject(Truncate("a", 3), "depth"),
        Reject(Append("a", (1, 1), 7), "fewer rows"),
    )
    program = Program(GQA, steps)
    assert Program.from_json(json.loads(json.dumps(program.to_json()))) == program
    wants = expect(program)
    assert wants[1] is not None
    assert wants[1].value.shape == (1, 2, 0, GQA.outputs)
    assert wants[3] is not None
    assert [len(row) for row in wants[3].rows] == [4, 3]
    alone = expect(Program(GQA, (Append("a", (2,), 8), Append("a", (1,), 10))))[1]
    assert alone is not None
    assert np.all(np.abs(wants[3].value[:, 1] - alone.value[:, 0]) <= alone.bound[:, 0])


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ((Append("a", (0, 0), 1),), "at least one row and one token"),
        ((Append("a", (3, 3), 1), Truncate("a", (3, 4))), r"cannot keep \[3, 4\] of \[3, 3\] tokens"),
        ((Append("a", (3, 3), 1), Truncate("a", (3,))), "1 lengths for sequence 'a' of 2 rows"),
        ((Append("a", (3,), 1), Reject(Append("a", (1,), 1), "fewer rows")), "no fewer rows than one"),
        ((Append("a", (3,), 1), Reject(Append("a", (1,), 1), "depth")), "only a truncation is too deep"),
        ((Append("a", (3,), 1), Reject(Truncate("a", 4), "depth")), "otherwise legal"),
    ],
)
def test_a_step_that_cannot_be_is_refused(steps: tuple[Step, ...], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        Program(GQA, steps)


# --- what a cache may hold ---
def test_a_window_bounds_what_is_retained() -> None:
    ring = Claims(profiles=("attention",), retention="window", rollback=3)
    assert retained(ring, WINDOW, 0, 3, longest=2) == (3, 3)
    assert retained(ring, WINDOW, 0, 40, longest=2) == (4, 15)
    assert retained(replace(ring, retention="all"), WINDOW, 0, 40, longest=2) == (40, 40)
    token = 2 * WINDOW.kv_heads * WINDOW.head_dim * 4
    assert held_bytes(ring, WINDOW, (40, 2), 2) == (6 * token, 17 * token)


def test_quantised_tokens_take_their_bits_and_a_scale_for_each_head() -> None:
    claims = Claims(profiles=("attention",), kv_bits=4, residual=3)
    heads, d = 2 * GQA.kv_heads, GQA.head_dim
    exact = 3 * heads * d * 4
    assert held_bytes(claims, GQA, (10,), 1) == (7 * heads * d // 2 + exact, 7 * heads * (d // 2 + 4) + exact)
    assert held_bytes(claims, GQA, (2,), 1) == (2 * heads * d * 4, 2 * heads * d * 4)
    half = Claims(profiles=("attention",), cache_dtype="float16")
    assert held_bytes(half, GQA, (10,), 1) == (10 * heads * d * 2, 10 * heads * d * 2)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_dequantised_numbers_lie_on_the_grid_and_others_do_not(dtype: str) -> None:
    """With the worst roundings of a product and of its storage."""
    u, largest = STORAGE[dtype], 127
    codes, allowed = np.arange(-largest, largest + 1), grid_error(largest, dtype)
    for up in (1, -1):
        read = codes * 0.37 * np.where(np.abs(codes) == largest, (1 + up * u) ** 2, (1 - up * u) ** 2)
        over = read * largest / np.abs(read).max()
        assert np.abs(over - np.rint(over)).max() <= allowed
    assert allowed < 0.25
    rng = np.random.Generator(np.random.Philox(3))
    numbers = rng.standard_normal(64)
    over = numbers * largest / np.abs(numbers).max()
    assert (np.abs(over - np.rint(over)) > allowed).any()
