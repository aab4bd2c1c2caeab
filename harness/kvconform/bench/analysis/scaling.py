"""How times grow with the depth: exponents over the last two octaves, and what the formulas expect there.

A correct decoder has neither slope 1 without a cache's help nor slope 0 with it: the weights cost the same at every
depth. So an exponent stands beside the slope that the formula has over the same depths. Without a cache that is the
slope of the multiply-adds, every token on every token, as a dense mask computes and a meter counts them. With a cache
it is the slope of the roofline's floor, because one token's products wait for memory: ``max(bytes_min / bandwidth,
flops / peak)``, with one bandwidth and one peak for all the depths, the geometric means of the measured. What the
formula leaves out shows as the difference: calls that cost the same at any depth flatten the measured exponent, a cache
that is copied in each step or outgrows the processor's steepens it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from kvconform.bench.analysis.intervals import Times, by_restart, log_ratios, student
from kvconform.bench.analysis.ratios import pairs
from kvconform.bench.costs import cost
from kvconform.bench.record import CEILINGS, MACHINE, Arm, Case, Exponent, Record
from kvconform.bench.worker.ceilings import excess
from kvconform_specs.config import Config
from kvconform_specs.costs import multiply_adds

OCTAVES = 2
"""Depths from the greatest down to a fourth of it."""
LEAST_DEPTHS = 3
"""With fewer of them in these octaves there is no exponent: two points lie on every line."""
RATIOS = {"recompute": "ratio", "recompute-last": "ratio-last"}
"""The exponent of recomputing over decoding, by the phase that recomputes."""
TIMED = ("decode", *RATIOS)

Key = tuple[str, str, int, str]
"""Preset, backend, batch and phase."""
Rates = tuple[float, float]
"""Nanoseconds of a byte and of a FLOP."""


def exponents(record: Record, cases: Sequence[Times]) -> list[Exponent]:
    """Of each backend's decode and recomputes and of their ratios. ``cases``: the times of each case.

    Each restart that timed all the depths gives one slope; the interval is Student's t over these.
    """
    found = []
    for (preset, backend, batch, phase), values in _points(record, cases).items():
        depths = last_octaves(values)
        whole = set.intersection(*(set(values[depth]) for depth in depths)) if depths else set()
        if whole:
            config = Config.from_json(record.presets[preset]["config"], f"presets.{preset}.config")
            want = expected(config, phase, depths, batch, _rates(record, config, preset, batch, depths))
            slopes = [slope(depths, [math.exp(values[depth][restart]) for depth in depths]) for restart in whole]
            got, low, high = student(slopes)
            ends = (low, high) if len(slopes) > 1 else (None, None)
            found.append(Exponent(preset, backend, batch, phase, depths, got, want, *ends))
    return found


def last_octaves(depths: Collection[int]) -> list[int]:
    """Those of the last octaves in order, or none where they are too few."""
    kept = sorted(n for n in depths if n * 2**OCTAVES >= max(depths))
    return kept if len(kept) >= LEAST_DEPTHS else []


def slope(depths: Sequence[int], values: Sequence[float]) -> float:
    """Of the logarithms, by least squares."""
    x, y = [math.log(n) for n in depths], [math.log(value) for value in values]
    middle = math.fsum(x) / len(x)
    return math.fsum((a - middle) * b for a, b in zip(x, y, strict=True)) / math.fsum((a - middle) ** 2 for a in x)


def expected(config: Config, phase: str, depths: Sequence[int], batch: int, rates: Rates) -> float:
    """The slope of a phase's formula over these depths; that of a ratio is the difference of its two."""
    for recompute, ratio in RATIOS.items():
        if phase == ratio:
            over, under = (expected(config, one, depths, batch, rates) for one in (recompute, "decode"))
            return over - under
    if phase == "decode":
        byte, flop = rates
        steps = [cost(config, phase, n, batch) for n in depths]
        return slope(depths, [max(step.bytes * byte, step.flops * flop) for step in steps])
    last = phase == "recompute-last"
    return slope(depths, [float(multiply_adds(config, 0, n + 1, batch, keys=n + 1, last_only=last)) for n in depths])


def _points(record: Record, cases: Sequence[Times]) -> dict[Key, dict[int, dict[int, float]]]:
    """By depth and restart the logarithm of the median; where several cases time the same, of the one with the most
    blocks."""
    points: dict[Key, dict[int, tuple[int, dict[int, float]]]] = defaultdict(dict)

    def put(case: Case, arm: Arm, phase: str, logs: Mapping[int, list[float]]) -> None:
        mine, n = points[case.preset, arm.backend, case.batch, phase], sum(map(len, logs.values()))
        if n > mine.get(case.depth, (0, {}))[0]:
            mine[case.depth] = n, {restart: float(np.median(samples)) for restart, samples in logs.items()}

    for case, taken in zip(record.cases, cases, strict=True):
        for number, arm in enumerate(case.arms):
            if arm.phase in TIMED and arm.backend != MACHINE and taken.get(number):
                put(case, arm, arm.phase, by_restart(taken[number]))
        for under, over in pairs(case):
            theirs, ours = case.arms[over], case.arms[under]
            if theirs.phase in RATIOS and (ours.backend, ours.phase) == (theirs.backend, "decode"):
                put(case, ours, RATIOS[theirs.phase], log_ratios(taken, over, under))
    return {key: {depth: logs for depth, (_, logs) in mine.items()} for key, mine in points.items()}


def _rates(record: Record, config: Config, preset: str, batch: int, depths: Sequence[int]) -> Rates:
    """Geometric means over the ceilings measured at these depths; where there are none of this device, bytes alone
    count: a token's product with a weight of four bytes is two FLOPs, less than any device computes while it reads
    them."""
    if record.device != "cpu":
        return 1.0, 0.0
    logs: dict[str, list[float]] = {phase: [] for phase in CEILINGS}
    for one in record.summaries:
        case = record.cases[one.case]
        arm = case.arms[one.arm]
        if arm.backend == MACHINE and (case.preset, case.batch) == (preset, batch) and case.depth in depths:
            asked = cost(config, "decode", case.depth, batch)
            amount = asked.bytes if arm.phase == "read" else asked.flops
            logs[arm.phase].append(math.log(one.median / (amount * excess(arm.phase, asked.bytes, asked.flops))))
    if not all(logs.values()):
        return 1.0, 0.0
    byte, flop = (math.exp(math.fsum(logs[phase]) / len(logs[phase])) for phase in CEILINGS)
    return byte, flop
