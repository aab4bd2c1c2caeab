"""What the raw rounds of a speed run say: summaries, generations and ratios, and nothing else is needed for them.

The unit of replication is the restart of the workers. Blocks of one process are alike and those of two are not
(``docs/latency.md`` shows by how much). So each restart gives one number, the median of its blocks or of its paired
ratios, and an interval speaks of the restarts: Student's t on their logarithms (a bootstrap over three values never
leaves their range, and covers three times of four at best).

Within one restart the interval of a median is that of order statistics: for ``n`` independent samples of any continuous
distribution the median lies between the ``j``-th smallest and the ``j``-th largest but with probability
``2 P(Binomial(n, 1/2) < j)`` (David & Nagaraja 2003, "Order Statistics", section 7.1).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import msgspec
import numpy as np

from kvconform.speed.device import classes, kept
from kvconform.speed.record import MACHINE, Case, Generation, Ratio, Record, Round, Summary, Tokens

MISS = 0.05
"""How often an interval may miss."""
HIDDEN = 0.0013
"""How often all samples may lie below a quantile that is printed (three standard deviations of a normal, one side): p90
needs 64 of them, p99 662."""
LEAST = next(n for n in range(1, 99) if 2 * 0.5**n <= MISS)
"""Blocks without which there is no interval within a restart: 6."""
WIDE = 0.10
"""Half-width of a ratio's interval, in its logarithm, above which it is not valid."""
APART = 0.15
"""Standard deviation between restarts, of the logarithm, above which a ratio is not valid."""
BUSY = 2.0
"""Load average per core above which no ratio is valid."""
T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
"""The 97.5 % quantile of Student's t, by degrees of freedom from 1 on; the last serves all that are more."""


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
    """Whether so many samples say anything about a quantile: all lie below it with probability ``quantile^n``."""
    return quantile**n <= HIDDEN


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


UNCACHED = {
    "recompute": "decode", "recompute-last": "decode", "regenerate": "generate", "regenerate-last": "generate",
}  # fmt: skip
"""The phases without a cache, and the cached one that each is compared with."""

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


def medians(by_restart: dict[int, list[float]]) -> list[float]:
    """Each restart's one number."""
    return [float(np.median(samples)) for _, samples in sorted(by_restart.items())]


def half_width(case: Case, found: Times) -> float:
    """The widest of a case's intervals within one restart, in logarithms; of the times themselves where there is
    nothing to compare."""
    logs = [log_ratios(found, *pair) for pair in pairs(case)]
    logs = logs or [_by_restart(mine) for mine in found.values()]
    widths = []
    for samples in (samples for by_restart in logs for samples in by_restart.values()):
        if rank(len(samples)) == 0:
            return math.inf
        _, low, high = interval(samples)
        widths.append((high - low) / 2)
    return max(widths, default=math.inf)


def _by_restart(mine: dict[tuple[int, int], float]) -> dict[int, list[float]]:
    """Logarithms of an arm's times."""
    logs: dict[int, list[float]] = defaultdict(list)
    for (restart, _), ns in mine.items():
        logs[restart].append(math.log(ns))
    return logs


def summarise(record: Record) -> None:
    """Fills in what follows from the raw rounds: an arm of one restart with fewer than six blocks has no summary."""
    from kvconform.speed.roofline import roofs
    from kvconform.speed.scaling import exponents

    by_case, came = _sorted(record)
    busy = busy_words(record)
    record.summaries, record.ratios, record.generations = [], [], []
    for number, case in enumerate(record.cases):
        found, device = times(case, by_case[number]), times(case, by_case[number], device=True)
        for arm in range(len(case.arms)):
            if found.get(arm):
                summary = _summary(number, arm, found[arm], device.get(arm, {}))
                record.summaries += [] if summary is None else [summary]
            if came.get((number, arm)):
                record.generations.append(_generation(number, arm, case, came[number, arm]))
        for arm, reference in pairs(case, designs(record, case.preset)):
            logs = log_ratios(found, arm, reference)
            if logs:
                mixed = classes(_witnesses(record, case, arm, reference))
                against = "; ".join(words for words in (busy, mixed) if words)
                record.ratios.append(ratio_of(number, arm, reference, logs, against))
    record.roofs, record.exponents = roofs(record), exponents(record)


def designs(record: Record, preset: str) -> list[str]:
    """The arms that have a published design."""
    return [one["arm"] for one in record.presets[preset].get("published", ())]


def _witnesses(record: Record, case: Case, *arms: int) -> dict[str, dict[str, Any]]:
    names = {case.arms[arm].backend for arm in arms}
    return {name: record.software.get(name, {}).get("witness", {}).get(case.preset, {}) for name in names}


def _sorted(record: Record) -> tuple[dict[int, list[Round]], dict[tuple[int, int], list[Tokens]]]:
    by_case: dict[int, list[Round]] = defaultdict(list)
    fast, _ = kept(record.rounds, int(record.machine.get("default_mhz", 0)))
    for block in fast:
        by_case[block.case].append(block)
    came: dict[tuple[int, int], list[Tokens]] = defaultdict(list)
    for one in record.tokens:
        came[one.case, one.arm].append(one)
    return by_case, came


def _summary(
    case: int, arm: int, mine: dict[tuple[int, int], float], device: dict[tuple[int, int], float]
) -> Summary | None:
    samples, logs = list(mine.values()), medians(_by_restart(mine))
    n, restarts = len(samples), len(logs)
    if restarts > 1:
        middle, low, high = (math.exp(x) for x in student(logs))
    elif rank(n):
        middle, low, high = interval(samples)
    else:
        return None
    q1, q3, p90, p99 = (float(q) for q in np.quantile(samples, (0.25, 0.75, 0.9, 0.99)))
    return Summary(
        case, arm, n, restarts, middle, q1, q3, low, high, spread(logs), p90 if reaches(n, 0.9) else None,
        p99 if reaches(n, 0.99) else None, math.exp(student(medians(_by_restart(device)))[0]) if device else None,
    )  # fmt: skip


def _generation(number: int, arm: int, case: Case, came: list[Tokens]) -> Generation:
    between = [float(b - a) for one in came for a, b in zip(one.ns, one.ns[1:], strict=False)]
    tpot = float(np.median([(one.ns[-1] - one.ns[0]) / (len(one.ns) - 1) for one in came]))
    return Generation(
        number, arm, float(np.median([one.ns[0] for one in came])), tpot, float(np.median(between)),
        float(np.quantile(between, 0.99)) if reaches(len(between), 0.99) else None, case.batch * 1e9 / tpot,
    )  # fmt: skip


def ratio_of(case: int, arm: int, reference: int, by_restart: dict[int, list[float]], busy: str) -> Ratio:
    """From the paired log ratios of each restart (``log_ratios``)."""
    logs, n = medians(by_restart), sum(map(len, by_restart.values()))
    middle, low, high = student(logs)
    apart, why = spread(logs), []
    if len(logs) == 1:
        ((_, samples),) = by_restart.items()
        middle, low, high = interval(samples)
        why.append("one start of the workers: nobody knows how far another one would lie from it")
    if (high - low) / 2 > WIDE:
        why.append(f"the interval's half-width is {(high - low) / 2:.0%}, over {WIDE:.0%}")
    if apart is not None and apart > APART:
        why.append(f"restarts differ by {apart:.0%} (standard deviation), over {APART:.0%}")
    if busy:
        why.append(busy)
    return Ratio(
        case, arm, reference, math.exp(middle), math.exp(low), math.exp(high), n, len(logs), not why, "; ".join(why),
        apart,
    )  # fmt: skip


def busy_words(record: Record) -> str:
    """Why no ratio of a record is valid: other work on the machine; empty where it was quiet enough."""
    cores = int(record.machine.get("cores") or 1)
    load = max(record.load, default=0.0)
    return f"the load average was {load:.1f} on {cores} cores" if load > BUSY * cores else ""


def without(record: Record, backend: str, preset: str) -> None:
    """Takes a backend's arms on a preset out of a record; a case that loses all its arms goes, too."""
    kept: list[Case] = []
    place: dict[tuple[int, int], tuple[int, int]] = {}  # case and arm, old to new
    for number, case in enumerate(record.cases):
        arms = [arm for arm in case.arms if (case.preset, arm.backend) != (preset, backend)]
        if all(arm.backend == MACHINE for arm in arms):
            continue
        for index, arm in enumerate(case.arms):
            if arm in arms:
                place[number, index] = len(kept), arms.index(arm)
        kept.append(msgspec.structs.replace(case, arms=arms))

    def moved(one: Round | Tokens) -> Round | Tokens:
        case, arm = place[one.case, one.arm]
        return msgspec.structs.replace(one, case=case, arm=arm)

    record.cases = kept
    record.rounds = [moved(one) for one in record.rounds if (one.case, one.arm) in place]  # type: ignore[misc]
    record.tokens = [moved(one) for one in record.tokens if (one.case, one.arm) in place]  # type: ignore[misc]
    record.memory = [one for one in record.memory if (one.backend, one.preset) != (backend, preset)]
    record.once = [one for one in record.once if (one.backend, one.preset) != (backend, preset)]
