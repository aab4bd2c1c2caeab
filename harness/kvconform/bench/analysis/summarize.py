"""What the raw rounds of a speed run say: summaries, generations and ratios, and nothing else is needed for them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import msgspec
import numpy as np

from kvconform.bench.analysis.intervals import (
    by_restart,
    interval,
    log_ratios,
    medians,
    rank,
    reaches,
    spread,
    student,
    times,
)
from kvconform.bench.analysis.ratios import MAX_TIME_HALF_WIDTH, busy_words, designs, pairs, ratio_of
from kvconform.bench.analysis.roofline import roofs
from kvconform.bench.analysis.scaling import exponents
from kvconform.bench.record import MACHINE, Case, Generation, Record, Round, Summary, Tokens
from kvconform.bench.worker.gpu import MIN_CLOCK_FRACTION, REASONS, classes, default_mhz, kept, methods


def summarise(record: Record) -> None:
    """Computes what follows from the raw rounds. An arm of one restart with fewer than six blocks has no summary."""
    by_case, came, slow = _sorted(record)
    taken = [times(case, by_case[number]) for number, case in enumerate(record.cases)]
    busy = busy_words(record)
    record.summaries, record.ratios, record.generations = [], [], []
    for number, case in enumerate(record.cases):
        found, device = taken[number], times(case, by_case[number], device=True)
        for arm in range(len(case.arms)):
            if found.get(arm):
                summary = _summary(number, arm, found[arm], device.get(arm, {}))
                record.summaries += [] if summary is None else [summary]
            if came.get((number, arm)):
                record.generations.append(_generation(number, arm, case, came[number, arm]))
        for arm, reference in pairs(case, designs(record, case.preset)):
            logs = log_ratios(found, arm, reference)
            if logs:
                mixed = classes(_runtime_infos(record, case, arm, reference))
                against = "; ".join(words for words in (busy, mixed) if words)
                record.ratios.append(ratio_of(number, arm, reference, logs, against))
    record.notes = _notes(record, slow)
    record.roofs, record.exponents = roofs(record, taken), exponents(record, taken)


def _runtime_infos(record: Record, case: Case, *arms: int) -> dict[str, dict[str, Any]]:
    return _seen(record, case.preset, {case.arms[arm].backend for arm in arms})


def _seen(record: Record, preset: str, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    return {name: record.software.get(name, {}).get("runtime_info", {}).get(preset, {}) for name in names}


def _notes(record: Record, slow: int) -> list[str]:
    """Sentences about the times of a device. ``slow``: the number of blocks that are left out."""
    notes, every = [], len(record.rounds)
    if slow:
        least = f"{MIN_CLOCK_FRACTION:.0%} of the device's default clock"
        notes.append(f"{slow} of {every} blocks ran below {least} and are left out")
    for bit, words in REASONS.items():
        count = sum(bool(block.throttle & bit) for block in record.rounds)
        notes += [f"after {count} of {every} blocks the device's clock was reduced: {words}"] if count else []
    if any(block.device_ns for block in record.rounds):
        for preset in record.presets:
            seen = _seen(record, preset, record.software)
            notes += [f"{preset}: {words}" for words in (methods(seen),) if words]
    return notes


def _sorted(record: Record) -> tuple[dict[int, list[Round]], dict[tuple[int, int], list[Tokens]], int]:
    by_case: dict[int, list[Round]] = defaultdict(list)
    fast, slow = kept(record.rounds, default_mhz(record.machine))
    for block in fast:
        by_case[block.case].append(block)
    came: dict[tuple[int, int], list[Tokens]] = defaultdict(list)
    left_out = {_place(block) for block in record.rounds} - {_place(block) for block in fast}
    for one in record.tokens:
        if _place(one) not in left_out:
            came[one.case, one.arm].append(one)
    return by_case, came, slow


def _place(one: Round | Tokens) -> tuple[int, int, int, int]:
    return one.case, one.restart, one.round, one.arm


def _summary(
    case: int, arm: int, mine: dict[tuple[int, int], float], device: dict[tuple[int, int], float]
) -> Summary | None:
    samples, logs = list(mine.values()), medians(by_restart(mine))
    n, restarts = len(samples), len(logs)
    if restarts > 1:
        middle, low, high = (math.exp(x) for x in student(logs))
    elif rank(n):
        middle, low, high = interval(samples)
    else:
        return None
    half = math.log(high / low) / 2
    q1, q3, p90, p99 = (float(q) for q in np.quantile(samples, (0.25, 0.75, 0.9, 0.99)))
    return Summary(
        case,
        arm,
        n,
        restarts,
        middle,
        q1,
        q3,
        low,
        high,
        spread(logs),
        p90 if reaches(n, 0.9) else None,
        p99 if reaches(n, 0.99) else None,
        math.exp(student(medians(by_restart(device)))[0]) if device else None,
        f"the interval's half-width is {half:.0%}, over {MAX_TIME_HALF_WIDTH:.0%}"
        if half > MAX_TIME_HALF_WIDTH
        else "",
    )


def _generation(number: int, arm: int, case: Case, came: list[Tokens]) -> Generation:
    between = [float(b - a) for one in came for a, b in zip(one.ns, one.ns[1:], strict=False)]
    tpot = float(np.median([(one.ns[-1] - one.ns[0]) / (len(one.ns) - 1) for one in came]))
    return Generation(
        number,
        arm,
        float(np.median([one.ns[0] for one in came])),
        tpot,
        float(np.median(between)),
        float(np.quantile(between, 0.99)) if reaches(len(between), 0.99) else None,
        case.batch * 1e9 / tpot,
    )


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
