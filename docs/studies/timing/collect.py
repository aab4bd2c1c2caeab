"""The proof of the stopwatch, its samples: equal code beside code that is slowed down by a known share.

``python -m timing.collect -o FILE`` collects them; ``trials`` says what rules make of them.

In each restart five workers are alive at once: the numpy decoder twice (A and A′), and three of it with a planted
slowdown. They give blocks of one decode step in rounds of a random order, as protocol ``pair-v1`` has them, then each
a row of blocks by itself, as a benchmark that times one thing after the other has them. Restarts of the conditions take
turns, so that what else the machine does in these minutes falls on all alike. In the condition ``busy`` a second
process works all the time, which this module starts and ends.
"""

from __future__ import annotations

import argparse
import base64
import os
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from kvconform.bench.client import TimingClient
from kvconform.bench.presets import Preset
from kvconform.bench.protocol import processors, variables
from kvconform.bench.record import Arm
from kvconform.bench.worker.timer import digest, tokens
from kvconform.errors import BackendUnavailable
from kvconform.files import read_versioned, write_atomically
from kvconform.host import load_average, machine
from kvconform.worker.client import WorkerClient, WorkerSpec
from kvconform_specs.config import Config

SCHEMA = "kv-proof/1"
RESTARTS, ROUNDS, ALONE = 40, 100, 200
"""Of each condition; rounds in each restart; blocks of each arm by itself in each restart."""
WARM = 30
"""Blocks of each arm before anything counts."""
PLANTED = {"A": 0.0, "A′": 0.0, "+5 %": 0.05, "+10 %": 0.10, "+20 %": 0.20}
"""The arms, the reference first, and the share of CPU time that was added to each."""
HERE = Path(__file__).parent
ADDRESSES = {
    0.0: f"{HERE / 'slowed.py'}:Slowed",
    0.05: f"{HERE / 'slowed.py'}:Slower5",
    0.10: f"{HERE / 'slowed.py'}:Slower10",
    0.20: f"{HERE / 'slowed.py'}:Slower20",
}
CONDITIONS = {"quiet": 0, "busy": 1}
"""How many other processes work meanwhile."""
PRESET = Preset(
    "proof",
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
"""The other process: it computes and moves 8 MiB through the caches, and ends with the one that started it."""

Nanoseconds = NDArray[np.float64]
Tell = Callable[[str], None]


class Series(msgspec.Struct, frozen=True):
    """One arm in one restart. ``rounds``: wall nanoseconds of its block in each round; ``alone``: of its blocks one
    after the other (both packed, see ``packed``). ``own_ns``, ``extra_ns``: CPU nanoseconds of its steps' work and of
    what was added to it, as it says itself."""

    arm: str
    rounds: str
    alone: str
    own_ns: int
    extra_ns: int

    @property
    def slowdown(self) -> float:
        """What it says of itself: time with what was added, over the time without."""
        return 1 + self.extra_ns / self.own_ns


class Restart(msgspec.Struct, frozen=True):
    """One start of all workers. Seconds until all were built and warm, of all rounds, and of all rows by themselves;
    ``load``: the 1-minute load average at its end."""

    condition: str
    number: int
    starting: float
    rounds: float
    alone: float
    load: float
    series: list[Series]


class Proof(msgspec.Struct, kw_only=True):
    """Samples of all conditions. ``protocol``: how they were taken; ``software``: versions in the workers."""

    schema: str = SCHEMA
    started: str
    machine: dict[str, Any]
    software: dict[str, str]
    protocol: dict[str, Any]
    restarts: list[Restart] = []
    seconds: float = 0.0


def packed(ns: Sequence[int]) -> str:
    """Nanoseconds below 2³² (4.3 s) as text: little-endian 32-bit integers, deflated, in base 64."""
    if not all(0 < n < 1 << 32 for n in ns):
        raise ValueError(f"a block took {max(ns) / 1e9:.1f} s: such a machine proves nothing")
    return base64.b64encode(zlib.compress(np.array(ns, "<u4").tobytes(), 9)).decode()


def unpacked(text: str) -> Nanoseconds:
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), "<u4").astype(np.float64)


def collect(
    out: Path,
    *,
    restarts: int = RESTARTS,
    rounds: int = ROUNDS,
    alone: int = ALONE,
    conditions: Sequence[str] = tuple(CONDITIONS),
    seed: int = 0,
    tell: Tell = lambda line: None,
) -> Proof:
    """Takes samples in so many restarts of each condition; ``out`` grows with each restart.

    An interrupt (Ctrl-C) keeps what is measured. Raises BackendUnavailable where a worker cannot be started,
    ``clock.BackendLost`` where one dies.
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
    proof = Proof(started=started, machine=machine(), software={}, protocol=protocol)
    try:
        for number in range(restarts):
            for place, condition in enumerate(conditions):
                with others(CONDITIONS[condition]):
                    one = _restart(proof, condition, number, (seed, number, place))
                proof.restarts.append(one)
                proof.seconds = round(time.perf_counter() - began, 1)
                write_atomically(out, msgspec.json.format(msgspec.json.encode(proof), indent=1) + b"\n")
                tell(f"{condition} {number + 1}/{restarts}: {proof.seconds:.0f} s, load {one.load:g}")
    except KeyboardInterrupt:
        tell("interrupted: what was measured is kept")
    return proof


@contextmanager
def others(count: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """So many processes that work while the block lasts."""
    command = [sys.executable, "-c", BUSY, str(os.getpid())]
    started = [subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}) for _ in range(count)]
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.wait()


def _restart(proof: Proof, condition: str, number: int, seed: tuple[int, ...]) -> Restart:
    drawn = np.random.default_rng(seed)
    arms, (depth,) = list(PLANTED), PRESET.depths
    rounds, alone = proof.protocol["rounds"], proof.protocol["alone"]
    clients: dict[str, WorkerClient] = {}
    paired: dict[str, list[int]] = {arm: [] for arm in arms}
    rows: dict[str, list[int]] = {}
    marks = [time.perf_counter()]
    with ExitStack() as stack:
        for index in drawn.permutation(len(arms)):  # of equal workers the first ones may lie elsewhere in memory
            spec = WorkerSpec(ADDRESSES[PLANTED[arms[index]]], environment=variables(1), cpus=processors(1, number))
            client = clients[arms[index]] = stack.enter_context(WorkerClient(spec))
            refused = client.build(PRESET.config)
            if refused is not None:
                raise BackendUnavailable(refused)
        proof.software.update(clients[arms[0]].environment)
        digests = {PRESET.name: digest(tokens(PRESET.config, proof.protocol["seed"]))}
        clock = TimingClient(clients, proof.protocol["seed"], digests)

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
            rows[arms[index]] = blocks(arms[index], alone)
        marks.append(time.perf_counter())
        said = {arm: clients[arm].runtime_info(PRESET.config) for arm in arms}
    series = [
        Series(arm, packed(paired[arm]), packed(rows[arm]), said[arm]["own_ns"], said[arm]["extra_ns"]) for arm in arms
    ]
    starting, in_rounds, by_themselves = (round(float(s), 3) for s in np.diff(marks))
    return Restart(condition, number, starting, in_rounds, by_themselves, load_average(), series)


def read(path: Path) -> Proof:
    """Raises SpecError where the file holds none."""
    return read_versioned(path, Proof, SCHEMA, "proof of the stopwatch")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m timing.collect", description=__doc__)
    parser.add_argument("-o", "--out", type=Path, required=True, help="the file that grows with each restart")
    parser.add_argument("--restarts", type=int, default=RESTARTS, help="of each condition")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="in each restart")
    parser.add_argument("--alone", type=int, default=ALONE, help="blocks of each arm by itself in each restart")
    parser.add_argument("--condition", choices=list(CONDITIONS), action="append", help="all unless one is named")
    parser.add_argument("--seed", type=int, default=0, help="of the orders")
    given = parser.parse_args()
    collect(
        given.out,
        restarts=given.restarts,
        rounds=given.rounds,
        alone=given.alone,
        conditions=given.condition or tuple(CONDITIONS),
        seed=given.seed,
        tell=print,
    )


if __name__ == "__main__":
    main()
