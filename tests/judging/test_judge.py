"""The relations: what they accuse, what they let pass, and that nothing passes unlooked at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from kvconform.errors import Raised
from kvconform.judging.judge import judge
from kvconform.judging.mismatch import Kind, Place
from kvconform.judging.observed import Checked
from kvconform.worker.execute import StepResult, Trace, execute
from kvconform.worker.protocol import Traces, pack, unpack
from kvconform_backends.numpy.cache import Cache, NumpyCache
from kvconform_specs.claims import Claims
from kvconform_specs.clause import Case, Relation
from kvconform_specs.configs import CONFIGS
from kvconform_specs.program import Append, Program, Reject, UncachedForward
from kvconform_specs.reference.oracle import expect
from kvconform_specs.strategies import appends, swapped
from kvconform_specs.tensors import weights

CONFIG = CONFIGS["attention-gqa"]
BASE = Program(CONFIG, appends("a", (4, 2), 2, 5))
VARIANTS = (0, 1, 2)
Spoil = Callable[[int, Trace], Trace]


def judged(
    case: Case, relation: Relation, spoil: Spoil = lambda i, t: t, claims: Claims = NumpyCache.claims
) -> Checked:
    """The verdict on the numpy cache's traces, each of which ``spoil(number of the program, trace)`` may change."""
    backend = NumpyCache(CONFIG, {})
    traces = []
    for number, program in enumerate(case.programs):
        made = [spoil(number, trace) for trace in execute(backend, program, VARIANTS)]
        traces.append(unpack(*pack(made)))
    return judge(case, [relation], claims, traces, [expect(program, VARIANTS) for program in case.programs])


def altered(step: int, change: Callable[[np.ndarray], np.ndarray]) -> Spoil:
    """Changes one step's output in the last program of the case."""
    return lambda number, trace: tuple(
        replace(done, output=change(done.output.copy())) if i == step and done.output is not None else done
        for i, done in enumerate(trace)
    )


def last(step: int, change: Callable[[np.ndarray], np.ndarray]) -> Spoil:
    """Changes one step's output in the second program of the case."""
    return lambda number, trace: altered(step, change)(number, trace) if number == 1 else trace


def put(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(output: np.ndarray) -> np.ndarray:
        output[1, 3, 1, 2] = value  # row 1, head 3, second new token
        return output

    return change


def test_parity_names_step_row_position_and_head() -> None:
    found = judged(Case((BASE,)), Relation.PARITY, altered(1, put(9.0))).mismatch
    assert found is not None
    place = found.step, found.call, found.row, found.position, found.column, found.part, found.head, found.element
    assert place == (1, "append 2 to a of 2 rows", 1, 5, 1, "head", 3, 2)
    assert (found.kind, found.program, found.variant, found.got) == (Kind.PARITY, 0, 0, 9.0)
    assert isinstance(found.want, float)
    assert isinstance(found.bound, float)
    assert 9 - found.want > found.bound > 0


@pytest.mark.parametrize("relation", [Relation.PARITY, Relation.AGREEMENT])
def test_nan_is_never_within_a_bound(relation: Relation) -> None:
    other = Program(CONFIG, appends("a", (4, 1, 1), 2, 5))
    case = Case((other, BASE)) if relation is Relation.AGREEMENT else Case((BASE,))

    def spoil(number: int, trace: Trace) -> Trace:
        return altered(1, put(np.nan))(number, trace) if number == len(case.programs) - 1 else trace

    found = judged(case, relation, spoil).mismatch
    assert found is not None
    assert (found.kind, found.got) == (Kind[relation.name], "nan")


def test_agreement_matches_outputs_by_their_history() -> None:
    other = Program(CONFIG, (Append("x", (3, 3), 99), UncachedForward("full", (6, 6), 5)))
    fine = judged(Case((BASE, other)), Relation.AGREEMENT)
    assert fine.mismatch is None
    assert fine.compared == 3 * 2 * 6 * CONFIG.heads * CONFIG.head_dim  # variants, rows, positions, elements
    found = judged(Case((other, BASE)), Relation.AGREEMENT, last(1, put(9.0))).mismatch
    assert found is not None
    assert (found.program, found.step, found.row, found.position, found.got) == (1, 1, 1, 5, 9.0)
    assert found.other == Place(
        program=0, step=1, call="uncached_forward 6 to full of 2 rows", row=1, position=5, column=5
    )


def test_a_program_is_never_compared_with_itself() -> None:
    assert judged(Case((BASE, BASE)), Relation.AGREEMENT).compared == 0


def test_unaffected_is_bit_for_bit() -> None:
    case = Case((BASE, swapped(BASE, "a", 1, 5, 77)))

    def nudge(number: int, trace: Trace) -> Trace:
        up = altered(0, lambda o: np.nextafter(o, np.float32(9)))
        return up(number, trace) if number == 1 else trace

    assert judged(case, Relation.INSENSITIVE).mismatch is None
    found = judged(case, Relation.INSENSITIVE, nudge).mismatch
    assert found is not None
    assert (found.change, found.changed_row, found.changed_position) == ("token", 1, 5)
    assert (found.program, found.step, found.row, found.position) == (1, 0, 0, 0)


def test_affected_accuses_outputs_that_stay() -> None:
    case = Case((BASE, swapped(BASE, "a", 1, 0, 77)))
    still = execute(NumpyCache(CONFIG, {}), BASE, VARIANTS)
    assert judged(case, Relation.SENSITIVE).mismatch is None
    calls = iter(range(2 * len(VARIANTS)))
    found = judged(case, Relation.SENSITIVE, lambda number, trace: still[next(calls) % len(VARIANTS)]).mismatch
    assert found is not None
    assert (found.kind, found.row, found.got) == (Kind.SENSITIVE, 1, 0.0)
    assert (found.change, found.changed_row, found.changed_position) == ("token", 1, 0)
    assert isinstance(found.want, float)
    assert isinstance(found.bound, float)
    assert found.want > found.bound


@pytest.mark.parametrize(
    ("change", "kind", "got", "want"),
    [
        (lambda o: o[:, :, :1], Kind.SHAPE, (2, 6, 1, 8), (2, 6, 2, 8)),
        (lambda o: o.astype(np.float64), Kind.DTYPE, "float64", "float32"),
    ],
)
def test_a_wrong_shape_or_dtype_is_found_before_any_number(
    change: Callable[..., np.ndarray], kind: Kind, got: object, want: object
) -> None:
    found = judged(Case((BASE,)), Relation.SHAPE, altered(1, change)).mismatch
    assert found is not None
    assert (found.kind, found.relation, found.part) == (kind, None, "output")
    assert (found.step, found.got, found.want) == (1, got, want)


def test_lengths_are_tokens() -> None:
    def more(number: int, trace: Trace) -> Trace:
        return (*trace[:1], replace(trace[1], reported={"length": (6, 7)}))

    found = judged(Case((BASE,)), Relation.LENGTHS, more).mismatch
    assert found is not None
    assert (found.kind, found.step, found.got, found.want) == (Kind.LENGTHS, 1, (6, 7), (6, 6))


def test_a_rejected_call_must_be_refused() -> None:
    program = Program(CONFIG, (*BASE.steps, Reject(Append("a", (35, 35), 5))))
    assert judged(Case((program,)), Relation.PARITY).mismatch is None
    found = judged(Case((program,)), Relation.PARITY, lambda n, trace: (*trace[:2], StepResult())).mismatch
    assert found is not None
    assert (found.kind, found.step) == (Kind.ACCEPTED, 2)


def test_an_exception_of_a_legal_step_keeps_its_type_and_message() -> None:
    raised = StepResult(error=Raised("KeyError", "'raised MemoryError: want 3'"))
    found = judged(Case((BASE,)), Relation.PARITY, lambda n, trace: (trace[0], raised)).mismatch
    assert found is not None
    assert (found.kind, found.step, found.error) == (Kind.RAISED, 1, raised.error)


def test_one_bad_variant_of_many_is_named() -> None:
    calls = iter(range(len(VARIANTS)))
    spoil: Spoil = lambda n, trace: altered(1, put(9.0))(n, trace) if next(calls) == 1 else trace  # noqa: E731
    found = judged(Case((BASE,)), Relation.PARITY, spoil).mismatch
    assert found is not None
    assert (found.variant, found.kind) == (1, Kind.PARITY)


def test_last_outputs_only_are_judged_as_what_they_are() -> None:
    claims = replace(NumpyCache.claims, returns="last")

    def last(number: int, trace: Trace) -> Trace:
        return tuple(replace(done, output=None if done.output is None else done.output[:, :, -1:]) for done in trace)

    good = judged(Case((BASE,)), Relation.PARITY, last, claims)
    assert good.mismatch is None
    assert good.compared == 3 * 2 * 2 * CONFIG.heads * CONFIG.head_dim  # variants, rows, steps, elements
    first = judged(Case((BASE,)), Relation.PARITY, altered(1, lambda o: o[:, :, :1]), claims)
    assert first.mismatch is not None


# --- the last position alone ---
DECODER = CONFIGS["decoder-rope"]
STEPS: tuple[Append | UncachedForward, ...] = (*appends("a", (4, 3, 2), 2, 5), UncachedForward("f", (6, 6), 9))
ALONE = Case(
    tuple(
        Program(DECODER, tuple(replace(s, last_only=i in last) for i, s in enumerate(STEPS))) for last in ((), (1, 3))
    )
)
"""The same calls, and two of them asked for the last position alone."""


def judged_alone(relation: Relation, kind: type[NumpyCache] = NumpyCache) -> Checked:
    made = [unpack(*pack(execute(kind(DECODER, weights(DECODER)), program, (0,)))) for program in ALONE.programs]
    return judge(ALONE, [relation], kind.claims, made, [expect(program, (0,)) for program in ALONE.programs])


@pytest.mark.parametrize(
    ("relation", "positions"),
    [(Relation.PARITY, (4 + 3 + 2 + 6) + (4 + 1 + 2 + 1)), (Relation.AGREEMENT, 4 + 1 + 2 + 1)],
)
def test_a_call_that_is_asked_for_its_last_position_is_judged_by_it_alone(relation: Relation, positions: int) -> None:
    fine = judged_alone(relation)
    assert fine.mismatch is None
    assert fine.compared == 2 * positions * DECODER.vocabulary  # rows, positions, logits


class FirstInstead(NumpyCache):
    def step(self, cache: Cache, *inputs: Any, last_only: bool = False, **options: Any) -> tuple[Any, Cache]:
        output, cache = super().step(cache, *inputs, **options)
        return output[:, :1] if last_only else output, cache


class AllOfThem(NumpyCache):
    def step(self, cache: Cache, *inputs: Any, last_only: bool = False, **options: Any) -> tuple[Any, Cache]:
        return super().step(cache, *inputs, **options)


@pytest.mark.parametrize(
    ("kind", "place", "got"),
    [(FirstInstead, (1, 0, 6, "logit"), None), (AllOfThem, (1, None, None, "output"), (2, 3, 53))],
)
def test_another_position_is_found_as_the_last_one(
    kind: type[NumpyCache], place: tuple[object, ...], got: tuple[int, ...] | None
) -> None:
    for relation in (Relation.PARITY, Relation.AGREEMENT):
        found = judged_alone(relation, kind).mismatch
        assert found is not None
        assert (found.program, found.step, found.row, found.position, found.part) == (1, *place)
        assert got is None or (found.got, found.want) == (got, (2, 1, 53))


def test_a_keyword_is_given_only_to_a_call_that_asks_for_it() -> None:
    class Noted(NumpyCache):
        def step(self, cache: Cache, *inputs: Any, **options: Any) -> tuple[Any, Cache]:
            given.append(options)
            return super().step(cache, *inputs, **options)

    given: list[dict[str, Any]] = []
    execute(Noted(DECODER, weights(DECODER)), ALONE.programs[1], (0,))
    assert given == [
        {},
        {"last_only": True},
        {},
        {"last_only": True},
    ]  # the forward without a cache is a step of this backend


def test_traces_survive_the_wire() -> None:
    """Alike or not: variants that end differently are sent one by one."""
    traces = execute(NumpyCache(CONFIG, {}), BASE, VARIANTS)
    uneven = [*traces[:2], (traces[2][0], StepResult(error=Raised("RuntimeError", "no")))]
    for sent in (traces, uneven):
        got = unpack(*pack(sent))
        assert isinstance(got, Traces)
        assert (got.stacked is None) == (sent is uneven)
        for before, after in zip(sent, got.apart(), strict=True):
            assert [d.error for d in before] == [d.error for d in after]
            for a, b in zip(before, after, strict=True):
                assert (a.output is None) == (b.output is None)
                assert a.output is None or b.output is None or np.array_equal(a.output, b.output[0])
