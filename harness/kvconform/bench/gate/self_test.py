"""How often the gate gives a false alarm: it is run with one environment on both sides, where every alarm is false.

Real runs are few, so the rate is also simulated from what they measured: each simulated gate draws the magnitudes of
real restarts, with replacement, and a coin for each sign, which is what equal code gives (``sign_flip``).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import msgspec
import numpy as np

from kvconform.bench.engine import Options
from kvconform.bench.gate import decision
from kvconform.bench.gate.decision import CONFIRM, IMPROVEMENT, INCONCLUSIVE, NOT_COMPARABLE, RATE, REGRESSION, SCREEN
from kvconform.bench.gate.record import GateRecord
from kvconform.bench.gate.runner import gate
from kvconform.bench.presets import Preset
from kvconform.errors import GpuBusy
from kvconform.host import machine
from kvconform.worker.client import WorkerSpec
from kvconform_specs import SUITE_VERSION
from kvconform_specs.errors import SpecError

REJECTED = 0.01
"""The stated rate is refuted if so many alarms or more have at most this probability under it."""
KEPT, EXCEEDED, UNTESTED = "kept", "exceeded", "untested"


class SelfTest(msgspec.Struct, frozen=True, kw_only=True):
    """One self-test, a line of the history. ``machine``: with its GPU, if ``device`` is one. ``cases``: cases with a
    verdict, over all runs. ``alarms``, ``improvements``, ``inconclusive``: how many of them got which; ``alarmed``:
    runs with a regression or an improvement. ``stated``: the highest probability that a case alarms, one way. ``p``:
    of so many alarmed runs under it. ``simulated``: runs, cases and alarms (both ways) of gates simulated from the real
    restarts. ``bias``, ``spread``: mean and standard deviation of their d. ``verdict``: ``kept``, ``exceeded``, or
    ``untested`` if nothing was timed."""

    date: str
    machine: dict[str, Any]
    suite: str
    backend: str
    presets: list[str]
    runs: int
    cases: int
    alarms: int
    improvements: int
    inconclusive: int
    alarmed: int
    stated: float
    p: float
    simulated: dict[str, int]
    bias: float | None
    spread: float | None
    verdict: str
    device: str = "cpu"

    def __str__(self) -> str:
        return (
            f"{self.verdict}: {self.alarms} false regressions and {self.improvements} false improvements, "
            f"{self.inconclusive} inconclusive, in {self.cases} cases of {self.runs} runs; at most {self.stated:g} "
            f"a case and way is stated (p = {self.p:.2g}); simulated from these restarts: {self.simulated['alarms']} "
            f"in {self.simulated['cases']} cases of {self.simulated['runs']} runs"
        )


def self_test(
    spec: WorkerSpec,
    presets: Mapping[str, Preset],
    backend: str,
    history: Path,
    options: Options,
    *,
    runs: int = 20,
    simulate: int = 1000,
) -> SelfTest:
    """Runs the gate ``runs`` times with one environment on both sides, and ``simulate`` times on what was measured.

    The records go to the folder ``options.out``; one line of JSON is appended to ``history``. After an interrupt the
    finished runs count.
    """
    records: list[GateRecord] = []
    say, seed = options.say, options.seed
    for number in range(runs):
        say(f"A/A run {number + 1} of {runs}")
        mine = replace(options, out=options.out / f"a-a-{number + 1:03}.json", seed=seed + number)
        try:
            record = gate(spec, spec, presets, backend, mine)
        except GpuBusy as sentence:  # another benchmark has taken the GPU between two runs
            if not records:
                raise
            say(str(sentence))
            break
        if not record.finished:
            break
        records.append(record)
    made = conclude(records, backend, list(presets), simulate, seed, spec.device)
    history.parent.mkdir(parents=True, exist_ok=True)
    with history.open("ab") as file:
        file.write(msgspec.json.encode(made) + b"\n")
    say(str(made))
    return made


def conclude(
    records: Sequence[GateRecord], backend: str, presets: Sequence[str], simulate: int, seed: int, device: str = "cpu"
) -> SelfTest:
    """What the records of A/A runs show about the stated rate.

    The runs are independent, the cases of one are not: so runs with an alarm are counted, each of which has
    probability at most ``2 * cases * RATE`` (both ways), and the binomial tail is that of this bound.
    """
    verdicts = [[one.verdict for one in record.verdicts if one.verdict != NOT_COMPARABLE] for record in records]
    count = {kind: sum(run.count(kind) for run in verdicts) for kind in (REGRESSION, IMPROVEMENT, INCONCLUSIVE)}
    alarmed = sum(REGRESSION in run or IMPROVEMENT in run for run in verdicts)
    timed, most = sum(map(len, verdicts)), max(map(len, verdicts), default=0)
    p = tail(alarmed, len(records), min(1.0, 2 * RATE * most))
    pools: dict[int, list[float]] = defaultdict(list)
    for one in (one for record in records for one in record.trials if one.stage == SCREEN):
        pools[one.case].append(one.d)
    d = [value for pool in pools.values() for value in pool]
    return SelfTest(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=records[0].machine if records else machine(),
        suite=SUITE_VERSION,
        backend=backend,
        presets=list(presets),
        runs=len(records),
        cases=timed,
        alarms=count[REGRESSION],
        improvements=count[IMPROVEMENT],
        inconclusive=count[INCONCLUSIVE],
        alarmed=alarmed,
        stated=RATE,
        p=p,
        simulated=simulated(list(pools.values()), simulate, seed),
        bias=fmean(d) if d else None,
        spread=stdev(d) if len(d) > 1 else None,
        verdict=UNTESTED if not timed else EXCEEDED if p <= REJECTED else KEPT,
        device=device,
    )


def simulated(pools: Sequence[Sequence[float]], runs: int, seed: int) -> dict[str, int]:
    """Gates on equal code from pools of real d, one for each case: runs, cases of all runs, and alarms both ways."""
    rng = np.random.default_rng(seed)

    def restart(stage: str, number: int, cases: Sequence[int]) -> dict[int, float]:
        return {case: float(rng.choice(pools[case]) * rng.choice((-1, 1))) for case in cases}

    alarms = 0
    for _ in range(runs):
        for found in decision.play(range(len(pools)), restart).values():
            alarms += decision.find(found[SCREEN], found[CONFIRM]).verdict in (REGRESSION, IMPROVEMENT)
    return {"runs": runs, "cases": runs * len(pools), "alarms": alarms}


def tail(k: int, n: int, rate: float) -> float:
    """The binomial probability of ``k`` or more of ``n`` at this rate; each term by its logarithm."""
    if k == 0 or not 0 < rate < 1:
        return float(k == 0 or rate >= 1)

    def term(i: int) -> float:
        ways = math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1)
        return math.exp(ways + i * math.log(rate) + (n - i) * math.log1p(-rate))

    return min(1.0, math.fsum(map(term, range(k, n + 1))))


def history(path: Path) -> list[SelfTest]:
    """All self-tests of a history file, oldest first. Raises SpecError with one sentence if a line is none."""
    found = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            found.append(msgspec.json.decode(line, type=SelfTest))
        except msgspec.DecodeError as error:
            raise SpecError(f"{path}:{number}", f"holds no self-test: {error}") from error
    return found
