"""The gate on wall time: how often it alarms on equal code, what it sees, and what it refuses to compare."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import product
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from lanes import slow_except
from scipy import stats

import kvconform
from kvconform.bench import engine
from kvconform.bench.client import TimingClient
from kvconform.bench.engine import Options
from kvconform.bench.gate import record as gate_record
from kvconform.bench.gate import runner, self_test
from kvconform.bench.gate.decision import (
    CONFIRM,
    IMPROVEMENT,
    INCONCLUSIVE,
    LEVEL,
    NOT_COMPARABLE,
    PASS,
    RATE,
    REGRESSION,
    RESTARTS,
    SCREEN,
    Evidence,
    find,
    play,
)
from kvconform.bench.gate.record import CaseVerdict, GateRecord, NotComparable, Side
from kvconform.bench.gate.sign_flip import sign_flip
from kvconform.bench.presets import Preset
from kvconform.bench.record import Arm, Case, Round
from kvconform.errors import GpuBusy
from kvconform.worker.client import WorkerSpec
from kvconform_specs.config import Config
from kvconform_specs.errors import SpecError

TINY = Preset(
    "tiny",
    Config("decoder", heads=4, kv_heads=2, head_dim=6, width=10, vocabulary=13, positions="rope", capacity=30),
    depths=(12,),
    prompts=(9,),
    about="as small as it can be",
)

SUBJECTS = """
import gc, os
from dataclasses import replace
from kvconform_backends.numpy.cache import NumpyCache

class Wrong(NumpyCache):
    def step(self, cache, *inputs, **more):
        output, cache = super().step(cache, *inputs, **more)
        return output * 2, cache

class DiesWhenTimed(NumpyCache):
    def step(self, cache, *inputs, **more):
        if not gc.isenabled():
            os._exit(3)
        return super().step(cache, *inputs, **more)

class FallsBack(NumpyCache):
    def runtime_info(self):
        return {"fallback": "numpy ran instead"}

class Tf32(NumpyCache):
    def runtime_info(self):
        return {"precision": "float32 by tf32"}

class Float32(NumpyCache):
    def runtime_info(self):
        return {"precision": "float32"}

class OnCuda(NumpyCache):
    claims = replace(NumpyCache.claims, devices=("cpu", "cuda"))
    def runtime_info(self):
        return {"device": "cuda", "precision": "float32"}

class Copies(OnCuda):
    def runtime_info(self):
        return {**super().runtime_info(), "providers": [], "memcpy_nodes": 3}

class Silent(OnCuda):
    def runtime_info(self):
        return {}
"""


def attained(n: int, level: float) -> float:
    """How often ``p <= level`` comes with equal code and magnitudes without ties: the level on a grid of 2^-n."""
    return math.floor(level * 2**n) / 2**n


def slack(n: int, rate: float) -> float:
    """Four standard deviations of a binomial count: an honest one is that far off with probability below 1e-4."""
    return 4 * math.sqrt(n * rate * (1 - rate))


# --- the sign-flip test ---
def test_p_is_the_published_one_of_darwins_maize() -> None:
    """Fisher 1935, section 21: of 32768 sign vectors, 863 have a sum of 314 or more."""
    taller = [49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48]
    assert sum(taller) == 314
    assert sign_flip(taller) == 863 / 32768


def test_p_counts_every_sign_vector_and_ties_against_an_alarm() -> None:
    values = [0.1, 0.2, 0.3, -0.15, 0.0, 0.2]
    sums = [sum(s * v for s, v in zip(signs, values, strict=True)) for signs in product((1, -1), repeat=6)]
    assert sign_flip(values) == sum(total >= sum(values) - 1e-12 for total in sums) / 64
    drawn = np.random.default_rng(4).normal(0.3, 1, (5, 7))
    for row in drawn:
        by_scipy = stats.permutation_test((row,), np.sum, permutation_type="samples", alternative="greater")
        assert sign_flip(list(row)) == pytest.approx(by_scipy.pvalue)
    assert sign_flip([0.1] * 6) == 1 / 64
    assert sign_flip([0.0] * 6) == 1.0
    assert sign_flip([-0.1] * 6) == 1.0


Draw = Callable[[np.random.Generator, int], Sequence[float]]


def heavy(rng: np.random.Generator, n: int) -> list[float]:
    """A restart has an effect of its own on all its rounds; both have tails without a variance."""
    rounds = 0.1 * rng.standard_t(2, (n, 15)) + 0.1 * rng.standard_t(2, (n, 1))
    return [float(d) for d in np.median(rounds, axis=1)]


def jumps(rng: np.random.Generator, n: int) -> list[float]:
    """In a third of the restarts one of both has the slower core; who starts second is 5 % faster."""
    slow = 0.5 * (rng.random(n) < 1 / 3) + 0.05
    return [float(d) for d in slow * rng.choice((-1, 1), n) + rng.normal(0, 0.02, n)]


def drifting(rng: np.random.Generator, n: int) -> list[float]:
    """The machine grows noisier from restart to restart: magnitudes depend on one another, signs do not."""
    return [float(d) for d in rng.laplace(0, 0.03 * 1.5 ** np.arange(n))]


@pytest.mark.parametrize("draw", [heavy, jumps, drifting])
def test_equal_code_alarms_no_more_often_than_is_stated(draw: Draw) -> None:
    """2000 gates each. The count of alarms is at most what a binomial of the stated rate exceeds once in 10^4 times;
    the screen's level is met on both sides: a test that never rejects would keep the rate as well."""
    gates, rng = 2000, np.random.default_rng(1)
    screens = [draw(rng, RESTARTS[SCREEN]) for _ in range(gates)]
    verdicts = [find(screen, draw(rng, RESTARTS[CONFIRM])).verdict for screen in screens]
    most = next(k for k in range(gates) if self_test.tail(k + 1, gates, RATE) < 1e-4)
    assert most < 10
    assert verdicts.count(REGRESSION) <= most
    assert verdicts.count(IMPROVEMENT) <= most
    level = attained(RESTARTS[SCREEN], LEVEL[SCREEN])
    rejected = sum(sign_flip(screen) <= LEVEL[SCREEN] for screen in screens)
    assert abs(rejected - gates * level) <= slack(gates, level)


def test_the_stated_rate_is_that_of_both_stages() -> None:
    assert math.isclose(RATE, 5e-4)
    assert attained(RESTARTS[SCREEN], LEVEL[SCREEN]) == 3 / 64
    assert attained(RESTARTS[CONFIRM], LEVEL[CONFIRM]) == 10 / 1024
    assert attained(6, 0.05) * attained(10, 0.01) <= RATE


@pytest.mark.parametrize(("factor", "verdict"), [(1.2, REGRESSION), (1 / 1.2, IMPROVEMENT)])
def test_a_change_of_a_fifth_is_seen_nine_times_of_ten_where_restarts_differ_by_5_percent(
    factor: float, verdict: str
) -> None:
    gates, rng = 500, np.random.default_rng(2)

    def draw(n: int) -> list[float]:
        return [float(d) for d in rng.normal(math.log(factor), 0.05, n)]

    seen = sum(find(draw(6), draw(10)).verdict == verdict for _ in range(gates))
    assert seen >= 0.9 * gates


SLOW, QUICK, SAME = [0.2] * 6, [-0.2] * 6, [0.01, -0.01] * 3


@pytest.mark.parametrize(
    ("screen", "confirm", "widths", "verdict", "why"),
    [
        (SLOW, [0.2] * 10, [], REGRESSION, "x1.221 with p = 0.00098"),
        (QUICK, [-0.2] * 10, [], IMPROVEMENT, "x0.819"),
        (SAME, [], [0.01] * 6, PASS, ""),
        ([0.04] * 6, [], [], PASS, ""),  # sure, and too small to stop anybody
        (SLOW, [0.2, -0.2] * 5, [], INCONCLUSIVE, "not confirmed"),
        (SLOW, QUICK + QUICK[:4], [], INCONCLUSIVE, "not confirmed"),
        (SLOW, [0.2] * 9, [], INCONCLUSIVE, "9 of 10 restarts confirm it"),
        (SLOW[:5], [], [], INCONCLUSIVE, "5 of 6 restarts were made"),
        ([0.5, -0.5] * 3, [], [], INCONCLUSIVE, "too noisy: restarts differ by 55%"),
        (SAME, [], [0.2] * 6, INCONCLUSIVE, "too noisy: intervals within restarts are ± 20%"),
        (SAME, [], [math.inf] * 6, INCONCLUSIVE, "too noisy: restarts have too few rounds"),
    ],
)
def test_a_verdict_follows_from_both_stages(
    screen: list[float], confirm: list[float], widths: list[float], verdict: str, why: str
) -> None:
    found = find(screen, confirm, widths)
    assert found.verdict == verdict
    assert why in found.why
    assert bool(found.why) == (verdict != PASS)


def test_candidates_alone_are_confirmed_by_restarts_of_their_own() -> None:
    asked = []

    def restart(stage: str, number: int, cases: Sequence[int]) -> Mapping[int, float]:
        asked.append((stage, number, tuple(cases)))
        told = {0: 0.0, 1: 0.2, 2: -0.2}
        return {case: told[case] for case in cases if case in told}

    found = play(range(4), restart)
    screened = [(SCREEN, 0, (0, 1, 2, 3)), *((SCREEN, n, (0, 1, 2)) for n in range(1, 6))]
    assert asked == [*screened, *((CONFIRM, n, (1, 2)) for n in range(10))]
    assert {case: len(d[CONFIRM]) for case, d in found.items()} == {0: 0, 1: 10, 2: 10, 3: 0}
    assert found[3] == {SCREEN: [], CONFIRM: []}


# --- the record ---
def record_of(d: Mapping[str, Sequence[Sequence[float]]], rounds: int = 8) -> GateRecord:
    """Whose restarts have these d: by stage, for each restart of each case."""
    blocks = []
    for stage, cases in d.items():
        first = RESTARTS[SCREEN] if stage == CONFIRM else 0
        for case, values in enumerate(cases):
            for restart, value in enumerate(values, first):
                for n in range(rounds):
                    for side, ns in enumerate((10**6, round(10**6 * math.exp(value)))):
                        blocks.append(Round(case, restart, n, side, side, ns * (n + 1), 0, 0))
    count = max(map(len, d.values()))
    return GateRecord(
        suite="1",
        started="",
        backend="b",
        device="cpu",
        machine={},
        software={},
        protocol={},
        presets={},
        load=[],
        sides={name: Side(name, "", "") for name in gate_record.SIDES},
        finished=True,
        rounds=blocks,
        cases=[Case("p", n, 1, [Arm(side, "decode") for side in gate_record.SIDES], 2) for n in range(count)],
    )


def test_verdicts_and_medians_of_a_written_record_are_those_of_its_raw_blocks(tmp_path: Path) -> None:
    record = record_of({SCREEN: [SLOW, SAME], CONFIRM: [[0.2] * 10, []]})
    record.write(tmp_path / "gate.json")
    read = gate_record.read(tmp_path / "gate.json")
    assert gate_record.is_record(tmp_path / "gate.json")
    assert read == record
    again = msgspec.structs.replace(read, trials=[], verdicts=[])
    again.conclude()
    assert again == read
    assert [one.verdict for one in read.verdicts] == [REGRESSION, PASS]
    assert [one.d for one in read.trials if one.case == 0] == pytest.approx([0.2] * 16, abs=1e-5)
    assert read.verdicts[0].ratio == pytest.approx(math.exp(0.2), rel=1e-5)
    assert read.exit_code == 4
    assert read.lines()[0].startswith("p: decode(0): regression x1.221")


def test_nothing_but_a_regression_blocks() -> None:
    record = record_of({SCREEN: [SAME, QUICK, SLOW, SAME], CONFIRM: [[], [-0.2] * 10, [0.2, -0.2] * 5, []]})
    record.not_comparable = [NotComparable(3, "base: absent"), NotComparable(3, "later")]
    record.conclude()
    assert [one.verdict for one in record.verdicts] == [PASS, IMPROVEMENT, INCONCLUSIVE, NOT_COMPARABLE]
    assert record.verdicts[3].why == "base: absent"
    assert record.exit_code == 0


def test_a_restart_counts_whole_rounds_and_too_few_of_them_are_noise() -> None:
    record = record_of({SCREEN: [SAME]}, rounds=5)
    record.rounds.append(Round(0, 0, 5, 0, 1, 10**9, 0, 0))
    record.conclude()
    assert [one.rounds for one in record.trials] == [5] * 6
    assert (record.trials[0].half_width, record.verdicts[0].verdict) == (None, INCONCLUSIVE)


def test_a_block_under_the_clock_is_kept_in_the_record_and_is_in_no_trial() -> None:
    record = record_of({SCREEN: [SAME]}, rounds=5)
    record.machine = {"default_mhz": 1000}
    record.rounds += [
        Round(0, restart, 5, side, side, 10**6 * (1 + 99 * side), 0, 0, 0, 1000 - 251 * side)
        for restart in range(6)
        for side in (0, 1)
    ]
    record.conclude()
    assert [one.rounds for one in record.trials] == [5] * 6
    assert [one.d for one in record.trials] == pytest.approx(SAME, abs=1e-5)


def test_a_pass_that_compared_nothing_and_an_unknown_verdict_cannot_be_built(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must have compared something"):
        CaseVerdict(0, PASS)
    with pytest.raises(ValueError, match="unknown verdict 'fine'"):
        CaseVerdict(0, "fine")
    (tmp_path / "gate.json").write_text('{"schema": "kv-gate/9"}')
    with pytest.raises(SpecError, match="unknown schema 'kv-gate/9'; known: kv-gate/2"):
        gate_record.read(tmp_path / "gate.json")


# --- live ---
def compared(tmp_path: Path, base: WorkerSpec, head: WorkerSpec, **more: Any) -> GateRecord:
    return runner.gate(base, head, {"tiny": TINY}, "b", Options(tmp_path / "gate.json", 0.05, **more))


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("Wrong", "not conformant on the timed inputs"),
        ("FallsBack", "not what its name says: numpy ran instead"),
        ("DiesWhenTimed", "ended with exit status 3"),
        ("Missing", "has no 'Missing'"),
    ],
)
def test_a_side_that_is_not_right_gets_no_time(name: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "subjects.py").write_text(SUBJECTS)
    record = compared(tmp_path, WorkerSpec("numpy"), WorkerSpec(f"{tmp_path / 'subjects.py'}:{name}"))
    assert {one.verdict for one in record.verdicts} == {NOT_COMPARABLE}
    assert all(why in one.why and one.why.startswith("head (") for one in record.verdicts)
    assert all(one.ratio is None for one in record.verdicts)
    assert record.exit_code == 0


@pytest.mark.parametrize(
    ("file", "old", "new", "why"),
    slow_except(
        [
            ("bench/worker/server.py", '"time": self.time,', "", "KeyError: 'time'"),
            ("bench/worker/server.py", "block._asdict()", "list(block)", "no block that this version understands"),
            ("bench/worker/server.py", "from __future__", "import nothing_such\nfrom __future__", "did not start"),
            (
                "worker/server.py",
                '"platform": platform.platform()',
                '"platform": "Elsewhere-1"',
                ", the base on Elsewhere-1",
            ),
            (
                "worker/server.py",
                '"claims": claims, ',
                "",
                "its worker is of another version: its description lacks 'claims'",
            ),
            ("bench/worker/timer.py", ".hexdigest()[:16]", ".hexdigest()[:15]", "makes other tokens of the same seed"),
        ],
        3,
    ),
)
def test_a_side_of_another_version_or_machine_is_not_compared(
    file: str, old: str, new: str, why: str, tmp_path: Path
) -> None:
    package = tmp_path / "older" / "kvconform"
    shutil.copytree(Path(kvconform.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    text = (package / file).read_text()
    assert old in text
    (package / file).write_text(text.replace(old, new))
    older = WorkerSpec("numpy", environment={"PYTHONPATH": str(tmp_path / "older")})
    record = compared(tmp_path, older, WorkerSpec("numpy"))
    assert {one.verdict for one in record.verdicts} == {NOT_COMPARABLE}
    assert all(why in one.why for one in record.verdicts)
    assert record.exit_code == 0


@pytest.mark.slow
def test_classes_of_precision_are_not_compared_and_a_gpu_must_be_proven(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "subjects.py").write_text(SUBJECTS)
    monkeypatch.setattr(engine, "held", lambda device: nullcontext({"gpu": f"of {device}"}))

    def why(base: str, head: str, device: str) -> set[str]:
        launches = [WorkerSpec(f"{tmp_path / 'subjects.py'}:{name}", device=device) for name in (base, head)]
        record = compared(tmp_path, *launches, time_limit=0.0)
        assert record.machine["gpu"] == f"of {device}"
        return {one.why.partition("): ")[2] for one in record.verdicts if one.verdict == NOT_COMPARABLE}

    assert why("Float32", "Tf32", "cpu") == {"classes of precision differ: base: float32; head: float32 by tf32"}
    assert why("OnCuda", "Copies", "cuda") == {
        "its graphs have 3 Memcpy nodes: they copy between host and device in every step"
    }
    assert why("OnCuda", "Silent", "cuda") == {
        "cuda was requested, but runtime_info() does not report the device that ran"
    }
    assert why("OnCuda", "OnCuda", "cuda") == set()


@pytest.mark.slow
@pytest.mark.parametrize(("mhz", "verdicts"), [(1000, {PASS, INCONCLUSIVE}), (700, {NOT_COMPARABLE})])
def test_rounds_of_a_slow_clock_make_no_verdict(
    mhz: int, verdicts: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = TimingClient.blocks

    def clocked(*args: Any, **more: Any) -> Any:
        return [block._replace(sm_mhz=mhz, throttle=0x4) for block in blocks(*args, **more)]

    monkeypatch.setattr(TimingClient, "blocks", clocked)
    monkeypatch.setattr(engine, "held", lambda device: nullcontext({"default_mhz": 1000}))
    record = compared(tmp_path, WorkerSpec("numpy"), WorkerSpec("numpy"))
    assert {one.verdict for one in record.verdicts} <= verdicts
    assert {(block.sm_mhz, block.throttle) for block in record.rounds} == {(mhz, 0x4)}
    if mhz < 1000:
        assert {one.why.partition("): ")[2] for one in record.verdicts} == {
            "no round of a restart had both blocks near the device's default clock"
        }


def test_a_self_test_counts_the_runs_before_somebody_took_the_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = record_of({SCREEN: [SAME]})
    done.conclude()
    given: list[GateRecord] = [done]

    def gate(*args: Any, **more: Any) -> GateRecord:
        if not given:
            raise GpuBusy("it is being timed")
        return given.pop()

    monkeypatch.setattr(self_test, "gate", gate)
    spec = WorkerSpec("numpy", device="cuda")
    common = (spec, {"tiny": TINY}, "b", tmp_path / "history.jsonl", Options(tmp_path / "runs"))
    told = self_test.self_test(*common, runs=3, simulate=10)
    assert (told.runs, told.device) == (1, "cuda")
    with pytest.raises(GpuBusy):
        self_test.self_test(*common, runs=3, simulate=10)


def test_the_gate_waits_for_nobody_who_holds_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def busy(device: str) -> Iterator[None]:
        raise GpuBusy("it is being timed")
        yield

    monkeypatch.setattr(engine, "held", busy)
    (tmp_path / "gate.json").write_text("of before")
    with pytest.raises(GpuBusy, match="it is being timed"):
        compared(tmp_path, WorkerSpec("numpy"), WorkerSpec("numpy"))
    assert (tmp_path / "gate.json").read_text() == "of before"


def test_what_was_not_decided_in_time_is_inconclusive(tmp_path: Path) -> None:
    told: list[str] = []
    record = compared(tmp_path, WorkerSpec("numpy"), WorkerSpec("numpy"), time_limit=0.01, say=told.append)
    assert [one.verdict for one in record.verdicts] == [INCONCLUSIVE] * 2
    assert not record.finished
    assert told[-1].startswith("the 0.01 s are used")


# --- the self-test ---
def test_the_binomial_tail_is_that_of_its_definition() -> None:
    fair = [sum(heads) for heads in product((0, 1), repeat=7)]
    assert self_test.tail(5, 7, 0.5) == pytest.approx(sum(n >= 5 for n in fair) / 128)
    for k, n, rate in ((1, 60, 1e-3), (30, 2000, 5e-3), (40, 50, 0.7)):
        assert self_test.tail(k, n, rate) == pytest.approx(stats.binom.sf(k - 1, n, rate))
    assert self_test.tail(0, 7, 0.5) == 1
    assert self_test.tail(3, 7, 0.0) == 0


def test_a_gate_that_alarms_too_often_is_found_out() -> None:
    calm, alarmed = record_of({SCREEN: [SAME, SAME]}), record_of({SCREEN: [SLOW, SAME], CONFIRM: [[0.2] * 10, []]})
    for record in (calm, alarmed):
        record.conclude()

    def told(*records: GateRecord) -> self_test.SelfTest:
        return self_test.conclude(records, "b", ["p"], 100, 0)

    kept = told(*[calm] * 20)
    assert (kept.verdict, kept.alarms, kept.alarmed, kept.cases, kept.stated) == ("kept", 0, 0, 40, RATE)
    assert kept.simulated == {"runs": 100, "cases": 200, "alarms": 0}
    once = told(*[calm] * 19, alarmed)  # within what 20 runs of two cases may do: p = 1 - (1 - .002)^20 = .04
    assert (once.verdict, once.alarms) == ("kept", 1)
    assert once.p == pytest.approx(1 - (1 - 4 * RATE) ** 20)
    often = told(*[calm] * 17, *[alarmed] * 3)
    assert (often.verdict, often.alarmed) == ("exceeded", 3)
    assert told().verdict == "untested"
    calm.machine = {"cpu": "a CPU", "gpu": "a GPU"}
    assert (told(calm).device, told(calm).machine["gpu"]) == ("cpu", "a GPU")
    assert self_test.conclude([], "b", ["p"], 100, 0, "cuda").device == "cuda"


def test_simulated_gates_keep_the_rate_even_where_restarts_differ_much() -> None:
    """Magnitudes of up to 70 %: the threshold on the median saves nothing, the signs do."""
    runs = 500
    pools = [list(np.random.default_rng(case).normal(0, 0.3, 40)) for case in range(2)]
    found = self_test.simulated(pools, runs, 0)
    assert found["cases"] == 2 * runs
    assert self_test.tail(found["alarms"], found["cases"], 2 * RATE) > 1e-4


@pytest.mark.slow
def test_a_self_test_runs_one_environment_against_itself_and_leaves_a_line(tmp_path: Path) -> None:
    log = tmp_path / "history" / "gate.jsonl"
    told = self_test.self_test(
        WorkerSpec("numpy"), {"tiny": TINY}, "numpy", log, Options(tmp_path / "runs", 0.05), runs=1, simulate=100
    )
    (line,) = self_test.history(log)
    assert line == told
    assert set(json.loads(log.read_text())) >= {"date", "machine", "suite", "runs", "cases", "alarms", "stated"}
    assert (told.runs, told.cases, told.verdict) == (1, 2, "kept")
    record = gate_record.read(tmp_path / "runs" / "a-a-001.json")
    assert {one.stage for one in record.trials} >= {SCREEN}
    assert told.spread == pytest.approx(np.std([one.d for one in record.trials if one.stage == SCREEN], ddof=1))
    log.write_text(log.read_text() + "{}\n")
    with pytest.raises(SpecError, match=r"gate.jsonl:2: holds no self-test"):
        self_test.history(log)


def test_evidence_tells_both_directions() -> None:
    slower, faster = Evidence.of([0.2] * 6), Evidence.of([-0.2] * 6)
    assert (slower.slower, slower.faster, slower.direction(0.05)) == (1 / 64, 1.0, 1)
    assert (faster.slower, faster.faster, faster.direction(0.05)) == (1.0, 1 / 64, -1)
    assert slower.direction(0.01) == 0  # six restarts cannot be as sure as that
