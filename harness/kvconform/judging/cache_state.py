"""The relations that look at what a backend says and shows of its cache: lengths, contents, bytes, work, graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from kvconform.judging.observed import Array, Observed, Outcome, at
from kvconform_specs.config import Config
from kvconform_specs.costs import cache_bytes, multiply_adds, slots
from kvconform_specs.history import Histories, Row
from kvconform_specs.program import Append, Close, Step


def lengths(observed: Sequence[Observed]) -> Outcome:
    return _told(observed, "length", "says that its rows hold {} tokens, want {}", lambda one, n: n)


def free_slots(observed: Sequence[Observed]) -> Outcome:
    return _told(
        observed,
        "free_slots",
        "says that its rows take {} more tokens, want {}",
        lambda o, n: o.program.config.capacity - n,
    )


def _told(observed: Sequence[Observed], name: str, words: str, want_of: Callable[[Observed, int], int]) -> Outcome:
    compared = 0
    for one in observed:
        for number, _step, rows in _after(one):
            told = one.trace[number].reported.get(name)
            if told is None:
                continue
            want = tuple(want_of(one, len(row)) for row in rows)
            compared += len(want)
            if told != want:
                return f"{at(one.program, number)}: {words.format(list(told), list(want))}", compared, None
    return None, compared, None


def contents(observed: Sequence[Observed]) -> Outcome:
    compared, worst = 0, 0.0
    for one in observed:
        for number in one.reads():
            got, want, held = one.trace[number].output, one.want(number), one.trace[number].reported["token_counts"]
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
                    words = (
                        f"{at(one.program, number)}, row {row}, position {first + slot}, {_part(one, element)}: holds "
                        f"{mine[n, slot, element]:.6g}, want {value[n, slot, element]:.6g}"
                        + (f" ± {bound[n, slot, element]:.2g}" if bound[n, slot, element] else "")
                    )
                    return words, compared, None
                worst = max(worst, float(np.max(np.abs(mine - value) / np.where(bound > 0, bound, 1), initial=0.0)))
    return None, compared, worst if compared else None


def stable_contents(observed: Sequence[Observed]) -> Outcome:
    """A token is known by its history, so that rows may move."""
    compared = 0
    for one in observed:
        known: dict[Row, tuple[int, Array]] = {}
        for number, _step, rows in _after(one):
            output, told = one.trace[number].output, one.trace[number].reported
            if output is None or "token_counts" not in told:
                continue
            for row, history in enumerate(rows):
                shown = min(told["token_counts"][row], len(history))
                for slot in range(shown):
                    position = len(history) - shown + slot
                    now = output[:, row, told["token_counts"][row] - shown + slot]
                    since, was = known.setdefault(history[: position + 1], (number, now))
                    if since == number:
                        continue
                    compared += now.size
                    same = (now == was) | (np.isnan(now) & (one.claims.retention == "window"))  # evicted by some layers
                    if not bool(np.all(same)):
                        n, element = (int(i) for i in np.argwhere(~same)[0])
                        words = (
                            f"{at(one.program, number)}, row {row}, position {position}, {_part(one, element)}: holds "
                            f"{now[n, element]:.9g}, and held {was[n, element]:.9g} at step {since}"
                        )
                        return words, compared, None
    return None, compared, None


def retained_count(observed: Sequence[Observed]) -> Outcome:
    compared = 0
    for one in observed:
        window = _shown(one.program.config) if one.claims.retention == "window" else None
        for number, _step, rows in _after(one):
            told = one.trace[number].reported.get("token_counts")
            if told is None:
                continue
            compared += len(rows)
            for row, history in enumerate(rows):
                least = len(history) if window is None else min(len(history), window - 1)
                if not least <= told[row] <= len(history):
                    want = f"{least}" if least == len(history) else f"{least} to {len(history)}"
                    return (
                        f"{at(one.program, number)}, row {row}: shows {told[row]} tokens, want {want}",
                        compared,
                        None,
                    )
    return None, compared, None


def _shown(config: Config) -> int | None:
    """The widest window of any layer; None where one sees everything."""
    windows = [config.window_of(layer) for layer in range(config.layers)]
    return None if None in windows else config.window


def graph_count(observed: Sequence[Observed]) -> Outcome:
    compared = 0
    for one in observed:
        for number, done in enumerate(one.trace):
            for made in done.reported.get("graph_count", ()):
                compared += 1
                if made > (one.claims.max_graphs or 0):
                    words = f"has made {made} graphs, and claims no more than {one.claims.max_graphs}"
                    return f"{at(one.program, number)}: {words}", compared, None
    return None, compared, None


def held_bytes(observed: Sequence[Observed]) -> Outcome:
    compared = 0
    for one in observed:
        c = one.program.config
        for number, _step, rows in _after(one):
            told = one.trace[number].reported.get("bytes")
            if told is None:
                continue
            compared += 1
            want = cache_bytes(c, sum(slots(one.claims, c, len(row)) for row in rows))
            if told != (want,):
                return f"{at(one.program, number)}: says that it takes {told[0]} bytes, want {want}", compared, None
    return None, compared, None


def positions(observed: Sequence[Observed]) -> Outcome:
    """``b t`` tokens times every weight matrix, and ``2 b h t d`` for each slot and layer that attention reads. Where
    the last position is asked for alone, ``lm_head`` may be left out for the others."""
    compared = 0
    for one in observed:
        for number, step, work, depth in _metered(one):
            c, b, t = one.program.config, len(step.counts), max(step.counts)
            least = multiply_adds(c, 0, t, b, keys=0, last_only=step.last_only)
            linear, most = (multiply_adds(c, 0, t, b, keys=n) for n in (0, slots(one.claims, c, depth)))
            compared += 1
            if not least <= work <= most:
                extra = f", as for {work / most * t:.3g} new tokens" if work > linear else ""
                words = f"took {work} multiply-adds for {t} new tokens of {depth}, want {least} to {most}"
                return f"{at(one.program, number)}: {words}{extra}", compared, None
    return None, compared, None


def linear_cost(observed: Sequence[Observed]) -> Outcome:
    """``w(s)`` of steps of equal size at three depths lies on a line, whose slope is attention's at most; where a
    window is full it may be less."""
    compared = 0
    for one in observed:
        c = one.program.config
        alike: dict[tuple[str, tuple[int, ...]], list[tuple[int, int, int]]] = {}
        for number, step, work, depth in _metered(one):
            points = alike.setdefault((step.seq, step.counts), [])
            points.append((depth, work, number))
            if len(points) < 3:
                continue
            (s0, w0, _), (s1, w1, _), (s2, w2, _) = points[-3:]
            b, t = len(step.counts), max(step.counts)
            most = multiply_adds(c, 0, t, b, keys=1) - multiply_adds(c, 0, t, b, keys=0)
            compared += 1
            before, after = (w1 - w0) * (s2 - s1), (w2 - w1) * (s1 - s0)
            bent = c.window is not None and s2 > c.window and 0 <= after < before  # a full window grows no more
            if not (after == before or bent) or not 0 <= w1 - w0 <= most * (s1 - s0):
                words = f"took {w0}, {w1}, {w2} multiply-adds at the depths {s0}, {s1}, {s2}"
                return (
                    f"{at(one.program, number)}: equal steps {words}: not a line of slope {most} at most",
                    compared,
                    None,
                )
    return None, compared, None


def _metered(one: Observed) -> Iterator[tuple[int, Append, int, int]]:
    """Steps whose work was told: number, step, multiply-adds, tokens a row holds afterwards."""
    for number, step, rows in _after(one):
        told = one.trace[number].reported.get("macs")
        if told is not None and isinstance(step, Append):
            yield number, step, told[0], max(map(len, rows))


def _after(one: Observed) -> Iterator[tuple[int, Step, tuple[Row, ...]]]:
    """Each step that ran, with the histories of the sequence that it was about after it."""
    histories = Histories()
    for number, step in enumerate(one.program.steps[: len(one.trace)]):
        histories.apply(step)
        rows = histories.rows.get(getattr(step, "seq", ""))
        if rows is not None and not isinstance(step, Close):
            yield number, step, rows


def _part(one: Observed, element: int) -> str:
    """``layer 0, value of KV head 1``."""
    c = one.program.config
    size = c.kv_heads * c.head_dim
    layer, rest = divmod(element, 2 * size)
    kind, rest = divmod(rest, size)
    return f"layer {layer}, {('key', 'value')[kind]} of KV head {rest // c.head_dim}"
