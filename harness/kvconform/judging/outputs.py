"""The relations that compare outputs: with the definition, and with one another. Written so that NaN fails."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvconform.judging.observed import Array, Key, Observed, Outcome, at, cells, changed, located, pairs, ratio, where
from kvconform_specs.reference.oracle import Expected, Generation


def shape(observed: Sequence[Observed]) -> Outcome:
    """Shapes were looked at before any relation; count what had one."""
    return None, sum(len(one.got(number)) for one in observed for number in one.computed()), None


def parity(observed: Sequence[Observed]) -> Outcome:
    compared, worst = 0, 0.0
    for one in observed:
        for number in one.computed():
            got, want = one.got(number), one.want(number)
            real = want.real[None, :, :, None]  # columns without a token are not judged
            error = np.abs(got - want.value)
            compared += int(np.count_nonzero(want.real)) * got.shape[0] * got.shape[-1]
            if not bool(np.all((error <= want.bound_lower) | ~real)):
                off = ~(error <= want.bound) & real
                if bool(off.any()):
                    bound = np.broadcast_to(want.bound, got.shape)
                    return _worst_of(one, number, off, got, want.value, bound), compared, None
            worst = max(worst, ratio(np.where(real, error, 0.0), want.bound_estimate))
    return None, compared, worst if compared else None


def agreement(observed: Sequence[Observed]) -> Outcome:
    base = located(observed[0])
    compared, worst = 0, 0.0
    for other in observed[1:]:
        if other.program == observed[0].program:
            continue  # it would be compared with itself
        for number, row, column, there, mine, its in _alike(base, observed[0], other):
            compared += mine.size
            if np.array_equal(mine, its):
                continue  # agreement to the bit needs no bound
            error = np.abs(mine - its)
            here, base_place = (other.want(number), row, column), (observed[0].want(there[0]), *there[1:])
            if bool(np.all(error <= _sum("floor", here, base_place))):
                worst = max(worst, ratio(error, _sum("likely", here, base_place)))
                continue
            allowed = _sum("bound", here, base_place)
            if not bool(np.all(error <= allowed)):
                element = int(np.argmax(np.nan_to_num(error[0] / allowed[0], nan=np.inf)))
                bound = float(np.broadcast_to(allowed, error.shape)[0, element])
                words = (
                    f"{at(other.program, number)}{where(other, number, row, column, element)}: "
                    f"got {mine[0, element]:.6g}, but {its[0, element]:.6g} in {at(observed[0].program, there[0])} "
                    f"of the program it must agree with, ± {bound:.2g} ({error[0, element] / bound:.3g}x the bound)"
                )
                return words, compared, None
            worst = max(worst, ratio(error, allowed))
    return None, compared, worst if compared else None


def bitwise(observed: Sequence[Observed]) -> Outcome:
    base = located(observed[0])
    compared = 0
    for other in observed[1:]:
        for number, row, column, there, mine, its in _alike(base, observed[0], other):
            compared += mine.size
            if not bool(np.all(mine == its)):
                element = int(np.argmax(~(mine[0] == its[0])))
                words = (
                    f"{at(other.program, number)}{where(other, number, row, column, element)}: got "
                    f"{mine[0, element]:.9g}, but {its[0, element]:.9g} in {at(observed[0].program, there[0])}, and "
                    f"must be the same to the bit"
                )
                return words, compared, None
    return None, compared, None


def insensitive(observed: Sequence[Observed]) -> Outcome:
    compared = 0
    for base, other, number, row, column, same in pairs(observed):
        if not same:
            continue
        got, was = other.got(number)[:, row, column], base.got(number)[:, row, column]
        compared += got.size
        if not bool(np.all(got == was)) and not wavers(base, other, number, row, column):
            element = int(np.argmax(~(got[0] == was[0])))
            words = (
                f"{at(other.program, number)}{where(other, number, row, column, element)}: {changed(base, other)} "
                f"must not be seen here, but the output moved from {was[0, element]:.9g} to {got[0, element]:.9g}"
            )
            return words, compared, None
    return None, compared, None


def wavers(base: Observed, other: Observed, number: int, row: int, column: int) -> bool:
    """Whether an output moved within the bounds, where its last bits are not its own tokens' alone (claim
    ``rounding``)."""
    if base.claims.rounding != "shared":
        return False
    allowed = _sum("bound", (other.want(number), row, column), (base.want(number), row, column))
    moved = np.abs(other.got(number)[:, row, column] - base.got(number)[:, row, column])
    return bool(np.all(moved <= allowed))


def sensitive(observed: Sequence[Observed]) -> Outcome:
    compared = 0
    for base, other, number, row, column, same in pairs(observed):
        if same:
            continue
        want, was = other.want(number), base.want(number)
        moves = np.abs(want.value[:, row, column] - was.value[:, row, column])
        bounds = want.bound[:, row, column] + was.bound[:, row, column]
        moved = np.abs(other.got(number)[:, row, column] - base.got(number)[:, row, column])
        resolvable = moves > bounds
        compared += int(np.count_nonzero(resolvable))
        felt = moved >= moves - bounds
        if not bool(np.all(felt | ~resolvable)):
            element = int(np.argmax(~felt[0] & resolvable[0]))
            words = (
                f"{at(other.program, number)}{where(other, number, row, column, element)}: {changed(base, other)} "
                f"must move the output by {moves[0, element]:.6g} ± "
                f"{np.broadcast_to(bounds, moves.shape)[0, element]:.2g}, but it moved by {moved[0, element]:.6g}"
            )
            return words, compared, None
    return None, compared, None


def finite(observed: Sequence[Observed]) -> Outcome:
    compared = 0
    for one in observed:
        for number in one.computed():
            got, want = one.got(number), one.want(number)
            compared += int(np.count_nonzero(want.real)) * got.shape[0] * got.shape[-1]
            off = ~np.isfinite(got) & want.real[None, :, :, None]
            if bool(off.any()):
                _n, row, column, element = (int(i) for i in np.argwhere(off)[0])
                place = f"{at(one.program, number)}{where(one, number, row, column, element)}"
                return f"{place}: got {got[0, row, column, element]} from finite inputs", compared, None
    return None, compared, None


def same_token(observed: Sequence[Observed]) -> Outcome:
    """Only where the lead of the definition's largest logit over every other one exceeds the two bounds."""
    compared = 0
    for one in observed:
        for number in one.computed():
            got, want = one.got(number), one.want(number)
            value = np.where(want.real[None, :, :, None], want.value, 0.0)
            second, first = np.partition(value, -2, axis=-1)[..., -2:].transpose(3, 0, 1, 2)
            clear = want.real & (first - second > 2 * want.bound[..., 0])
            compared += int(np.count_nonzero(clear))
            picked, right = got.argmax(axis=-1), value.argmax(axis=-1)
            off = clear & ~((picked == right) & np.isfinite(got).all(axis=-1))
            if bool(off.any()):
                n, row, column = (int(i) for i in np.argwhere(off)[0])
                place = f"{at(one.program, number)}{where(one, number, row, column, int(picked[n, row, column]))}"
                lead = first[n, row, column] - second[n, row, column]
                words = f"{place}: is the largest, but it must be logit {right[n, row, column]} by a lead of {lead:.3g}"
                return words, compared, None
    return None, compared, None


def generated(observed: Sequence[Observed]) -> Outcome:
    """Each token is judged by the truth on the backend's own tokens before it. What follows a reserved one is not: no
    program feeds it, and a truth may take it for padding."""
    compared = 0
    for one in observed:
        for number, (want, done) in enumerate(zip(one.expected, one.trace, strict=True)):
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
                token, right = got[n, row, i], best[n, row, i]
                lead = value[n, row, i, right] - value[n, row, i, token]
                within = bound[n, row, i, right] + bound[n, row, i, token]
                place = f"{at(one.program, number)}, row {row}, position {len(want.rows[row]) + i}"
                words = f"got token {token}, want {right}, whose logit leads by {lead:.3g} ± {within:.2g}"
                return f"{place}: {words}", compared, None
    return None, compared, None


def _of(x: Array, token: Array) -> Array:
    """``(..., 1)``: what ``x`` ``(..., V)`` has for each ``token`` ``(...)``."""
    return np.take_along_axis(x, token[..., None], axis=-1)


def _sum(kind: str, *places: tuple[Expected, int, int]) -> Array:
    """That bound of the outputs at two places, together."""
    (one, row, column), (other, its_row, its_column) = places
    return np.asarray(one.numbers(kind)[:, row, column] + other.numbers(kind)[:, its_row, its_column])


def _alike(
    base: dict[Key, tuple[int, int, int]], first: Observed, other: Observed
) -> list[tuple[int, int, int, tuple[int, int, int], Array, Array]]:
    """Outputs of ``other`` whose history the first program has too: step, row, column, where that is, and both."""
    found = []
    for number in other.computed():
        for row, column, key in cells(other, number):
            if key in base:
                there = base[key]
                mine, its = other.got(number)[:, row, column], first.got(there[0])[:, there[1], there[2]]
                found.append((number, row, column, there, mine, its))
    return found


def _worst_of(one: Observed, number: int, off: Array, got: Array, value: Array, bound: Array) -> str:
    """The first position that is off, and its worst element."""
    _n, row, column = (int(i) for i in np.argwhere(off.any(axis=-1))[0])
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.nan_to_num(np.abs(got - value)[0, row, column] / bound[0, row, column], nan=np.inf)
    element = int(np.argmax(np.where(off[0, row, column], ratios, -1.0)))
    place = (0, row, column, element)
    return (
        f"{at(one.program, number)}{where(one, number, row, column, element)}: got {got[place]:.6g}, "
        f"want {value[place]:.6g} ± {bound[place]:.2g} ({ratios[element]:.3g}x the bound)"
    )
