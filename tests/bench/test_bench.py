"""The bench: every summary is recomputable from the raw rounds, and no backend is timed that is not conformant."""

from __future__ import annotations

import gc
import math
import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from scipy import stats

from kvconform.bench import client, eligibility, engine, runner
from kvconform.bench.analysis.intervals import ALPHA, MIN_SAMPLES, T95, interval, rank, reaches, student, t95
from kvconform.bench.analysis.ratios import pairs
from kvconform.bench.analysis.summarize import summarise
from kvconform.bench.client import TimingClient
from kvconform.bench.eligibility import conformance, outdated
from kvconform.bench.presets import PRESETS, Preset, Published
from kvconform.bench.protocol import ROUNDS_WANTED, processors, variables
from kvconform.bench.record import MACHINE, PHASES, Arm, Case, Once, Record, Round, Tokens, is_record, read
from kvconform.bench.worker.timer import Block, Timer, tokens
from kvconform.cli import bench
from kvconform.results.results import Results
from kvconform.worker.client import WorkerSpec
from kvconform_backends.numpy.cache import NumpyCache
from kvconform_reports.view.findings import Findings
from kvconform_specs.claims import Claims
from kvconform_specs.config import Config
from kvconform_specs.tensors import weights

TINY = Preset(
    "tiny",
    Config("decoder", heads=4, kv_heads=2, head_dim=6, width=10, vocabulary=13, positions="rope", capacity=30),
    depths=(7, 12),
    prompts=(9,),
    about="as small as it can be",
    generate=(5, 6),
)
BATCHES = replace(TINY, name="batches", batches=(1, 3))
ONE = Preset("one", TINY.config, depths=(12,), prompts=(9,), about="one depth")

SUBJECTS = '''
import os, time
from dataclasses import replace
import numpy as np
from kvconform_backends.numpy.cache import NumpyCache
from kvconform_specs.claims import Claims

class Sleepy(NumpyCache):
    def decode(self, cache, tokens):
        time.sleep(0.002)
        return super().decode(cache, tokens)

class Twice(Sleepy):
    """Does all its work twice."""
    def step(self, cache, *inputs, **more):
        super().step(cache, *inputs, **more)
        return super().step(cache, *inputs, **more)

class SeesTheFuture(NumpyCache):
    def mask(self, t, s):
        return np.ones((t, s), bool)

class ForgetsToForget(NumpyCache):
    """Its steps go on behind what was cut off, once the cache is deeper than any conformance run goes."""
    def positions(self, cache, t):
        return np.arange(cache.length, cache.length + t) + (cache.length == 12)

class WrongWithoutCache(NumpyCache):
    def uncached_forward(self, *inputs, **more):
        return super().uncached_forward(*inputs, **more) * np.float32(1.01)

class DiesLater(NumpyCache):
    """Right until it has been asked often."""
    asked = 0
    def step(self, cache, *inputs, **more):
        self.asked += 1
        if self.asked > 120:
            os._exit(3)
        return super().step(cache, *inputs, **more)

class FallsBack(NumpyCache):
    """Ends on another engine than its name says, and tells when it is asked for the second time."""
    asked = 0
    def runtime_info(self):
        self.asked += 1
        return {"fallback": "numpy ran instead"} if self.asked > 1 else {}

class TwoThreads(NumpyCache):
    def runtime_info(self):
        return {"threads": 2}

class TellsItsVariables(NumpyCache):
    def runtime_info(self):
        return {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "GLIBC_TUNABLES")}

class TellsItsProcessors(NumpyCache):
    def runtime_info(self):
        return {"processors": sorted(os.sched_getaffinity(0))}

class TellsItsProcessors2(TellsItsProcessors):
    pass

class NoFull(NumpyCache):
    claims = Claims(profiles=("decoder",), abilities=("length", "truncate"))

class OneAtATime(NumpyCache):
    """One sequence lives in it, as in a module's buffers: a new one ends the one before."""
    claims = replace(NumpyCache.claims, max_sequences=1)
    live = None
    def start(self, batch):
        self.live = super().start(batch)
        return self.live
    def step(self, cache, *inputs, **more):
        assert cache is self.live
        output, self.live = super().step(cache, *inputs, **more)
        return output, self.live
    def truncate(self, cache, length):
        self.live = super().truncate(cache, length)
        return self.live
    def length(self, cache):
        return super().length(self.live)

class ShortOfBreath(NumpyCache):
    claims = Claims(profiles=("decoder",), max_chunk=4)

class FewSizes(NumpyCache):
    claims = Claims(profiles=("decoder",), max_chunk=16, static_shapes=(1, 16))

class Attention(NumpyCache):
    claims = Claims(profiles=("attention",))
'''


@pytest.fixture
def timed(tmp_path: Path) -> Any:
    """Times backends of ``SUBJECTS`` by name, the plain numpy cache as ``numpy``, on small presets."""
    file = tmp_path / "timed.py"
    file.write_text(SUBJECTS)

    def run(*names: str, preset: Preset = ONE, per_case: float = 0.2, restarts: int = 1, **more: Any) -> Record:
        launches = {name: WorkerSpec("numpy" if name.startswith("numpy") else f"{file}:{name}") for name in names}
        fields = {name: more.pop(name) for name in ("time_limit", "seed", "threads", "say") if name in more}
        options = engine.Options(tmp_path / "speed.json", per_case, **fields)
        return runner.bench(launches, {preset.name: preset}, options, restarts=restarts, **more)

    return run


def backends_timed(record: Record) -> set[str]:
    return {record.cases[block.case].arms[block.arm].backend for block in record.rounds} - {MACHINE}


def summarised(record: Record) -> Record:
    """The same record, its summaries computed again from its raw rounds."""
    bare = msgspec.structs.replace(record, summaries=[], ratios=[], generations=[], roofs=[], exponents=[], notes=[])
    summarise(bare)
    return bare


# --- the numbers ---
def test_the_interval_of_a_median_is_the_narrowest_pair_of_order_statistics_that_covers_it() -> None:
    for n in range(1, 300):
        j = rank(n)
        # the median is outside the j-th smallest and the j-th largest if fewer than j samples lie on one side of it
        missed = 2 * stats.binom.cdf(np.array([j - 1, j]), n, 0.5)
        assert missed[0] <= ALPHA if j else n < MIN_SAMPLES
        assert missed[1] > ALPHA
    assert (MIN_SAMPLES, rank(5), rank(6)) == (6, 0, 1)
    assert rank(100) == 40  # the 40th and the 61st, the textbook's


def test_the_interval_of_a_median_is_that_of_the_exact_sign_test() -> None:
    samples = np.random.default_rng(0).normal(size=50)
    _, low, high = interval(list(samples))
    inside = np.nextafter(low, high), np.nextafter(high, low)
    outside = np.nextafter(low, -np.inf), np.nextafter(high, np.inf)
    assert all(stats.quantile_test(samples, q=x, p=0.5).pvalue > ALPHA for x in inside)
    assert all(stats.quantile_test(samples, q=x, p=0.5).pvalue <= ALPHA for x in outside)


@pytest.mark.parametrize("n", [6, 11, 60])
def test_the_interval_covers_the_median_as_often_as_it_says(n: int) -> None:
    trials, rng = 4000, np.random.default_rng(n)
    samples = np.exp(rng.normal(size=(trials, n)))  # log-normal: its median is 1, its mean is not
    covered = sum(low <= 1.0 <= high for _, low, high in (interval(list(row)) for row in samples))
    slack = 4 * math.sqrt(ALPHA * (1 - ALPHA) / trials)  # four standard deviations of the binomial count: p < 4e-5
    assert covered / trials >= 1 - ALPHA - slack


def record_of(arms: list[Arm], *restarts: list[list[int]], load: float = 0.5, steps: int = 1) -> Record:
    """One case, summarised; ``restarts[restart][round][arm]`` nanoseconds."""
    record = Record(
        suite="1",
        started="",
        device="cpu",
        machine={"cores": 2},
        software={},
        protocol={},
        load=[0.0, load],
        presets={"p": TINY.to_json()},
        cases=[Case("p", 8, 1, arms, steps)],
        rounds=[
            Round(0, restart, r, 0, arm, value, 0, 0)
            for restart, ns in enumerate(restarts)
            for r, row in enumerate(ns)
            for arm, value in enumerate(row)
        ],
    )
    summarise(record)
    return record


PAIR = [Arm("a", "decode"), Arm("b", "decode")]


def test_ratios_are_paired_within_rounds_and_times_are_per_step() -> None:
    slower = [[100 * 3**r, 200 * 3**r] for r in range(7)]  # each round three times slower
    record = record_of(PAIR, slower, slower, steps=4)
    (ratio,) = record.ratios
    assert (ratio.arm, ratio.reference, ratio.n, ratio.restarts, ratio.valid) == (1, 0, 14, 2, True)
    assert [ratio.low, ratio.ratio, ratio.high] == pytest.approx([2.0, 2.0, 2.0])
    assert record.summaries[0].median == pytest.approx(100 * 3**3 / 4)


def test_an_interval_speaks_of_restarts_and_not_of_the_blocks_within_one() -> None:
    restarts = [[[100, 100 + 10 * shift]] * 60 for shift in (-1, 0, 1)]  # no noise within a restart at all
    (ratio,) = record_of(PAIR, *restarts).ratios
    logs = [math.log(1 + 0.1 * shift) for shift in (-1, 0, 1)]
    assert [math.log(x) for x in (ratio.ratio, ratio.low, ratio.high)] == pytest.approx(student(logs))
    assert ratio.spread == pytest.approx(np.std(logs, ddof=1))
    assert ratio.high / ratio.ratio > 1.2
    assert not ratio.valid


def test_student_covers_as_often_as_it_says_where_the_range_of_three_does_not() -> None:
    trials, rng = 4000, np.random.default_rng(3)
    draws = rng.normal(size=(trials, 3))
    covered = sum(low <= 0 <= high for _, low, high in map(student, draws.tolist())) / trials
    assert abs(covered - 0.95) < 4 * math.sqrt(0.05 * 0.95 / trials)
    assert np.mean((draws.min(1) <= 0) & (draws.max(1) >= 0)) < 0.78  # all that a bootstrap can reach: 1 - 2 / 2^3


def test_the_table_of_t_is_that_of_scipy() -> None:
    assert pytest.approx(stats.t.ppf(0.975, np.arange(1, len(T95) + 1)), abs=5e-4) == T95
    assert t95(500) == T95[-1]  # wider than it need be
    assert [round(t95(n - 1) / math.sqrt(n), 2) for n in (3, 5)] == [2.48, 1.24]  # as protocol.RESTARTS says


@pytest.mark.parametrize("n", [2, 3, 5, 10])
def test_the_interval_of_a_mean_is_that_of_scipy(n: int) -> None:
    values = np.random.default_rng(n).normal(1, 3, n)
    mean, low, high = student(list(values))
    wanted = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert mean == pytest.approx(values.mean())
    assert [low, high] == pytest.approx([wanted.low, wanted.high], rel=1e-3)  # the table has four digits


def test_a_quantile_is_told_where_the_samples_reach_beyond_it() -> None:
    assert [reaches(n, 0.9) for n in (63, 64)] == [False, True]
    assert [reaches(n, 0.99) for n in (661, 662)] == [False, True]


def test_times_between_tokens_are_those_of_the_generations() -> None:
    record = record_of([Arm("a", "generate")], [[1000]] * 2)
    record.cases[0] = msgspec.structs.replace(record.cases[0], new=4, batch=3)
    record.tokens = [Tokens(0, 0, 0, 0, [100, 110, 120, 190]), Tokens(0, 0, 1, 0, [300, 310, 330, 360])]
    summarise(record)
    (made,) = record.generations
    assert (made.ttft, made.tpot, made.itl, made.itl_p99) == (200, 25, 15, None)
    assert made.throughput == pytest.approx(3e9 / 25)


@pytest.mark.parametrize(
    ("record", "why"),
    [
        (record_of(PAIR, [[100, 100]] * 50), "one start of the workers"),
        (record_of(PAIR, *([[100, 100 + 20 * r]] for r in range(3))), "half-width is 42%, over 10%"),
        (record_of(PAIR, *([[100, 100 + 50 * r]] * 9 for r in range(9))), "restarts differ by 54%"),
        (record_of(PAIR, [[100, 100]], [[100, 100]], load=4.1), "the load average was 4.1 on 2 cores"),
    ],
)
def test_a_ratio_that_means_nothing_says_why(record: Record, why: str) -> None:
    (ratio,) = record.ratios
    assert not ratio.valid
    assert why in ratio.why_invalid


def test_a_time_by_itself_that_means_nothing_says_why() -> None:
    sure, vague = record_of(PAIR, *([[100, 100 * (1 + r)]] * 9 for r in range(3))).summaries
    assert sure.why_invalid == ""
    assert "over 25%" in vague.why_invalid
    found = Findings(record_of(PAIR, *([[100, 100 * (1 + r)]] * 9 for r in range(3))))
    assert list(found.summaries) == [(0, 0)]
    assert found.timeless([(0, 1)]) == f"not valid: {vague.why_invalid}"


def test_tokens_of_a_block_with_a_slow_clock_do_not_count_and_the_reason_is_noted() -> None:
    record = record_of([Arm("a", "generate")], [[1000]] * 2)
    record.cases[0] = msgspec.structs.replace(record.cases[0], new=3)
    record.machine["default_mhz"] = 1000
    record.rounds = [
        msgspec.structs.replace(one, sm_mhz=1000 - 600 * one.round, throttle=0x4 * one.round) for one in record.rounds
    ]
    record.tokens = [Tokens(0, 0, 0, 0, [100, 110, 120]), Tokens(0, 0, 1, 0, [900, 990, 1080])]
    summarise(record)
    (made,) = record.generations
    assert (made.ttft, made.tpot) == (100, 10)
    assert record.notes == [
        "1 of 2 blocks ran below 75% of the device's default clock and are left out",
        "after 1 of 2 blocks the device's clock was reduced: power cap",
    ]


def test_a_record_notes_how_many_blocks_a_slow_clock_took_and_device_times_of_two_kinds() -> None:
    record = record_of(PAIR, *([[100, 100]] * 9 for _ in range(2)))
    record.presets, record.machine["default_mhz"] = {"p": {}}, 1000
    record.software = {
        "a": {"runtime_info": {"p": {"device_time": ["graph"]}}},
        "b": {"runtime_info": {"p": {"device_time": ["cupti"]}}},
    }
    summarise(record)
    assert record.notes == []  # nobody asked for device times, and no clock is known
    record.rounds = [
        msgspec.structs.replace(one, device_ns=90, sm_mhz=749 if one.round == 0 else 750) for one in record.rounds
    ]
    summarise(record)
    told = record.notes
    record.software["b"]["runtime_info"]["p"]["device_time"] = ["graph"]
    summarise(record)
    assert record.notes[1:] == ["p: device times of a, b: graph"]
    assert told == [
        "4 of 36 blocks ran below 75% of the device's default clock and are left out",
        "p: device times were measured in different ways: a: graph; b: cupti",
    ]


def test_arms_are_set_against_the_first_of_their_phase_and_decode_against_its_own_recompute() -> None:
    arms = [Arm("a", "decode"), Arm("b", "decode"), Arm("b", "recompute"), Arm("c", "recompute")]
    ratios = record_of(arms, [[10, 20, 40, 80]] * 6).ratios
    assert {(r.arm, r.reference): round(r.ratio, 9) for r in ratios} == {(3, 2): 2, (1, 2): 0.5}
    alone = record_of(arms[:2], [[10, 20]] * 6).ratios
    assert {(r.arm, r.reference): round(r.ratio, 9) for r in alone} == {(1, 0): 2}
    three = [Arm(name, "decode") for name in ("a", "b", "c")]
    assert pairs(Case("p", 8, 1, three, 1)) == [(1, 0), (2, 0)]
    assert pairs(Case("p", 8, 1, three, 1), ["b"]) == [(1, 0), (2, 0), (2, 1)]
    both = [Arm("a", "generate"), Arm("a", "regenerate"), Arm("a", "regenerate-last"), Arm(MACHINE, "read")]
    loops = record_of(both, [[10, 40, 20, 1]] * 6).ratios
    assert {(r.arm, r.reference): round(r.ratio, 9) for r in loops} == {(0, 1): 0.25, (0, 2): 0.5}


@pytest.mark.slow
def test_summaries_and_ratios_of_a_written_record_are_those_of_its_raw_rounds(timed: Any, tmp_path: Path) -> None:
    written = timed("numpy", "numpy-again", "Sleepy", preset=TINY, restarts=2)
    record = read(tmp_path / "speed.json")
    assert record.finished
    assert len(record.rounds) > 100
    assert {block.restart for block in record.rounds} == {0, 1}
    assert record == written == summarised(record)
    # at two depths decode beside two ceilings, then three phases; one prefill; a generation, and one with both loops
    assert len(record.summaries) == 2 * (3 + 2) + 2 * 9 + 3 + 3 + 9
    assert len(record.generations) == 3 + 9
    assert len(record.roofs) == 2 * 3
    assert {one.phase for one in (arm for case in record.cases for arm in case.arms)} == set(PHASES)
    assert {(one.backend, one.restart) for one in record.once} == {
        (name, restart) for name in ("numpy", "numpy-again", "Sleepy") for restart in (0, 1)
    }
    assert all(one.reported == one.analytic for one in record.memory)
    assert is_record(tmp_path / "speed.json")


# --- the rounds ---
@pytest.mark.slow
def test_work_done_twice_takes_twice_the_time(timed: Any) -> None:
    record = timed("Sleepy", "Twice", per_case=1.0, restarts=2)
    for ratio in record.ratios:
        case = record.cases[ratio.case]
        arm, reference = case.arms[ratio.arm], case.arms[ratio.reference]
        if (arm.backend, reference.backend, arm.phase) == ("Twice", "Sleepy", "decode"):
            assert ratio.low / 1.03 <= 2 <= ratio.high * 1.03  # the second time finds warm caches: up to 3 % is real
            assert 1.7 < ratio.ratio < 2.3
            return
    pytest.fail("the ratio is not there")


@pytest.mark.slow
def test_in_each_round_every_arm_runs_once_in_an_order_that_varies(timed: Any) -> None:
    record = timed("numpy", "numpy-again", "Sleepy")
    rounds: dict[tuple[int, int], list[Round]] = {}
    for block in record.rounds:
        rounds.setdefault((block.case, block.round), []).append(block)
    orders = Counter()
    for (case, _), blocks in rounds.items():
        arms = range(len(record.cases[case].arms))
        assert sorted(block.arm for block in blocks) == list(arms)
        assert [block.place for block in blocks] == list(arms)
        orders[case, tuple(block.arm for block in blocks)] += 1
    assert {case for case, _ in orders} == {0, 1, 2}
    assert all(len([o for o in orders if o[0] == case]) > 3 for case in (0, 1))


@pytest.mark.slow
def test_a_case_has_the_same_steps_for_all_arms_and_fits_the_capacity(timed: Any) -> None:
    record = timed("numpy", "NoFull", preset=Preset("p", TINY.config, (28,), (28,), "two tokens of room"))
    decode = next(case for case in record.cases if case.arms[0].phase == "decode")
    assert decode.depth + decode.steps <= TINY.config.capacity


IDS = tokens(ONE.config, 5)


class Spy(NumpyCache):
    """Notes for each call how long the cache was, how many tokens came, and whether the clock ran (no collection)."""

    def __init__(self) -> None:
        super().__init__(ONE.config, weights(ONE.config))
        self.calls: list[tuple[int, int, bool]] = []
        self.fed: list[int] = []

    def step(self, cache: Any, *inputs: Any, **more: Any) -> Any:
        self.calls.append((cache.length, inputs[0].shape[1], not gc.isenabled()))
        self.fed += list(inputs[0][0]) if self.calls[-1][2] else []
        return super().step(cache, *inputs, **more)


@pytest.mark.parametrize("truncates", [True, False])
def test_decode_runs_at_the_depth_that_it_says(truncates: bool) -> None:
    spy = Spy()
    if not truncates:
        spy.claims = Claims(profiles=("decoder",), abilities=("length",))
    blocks = Timer(spy, IDS).blocks("decode", 12, 3, 4)
    assert [call[:2] for call in spy.calls if call[2]] == [(12, 1), (13, 1), (14, 1)] * 4
    prefills = [(0, 11, False)] * (1 if truncates else 4)
    assert [call for call in spy.calls if not call[2] and call[1] > 1] == prefills
    assert spy.fed == list(IDS[0, 12:15]) * 4
    assert len(blocks) == 4
    assert all(block.ns > 0 for block in blocks)


def test_prefill_starts_from_nothing_and_recompute_takes_all_tokens() -> None:
    spy = Spy()
    timer = Timer(spy, IDS)
    timer.blocks("prefill", 9, 2, 1)
    assert spy.calls == [(0, 9, True)] * 2
    timer.blocks("recompute", 12, 1, 1)
    assert spy.calls[2:] == [(0, 13, True)]


def test_a_backend_that_reports_a_wrong_length_is_not_timed() -> None:
    spy = Spy()
    spy.length = lambda cache: [3]  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match=r"reports the length \[3\] after 13 tokens"):
        Timer(spy, IDS).blocks("decode", 12, 1, 1)


# --- no time without conformance ---
def test_a_backend_without_complete_results_is_judged_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def results(name: str, finished: bool) -> None:
        common = {"suite": "1", "device": "cpu", "dtypes": [], "effort": "smoke", "seed": 0, "started": ""}
        Results(**common, backend=name, finished=finished).write(tmp_path / f"{name}.json")

    results("done", True)
    results("cut", False)
    (tmp_path / "broken.json").write_text("{")  # the bench reports it
    asked: list[str] = []
    lines: list[str] = []
    monkeypatch.setattr(bench, "run_backend", lambda name, spec, plan, out: asked.append(name))
    bench._judge({name: WorkerSpec(name) for name in ("done", "cut", "broken", "absent")}, tmp_path, lines.append)
    assert asked == ["cut", "absent"]
    assert [line.partition(":")[0] for line in lines] == asked


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("SeesTheFuture", "not conformant on the timed inputs: prefill(9): position"),
        ("ForgetsToForget", "not conformant on the timed inputs: decode(12): position 12"),
        ("WrongWithoutCache", "not conformant on the timed inputs: recompute(12): position"),
        ("DiesLater", "the process ended with exit status 3"),
        ("FallsBack", "not what its name says: numpy ran instead"),
        ("TwoThreads", "ran on 2 threads, not on 1"),
        ("ShortOfBreath", "claims no append of more than 4 tokens, the preset needs 12"),
        ("FewSizes", "claims no append of 9 tokens, which the preset needs"),
        ("Attention", "claims no decoder profile"),
        ("Missing", "has no 'Missing'"),
    ],
)
def test_a_backend_that_is_not_right_gets_no_time_and_is_listed(name: str, why: str, timed: Any) -> None:
    record = timed("numpy", name, "numpy-again", per_case=0.2)
    assert record.finished
    assert backends_timed(record) == {"numpy", "numpy-again"}
    assert name not in {arm.backend for case in record.cases for arm in case.arms}
    assert [(one.backend, one.preset) for one in record.excluded] == [(name, "one")]
    assert why in record.excluded[0].why
    assert len(record.cases) == 3
    assert all(len(case.arms) in (2, 4, 6) for case in record.cases)
    assert all(block.arm < len(record.cases[block.case].arms) for block in record.rounds)


def test_a_backend_without_conformance_results_gets_no_time(tmp_path: Path) -> None:
    options = engine.Options(tmp_path / "speed.json", results_dir=tmp_path)
    record = runner.bench({"numpy": WorkerSpec("numpy")}, {"one": ONE}, options)
    assert record.rounds == []
    assert record.excluded[0].why.startswith("no conformance results:")


def test_results_admit_only_what_is_conformant_finished_and_of_this_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvconform_specs import SUITE_VERSION

    def said(**fields: Any) -> str:
        common = {"suite": SUITE_VERSION, "backend": "b", "device": "cpu", "dtypes": [], "effort": "", "seed": 0}
        Results(**{**common, "started": "", "finished": True, **fields}).write(tmp_path / "b.json")
        return conformance("b", WorkerSpec("b"), tmp_path)

    assert "core clauses" in said()
    monkeypatch.setattr(Results, "ok", True)
    assert "no PASS on the core clauses" in said()
    monkeypatch.setattr(eligibility, "missing_core", lambda results, profile: [])
    assert said() == ""
    assert "not finished" in said(finished=False)
    assert "of device cuda, not cpu" in said(device="cuda")
    assert "of suite 0" in said(suite="0")

    def past(same_file: bool = True, **environment: str) -> str:
        said(environment={"torch": "2.11.0", "source": "aa", "hypothesis": "6"})
        return outdated("b", tmp_path, environment, same_file=same_file)

    assert past(torch="2.11.0", source="aa", numpy="2.4.6") == ""
    assert "are of torch 2.11.0, this is 2.13.0: judge it again (kvconform run -b b)" in past(torch="2.13.0")
    assert "are of another state of its file" in past(source="bb")
    assert past(source="bb", same_file=False) == ""


def test_results_of_other_software_do_not_allow_timing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eligibility, "conformance", lambda *args: "")

    def excluded(environment: dict[str, Any]) -> list[str]:
        common = {"suite": "1", "device": "cpu", "dtypes": [], "effort": "smoke", "seed": 0, "started": ""}
        Results(**common, backend="numpy", environment=environment).write(tmp_path / "numpy.json")
        options = engine.Options(tmp_path / "speed.json", 0.05, tmp_path)
        specs, presets = {"numpy": WorkerSpec("numpy")}, {"one": ONE}
        record = runner.bench(specs, presets, options, restarts=1, phases=("prefill",))
        assert bool(record.rounds) != bool(record.excluded)
        return [one.why for one in record.excluded]

    assert excluded({}) == []
    (why,) = excluded({"numpy": "1.0"})
    assert f"are of numpy 1.0, this is {np.__version__}" in why


@pytest.mark.slow
def test_a_backend_without_a_full_forward_recomputes_by_a_prefill_and_the_record_says_so(timed: Any) -> None:
    record = timed("numpy", "NoFull")
    assert record.excluded == []
    assert {(arm.backend, arm.phase) for case in record.cases for arm in case.arms} == {
        *((name, phase) for name in ("numpy", "NoFull") for phase in ("decode", "recompute", "prefill")),
        ("numpy", "recompute-last"),
        (MACHINE, "read"),
        (MACHINE, "multiply"),
    }
    assert record.software["numpy"]["recompute"] == "uncached forward"
    assert record.software["NoFull"]["recompute"] == "prefill of all tokens"


def test_a_generation_is_run_as_often_as_the_published_one(timed: Any) -> None:
    loop = ("generate", "regenerate")
    known = Published("4 tokens", "1 s", "2 s", 2.0, "here", "somewhere", "numpy", loop, (), runs=5)
    preset = replace(ONE, generate=(4, 4), published=(known,))
    record = timed("numpy", preset=preset, restarts=2, per_case=0.0, phases=("generate",))
    (case,) = {block.case for block in record.rounds}
    assert record.cases[case].new == 4
    assert len(record.rounds) == 2 * 3  # 5 runs in 2 restarts
    assert record.protocol["phases"] == ["generate"]


@pytest.mark.slow
def test_a_time_limit_takes_precedence_over_the_published_runs(timed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "MIN_SECONDS", 1.0)
    known = Published("4 tokens", "1 s", "2 s", 2.0, "here", "somewhere", "numpy", ("generate",), (), runs=40_000)
    preset = replace(ONE, generate=(4, 4), published=(known,))
    record = timed("numpy", preset=preset, restarts=2, phases=("generate",), time_limit=1e-3)
    assert 0 < len(record.rounds) < 20_000  # a second a restart
    assert record.protocol["seconds"] == 1e-3


@pytest.mark.slow
def test_a_time_limit_leaves_out_cases_that_would_have_too_few_rounds_and_the_record_lists_them(
    timed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of Sleepy takes 2 ms: six prefills fit into 0.29 s, six generations of 25 tokens do not."""
    monkeypatch.setattr(runner, "MIN_SECONDS", 0.29)
    preset, lines = replace(ONE, depths=(12,), generate=(4, 25)), list[str]()
    phases = ("prefill", "generate")
    record = timed("Sleepy", preset=preset, restarts=2, time_limit=1e-3, phases=phases, say=lines.append)
    assert [(case.arms[0].phase, case.depth) for case in record.cases] == [("prefill", 9)]
    (left_out,) = record.excluded
    assert (left_out.backend, left_out.preset, left_out.phase) == ("", "one", "generate at 4")
    assert left_out.why == "the time limit leaves 0.29 s a restart, which is too little"
    assert {block.restart for block in record.rounds} == {0, 1}
    rounds = Counter((block.case, block.arm, block.restart) for block in record.rounds)
    assert min(rounds.values()) >= ROUNDS_WANTED
    assert any("left out: generate at 4" in line for line in lines)


@pytest.mark.slow
def test_no_restart_begins_without_cases_or_after_the_time_limit(timed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "MIN_SECONDS", 0.5)
    starts = Counter[str]()
    start = engine.Restart.start
    monkeypatch.setattr(engine.Restart, "start", lambda self, *args: starts.update("x") or start(self, *args))
    record = timed("Sleepy", preset=ONE, restarts=9, time_limit=1e-3, phases=("prefill",))
    assert starts.total() == 2
    assert {block.restart for block in record.rounds} == {0, 1}
    monkeypatch.setattr(runner, "MIN_SECONDS", 1e-6)
    record = timed("Sleepy", preset=ONE, restarts=9, time_limit=1e-3, phases=("prefill",))
    assert starts.total() == 3
    assert record.rounds == []


def test_a_later_start_is_expected_to_take_what_the_first_took_without_exports_and_compilations() -> None:
    run = runner._Bench({}, [ONE], engine.Options(Path("x"), 1.0, time_limit=100.0), 3, (), lambda *_: None)
    run.starts = {("one", 0): 60.0}
    run.record.once = [Once("one", "a", 0, 2.0, 30.0, {"decode(12)": 20.0})]
    assert run._start_seconds() == pytest.approx(10)
    cases = len(run.plans["one"])
    assert run.case_seconds() == pytest.approx((100 - 2 * 10) / (3 * cases), rel=0.01)
    run.starts["one", 1] = 14.0
    assert run._start_seconds() == 14


def test_a_device_that_is_not_the_processor_has_none_of_its_ceilings(
    timed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    began = runner._Bench.time

    def elsewhere(run: Any, *args: Any) -> None:
        run.record.device = "cuda"
        began(run, *args)

    monkeypatch.setattr(runner._Bench, "time", elsewhere)
    record = timed("numpy", phases=("decode",))
    assert {arm.phase for case in record.cases for arm in case.arms} == {"decode"}
    assert record.rounds
    (roof,) = record.roofs
    assert (roof.floor, roof.fraction) == (None, None)
    assert roof.bytes_expected
    assert "ceilings are the processor's" in roof.flag


def test_a_block_of_a_worker_of_another_version_is_understood_by_its_names() -> None:
    older = {"ns": 5, "cpu_ns": 4, "nivcsw": 1, "device_ns": 0, "sm_mhz": 1200, "tokens": [3, 5]}
    assert client._block(older) == Block(5, 4, 1, sm_mhz=1200, tokens=(3, 5))
    with pytest.raises(TypeError, match="cpu_ns"):
        client._block({"ns": 5, "tokens": []})


def test_filling_the_caches_takes_no_rounds_away(timed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    warm = TimingClient.warm
    monkeypatch.setattr(TimingClient, "warm", lambda *args: time.sleep(0.2) or warm(*args))
    record = timed("numpy", per_case=0.05, phases=("decode",))
    rounds = Counter((block.case, block.arm) for block in record.rounds)
    assert rounds
    assert all(count >= ROUNDS_WANTED for count in rounds.values()), rounds


@pytest.mark.slow
def test_what_holds_one_sequence_at_a_time_is_timed_at_every_batch(timed: Any) -> None:
    record = timed("OneAtATime", preset=BATCHES)
    assert record.excluded == []
    assert {case.batch for case in record.cases} == {1, 3}


def test_every_worker_gets_the_same_threads_before_it_starts(timed: Any) -> None:
    record = timed("TellsItsVariables", threads=3)
    seen = record.software["TellsItsVariables"]["runtime_info"]["one"]
    assert {"OMP_NUM_THREADS": "3", "MKL_NUM_THREADS": "3"}.items() <= seen.items()
    assert record.protocol["threads"] == 3
    assert seen["GLIBC_TUNABLES"] == record.protocol["variables"]["GLIBC_TUNABLES"] != ""


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the system does not report its processors")
def test_all_workers_of_a_restart_share_a_processor_and_the_next_restart_has_another(
    timed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = sorted(os.sched_getaffinity(0))
    record = timed("TellsItsProcessors", "TellsItsProcessors2")
    seen = [
        record.software[name]["runtime_info"]["one"]["processors"]
        for name in ("TellsItsProcessors", "TellsItsProcessors2")
    ]
    assert seen == ([mine[:1]] * 2 if len(mine) > 1 else [mine] * 2)
    assert sorted(os.sched_getaffinity(0)) == mine  # the controller goes wherever it went
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5, 8})
    assert [processors(1, number) for number in range(4)] == [(3,), (5,), (8,), (3,)]
    assert [processors(2, number) for number in range(2)] == [(3, 5), (8, 3)]
    assert processors(3, 0) is None


def test_large_allocations_of_a_timed_worker_lie_on_huge_pages_unless_the_caller_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for own, wanted in (
        ("", "glibc.malloc.hugetlb=1"),
        ("glibc.malloc.check=1", "glibc.malloc.check=1:glibc.malloc.hugetlb=1"),
        ("glibc.malloc.hugetlb=0", "glibc.malloc.hugetlb=0"),
    ):
        monkeypatch.setenv("GLIBC_TUNABLES", own)
        assert variables(2)["GLIBC_TUNABLES"] == wanted
    monkeypatch.delenv("GLIBC_TUNABLES")
    assert variables(2)["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"


@pytest.mark.slow
def test_times_of_a_machine_that_changes_are_taken_out_and_a_gpu_beside_it_is_no_change(
    timed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def held(device: str) -> Iterator[dict[str, Any]]:
        yield {"gpu": "one"}

    monkeypatch.setattr(engine, "held", held)
    assert timed("numpy", restarts=2).excluded == []
    seen = iter([{"cores": 2}, {"cores": 2}])
    monkeypatch.setattr(engine, "machine", lambda: next(seen, {"cores": 1}))
    record = timed("numpy", restarts=3)
    assert record.rounds == record.cases == []
    assert [one.why for one in record.excluded] == ["the machine changed during the run"]


# --- interrupted ---
@pytest.mark.slow
@pytest.mark.parametrize("blocks", [200, 500])
def test_an_interrupt_keeps_what_was_measured(
    blocks: int, timed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, real = Counter(), TimingClient.blocks

    def interrupted(self: TimingClient, *args: Any, **more: Any) -> Any:
        asked["blocks"] += 1
        if asked["blocks"] > blocks:
            raise KeyboardInterrupt
        return real(self, *args, **more)

    monkeypatch.setattr(TimingClient, "blocks", interrupted)
    lines: list[str] = []
    record = timed("numpy", "numpy-again", preset=TINY, per_case=60.0, say=lines.append)
    assert not record.finished
    assert "interrupted" in lines[-1]
    assert record.rounds
    assert read(tmp_path / "speed.json") == record
    assert record == summarised(record)


def test_the_presets_are_legal_and_named() -> None:
    assert {name: preset.name for name, preset in PRESETS.items()} == {name: name for name in PRESETS}
    with pytest.raises(ValueError, match="no room for a step at 30 of 30 tokens"):
        Preset("full", TINY.config, (30,), (), "")
