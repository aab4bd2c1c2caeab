"""The gate on wall time, protocol ``pingpong-v1``: one backend in two environments, both alive as workers.

Each restart starts both anew, in an order drawn by the seed, and times every case in rounds as ``pair-v1`` does: both
run a block of the same number of steps, in an order drawn anew. What is concluded from the restarts, and how often
wrongly, is in ``signs``. Nothing is timed that is not right, or not the same work on the same machine.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from kvconform.bench.client import TimingClient, config_of
from kvconform.bench.eligibility import Truth, misfit, own_truth, parity, room, truth, unable
from kvconform.bench.gate.environments import Environment
from kvconform.bench.gate.record import BASE, HEAD, SIDES, GateBlock, GateCase, GateRecord, Lasting, Side, Trial, trial
from kvconform.bench.gate.sign_flip import LEVEL, PROTOCOL, RATE, RESTARTS, SMALLEST, play
from kvconform.bench.presets import Preset
from kvconform.bench.protocol import (
    BLOCK_NS,
    ENOUGH_ROUNDS,
    OVERTIME,
    ROUNDS_WANTED,
    TARGET_HALF_WIDTH,
    WARM_SHARE,
    processors,
    variables,
)
from kvconform.bench.record import Arm
from kvconform.bench.worker.gpu import classes, default_mhz, held, kept
from kvconform.bench.worker.timer import digest, tokens
from kvconform.errors import BackendLost, BackendUnavailable, WorkerDied
from kvconform.host import load_average, machine
from kvconform.worker.client import BUILD_TIMEOUT, WorkerClient, WorkerSpec
from kvconform_specs import SUITE_VERSION

Tell = Callable[[str], None]
SECONDS_PER_CASE = 1.0
"""Of one case in one restart, warm-up included: the spread between restarts is the larger part of the error."""


class _TimeUp(Exception):
    """The seconds of the whole run are used."""


def gate(
    base: WorkerSpec,
    head: WorkerSpec,
    presets: Mapping[str, Preset],
    backend: str,
    out: Path,
    *,
    seconds_per_case: float = SECONDS_PER_CASE,
    seed: int = 0,
    threads: int = 1,
    tell: Tell = lambda line: None,
    seconds: float | None = None,
    environments: Mapping[str, Environment] = {},
) -> GateRecord:
    """Compares decode at each depth and prefill at each prompt; the file ``out`` grows with each restart.

    ``backend``: its name in the record. ``seconds``: of the whole run, None for no limit; what is not decided then is
    inconclusive, and so after an interrupt (Ctrl-C). ``environments``: what ``base`` and ``head`` were made from, for
    the record. ``tell`` is given one line for each thing done. Raises ``device.GpuBusy`` where the GPU is being timed.
    """
    run = _Gate({BASE: base, HEAD: head}, presets, backend, out, seconds_per_case, seed, threads, tell, seconds)
    for name, known in environments.items():
        run.record.sides[name] = Side(known.name, known.commit, known.python)
    with held(run.record.device) as told:
        run.record.machine |= told
        try:
            run.admit()
            blocked = {lasting.case for lasting in run.record.lasting}
            play([case for case in range(len(run.record.cases)) if case not in blocked], run.restart)
            run.record.finished = True
        except _TimeUp:
            tell(f"the {seconds:g} s are used: what is not decided is inconclusive")
        except KeyboardInterrupt:
            tell("interrupted: what was measured is kept")
        finally:
            run.record.load.append(load_average())
            run.write()
    return run.record


class _Gate:
    """The state of one run."""

    def __init__(
        self,
        launches: Mapping[str, WorkerSpec],
        presets: Mapping[str, Preset],
        backend: str,
        out: Path,
        seconds_per_case: float,
        seed: int,
        threads: int,
        tell: Tell,
        seconds: float | None,
    ) -> None:
        self.presets = {name: replace(preset, batches=(1,)) for name, preset in presets.items()}
        self.out, self.seed, self.threads, self.tell = out, seed, threads, tell
        self.per_case, self.limit, self.began = seconds_per_case, seconds, time.perf_counter()
        self.launches = {
            side: replace(
                spec,
                environment={
                    "KVCONFORM_ARTEFACTS": str((out.parent / "artefacts" / side).resolve()),
                    **spec.environment,
                    **variables(threads),
                },
            )
            for side, spec in launches.items()
        }
        self.digests = {name: digest(tokens(preset.config, seed)) for name, preset in presets.items()}
        self.record = GateRecord(
            suite=SUITE_VERSION,
            started=datetime.now(UTC).isoformat(timespec="seconds"),
            backend=backend,
            device=launches[HEAD].device,
            machine=machine(),
            presets={n: p.to_json() for n, p in self.presets.items()},
            protocol={
                "name": PROTOCOL,
                "restarts": RESTARTS,
                "level": LEVEL,
                "rate": RATE,
                "smallest": round(math.exp(SMALLEST), 9),
                "seconds_per_case": seconds_per_case,
                "seconds": seconds,
                "seed": seed,
                "threads": threads,
                "input_digest": self.digests,
                "stop_rule": f"{ENOUGH_ROUNDS} rounds and half-width <= {TARGET_HALF_WIDTH:.0%}, or the seconds of a case",
            },
            sides={side: Side(spec.python, "", spec.python) for side, spec in launches.items()},
            load=[load_average()],
            cases=[
                GateCase(name, phase, n)
                for name, preset in presets.items()
                for phase, sizes in (("decode", preset.depths), ("prefill", preset.prompts))
                for n in sizes
            ],
        )

    # --- before any time is taken ---
    def admit(self) -> None:
        """Starts both once for each preset, and says of which cases no time can be compared, and why."""
        for name, preset in self.presets.items():
            mine = [case for case, known in enumerate(self.record.cases) if known.preset == name]
            with ExitStack() as stack:
                try:
                    clients = self.started(preset, SIDES, 0, stack)
                    for side, client in clients.items():
                        known = self.record.sides[side]
                        self.record.sides[side] = Side(known.name, known.commit, known.python, client.environment)
                    self.right(preset, clients)
                except BackendLost as lost:
                    self.last(mine, lost)
                else:
                    self.tell(f"{name}: base and head are right on the timed inputs")

    def right(self, preset: Preset, clients: Mapping[str, WorkerClient]) -> None:
        """Raises BackendLost unless both run on one kind of machine, are right on the timed inputs, and are what their name
        says."""
        base, head = (clients[side].environment.get("platform", "").partition("-with-")[0] for side in SIDES)
        if base != head:
            raise BackendLost(HEAD, f"it runs on {head}, the base on {base}")
        defined: Truth | None = None
        runtime_infos: dict[str, dict[str, Any]] = {}
        for side, client in clients.items():
            config = config_of(client, preset)
            try:
                why = unable(client.claims, preset) or client.build(config)
                if not why and client.reference_forward is not None:
                    why, _ = parity(
                        client,
                        preset,
                        config,
                        self.seed,
                        own_truth(client.reference_forward(config), config, self.seed),
                    )
                elif not why:
                    defined = defined or truth(config, self.seed)
                    why, _ = parity(client, preset, config, self.seed, defined)
                seen = {} if why else client.runtime_info(config)
            except (WorkerDied, BackendUnavailable) as words:
                raise BackendLost(side, str(words)) from words
            why = why or misfit(seen, self.threads, client.spec.device)
            if why:
                raise BackendLost(side, why)
            runtime_infos[side] = seen
        mixed = classes(runtime_infos)
        if mixed:
            raise BackendLost(HEAD, mixed)

    # --- one restart ---
    def restart(self, stage: str, number: int, cases: Sequence[int]) -> dict[int, float]:
        """Starts both anew for each preset and times its cases: d of each that could be timed."""
        began = time.perf_counter()
        self.record.load.append(load_average())
        found: dict[int, float] = {}
        for name in dict.fromkeys(self.record.cases[case].preset for case in cases):
            self.in_time()
            mine = [case for case in cases if self.record.cases[case].preset == name]
            if not machine().items() <= self.record.machine.items():  # which may tell of a GPU as well
                self.last(mine, BackendLost(HEAD, "the machine is no longer the one that the run began on"))
                continue
            found |= self.start(stage, number, name, mine)
        self.write()
        spent = time.perf_counter() - began
        of, left = RESTARTS[stage], RESTARTS[stage] - number - 1
        self.tell(
            f"{stage} {number + 1}/{of}: {len(found)} of {len(cases)} cases in {spent:.1f} s, "
            f"about {left * spent:.0f} s to go"
        )
        return found

    def start(self, stage: str, number: int, name: str, cases: Sequence[int]) -> dict[int, float]:
        """One start of both workers, and the cases of one preset."""
        found: dict[int, float] = {}
        drawn = self.rng(stage, number, list(self.presets).index(name))
        order = [SIDES[i] for i in drawn.permutation(len(SIDES))]
        with ExitStack() as stack:
            try:
                clock = TimingClient(self.started(self.presets[name], order, number, stack), self.seed, self.digests)
            except BackendLost as lost:
                self.last(cases, lost)
                return found
            for case in cases:
                self.in_time()
                try:
                    found[case] = self.case(clock, order, stage, number, case)
                except BackendLost as lost:
                    self.last([case], lost)
        return found

    def rng(self, stage: str, *place: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, list(RESTARTS).index(stage), *place))

    def case(self, clock: TimingClient, order: Sequence[str], stage: str, restart: int, index: int) -> float:
        """Rounds of one case, until its interval is narrow or its time is up. Raises BackendLost."""
        case = self.record.cases[index]
        preset = self.presets[case.preset]
        arms = {side: Arm(side, case.phase) for side in SIDES}
        for side in order:
            build(clock, preset, side)
            ask(clock, preset, arms[side], case.depth, 1, BUILD_TIMEOUT)  # may compile
        began = time.perf_counter()
        limit = self.per_case * WARM_SHARE / len(order)
        slowest = max(clock.warm(preset, arms[side], case.depth, limit) for side in order)
        steps = max(1, min(int(BLOCK_NS // slowest), room(preset.config, case.depth)))
        drawn = self.rng(stage, restart, len(self.presets) + index)
        mine: list[GateBlock] = []
        made: Trial | None = None  # of the blocks that count
        number = 0
        while (spent := time.perf_counter() - began) < self.per_case or (
            (made is None or made.rounds < ROUNDS_WANTED) and spent < OVERTIME * self.per_case
        ):
            for place, at in enumerate(int(i) for i in drawn.permutation(len(SIDES))):
                block = ask(clock, preset, arms[SIDES[at]], case.depth, steps)
                mine.append(GateBlock(index, stage, restart, number, place, at, steps, *block))
            number += 1
            if number > ROUNDS_WANTED and number % 5 != 0:
                continue  # a trial sorts all rounds
            made = trial(index, stage, restart, kept(mine, default_mhz(self.record.machine))[0])
            half = made.half_width if made is not None and made.rounds >= ENOUGH_ROUNDS else None
            if half is not None and half <= TARGET_HALF_WIDTH:
                break
        self.record.blocks += mine
        made = trial(index, stage, restart, kept(mine, default_mhz(self.record.machine))[0])
        if made is None:  # on a CPU at least one whole round was run
            raise BackendLost(HEAD, "no round of a restart had both blocks near the device's default clock")
        return made.d

    def started(self, preset: Preset, order: Sequence[str], number: int, stack: ExitStack) -> dict[str, WorkerClient]:
        """Both workers, started in this order, on the processors of that restart. Raises BackendLost."""
        clients = {}
        for side in order:
            spec = self.launches[side]
            address = preset.addresses.get(self.record.backend, spec.address)
            spec = replace(spec, address=address, cpus=processors(self.threads, number))
            try:
                clients[side] = stack.enter_context(WorkerClient(spec))
            except BackendUnavailable as sentence:
                raise BackendLost(side, str(sentence)) from sentence
            except KeyError as missing:
                raise BackendLost(side, f"its worker is of another version: it does not tell {missing}") from missing
        return clients

    def last(self, cases: Sequence[int], lost: BackendLost) -> None:
        """Notes that cases have no verdict on their times."""
        why = f"{lost.backend} ({self.record.sides[lost.backend].name}): {lost.why}"
        self.record.lasting += [Lasting(case, why) for case in cases]
        self.tell(f"{len(cases)} cases are not comparable: {why}")

    def in_time(self) -> None:
        if self.limit is not None and time.perf_counter() - self.began > self.limit:
            raise _TimeUp

    def write(self) -> None:
        self.record.seconds = round(time.perf_counter() - self.began, 3)
        self.record.write(self.out)


def build(clock: TimingClient, preset: Preset, side: str) -> None:
    """Builds the backend where its worker has not. Raises BackendLost."""
    try:
        why = clock.clients[side].build(config_of(clock.clients[side], preset))
    except (WorkerDied, BackendUnavailable) as words:
        raise BackendLost(side, str(words)) from words
    if why:
        raise BackendLost(side, why)


def ask(
    clock: TimingClient, preset: Preset, arm: Arm, depth: int, steps: int, timeout: float | None = None
) -> tuple[int, int, int, int, int]:
    """One block: wall and CPU nanoseconds, involuntary switches, the GPU's clock and what held it down. Raises BackendLost."""
    try:
        (block,) = clock.blocks(preset, arm, depth, steps, 1, timeout=timeout)
        return int(block.ns), int(block.cpu_ns), int(block.nivcsw), int(block.sm_mhz), int(block.throttle)
    except (KeyError, TypeError, ValueError) as error:  # of another version
        words = f"its worker answers no block that this version understands: {type(error).__name__}: {error}"
        raise BackendLost(arm.backend, words) from error
