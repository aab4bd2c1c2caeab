"""Collects the samples of the timing study: equal code beside code that is slowed down by a known share.

``python -m timing.collect -o FILE`` collects them; ``timing.analyse`` computes what timing rules conclude from them.

In each restart five workers are alive at the same time: the numpy decoder twice (A and A′), and three times with a
planted slowdown. First each runs one block of one decode step in each round, in random order, as the protocol of the
bench does. Then each runs its blocks without interruption by the others, as a benchmark does that times one thing after
the other. Restarts of the conditions alternate, so that other load on the machine affects all conditions alike. In the
condition ``busy`` a second process computes all the time; this module starts and stops it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from kvconform.bench.client import WORKER, TimingClient
from kvconform.bench.presets import Preset
from kvconform.bench.protocol import processors, variables
from kvconform.bench.record import Arm
from kvconform.bench.worker.timer import digest, tokens
from kvconform.errors import BackendUnavailable
from kvconform.files import read_versioned, write_versioned
from kvconform.host import load_average, machine
from kvconform.worker.client import WorkerClient, WorkerSpec
from kvconform_specs.config import Config

SCHEMA = "kv-timing-study/1"
RESTARTS, ROUNDS, ALONE = 40, 100, 200
"""Restarts of each condition; rounds in each restart; blocks that each arm runs alone in each restart."""
WARM = 30
"""Blocks of each arm that are run first and not recorded."""
PLANTED = {"A": 0.0, "A′": 0.0, "+5 %": 0.05, "+10 %": 0.10, "+20 %": 0.20}
"""The arms, the reference first, and the share of CPU time that is added to each."""
HERE = Path(__file__).parent
ADDRESSES = {
    0.0: f"{HERE / 'slowed.py'}:Slowed",
    0.05: f"{HERE / 'slowed.py'}:Slower5",
    0.10: f"{HERE / 'slowed.py'}:Slower10",
    0.20: f"{HERE / 'slowed.py'}:Slower20",
}
CONDITIONS = {"quiet": 0, "busy": 1}
"""The number of other processes that compute meanwhile."""
PRESET = Preset(
    "timing-study",
    Config(
        "decoder",
        heads=8,
        kv_heads=4,
        head_dim=32,
        layers=4,
        width=256,
        mlp=512,
        vocabulary=1024,
        positions="rope",
        capacity=144,
    ),
    depths=(128,),
    prompts=(),
    about="a decode step of about a millisecond",
)
BUSY = """
import os, sys
import numpy
parent, held = int(sys.argv[1]), numpy.ones(1 << 20)
while os.getppid() == parent:
    held *= 1.0000001
"""
"""The other process: it computes, moves 8 MiB through the caches, and ends when its parent ends."""

Log = Callable[[str], None]


class Series(msgspec.Struct, frozen=True):
    """One arm in one restart."""

    arm: str
    """A key of ``PLANTED``."""
    rounds: list[int]
    """Wall time of its block in each round, in nanoseconds."""
    alone: list[int]
    """Wall time of each block that it ran alone, in nanoseconds."""
    own_ns: int
    """CPU time of the work of its steps, in nanoseconds, as the worker reports it."""
    extra_ns: int
    """CPU time that was added to its steps, in nanoseconds, as the worker reports it."""

    @property
    def slowdown(self) -> float:
        """CPU time with the addition over CPU time without it, as the worker reports them."""
        return 1 + self.extra_ns / self.own_ns


class Restart(msgspec.Struct, frozen=True):
    """One start of all workers."""

    condition: str
    """A key of ``CONDITIONS``."""
    number: int
    """Index of the restart within its condition."""
    starting: float
    """Time until all workers were built and warm, in seconds."""
    rounds: float
    """Time of all rounds, in seconds."""
    alone: float
    """Time of all blocks that were run alone, in seconds."""
    load: float
    """1-minute load average at the end, in runnable processes."""
    series: list[Series]
    """The samples of each arm."""


class Study(msgspec.Struct, kw_only=True):
    """The samples of all conditions."""

    schema: str = SCHEMA
    """Name and version of this schema."""
    started: str
    """Date and time of the start, ISO 8601."""
    machine: dict[str, Any]
    """Facts about the machine, by name."""
    software: dict[str, str]
    """Versions in the workers, by package."""
    protocol: dict[str, Any]
    """How the samples were taken: options and constants, by name."""
    restarts: list[Restart] = []
    """The samples of each restart."""
    seconds: float = 0.0
    """Duration of the collection, in seconds."""


def collect(
    out: Path,
    *,
    restarts: int = RESTARTS,
    rounds: int = ROUNDS,
    alone: int = ALONE,
    conditions: Sequence[str] = tuple(CONDITIONS),
    seed: int = 0,
    log: Log = lambda line: None,
) -> Study:
    """Takes samples in ``restarts`` restarts of each condition; ``out`` is written after each restart.

    An interrupt (Ctrl-C) keeps the samples so far. Raises BackendUnavailable if a worker cannot be started, and
    ``client.BackendLost`` if one dies.
    """
    began = time.perf_counter()
    protocol = {
        "preset": PRESET.to_json(),
        "depth": PRESET.depths[0],
        "steps": 1,
        "restarts": restarts,
        "rounds": rounds,
        "alone": alone,
        "warm": WARM,
        "planted": PLANTED,
        "conditions": {name: CONDITIONS[name] for name in conditions},
        "threads": 1,
        "seed": seed,
    }
    started = datetime.now(UTC).isoformat(timespec="seconds")
    study = Study(started=started, machine=machine(), software={}, protocol=protocol)
    try:
        for number in range(restarts):
            for place, condition in enumerate(conditions):
                with busy_processes(CONDITIONS[condition]):
                    one = _restart(study, condition, number, (seed, number, place))
                study.restarts.append(one)
                study.seconds = round(time.perf_counter() - began, 1)
                write_versioned(out, study)
                log(f"{condition} {number + 1}/{restarts}: {study.seconds:.0f} s, load {one.load:g}")
    except KeyboardInterrupt:
        log("interrupted: the samples so far are kept")
    return study


@contextmanager
def busy_processes(count: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """``count`` processes that compute for the duration of the ``with`` block."""
    command = [sys.executable, "-c", BUSY, str(os.getpid())]
    started = [subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}) for _ in range(count)]
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.wait()


def _restart(study: Study, condition: str, number: int, seed: tuple[int, ...]) -> Restart:
    drawn = np.random.default_rng(seed)
    arms, (depth,) = list(PLANTED), PRESET.depths
    rounds, alone = study.protocol["rounds"], study.protocol["alone"]
    clients: dict[str, WorkerClient] = {}
    paired: dict[str, list[int]] = {arm: [] for arm in arms}
    alone_ns: dict[str, list[int]] = {}
    marks = [time.perf_counter()]
    with ExitStack() as stack:
        for index in drawn.permutation(len(arms)):  # the order of starting may decide where memory lies
            spec = WorkerSpec(
                ADDRESSES[PLANTED[arms[index]]], environment=variables(1), cpus=processors(1, number), module=WORKER
            )
            client = clients[arms[index]] = stack.enter_context(WorkerClient(spec))
            refused = client.build(PRESET.config)
            if refused is not None:
                raise BackendUnavailable(refused)
        study.software.update(clients[arms[0]].environment)
        digests = {PRESET.name: digest(tokens(PRESET.config, study.protocol["seed"]))}
        clock = TimingClient(clients, study.protocol["seed"], digests)

        def blocks(arm: str, count: int) -> list[int]:
            return [int(block[0]) for block in clock.blocks(PRESET, Arm(arm, "decode"), depth, 1, count)]

        for arm in arms:
            blocks(arm, WARM)
        marks.append(time.perf_counter())
        for _ in range(rounds):
            for index in drawn.permutation(len(arms)):
                paired[arms[index]] += blocks(arms[index], 1)
        marks.append(time.perf_counter())
        for index in drawn.permutation(len(arms)):
            alone_ns[arms[index]] = blocks(arms[index], alone)
        marks.append(time.perf_counter())
        info = {arm: clients[arm].runtime_info(PRESET.config) for arm in arms}
    series = [Series(arm, paired[arm], alone_ns[arm], info[arm]["own_ns"], info[arm]["extra_ns"]) for arm in arms]
    starting, in_rounds, one_by_one = (round(float(s), 3) for s in np.diff(marks))
    return Restart(condition, number, starting, in_rounds, one_by_one, load_average(), series)


def read(path: Path) -> Study:
    """Raises SpecError with one sentence where the file holds no samples."""
    return read_versioned(path, Study, SCHEMA, "samples of the timing study")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m timing.collect", description=__doc__)
    parser.add_argument(
        "-o", "--out", type=Path, required=True, help="file of samples, .json or .json.gz, written after each restart"
    )
    parser.add_argument("--restarts", type=int, default=RESTARTS, help="restarts of each condition")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="rounds in each restart")
    parser.add_argument("--alone", type=int, default=ALONE, help="blocks that each arm runs alone in each restart")
    parser.add_argument("--condition", choices=list(CONDITIONS), action="append", help="may be repeated; default: all")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random orders")
    given = parser.parse_args()
    collect(
        given.out,
        restarts=given.restarts,
        rounds=given.rounds,
        alone=given.alone,
        conditions=given.condition or tuple(CONDITIONS),
        seed=given.seed,
        log=print,
    )


if __name__ == "__main__":
    main()
