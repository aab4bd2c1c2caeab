"""A speed record that was never measured, for the tests of the report: every kind of figure, and every kind of gap."""

from __future__ import annotations

import random
from typing import Any

from kvconform.bench.record import (
    CEILINGS,
    MACHINE,
    Arm,
    Case,
    Excluded,
    Exponent,
    Generation,
    Memory,
    Once,
    Ratio,
    Record,
    Roof,
    Round,
    Summary,
    Tokens,
)

NOISY = "the interval's half-width is 13%, over 10%"
FLAG = "over the measured ceiling by more than 5%: what was measured is not the limit"
RESTARTS = 3
DEPTHS = (16, 64, 256, 1024, 2048)
STEPS = ("decode", "recompute", "recompute-last")
GENERATE = ("generate", "regenerate", "regenerate-last")
SLOW = (1.0, 0.7, 3.1)
"""How slow each backend is, against the first."""
PUBLISHED: dict[str, Any] = {
    "what": "16 tokens after a prompt of 64",
    "cached": "0.0315 s",
    "uncached": 0.0997,
    "ratio": 3.17,
    "machine": "A100",
    "source": "a notebook on caches",
    "phases": ["generate", "regenerate"],
    "differs": ["one thread of a CPU here", "its cached loop ran the prefill twice"],
}


def latency(names: tuple[str, ...] = ("eager", "onnx", "numpy"), device: bool = False) -> Record:
    """Two presets. The small one has two batches, generations, and a published design, that of the last backend; there
    the deepest decode of the last backend is too noisy, and the roof of the second is flagged. Of the wide one only
    steps of one batch are timed, and the second backend cannot project the last position alone. ``device``: with times
    of a GPU's own."""
    record = Record(
        suite="0.1.0",
        started="2026-11-21T23:00:00+00:00",
        device="cpu",
        machine={"cpu": "AMD EPYC 9B14", "cores": 2, "memory_gib": 16},
        software={name: {"python": "3.11.7", "torch": "2.13.0"} for name in names},
        protocol={
            "name": "pair-v1",
            "order": "random in each round",
            "restarts": RESTARTS,
            "clock": "perf_counter_ns",
            "stop": {"blocks": 60, "half_width": 0.02, "seconds": 8},
            "threads": 1,
            "seed": 11,
        },
        load=[0.42, 0.61, 0.73, 1.17],
        presets={
            "decoder-small": {
                "config": {"layers": 4, "heads": 8, "window": None},
                "about": "a small decoder",
                "published": [{**PUBLISHED, "arm": names[-1]}],
            },
            "decoder-wide": {"config": {"layers": 8, "heads": 16, "window": None}, "about": "a wide decoder"},
        },
        excluded=[
            Excluded("eager-static", "decoder-small", "not conformant: 4 of 95 cells broken"),
            Excluded("compiled", "decoder-wide", "not installed"),
            Excluded("onnx", "decoder-wide", "claims no last", "recompute-last"),
        ],
        seconds=312.0,
        finished=True,
    )
    run = _Run(record, names, device)
    for batch in (1, 4):
        run.steps("decoder-small", 90e3, batch, DEPTHS if batch == 1 else DEPTHS[-2:])
        run.prefill("decoder-small", 90e3, batch, (64, 256))
        run.generate("decoder-small", 90e3, batch, 64, 16)
        run.exponents("decoder-small", batch)
        run.memory("decoder-small", batch)
    run.steps("decoder-wide", 700e3, 1, DEPTHS[-2:])
    for name in names:
        record.once += [
            Once("decoder-small", name, r, 2.5 + r / 8, 0.125 + r / 64, {"prefill(64)": 0.03125, "decode(16)": 1.75})
            for r in range(RESTARTS)
        ]
    return record


class _Run:
    """Adds cases with all that follows from them, as a run would; the numbers are drawn."""

    def __init__(self, record: Record, names: tuple[str, ...], device: bool) -> None:
        self.record, self.names, self.device, self.draw = record, names, device, random.Random(3)

    def steps(self, preset: str, base: float, batch: int, depths: tuple[int, ...]) -> None:
        """At each depth decodes alone, between the ceilings, and once more beside the recomputes."""
        cost = {
            "decode": lambda n: 1 + n / 4000,
            "recompute": lambda n: 1 + n / 8,
            "recompute-last": lambda n: 1 + n / 14,
        }
        for n in depths:
            ceilings = {Arm(MACHINE, phase): base * 0.45 for phase in CEILINGS}
            decodes = {arm: base * batch**0.5 * slow * cost["decode"](n) for arm, slow in self.arms(("decode",))}
            number = self.case(preset, n, batch, decodes | ceilings, 8)
            self.roofs(number)
            phases = STEPS if preset == "decoder-small" else STEPS[:2]
            self.case(
                preset,
                n,
                batch,
                {arm: base * batch**0.9 * slow * cost[arm.phase](n) for arm, slow in self.arms(phases)},
                1,
            )

    def prefill(self, preset: str, base: float, batch: int, prompts: tuple[int, ...]) -> None:
        for n in prompts:
            times = {arm: base * batch * slow * (1 + n / 9) for arm, slow in self.arms(("prefill",))}
            self.case(preset, n, batch, times, 2)

    def generate(self, preset: str, base: float, batch: int, prompt: int, new: int) -> None:
        """With the cache alone, which has more rounds, and once more beside the loops without."""
        cost = dict(zip(GENERATE, (1.2, 11.0, 6.5), strict=True))
        for phases in (GENERATE[:1], GENERATE):
            tpot = {arm: base * batch**0.5 * slow * cost[arm.phase] for arm, slow in self.arms(phases)}
            number = self.case(preset, prompt, batch, {arm: t * (new + 6) for arm, t in tpot.items()}, 1, new)
            self.tokens(number, batch, new, list(tpot.values()))

    def tokens(self, number: int, batch: int, new: int, tpot: list[float]) -> None:
        for i, one in enumerate(tpot):
            p99 = None if i % 3 else one * 1.9
            self.record.generations.append(Generation(number, i, one * 7, one, one * 0.97, p99, batch * 1e9 / one))
            self.record.tokens += [
                Tokens(number, r, 0, i, [round(one * (7 + k)) for k in range(new)]) for r in range(RESTARTS)
            ]

    def exponents(self, preset: str, batch: int) -> None:
        depths = list(DEPTHS[-2:])
        for k, name in enumerate(self.names):
            for phase, slope in (*zip(STEPS, (0.21, 1.85, 1.71), strict=True), ("ratio", 1.64)):
                self.record.exponents.append(
                    Exponent(preset, name, batch, phase, depths, slope + k / 50, slope + 0.005, slope - 1, slope + 1)
                )

    def memory(self, preset: str, batch: int) -> None:
        for n in DEPTHS[-2:]:
            for k, name in enumerate(self.names):
                exact = 2 * 4 * 4 * n * 32 * 4 * batch
                seen = exact + 4096 * (k + 1) if k else None
                self.record.memory.append(
                    Memory(
                        preset, name, n, batch, exact, seen, exact * 2 + k * 8192, exact * 3 if self.device else None
                    )
                )

    def arms(self, phases: tuple[str, ...]) -> list[tuple[Arm, float]]:
        return [
            (Arm(name, phase), SLOW[i % 3] * self.draw.uniform(0.95, 1.05))
            for i, name in enumerate(self.names)
            for phase in phases
        ]

    def case(self, preset: str, depth: int, batch: int, times: dict[Arm, float], steps: int, new: int = 0) -> int:
        """Rounds, summaries and ratios of arms that take such nanoseconds: against the reference of their phase, and a
        cached phase against its own backend's uncached ones."""
        record, number, draw = self.record, len(self.record.cases), self.draw
        arms = list(times)
        blocks = 90 if steps > 1 else 24 if len(arms) > len(self.names) else 48  # what is slow has few
        record.cases.append(Case(preset, depth, batch, arms, steps, new))
        for i, (arm, ns) in enumerate(times.items()):
            half = draw.uniform(0.01, 0.06)
            record.summaries.append(
                Summary(
                    number,
                    i,
                    blocks,
                    RESTARTS,
                    ns,
                    ns * (1 - half),
                    ns * (1 + 2 * half),
                    ns * (1 - half / 2),
                    ns * (1 + half / 2),
                    draw.uniform(0.004, 0.05),
                    ns * (1 + 4 * half) if blocks >= 64 else None,
                    None,
                    ns * 0.6 if self.device and arm.backend != MACHINE else None,
                )
            )
            gpu = round(ns * 0.6) if self.device else 0
            record.rounds += [Round(number, r, 0, i, i, round(ns), round(ns), 0, gpu) for r in range(RESTARTS)]
        uncached = {GENERATE[0]: GENERATE[1:], STEPS[0]: STEPS[1:]}
        for i, one in enumerate(arms):
            for j, other in enumerate(arms):
                peer = other.phase == one.phase and other.backend == self.names[0] != one.backend != MACHINE
                own = other.backend == one.backend and other.phase in uncached.get(one.phase, ())
                alone = one.phase != "decode" or steps > 1  # decodes are compared where they have many rounds
                if own or (peer and alone):
                    why = NOISY if one.backend == self.names[-1] and depth == DEPTHS[-1] and batch == 1 else ""
                    ratio, half = times[one] / times[other], draw.uniform(0.004, 0.04)
                    record.ratios.append(
                        Ratio(
                            number,
                            i,
                            j,
                            ratio,
                            ratio * (1 - half),
                            ratio * (1 + half),
                            blocks,
                            RESTARTS,
                            not why,
                            why,
                            draw.uniform(0.002, 0.03),
                        )
                    )
        return number

    def roofs(self, number: int) -> None:
        case = self.record.cases[number]
        decodes = [i for i, arm in enumerate(case.arms) if arm.backend != MACHINE]
        floor = min(s.median for s in self.record.summaries if s.case == number and s.arm in decodes) * 0.71
        for i in decodes:
            at_least = 3_000_000 + 2048 * case.depth * case.batch
            fraction = floor / next(s.median for s in self.record.summaries if (s.case, s.arm) == (number, i))
            flagged = case.arms[i].backend == self.names[1 % len(self.names)] and case.depth == DEPTHS[-1]
            known = at_least + 4096 * case.depth if i == 0 else None
            if flagged:
                roof = Roof(number, i, at_least, known, 6_100_000, floor, None, flag=FLAG)
            else:
                roof = Roof(number, i, at_least, known, 6_100_000, floor, fraction, fraction * 0.97, fraction * 1.03)
            self.record.roofs.append(roof)
