"""The gate's decision, protocol ``gate-v1``: from one number for each restart to a verdict on a case.

A screen of all cases finds candidates; restarts of their own confirm them. The statistics are in ``sign_flip``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, stdev

from kvconform.bench.analysis.ratios import MAX_RATIO_HALF_WIDTH, MAX_RESTART_STD
from kvconform.bench.gate.sign_flip import sign_flip

PROTOCOL = "gate-v1"
SCREEN, CONFIRM = "screen", "confirm"
RESTARTS = {SCREEN: 6, CONFIRM: 10}
LEVEL = {SCREEN: 0.05, CONFIRM: 0.01}
SMALLEST = math.log(1.05)
"""The median of d must exceed it as well: a smaller change, however certain, does not block."""
RATE = LEVEL[SCREEN] * LEVEL[CONFIRM]
"""The highest probability that equal code is called a regression, for each case; and likewise an improvement."""

PASS, REGRESSION, IMPROVEMENT = "pass", "regression", "improvement"
INCONCLUSIVE, NOT_COMPARABLE = "inconclusive", "not_comparable"
VERDICTS = (PASS, REGRESSION, IMPROVEMENT, INCONCLUSIVE, NOT_COMPARABLE)


@dataclass(frozen=True)
class Evidence:
    """The restarts of one stage: ``median`` and ``spread`` (standard deviation) of d, and the p of a d that large
    (``slower``) or that small (``faster``)."""

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
        """1: head is slower; -1: it is faster; 0: neither is shown."""
        if self.slower <= level and self.median > SMALLEST:
            return 1
        return -1 if self.faster <= level and self.median < -SMALLEST else 0

    def __str__(self) -> str:
        return f"x{math.exp(self.median):.3f} with p = {min(self.slower, self.faster):.2g}"


@dataclass(frozen=True)
class Finding:
    """A verdict on one case, one sentence why unless it passes, and the evidence of each stage."""

    verdict: str
    why: str = ""
    screen: Evidence | None = None
    confirm: Evidence | None = None


def find(screen: Sequence[float], confirm: Sequence[float], widths: Sequence[float] = ()) -> Finding:
    """The verdict on a case from the d of its restarts. ``widths``: half-widths of their intervals in the screen,
    infinite for a restart without one."""
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
    """Why the measurement cannot show that nothing has changed; empty if it can."""
    if screen.spread > MAX_RESTART_STD:
        return f"too noisy: restarts differ by {screen.spread:.0%} (standard deviation), over {MAX_RESTART_STD:.0%}"
    if widths and median(widths) == math.inf:
        return "too noisy: restarts have too few rounds for an interval"
    if widths and median(widths) > MAX_RATIO_HALF_WIDTH:
        return f"too noisy: intervals within restarts are ± {median(widths):.0%}, over {MAX_RATIO_HALF_WIDTH:.0%}"
    return ""


Measure = Callable[[str, int, Sequence[int]], Mapping[int, float]]
"""Makes one restart: stage, its number and the cases to time; returns the d of each that could be timed."""


def play(cases: Sequence[int], measure: Measure) -> dict[int, dict[str, list[float]]]:
    """Screens all cases and confirms the candidates: the d of each case by stage. A case that cannot be timed in one
    restart is left out of the next."""
    found: dict[int, dict[str, list[float]]] = {case: {SCREEN: [], CONFIRM: []} for case in cases}
    left = list(cases)
    for stage, restarts in RESTARTS.items():
        for restart in range(restarts):
            if not left:
                break
            measured = measure(stage, restart, left)
            left = [case for case in left if case in measured]
            for case in left:
                found[case][stage].append(measured[case])
        left = [case for case in left if candidate(found[case][SCREEN])]
    return found
