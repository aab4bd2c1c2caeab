"""The controller of a speed run, protocol ``pair-v1`` with one start of the workers.

All workers are alive at once. In each round every arm of a case runs one block, in an order drawn anew, so that what
else the machine does falls on all alike; ratios are paired within rounds. A worker times itself and answers numbers.
The intervals speak of one start of the workers: how far another start lies from it, they do not know.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import numpy as np

from kvconform.machine import load_average, machine
from kvconform.speed.clock import Clock, Lost
from kvconform.speed.eligibility import Truth, conformance, parity, room, truth, unable
from kvconform.speed.presets import Preset
from kvconform.speed.protocol import (
    BLOCK_NS,
    ENOUGH_ROUNDS,
    NARROW,
    OVERTIME,
    ROUNDS_WANTED,
    SECONDS_PER_CASE,
    WARM_SHARE,
    described,
)  # fmt: skip
from kvconform.speed.record import SCHEMA, Arm, Case, Excluded, Record, Round
from kvconform.speed.summaries import half_width, summarise, times, without
from kvconform.storage import family_of, read_versioned, write_atomically
from kvconform.subject import BUILD_TIMEOUT, Death, Infrastructure, Launch, Subject
from kvconform_specs import SUITE_VERSION

Tell = Callable[[str], None]


def bench(
    launches: Mapping[str, Launch],
    presets: Mapping[str, Preset],
    results_dir: Path | None,
    out: Path,
    *,
    seconds_per_case: float = SECONDS_PER_CASE,
    seed: int = 0,
    threads: int = 1,
    tell: Tell = lambda line: None,
) -> Record:
    """Times every backend that may be timed on every preset; the file ``out`` grows with each case.

    ``launches``: by name, the reference first. ``results_dir``: where the results of a conformance run are; None asks
    for none, which the record says, and then only the outputs on the timed inputs are judged. ``seconds_per_case``:
    wall seconds, warm-up included. ``tell`` is given one line for each thing done. An interrupt (Ctrl-C) ends the run
    and keeps what is measured: the record that is written and returned has ``finished`` False then.
    """
    chosen = list(presets.values())
    run = _Run(chosen, results_dir, out, seconds_per_case, seed, threads, tell)
    run.record.device = ", ".join(sorted({launch.device for launch in launches.values()}))
    try:
        with ExitStack() as stack:
            run.start(launches, stack)
            for preset in chosen:
                run.preset(preset)
            run.record.finished = True
    except KeyboardInterrupt:
        tell("interrupted: what was measured is kept")
    finally:
        run.write()
    return run.record


class _Run:
    """The state of one run."""

    def __init__(
        self, presets: Sequence[Preset], results_dir: Path | None, out: Path, seconds: float, seed: int, threads: int,
        tell: Tell,
    ) -> None:  # fmt: skip
        self.presets, self.results_dir, self.out = presets, results_dir, out
        self.seconds, self.seed, self.tell = seconds, seed, tell
        self.began = time.perf_counter()
        self.threads = threads
        self.subjects: dict[str, Subject] = {}  # the reference first
        self.build_order: list[str] = []
        self.load = load_average()
        self.record = Record(
            suite=SUITE_VERSION, started=datetime.now(UTC).isoformat(timespec="seconds"), device="",
            machine=machine(), software={}, load=[self.load],
            presets={preset.name: preset.to_json() for preset in presets},
            protocol=described(presets, results_dir, seconds, seed, threads),
        )  # fmt: skip
        self.clock = Clock(self.subjects, seed, self.record.protocol["input_digest"])

    def start(self, launches: Mapping[str, Launch], stack: ExitStack) -> None:
        """Starts the workers of the backends whose conformance results do not forbid it.

        They start and build in an order drawn by the seed: of equal workers, those that came first were 2 to 5 %
        slower on weights of 100 MB (where their pages lie), and the reference must not always be the first.
        """
        drawn = [list(launches)[i] for i in np.random.default_rng(self.seed).permutation(len(launches))]
        started: dict[str, Subject] = {}
        for name in drawn:
            subject = self.started(name, launches[name], stack)
            if subject is not None:
                started[name] = subject
        self.build_order = list(started)
        self.record.protocol["start_order"] = self.build_order
        self.subjects.update({name: started[name] for name in launches if name in started})

    def started(self, name: str, launch: Launch, stack: ExitStack) -> Subject | None:
        threads = {key: str(self.threads) for key in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
        artefacts = {"KVCONFORM_ARTEFACTS": str((self.out.parent / "artefacts").resolve())}
        launch = replace(launch, environment={**artefacts, **launch.environment, **threads})
        why = "" if self.results_dir is None else conformance(name, launch, self.results_dir)
        if not why:
            try:
                subject = stack.enter_context(Subject(launch))
            except Infrastructure as sentence:
                why = str(sentence)
        if why:
            for preset in self.presets:
                self.exclude(name, preset, why)
            return None
        self.record.software[name] = {
            "address": launch.address, "device": launch.device, "interpreter": launch.python,
            "environment": subject.environment, "variables": launch.environment,
            "build_seconds": {}, "first_call_seconds": {}, "compared": {}, "witness": {},
        }  # fmt: skip
        return subject

    def exclude(self, name: str, preset: Preset, why: str, phase: str = "") -> None:
        self.record.excluded.append(Excluded(name, preset.name, why, phase))
        if not phase and name in self.record.software:
            for kind in ("build_seconds", "first_call_seconds"):
                self.record.software[name][kind].pop(preset.name, None)
        self.tell(f"{preset.name}: no time for {name}{' ' * bool(phase)}{phase}: {why}")

    def preset(self, preset: Preset) -> None:
        """Admits, times, and asks afterwards what really ran."""
        with ThreadPoolExecutor(1) as beside:  # the definition is computed while workers build and compile
            known = beside.submit(truth, preset.config, self.seed)
            built = {name for name in self.build_order if self.build(name, preset)}
            admitted = [n for n in self.subjects if n in built and self.admit(n, preset, known.result())]
        cells = [(phases, n) for n in preset.depths for phases in (("decode",), ("decode", "recompute"))]
        cells += [(("prefill",), n) for n in preset.prompts]
        for phases, depth in cells:
            self.cell(preset, admitted, phases, depth)
            self.write()
        for name in list(admitted):
            why = self.witness(name, preset)
            if why:
                self.expel(name, preset, why)
        self.write()

    def build(self, name: str, preset: Preset) -> bool:
        """Builds the subject and makes its first calls, which compile. Whether that went well."""
        subject, notes = self.subjects[name], self.record.software[name]
        began = time.perf_counter()
        try:
            why = unable(subject.claims, preset) or subject.build(preset.config)
            notes["build_seconds"][preset.name] = round(time.perf_counter() - began, 3)
            if not why:
                notes["first_call_seconds"][preset.name] = self.first_calls(name, preset)
        except (Death, Infrastructure, Lost) as words:
            why = str(words)
        if why:
            self.exclude(name, preset, why)
            return False
        self.tell(f"{preset.name}: {name} is built and warm after {time.perf_counter() - began:.1f} s")
        return True

    def first_calls(self, name: str, preset: Preset) -> dict[str, float]:
        """Seconds until each arm's first block was done: preparation, compilation and first calls together."""
        calls = [("prefill", n) for n in preset.prompts]
        calls += [(phase, n) for phase in ("decode", "recompute") for n in preset.depths]
        seconds = {}
        for phase, n in calls:
            began = time.perf_counter()
            self.clock.blocks(preset, Arm(name, phase), n, 1, 1, BUILD_TIMEOUT)
            seconds[f"{phase}({n})"] = round(time.perf_counter() - began, 4)
        return seconds

    def admit(self, name: str, preset: Preset, known: Truth) -> bool:
        """Whether the subject is right on the timed inputs, and is what its name says."""
        subject = self.subjects[name]
        try:
            why, compared = parity(subject, preset, self.seed, known)
            why = why or self.witness(name, preset)
        except (Death, Infrastructure) as words:
            why, compared = str(words), 0
        if why:
            self.exclude(name, preset, why)
            return False
        self.record.software[name]["compared"][preset.name] = compared
        self.record.software[name]["recompute"] = "full" if subject.claims.can("full") else "prefill of all tokens"
        return True

    def cell(self, preset: Preset, admitted: list[str], phases: tuple[str, ...], depth: int) -> None:
        """One case, begun anew without a backend that is lost."""
        while admitted:
            arms = [Arm(name, phase) for phase in phases for name in admitted]
            cases, rounds = len(self.record.cases), len(self.record.rounds)
            try:
                self.case(preset, arms, depth)
            except Lost as lost:
                del self.record.cases[cases:], self.record.rounds[rounds:]
                admitted.remove(lost.backend)
                self.expel(lost.backend, preset, lost.why)
            else:
                return

    def case(self, preset: Preset, arms: list[Arm], depth: int) -> None:
        began = time.perf_counter()
        slowest = max(self.clock.warm(preset, arm, depth, self.seconds * WARM_SHARE / len(arms)) for arm in arms)
        steps = max(1, min(int(BLOCK_NS // slowest), room(preset.config, depth)))
        case = Case(preset.name, depth, 1, arms, steps)
        index = len(self.record.cases)
        mine: list[Round] = []
        self.record.cases.append(case)
        order = np.random.default_rng((self.seed, index))
        number = 0
        while (spent := time.perf_counter() - began) < self.seconds or (
            number < ROUNDS_WANTED and spent < OVERTIME * self.seconds
        ):
            for place, arm in enumerate(int(i) for i in order.permutation(len(arms))):
                ((ns, cpu_ns, switched),) = self.clock.blocks(preset, arms[arm], depth, steps, 1)
                mine.append(Round(index, number, place, arm, ns, cpu_ns, switched))
                self.record.rounds.append(mine[-1])
            number += 1
            enough = number >= ENOUGH_ROUNDS and number % 5 == 0
            if enough and half_width(case, times(case, mine)) <= NARROW:
                break
        width = half_width(case, times(case, mine))
        phases = " and ".join(dict.fromkeys(arm.phase for arm in arms))
        half = f"intervals ± {width:.1%}" if width < math.inf else "too few rounds for an interval"
        self.tell(f"{preset.name}: {phases} at {depth}: {number} rounds of {len(arms)} arms, k = {steps}, {half}")

    def witness(self, name: str, preset: Preset) -> str:
        """Keeps what really ran. Returns why that must have no time, or nothing."""
        try:
            seen = self.subjects[name].witness(preset.config)
        except (Death, Infrastructure) as words:
            return f"died when it was asked what really ran: {words}"
        self.record.software[name]["witness"][preset.name] = seen
        if seen.get("fallback"):
            return f"not what its name says: {seen['fallback']}"
        if seen.get("threads", self.threads) != self.threads:
            return f"ran on {seen['threads']} threads, not on {self.threads}"
        return ""

    def expel(self, name: str, preset: Preset, why: str) -> None:
        """Excludes a backend and takes out what was measured of it on this preset."""
        self.exclude(name, preset, why)
        record = self.record
        record.cases, record.rounds = without(record.cases, record.rounds, name, preset.name)

    def write(self) -> None:
        record = self.record
        record.load = [self.load, load_average()]
        record.seconds = round(time.perf_counter() - self.began, 3)
        record.summaries, record.ratios = summarise(record)
        write_atomically(self.out, msgspec.json.format(msgspec.json.encode(record), indent=1))


def is_record(path: Path) -> bool:
    """Whether a file is a speed record, of any version, rather than results."""
    return family_of(path) == SCHEMA.partition("/")[0]


def read(path: Path) -> Record:
    """Raises SpecError with one sentence where the file holds no speed record."""
    return read_versioned(path, Record, SCHEMA, "speed record")
