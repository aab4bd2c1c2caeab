"""Intervals: of a median within one restart, and of a mean over restarts.

The unit of replication is the restart of the workers. Blocks of one process are alike and those of two are not
(``docs/latency.md`` shows by how much). So each restart gives one number, the median of its blocks or of its paired
ratios, and an interval is over the restarts: Student's t on their logarithms (a bootstrap over three values never
leaves their range, and covers three times of four at best).

Within one restart the interval of a median is that of order statistics: for ``n`` independent samples of any continuous
distribution the median lies between the ``j``-th smallest and the ``j``-th largest except with probability
``2 P(Binomial(n, 1/2) < j)`` (David & Nagaraja 2003, "Order Statistics", section 7.1).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np

from kvconform.bench.record import Case, Round

ALPHA = 0.05
"""The probability that an interval misses."""
HIDDEN = 0.0013
"""The highest probability that all samples lie below a quantile that is printed (three standard deviations of a normal,
one side): p90 needs 64 samples, p99 662."""
MIN_SAMPLES = next(n for n in range(1, 99) if 2 * 0.5**n <= ALPHA)
"""Blocks without which there is no interval within a restart: 6."""
_T95 = """
12.706 4.303 3.182 2.776 2.571 2.447 2.365 2.306 2.262 2.228 2.201 2.179 2.160 2.145 2.131
2.120 2.110 2.101 2.093 2.086 2.080 2.074 2.069 2.064 2.060 2.056 2.052 2.048 2.045 2.042
"""
T95 = tuple(map(float, _T95.split()))
"""The 97.5 % quantile of Student's t, by degrees of freedom from 1 on; the last is used for all greater ones."""


def t95(freedom: int) -> float:
    """Half of the interval of a mean, in standard errors."""
    return T95[min(freedom, len(T95)) - 1]


def student(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and the ends of its 95 % interval; with one value the ends are infinite."""
    mean, n = math.fsum(values) / len(values), len(values)
    if n == 1:
        return mean, -math.inf, math.inf
    half = t95(n - 1) * math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n)
    return mean, mean - half, mean + half


def spread(values: Sequence[float]) -> float | None:
    """Standard deviation; None of a single value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def reaches(n: int, quantile: float) -> bool:
    """Whether so many samples determine a quantile: all lie below it with probability ``quantile^n``."""
    return quantile**n <= HIDDEN


@lru_cache(maxsize=4096)
def rank(n: int) -> int:
    """The largest ``j`` such that the median lies between the ``j``-th smallest and the ``j``-th largest of ``n``
    samples with probability ``1 - ALPHA``; 0 if there is none."""
    below, term, j = 0, 1, 0  # P(Binomial(n, 1/2) < j) 2^n, and the next binomial coefficient
    while 2 * (below + term) <= ALPHA * 2**n and j < n:
        below, j = below + term, j + 1
        term = math.comb(n, j)
    return j


def interval(samples: Sequence[float]) -> tuple[float, float, float]:
    """Median, and the ends of its interval; the extremes if there are too few samples for one."""
    ordered = sorted(samples)
    j = max(1, rank(len(ordered)))
    return float(np.median(ordered)), ordered[j - 1], ordered[-j]


Times = dict[int, dict[tuple[int, int], float]]
"""Nanoseconds per step, by arm, then by restart and round."""


def times(case: Case, rounds: Iterable[Round], device: bool = False) -> Times:
    """``rounds`` are those of this case. ``device``: the device's own time; blocks without it are left out."""
    found: Times = defaultdict(dict)
    for block in rounds:
        ns = block.device_ns if device else block.ns
        if ns:
            found[block.arm][block.restart, block.round] = ns / case.steps
    return found


def log_ratios(found: Times, arm: int, reference: int) -> dict[int, list[float]]:
    """By restart, paired within rounds: only those in which both arms ran."""
    mine, other = found.get(arm, {}), found.get(reference, {})
    ratios: dict[int, list[float]] = defaultdict(list)
    for place, ns in mine.items():
        if place in other:
            ratios[place[0]].append(math.log(ns / other[place]))
    return ratios


def medians(restarts: dict[int, list[float]]) -> list[float]:
    """One number for each restart."""
    return [float(np.median(samples)) for _, samples in sorted(restarts.items())]


def by_restart(mine: dict[tuple[int, int], float]) -> dict[int, list[float]]:
    """Logarithms of an arm's times."""
    logs: dict[int, list[float]] = defaultdict(list)
    for (restart, _), ns in mine.items():
        logs[restart].append(math.log(ns))
    return logs
