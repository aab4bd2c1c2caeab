"""The roofline of each decode arm: how near it comes to the machine's own time for what it must do at least.

``floor = max(bytes_min / read bandwidth, flops / peak)`` (Williams, Waterman, Patterson 2009, "Roofline"). Both are not
numbers of a data sheet but arms of the same case: in each round the machine reads as many bytes and computes as many
products as the decode step needs at least (``costs``, ``ceilings``). The fraction is a ratio like any other: paired
within rounds, one median for each restart, Student's t over restarts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from kvconform.bench.analysis.intervals import Times, by_restart, log_ratios, medians, student
from kvconform.bench.analysis.ratios import busy_words, ratio_of
from kvconform.bench.costs import bytes_expected, cost
from kvconform.bench.record import CEILINGS, MACHINE, Case, Record, Roof
from kvconform.bench.worker.ceilings import excess
from kvconform_specs.config import Config

MAX_ROOFLINE_FRACTION = 1.05
"""A fraction above it is no number: nothing is faster than the machine, so what was measured was not its ceiling."""


class Bound(NamedTuple):
    """The ceiling that binds: its arm, the nanoseconds of one step, and what of the arm's time that is."""

    arm: int
    floor: float
    share: float


def roofs(record: Record, cases: Sequence[Times]) -> list[Roof]:
    """One for each decode arm in each case that has both ceilings, or that is not the processor's. ``cases``: the times
    of each case."""
    busy, found = busy_words(record), []
    for number, (case, taken) in enumerate(zip(record.cases, cases, strict=True)):
        bound = binding(record, case, taken)
        if bound is not None or record.device != "cpu":
            found += [
                _roof(record, number, arm, bound, taken, busy)
                for arm, one in enumerate(case.arms)
                if one.phase == "decode" and taken.get(arm)
            ]
    return found


def binding(record: Record, case: Case, taken: Times) -> Bound | None:
    """The ceiling that takes longer over the whole case; None where one of them was not timed.

    It is chosen once for a case: the larger of two in each round would be larger than either by their noise alone.
    """
    timed = {one.phase: arm for arm, one in enumerate(case.arms) if one.backend == MACHINE and taken.get(arm)}
    if not set(CEILINGS) <= set(timed):
        return None
    asked = cost(config_of(record, case.preset), "decode", case.depth, case.batch)
    bounds = []
    for phase, arm in timed.items():
        share = 1 / excess(phase, asked.bytes, asked.flops)
        bounds.append(Bound(arm, share * nanoseconds(taken, arm), share))
    return max(bounds, key=lambda bound: bound.floor)


def nanoseconds(taken: Times, arm: int) -> float:
    """Of one step of an arm: the geometric mean over restarts of each one's median."""
    return math.exp(student(medians(by_restart(taken[arm])))[0])


def config_of(record: Record, preset: str) -> Config:
    return Config.from_json(record.presets[preset]["config"], f"presets.{preset}.config")


def _roof(record: Record, number: int, arm: int, bound: Bound | None, taken: Times, busy: str) -> Roof:
    case = record.cases[number]
    config, notes = config_of(record, case.preset), record.software.get(case.arms[arm].backend, {})
    asked = cost(config, "decode", case.depth, case.batch)
    runtime_info = notes.get("runtime_info", {}).get(case.preset, {})
    needed = number, arm, asked.bytes, bytes_expected(config, case.depth, case.batch, runtime_info.get("cache_design"))
    device = notes.get("device", "cpu")
    if bound is None or device != "cpu":
        return Roof(*needed, asked.flops, None, None, flag=f"it ran on {device}, and ceilings are the processor's")
    shifted = {
        restart: [value + math.log(bound.share) for value in logs]
        for restart, logs in log_ratios(taken, bound.arm, arm).items()
    }
    flags, fraction, low, high = [], None, None, None
    if not shifted:
        flags.append("no round has both the step and its ceiling")
    else:
        paired = ratio_of(number, bound.arm, arm, shifted, busy)
        fraction, low, high = paired.ratio, paired.low, paired.high
        if not fraction <= MAX_ROOFLINE_FRACTION:
            over = f"{MAX_ROOFLINE_FRACTION - 1:.0%}"
            flags.append(f"over the measured ceiling by more than {over}: what was measured is not the limit")
        flags += [] if paired.valid else [paired.why_invalid]
    if case.arms[bound.arm].phase == "multiply" and config.dtype != "float32":
        flags.append(f"the products bind, and their ceiling is that of float32, not of {config.dtype}")
    if flags:
        fraction = low = high = None
    return Roof(*needed, asked.flops, bound.floor, fraction, low, high, "; ".join(flags))
