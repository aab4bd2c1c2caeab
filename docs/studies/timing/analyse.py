"""What our way and the usual ones say of the samples of a proof, over many draws of restarts.

The truth is what the planted slowdowns say of themselves. Draws take distinct restarts from those of one condition, so
that shares are of this pool: an error that all its restarts have in common is in all draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from timing.collect import PLANTED, Proof, Restart, Series, unpacked
from timing.rules import ALPHA, RULES, Rule, Samples, least, mean, middle, ranked_slower, resampled_slower

from kvconform.bench import protocol
from kvconform.bench.analysis.intervals import interval, rank, student
from kvconform.bench.gate.sign_flip import CONFIRM, REGRESSION, RESTARTS, SCREEN, find
from kvconform.bench.protocol import ENOUGH_ROUNDS, TARGET_HALF_WIDTH

Values = NDArray[np.float64]
Draws = NDArray[np.int64]

REFERENCE, EQUAL, *SLOWED = PLANTED
COMPARED = (EQUAL, *SLOWED)
REPORTED, GATED = protocol.RESTARTS, RESTARTS[SCREEN]
"""Restarts of a report, and of a gate's screen."""
DRAWS, RESAMPLES = 1000, 500
EVERY = 5
"""Rounds after which the stopping rule is asked again."""
NEEDED = sum(RESTARTS.values())
"""Restarts of a condition without which the gate cannot be tried on it."""
AFTER, STORED, ROUNDS = "one after the other", "against a stored run", "in our rounds"
"""How a rule comes by its samples: A by itself and B by itself, in one restart; the same with A of another restart;
both in rounds of a random order."""
COUNTS = (10, 20, 50, 100, 200)


@dataclass(frozen=True)
class Pool:
    """The restarts of one condition."""

    name: str
    restarts: list[Restart]

    def __post_init__(self) -> None:
        if len(self.restarts) < NEEDED:
            raise ValueError(f"condition {self.name}: {len(self.restarts)} restarts; the gate alone takes {NEEDED}")

    @cached_property
    def rounds(self) -> dict[str, Values]:
        """By arm, ``(restarts, rounds)``."""
        return {arm: np.stack([unpacked(_series(one, arm).rounds) for one in self.restarts]) for arm in PLANTED}

    @cached_property
    def alone(self) -> dict[str, Values]:
        """By arm, ``(restarts, samples)``."""
        return {arm: np.stack([unpacked(_series(one, arm).alone) for one in self.restarts]) for arm in PLANTED}

    def truth(self, arm: str) -> Values:
        """``(restarts,)``: the logarithm of arm over reference, as both say themselves."""
        return np.log([_series(one, arm).slowdown / _series(one, REFERENCE).slowdown for one in self.restarts])

    def logs(self, arm: str) -> Values:
        """``(restarts, rounds)``: paired log ratios to the reference."""
        return np.asarray(np.log(self.rounds[arm] / self.rounds[REFERENCE]))

    def medians(self, arm: str, count: int | None = None) -> Values:
        """``(restarts,)``: each restart's one number, from its first so many rounds."""
        return np.asarray(np.median(self.logs(arm)[:, :count], axis=1))

    def seconds(self, what: str) -> float:
        """The median over restarts of ``starting``, ``rounds`` or ``alone``, for two arms of those that took part."""
        return float(np.median([getattr(one, what) for one in self.restarts])) * 2 / len(PLANTED)


def _series(one: Restart, arm: str) -> Series:
    return next(series for series in one.series if series.arm == arm)


def pools(proof: Proof) -> list[Pool]:
    """Raises ValueError where a condition has too few restarts."""
    names = dict.fromkeys(one.condition for one in proof.restarts)
    return [Pool(name, [one for one in proof.restarts if one.condition == name]) for name in names]


def draws(pool: Pool, size: int, count: int = DRAWS) -> Draws:
    """``(count, size)``: distinct restarts each."""
    return np.argsort(np.random.default_rng(0).random((count, len(pool.restarts))), axis=1)[:, :size]


def stopped(pool: Pool, arm: str) -> tuple[Values, Values]:
    """Each restart's estimate when the stopping rule of ``pair-v1`` ends it, and after how many
    rounds; all where it never does."""
    estimates, taken = [], []
    for logs in pool.logs(arm):
        for n in range(min(ENOUGH_ROUNDS, len(logs)), len(logs) + 1, EVERY):
            point, low, high = interval(logs[:n].tolist())
            if (high - low) / 2 <= TARGET_HALF_WIDTH:
                break
        estimates.append(point)
        taken.append(n)
    return np.array(estimates), np.array(taken, np.float64)


# --- how far off ---
@dataclass(frozen=True)
class Error:
    """A way to a ratio: the root of its mean squared error in the logarithm, by arm; and seconds for one ratio."""

    way: str
    seconds: float
    rms: dict[str, float]


def errors(pool: Pool) -> list[Error]:
    """Each single way over all restarts, means over restarts over draws."""

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
        Error("A, then B: least", pool.seconds("alone"), one_after(least)),
        Error("A, then B: median", pool.seconds("alone"), one_after(middle)),
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
    found.append(Error("random rounds, median of paired log ratios, one start", seconds, single))
    for count, by_arm in several.items():
        words = f"the same, mean of {count} starts"
        found.append(Error(words, count * (seconds + pool.seconds("starting")), by_arm))
    return found


def rms(values: Values) -> float:
    return float(np.sqrt(np.mean(values**2)))


# --- how honest the interval is ---
@dataclass(frozen=True)
class Coverage:
    """An interval that is to hold the truth 95 times of 100: how often it does, by arm, and the median of half its
    width over all arms."""

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
"""Of an arm: lower ends, upper ends and truths, one for each draw."""


def _intervals(pool: Pool) -> Iterator[tuple[str, Ends]]:
    everyone = np.arange(len(pool.restarts))[:, None]
    yield "one start: order statistics of its rounds", lambda arm: _ranked(pool, arm, everyone)
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

        yield f"{count} starts: order statistics of all their rounds", ranked
        yield f"{count} starts: bootstrap over starts", resampled
        yield f"**{count} starts: Student's t over starts (ours)**", ours


def _ranked(pool: Pool, arm: str, chosen: Draws) -> tuple[Values, ...]:
    """The interval of the median of all rounds of the chosen restarts together."""
    logs = np.sort(pool.logs(arm)[chosen].reshape(len(chosen), -1), axis=1)
    j = max(1, rank(logs.shape[1]))
    return logs[:, j - 1], logs[:, -j], pool.truth(arm)[chosen].mean(axis=1)


# --- who cries wolf, and who sees ---
@dataclass(frozen=True)
class Alarms:
    """How often a rule calls an arm slower than the reference: of ``EQUAL`` these are false alarms (both ways round),
    of the slowed ones its power. ``tried``: verdicts on each arm."""

    rule: str
    samples: str
    tried: int
    share: dict[str, float]


def alarms(pool: Pool) -> list[Alarms]:
    """Each rule on samples of each kind, then our gate."""
    found = [_alarms(pool, rule, samples) for samples in (AFTER, STORED, ROUNDS) for rule in RULES]
    return [*found, gate(pool)]


def _alarms(pool: Pool, rule: Rule, samples: str) -> Alarms:
    share = {arm: float(np.mean([rule.slower(a, b) for a, b in pairs(pool, arm, samples)])) for arm in COMPARED}
    return Alarms(rule.name, samples, len(list(pairs(pool, EQUAL, samples))), share)


def pairs(pool: Pool, arm: str, samples: str) -> Iterator[tuple[Samples, Samples]]:
    """Samples of the reference and of an arm; equal code comes both ways round."""
    by_arm = pool.rounds if samples == ROUNDS else pool.alone
    count = len(pool.restarts)
    for number in range(count):
        other = (number + count // 2) % count if samples == STORED else number
        yield by_arm[REFERENCE][other], by_arm[arm][number]
        if arm == EQUAL:
            yield by_arm[arm][number], by_arm[REFERENCE][other]


def gate(pool: Pool) -> Alarms:
    """``pingpong-v1`` on draws of distinct restarts."""
    chosen = draws(pool, NEEDED)
    share = {}
    for arm in COMPARED:
        values = pool.medians(arm)
        signs = (1, -1) if arm == EQUAL else (1,)
        verdicts = [_verdict((sign * values[one]).tolist()) for sign in signs for one in chosen]
        share[arm] = float(np.mean([verdict == REGRESSION for verdict in verdicts]))
    words = f"`pingpong-v1`, {RESTARTS[SCREEN]} + {RESTARTS[CONFIRM]} starts"
    return Alarms(words, ROUNDS, len(chosen) * 2, share)


def _verdict(values: Sequence[float]) -> str:
    return find(values[: RESTARTS[SCREEN]], values[RESTARTS[SCREEN] :]).verdict


def by_count(pool: Pool) -> dict[str, list[tuple[int, float]]]:
    """False alarms of the two tests on the samples of one process each, against how many samples they had."""
    tests = {"Mann–Whitney": ranked_slower, "bootstrap interval": resampled_slower}
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
    """In the logarithm of equal code: the standard deviation between starts of its time and of its paired ratio, and
    the median of half the interval of one start."""

    times: float
    ratios: float
    half: float


def spread(pool: Pool) -> Spread:
    times = np.log(np.median(pool.alone[EQUAL], axis=1))
    halves = [(high - low) / 2 for _, low, high in (interval(logs.tolist()) for logs in pool.logs(EQUAL))]
    return Spread(float(times.std(ddof=1)), float(pool.medians(EQUAL).std(ddof=1)), float(np.median(halves)))
