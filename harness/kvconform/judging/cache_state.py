"""The relations that look at what a backend says and shows of its cache: lengths, contents, bytes, work, graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from kvconform.judging.mismatch import Kind, Place, json_number
from kvconform.judging.observed import Array, Checked, Observed
from kvconform_specs.claims import changes_at
from kvconform_specs.costs import held_bytes, multiply_adds, retained, slots
from kvconform_specs.history import Histories, Row, epoch_of
from kvconform_specs.program import Append, Close, Step
from kvconform_specs.reference.quantisation import grid_error

VACUOUS = 0.25
"""Of a step: where numbers may be that far from a multiple, half of all numbers are."""


def lengths(observed: Sequence[Observed]) -> Checked:
    return _reported(observed, Kind.LENGTHS, "length", lambda one, n: n)


def free_slots(observed: Sequence[Observed]) -> Checked:
    return _reported(observed, Kind.FREE_SLOTS, "free_slots", lambda one, n: one.program.config.capacity - n)


def _reported(observed: Sequence[Observed], kind: Kind, name: str, want_of: Callable[[Observed, int], int]) -> Checked:
    """What a backend reports of each row, against what follows from how many tokens the row holds."""
    compared = 0
    for one in observed:
        for number, _step, rows, got in _after(one, name):
            want = tuple(want_of(one, len(row)) for row in rows)
            compared += len(want)
            if got != want:
                return Checked(one.at_step(kind, number, got=got, want=want), compared)
    return Checked(None, compared)


def contents(observed: Sequence[Observed]) -> Checked:
    compared, worst = 0, 0.0
    for one in observed:
        for step in one.reads():
            got, want, held = one.trace[step].output, one.want(step), one.trace[step].reported["token_counts"]
            assert got is not None
            for row, history in enumerate(want.rows):
                shown = min(held[row], len(history))
                mine = got[:, row, held[row] - shown : held[row]]
                first = len(history) - shown
                value = want.value[:, row, first : first + shown]
                bound = want.bound[:, row, first : first + shown]
                compared += mine.size
                off = ~(np.abs(mine - value) <= bound)
                if bool(off.any()):
                    n, slot, element = (int(i) for i in np.argwhere(off)[0])
                    cell = n, slot, element
                    facts = {
                        "got": json_number(mine[cell]),
                        "want": json_number(value[cell]),
                        "bound": json_number(bound[cell]),
                    }
                    place = step, row, first + slot
                    return Checked(one.at_read(Kind.CONTENTS, place, element, **facts), compared)
                worst = max(worst, float(np.max(np.abs(mine - value) / np.where(bound > 0, bound, 1), initial=0.0)))
    return Checked(None, compared, worst if compared else None)


def quantised(observed: Sequence[Observed]) -> Checked:
    """The numbers of a head over its step are integers: the largest of them is known to be ``2^(bits - 1) - 1``."""
    compared, worst = 0, 0.0
    for one in observed:
        c, largest = one.program.config, 2 ** (one.claims.kv_bits - 1) - 1
        error = grid_error(largest, c.dtype)
        if error >= VACUOUS:
            continue
        for step in one.reads():
            got, want, held = one.trace[step].output, one.want(step), one.trace[step].reported["token_counts"]
            assert got is not None
            for row, history in enumerate(want.rows):
                shown = min(held[row], len(history))
                past = max(shown - one.claims.residual, 0)
                mine = got[:, row, held[row] - shown : held[row] - shown + past].astype(np.float64)
                heads = mine.reshape(*mine.shape[:2], 2 * c.kv_heads, c.head_dim)
                unit = _largest_of_groups(heads, one.claims.quantiser.group) / largest
                nearest = np.rint(heads / np.where(unit == 0, 1, unit)) * unit
                away, allowed = (x.reshape(mine.shape) for x in (np.abs(heads - nearest), error * unit))
                compared += mine.size
                off = ~(away <= allowed)
                if bool(off.any()):
                    cell = tuple(int(i) for i in np.argwhere(off)[0])
                    number, want_number, bound = mine[cell], nearest.reshape(mine.shape)[cell], allowed[cell]
                    facts = {"got": json_number(number), "want": json_number(want_number), "bound": json_number(bound)}
                    place = step, row, len(history) - shown + cell[1]
                    return Checked(one.at_read(Kind.QUANTISED, place, cell[2], **facts), compared)
                worst = max(worst, float(np.max(away / np.where(allowed > 0, allowed, 1), initial=0.0)))
    return Checked(None, compared, worst if compared else None)


def _largest_of_groups(heads: Array, size: int | None) -> Array:
    """The largest magnitude in the group of each number of ``(..., d)``: ``size`` neighbours, or all."""
    found, d = np.empty_like(heads), heads.shape[-1]
    for first in range(0, d, size or d):
        cut = slice(first, first + (size or d))
        found[..., cut] = np.abs(heads[..., cut]).max(axis=-1, keepdims=True)
    return found


def stable_contents(observed: Sequence[Observed]) -> Checked:
    """A token is known by its history, so that rows may move."""
    compared = 0
    for one in observed:
        known: dict[tuple[Row, int], tuple[int, int, Array]] = {}
        changes = changes_at(one.program.config, one.claims)
        for step, _step, rows, token_counts in _after(one, "token_counts"):
            output = one.trace[step].output
            if output is None:
                continue
            for row, history in enumerate(rows):
                shown, epoch = min(token_counts[row], len(history)), epoch_of(len(history), changes)
                for slot in range(shown):
                    position = len(history) - shown + slot
                    now = output[:, row, token_counts[row] - shown + slot]
                    since, its_row, was = known.setdefault((history[: position + 1], epoch), (step, row, now))
                    if since == step:
                        continue
                    compared += now.size
                    same = (now == was) | (np.isnan(now) & (one.claims.retention == "window"))  # evicted by some layers
                    if not bool(np.all(same)):
                        n, element = (int(i) for i in np.argwhere(~same)[0])
                        other = Place(**one.place(since, its_row), position=position)
                        facts = {
                            "got": json_number(now[n, element]),
                            "want": json_number(was[n, element]),
                            "other": other,
                        }
                        place = step, row, position
                        return Checked(one.at_read(Kind.STABLE_CONTENTS, place, element, **facts), compared)
    return Checked(None, compared)


def retained_count(observed: Sequence[Observed]) -> Checked:
    compared = 0
    for one in observed:
        c = one.program.config
        for step, _step, rows, got in _after(one, "token_counts"):
            compared += len(rows)
            for row, history in enumerate(rows):  # the layer that holds most shows how many there are
                held = [retained(one.claims, c, at, len(history), _longest(one, step)) for at in c.caching]
                least, most = (max(numbers) for numbers in zip(*held, strict=True))
                if not least <= got[row] <= most:
                    facts = {"row": row, "got": got[row], "want": least, "want_max": most}
                    return Checked(one.at_step(Kind.RETAINED_COUNT, step, **facts), compared)
    return Checked(None, compared)


def _longest(one: Observed, number: int) -> int:
    """Tokens of the longest append up to a step."""
    steps = one.program.steps[: number + 1]
    return max((max(step.counts) for step in steps if isinstance(step, Append)), default=0)


def graph_count(observed: Sequence[Observed]) -> Checked:
    compared = 0
    for one in observed:
        most = one.claims.max_graphs or 0
        for step, done in enumerate(one.trace):
            for compiled in done.reported.get("graph_count", ()):
                compared += 1
                if compiled > most:
                    return Checked(one.at_step(Kind.GRAPH_COUNT, step, got=compiled, want_max=most), compared)
    return Checked(None, compared)


def taken_bytes(observed: Sequence[Observed]) -> Checked:
    compared = 0
    for one in observed:
        c = one.program.config
        for step, _step, rows, (got,) in _after(one, "bytes"):
            compared += 1
            least, most = held_bytes(one.claims, c, tuple(map(len, rows)), _longest(one, step))
            if not least <= got <= most:
                return Checked(one.at_step(Kind.BYTES, step, got=got, want=least, want_max=most), compared)
    return Checked(None, compared)


def positions(observed: Sequence[Observed]) -> Checked:
    """``b t`` tokens times every weight matrix, and ``2 b h t d`` for each slot and layer that attention reads. Where
    the last position is asked for alone, ``lm_head`` may be left out for the others."""
    compared = 0
    for one in observed:
        for number, step, work, depth in _counted(one):
            c, b, t = one.program.config, len(step.counts), max(step.counts)
            least = multiply_adds(c, 0, t, b, keys=0, last_only=step.last_only)
            most = multiply_adds(c, 0, t, b, keys=slots(one.claims, c, depth))
            compared += 1
            if not least <= work <= most:
                facts = {"got": work, "want": least, "want_max": most, "new_tokens": t, "depths": (depth,)}
                return Checked(one.at_step(Kind.POSITIONS, number, **facts), compared)
    return Checked(None, compared)


def linear_cost(observed: Sequence[Observed]) -> Checked:
    """``w(s)`` of steps of equal size at three depths lies on a line, whose slope is attention's at most; where a
    window is full it may be less."""
    compared = 0
    for one in observed:
        c = one.program.config
        alike: dict[tuple[str, tuple[int, ...]], list[tuple[int, int, int]]] = {}
        for number, step, work, depth in _counted(one):
            points = alike.setdefault((step.seq, step.counts), [])
            points.append((depth, work, number))
            if len(points) < 3:
                continue
            (s0, s1, s2), (w0, w1, w2), steps = zip(*points[-3:], strict=True)
            b, t = len(step.counts), max(step.counts)
            most = multiply_adds(c, 0, t, b, keys=1) - multiply_adds(c, 0, t, b, keys=0)
            compared += 1
            before, after = (w1 - w0) * (s2 - s1), (w2 - w1) * (s1 - s0)
            bent = c.window is not None and s2 > c.window and 0 <= after < before  # a full window grows no more
            if not (after == before or bent) or not 0 <= w1 - w0 <= most * (s1 - s0):
                facts = {"got": (w0, w1, w2), "want_max": most, "steps": steps, "depths": (s0, s1, s2)}
                return Checked(one.at_step(Kind.LINEAR_COST, number, **facts), compared)
    return Checked(None, compared)


def _counted(one: Observed) -> Iterator[tuple[int, Append, int, int]]:
    """Steps whose multiply-adds were counted: number, step, multiply-adds, tokens the longest row holds afterwards."""
    for number, step, rows, (macs,) in _after(one, "macs"):
        if isinstance(step, Append):
            yield number, step, macs, max(map(len, rows))


def _after(one: Observed, name: str) -> Iterator[tuple[int, Step, tuple[Row, ...], tuple[int, ...]]]:
    """Each step after which the backend reported that count: its number, the step, the histories of the sequence that
    it was about, and the count."""
    histories = Histories()
    for number, step in enumerate(one.program.steps[: len(one.trace)]):
        histories.apply(step)
        rows, reported = histories.rows.get(getattr(step, "seq", "")), one.trace[number].reported.get(name)
        if rows is not None and reported is not None and not isinstance(step, Close):
            yield number, step, rows, reported
