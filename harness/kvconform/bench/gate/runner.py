"""The gate on wall time, protocol ``gate-v1``: one backend in two environments, timed by the engine of the bench.

Each restart starts both workers and times every case in rounds as ``pair-v1`` does. ``decision`` concludes from the
restarts; how often it is wrong is in ``sign_flip``. The first restart judges the outputs of both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from kvconform.bench.engine import Options, Restart, Run, TimeUp, fields
from kvconform.bench.gate.decision import LEVEL, PROTOCOL, RATE, RESTARTS, SCREEN, SMALLEST, play
from kvconform.bench.gate.environments import Environment
from kvconform.bench.gate.record import BASE, HEAD, SIDES, GateRecord, NotComparable, Side, trials
from kvconform.bench.presets import CasePlan, Preset
from kvconform.bench.record import Arm, Case
from kvconform.bench.worker.gpu import classes, default_mhz, kept
from kvconform.errors import BackendLost
from kvconform.worker.client import WorkerSpec

SECONDS_PER_CASE = 1.0
"""Seconds of one case in one restart: the spread between restarts is the larger part of the error."""


def gate(
    base: WorkerSpec,
    head: WorkerSpec,
    presets: Mapping[str, Preset],
    backend: str,
    options: Options,
    environments: Mapping[str, Environment] = {},
) -> GateRecord:
    """Compares decode at each depth and prefill at each prompt; the file ``options.out`` grows with each restart.

    backend: its name in the record. environments: what ``base`` and ``head`` were made from, for the record. Cases
    that are undecided when the time limit is reached, or after an interrupt (Ctrl-C), are inconclusive. Raises GpuBusy
    if another benchmark holds the GPU.
    """
    run = _Gate({BASE: base, HEAD: head}, list(presets.values()), backend, options, environments)
    with run.running():
        play(range(len(run.record.cases)), run.measure)
    return run.record


class _Gate(Run[GateRecord]):
    """The state of one run."""

    def __init__(
        self,
        specs: Mapping[str, WorkerSpec],
        presets: Sequence[Preset],
        backend: str,
        options: Options,
        environments: Mapping[str, Environment],
    ) -> None:
        self.specs, self.presets = specs, [replace(preset, batches=(1,)) for preset in presets]
        self.current: Sequence[int] = ()  # the cases of the restart under way
        sides = {side: Side(spec.python, "", spec.python) for side, spec in specs.items()}
        sides |= {side: Side(known.name, known.commit, known.python) for side, known in environments.items()}
        cases = [
            Case(preset.name, n, 1, [Arm(side, phase) for side in SIDES], 0)
            for preset in self.presets
            for phase, sizes in (("decode", preset.depths), ("prefill", preset.prompts))
            for n in sizes
        ]
        smallest = round(math.exp(SMALLEST), 9)
        rule = {"name": PROTOCOL, "restarts": RESTARTS, "level": LEVEL, "rate": RATE, "smallest": smallest}
        measured = replace(options, time_limit=None)  # which ends the run, and is not divided among the cases
        common = fields(self.presets, specs[HEAD].device, measured, **rule, seconds=options.time_limit)
        super().__init__(GateRecord(**common, backend=backend, sides=sides, cases=cases), options)

    def measure(self, stage: str, number: int, cases: Sequence[int]) -> dict[int, float]:
        """One restart for each preset: d of each case that could be timed."""
        began, found = self.elapsed, dict[int, float]()
        place = number if stage == SCREEN else RESTARTS[SCREEN] + number
        for preset in self.presets:
            self.current = [case for case in cases if self.record.cases[case].preset == preset.name]
            if self.current:
                if place:
                    self.in_time()
                found |= self.times(preset, place)
        spent, left = self.elapsed - began, RESTARTS[stage] - number - 1
        self.options.say(
            f"{stage} {number + 1}/{RESTARTS[stage]}: {len(found)} of {len(cases)} cases in {spent:.1f} s, "
            f"about {left * spent:.0f} s to go"
        )
        return found

    def times(self, preset: Preset, number: int) -> dict[int, float]:
        """One start of both workers, and the current cases, all of one preset."""
        plans = {case: _plan(self.record.cases[case]) for case in self.current}
        found: dict[int, float] = {}
        with self.restart(preset, number, self.of(preset), list(plans.values()), check=number == 0) as restart:
            if set(restart.admitted) == set(SIDES):
                self.comparable(restart)
            for case, plan in plans.items():
                if set(restart.admitted) != set(SIDES):
                    break
                self.in_time()
                try:
                    restart.time(plan, restart.arms(plan))
                    found[case] = self.d(case, number)
                except BackendLost as lost:
                    self.exclude([case], lost)
            restart.conclude()
        bad = {one.case for one in self.record.not_comparable}
        return {case: d for case, d in found.items() if case not in bad}

    def of(self, preset: Preset) -> dict[str, WorkerSpec]:
        """How both sides start; each has artefacts of its own."""
        return {
            side: replace(
                spec,
                address=preset.addresses.get(self.record.backend, spec.address),
                environment={
                    "KVCONFORM_ARTEFACTS": str((self.options.out.parent / "artefacts" / side).resolve()),
                    **spec.environment,
                },
            )
            for side, spec in self.specs.items()
        }

    def comparable(self, restart: Restart) -> None:
        """Excludes the current cases unless both sides ran on one kind of machine, in one class of precision."""
        notes = self.record.software
        kinds = [notes[side]["environment"].get("platform", "").partition("-with-")[0] for side in SIDES]
        mixed = classes({side: notes[side]["runtime_info"].get(restart.preset.name, {}) for side in SIDES})
        if kinds[0] != kinds[1]:
            mixed = f"it runs on {kinds[1]}, the base on {kinds[0]}"
        if mixed:
            restart.lose(HEAD, mixed)

    def d(self, case: int, number: int) -> float:
        """The median of log(head / base) in one restart. Raises BackendLost without a whole round."""
        blocks = [block for block in self.record.rounds if (block.case, block.restart) == (case, number)]
        found = trials(case, self.record.cases[case], kept(blocks, default_mhz(self.record.machine))[0])
        if not found:  # on a CPU at least one whole round was run
            raise BackendLost(HEAD, "no round of a restart had both blocks near the device's default clock")
        return found[0].d

    # --- what cannot be compared ---
    def lose(self, preset: Preset, name: str, why: str) -> None:
        self.exclude(self.current, BackendLost(name, why))

    def machine_changed(self, preset: Preset) -> None:
        self.exclude(self.current, BackendLost(HEAD, "the machine is no longer the one that the run began on"))

    def exclude(self, cases: Sequence[int], lost: BackendLost) -> None:
        """Notes that the times of these cases cannot be compared; the first reason counts."""
        why = f"{lost.backend} ({self.record.sides[lost.backend].name}): {lost.why}"
        self.record.not_comparable += [NotComparable(case, why) for case in cases]
        self.options.say(f"{len(cases)} cases are not comparable: {why}")

    def in_time(self) -> None:
        if self.options.time_limit is not None and self.elapsed > self.options.time_limit:
            raise TimeUp

    def write(self) -> None:
        self.record.seconds = round(self.elapsed, 3)
        self.record.write(self.options.out)


def _plan(case: Case) -> CasePlan:
    return CasePlan((case.arms[0].phase,), case.depth)
