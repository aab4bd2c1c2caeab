"""One start of all workers of a preset: who is admitted, and the rounds of each case."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import lru_cache
from types import TracebackType
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from kvconform.bench.analysis.intervals import times
from kvconform.bench.analysis.ratios import half_width
from kvconform.bench.client import TimingClient, config_of
from kvconform.bench.eligibility import Truth, conformance, misfit, outdated, own_truth, parity, room, truth, unable
from kvconform.bench.plans import Plan, plans, steps
from kvconform.bench.presets import Preset
from kvconform.bench.protocol import (
    BLOCK_NS,
    DEVICE_BLOCKS,
    ENOUGH_ROUNDS,
    OVERTIME,
    ROUNDS_WANTED,
    TARGET_HALF_WIDTH,
    WARM_SHARE,
    processors,
    variables,
)
from kvconform.bench.record import CEILINGS, MACHINE, Arm, Case, Memory, Once, Round, Tokens
from kvconform.bench.worker.gpu import default_mhz, fast
from kvconform.errors import BackendLost, BackendUnavailable, WorkerDied
from kvconform.worker.client import BUILD_TIMEOUT, WorkerClient, WorkerSpec
from kvconform_specs.config import ITEMSIZE

if TYPE_CHECKING:
    from kvconform.bench.runner import _Run

LONG = 4 * 3600.0
"""Seconds that one block may take: a generation without a cache is one."""

known_truth = lru_cache(maxsize=4)(truth)


class Restart:
    """Workers that live from ``start`` to the end of the ``with`` block."""

    def __init__(self, run: _Run, preset: Preset, number: int) -> None:
        self.run, self.record, self.preset, self.number = run, run.record, preset, number
        self.clients: dict[str, WorkerClient] = {}  # the reference first
        self.client = TimingClient(self.clients, run.seed, run.record.protocol["input_digest"])
        self.admitted: list[str] = []
        self.loaded: dict[str, float] = {}  # seconds from starting a worker until it answered
        self.stack = ExitStack()

    def __enter__(self) -> Restart:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, raised: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stack.close()

    # --- who is admitted ---
    def start(self, launches: Mapping[str, WorkerSpec]) -> None:
        """Starts, builds and admits, in an order drawn by the seed.

        Of equal workers, those that came first were 2 to 5 % slower on weights of 100 MB (where their pages lie), and
        the reference must not always be the first.
        """
        order = np.random.default_rng((self.run.seed, self.number)).permutation(len(launches))
        drawn = [list(launches)[int(i)] for i in order]
        started = {name: client for name in drawn if (client := self._started(name, launches[name])) is not None}
        self.clients.update({name: started[name] for name in launches if name in started})
        with ThreadPoolExecutor(1) as beside:  # the definition is computed while workers build and compile
            known = beside.submit(known_truth, self.preset.config, self.run.seed)
            built = {name for name in started if self._build(name)}
            self.admitted = [name for name in self.clients if name in built and self._admit(name, known)]

    def _started(self, name: str, spec: WorkerSpec) -> WorkerClient | None:
        run, began = self.run, time.perf_counter()
        artefacts = {"KVCONFORM_ARTEFACTS": str((run.out.parent / "artefacts").resolve())}
        spec = replace(
            spec,
            address=self.preset.addresses.get(name, spec.address),
            environment={**artefacts, **spec.environment, **variables(run.threads)},
            cpus=processors(run.threads, self.number),
        )
        why = "" if run.results_dir is None else conformance(name, spec, run.results_dir)
        if not why:
            try:
                client = self.stack.enter_context(WorkerClient(spec))
            except BackendUnavailable as sentence:
                why = str(sentence)
            else:
                why = (
                    ""
                    if run.results_dir is None
                    else outdated(
                        name, run.results_dir, client.environment, same_file=name not in self.preset.addresses
                    )
                )
        if why:
            run.exclude(name, self.preset, why)
            return None
        self.loaded[name] = round(time.perf_counter() - began, 3)
        self.record.software.setdefault(
            name,
            {
                "address": spec.address,
                "device": spec.device,
                "interpreter": spec.python,
                "environment": client.environment,
                "variables": spec.environment,
                "compared": {},
                "runtime_info": {},
            },
        )
        return client

    def _build(self, name: str) -> bool:
        """Builds the backend and makes its first calls, which compile. Whether that went well."""
        client, preset = self.clients[name], self.preset
        began = time.perf_counter()
        try:
            why = unable(client.claims, preset) or client.build(config_of(client, preset))
            built = round(time.perf_counter() - began, 3)
            if not why:
                first = self._first_calls(name)
                self.record.once.append(Once(preset.name, name, self.number, self.loaded[name], built, first))
        except (WorkerDied, BackendUnavailable, BackendLost) as words:
            why = str(words)
        if why:
            self.run.expel(name, preset, why)
            return False
        self.run.tell(f"{preset.name}: {name} is built and warm after {time.perf_counter() - began:.1f} s")
        return True

    def _first_calls(self, name: str) -> dict[str, float]:
        """Seconds until each arm's first block was done: preparation, compilation and first calls together."""
        preset, seconds = self.preset, {}
        for phase, n, batch in steps(plans(preset, self.run.phases)):
            if self._offered(self.clients[name], (phase,)):
                began = time.perf_counter()
                self.client.blocks(preset, Arm(name, phase), n, 1, 1, batch=batch, timeout=BUILD_TIMEOUT)
                rows = f" x {batch}" if batch > 1 else ""
                seconds[f"{phase}({n}){rows}"] = round(time.perf_counter() - began, 4)
        return seconds

    @staticmethod
    def _offered(client: WorkerClient, phases: tuple[str, ...]) -> list[str]:
        """The phases that a backend can do: some project the last position alone, some cannot."""
        return [phase for phase in phases if not phase.endswith("-last") or client.claims.can("last_only")]

    def _admit(self, name: str, known: Future[Truth]) -> bool:
        """Whether the backend is right on the timed inputs, and is what its name says."""
        client, preset, notes = self.clients[name], self.preset, self.record.software[name]
        config = config_of(client, preset)
        try:
            by = (
                known.result()
                if client.reference_forward is None
                else own_truth(client.reference_forward(config), config, self.run.seed)
            )
            why, compared = parity(client, preset, config, self.run.seed, by)
            why = why or self._runtime_info(name)
        except (WorkerDied, BackendUnavailable) as words:
            why, compared = str(words), 0
        if why:
            self.run.expel(name, preset, why)
            return False
        notes["compared"][preset.name] = compared
        notes["recompute"] = "full" if client.claims.can("uncached_forward") else "prefill of all tokens"
        return True

    def _runtime_info(self, name: str) -> str:
        """Keeps what really ran. Returns why that must have no time, or nothing."""
        try:
            seen = self.clients[name].runtime_info(config_of(self.clients[name], self.preset))
        except (WorkerDied, BackendUnavailable) as words:
            return f"died when it was asked what really ran: {words}"
        self.record.software[name]["runtime_info"][self.preset.name] = seen
        return misfit(seen, self.run.threads, self.clients[name].spec.device)

    # --- the rounds ---
    def cell(self, plan: Plan) -> None:
        """One case, begun anew without a backend that is lost."""
        while self.admitted:
            plan = self._here(plan)
            arms = self._arms(plan)
            if len({arm.phase for arm in arms}) < min(2, len(plan.phases)):
                return
            rounds, tokens = len(self.record.rounds), len(self.record.tokens)
            try:
                self._case(plan, arms)
            except BackendLost as lost:
                del self.record.rounds[rounds:], self.record.tokens[tokens:]
                self._lose(lost.backend if lost.backend != MACHINE else self.admitted[0], lost.why)
            else:
                return

    def _here(self, plan: Plan) -> Plan:
        """Without the ceilings where they would be another device's than the steps'."""
        if self.record.device == "cpu":
            return plan
        return replace(plan, phases=tuple(phase for phase in plan.phases if phase not in CEILINGS))

    def _arms(self, plan: Plan) -> list[Arm]:
        designs = {one.arm for one in self.preset.published}
        names = [n for i, n in enumerate(self.admitted) if not plan.few or not designs or i == 0 or n in designs]
        arms = []
        for phase in plan.phases:
            if phase in CEILINGS:
                arms.append(Arm(MACHINE, phase))
            else:
                arms += [Arm(name, phase) for name in names if self._offered(self.clients[name], (phase,))]
        return arms

    def _lose(self, name: str, why: str) -> None:
        self.admitted.remove(name)
        self.run.expel(name, self.preset, why)

    def _case(self, plan: Plan, arms: list[Arm]) -> None:
        began, seconds, preset = time.perf_counter(), self.run.case_seconds(), self.preset
        slowest = 0.0
        if not plan.new:
            limit = seconds * WARM_SHARE / len(arms)
            slowest = max(self.client.warm(preset, arm, plan.depth, limit, plan.batch) for arm in arms)
            if self.run.seconds is None:  # a deep cache takes long to fill; a budget counts that, a case's own time not
                began = time.perf_counter()
        index = self._place(plan, arms, slowest)
        case = self.record.cases[index]
        counted: list[Round] = []  # without those of a slow clock
        default = default_mhz(self.record.machine)
        order = np.random.default_rng((self.run.seed, self.number, index))
        runs = max((one.runs for one in preset.published), default=1) if plan.new and self.run.seconds is None else 1
        number, least = 0, -(-runs // self.run.restarts)  # as many generations as were published
        while (
            (spent := time.perf_counter() - began) < seconds
            or (len(counted) < ROUNDS_WANTED * len(arms) and spent < OVERTIME * seconds)
            or number < least
        ):
            for place, arm in enumerate(int(i) for i in order.permutation(len(arms))):
                (block,) = self.client.blocks(
                    preset, arms[arm], plan.depth, case.steps, 1, batch=plan.batch, new=plan.new, timeout=LONG
                )
                timed = Round(
                    index,
                    self.number,
                    number,
                    place,
                    arm,
                    block.ns,
                    block.cpu_ns,
                    block.nivcsw,
                    sm_mhz=block.sm_mhz,
                    throttle=block.throttle,
                )
                self.record.rounds.append(timed)
                counted += [timed] if fast(timed, default) else []
                if block.tokens:
                    self.record.tokens.append(Tokens(index, self.number, number, arm, list(block.tokens)))
            number += 1
            enough = len(counted) >= ENOUGH_ROUNDS * len(arms) and number % 5 == 0
            if enough and half_width(case, times(case, counted)) <= TARGET_HALF_WIDTH:
                break
        self.run.tell(self._told(case, counted, number))

    def _place(self, plan: Plan, arms: list[Arm], slowest: float) -> int:
        """Where the case is in the record: the restart before has made it, or it is new."""
        for index, case in enumerate(self.record.cases):
            same = (case.preset, case.depth, case.batch, case.new) == (
                self.preset.name,
                plan.depth,
                plan.batch,
                plan.new,
            )
            if same and case.arms == arms:
                return index
        steps = 1
        if not plan.new:
            steps = max(1, min(int(BLOCK_NS // slowest), room(self.preset.config, plan.depth)))
        self.record.cases.append(Case(self.preset.name, plan.depth, plan.batch, arms, steps, plan.new))
        return len(self.record.cases) - 1

    def _told(self, case: Case, mine: list[Round], number: int) -> str:
        width = half_width(case, times(case, mine))
        phases = " and ".join(dict.fromkeys(arm.phase for arm in case.arms if arm.backend != MACHINE))
        half = f"within it ± {width:.1%}" if width < math.inf else "too few rounds for an interval within it"
        rows = f" x {case.batch}" if case.batch > 1 else ""
        return (
            f"{self.preset.name}: restart {self.number + 1}: {phases} at {case.depth}{rows}: {number} rounds of "
            f"{len(case.arms)} arms, k = {case.steps}, {half}"
        )

    # --- afterwards ---
    def conclude(self) -> None:
        """What the caches take, in the first restart; and what really ran, asked once more."""
        for name in list(self.admitted):
            try:
                if self.number == 0:
                    self._memory(name)
                if self.clients[name].spec.device == "cuda":
                    self._device_times(name)
                why = self._runtime_info(name)
            except BackendLost as lost:
                why = lost.why
            if why:
                self._lose(name, why)

    def _device_times(self, name: str) -> None:
        """Put beside the wall times of this restart's first rounds that count, after all of these."""
        default = default_mhz(self.record.machine)
        for index, case in enumerate(self.record.cases):
            for arm, one in enumerate(case.arms):
                mine = [
                    at
                    for at, block in enumerate(self.record.rounds)
                    if (block.case, block.restart, block.arm) == (index, self.number, arm) and fast(block, default)
                ][:DEVICE_BLOCKS]
                if one.backend != name or case.preset != self.preset.name or case.new or not mine:
                    continue
                told = self.client.device(self.preset, one, case.depth, case.steps, len(mine), batch=case.batch)
                for at, ns in zip(mine, told, strict=True):
                    self.record.rounds[at] = msgspec.structs.replace(self.record.rounds[at], device_ns=ns)

    def _memory(self, name: str) -> None:
        c, depth = self.preset.config, self.preset.depths[-1]
        for batch in self.preset.batches:
            told = self.client.memory(self.preset, name, depth, batch)
            analytic = 2 * c.layers * c.kv_heads * depth * c.head_dim * ITEMSIZE[c.dtype] * batch
            self.record.memory.append(Memory(self.preset.name, name, depth, batch, analytic, **told))
