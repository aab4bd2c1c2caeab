"""What the timing study computes from samples, and its page."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import msgspec
import numpy as np
import pytest
from timing import analyse, page
from timing.analyse import AFTER, COMPARED, EQUAL, NEEDED, REFERENCE, ROUNDS, SLOWED, Pool
from timing.collect import PLANTED, Restart, Series, Study, read
from timing.rules import RULES

from kvconform.bench.gate.decision import PROTOCOL, RATE
from kvconform.bench.gate.self_test import SelfTest, history
from kvconform.bench.protocol import ENOUGH_ROUNDS
from kvconform.files import write_versioned

ROOT = Path(__file__).parents[2]
MILLISECOND = 1_000_000


# --- what follows from samples ---
def made(
    of: Callable[[int, str], tuple[float, float]],
    restarts: int = 2 * NEEDED,
    condition: str = "quiet",
    samples: int = 60,
) -> list[Restart]:
    """Restarts with log times from ``of``, which gives for a number and an arm the middle of all samples and their
    largest distance from it; they are symmetric around the middle."""
    found = []
    for number in range(restarts):
        series = []
        for arm, share in PLANTED.items():
            middle, off = of(number, arm)
            logs = middle + off * np.resize([1.0, -1.0, 0.5, -0.5, 0.0], samples) * (1 if arm == REFERENCE else -1)
            ns = [round(10 * MILLISECOND * math.exp(x)) for x in logs]
            series.append(Series(arm, ns, ns, own_ns=MILLISECOND, extra_ns=round(share * MILLISECOND)))
        found.append(Restart(condition, number, 5.0, 2.5, 5.0, 0.5, series))
    return found


def study(*restarts: Restart) -> Study:
    return Study(
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
    """Processes that differ by 3 %, in one direction in even restarts and in the other in odd ones; little scatter."""
    return truth(arm) + (0 if arm == REFERENCE else 0.03 * (-1) ** number), 1e-4


EXACT = Pool("quiet", made(lambda number, arm: (truth(arm), 1e-3)))
SWINGING = Pool("quiet", made(swinging))
GRAIN = 1e-7
"""Samples are whole nanoseconds of ten milliseconds: a logarithm is off by half of this for each of two."""


def test_samples_that_hold_the_truth_have_no_error_and_every_interval_holds_it() -> None:
    for error in analyse.errors(EXACT):
        slack = 3e-3 if "minimum" in error.method else 1e-6  # the scatter of one arm is mirrored
        assert all(off <= slack for off in error.rms.values()), error
    for coverage in analyse.coverages(EXACT):
        if "restarts" not in coverage.interval or "order" in coverage.interval:
            assert set(coverage.covered.values()) == {1.0}, coverage


def test_an_error_is_the_distance_from_what_was_planted() -> None:
    by_method = {error.method: error for error in analyse.errors(SWINGING)}
    single = by_method["random rounds, median of paired log ratios, one restart"]
    assert all(off == pytest.approx(0.03, abs=2 * GRAIN) for off in single.rms.values())
    assert by_method["B against a stored A: mean"].rms[EQUAL] == pytest.approx(0.03, abs=1e-6)
    six = by_method[f"the same, mean of {analyse.GATED} restarts"]
    assert all(off < 0.03 for off in six.rms.values())
    # half of the rounds' time for two of five arms, as 60 of 60 rounds were made; starting costs its share as well
    assert single.seconds == pytest.approx(2.5 * 2 / 5)
    assert six.seconds == pytest.approx(analyse.GATED * (2.5 + 5.0) * 2 / 5)


def test_an_interval_within_a_restart_ignores_the_spread_of_restarts_and_ours_does_not() -> None:
    covered = {coverage.interval: coverage.covered for coverage in analyse.coverages(SWINGING)}
    assert set(covered["one restart: order statistics of its rounds"].values()) == {0.0}
    for count in (analyse.REPORTED, analyse.GATED):
        ours = covered[f"**{count} restarts: Student's t over restarts (ours)**"]
        # it misses if all restarts of a draw swing in one direction: 2 C(16, n) / C(32, n)
        one_way = 2 * math.comb(NEEDED, count) / math.comb(2 * NEEDED, count)
        slack = 5 * math.sqrt(one_way * (1 - one_way) / analyse.DRAWS)
        for arm in COMPARED:
            assert ours[arm] >= 1 - one_way - slack, (count, arm)


@pytest.mark.slow
def test_the_gate_does_not_alarm_on_swinging_restarts_and_detects_a_slowdown_in_all() -> None:
    """On equal code its rate is at most the product of its levels: one of all these draws is expected at most."""
    assert round(2 * analyse.DRAWS * RATE, 6) == 1
    share = analyse.gate(SWINGING).share
    assert share[EQUAL] * 2 * analyse.DRAWS <= 4  # P(Poisson(1) > 4) = 0.4 %
    assert share["+20 %"] > share["+5 %"]
    exact = analyse.gate(EXACT).share
    assert [exact[arm] for arm in (EQUAL, "+10 %", "+20 %")] == [0, 1, 1]


def test_tests_on_samples_of_one_pair_give_false_positives_where_processes_differ() -> None:
    by_rule = {(one.rule, one.samples): one for one in analyse.rates(SWINGING)}
    for name in ("Mann–Whitney", "bootstrap interval"):
        for samples in (AFTER, ROUNDS):
            assert by_rule[name, samples].share[EQUAL] == 0.5  # in one of both orders: always wrong
    assert by_rule["mean of 10, +10 %", AFTER].share[EQUAL] == 0.0
    assert {one.trials for key, one in by_rule.items() if PROTOCOL not in key[0]} == {4 * NEEDED}


def test_the_stopping_rule_goes_on_while_the_interval_is_wide() -> None:
    wide = Pool("quiet", made(lambda number, arm: (truth(arm), 0.2), samples=90))
    assert analyse.stopped(EXACT, EQUAL)[1].tolist() == [ENOUGH_ROUNDS] * 2 * NEEDED
    assert analyse.stopped(wide, EQUAL)[1].tolist() == [90.0] * 2 * NEEDED


def test_too_few_restarts_are_refused() -> None:
    few = made(lambda number, arm: (0.0, 1e-3), restarts=NEEDED - 1)
    with pytest.raises(ValueError, match=f"condition quiet: {NEEDED - 1} restarts; the gate needs {NEEDED}"):
        analyse.pools(study(*few))


# --- the page ---
@pytest.fixture(scope="module")
def written() -> dict[str, str]:
    return page.render(study(*SWINGING.restarts))


@pytest.fixture(scope="module")
def text(written: dict[str, str]) -> str:
    return written[""]


def test_the_page_names_every_rule_with_its_source(text: str) -> None:
    for rule in RULES:
        assert f"- **{rule.name}**: {rule.words}" in text
        assert rule.source is None or f"({rule.source[0]})" in text


def test_the_page_prints_what_the_samples_say(text: str) -> None:
    row = re.search(r"^\| random rounds, .*$", text, re.MULTILINE)
    assert row is not None
    assert row[0].split(" | ")[1:] == ["1.00 s", *["3.0 %"] * 3, "3.0 % |"]
    row = re.search(r"^\| Mann–Whitney .*$", text, re.MULTILINE)
    assert row is not None
    assert row[0].startswith("| Mann–Whitney | 50 % |")
    assert f"Restarts: {2 * NEEDED} quiet (no added load)" in text
    assert "| quiet | 3.0 % in 2.00 s | 3.0 % in 1.00 s | 0 % to 50 % | " in text


@pytest.mark.slow
def test_the_page_has_a_row_for_each_self_test_of_the_gate() -> None:
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
    text = page.render(study(*EXACT.restarts), tests)[""]
    for alarms, verdict in ((0, "kept"), (4, "exceeded")):
        row = f"| 20 | 140 | {alarms} | 0 | 3 | 2.1 % | 2 / 7000 | {verdict} |"
        assert f"| 2026-01-02 | a cpu, 2 cores | eager on small {row}" in text
    assert "--runs 20 --history docs/gate-history.jsonl" in text
    assert "Self-tests" not in page.render(study(*EXACT.restarts))[""]


@pytest.mark.slow
def test_other_samples_make_other_figures(text: str) -> None:
    other = page.render(study(*EXACT.restarts))[""]
    rows = [[line for line in one.splitlines() if line.startswith("| random rounds")] for one in (text, other)]
    assert rows[0] != rows[1]


def test_a_page_from_a_busy_machine_says_so(text: str) -> None:
    """One worker runs at a time, besides the process of the busy condition: two cores are enough for a load of 3."""
    loaded = [msgspec.structs.replace(one, load=3.5) for one in SWINGING.restarts]
    assert page.OVERLOADED in page.render(study(*loaded))[""]
    assert page.OVERLOADED not in text


def test_every_chart_is_on_the_page_and_is_xml(written: dict[str, str]) -> None:
    for name, text in written.items():
        if name:
            assert f"]({name})" in written[""]
            assert ElementTree.fromstring(text).tag == "{http://www.w3.org/2000/svg}svg"


def test_each_restart_is_a_dot(written: dict[str, str]) -> None:
    assert written[page.STRIPS].count("<circle") == 3 * 2 * NEEDED


def test_the_samples_in_the_documents_are_small_and_enough() -> None:
    samples = ROOT / "docs" / page.SAMPLES
    assert samples.stat().st_size < 500_000
    assert {pool.name for pool in analyse.pools(read(samples))} == set(page.WORDS)
    assert history(ROOT / "docs" / page.HISTORY)


def test_a_study_survives_its_file(tmp_path: Path) -> None:
    whole = study(*made(swinging, restarts=2))
    for name in ("samples.json", "samples.json.gz"):
        write_versioned(tmp_path / name, whole)
        assert read(tmp_path / name) == whole


def test_the_command_writes_the_page_and_its_charts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_versioned(tmp_path / "samples.json.gz", study(*SWINGING.restarts))
    monkeypatch.setattr(
        "sys.argv", ["page", str(tmp_path / "samples.json.gz"), "-o", str(tmp_path / "out" / "page.md")]
    )
    page.main()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"page.md", page.STRIPS, page.CURVES}


def test_the_names_of_rules_are_unique() -> None:
    assert len({rule.name for rule in RULES}) == len(RULES)
    assert set(SLOWED) < set(PLANTED)
