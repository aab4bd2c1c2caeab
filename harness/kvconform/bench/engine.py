"""The engine of the bench and of the gate: it starts workers, admits backends and times cases in rounds.

All workers of a preset are alive at once, and all are restarted several times: the restart is the unit
of replication. In each round every arm of a case runs one block, in a random order, so that other load on the machine
affects all alike; ratios are paired within rounds. A worker times its own calls and sends numbers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec
import numpy as np

from kvconform.bench import eligibility, protocol
from kvconform.bench.analysis.intervals import times
from kvconform.bench.analysis.ratios import half_width
from kvconform.bench.client import WORKER, TimingClient
from kvconform.bench.eligibility import ExpectedLogits, Ineligible, by_definition
from kvconform.bench.presets import CasePlan, Preset, single_steps
from kvconform.bench.record import CEILINGS, MACHINE, Arm, Case, Round, TimedRun, Tokens
from kvconform.bench.worker.gpu import default_mhz, fast, held
from kvconform.errors import BackendLost, KvconformError
from kvconform.host import load_average, machine
from kvconform.worker.client import BUILD_TIMEOUT, WorkerClient, WorkerSpec
from kvconform_specs import SUITE_VERSION

LONG = 4 * 3600.0
"""Seconds that one block may take: a generation without a cache is one."""
RECOMPUTE = {True: "uncached forward", False: "prefill of all tokens"}

Say = Callable[[str], None]
R = TypeVar("R", bound=TimedRun)
definition = lru_cache(maxsize=4)(by_definition)


@dataclass(frozen=True)
class Options:
    """How a run times. ``out``: the file of the record. ``seconds_per_case``: wall seconds of one case in one restart,
    after its warm-up. ``results_dir``: the folder of conformance results; None requires none, and then only the outputs
    on the timed inputs are judged. ``time_limit``: seconds of the whole run; None: no limit. ``threads``: of each
    worker. ``say`` is called with one line for each thing done."""

    out: Path
    seconds_per_case: float = protocol.SECONDS_PER_CASE
    results_dir: Path | None = None
    time_limit: float | None = None
    seed: int = 0
    threads: int = 1
    say: Say = lambda line: None


class TimeUp(Exception):
    """The seconds of the whole run are used."""


def fields(presets: Sequence[Preset], device: str, options: Options, **more: Any) -> dict[str, Any]:
    """What a record has before anything is timed. ``more``: further parts of its protocol."""
    described = protocol.described(presets, options.seconds_per_case, options.seed, options.threads, options.time_limit)
    return {
        "suite": SUITE_VERSION,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device,
        "machine": machine(),
        "software": {},
        "load": [load_average()],
        "presets": {preset.name: preset.to_json() for preset in presets},
        "protocol": {**described, **more},
    }


class Run(Generic[R]):
    """One run and its growing record. Subclasses decide what follows when a backend is lost."""

    def __init__(self, record: R, options: Options) -> None:
        self.record, self.options, self.began = record, options, time.perf_counter()

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self.began

    @contextmanager
    def running(self) -> Iterator[None]:
        """Holds the GPU if one is timed, and writes the record in the end. An interrupt (Ctrl-C) ends the run and
        keeps what was measured. Raises GpuBusy if another benchmark holds the GPU."""
        with held("cuda" if "cuda" in self.record.device else "cpu") as found:
            self.record.machine |= found
            try:
                yield
                self.record.finished = True
            except TimeUp:
                self.options.say(f"the {self.options.time_limit:g} s are used: what is not decided is inconclusive")
            except KeyboardInterrupt:
                self.options.say("interrupted: what was measured is kept")
            finally:
                self.write()

    @contextmanager
    def restart(
        self,
        preset: Preset,
        number: int,
        specs: Mapping[str, WorkerSpec],
        plans: Sequence[CasePlan],
        check: bool = True,
    ) -> Iterator[Restart]:
        """All workers of a preset, admitted, for the length of the ``with`` block."""
        try:
            with ExitStack() as stack:
                restart = Restart(self, preset, number, stack)
                restart.start(specs, plans, check)
                yield restart
        finally:
            self.record.load.append(load_average())
        if not machine().items() <= self.record.machine.items():  # the record's may have a GPU as well
            self.machine_changed(preset)
        self.write()

    def lose(self, preset: Preset, name: str, why: str) -> None:
        """A backend cannot be timed on a preset."""
        raise NotImplementedError

    def machine_changed(self, preset: Preset) -> None:
        """The machine is not the one that the run began on."""
        raise NotImplementedError

    def case_seconds(self) -> float:
        """Seconds of the next case in this restart, after its warm-up."""
        return self.options.seconds_per_case

    def keep(self, rounds: list[Round], tokens: list[Tokens]) -> None:
        """Adds measured blocks to the record."""
        self.record.rounds += rounds

    def write(self) -> None:
        """Writes the record and what follows from it."""
        raise NotImplementedError


class Restart:
    """One start of all workers of a preset: the admitted backends, and the rounds of each case."""

    def __init__(self, run: Run[Any], preset: Preset, number: int, stack: ExitStack) -> None:
        self.run, self.preset, self.number, self.stack = run, preset, number, stack
        self.options, self.record = run.options, run.record
        self.clients: dict[str, WorkerClient] = {}  # the reference first
        self.client = TimingClient(self.clients, self.options.seed, self.record.protocol["input_digest"])
        self.admitted: list[str] = []
        self.loaded: dict[str, float] = {}  # seconds from starting a worker to its first answer
        self.once: dict[str, tuple[float, float, dict[str, float]]] = {}  # and of building it, and of its first calls

    # --- admission ---
    def start(self, specs: Mapping[str, WorkerSpec], plans: Sequence[CasePlan], check: bool) -> None:
        """Starts, builds and admits backends, in an order drawn by the seed; ``check``: judges their outputs.

        Of equal workers, those that came first were 2 to 5 % slower on weights of 100 MB (depending on where their
        pages lie), and the reference must not always be the first.
        """
        order = self.rng(0).permutation(len(specs))
        drawn = [list(specs)[int(i)] for i in order]
        started = {name: client for name in drawn if (client := self._tried(name, self._start, specs[name]))}
        self.clients.update({name: started[name] for name in specs if name in started})
        with ThreadPoolExecutor(1) as beside:  # the definition is computed while workers build and compile
            expected = beside.submit(definition, self.preset.config, self.options.seed) if check else None
            built = [name for name in started if self._tried(name, self._build, plans)]
            self.admitted = [
                name for name in self.clients if name in built and self._tried(name, self._admit, expected)
            ]

    def _tried(self, name: str, step: Callable[..., Any], *args: Any) -> Any:
        """What a step of the admission returns; None if the backend is lost in it."""
        try:
            return step(name, *args)
        except KvconformError as error:
            self.lose(name, str(error))
            return None

    def _start(self, name: str, spec: WorkerSpec) -> WorkerClient:
        began, threads, results = time.perf_counter(), self.options.threads, self.options.results_dir
        artefacts = {"KVCONFORM_ARTEFACTS": str((self.options.out.parent / "artefacts").resolve())}
        spec = replace(
            spec,
            address=self.preset.addresses.get(name, spec.address),
            environment={**artefacts, **spec.environment, **protocol.variables(threads)},
            cpus=protocol.processors(threads, self.number),
            module=WORKER,
        )
        why = "" if results is None else eligibility.conformance(name, spec, results)
        if why:
            raise Ineligible(why)
        try:
            client = self.stack.enter_context(WorkerClient(spec))
        except KeyError as missing:
            raise Ineligible(f"its worker is of another version: its description lacks {missing}") from missing
        same_file = name not in self.preset.addresses
        if results is not None:
            why = eligibility.outdated(name, results, client.environment, same_file=same_file)
        if why:
            raise Ineligible(why)
        self.loaded[name] = round(time.perf_counter() - began, 3)
        notes = {
            "address": spec.address,
            "device": spec.device,
            "interpreter": spec.python,
            "environment": client.environment,
            "variables": spec.environment,
            "compared": {},
            "runtime_info": {},
        }
        self.record.software.setdefault(name, notes)
        return client

    def _build(self, name: str, plans: Sequence[CasePlan]) -> bool:
        """Builds the backend and makes its first calls, which compile."""
        began = time.perf_counter()
        eligibility.build(self.clients[name], self.preset)
        built, first = round(time.perf_counter() - began, 3), {}
        for phase, n, batch in single_steps(plans):
            if self._offers(name, phase):
                called = time.perf_counter()
                self.client.blocks(self.preset, Arm(name, phase), n, 1, 1, batch=batch, timeout=BUILD_TIMEOUT)
                rows = f" x {batch}" if batch > 1 else ""
                first[f"{phase}({n}){rows}"] = round(time.perf_counter() - called, 4)
        self.once[name] = self.loaded[name], built, first
        self.options.say(f"{self.preset.name}: {name} is built and warm after {time.perf_counter() - began:.1f} s")
        return True

    def _admit(self, name: str, expected: Future[ExpectedLogits] | None) -> bool:
        """Judges the outputs on the timed inputs and what really ran."""
        client, notes = self.clients[name], self.record.software[name]
        if expected is not None:
            compared = eligibility.check_outputs(client, self.preset, self.options.seed, expected.result)
            notes["compared"][self.preset.name] = compared
        self._check_runtime(name)
        notes["recompute"] = RECOMPUTE[client.claims.can("uncached_forward")]
        return True

    def _check_runtime(self, name: str) -> None:
        found = eligibility.check_runtime(self.clients[name], self.preset, self.options.threads)
        self.record.software[name]["runtime_info"][self.preset.name] = found

    def conclude(self, after: Callable[[str], None] = lambda name: None) -> None:
        """Checks once more what really ran. ``after`` measures what must follow all wall times."""
        for name in list(self.admitted):
            self._tried(name, after)
            self._tried(name, self._check_runtime) if name in self.admitted else None

    def lose(self, name: str, why: str) -> None:
        if name in self.admitted:
            self.admitted.remove(name)
        self.run.lose(self.preset, name, why)

    # --- rounds ---
    def rng(self, place: int) -> np.random.Generator:
        """``place``: 0 for the order of starts, then one for each case."""
        return np.random.default_rng((self.options.seed, self.number, place))

    def _offers(self, name: str, phase: str) -> bool:
        """Whether a backend can do a phase: some cannot project the last position alone."""
        return not phase.endswith("-last") or self.clients[name].claims.can("last_only")

    def arms(self, plan: CasePlan) -> list[Arm]:
        """The arms of a case among the admitted; the processor's ceilings only if steps are the processor's, too.
        Empty if a phase that others are compared with is missing."""
        designs = {one.arm for one in self.preset.published}
        every = not (plan.designs_only and designs)
        names = [name for i, name in enumerate(self.admitted) if every or i == 0 or name in designs]
        found, phases = [], [phase for phase in plan.phases if phase not in CEILINGS]
        for phase in phases:
            found += [Arm(name, phase) for name in names if self._offers(name, phase)]
        if self.record.device == "cpu":
            found += [Arm(MACHINE, phase) for phase in plan.phases if phase in CEILINGS]
        return found if len({arm.phase for arm in found}) >= min(2, len(phases)) else []

    def time(self, plan: CasePlan, arms: list[Arm], least: int = 1, most: float = math.inf) -> int | None:
        """Rounds of one case, until its intervals are narrow or its seconds are used: its place in the record. None,
        and no case, if ``ROUNDS_WANTED`` rounds would take longer than ``most`` seconds.

        ``least``: rounds that are made however long they take. Raises BackendLost, without any round of the case.
        """
        for name in dict.fromkeys(arm.backend for arm in arms if arm.backend != MACHINE):
            try:
                eligibility.build(self.clients[name], self.preset)  # builds again only after a worker died
            except Ineligible as error:
                raise BackendLost(name, str(error)) from error
        seconds, slowest = self.run.case_seconds(), 0.0
        if not plan.new:
            limit = seconds * protocol.WARM_SHARE / len(arms)
            slowest = max(self.client.warm(self.preset, arm, plan.depth, limit, plan.batch) for arm in arms)
        index = self._place(plan, arms, slowest)
        rounds: list[Round] = []
        tokens: list[Tokens] = []
        try:
            if self._rounds(index, seconds, least, most, rounds, tokens):
                return index
            rounds.clear()
            tokens.clear()
            del self.record.cases[index]
            return None
        except BackendLost:
            rounds.clear()
            tokens.clear()
            raise
        finally:
            self.run.keep(rounds, tokens)

    def _rounds(
        self, index: int, seconds: float, least: int, most: float, rounds: list[Round], tokens: list[Tokens]
    ) -> bool:
        case, order, default = self.record.cases[index], self.rng(1 + index), default_mhz(self.record.machine)
        counted: list[Round] = []  # without those of a slow clock
        began, number, count = time.perf_counter(), 0, len(case.arms)
        wanted, enough = protocol.ROUNDS_WANTED * count, protocol.ENOUGH_ROUNDS * count
        while True:
            spent = time.perf_counter() - began
            if number == 1 and spent * protocol.ROUNDS_WANTED > most:
                return False
            goes_on = len(counted) < wanted and spent < protocol.OVERTIME * seconds
            if number >= least and spent >= seconds and not goes_on:
                break
            for place, arm in enumerate(int(i) for i in order.permutation(count)):
                block, came = self._block(case, case.arms[arm])
                timed = Round(index, self.number, number, place, arm, *block)
                rounds.append(timed)
                counted += [timed] if fast(timed, default) else []
                tokens += [Tokens(index, self.number, number, arm, came)] if came else []
            number += 1
            sorted_now = len(counted) >= enough and number % 5 == 0  # a half-width sorts all rounds
            if sorted_now and half_width(case, times(case, counted)) <= protocol.TARGET_HALF_WIDTH:
                break
        self.options.say(self._line(case, counted, number))
        return True

    def _block(self, case: Case, arm: Arm) -> tuple[tuple[int, ...], list[int]]:
        """The fields of a ``Round`` from ``ns`` on, and when the tokens of a generation came."""
        batch, new = case.batch, case.new
        (block,) = self.client.blocks(self.preset, arm, case.depth, case.steps, 1, batch=batch, new=new, timeout=LONG)
        return (block.ns, block.cpu_ns, block.nivcsw, 0, block.sm_mhz, block.throttle), list(block.tokens)

    def _place(self, plan: CasePlan, arms: list[Arm], slowest: float) -> int:
        """The place of the case in the record. The first restart that times it decides on its steps."""
        steps = 1
        if not plan.new:
            steps = max(1, min(int(protocol.BLOCK_NS // slowest), eligibility.room(self.preset.config, plan.depth)))
        made = Case(self.preset.name, plan.depth, plan.batch, arms, steps, plan.new)
        for index, case in enumerate(self.record.cases):
            if msgspec.structs.replace(case, steps=steps) == made:
                if case.steps == 0:
                    self.record.cases[index] = made
                return index
        self.record.cases.append(made)
        return len(self.record.cases) - 1

    def _line(self, case: Case, counted: list[Round], number: int) -> str:
        width = half_width(case, times(case, counted))
        phases = " and ".join(dict.fromkeys(arm.phase for arm in case.arms if arm.backend != MACHINE))
        half = f"interval ± {width:.1%}" if width < math.inf else "too few rounds for an interval"
        rows = f" x {case.batch}" if case.batch > 1 else ""
        return (
            f"{self.preset.name}: restart {self.number + 1}: {phases} at {case.depth}{rows}: {number} rounds of "
            f"{len(case.arms)} arms, k = {case.steps}, {half}"
        )
