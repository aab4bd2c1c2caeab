"""Greedy generation: which tokens are wrong, which are ties, and that the reference follows the backend's tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvconform.judging.judge import judge
from kvconform.judging.mismatch import Kind
from kvconform.judging.observed import Checked
from kvconform.judging.verdict import Outcome
from kvconform.search import counterexample
from kvconform.search.cell import Cell, run_cell
from kvconform.search.counterexample import frozen
from kvconform.search.effort import Effort
from kvconform.search.shrink import smaller
from kvconform.worker.client import WorkerClient, WorkerSpec
from kvconform.worker.execute import StepResult, execute
from kvconform.worker.protocol import Traces, pack, unpack
from kvconform_backends.numpy.cache import NumpyCache
from kvconform_specs.clause import Case, Relation
from kvconform_specs.clauses import BY_NAME
from kvconform_specs.config import Config
from kvconform_specs.configs import CONFIGS
from kvconform_specs.errors import SpecError
from kvconform_specs.program import Append, Generate, Program, UncachedForward
from kvconform_specs.reference.definition import decoder
from kvconform_specs.reference.oracle import Expected, Generation, ReferenceForward, columns, expect, given
from kvconform_specs.tensors import Streams, derive, weights

ROPE, LEARNED = CONFIGS["decoder-rope"], CONFIGS["decoder-learned"]
STEP = Generate("g", (6, 6), 11, new=5)
PROGRAM = Program(ROPE, (STEP,))
CLAUSE = BY_NAME["equivalence.generation"]
FAULTS = "kvconform_backends.faults.generation:"


def judged(program: Program, *outputs: Any, expected: tuple[Expected | None, ...] | None = None) -> Checked:
    """The verdict on what the steps of a program gave, of one variant."""
    traces = unpack(*pack([tuple(StepResult(None if o is None else np.asarray(o)) for o in outputs)]))
    wants = expect(program) if expected is None else expected
    return judge(Case((program,)), [Relation.GENERATED], NumpyCache.claims, [traces], [wants])


def logits(config: Config, ids: np.ndarray) -> np.ndarray:
    exact = {name: weight.astype(np.float64) for name, weight in weights(config).items()}
    return decoder(ids, exact, config)


def loop(config: Config, ids: np.ndarray, new: int) -> np.ndarray:
    """Greedy generation without a cache, in float64: ``(b, new)`` behind prompts ``(b, s)``."""
    prompt = ids.shape[-1]
    for _ in range(new):
        ids = np.concatenate([ids, logits(config, ids)[:, -1:].argmax(axis=-1)], axis=1)
    return ids[:, prompt:]


def prompts(program: Program, step: Generate) -> np.ndarray:
    streams = Streams(program.config, program.span, (0,))
    return np.stack([streams.tape(step.seed + row)[0, :n] for row, n in enumerate(step.counts)])


def definition(config: Config) -> ReferenceForward:
    """A black box whose weights happen to be the definition's; perturbed, its logits are off by as much as is asked."""

    def own(ids: np.ndarray, storage: float, accumulation: float, seed: int) -> np.ndarray:
        exact = logits(config, ids)
        return np.asarray(exact + storage * np.random.default_rng(seed).normal(size=exact.shape))

    return own


# --- a verdict on traces made by hand ---
TEN = replace(ROPE, vocabulary=10)
HAND = Program(TEN, (Generate("g", (3,), 1, new=3),))


def reference_of(value: np.ndarray, bound: float, config: Config = TEN) -> tuple[Expected, ...]:
    """What is expected of ``HAND`` if the reference's logits ``(new, V)`` are these, for any generated tokens."""
    numbers = {"value": value[None, None], "bound": np.full((1, 1, len(value), 1), bound)}
    step = HAND.steps[0]
    assert isinstance(step, Generate)
    rows = (((1, 0), (1, 1), (1, 2)),)
    return (
        Generation(
            rows,
            step.counts,
            columns(step),
            1,
            lambda kind: numbers[kind],
            lambda: np.zeros((1, 1, 3), np.int64),
            lambda ids, start: lambda kind: numbers[kind],
        ),
    )


def lead(at: int, by: float) -> np.ndarray:
    """Logits of three positions: token 7 leads by 10, but over token 2 at position ``at`` by ``by`` alone."""
    value = np.zeros((3, 10))
    value[:, 7] = 10.0
    value[at, 2] = 10.0 - by
    return value


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_token_that_is_behind_by_no_more_than_the_two_bounds_is_fair_and_not_counted(at: int) -> None:
    ids = np.full((1, 3), 7)
    ids[0, at] = 2
    fair = judged(HAND, ids, expected=reference_of(lead(at, 0.5), 0.25))
    assert (fair.mismatch, fair.compared) == (None, 2)


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_token_that_is_behind_by_more_is_named_with_its_place_and_by_how_much(at: int) -> None:
    ids = np.full((1, 3), 7)
    ids[0, at] = 2
    found = judged(HAND, ids, expected=reference_of(lead(at, 0.5), 0.2499)).mismatch
    assert found is not None
    assert (found.kind, found.step, found.row, found.position, found.column) == (Kind.GENERATED, 0, 0, 3 + at, at)
    assert (found.got, found.want) == (2, 7)
    assert (found.lead, found.bound) == pytest.approx((0.5, 0.4998))


def test_a_token_far_behind_is_accused_also_where_two_others_tie() -> None:
    value = lead(1, 0.0)
    assert judged(HAND, [[7, 7, 7]], expected=reference_of(value, 0.1)).compared == 2
    assert judged(HAND, [[7, 2, 7]], expected=reference_of(value, 0.1)).mismatch is None
    assert judged(HAND, [[7, 4, 7]], expected=reference_of(value, 0.1)).mismatch is not None


@pytest.mark.parametrize("wrong", ["value", "bound"])
def test_nan_is_no_reason_to_let_a_token_pass(wrong: str) -> None:
    value = lead(0, 1.0)
    if wrong == "value":
        value[1, 3] = np.nan
    assert (
        judged(HAND, [[7, 7, 7]], expected=reference_of(value, np.nan if wrong == "bound" else 0.1)).mismatch
        is not None
    )


def test_what_follows_a_reserved_token_is_not_judged() -> None:
    config = replace(TEN, reserved=(2,))
    program = Program(config, HAND.steps)
    expected = reference_of(lead(1, 0.0), 0.1)
    stopped = judged(program, [[7, 2, 5]], expected=expected)
    assert (stopped.mismatch, stopped.compared) == (None, 1)
    assert judged(HAND, [[7, 2, 5]], expected=expected).mismatch is not None
    assert judged(program, [[2, 7, 7]], expected=expected).mismatch is not None  # it is judged itself


@pytest.mark.parametrize(
    ("ids", "kind", "got", "want"),
    [
        ([[7, 7]], Kind.SHAPE, (1, 2), (1, 3)),
        ([7, 7, 7], Kind.SHAPE, (3,), (1, 3)),
        (np.full((1, 3), 7, np.int32), Kind.DTYPE, "int32", "int64"),
        (np.full((1, 3), 7.0), Kind.DTYPE, "float64", "int64"),
        ([[7, 10, 7]], Kind.TOKEN_ID, 10, 0),
        ([[7, -1, 7]], Kind.TOKEN_ID, -1, 0),
        (None, Kind.NO_OUTPUT, None, None),
    ],
)
def test_what_are_no_ids_is_found_before_any_is_judged(ids: Any, kind: Kind, got: object, want: object) -> None:
    found = judged(HAND, ids, expected=reference_of(lead(0, 1.0), 0.1)).mismatch
    assert found is not None
    assert (found.kind, found.step, found.got, found.want) == (kind, 0, got, want)
    assert found.want_max == (9 if kind is Kind.TOKEN_ID else None)


# --- the reference along the backend's tokens ---
@pytest.mark.parametrize("name", ["decoder-rope", "decoder-learned", "decoder-softcap"])
def test_the_loop_without_a_cache_is_right_and_every_token_of_it_counts(name: str) -> None:
    program = Program(CONFIGS[name], (STEP,))
    right = judged(program, loop(CONFIGS[name], prompts(program, STEP), STEP.new))
    assert (right.mismatch, right.compared) == (None, 2 * STEP.new)


@pytest.mark.parametrize("i", range(STEP.new))
def test_a_token_is_judged_along_those_before_it(i: int) -> None:
    """One wrong token, and then what rightly follows it: only itself is accused, and nothing where bounds allow it."""
    ids = prompts(PROGRAM, STEP)
    begun = loop(ROPE, ids, i)
    row = np.concatenate([ids, begun], axis=1)
    second = np.argsort(logits(ROPE, row)[:, -1])[:, -2:-1]
    row = np.concatenate([row, second], axis=1)
    picked = np.concatenate([row[:, 6:], loop(ROPE, row, STEP.new - i - 1)], axis=1)
    found = judged(PROGRAM, picked).mismatch
    assert found is not None
    assert (found.row, found.position, found.got) == (0, 6 + i, second[0, 0])

    (want,) = expect(PROGRAM)
    assert isinstance(want, Generation)
    tie = partial(_blurred, want.given, at=i, by=100.0)
    fair = judged(PROGRAM, picked, expected=(replace(want, given=tie),))
    assert (fair.mismatch, fair.compared) == (None, 2 * (STEP.new - 1))


def _blurred(exact: Callable[..., Any], ids: np.ndarray, start: int, *, at: int, by: float) -> Callable[[str], Any]:
    """The same numbers, with a bound of ``by`` at one position."""
    numbers = exact(ids, start)
    wide = np.where(np.arange(STEP.new)[:, None] == at, by, numbers("bound"))
    return lambda kind: wide if kind == "bound" else numbers(kind)


@pytest.mark.parametrize("own", [False, True], ids=["definition", "own"])
def test_ids_are_judged_as_the_stream_that_holds_them(own: bool) -> None:
    """Value and bound, to the bit, of the definition and of a black box's own forward."""
    reference = definition(ROPE) if own else None
    program = Program(ROPE, (UncachedForward("f", (9, 9, 9), 5),))
    (want,) = expect(program, (0, 1, 2), reference=reference)
    assert want is not None
    streams = Streams(ROPE, 9, (0, 1, 2))
    ids = np.stack([streams.tape(5 + row) for row in range(3)], axis=1)
    numbers = given(ROPE, reference, ids.astype(np.int64))
    for kind in ("value", "bound_lower", "bound"):
        assert np.array_equal(numbers(kind), want.numbers(kind)), kind
    tail = given(ROPE, reference, ids.astype(np.int64), 4)("value")
    assert np.allclose(tail, want.value[:, :, 4:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("own", [False, True], ids=["definition", "own"])
def test_a_variant_alone_is_judged_by_its_own_prompts(own: bool) -> None:
    reference = definition(ROPE) if own else None
    (want,) = expect(PROGRAM, (0, 1, 2), reference=reference)
    assert isinstance(want, Generation)
    ids = np.concatenate([loop(ROPE, prompt, STEP.new)[None] for prompt in want.prompts()])
    whole = want.along(ids)("value")
    for index in range(3):
        part = want.variant(index).along(ids[index : index + 1])("value")
        assert np.allclose(part, whole[index : index + 1], rtol=0, atol=1e-12)
    assert not np.allclose(whole[0], whole[1], atol=1e-3)


def test_a_black_box_is_judged_by_its_own_forward() -> None:
    shifted = lambda ids, *noise: np.roll(definition(ROPE)(ids, *noise), 1, axis=-1)  # noqa: E731
    right = loop(ROPE, prompts(PROGRAM, STEP), STEP.new)
    assert judged(PROGRAM, right, expected=expect(PROGRAM, reference=definition(ROPE))).mismatch is None
    assert judged(PROGRAM, right, expected=expect(PROGRAM, reference=shifted)).mismatch is not None


# --- the step ---
def test_a_generation_survives_its_own_json() -> None:
    steps = (STEP, Append("a", (2,), 3), Generate("g", (1, 1, 1), 4, substitutions=((2, 0, 8),)))
    program = Program(ROPE, steps)
    assert Program.from_json(json.loads(json.dumps(program.to_json()))) == program
    assert program.to_json()["steps"][0] == {"op": "generate", "seq": "g", "counts": (6, 6), "seed": 11, "new": 5}


@pytest.mark.parametrize(
    ("config", "step", "words"),
    [
        (CONFIGS["attention-gqa"], STEP, r"steps\[0\]\.op: only the decoder profile generates tokens"),
        (ROPE, Generate("g", (2, 3), 0, new=1), r"steps\[0\]\.counts: want prompts of one length, got \[2, 3\]"),
        (ROPE, Generate("g", (2,), 0, new=0), r"steps\[0\]\.new: want 1 to 38 new tokens after 2 of 40, got 0"),
        (ROPE, Generate("g", (33,), 0, new=8), r"steps\[0\]\.new: want 1 to 7 new tokens after 33 of 40, got 8"),
        (ROPE, Generate("g", (0,), 0, new=1), r"steps\[0\]\.counts: want at least one row and one token"),
    ],
)
def test_a_generation_that_cannot_be_is_refused_with_its_place(config: Config, step: Generate, words: str) -> None:
    with pytest.raises(SpecError, match=words):
        Program(config, (step,))


def test_a_generation_up_to_the_capacity_is_legal_and_touches_no_sequence() -> None:
    steps = (Append("a", (2,), 3), Generate("a", (32, 32), 0, new=8), Append("a", (38,), 3))
    assert Program(ROPE, steps).steps == steps


def test_ids_survive_the_wire_as_what_they_are() -> None:
    traces = execute(NumpyCache(ROPE, weights(ROPE)), PROGRAM, (0, 1, 2))
    got = unpack(*pack(traces))
    assert isinstance(got, Traces)
    assert got.stacked is not None
    output = got.stacked[0].output
    assert output is not None
    assert output.dtype == np.int64
    assert output.shape == (3, 2, 5)
    assert np.array_equal(output[0], loop(ROPE, prompts(PROGRAM, STEP), 5))


def test_the_prompt_of_a_variant_is_frozen_with_it() -> None:
    (step,) = frozen(PROGRAM, 3).steps
    assert step == replace(STEP, seed=derive(STEP.seed, 3))


def test_a_generation_that_kills_is_made_smaller() -> None:
    counts = {step.counts for program in smaller(PROGRAM) for step in program.steps if isinstance(step, Generate)}
    assert {(6,), (1, 1)} <= counts
    assert Program(ROPE, (replace(STEP, new=4),)).size < PROGRAM.size


def test_only_decoders_are_asked_to_generate() -> None:
    hidden = Config("hidden", heads=2, kv_heads=1, head_dim=4, width=8)
    assert not CLAUSE.concerns(hidden)
    assert not CLAUSE.concerns(CONFIGS["attention-gqa"])
    assert not CLAUSE.concerns(replace(ROPE, capacity=1))
    assert CLAUSE.concerns(ROPE)


# --- whole backends ---
@pytest.mark.slow
@pytest.mark.parametrize("address", ["numpy", "eager", "eager-static"])
def test_what_clean_backends_generate_is_right(address: str, tmp_path: Path) -> None:
    if address != "numpy":
        pytest.importorskip("torch", reason="eager needs torch")
    with WorkerClient(WorkerSpec(address)) as client:
        verdict = run_cell(Cell(CLAUSE, LEARNED, "decoder-learned"), client, Effort("brief", 6, 3, 60.0), 0, tmp_path)
    assert verdict.outcome is Outcome.PASS, verdict.sentence
    assert verdict.compared > 100


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["FirstTokenDropped", "FirstRowForAll"])
def test_a_wrong_token_is_a_counterexample_that_replay_runs(fault: str, tmp_path: Path) -> None:
    with WorkerClient(WorkerSpec(FAULTS + fault)) as client:
        verdict = run_cell(Cell(CLAUSE, ROPE, "decoder-rope"), client, Effort("brief", 10, 3, 60.0), 0, tmp_path)
        assert verdict.outcome is Outcome.FAIL, verdict.sentence
        held = counterexample.read(tmp_path / verdict.counterexample)
        again = counterexample.replayed(CLAUSE, client, [], Case.from_json(held.case))
    assert again is not None
    assert again == verdict.mismatch == held.mismatch
    assert again.kind is Kind.GENERATED


def test_what_the_first_generation_leaves_is_found_in_the_second(tmp_path: Path) -> None:
    left = Program(ROPE, (Generate("g", (4,), 1, new=4), Generate("g", (5,), 2, new=4)))
    with WorkerClient(WorkerSpec(FAULTS + "GenerationGoesOn")) as client:
        first = counterexample.attempt(CLAUSE, client, Case((Program(ROPE, left.steps[:1]),)), (0,))
        client.fresh()
        both = counterexample.attempt(CLAUSE, client, Case((left,)), (0,))
    assert first.mismatch is None
    found = both.mismatch
    assert found is not None
    assert (found.kind, found.step, found.row, found.position) == (Kind.GENERATED, 1, 0, 5)
