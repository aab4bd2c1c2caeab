"""The relations that compare outputs: with the definition, and with one another. Written so that NaN fails."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from kvconform.judging.mismatch import Kind, Mismatch, Place, json_number
from kvconform.judging.observed import Array, Checked, Key, Observed, cells, changed, located, pairs, ratio
from kvconform_specs.reference.oracle import Expected, Generation


def shape(observed: Sequence[Observed]) -> Checked:
    """Shapes were looked at before any relation; count what had one."""
    return Checked(None, sum(len(one.got(step)) for one in observed for step in one.computed()))


def parity(observed: Sequence[Observed]) -> Checked:
    compared, worst = 0, 0.0
    for one in observed:
        for step in one.computed():
            got, want = one.got(step), one.want(step)
            real = want.real[None, :, :, None]  # columns without a token are not judged
            error = np.abs(got - want.value)
            compared += int(np.count_nonzero(want.real)) * got.shape[0] * got.shape[-1]
            if not bool(np.all((error <= want.bound_lower) | ~real)):
                off = ~(error <= want.bound) & real
                if bool(off.any()):
                    bound = np.broadcast_to(want.bound, got.shape)
                    return Checked(_worst_of(one, step, off, got, want.value, bound), compared)
            worst = max(worst, ratio(np.where(real, error, 0.0), want.bound_estimate))
    return Checked(None, compared, worst if compared else None)


def agreement(observed: Sequence[Observed]) -> Checked:
    base = located(observed[0])
    compared, worst = 0, 0.0
    for other in observed[1:]:
        if other.program == observed[0].program:
            continue  # it would be compared with itself
        for found in _alike(base, observed[0], other):
            (step, row, column), there, mine, its = found
            compared += mine.size
            if np.array_equal(mine, its):
                continue  # agreement to the bit needs no bound
            error = np.abs(mine - its)
            here, base_place = (other.want(step), row, column), (observed[0].want(there[0]), *there[1:])
            if bool(np.all(error <= _sum("bound_lower", here, base_place))):
                worst = max(worst, ratio(error, _sum("bound_estimate", here, base_place)))
                continue
            allowed = _sum("bound", here, base_place)
            if not bool(np.all(error <= allowed)):
                element = int(np.argmax(np.nan_to_num(error[0] / allowed[0], nan=np.inf)))
                bound = json_number(np.broadcast_to(allowed, error.shape)[0, element])
                return Checked(_apart(Kind.AGREEMENT, found, observed[0], other, element, bound), compared)
            worst = max(worst, ratio(error, allowed))
    return Checked(None, compared, worst if compared else None)


def bitwise(observed: Sequence[Observed]) -> Checked:
    base = located(observed[0])
    compared = 0
    for other in observed[1:]:
        for found in _alike(base, observed[0], other):
            _here, _there, mine, its = found
            compared += mine.size
            if not bool(np.all(mine == its)):
                element = int(np.argmax(~(mine[0] == its[0])))
                return Checked(_apart(Kind.BITWISE, found, observed[0], other, element), compared)
    return Checked(None, compared)


def insensitive(observed: Sequence[Observed]) -> Checked:
    compared = 0
    for base, other, step, row, column, same in pairs(observed):
        if not same:
            continue
        got, was = other.got(step)[:, row, column], base.got(step)[:, row, column]
        compared += got.size
        if not bool(np.all(got == was)) and not wavers(base, other, step, row, column):
            element = int(np.argmax(~(got[0] == was[0])))
            facts = {"got": json_number(got[0, element]), "want": json_number(was[0, element]), **changed(base, other)}
            return Checked(other.at_output(Kind.INSENSITIVE, (step, row, column), element, **facts), compared)
    return Checked(None, compared)


def wavers(base: Observed, other: Observed, step: int, row: int, column: int) -> bool:
    """Whether an output moved within the bounds, where its last bits are not its own tokens' alone (claim
    ``rounding``), or where tokens share the scale of a channel (claim ``quantiser``)."""
    if base.claims.rounding != "shared" and not base.claims.quantiser.by_channel:
        return False
    allowed = _sum("bound", (other.want(step), row, column), (base.want(step), row, column))
    moved = np.abs(other.got(step)[:, row, column] - base.got(step)[:, row, column])
    return bool(np.all(moved <= allowed))


def sensitive(observed: Sequence[Observed]) -> Checked:
    compared = 0
    for base, other, step, row, column, same in pairs(observed):
        if same:
            continue
        want, was = other.want(step), base.want(step)
        moves = np.abs(want.value[:, row, column] - was.value[:, row, column])
        bounds = want.bound[:, row, column] + was.bound[:, row, column]
        moved = np.abs(other.got(step)[:, row, column] - base.got(step)[:, row, column])
        resolvable = moves > bounds
        compared += int(np.count_nonzero(resolvable))
        felt = moved >= moves - bounds
        if not bool(np.all(felt | ~resolvable)):
            element = int(np.argmax(~felt[0] & resolvable[0]))
            facts = {
                "got": json_number(moved[0, element]),
                "want": json_number(moves[0, element]),
                "bound": json_number(np.broadcast_to(bounds, moves.shape)[0, element]),
                **changed(base, other),
            }
            return Checked(other.at_output(Kind.SENSITIVE, (step, row, column), element, **facts), compared)
    return Checked(None, compared)


def finite(observed: Sequence[Observed]) -> Checked:
    compared = 0
    for one in observed:
        for step in one.computed():
            got, want = one.got(step), one.want(step)
            compared += int(np.count_nonzero(want.real)) * got.shape[0] * got.shape[-1]
            off = ~np.isfinite(got) & want.real[None, :, :, None]
            if bool(off.any()):
                _n, row, column, element = (int(i) for i in np.argwhere(off)[0])
                came = json_number(got[0, row, column, element])
                return Checked(one.at_output(Kind.FINITE, (step, row, column), element, got=came), compared)
    return Checked(None, compared)


def same_token(observed: Sequence[Observed]) -> Checked:
    """Only where the lead of the definition's largest logit over every other one exceeds the two bounds."""
    compared = 0
    for one in observed:
        for step in one.computed():
            got, want = one.got(step), one.want(step)
            value = np.where(want.real[None, :, :, None], want.value, 0.0)
            second, first = np.partition(value, -2, axis=-1)[..., -2:].transpose(3, 0, 1, 2)
            clear = want.real & (first - second > 2 * want.bound[..., 0])
            compared += int(np.count_nonzero(clear))
            picked, right = got.argmax(axis=-1), value.argmax(axis=-1)
            off = clear & ~((picked == right) & np.isfinite(got).all(axis=-1))
            if bool(off.any()):
                n, row, column = (int(i) for i in np.argwhere(off)[0])
                token, lead = int(picked[n, row, column]), float(first[n, row, column] - second[n, row, column])
                facts = {"got": token, "want": int(right[n, row, column]), "lead": lead}
                return Checked(one.at_output(Kind.SAME_TOKEN, (step, row, column), token, **facts), compared)
    return Checked(None, compared)


def generated(observed: Sequence[Observed]) -> Checked:
    """Each token is judged by the truth on the backend's own tokens before it. What follows a reserved one is not: no
    program feeds it, and a truth may take it for padding."""
    compared = 0
    for one in observed:
        for step, (want, done) in enumerate(zip(one.expected, one.trace, strict=True)):
            if not isinstance(want, Generation) or done.output is None:
                continue
            got = done.output  # (n, b, new)
            numbers = want.along(got)
            value, bound = numbers("value"), np.broadcast_to(numbers("bound"), numbers("value").shape)
            reserved = np.isin(got, one.program.config.reserved)
            judged: Array = np.cumsum(reserved, axis=-1) - reserved == 0
            best = value.argmax(axis=-1)
            others = np.arange(value.shape[-1]) != best[..., None]
            clear = ((_of(value, best) - value > _of(bound, best) + bound) | ~others).all(axis=-1)
            compared += int(np.count_nonzero(clear & judged))
            off = judged & ~(value - _of(value, got) <= bound + _of(bound, got)).all(axis=-1)
            if bool(off.any()):
                n, row, i = (int(index) for index in np.argwhere(off)[0])
                token, right = int(got[n, row, i]), int(best[n, row, i])
                facts = {
                    "row": row,
                    "column": i,
                    "position": len(want.rows[row]) + i,
                    "got": token,
                    "want": right,
                    "lead": float(value[n, row, i, right] - value[n, row, i, token]),
                    "bound": json_number(bound[n, row, i, right] + bound[n, row, i, token]),
                }
                return Checked(one.at_step(Kind.GENERATED, step, **facts), compared)
    return Checked(None, compared)


def _of(x: Array, token: Array) -> Array:
    """``(..., 1)``: what ``x`` ``(..., V)`` has for each ``token`` ``(...)``."""
    return np.take_along_axis(x, token[..., None], axis=-1)


def _sum(kind: str, *places: tuple[Expected, int, int]) -> Array:
    """That bound of the outputs at two places, together."""
    (one, row, column), (other, its_row, its_column) = places
    return np.asarray(one.numbers(kind)[:, row, column] + other.numbers(kind)[:, its_row, its_column])


Alike = tuple[tuple[int, int, int], tuple[int, int, int], Array, Array]
"""Step, row and column of an output, those of the base's output with the same history, and both outputs."""


def _alike(base: dict[Key, tuple[int, int, int]], first: Observed, other: Observed) -> list[Alike]:
    """Outputs of ``other`` whose history the first program has too."""
    found = []
    for step in other.computed():
        for row, column, key in cells(other, step):
            if key in base:
                there = base[key]
                mine, its = other.got(step)[:, row, column], first.got(there[0])[:, there[1], there[2]]
                found.append(((step, row, column), there, mine, its))
    return found


def _apart(kind: Kind, found: Alike, first: Observed, other: Observed, element: int, bound: Any = None) -> Mismatch:
    """Two outputs with the same history that differ in one number."""
    here, there, mine, its = found
    facts = {"got": json_number(mine[0, element]), "want": json_number(its[0, element]), "bound": bound}
    return other.at_output(kind, here, element, other=Place(**first.place(*there)), **facts)


def _worst_of(one: Observed, step: int, off: Array, got: Array, value: Array, bound: Array) -> Mismatch:
    """The first position that is off, and its worst element."""
    _n, row, column = (int(i) for i in np.argwhere(off.any(axis=-1))[0])
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.nan_to_num(np.abs(got - value)[0, row, column] / bound[0, row, column], nan=np.inf)
    element = int(np.argmax(np.where(off[0, row, column], ratios, -1.0)))
    found = {"got": got, "want": value, "bound": bound}
    numbers = {name: json_number(x[0, row, column, element]) for name, x in found.items()}
    return one.at_output(Kind.PARITY, (step, row, column), element, **numbers)
