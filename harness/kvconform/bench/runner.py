"""The controller of a speed run, protocol ``pair-v1``.

All workers of a preset are alive at once, and all are started anew as often as the protocol says: the restart is the
unit of replication. In each round every arm of a case runs one block, in an order drawn anew, so that what else the
machine does falls on all alike; ratios are paired within rounds. A worker times itself and answers numbers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from kvconform.bench.analysis.summarize import summarise, without
from kvconform.bench.plans import plans
from kvconform.bench.presets import Preset
from kvconform.bench.protocol import RESTARTS, SECONDS_PER_CASE, described
from kvconform.bench.record import MACHINE, Excluded, Record, write
from kvconform.bench.restart import Restart
from kvconform.bench.worker.gpu import held
from kvconform.host import load_average, machine
from kvconform.worker.client import WorkerSpec
from kvconform_specs import SUITE_VERSION

Tell = Callable[[str], None]
Advance = Callable[[float, float], None]


def bench(
    launches: Mapping[str, WorkerSpec],
    presets: Mapping[str, Preset],
    results_dir: Path | None,
    out: Path,
    *,
    seconds_per_case: float = SECONDS_PER_CASE,
    restarts: int = RESTARTS,
    seconds: float | None = None,
    phases: Sequence[str] = (),
    seed: int = 0,
    threads: int = 1,
    tell: Tell = lambda line: None,
    advance: Advance = lambda done, remaining: None,
) -> Record:
    """Times every backend that may be timed on every preset; the file ``out`` grows with each case.

    launches: by name, the reference first; a preset's own address takes a name's place. results_dir: where the
    results of a conformance run are; None asks for none, which the record says, and then only the outputs on the
    timed inputs are judged. seconds_per_case: wall seconds in one restart after the warm-up. seconds: of the whole
    run, from which those of a case follow then, warm-up included. phases: keeps these (``record.PHASES``); empty
    keeps all. tell: is given one line for each thing done; advance: the share that is done and the seconds that
    remain. An interrupt (Ctrl-C) ends the run and keeps what is measured: the record that is written and returned
    has ``finished`` False then. Raises ``device.GpuBusy`` where another benchmark holds the GPU.
    """
    run = _Run(
        list(presets.values()),
        results_dir,
        out,
        seconds_per_case,
        restarts,
        seconds,
        seed,
        threads,
        tell,
        tuple(phases),
        advance,
    )
    run.record.device = ", ".join(sorted({spec.device for spec in launches.values()}))
    with held("cuda" if "cuda" in run.record.device else "cpu") as told:
        run.record.machine |= told
        try:
            for preset in run.presets:
                run.preset(preset, launches)
            run.record.finished = True
        except KeyboardInterrupt:
            tell("interrupted: what was measured is kept")
        finally:
            run.write()
    return run.record


class _Run:
    """The state of one run."""

    def __init__(
        self,
        presets: list[Preset],
        results_dir: Path | None,
        out: Path,
        seconds_per_case: float,
        restarts: int,
        seconds: float | None,
        seed: int,
        threads: int,
        tell: Tell,
        phases: tuple[str, ...],
        advance: Advance,
    ) -> None:
        self.presets, self.results_dir, self.out = presets, results_dir, out
        self.seconds_per_case, self.restarts, self.seconds = seconds_per_case, restarts, seconds
        self.seed, self.threads, self.tell, self.phases, self.advance = seed, threads, tell, phases, advance
        self.began = time.perf_counter()
        self.done = 0  # cases
        self.spent = 0.0  # seconds of these
        self.record = Record(
            suite=SUITE_VERSION,
            started=datetime.now(UTC).isoformat(timespec="seconds"),
            device="",
            machine=machine(),
            software={},
            load=[load_average()],
            presets={preset.name: preset.to_json() for preset in presets},
            protocol=described(presets, results_dir, seconds_per_case, seed, threads, restarts, phases, seconds),
        )

    def preset(self, preset: Preset, launches: Mapping[str, WorkerSpec]) -> None:
        """All restarts of a preset. Who is lost in one is not in the next."""
        cases = plans(preset, self.phases)
        for number in range(self.restarts):
            lost = {one.backend for one in self.record.excluded if one.preset == preset.name and not one.phase}
            with Restart(self, preset, number) as restart:
                restart.start({name: spec for name, spec in launches.items() if name not in lost})
                for plan in cases if restart.admitted else ():
                    began = time.perf_counter()
                    restart.cell(plan)
                    self.spent += time.perf_counter() - began
                    self.done += 1
                    self.advance(self.share(), self.remaining())
                restart.conclude()
            self.record.load.append(load_average())
            self.write()
            if not machine().items() <= self.record.machine.items():  # which may tell of a GPU as well
                timed = {arm.backend for case in self.record.cases if case.preset == preset.name for arm in case.arms}
                for name in sorted(timed - {MACHINE}):
                    self.expel(name, preset, "the machine has changed while it was timed")

    # --- time ---
    def total(self) -> int:
        """Cases of the whole run."""
        return self.restarts * sum(len(plans(preset, self.phases)) for preset in self.presets)

    def share(self) -> float:
        return self.done / max(1, self.total())

    def remaining(self) -> float:
        """Seconds, from what has been done so far: starting and building counts with the cases."""
        return (time.perf_counter() - self.began) / max(1, self.done) * (self.total() - self.done)

    def case_seconds(self) -> float:
        """What one case may take in one restart."""
        if self.seconds is None:
            return self.seconds_per_case
        elapsed = time.perf_counter() - self.began
        apart = elapsed - self.spent  # starting and building so far, which every restart needs again
        starts = len({(one.preset, one.restart) for one in self.record.once}) or 1
        to_come = self.restarts * len(self.presets) - starts
        left = self.seconds - elapsed - apart / starts * to_come
        return max(0.05, left / max(1, self.total() - self.done))

    # --- who is left out ---
    def exclude(self, name: str, preset: Preset, why: str, phase: str = "") -> None:
        self.record.excluded.append(Excluded(name, preset.name, why, phase))
        self.tell(f"{preset.name}: no time for {name}{' ' * bool(phase)}{phase}: {why}")

    def expel(self, name: str, preset: Preset, why: str) -> None:
        """Excludes a backend and takes out what was measured of it on this preset."""
        self.exclude(name, preset, why)
        without(self.record, name, preset.name)

    def write(self) -> None:
        record = self.record
        record.seconds = round(time.perf_counter() - self.began, 3)
        summarise(record)
        write(record, self.out)
