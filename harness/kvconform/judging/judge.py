"""Judging: traces and what the oracle expects, to one mismatch or none. It knows relations, and no backend.

All variants of a case are compared at once; a mismatch is of the first variant, program, step and position that is off.
Comparisons are written so that NaN fails.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import msgspec

from kvconform.judging import cache_state, caller_memory, outputs
from kvconform.judging.mismatch import Kind, Mismatch
from kvconform.judging.observed import Array, Checked, Observed
from kvconform.worker.execute import StepResult, Trace
from kvconform.worker.protocol import Traces
from kvconform_specs.claims import Claims
from kvconform_specs.clause import Case, Relation
from kvconform_specs.program import Append, Generate, Program, ReadCache, Reject, Step
from kvconform_specs.reference.oracle import Expected

RELATIONS: dict[Relation, Callable[[Sequence[Observed]], Checked]] = {
    Relation.PARITY: outputs.parity,
    Relation.AGREEMENT: outputs.agreement,
    Relation.INSENSITIVE: outputs.insensitive,
    Relation.SENSITIVE: outputs.sensitive,
    Relation.BITWISE: outputs.bitwise,
    Relation.FINITE: outputs.finite,
    Relation.SAME_TOKEN: outputs.same_token,
    Relation.GENERATED: outputs.generated,
    Relation.SHAPE: outputs.shape,
    Relation.LENGTHS: cache_state.lengths,
    Relation.FREE_SLOTS: cache_state.free_slots,
    Relation.CONTENTS: cache_state.contents,
    Relation.QUANTISED: cache_state.quantised,
    Relation.STABLE_CONTENTS: cache_state.stable_contents,
    Relation.RETAINED_COUNT: cache_state.retained_count,
    Relation.INPUTS: caller_memory.inputs,
    Relation.OUTPUTS: caller_memory.outputs,
    Relation.GRAPH_COUNT: cache_state.graph_count,
    Relation.BYTES: cache_state.taken_bytes,
    Relation.POSITIONS: cache_state.positions,
    Relation.LINEAR_COST: cache_state.linear_cost,
}


def judge(
    case: Case,
    relations: Sequence[Relation],
    claims: Claims,
    traces: Sequence[Traces],
    expected: Sequence[Sequence[Expected | None]],
) -> Checked:
    """Judges a case, all variants together where they went alike, else one by one up to the first mismatch."""
    if all(t.stacked is not None for t in traces):
        together = _judge(case, relations, claims, [t.stacked for t in traces if t.stacked is not None], expected)
        if together.mismatch is None:
            return together
    compared = 0
    for variant, apart in enumerate(zip(*(t.apart() for t in traces), strict=True)):
        wants = [[None if want is None else want.variant(variant) for want in one] for one in expected]
        found = _judge(case, relations, claims, apart, wants)
        compared += found.compared
        if found.mismatch is not None:
            return replace(found, mismatch=msgspec.structs.replace(found.mismatch, variant=variant))
    return Checked(None, compared)


def _judge(
    case: Case,
    relations: Sequence[Relation],
    claims: Claims,
    traces: Sequence[Trace],
    expected: Sequence[Sequence[Expected | None]],
) -> Checked:
    """Judges all variants at once, or one of them."""
    observed = []
    for number, (program, trace, wants) in enumerate(zip(case.programs, traces, expected, strict=True)):
        one, mismatch = observe(program, trace, claims, wants, number)
        if mismatch is not None:
            return Checked(mismatch, 0)
        observed.append(one)
    compared, worst = 0, None
    for relation in relations:
        found = RELATIONS[relation](observed)
        compared += found.compared
        worst = found.worst if worst is None else worst if found.worst is None else max(worst, found.worst)
        if found.mismatch is not None:
            return Checked(found.mismatch, compared, worst)
    return Checked(None, compared, worst)


# --- what every relation takes for granted: legal steps ran, rejects were refused, shapes fit ---
def observe(
    program: Program, trace: Trace, claims: Claims, expected: Sequence[Expected | None], index: int = 0
) -> tuple[Observed, Mismatch | None]:
    """A program as relations see it, up to the first step that went wrong, and what was wrong with that step."""
    wants: list[Expected | None] = []
    arrays: list[Array | None] = []
    one = Observed(program, trace, wants, arrays, claims, index)
    for number, done in enumerate(trace):
        step, want = program.steps[number], expected[number]
        if want is not None and claims.returns == "last" and isinstance(step, Append):
            want = want.last()
        wrong = _wrong(program, step, done, want)
        if wrong is not None:
            return one, Mismatch(**one.place(number), **wrong)
        computes = want is not None and not isinstance(step, ReadCache | Generate)
        wants.append(want)
        arrays.append(_tokens_first(program, done) if computes else None)
    return one, None


def _wrong(program: Program, step: Step, done: StepResult, want: Expected | None) -> dict[str, Any] | None:
    """What is wrong with a step, whatever its numbers should be: the fields of a mismatch, or None."""
    c, got = program.config, done.output
    if done.returned is not None:
        return {"kind": Kind.NOT_NUMERIC, "got": done.returned}
    if done.error is not None:
        return {"kind": Kind.RAISED, "error": done.error}
    if isinstance(step, Reject):
        return {"kind": Kind.ACCEPTED} if done.refused is None else None
    if isinstance(step, ReadCache):
        width = c.kept
        if got is None or got.shape[-1] == width:
            return None
        return {"kind": Kind.SHAPE, "part": "read", "got": got.shape[-1:], "want": (width,)}
    if isinstance(step, Generate):
        return _wrong_array("token ids", got, (len(step.counts), step.new), "int64") or _strange(got, c.vocabulary)
    if want is None:
        return None
    b, t = len(want.counts), max(want.counts)
    shape = (b, c.heads, t, c.head_dim) if c.profile == "attention" else (b, t, c.outputs)
    return _wrong_array("output", got, shape, "float32")


def _wrong_array(part: str, got: Array | None, shape: tuple[int, ...], dtype: str) -> dict[str, Any] | None:
    if got is None:
        return {"kind": Kind.NO_OUTPUT}
    if got.shape[1:] != shape:  # behind the variants
        return {"kind": Kind.SHAPE, "part": part, "got": got.shape[1:], "want": shape}
    return {"kind": Kind.DTYPE, "part": part, "got": got.dtype.name, "want": dtype} if got.dtype != dtype else None


def _strange(ids: Array | None, vocabulary: int) -> dict[str, Any] | None:
    assert ids is not None
    strange = ids[(ids < 0) | (ids >= vocabulary)]
    if not strange.size:
        return None
    return {"kind": Kind.TOKEN_ID, "got": int(strange[0]), "want": 0, "want_max": vocabulary - 1}


def _tokens_first(program: Program, done: StepResult) -> Array | None:
    """The output as ``(n, b, t, e)``."""
    got = done.output
    if got is None or program.config.profile != "attention":
        return got
    return got.swapaxes(2, 3).reshape(len(got), got.shape[1], got.shape[3], program.config.outputs)
