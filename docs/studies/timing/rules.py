"""Common rules for the statement "B is slower than A", each as its source describes it.

They take samples of one process of A and of one process of B, in nanoseconds a step. This is the flaw of most of them:
two processes of the same code differ, and samples of one process, however many, do not show that difference. Our rule
(``bench.gate.decision``) takes one number from each of many restarts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Samples = NDArray[np.float64]

SAME_AS_OURS = 0.05
"""The smallest change that our gate reports: the threshold of each rule whose source gives none."""
DO_BENCH_NS = 100_000_000
"""``rep`` of do_bench: 100 ms."""
REPEAT = 5
"""``timeit``'s default."""
ALPHA = 0.05
NOISE = 0.01
"""Criterion.rs's noise threshold, as its book has it."""
RESAMPLES = 500


@dataclass(frozen=True)
class Rule:
    """``slower``: from the samples of A and of B, whether the rule calls B slower. ``words``: how it decides.
    ``source``: address and name of its source."""

    name: str
    slower: Callable[[Samples, Samples], bool]
    words: str
    source: tuple[str, str] | None = None


def _over(statistic: Callable[[Samples], float], share: float) -> Callable[[Samples, Samples], bool]:
    return lambda a, b: statistic(b) > (1 + share) * statistic(a)


def first(count: int) -> Callable[[Samples], float]:
    """The mean of the first ``count`` samples."""
    return lambda samples: float(samples[:count].mean())


def mean(samples: Samples) -> float:
    return float(samples.mean())


def minimum(samples: Samples) -> float:
    return float(samples.min())


def median(samples: Samples) -> float:
    return float(np.median(samples))


def timeit(samples: Samples) -> float:
    """The minimum of five means, each over an equal part of the samples: ``min(timeit.repeat())``."""
    number = len(samples) // REPEAT
    return float(samples[: REPEAT * number].reshape(REPEAT, number).mean(axis=1).min())


def within_rep(samples: Samples) -> Samples:
    """The first samples, as many as fit into 100 ms by the mean of the first five."""
    return samples[: max(1, int(DO_BENCH_NS / samples[:5].mean()))]


def mann_whitney(a: Samples, b: Samples) -> float:
    """The two-sided ``p``, by the normal approximation with corrections for ties and continuity (Hollander, Wolfe and
    Chicken 2014, "Nonparametric Statistical Methods", section 4.1). It needs at least eight samples of each."""
    n, m, both = len(a), len(b), np.concatenate([a, b])
    values, place, ties = np.unique(both, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(ties) - (ties - 1) / 2)[place]
    u = float(ranks[n:].sum()) - m * (m + 1) / 2
    total = n + m
    variance = n * m / 12 * (total + 1 - float((ties**3 - ties).sum()) / (total * (total - 1)))
    if len(values) == 1:
        return 1.0
    return math.erfc(max(0.0, abs(u - n * m / 2) - 0.5) / math.sqrt(2 * variance))


def mann_whitney_slower(a: Samples, b: Samples) -> bool:
    return mann_whitney(a, b) < ALPHA and median(b) > median(a)


def bootstrap(a: Samples, b: Samples) -> tuple[float, float]:
    """The 95 % percentile interval of mean(b) / mean(a), each resampled separately (Efron and Tibshirani 1993, "An
    Introduction to the Bootstrap", section 13.3)."""
    drawn = np.random.default_rng(0)
    means = [x[drawn.integers(len(x), size=(RESAMPLES, len(x)))].mean(axis=1) for x in (a, b)]
    low, high = np.quantile(means[1] / means[0], (ALPHA / 2, 1 - ALPHA / 2))
    return float(low), float(high)


def bootstrap_slower(a: Samples, b: Samples) -> bool:
    return bootstrap(a, b)[0] > 1 + NOISE


PYTEST_BENCHMARK = ("https://pytest-benchmark.readthedocs.io/en/latest/usage.html", "pytest-benchmark")
DO_BENCH = ("https://triton-lang.org/main/python-api/generated/triton.testing.do_bench.html", "triton")
OVER = f"rose by more than {100 * SAME_AS_OURS:g} %"
RULES = (
    Rule("`time.time()` around a loop", _over(mean, SAME_AS_OURS), f"the mean of all samples {OVER}"),
    Rule("mean of 10, +10 %", _over(first(10), 0.10), "the mean of the first ten samples rose by more than 10 %"),
    Rule(
        "min of k (`timeit`)",
        _over(timeit, SAME_AS_OURS),
        f"the minimum of the means of {REPEAT} loops {OVER}: the documentation of `repeat()` recommends the "
        "minimum and gives no threshold",
        ("https://docs.python.org/3/library/timeit.html#timeit.Timer.repeat", "timeit"),
    ),
    Rule(
        "`compare-fail=mean:5%`",
        _over(mean, 0.05),
        "`--benchmark-compare-fail=mean:5%` of a stored run: current mean / stored mean · 100 − 100 exceeds 5",
        PYTEST_BENCHMARK,
    ),
    Rule(
        "`compare-fail=min:5%`",
        _over(minimum, 0.05),
        "`--benchmark-compare-fail=min:5%`: the same of the smallest sample",
        PYTEST_BENCHMARK,
    ),
    Rule(
        "`do_bench`, mean",
        _over(lambda x: mean(within_rep(x)), SAME_AS_OURS),
        f"the mean of as many calls as fit {DO_BENCH_NS / 1e6:g} ms, its default, {OVER}; it gives no threshold. (On a "
        "GPU it also clears the L2 cache before each call; on a CPU there is nothing to clear)",
        DO_BENCH,
    ),
    Rule(
        "`do_bench`, median",
        _over(lambda x: median(within_rep(x)), SAME_AS_OURS),
        'the same with `return_mode="median"`',
        DO_BENCH,
    ),
    Rule(
        "Mann–Whitney",
        mann_whitney_slower,
        f"two-sided p < {ALPHA:g} over all samples of both processes, and the larger median",
        ("https://pkg.go.dev/golang.org/x/perf/cmd/benchstat", "benchstat's test"),
    ),
    Rule(
        "bootstrap interval",
        bootstrap_slower,
        f"the {100 - 100 * ALPHA:g} % interval of the ratio of means, from resampled samples of both processes, lies "
        f"above the noise threshold of {100 * NOISE:g} %: the last part of Criterion.rs's comparison, without "
        "the t test before it",
        ("https://bheisler.github.io/criterion.rs/book/analysis.html#comparison", "Criterion.rs"),
    ),
)
