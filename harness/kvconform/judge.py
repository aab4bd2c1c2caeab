"""Judging: traces and what the oracle expects, to one finding or none. It knows relations, and no backend.

All variants of a case are compared at once; a finding names the first variant, step and position that is off.
Comparisons are written so that NaN fails.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvconform.record import Done, Trace
from kvconform.subject import describe
from kvconform.wire import Traces
from kvconform_specs.claims import Claims
from kvconform_specs.clause import Case, Relation
from kvconform_specs.history import Histories, Row, Token
from kvconform_specs.oracle import Expected
from kvconform_specs.program import Append, Program, Reject

Array = NDArray[Any]


@dataclass(frozen=True)
class Finding:
    """What is wrong, in one sentence, and in which variant of the case."""

    sentence: str
    variant: int


@dataclass(frozen=True)
class Judged:
    """``compared`` counts numbers; ``worst`` is the largest error as a fraction of its bound."""

    finding: Finding | None = None
    compared: int = 0
    worst: float | None = None


@dataclass(frozen=True)
class Observed:
    """One program of a case: what was done and what had to be, all variants stacked.

    ``outputs[i]`` is ``(n, b, t, e)`` as in ``oracle.Expected``.
    """

    program: Program
    trace: Trace
    expected: Sequence[Expected | None]
    outputs: Sequence[Array | None]


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
        words, wants, outputs = _conforming(program, trace, claims, wants)
        if words is not None:
            return None if variant is None else Judged(Finding(words, variant), 0)
        observed.append(Observed(program, trace, wants, outputs))
    compared, worst = 0, None
    for relation in relations:
        words, count, ratio = _RELATIONS[relation](observed)
        compared += count
        worst = ratio if worst is None else worst if ratio is None else max(worst, ratio)
        if words is not None:
            return None if variant is None else Judged(Finding(words, variant), compared, worst)
    return Judged(None, compared, worst)


# --- what every relation takes for granted: legal steps ran, rejects were refused, shapes fit ---
def _conforming(
    program: Program, trace: Trace, claims: Claims, expected: Sequence[Expected | None]
) -> tuple[str | None, list[Expected | None], list[Array | None]]:
    """A sentence, or what is expected and what came, step by step."""
    wants: list[Expected | None] = []
    outputs: list[Array | None] = []
    for number, done in enumerate(trace):
        step, want = program.steps[number], expected[number]
        if done.error is not None:
            return f"{_at(program, number)}: raised {done.error}", [], []
        if isinstance(step, Reject) and done.refused is None:
            return f"{_at(program, number)}: was accepted and must be refused", [], []
        output = None
        if want is not None:
            if claims.returns == "last" and isinstance(step, Append):
                want = want.last()
            words, output = _shaped(program, number, done, want)
            if words is not None:
                return words, [], []
        wants.append(want)
        outputs.append(output)
    return None, wants, outputs


def _shaped(program: Program, number: int, done: Done, want: Expected) -> tuple[str | None, Array | None]:
    """The output as ``(n, b, t, e)``, or a sentence about its shape or dtype."""
    c, got = program.config, done.output
    if got is None:
        return f"{_at(program, number)}: gave no output", None
    b, t = len(want.counts), max(want.counts)
    shape = (b, c.heads, t, c.head_dim) if c.profile == "attention" else (b, t, c.vocabulary)
    if got.shape[1:] != shape:
        return f"{_at(program, number)}: output has the shape {got.shape[1:]}, want {shape}", None
    if got.dtype != np.float32:
        return f"{_at(program, number)}: output is {got.dtype}, want float32", None
    if c.profile == "attention":
        got = got.swapaxes(2, 3).reshape(len(got), b, t, -1)
    return None, got


# --- relations: words or None, how much was compared, largest error over bound ---
Outcome = tuple[str | None, int, float | None]


def _parity(observed: Sequence[Observed]) -> Outcome:
    compared, worst = 0, 0.0
    for one in observed:
        for number, (got, want) in enumerate(zip(one.outputs, one.expected, strict=True)):
            if got is None or want is None:
                continue
            real = want.real[None, :, :, None]  # padding of ragged rows is not judged
            error = np.abs(got - want.value)
            compared += int(np.count_nonzero(want.real)) * got.shape[0] * got.shape[-1]
            if not bool(np.all((error <= want.bound) | ~real)):
                off = ~(error <= want.bound) & real
                bound = np.broadcast_to(want.bound, got.shape)
                return _worst_of(one, number, off, got, want.value, bound), compared, None
            worst = max(worst, _ratio(np.where(real, error, 0.0), want.bound))
    return None, compared, worst if compared else None


def _agreement(observed: Sequence[Observed]) -> Outcome:
    base = _located(observed[0])
    compared, worst = 0, 0.0
    for other in observed[1:]:
        if other.program == observed[0].program:
            continue  # it would be compared with itself
        for number, got in enumerate(other.outputs):
            if got is None:
                continue
            for row, position, key in _cells(other, number):
                if key not in base:
                    continue
                there, its_row, its_position = base[key]
                mine, its = got[:, row, position], _output(observed[0], there)[:, its_row, its_position]
                compared += mine.size
                if np.array_equal(mine, its):
                    continue  # agreement to the bit needs no bound
                allowed = _expected(other, number).bound[:, row, position]
                allowed = allowed + _expected(observed[0], there).bound[:, its_row, its_position]
                error = np.abs(mine - its)
                if not bool(np.all(error <= allowed)):
                    element = int(np.argmax(np.nan_to_num(error[0] / allowed[0], nan=np.inf)))
                    bound = float(np.broadcast_to(allowed, error.shape)[0, element])
                    words = (
                        f"{_at(other.program, number)}{_where(other, number, row, position, element)}: "
                        f"got {mine[0, element]:.6g}, but {its[0, element]:.6g} in {_at(observed[0].program, there)} "
                        f"of the program it must agree with, ± {bound:.2g} ({error[0, element] / bound:.3g}x the bound)"
                    )
                    return words, compared, None
                worst = max(worst, _ratio(error, allowed))
    return None, compared, worst if compared else None


def _unaffected(observed: Sequence[Observed]) -> Outcome:
    compared = 0
    for base, other, number, row, position, same in _pairs(observed):
        if not same:
            continue
        got, was = _output(other, number)[:, row, position], _output(base, number)[:, row, position]
        compared += got.size
        if not bool(np.all(got == was)):
            element = int(np.argmax(~(got[0] == was[0])))
            words = (
                f"{_at(other.program, number)}{_where(other, number, row, position, element)}: {_changed(base, other)} "
                f"must not be seen here, but the output moved from {was[0, element]:.9g} to {got[0, element]:.9g}"
            )
            return words, compared, None
    return None, compared, None


def _affected(observed: Sequence[Observed]) -> Outcome:
    compared = 0
    for base, other, number, row, position, same in _pairs(observed):
        if same:
            continue
        want, was = _expected(other, number), _expected(base, number)
        moves = np.abs(want.value[:, row, position] - was.value[:, row, position])
        bounds = want.bound[:, row, position] + was.bound[:, row, position]
        moved = np.abs(_output(other, number)[:, row, position] - _output(base, number)[:, row, position])
        resolvable = moves > bounds
        compared += int(np.count_nonzero(resolvable))
        felt = moved >= moves - bounds
        if not bool(np.all(felt | ~resolvable)):
            element = int(np.argmax(~felt[0] & resolvable[0]))
            words = (
                f"{_at(other.program, number)}{_where(other, number, row, position, element)}: {_changed(base, other)} "
                f"must move the output by {moves[0, element]:.6g} ± "
                f"{np.broadcast_to(bounds, moves.shape)[0, element]:.2g}, but it moved by {moved[0, element]:.6g}"
            )
            return words, compared, None
    return None, compared, None


def _shapes(observed: Sequence[Observed]) -> Outcome:
    """Shapes were looked at before any relation; count what had one."""
    compared = sum(len(got) for one in observed for got in one.outputs if got is not None)
    return None, compared, None


def _lengths(observed: Sequence[Observed]) -> Outcome:
    compared = 0
    for one in observed:
        histories = Histories()
        for number, (step, done) in enumerate(zip(one.program.steps, one.trace, strict=True)):
            histories.apply(step)
            name = getattr(step, "seq", None)
            if done.length is None or name not in histories.rows:
                continue
            want = tuple(len(row) for row in histories.rows[name])
            compared += len(want)
            if done.length != want:
                said = f"says that its rows hold {list(done.length)} tokens, want {list(want)}"
                return f"{_at(one.program, number)}: {said}", compared, None
    return None, compared, None


_RELATIONS: dict[Relation, Callable[[Sequence[Observed]], Outcome]] = {
    Relation.PARITY: _parity,
    Relation.AGREEMENT: _agreement,
    Relation.UNAFFECTED: _unaffected,
    Relation.AFFECTED: _affected,
    Relation.SHAPES: _shapes,
    Relation.LENGTHS: _lengths,
}


# --- where outputs are ---
Key = tuple[Row, Token | None]
"""What an output is a function of: the history up to its token, and where a needle aimed its query."""


def _cells(one: Observed, number: int) -> list[tuple[int, int, Key]]:
    """Row, position within the step's outputs, and key of each output of a step."""
    want, step = _expected(one, number), one.program.steps[number]
    aim = step.aim if isinstance(step, Append) else None
    cells = []
    for row, (history, count) in enumerate(zip(want.rows, want.counts, strict=True)):
        target = None if aim is None else (aim[0] + row, aim[1])
        start = len(history) - count
        cells += [(row, p, (history[: start + p + 1], target)) for p in range(count)]
    return cells


def _felt(key: Key, reach: int | None) -> Key:
    """The part of a history that an output can depend on: each layer reaches ``window - 1`` tokens further back."""
    return key if reach is None else (key[0][-reach:], key[1])


def _located(one: Observed) -> dict[Key, tuple[int, int, int]]:
    """Step, row and position of each output, by its key."""
    return {
        key: (number, row, position)
        for number, got in enumerate(one.outputs)
        if got is not None
        for row, position, key in _cells(one, number)
    }


def _pairs(observed: Sequence[Observed]) -> list[tuple[Observed, Observed, int, int, int, bool]]:
    """Each output of the base and the one at the same place of each other program; ``same``: their history is."""
    base, c = observed[0], observed[0].program.config
    reach = None if c.window is None else c.layers * (c.window - 1) + 1
    pairs = []
    for other in observed[1:]:
        for number, got in enumerate(base.outputs):
            if got is None:
                continue
            for (row, position, key), (_r, _p, its) in zip(_cells(base, number), _cells(other, number), strict=True):
                pairs.append((base, other, number, row, position, _felt(key, reach) == _felt(its, reach)))
    return pairs


def _output(one: Observed, number: int) -> Array:
    output = one.outputs[number]
    assert output is not None
    return output


def _expected(one: Observed, number: int) -> Expected:
    expected = one.expected[number]
    assert expected is not None
    return expected


def _ratio(error: Array, bound: Array) -> float:
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.nanmax(np.where(error == 0, 0.0, error / bound), initial=0.0))


# --- words ---
def _at(program: Program, number: int) -> str:
    return f"step {number} ({describe(program, number)})"


def _where(one: Observed, number: int, row: int, position: int, element: int) -> str:
    """``, row 0, position 7, head 3``: the logical position of the token, and the head or logit."""
    want, c = _expected(one, number), one.program.config
    logical = len(want.rows[row]) - want.counts[row] + position
    part = f"head {element // c.head_dim}" if c.profile == "attention" else f"logit {element}"
    return f", row {row}, position {logical}, {part}"


def _worst_of(one: Observed, number: int, off: Array, got: Array, value: Array, bound: Array) -> str:
    """The first position that is off, and its worst element."""
    _n, row, position = (int(i) for i in np.argwhere(off.any(axis=-1))[0])
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.nan_to_num(np.abs(got - value)[0, row, position] / bound[0, row, position], nan=np.inf)
    element = int(np.argmax(np.where(off[0, row, position], ratios, -1.0)))
    place = (0, row, position, element)
    return (
        f"{_at(one.program, number)}{_where(one, number, row, position, element)}: got {got[place]:.6g}, "
        f"want {value[place]:.6g} ± {bound[place]:.2g} ({ratios[element]:.3g}x the bound)"
    )


def _changed(base: Observed, other: Observed) -> str:
    """``changing the token at row 0, position 3``."""
    for mine, its in zip(base.program.steps, other.program.steps, strict=True):
        if isinstance(its, Append) and isinstance(mine, Append) and its.swap != mine.swap:
            row, position, _seed = its.swap[-1]
            return f"changing the token at row {row}, position {position}"
    return "the change"
