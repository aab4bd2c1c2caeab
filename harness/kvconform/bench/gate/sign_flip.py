"""Is head slower than base? The statistics of the gate ``pingpong-v1``, on one number for each restart.

A restart starts both workers anew and gives a case one number ``d``: the median over its rounds of log(head / base).
The test flips signs: of all ``2^n`` ways to give the ``n`` magnitudes a sign, ``p`` is the part whose sum is at least
the one that was observed (Fisher 1935, "The Design of Experiments", section 21).

Its false-alarm rate. Which environment starts first, and which runs first in each round, is drawn for each restart;
the rest of a restart treats both alike. Where both run the same code, exchanging their names in a restart therefore
changes the sign of that ``d`` and nothing else, and all ``2^n`` sign vectors are equally likely given the magnitudes:
``P(p <= a) <= floor(a 2^n) / 2^n <= a``, for any distribution of ``d``, heavy tails, drift from restart to restart and
correlation of rounds included. (Of rounds nothing is assumed at all; a test on pooled rounds would need them to be
independent.) The screen's restarts and the confirmation's are different ones, so the levels multiply: a case of equal
code is called a regression with probability at most ``RATE = .05 * .01``, an improvement as well. Cases of one run
share their restarts; a run with ``m`` of them alarms with probability at most ``m * RATE`` (Boole). The threshold on
the median makes it rarer still.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import median, stdev

import numpy as np
from numpy.typing import NDArray

PROTOCOL = "pingpong-v1"
SCREEN, CONFIRM = "screen", "confirm"
RESTARTS = {SCREEN: 6, CONFIRM: 10}
LEVEL = {SCREEN: 0.05, CONFIRM: 0.01}
SMALLEST = math.log(1.05)
"""What must be exceeded besides: a change that is sure and smaller is not worth a stop."""
RATE = LEVEL[SCREEN] * LEVEL[CONFIRM]
"""The most often that equal code is called a regression, for each case; and as often an improvement."""
SPREAD, MAX_RATIO_HALF_WIDTH = 0.15, 0.10
"""Standard deviation between restarts, and half-width of the interval within one, above which nothing is told."""

PASS, REGRESSION, IMPROVEMENT = "pass", "regression", "improvement"
INCONCLUSIVE, NOT_COMPARABLE = "inconclusive", "not_comparable"
VERDICTS = (PASS, REGRESSION, IMPROVEMENT, INCONCLUSIVE, NOT_COMPARABLE)


@cache
def _signs(n: int) -> NDArray[np.float64]:
    """``(2^n, n)``: every sign vector; the first is all ones."""
    bits = np.arange(2**n)[:, None] >> np.arange(n) & 1
    return np.where(bits, -1.0, 1.0)


def sign_flip(values: Sequence[float]) -> float:
    """The exact one-sided ``p``: how surprising so large a sum is, were each sign a coin's."""
    d = np.asarray(values, np.float64)
    sums = _signs(len(d)) @ d
    # sums that are equal but for the rounding of n additions count as equal, which makes p larger, never smaller
    slack = len(d) * np.finfo(np.float64).eps * np.abs(d).sum()
    return float((sums >= sums[0] - slack).mean(dtype=np.float64))


def attained(n: int, level: float) -> float:
    """How often ``p <= level`` comes with equal code and magnitudes that have no ties: the level on a grid of 2^-n."""
    ways: int = 2**n
    return math.floor(level * ways) / ways


@dataclass(frozen=True)
class Evidence:
    """What the restarts of one stage say: ``median`` and ``spread`` of d, ``p`` of its being that large, or small."""

    n: int
    median: float
    slower: float
    faster: float
    spread: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Evidence:
        spread = stdev(values) if len(values) > 1 else math.inf
        return cls(len(values), median(values), sign_flip(values), sign_flip([-d for d in values]), spread)

    def direction(self, level: float) -> int:
        """1: head is slower, -1: it is faster, 0: neither is shown."""
        if self.slower <= level and self.median > SMALLEST:
            return 1
        return -1 if self.faster <= level and self.median < -SMALLEST else 0

    def __str__(self) -> str:
        return f"x{math.exp(self.median):.3f} with p = {min(self.slower, self.faster):.2g}"


@dataclass(frozen=True)
class Finding:
    """A verdict on one case, in one sentence why unless it passes, and what each stage said."""

    verdict: str
    why: str = ""
    screen: Evidence | None = None
    confirm: Evidence | None = None


def find(screen: Sequence[float], confirm: Sequence[float], widths: Sequence[float] = ()) -> Finding:
    """The verdict on a case from the d of its restarts; ``widths``: half-widths of their intervals in the
    screen, infinite where a restart has none."""
    wanted = RESTARTS[SCREEN], RESTARTS[CONFIRM]
    if len(screen) < wanted[0]:
        return Finding(INCONCLUSIVE, f"{len(screen)} of {wanted[0]} restarts were made")
    first = Evidence.of(screen)
    direction = first.direction(LEVEL[SCREEN])
    if direction == 0:
        noise = _noise(first, widths)
        return Finding(INCONCLUSIVE if noise else PASS, noise, first)
    if len(confirm) < wanted[1]:
        return Finding(INCONCLUSIVE, f"candidate ({first}), {len(confirm)} of {wanted[1]} restarts confirm it", first)
    second = Evidence.of(confirm)
    if second.direction(LEVEL[CONFIRM]) != direction:
        return Finding(INCONCLUSIVE, f"candidate ({first}), not confirmed ({second})", first, second)
    return Finding(
        REGRESSION if direction > 0 else IMPROVEMENT, f"{second}, after {first} in the screen", first, second
    )


def candidate(screen: Sequence[float]) -> bool:
    """Whether a case goes on to be confirmed."""
    return len(screen) == RESTARTS[SCREEN] and Evidence.of(screen).direction(LEVEL[SCREEN]) != 0


def _noise(screen: Evidence, widths: Sequence[float]) -> str:
    """Why too little was seen to say that nothing has changed."""
    if screen.spread > SPREAD:
        return f"too noisy: restarts differ by {screen.spread:.0%} (standard deviation), over {SPREAD:.0%}"
    if widths and median(widths) == math.inf:
        return "too noisy: restarts have too few rounds for an interval"
    if widths and median(widths) > MAX_RATIO_HALF_WIDTH:
        return f"too noisy: intervals within restarts are ± {median(widths):.0%}, over {MAX_RATIO_HALF_WIDTH:.0%}"
    return ""


Measure = Callable[[str, int, Sequence[int]], Mapping[int, float]]
"""Makes one restart: stage, its number and the cases to time; gives the d of each that could be timed."""


def play(cases: Sequence[int], measure: Measure) -> dict[int, dict[str, list[float]]]:
    """Screens all cases and confirms the candidates: the d of each case by stage. A case that cannot be timed in one
    restart is timed no more."""
    found: dict[int, dict[str, list[float]]] = {case: {SCREEN: [], CONFIRM: []} for case in cases}
    left = list(cases)
    for stage, restarts in RESTARTS.items():
        for restart in range(restarts):
            if not left:
                break
            told = measure(stage, restart, left)
            left = [case for case in left if case in told]
            for case in left:
                found[case][stage].append(told[case])
        left = [case for case in left if candidate(found[case][SCREEN])]
    return found
