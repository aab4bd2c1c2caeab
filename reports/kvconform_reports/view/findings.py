"""A speed record by what one asks of it: the times, ratios and roofs of an arm, not of an index."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import groupby

from kvconform.bench.record import MACHINE, Arm, Case, Generation, Ratio, Record, Roof, Summary
from kvconform_reports.view.figures import Proportion, proportion

UNCACHED = {"decode": ("recompute", "recompute-last"), "generate": ("regenerate", "regenerate-last")}
"""The phases with the cache, and what does the same without it: all positions projected to logits, the last alone."""
GENERATING = ("generate", *UNCACHED["generate"])
STEPS = ("decode", *UNCACHED["decode"])
PREFILL = ("prefill",)
Numbered = tuple[int, Case]
"""A case with its place in the record."""


def device_of(record: Record) -> str:
    """What the times are of: the processor by its name, or the GPU."""
    kind = "cpu" if record.device == "cpu" else "gpu"
    return str(record.machine.get(kind) or record.device)


def runs_on(record: Record) -> str:
    """How that is used: a CPU by so many threads of each worker."""
    if record.device != "cpu":
        return "a GPU here"
    threads = record.protocol.get("threads", 1)
    return "one thread of a CPU here" if threads == 1 else f"{threads} threads of a CPU here"


class Findings:
    """The figures of each arm, by its case and its place in the case."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.summaries: dict[tuple[int, int], Summary] = {
            (s.case, s.arm): s for s in record.summaries if not s.why_invalid
        }
        self._vague = {(s.case, s.arm): f"not valid: {s.why_invalid}" for s in record.summaries if s.why_invalid}
        self.generations: dict[tuple[int, int], Generation] = {
            (g.case, g.arm): g for g in record.generations if (g.case, g.arm) not in self._vague
        }
        self.roofs: dict[tuple[int, int], Roof] = {(r.case, r.arm): r for r in record.roofs}
        self.blocks = Counter((r.case, r.arm) for r in record.rounds)
        self._ratios: dict[int, list[Ratio]] = defaultdict(list)
        for ratio in record.ratios:
            self._ratios[ratio.case].append(ratio)

    def cases(self, preset: str, batch: int, phases: Sequence[str]) -> list[Numbered]:
        """Those that time one of these phases, by depth."""
        found = [
            (number, case)
            for number, case in enumerate(self.record.cases)
            if (case.preset, case.batch) == (preset, batch) and any(arm.phase in phases for arm in case.arms)
        ]
        return sorted(found, key=lambda item: (item[1].depth, item[1].new))

    def generating(self, preset: str, batch: int) -> list[list[Numbered]]:
        """The cases of generations, those of one prompt and as many tokens together."""
        cases = self.cases(preset, batch, GENERATING)
        return [list(found) for _, found in groupby(cases, key=lambda item: (item[1].depth, item[1].new))]

    def arms(self, cases: Iterable[Numbered], phases: Sequence[str]) -> list[Arm]:
        """Of the backends, in the record's order."""
        return list(
            dict.fromkeys(a for _, case in cases for a in case.arms if a.phase in phases and a.backend != MACHINE)
        )

    def places(self, cases: Iterable[Numbered], arm: Arm) -> list[tuple[int, int]]:
        return [(number, case.arms.index(arm)) for number, case in cases if arm in case.arms]

    def summary(self, cases: Iterable[Numbered], arm: Arm) -> Summary | None:
        """Of the most blocks, where several of these cases time the arm."""
        found = [self.summaries[place] for place in self.places(cases, arm) if place in self.summaries]
        return max(found, key=lambda s: s.n, default=None)

    def timeless(self, places: Iterable[tuple[int, int]]) -> str:
        """Why an arm has no time in any of these places."""
        found = list(places)
        vague = next((self._vague[place] for place in found if place in self._vague), "")
        return vague or ("too few blocks" if any(self.blocks[place] for place in found) else "not measured")

    def generation(self, cases: Iterable[Numbered], arm: Arm) -> Generation | None:
        """Of the most blocks, as ``summary``."""
        found = [place for place in self.places(cases, arm) if place in self.generations]
        return self.generations[max(found, key=lambda place: self.blocks[place])] if found else None

    def roof(self, cases: Iterable[Numbered], arm: Arm) -> Roof | None:
        return next((self.roofs[place] for place in self.places(cases, arm) if place in self.roofs), None)

    def ratio(self, cases: Iterable[Numbered], arm: Arm, other: Arm, *, invert: bool = False) -> Proportion | None:
        """time(arm) / time(other), whichever of the two the record took for its reference; None where it took
        neither. Of the most rounds, where several cases have it."""
        found = [
            (ratio, case.arms[ratio.arm])
            for number, case in cases
            for ratio in self._ratios[number]
            if {case.arms[ratio.arm], case.arms[ratio.reference]} == {arm, other}
        ]
        if not found:
            return None
        ratio, one = max(found, key=lambda pair: pair[0].n)
        return proportion(ratio, other.backend, invert=invert != (one != arm))

    def without(self, cases: Sequence[Numbered], backend: str, uncached: str, *, invert: bool = False) -> Proportion:
        """With the cache over without it; ``uncached``: the phase without. Where there is none, why."""
        cached = next(phase for phase, those in UNCACHED.items() if uncached in those)
        found = self.ratio(cases, Arm(backend, cached), Arm(backend, uncached), invert=invert)
        return replace(found, against="") if found else Proportion(absent=self.absence(cases, backend, uncached))

    def absence(self, cases: Sequence[Numbered], backend: str, phase: str) -> str:
        """Why a backend has no time in a phase."""
        presets = {case.preset for _, case in cases}
        whys = [e.why for e in self.record.excluded if (e.backend, e.phase) == (backend, phase) and e.preset in presets]
        return whys[0] if whys else "not measured"

    def others(self, number: int, arm: int) -> tuple[Proportion, ...]:
        """The recorded ratios of this arm, but those of a cached phase to its own backend's uncached ones."""
        case = self.record.cases[number]
        found = []
        for ratio in self._ratios[number]:
            one, other = case.arms[ratio.arm], case.arms[ratio.reference]
            if ratio.arm == arm and not _itself(one, other):
                name = "" if one.backend == other.backend else other.backend
                phase = "" if one.phase == other.phase else other.phase
                found.append(proportion(ratio, " ".join(part for part in (name, phase) if part), invert=False))
        return tuple(found)

    def itself(self, number: int, arm: int) -> tuple[Proportion, ...]:
        """The recorded ratios of this cached arm to its own backend's uncached ones, whichever was the reference."""
        case, found = self.record.cases[number], []
        for ratio in self._ratios[number]:
            one, other = case.arms[ratio.arm], case.arms[ratio.reference]
            if _itself(one, other) and case.arms[arm] in (one, other) and case.arms[arm].phase in UNCACHED:
                against = other if case.arms[arm] == one else one
                found.append(proportion(ratio, against.phase, invert=against == one))
        return tuple(found)


def _itself(one: Arm, other: Arm) -> bool:
    """Whether one of the two is the other without the cache."""
    phases = one.phase, other.phase
    return one.backend == other.backend and any(
        phases in ((cached, uncached), (uncached, cached)) for cached, those in UNCACHED.items() for uncached in those
    )
