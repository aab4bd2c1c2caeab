"""The proof of the stopwatch: planted slowdowns are what they say, rules are what their sources say, and the page holds
what the samples hold."""

from __future__ import annotations

import dataclasses
import math
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from xml.etree import ElementTree

import msgspec
import numpy as np
import pytest
from timing import analyse as trials
from timing import collect as proofs
from timing import page as stopwatch
from timing import rules, slowed
from timing.analyse import AFTER, COMPARED, EQUAL, NEEDED, REFERENCE, ROUNDS, SLOWED, Pool
from timing.collect import ADDRESSES, PLANTED, Proof, Restart, Series, collect, others, packed, read, unpacked
from timing.slowed import Slowed

from kvconform.bench.gate.self_test import SelfTest, history
from kvconform.bench.gate.sign_flip import RATE
from kvconform.bench.protocol import ENOUGH_ROUNDS
from kvconform_backends.numpy.cache import NumpyCache
from kvconform_specs.config import Config
from kvconform_specs.tensors import weights

ROOT = Path(__file__).parents[2]
SMALL = Config("decoder", heads=2, kv_heads=1, head_dim=8, layers=1, width=16, mlp=16, vocabulary=32, positions="rope")
MILLISECOND = 1_000_000


# --- planted slowdowns ---
def stepped(backend: NumpyCache, steps: int) -> list[np.ndarray]:
    cache, outputs = backend.start(1), []
    for token in range(steps):
        output, cache = backend.step(cache, np.array([[token]]))
        outputs.append(output)
    return outputs


def planted(share: float) -> type[Slowed]:
    found: type[Slowed] = getattr(slowed, ADDRESSES[share].partition(":")[2])
    return found


@pytest.mark.parametrize("share", ADDRESSES)
def test_a_slowed_decoder_gives_the_outputs_of_the_one_it_is_made_from(share: float) -> None:
    got = stepped(planted(share)(SMALL, weights(SMALL), "cpu"), 4)
    want = stepped(NumpyCache(SMALL, weights(SMALL), "cpu"), 4)
    assert all(np.array_equal(a, b) for a, b in zip(got, want, strict=True))


class Ticks:
    """A clock that each look moves on by so much."""

    def __init__(self, tick: int) -> None:
        self.now, self.tick = 0, tick

    def __call__(self) -> int:
        self.now += self.tick
        return self.now


@pytest.mark.parametrize("share", ADDRESSES)
def test_a_planted_share_is_exact_but_for_one_look_at_the_clock(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = planted(share)(SMALL, weights(SMALL), "cpu")
    clock = Ticks(7)
    monkeypatch.setattr(time, "thread_time_ns", clock)
    work = NumpyCache.step

    def step(self: NumpyCache, *given: object, **keywords: object) -> object:
        clock.now += 1000
        return work(self, *given, **keywords)  # type: ignore[arg-type]

    monkeypatch.setattr(NumpyCache, "step", step)
    stepped(backend, 20)
    said = backend.runtime_info()
    assert said["own_ns"] == 20 * 1007
    assert 0 <= said["extra_ns"] - share * said["own_ns"] < 7


def test_a_planted_share_is_added_on_the_clock_of_this_machine() -> None:
    backend = planted(0.20)(SMALL, weights(SMALL), "cpu")
    began = time.thread_time_ns()
    stepped(backend, 20)
    taken = time.thread_time_ns() - began
    assert 0.20 * backend.own_ns <= backend.extra_ns
    assert backend.own_ns + backend.extra_ns <= taken


# --- samples ---
def test_packed_samples_come_out_as_they_went_in() -> None:
    ns = [1, MILLISECOND, 2**32 - 1]
    assert unpacked(packed(ns)).tolist() == ns


@pytest.mark.parametrize("ns", [0, 2**32])
def test_samples_that_cannot_be_packed_are_refused(ns: int) -> None:
    with pytest.raises(ValueError, match="such a machine proves nothing"):
        packed([MILLISECOND, ns])


def test_an_interrupted_collection_keeps_its_samples_and_leaves_no_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(line: str) -> None:
        if line.startswith("busy 1/2"):
            raise KeyboardInterrupt
        assert line == "interrupted: what was measured is kept"

    beside: list[subprocess.Popen[bytes]] = []

    @contextmanager
    def watched(count: int) -> Iterator[None]:
        assert count == 1
        with others(count) as started:
            beside.extend(started)
            yield

    monkeypatch.setattr(proofs, "others", watched)
    monkeypatch.setattr(proofs, "WARM", 2)
    out = tmp_path / "proof.json"
    collect(out, restarts=2, rounds=3, alone=2, conditions=("busy",), tell=interrupt)
    assert [process.poll() is None for process in beside] == [False]
    held = read(out)
    assert [(one.condition, one.number) for one in held.restarts] == [("busy", 0)]
    (one,) = held.restarts
    assert [series.arm for series in one.series] == list(PLANTED)
    for series in one.series:
        assert (len(unpacked(series.rounds)), len(unpacked(series.alone))) == (3, 2)
        assert series.slowdown >= 1 + PLANTED[series.arm]
    assert held.software["numpy"] == np.__version__


def test_other_processes_end_with_the_block_that_they_are_for() -> None:
    with others(2) as started:
        assert [process.poll() for process in started] == [None, None]
    assert all(process.poll() is not None for process in started)


# --- the rules ---
STEADY = np.linspace(1.0, 1.001, 200) * MILLISECOND
"""Samples of one process on a machine without noise."""


@pytest.mark.parametrize("rule", rules.RULES, ids=lambda rule: rule.name)
def test_every_rule_sees_what_is_plain_and_nothing_where_nothing_is(rule: rules.Rule) -> None:
    assert rule.slower(STEADY, 1.2 * STEADY)
    assert not rule.slower(STEADY, STEADY)
    assert not rule.slower(1.2 * STEADY, STEADY)


THRESHOLDS = {rule.name: 0.05 for rule in rules.RULES} | {"mean of 10, +10 %": 0.10, "bootstrap interval": 0.01}
"""Mann–Whitney has none: it asks whether, not how much."""


@pytest.mark.parametrize("rule", [rule for rule in rules.RULES if rule.name != "Mann–Whitney"], ids=lambda r: r.name)
def test_a_rule_has_the_threshold_that_it_names(rule: rules.Rule) -> None:
    named = THRESHOLDS[rule.name]
    assert not rule.slower(STEADY, (1 + named - 0.001) * STEADY)
    assert rule.slower(STEADY, (1 + named + 0.001) * STEADY)


def test_timeit_takes_the_least_of_five_loops() -> None:
    assert rules.timeit(np.array([9.0, 1.0, 2.0, 4.0, 3.0, 3.0, 8.0, 8.0, 7.0, 7.0, 0.0])) == 3.0


def test_do_bench_takes_as_many_calls_as_fit_its_time() -> None:
    slow = np.full(200, 4.0 * MILLISECOND)
    assert len(rules.bench(slow)) == rules.DO_BENCH_NS // (4 * MILLISECOND)
    assert len(rules.bench(np.full(9, 1e12))) == 1


def test_mann_whitney_is_the_textbook_formula() -> None:
    # U = 8 of n m = 64: mean 32, variance 64 * 17 / 12; no ties
    a, b = np.arange(8.0), np.array([-0.5, 5.5, *range(8, 14)])
    u = sum((x < y) + 0.5 * (x == y) for x in a for y in b)
    z = (abs(u - 32) - 0.5) / math.sqrt(64 * 17 / 12)
    assert rules.mann_whitney(a, b) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=1e-12)
    assert rules.mann_whitney(np.ones(8), np.ones(8)) == 1.0


def test_the_usual_tests_hold_their_level_where_samples_are_independent() -> None:
    """So what they do wrong on processes is not their arithmetic: 1000 trials, five standard deviations."""
    drawn, trials_ = np.random.default_rng(5), 1000
    logs = drawn.normal(0, 0.02, size=(trials_, 2, 50))
    pairs = np.exp(logs) * MILLISECOND
    false = sum(rules.mann_whitney(a, b) < rules.ALPHA for a, b in pairs)
    assert abs(false - 50) < 5 * math.sqrt(1000 * 0.05 * 0.95)
    missed = sum(not low <= 1 <= high for low, high in (rules.bootstrap(a, b) for a, b in pairs))
    assert abs(missed - 50) < 5 * math.sqrt(1000 * 0.05 * 0.95)


# --- what follows from samples ---
def made(
    of: Callable[[int, str], tuple[float, float]],
    restarts: int = 2 * NEEDED,
    condition: str = "quiet",
    samples: int = 60,
) -> list[Restart]:
    """Restarts whose arms have log times as ``of`` gives them by number and arm: the middle of all samples, and how far
    they lie from it at most, to either side alike."""
    found = []
    for number in range(restarts):
        series = []
        for arm, share in PLANTED.items():
            middle, off = of(number, arm)
            logs = middle + off * np.resize([1.0, -1.0, 0.5, -0.5, 0.0], samples) * (1 if arm == REFERENCE else -1)
            ns = packed([round(10 * MILLISECOND * math.exp(x)) for x in logs])
            series.append(Series(arm, ns, ns, own_ns=MILLISECOND, extra_ns=round(share * MILLISECOND)))
        found.append(Restart(condition, number, 5.0, 2.5, 5.0, 0.5, series))
    return found


def proof(*restarts: Restart) -> Proof:
    return Proof(
        started="2026-11-22T00:00:00+00:00",
        machine={"cpu": "a CPU", "cores": 2},
        software={"numpy": "2.0.0", "python": "3.11.7"},
        restarts=list(restarts),
        seconds=600.0,
        protocol={"restarts": 2 * NEEDED, "rounds": 60, "alone": 60},
    )


def truth(arm: str) -> float:
    return math.log1p(PLANTED[arm])


def swinging(number: int, arm: str) -> tuple[float, float]:
    """Processes that differ by 3 % one way in even starts, the other way in odd ones, and hardly within themselves."""
    return truth(arm) + (0 if arm == REFERENCE else 0.03 * (-1) ** number), 1e-4


EXACT = Pool("quiet", made(lambda number, arm: (truth(arm), 1e-3)))
SWINGING = Pool("quiet", made(swinging))
GRAIN = 1e-7
"""Samples are whole nanoseconds of ten milliseconds: a logarithm is off by half of this for each of two."""


def test_samples_that_hold_the_truth_have_no_error_and_every_interval_holds_it() -> None:
    for error in trials.errors(EXACT):
        slack = 3e-3 if "least" in error.way else 1e-6  # least: one arm's scatter is mirrored
        assert all(off <= slack for off in error.rms.values()), error
    for coverage in trials.coverages(EXACT):
        if "starts" not in coverage.interval or "order" in coverage.interval:
            assert set(coverage.covered.values()) == {1.0}, coverage


def test_an_error_is_the_distance_from_what_was_planted() -> None:
    by_way = {error.way: error for error in trials.errors(SWINGING)}
    single = by_way["random rounds, median of paired log ratios, one start"]
    assert all(off == pytest.approx(0.03, abs=2 * GRAIN) for off in single.rms.values())
    assert by_way["B against a stored A: mean"].rms[EQUAL] == pytest.approx(0.03, abs=1e-6)
    six = by_way[f"the same, mean of {trials.GATED} starts"]
    assert all(off < 0.03 for off in six.rms.values())
    # half of the rounds' time for two of five arms, as 60 of 60 rounds were made; a start costs its share as well
    assert single.seconds == pytest.approx(2.5 * 2 / 5)
    assert six.seconds == pytest.approx(trials.GATED * (2.5 + 5.0) * 2 / 5)


def test_an_interval_within_a_start_knows_nothing_of_starts_and_ours_does() -> None:
    covered = {coverage.interval: coverage.covered for coverage in trials.coverages(SWINGING)}
    assert set(covered["one start: order statistics of its rounds"].values()) == {0.0}
    for count in (trials.REPORTED, trials.GATED):
        ours = covered[f"**{count} starts: Student's t over starts (ours)**"]
        # it misses where all starts of a draw swing one way: 2 C(16, n) / C(32, n)
        one_way = 2 * math.comb(NEEDED, count) / math.comb(2 * NEEDED, count)
        slack = 5 * math.sqrt(one_way * (1 - one_way) / trials.DRAWS)
        for arm in COMPARED:
            assert ours[arm] >= 1 - one_way - slack, (count, arm)


def test_the_gate_is_silent_on_swinging_starts_and_sees_what_is_planted_in_all() -> None:
    """On equal code its rate is at most the product of its levels: one of all these draws is expected at most."""
    assert round(2 * trials.DRAWS * RATE, 6) == 1
    share = trials.gate(SWINGING).share
    assert share[EQUAL] * 2 * trials.DRAWS <= 4  # P(Poisson(1) > 4) = 0.4 %
    assert share["+20 %"] > share["+5 %"]
    exact = trials.gate(EXACT).share
    assert [exact[arm] for arm in (EQUAL, "+10 %", "+20 %")] == [0, 1, 1]


def test_tests_on_the_samples_of_one_pair_cry_wolf_where_processes_differ() -> None:
    by_rule = {(one.rule, one.samples): one for one in trials.alarms(SWINGING)}
    for name in ("Mann–Whitney", "bootstrap interval"):
        for samples in (AFTER, ROUNDS):
            assert by_rule[name, samples].share[EQUAL] == 0.5  # both ways round: always wrong, in one direction
    assert by_rule["mean of 10, +10 %", AFTER].share[EQUAL] == 0.0
    assert {one.tried for key, one in by_rule.items() if "pingpong" not in key[0]} == {4 * NEEDED}


def test_the_stopping_rule_goes_on_while_the_interval_is_wide() -> None:
    wide = Pool("quiet", made(lambda number, arm: (truth(arm), 0.2), samples=90))
    assert trials.stopped(EXACT, EQUAL)[1].tolist() == [ENOUGH_ROUNDS] * 2 * NEEDED
    assert trials.stopped(wide, EQUAL)[1].tolist() == [90.0] * 2 * NEEDED


def test_too_few_restarts_are_refused() -> None:
    few = made(lambda number, arm: (0.0, 1e-3), restarts=NEEDED - 1)
    with pytest.raises(ValueError, match=f"condition quiet: {NEEDED - 1} restarts; the gate alone takes {NEEDED}"):
        trials.pools(proof(*few))


# --- the page ---
@pytest.fixture(scope="module")
def written() -> dict[str, str]:
    return stopwatch.render(proof(*SWINGING.restarts))


@pytest.fixture(scope="module")
def page(written: dict[str, str]) -> str:
    return written[""]


def test_the_page_names_every_rule_with_its_source(page: str) -> None:
    for rule in rules.RULES:
        assert f"- **{rule.name}**: {rule.words}" in page
        assert rule.source is None or f"({rule.source[0]})" in page


def test_the_page_prints_what_the_samples_say(page: str) -> None:
    row = re.search(r"^\| random rounds, .*$", page, re.MULTILINE)
    assert row is not None
    assert row[0].split(" | ")[1:] == ["1.00 s", *["3.0 %"] * 3, "3.0 % |"]
    row = re.search(r"^\| Mann–Whitney .*$", page, re.MULTILINE)
    assert row is not None
    assert row[0].startswith("| Mann–Whitney | 50 % |")
    assert f"Starts: {2 * NEEDED} quiet (nothing is added" in page
    assert "| quiet | 3.0 % in 2.00 s | 3.0 % in 1.00 s | 0 % to 50 % | " in page


def test_the_page_has_a_row_for_each_test_of_the_gate_against_itself() -> None:
    tests = [
        SelfTest(
            date="2026-01-02T03:04:05+00:00",
            machine={"cpu": "a cpu", "cores": 2},
            suite="1",
            backend="eager",
            presets=["small"],
            runs=20,
            cases=140,
            alarms=alarms,
            improvements=0,
            inconclusive=3,
            alarmed=alarms,
            stated=5e-4,
            p=1.0,
            simulated={"runs": 1000, "cases": 7000, "alarms": 2},
            bias=0.0,
            spread=0.021,
            verdict=verdict,
        )
        for alarms, verdict in ((0, "kept"), (4, "exceeded"))
    ]
    page = stopwatch.render(proof(*EXACT.restarts), tests)[""]
    for alarms, verdict in ((0, "kept"), (4, "exceeded")):
        row = f"| 20 | 140 | {alarms} | 0 | 3 | 2.1 % | 2 / 7000 | {verdict} |"
        assert f"| 2026-01-02 | a cpu, 2 cores | eager on small {row}" in page
    assert "--runs 20 --history docs/gate-history.jsonl" in page
    assert "against itself" not in stopwatch.render(proof(*EXACT.restarts))[""]


def test_other_samples_make_other_figures(page: str) -> None:
    other = stopwatch.render(proof(*EXACT.restarts))[""]
    tables = [[line for line in text.splitlines() if line.startswith("| random rounds")] for text in (page, other)]
    assert tables[0] != tables[1]


def test_a_page_from_a_busy_machine_says_so(page: str) -> None:
    """One worker runs at a time, besides the process of the busy condition: two cores are enough for a load of 3."""
    loaded = [msgspec.structs.replace(one, load=3.5) for one in SWINGING.restarts]
    assert stopwatch.BUSY_ANYWAY in stopwatch.render(proof(*loaded))[""]
    assert stopwatch.BUSY_ANYWAY not in page


def test_every_drawing_is_on_the_page_and_is_xml(written: dict[str, str]) -> None:
    for name, text in written.items():
        if name:
            assert f"]({name})" in written[""]
            assert ElementTree.fromstring(text).tag == "{http://www.w3.org/2000/svg}svg"


def test_every_start_is_a_dot(written: dict[str, str]) -> None:
    assert written[stopwatch.STARTS].count("<circle") == 3 * 2 * NEEDED


def test_the_page_in_the_documents_is_that_of_the_samples_beside_it() -> None:
    samples = ROOT / "docs" / "latency-proof.json"
    assert samples.stat().st_size < 1_000_000
    tests = history(ROOT / "docs" / stopwatch.HISTORY)
    for name, text in stopwatch.render(read(samples), tests).items():
        assert (ROOT / "docs" / (name or "latency.md")).read_text() == text, name or "latency.md"


def test_a_proof_survives_its_own_json() -> None:
    whole = proof(*made(swinging, restarts=1))
    assert msgspec.json.decode(msgspec.json.encode(whole), type=Proof) == whole


def test_rules_are_told_apart_by_their_names() -> None:
    assert len({rule.name for rule in rules.RULES}) == len(rules.RULES)
    assert all(dataclasses.is_dataclass(rule) for rule in rules.RULES)
    assert set(SLOWED) < set(PLANTED)
