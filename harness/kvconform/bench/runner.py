"""The bench, protocol ``pair-v1``: backends against one another on presets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import msgspec

from kvconform.bench.analysis import ratios
from kvconform.bench.analysis.summarize import summarise, without
from kvconform.bench.engine import Options, Restart, Run, fields
from kvconform.bench.presets import CasePlan, Preset, case_plans
from kvconform.bench.protocol import DEVICE_BLOCKS, MIN_SECONDS, NAME, RESTARTS
from kvconform.bench.record import MACHINE, Excluded, Memory, Once, Record, Round, Tokens, write
from kvconform.bench.worker.gpu import default_mhz, fast
from kvconform.errors import BackendLost
from kvconform.worker.client import WorkerSpec
from kvconform_specs.costs import cache_bytes

Advance = Callable[[float, float], None]


def bench(
    specs: Mapping[str, WorkerSpec],
    presets: Mapping[str, Preset],
    options: Options,
    *,
    restarts: int = RESTARTS,
    phases: Sequence[str] = (),
    advance: Advance = lambda done, remaining: None,
) -> Record:
    """Times every eligible backend on every preset; the file ``options.out`` grows with each restart.

    specs: by name, the reference first; a preset's own address replaces a name's. phases: times only these
    (``record.PHASES``); empty: all. advance: is called with the share that is done and the seconds that remain. A time
    limit is divided among the cases; those for which it leaves too little are left out, and the record lists them.
    After an interrupt (Ctrl-C) the record has ``finished`` False. Raises GpuBusy if another benchmark holds the GPU.
    """
    run = _Bench(specs, list(presets.values()), options, restarts, tuple(phases), advance)
    with run.running():
        for preset in run.presets:
            run.time(preset)
    return run.record


class _Bench(Run[Record]):
    """The state of one run."""

    def __init__(
        self,
        specs: Mapping[str, WorkerSpec],
        presets: list[Preset],
        options: Options,
        restarts: int,
        phases: tuple[str, ...],
        advance: Advance,
    ) -> None:
        self.specs, self.presets, self.restarts, self.advance = specs, presets, restarts, advance
        self.plans = {preset.name: case_plans(preset, phases) for preset in presets}
        self.done, self.planned = 0, restarts * sum(map(len, self.plans.values()))  # cases of all restarts
        self.starts: dict[tuple[str, int], float] = {}  # seconds of each
        common = fields(
            presets,
            ", ".join(sorted({spec.device for spec in specs.values()})),
            options,
            name=NAME,
            restarts=restarts,
            phases=list(phases) or "all",
            validity=ratios.RULES,
            interval="95 %, Student's t over the restarts' median log ratios",
            conformance="not required" if options.results_dir is None else f"exit code 0 in {options.results_dir}",
        )
        super().__init__(Record(**common), options)

    def time(self, preset: Preset) -> None:
        """All restarts of a preset. A backend that is lost in one is not in the next."""
        for number in range(self.restarts):
            lost = {one.backend for one in self.record.excluded if one.preset == preset.name and not one.phase}
            specs = {name: spec for name, spec in self.specs.items() if name not in lost}
            began, plans = self.elapsed, self.plans[preset.name]
            if not plans or self._time_is_up(number):
                self.planned -= len(plans) * (self.restarts - number)
                return
            with self.restart(preset, number, specs, plans) as restart:
                self.starts[preset.name, number] = self.elapsed - began
                self.record.once += [Once(preset.name, name, number, *once) for name, once in restart.once.items()]
                for plan in list(plans) if restart.admitted else ():
                    self._case(restart, plan)
                restart.conclude(partial(self._afterwards, restart))

    def _case(self, restart: Restart, plan: CasePlan) -> None:
        """One case, again without a backend that is lost in it."""
        limited, first = self.options.time_limit is not None, restart.number == 0
        runs = max((one.runs for one in restart.preset.published), default=1) if plan.new and not limited else 1
        share = self.case_seconds()
        while arms := restart.arms(plan):
            least = -(-runs // self.restarts)  # as many generations as were published
            try:
                made = restart.time(plan, arms, least, *([share] if limited and first else []))
            except BackendLost as lost:
                restart.lose(lost.backend if lost.backend != MACHINE else restart.admitted[0], lost.why)
                continue
            if made is None:
                self._leave_out(restart.preset, plan, share)
            break
        self.done += 1
        self.advance(self.done / max(1, self.planned), self.elapsed / self.done * (self.planned - self.done))

    def _leave_out(self, preset: Preset, plan: CasePlan, share: float) -> None:
        why = f"the time limit leaves {share:.2g} s a restart, which is too little"
        self.record.excluded.append(Excluded("", preset.name, why, str(plan)))
        self.options.say(f"{preset.name}: left out: {plan}: {why}")
        self.plans[preset.name].remove(plan)
        self.planned -= self.restarts - 1

    def case_seconds(self) -> float:
        if self.options.time_limit is None:
            return self.options.seconds_per_case
        to_come = self.restarts * len(self.presets) - len(self.starts)
        left = self.options.time_limit - self.elapsed - self._start_seconds() * to_come
        return max(MIN_SECONDS, left / max(1, self.planned - self.done))

    def _time_is_up(self, number: int) -> bool:
        """Whether a further restart would exceed the time limit; two are made in any case, without which no ratio is
        valid."""
        limit = self.options.time_limit
        return limit is not None and number >= 2 and self.elapsed + self._start_seconds() > limit

    def _start_seconds(self) -> float:
        """Seconds of a further start. The first one of a preset exports and compiles, and caches that; until there is
        another, what it took besides counts."""
        later = [seconds for (_, number), seconds in self.starts.items() if number]
        if later:
            return max(later)
        once = [one.build + sum(one.compile.values()) for one in self.record.once]
        return max(0.0, sum(self.starts.values()) - sum(once)) / max(1, len(self.starts))

    # --- backends that are lost ---
    def lose(self, preset: Preset, name: str, why: str) -> None:
        """Excludes a backend and takes out what was measured of it on this preset."""
        self.record.excluded.append(Excluded(name, preset.name, why))
        self.options.say(f"{preset.name}: no time for {name}: {why}")
        without(self.record, name, preset.name)

    def machine_changed(self, preset: Preset) -> None:
        timed = {arm.backend for case in self.record.cases if case.preset == preset.name for arm in case.arms}
        for name in sorted(timed - {MACHINE}):
            self.lose(preset, name, "the machine changed during the run")

    # --- after all wall times of a restart ---
    def _afterwards(self, restart: Restart, name: str) -> None:
        """Bytes of the caches, in the first restart, and on a GPU the device's own times."""
        if restart.number == 0:
            self._memory(restart, name)
        if restart.clients[name].spec.device == "cuda":
            self._device_times(restart, name)

    def _device_times(self, restart: Restart, name: str) -> None:
        """Measured beside the wall times of this restart's first rounds that count."""
        default = default_mhz(self.record.machine)
        for index, case in enumerate(self.record.cases):
            for arm, one in enumerate(case.arms):
                mine = [
                    at
                    for at, block in enumerate(self.record.rounds)
                    if (block.case, block.restart, block.arm) == (index, restart.number, arm) and fast(block, default)
                ][:DEVICE_BLOCKS]
                if one.backend != name or case.preset != restart.preset.name or case.new or not mine:
                    continue
                depth, steps, batch = case.depth, case.steps, case.batch
                found = restart.client.device(restart.preset, one, depth, steps, len(mine), batch=batch)
                for at, ns in zip(mine, found, strict=True):
                    self.record.rounds[at] = msgspec.structs.replace(self.record.rounds[at], device_ns=ns)

    def _memory(self, restart: Restart, name: str) -> None:
        preset, depth = restart.preset, restart.preset.depths[-1]
        for batch in preset.batches:
            found = restart.client.memory(preset, name, depth, batch)
            analytic = cache_bytes(preset.config, depth) * batch
            self.record.memory.append(Memory(preset.name, name, depth, batch, analytic, **found))

    # --- the record ---
    def keep(self, rounds: list[Round], tokens: list[Tokens]) -> None:
        super().keep(rounds, tokens)
        self.record.tokens += tokens

    def write(self) -> None:
        self.record.seconds = round(self.elapsed, 3)
        summarise(self.record)
        write(self.record, self.options.out)
