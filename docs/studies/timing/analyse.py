"""Evaluates timing rules on the samples of the study: errors, coverage of intervals, false-positive rates and power.

The true ratio is the one that the workers report about their planted slowdowns. Many draws of distinct restarts from
one condition are evaluated, so every share is a share of this pool: an error that all its restarts have in common is in
all draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from timing.collect import PLANTED, Restart, Series, Study
from timing.rules import ALPHA, RULES, Rule, Samples, bootstrap_slower, mann_whitney_slower, mean, median, minimum

from kvconform.bench import protocol
from kvconform.bench.analysis.intervals import interval, rank, student
from kvconform.bench.gate.decision import CONFIRM, PROTOCOL, REGRESSION, RESTARTS, SCREEN, find
from kvconform.bench.protocol import ENOUGH_ROUNDS, TARGET_HALF_WIDTH

Values = NDArray[np.float64]
Draws = NDArray[np.int64]

REFERENCE, EQUAL, *SLOWED = PLANTED
COMPARED = (EQUAL, *SLOWED)
REPORTED, GATED = protocol.RESTARTS, RESTARTS[SCREEN]
"""Restarts of a bench, and of the screen of a gate."""
DRAWS, RESAMPLES = 1000, 500
EVERY = 5
"""Rounds between two evaluations of the stopping rule."""
NEEDED = sum(RESTARTS.values())
"""Restarts of a condition that the gate needs."""
AFTER, STORED, ROUNDS = "one after the other", "against a stored run", "in random rounds"
"""Where the samples of a rule come from: A alone, then B alone, in one restart; the same with A from another restart;
both in rounds of random order."""
COUNTS = (10, 20, 50, 100, 200)


@dataclass(frozen=True)
class Pool:
    """The restarts of one condition."""

    name: str
    restarts: list[Restart]

    def __post_init__(self) -> None:
        if len(self.restarts) < NEEDED:
            raise ValueError(f"condition {self.name}: {len(self.restarts)} restarts; the gate needs {NEEDED}")

    @cached_property
    def rounds(self) -> dict[str, Values]:
        """By arm, ``(restarts, rounds)``."""
        return {arm: _stacked([_series(one, arm).rounds for one in self.restarts]) for arm in PLANTED}

    @cached_property
    def alone(self) -> dict[str, Values]:
        """By arm, ``(restarts, samples)``."""
        return {arm: _stacked([_series(one, arm).alone for one in self.restarts]) for arm in PLANTED}

    def truth(self, arm: str) -> Values:
        """``(restarts,)``: the logarithm of the true ratio of arm to reference, from the CPU times that both report."""
        return np.log([_series(one, arm).slowdown / _series(one, REFERENCE).slowdown for one in self.restarts])

    def logs(self, arm: str) -> Values:
        """``(restarts, rounds)``: paired log ratios to the reference."""
        return np.asarray(np.log(self.rounds[arm] / self.rounds[REFERENCE]))

    def medians(self, arm: str, count: int | None = None) -> Values:
        """``(restarts,)``: the median of each restart, over its first ``count`` rounds."""
        return np.asarray(np.median(self.logs(arm)[:, :count], axis=1))

    def seconds(self, what: str) -> float:
        """The median over restarts of ``starting``, ``rounds`` or ``alone``, for two of the arms."""
        return float(np.median([getattr(one, what) for one in self.restarts])) * 2 / len(PLANTED)


def _stacked(rows: Sequence[Sequence[int]]) -> Values:
    return np.array(rows, np.float64)


def _series(one: Restart, arm: str) -> Series:
    return next(series for series in one.series if series.arm == arm)


def pools(study: Study) -> list[Pool]:
    """One for each condition. Raises ValueError if a condition has too few restarts."""
    names = dict.fromkeys(one.condition for one in study.restarts)
    return [Pool(name, [one for one in study.restarts if one.condition == name]) for name in names]


def draws(pool: Pool, size: int, count: int = DRAWS) -> Draws:
    """``(count, size)``: indices of restarts, distinct in each draw."""
    return np.argsort(np.random.default_rng(0).random((count, len(pool.restarts))), axis=1)[:, :size]


def stopped(pool: Pool, arm: str) -> tuple[Values, Values]:
    """The estimate of each restart when the stopping rule of the bench ends it, and its number of rounds; all rounds if
    the rule never ends it."""
    estimates, taken = [], []
    for logs in pool.logs(arm):
        for n in range(min(ENOUGH_ROUNDS, len(logs)), len(logs) + 1, EVERY):
            point, low, high = interval(logs[:n].tolist())
            if (high - low) / 2 <= TARGET_HALF_WIDTH:
                break
        estimates.append(point)
        taken.append(n)
    return np.array(estimates), np.array(taken, np.float64)


# --- errors ---
@dataclass(frozen=True)
class Error:
    """The error of one method of measuring a ratio.

    rms: by arm, the root of the mean squared error of the logarithm.
    seconds: time that one ratio takes, in seconds.
    """

    method: str
    seconds: float
    rms: dict[str, float]


def errors(pool: Pool) -> list[Error]:
    """The error of each method: of one restart over all restarts, of several restarts over draws."""

    def one_after(statistic: Callable[[Samples], float]) -> dict[str, float]:
        found = {}
        for arm in COMPARED:
            ratios = [
                math.log(statistic(b) / statistic(a))
                for a, b in zip(pool.alone[REFERENCE], pool.alone[arm], strict=True)
            ]
            found[arm] = rms(np.array(ratios) - pool.truth(arm))
        return found

    def stored() -> dict[str, float]:
        apart = ~np.eye(len(pool.restarts), dtype=bool)
        found = {}
        for arm in COMPARED:
            a, b = (np.log(pool.alone[one].mean(axis=1)) for one in (REFERENCE, arm))
            found[arm] = rms((b[:, None] - a[None, :] - pool.truth(arm)[:, None])[apart])
        return found

    found = [
        Error("A, then B: mean (`time.time()` around a loop)", pool.seconds("alone"), one_after(mean)),
        Error("B against a stored A: mean", pool.seconds("alone"), stored()),
        Error("A, then B: minimum", pool.seconds("alone"), one_after(minimum)),
        Error("A, then B: median", pool.seconds("alone"), one_after(median)),
    ]
    single, seconds = {}, 0.0
    several: dict[int, dict[str, float]] = {REPORTED: {}, GATED: {}}
    for arm in COMPARED:
        estimates, taken = stopped(pool, arm)
        off = estimates - pool.truth(arm)
        single[arm] = rms(off)
        share = float(np.median(taken)) / pool.rounds[arm].shape[1]
        seconds = max(seconds, share * pool.seconds("rounds"))
        for count, by_arm in several.items():
            by_arm[arm] = rms(off[draws(pool, count)].mean(axis=1))
    found.append(Error("random rounds, median of paired log ratios, one restart", seconds, single))
    for count, by_arm in several.items():
        words = f"the same, mean of {count} restarts"
        found.append(Error(words, count * (seconds + pool.seconds("starting")), by_arm))
    return found


def rms(values: Values) -> float:
    return float(np.sqrt(np.mean(values**2)))


# --- coverage of intervals ---
@dataclass(frozen=True)
class Coverage:
    """How often a 95 % interval contains the true ratio, by arm. ``half``: its median half-width over all arms."""

    interval: str
    half: float
    covered: dict[str, float]


def coverages(pool: Pool) -> list[Coverage]:
    found = []
    for words, ends in _intervals(pool):
        covered, halves = {}, []
        for arm in COMPARED:
            low, high, truth = ends(arm)
            covered[arm] = float(np.mean((low <= truth) & (truth <= high)))
            halves.append((high - low) / 2)
        found.append(Coverage(words, float(np.median(np.concatenate(halves))), covered))
    return found


Ends = Callable[[str], tuple[Values, ...]]
"""From an arm to lower ends, upper ends and true values, one for each draw."""


def _intervals(pool: Pool) -> Iterator[tuple[str, Ends]]:
    everyone = np.arange(len(pool.restarts))[:, None]
    yield "one restart: order statistics of its rounds", lambda arm: _ranked(pool, arm, everyone)
    for count in (REPORTED, GATED):
        chosen = draws(pool, count)

        def ranked(arm: str, chosen: Draws = chosen) -> tuple[Values, ...]:
            return _ranked(pool, arm, chosen)

        def resampled(arm: str, chosen: Draws = chosen) -> tuple[Values, ...]:
            picks = np.random.default_rng(1).integers(chosen.shape[1], size=(RESAMPLES, chosen.shape[1]))
            means = pool.medians(arm)[chosen][:, picks].mean(axis=2)
            low, high = np.quantile(means, (ALPHA / 2, 1 - ALPHA / 2), axis=1)
            return low, high, pool.truth(arm)[chosen].mean(axis=1)

        def ours(arm: str, chosen: Draws = chosen) -> tuple[Values, ...]:
            ends = np.array([student(values)[1:] for values in pool.medians(arm)[chosen].tolist()])
            return ends[:, 0], ends[:, 1], pool.truth(arm)[chosen].mean(axis=1)

        yield f"{count} restarts: order statistics of all their rounds", ranked
        yield f"{count} restarts: bootstrap over restarts", resampled
        yield f"**{count} restarts: Student's t over restarts (ours)**", ours


def _ranked(pool: Pool, arm: str, chosen: Draws) -> tuple[Values, ...]:
    """The interval of the median of all rounds of the chosen restarts, pooled."""
    logs = np.sort(pool.logs(arm)[chosen].reshape(len(chosen), -1), axis=1)
    j = max(1, rank(logs.shape[1]))
    return logs[:, j - 1], logs[:, -j], pool.truth(arm)[chosen].mean(axis=1)


# --- false-positive rate and power ---
@dataclass(frozen=True)
class Rates:
    """How often a rule calls an arm slower than the reference.

    share: by arm; for ``EQUAL`` the false-positive rate over both orders of the pair, for a slowed arm the power.
    trials: number of verdicts on ``EQUAL``.
    """

    rule: str
    samples: str
    trials: int
    share: dict[str, float]


def rates(pool: Pool) -> list[Rates]:
    """Each rule on samples from each source, then our gate."""
    found = [_rates(pool, rule, samples) for samples in (AFTER, STORED, ROUNDS) for rule in RULES]
    return [*found, gate(pool)]


def _rates(pool: Pool, rule: Rule, samples: str) -> Rates:
    share = {arm: float(np.mean([rule.slower(a, b) for a, b in pairs(pool, arm, samples)])) for arm in COMPARED}
    return Rates(rule.name, samples, len(list(pairs(pool, EQUAL, samples))), share)


def pairs(pool: Pool, arm: str, samples: str) -> Iterator[tuple[Samples, Samples]]:
    """Samples of the reference and of an arm; of equal code in both orders."""
    by_arm = pool.rounds if samples == ROUNDS else pool.alone
    count = len(pool.restarts)
    for number in range(count):
        other = (number + count // 2) % count if samples == STORED else number
        yield by_arm[REFERENCE][other], by_arm[arm][number]
        if arm == EQUAL:
            yield by_arm[arm][number], by_arm[REFERENCE][other]


def gate(pool: Pool) -> Rates:
    """Our gate on draws of distinct restarts."""
    chosen = draws(pool, NEEDED)
    share = {}
    for arm in COMPARED:
        values = pool.medians(arm)
        signs = (1, -1) if arm == EQUAL else (1,)
        verdicts = [_verdict((sign * values[one]).tolist()) for sign in signs for one in chosen]
        share[arm] = float(np.mean([verdict == REGRESSION for verdict in verdicts]))
    words = f"`{PROTOCOL}`, {RESTARTS[SCREEN]} + {RESTARTS[CONFIRM]} restarts"
    return Rates(words, ROUNDS, len(chosen) * 2, share)


def _verdict(values: Sequence[float]) -> str:
    return find(values[: RESTARTS[SCREEN]], values[RESTARTS[SCREEN] :]).verdict


def by_count(pool: Pool) -> dict[str, list[tuple[int, float]]]:
    """The false-positive rate of two tests on samples of one process each, by the number of samples."""
    tests = {"Mann–Whitney": mann_whitney_slower, "bootstrap interval": bootstrap_slower}
    most = pool.alone[EQUAL].shape[1]
    return {
        name: [
            (n, float(np.mean([slower(a[:n], b[:n]) for a, b in pairs(pool, EQUAL, AFTER)])))
            for n in COUNTS
            if n <= most
        ]
        for name, slower in tests.items()
    }


@dataclass(frozen=True)
class Spread:
    """Of the logarithm, for equal code: standard deviations between restarts, of the time and of the paired ratio, and
    the median half-width of the interval of one restart."""

    times: float
    ratios: float
    half: float


def spread(pool: Pool) -> Spread:
    times = np.log(np.median(pool.alone[EQUAL], axis=1))
    halves = [(high - low) / 2 for _, low, high in (interval(logs.tolist()) for logs in pool.logs(EQUAL))]
    return Spread(float(times.std(ddof=1)), float(pool.medians(EQUAL).std(ddof=1)), float(np.median(halves)))
