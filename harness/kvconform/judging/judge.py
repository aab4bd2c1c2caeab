"""Judging: traces and what the oracle expects, to one finding or none. It knows relations, and no backend.

All variants of a case are compared at once; a finding names the first variant, step and position that is off.
Comparisons are written so that NaN fails.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from kvconform.judging import cache_state, outputs
from kvconform.judging.observed import Array, Observed, Outcome, at
from kvconform.worker.execute import StepResult, Trace
from kvconform.worker.protocol import Traces
from kvconform_specs.claims import Claims
from kvconform_specs.clause import Case, Relation
from kvconform_specs.program import Append, Generate, Program, ReadCache, Reject
from kvconform_specs.reference.oracle import Expected


@dataclass(frozen=True)
class Finding:
    """What is wrong, in one sentence, and in which variant of the case. ``raised``: a legal step raised."""

    sentence: str
    variant: int
    raised: bool = False


@dataclass(frozen=True)
class Judged:
    """``compared`` counts numbers; ``worst`` is the largest error as a fraction of its bound."""

    finding: Finding | None = None
    compared: int = 0
    worst: float | None = None


RELATIONS: dict[Relation, Callable[[Sequence[Observed]], Outcome]] = {
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
    Relation.STABLE_CONTENTS: cache_state.stable_contents,
    Relation.RETAINED_COUNT: cache_state.retained_count,
    Relation.GRAPH_COUNT: cache_state.graph_count,
    Relation.BYTES: cache_state.held_bytes,
    Relation.POSITIONS: cache_state.positions,
    Relation.LINEAR_COST: cache_state.linear_cost,
}


def judge(
    case: Case,
    relations: Sequence[Relation],
    claims: Claims,
    traces: Sequence[Traces],
    expected: Sequence[Sequence[Expected | None]],
) -> Judged:
    """Judges a case, all variants together where they went alike, else one by one up to the first finding."""
    if all(t.stacked is not None for t in traces):
        together = _judge(case, relations, claims, [t.stacked for t in traces if t.stacked is not None], expected, None)
        if together is not None:
            return together
    compared = 0
    for variant, apart in enumerate(zip(*(t.apart() for t in traces), strict=True)):
        one = _judge(case, relations, claims, apart, expected, variant)
        assert one is not None
        compared += one.compared
        if one.finding is not None:
            return one
    return Judged(None, compared)


def _judge(
    case: Case,
    relations: Sequence[Relation],
    claims: Claims,
    traces: Sequence[Trace],
    expected: Sequence[Sequence[Expected | None]],
    variant: int | None,
) -> Judged | None:
    """Judges all variants at once (``variant`` None; returns None if there is a finding) or one of them."""
    observed = []
    for program, trace, wants in zip(case.programs, traces, expected, strict=True):
        if variant is not None:
            wants = [None if want is None else want.variant(variant) for want in wants]
        words, wants, outputs = conforming(program, trace, claims, wants)
        if words is not None:
            raised = trace[len(wants)].error is not None  # the step that words are about
            return None if variant is None else Judged(Finding(words, variant, raised), 0)
        observed.append(Observed(program, trace, wants, outputs, claims))
    compared, worst = 0, None
    for relation in relations:
        words, count, ratio = RELATIONS[relation](observed)
        compared += count
        worst = ratio if worst is None else worst if ratio is None else max(worst, ratio)
        if words is not None:
            return None if variant is None else Judged(Finding(words, variant), compared, worst)
    return Judged(None, compared, worst)


# --- what every relation takes for granted: legal steps ran, rejects were refused, shapes fit ---
def conforming(
    program: Program, trace: Trace, claims: Claims, expected: Sequence[Expected | None]
) -> tuple[str | None, list[Expected | None], list[Array | None]]:
    """A sentence about the first step that went wrong or None, and what is expected and what came up to there."""
    wants: list[Expected | None] = []
    outputs: list[Array | None] = []
    for number, done in enumerate(trace):
        step, want = program.steps[number], expected[number]
        if done.error is not None:
            return f"{at(program, number)}: raised {done.error}", wants, []
        if isinstance(step, Reject) and done.refused is None:
            return f"{at(program, number)}: was accepted and must be refused", wants, []
        output = None
        if isinstance(step, ReadCache):
            if done.output is not None and (words := _shown(program, done)) is not None:
                return f"{at(program, number)}: {words}", wants, []
        elif isinstance(step, Generate):
            if (words := _picked(program, step, done)) is not None:
                return f"{at(program, number)}: {words}", wants, []
        elif want is not None:
            if claims.returns == "last" and isinstance(step, Append):
                want = want.last()
            words, output = _shaped(program, number, done, want)
            if words is not None:
                return words, wants, []
        wants.append(want)
        outputs.append(output)
    return None, wants, outputs


def _shaped(program: Program, number: int, done: StepResult, want: Expected) -> tuple[str | None, Array | None]:
    """The output as ``(n, b, t, e)``, or a sentence about its shape or dtype."""
    c, got = program.config, done.output
    if got is None:
        return f"{at(program, number)}: gave no output", None
    b, t = len(want.counts), max(want.counts)
    shape = (b, c.heads, t, c.head_dim) if c.profile == "attention" else (b, t, c.outputs)
    if got.shape[1:] != shape:
        return f"{at(program, number)}: output has the shape {got.shape[1:]}, want {shape}", None
    if got.dtype != np.float32:
        return f"{at(program, number)}: output is {got.dtype}, want float32", None
    if c.profile == "attention":
        got = got.swapaxes(2, 3).reshape(len(got), b, t, -1)
    return None, got


def _picked(program: Program, step: Generate, done: StepResult) -> str | None:
    """What is wrong with generated token ids, whatever they should be, or None."""
    got, shape = done.output, (len(step.counts), step.new)
    if got is None:
        return "gave no output"
    if got.shape[1:] != shape:
        return f"generated ids of the shape {got.shape[1:]}, want {shape}"
    if got.dtype != np.int64:
        return f"generated ids are {got.dtype}, want int64"
    strange = got[(got < 0) | (got >= program.config.vocabulary)]
    return f"generated token {strange[0]}, want ids of 0..{program.config.vocabulary - 1}" if strange.size else None


def _shown(program: Program, done: StepResult) -> str | None:
    """What is wrong with the shape of a read, or None."""
    c, got = program.config, done.output
    assert got is not None
    width = c.layers * 2 * c.kv_heads * c.head_dim
    return None if got.shape[-1] == width else f"shows {got.shape[-1]} numbers a token, want {width}"
