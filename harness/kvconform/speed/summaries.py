"""Summaries and ratios of a speed run, from its raw rounds alone.

The interval of a median is that of order statistics: for ``n`` independent samples of any continuous distribution
the median lies between the ``j``-th smallest and the ``j``-th largest but with probability
``2 P(Binomial(n, 1/2) < j)`` (David & Nagaraja 2003, "Order Statistics", section 7.1). At least six samples are needed:
with five, even the extremes miss it with probability 2/32 > 5 %.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import lru_cache

import msgspec
import numpy as np

from kvconform.speed.record import Case, Ratio, Record, Round, Summary

MISS = 0.05
"""How often an interval may miss the median."""
LEAST = next(n for n in range(1, 99) if 2 * 0.5**n <= MISS)
"""Rounds without which there is no interval at all: 6."""
WIDE = 0.10
"""Half-width of a ratio's interval, in its logarithm, above which it is not valid."""
BUSY = 2.0
"""Load average per core above which no ratio is valid."""


@lru_cache(maxsize=4096)
def rank(n: int) -> int:
    """The largest ``j`` such that the ``j``-th smallest and the ``j``-th largest of ``n`` samples hold the median
    between them with probability ``1 - MISS``; 0 where there is none."""
    below, term, j = 0, 1, 0  # P(Binomial(n, 1/2) < j) 2^n, and the next binomial coefficient
    while 2 * (below + term) <= MISS * 2**n and j < n:
        below, j = below + term, j + 1
        term = math.comb(n, j)
    return j


def interval(samples: Sequence[float]) -> tuple[float, float, float]:
    """Median, and the ends of its interval; the extremes where there are too few samples for one."""
    ordered = sorted(samples)
    j = max(1, rank(len(ordered)))
    return float(np.median(ordered)), ordered[j - 1], ordered[-j]


def pairs(case: Case) -> list[tuple[int, int]]:
    """Which arm is set against which: each against the first of its phase; but a backend's decode only against its own
    recompute in a case that has it. Recomputing leaves few rounds, and decodes have a case of their own."""
    first: dict[str, int] = {}
    recompute = {arm.backend: index for index, arm in enumerate(case.arms) if arm.phase == "recompute"}
    found = []
    for index, arm in enumerate(case.arms):
        if first.setdefault(arm.phase, index) != index and not (arm.phase == "decode" and recompute):
            found.append((index, first[arm.phase]))
    return found + [
        (index, recompute[arm.backend])
        for index, arm in enumerate(case.arms)
        if arm.phase == "decode" and arm.backend in recompute
    ]


Times = dict[int, dict[int, float]]
"""Nanoseconds per step, by arm and round."""


def times(case: Case, rounds: Iterable[Round]) -> Times:
    """``rounds`` are those of this case."""
    found: Times = defaultdict(dict)
    for block in rounds:
        found[block.arm][block.round] = block.ns / case.steps
    return found


def log_ratios(found: Times, arm: int, reference: int) -> list[float]:
    """Paired within rounds: only those in which both arms ran."""
    mine, other = found.get(arm, {}), found.get(reference, {})
    return [math.log(ns / other[number]) for number, ns in mine.items() if number in other]


def half_width(case: Case, found: Times) -> float:
    """The widest of a case's intervals, in logarithms; of the times themselves where there is nothing to compare."""
    logs = [log_ratios(found, *pair) for pair in pairs(case)]
    logs = logs or [[math.log(ns) for ns in mine.values()] for mine in found.values()]
    widths = []
    for samples in logs:
        if rank(len(samples)) == 0:
            return math.inf
        _, low, high = interval(samples)
        widths.append((high - low) / 2)
    return max(widths, default=math.inf)


def summarise(record: Record) -> tuple[list[Summary], list[Ratio]]:
    """What the raw rounds say. An arm with fewer than six rounds has no summary, and its ratios are not valid."""
    by_case: dict[int, list[Round]] = defaultdict(list)
    for block in record.rounds:
        by_case[block.case].append(block)
    busy = _busy(record)
    summaries, ratios = [], []
    for number, case in enumerate(record.cases):
        found = times(case, by_case[number])
        for arm in range(len(case.arms)):
            samples = list(found.get(arm, {}).values())
            if rank(len(samples)):
                median, low, high = interval(samples)
                q1, q3 = (float(q) for q in np.quantile(samples, (0.25, 0.75)))
                summaries.append(Summary(number, arm, len(samples), median, q1, q3, low, high))
        for arm, reference in pairs(case):
            logs = log_ratios(found, arm, reference)
            if logs:
                ratios.append(_ratio(number, arm, reference, logs, busy))
    return summaries, ratios


def _ratio(case: int, arm: int, reference: int, logs: list[float], busy: str) -> Ratio:
    median, low, high = interval(logs)
    n, half = len(logs), (high - low) / 2
    why = []
    if rank(n) == 0:
        why.append(f"{n} rounds: an interval of the median needs {LEAST}")
    elif half > WIDE:
        why.append(f"the interval's half-width is {half:.0%}, over {WIDE:.0%}")
    if busy:
        why.append(busy)
    return Ratio(case, arm, reference, math.exp(median), math.exp(low), math.exp(high), n, not why, "; ".join(why))


def _busy(record: Record) -> str:
    cores = int(record.machine.get("cores") or 1)
    load = max(record.load, default=0.0)
    return f"the load average was {load:.1f} on {cores} cores" if load > BUSY * cores else ""


def without(
    cases: Sequence[Case], rounds: Sequence[Round], backend: str, preset: str
) -> tuple[list[Case], list[Round]]:
    """Cases and rounds without a backend's arms on a preset; a case that loses all its arms goes, too."""
    kept: list[Case] = []
    place: dict[tuple[int, int], tuple[int, int]] = {}  # case and arm, old to new
    for number, case in enumerate(cases):
        arms = [arm for arm in case.arms if (case.preset, arm.backend) != (preset, backend)]
        for index, arm in enumerate(case.arms):
            if arm in arms:
                place[number, index] = len(kept), arms.index(arm)
        if arms:
            kept.append(msgspec.structs.replace(case, arms=arms))
    moved = [
        msgspec.structs.replace(block, case=place[block.case, block.arm][0], arm=place[block.case, block.arm][1])
        for block in rounds
        if (block.case, block.arm) in place
    ]
    return kept, moved
