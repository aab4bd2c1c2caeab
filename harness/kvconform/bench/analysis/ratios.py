"""Ratios: which arm is set against which, and when a ratio is valid."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

from kvconform.bench.analysis.intervals import Times, by_restart, interval, log_ratios, medians, rank, spread, student
from kvconform.bench.record import MACHINE, Case, Ratio, Record

MAX_RATIO_HALF_WIDTH = 0.10
"""Half-width of a ratio's interval, in its logarithm, above which it is not valid."""
MAX_TIME_HALF_WIDTH = 0.25
"""The same for a single time: it includes other load on the machine, which a paired ratio leaves out, so that
intervals of 10 to 20 % are usual on a shared machine. At 25 % its ends lie a factor of 1.6 apart."""
MAX_RESTART_STD = 0.15
"""Standard deviation between restarts, of the logarithm, above which a ratio is not valid."""
MAX_LOAD_PER_CORE = 2.0
"""Load average per core above which no ratio is valid."""
RULES = (
    f"at least 2 restarts, half-width <= {MAX_RATIO_HALF_WIDTH:.0%}, standard deviation between restarts <= "
    f"{MAX_RESTART_STD:.0%}, load average <= {MAX_LOAD_PER_CORE:g} x cores; of a single time: half-width <= "
    f"{MAX_TIME_HALF_WIDTH:.0%}"
)
"""When a ratio is valid, and when a single time is."""


def pairs(case: Case, designs: Sequence[str] = ()) -> list[tuple[int, int]]:
    """Which arm is set against which: each against the first of its phase, and against those of published ``designs``;
    but a backend's cached phase only against its own uncached ones in a case that has them. Recomputing leaves few
    rounds, and decodes have a case of their own."""
    first: dict[str, int] = {}
    uncached: dict[str, list[int]] = defaultdict(list)
    for index, arm in enumerate(case.arms):
        if arm.phase in UNCACHED:
            uncached[arm.backend].append(index)
    found = []
    for index, arm in enumerate(case.arms):
        if arm.backend == MACHINE:
            continue
        if arm.phase == "decode" and uncached:
            continue
        reference = first.setdefault(arm.phase, index)
        if index == reference:
            continue  # of it and a design there is the ratio of the design to it
        theirs = [other for other, one in enumerate(case.arms) if one.phase == arm.phase and one.backend in designs]
        found += [(index, other) for other in dict.fromkeys((reference, *theirs)) if other != index]
    return found + [
        (index, other)
        for index, arm in enumerate(case.arms)
        if arm.phase in UNCACHED.values()
        for other in uncached[arm.backend]
        if UNCACHED[case.arms[other].phase] == arm.phase
    ]


UNCACHED = {"recompute": "decode", "recompute-last": "decode", "regenerate": "generate", "regenerate-last": "generate"}
"""The phases without a cache, and the cached one that each is compared with."""


def half_width(case: Case, found: Times) -> float:
    """The widest of a case's intervals within one restart, in logarithms; of the times themselves where there is
    nothing to compare."""
    logs = [log_ratios(found, *pair) for pair in pairs(case)]
    logs = logs or [by_restart(mine) for mine in found.values()]
    widths = []
    for samples in (samples for starts in logs for samples in starts.values()):
        if rank(len(samples)) == 0:
            return math.inf
        _, low, high = interval(samples)
        widths.append((high - low) / 2)
    return max(widths, default=math.inf)


def ratio_of(case: int, arm: int, reference: int, starts: dict[int, list[float]], busy: str) -> Ratio:
    """From the paired log ratios of each restart (``log_ratios``)."""
    logs, n = medians(starts), sum(map(len, starts.values()))
    middle, low, high = student(logs)
    apart, why = spread(logs), []
    if len(logs) == 1:
        ((_, samples),) = starts.items()
        middle, low, high = interval(samples)
        why.append("one start of the workers, which does not say how far the next would lie from it")
    elif (high - low) / 2 > MAX_RATIO_HALF_WIDTH:
        why.append(f"the interval's half-width is {(high - low) / 2:.0%}, over {MAX_RATIO_HALF_WIDTH:.0%}")
    if apart is not None and apart > MAX_RESTART_STD:
        why.append(f"restarts differ by {apart:.0%} (standard deviation), over {MAX_RESTART_STD:.0%}")
    if busy:
        why.append(busy)
    return Ratio(
        case,
        arm,
        reference,
        math.exp(middle),
        math.exp(low),
        math.exp(high),
        n,
        len(logs),
        not why,
        "; ".join(why),
        apart,
    )


def busy_words(record: Record) -> str:
    """Why no ratio of a record is valid: other work on the machine; empty where it was quiet enough."""
    cores = int(record.machine.get("cores") or 1)
    load = max(record.load, default=0.0)
    return f"the load average was {load:.1f} on {cores} cores" if load > MAX_LOAD_PER_CORE * cores else ""


def designs(record: Record, preset: str) -> list[str]:
    """The arms that have a published design."""
    return [one["arm"] for one in record.presets[preset].get("published", ())]
