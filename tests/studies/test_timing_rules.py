"""Common timing rules are what their sources say."""

from __future__ import annotations

import math

import numpy as np
import pytest
from timing import rules

MILLISECOND = 1_000_000
STEADY = np.linspace(1.0, 1.001, 200) * MILLISECOND
"""Samples of one process on a machine without noise, in nanoseconds."""


@pytest.mark.parametrize("rule", rules.RULES, ids=lambda rule: rule.name)
def test_every_rule_detects_a_plain_slowdown_and_nothing_on_equal_samples(rule: rules.Rule) -> None:
    assert rule.slower(STEADY, 1.2 * STEADY)
    assert not rule.slower(STEADY, STEADY)
    assert not rule.slower(1.2 * STEADY, STEADY)


THRESHOLDS = {rule.name: 0.05 for rule in rules.RULES} | {"mean of 10, +10 %": 0.10, "bootstrap interval": 0.01}
"""Mann–Whitney has no threshold on the size of a difference."""


@pytest.mark.parametrize("rule", [rule for rule in rules.RULES if rule.name != "Mann–Whitney"], ids=lambda r: r.name)
def test_a_rule_has_the_threshold_that_it_names(rule: rules.Rule) -> None:
    named = THRESHOLDS[rule.name]
    assert not rule.slower(STEADY, (1 + named - 0.001) * STEADY)
    assert rule.slower(STEADY, (1 + named + 0.001) * STEADY)


def test_timeit_takes_the_minimum_of_five_loops() -> None:
    assert rules.timeit(np.array([9.0, 1.0, 2.0, 4.0, 3.0, 3.0, 8.0, 8.0, 7.0, 7.0, 0.0])) == 3.0


def test_do_bench_takes_as_many_calls_as_fit_its_time() -> None:
    slow = np.full(200, 4.0 * MILLISECOND)
    assert len(rules.within_rep(slow)) == rules.DO_BENCH_NS // (4 * MILLISECOND)
    assert len(rules.within_rep(np.full(9, 1e12))) == 1


def test_mann_whitney_is_the_textbook_formula() -> None:
    # U = 8 of n m = 64: mean 32, variance 64 * 17 / 12; no ties
    a, b = np.arange(8.0), np.array([-0.5, 5.5, *range(8, 14)])
    u = sum((x < y) + 0.5 * (x == y) for x in a for y in b)
    z = (abs(u - 32) - 0.5) / math.sqrt(64 * 17 / 12)
    assert rules.mann_whitney(a, b) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=1e-12)
    assert rules.mann_whitney(np.ones(8), np.ones(8)) == 1.0


@pytest.mark.parametrize("seed", range(5))
def test_mann_whitney_agrees_with_scipy(seed: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    drawn = np.random.default_rng(seed)
    a, b = drawn.integers(0, 30, 40).astype(float), drawn.integers(3, 33, 25).astype(float)  # with ties
    want = stats.mannwhitneyu(a, b, alternative="two-sided", method="asymptotic").pvalue
    assert rules.mann_whitney(a, b) == pytest.approx(want, rel=1e-9)


def test_the_common_tests_hold_their_level_on_independent_samples() -> None:
    """So their false positives on processes are not due to their arithmetic: 1000 trials, five standard deviations."""
    drawn, trials_ = np.random.default_rng(5), 1000
    logs = drawn.normal(0, 0.02, size=(trials_, 2, 50))
    pairs = np.exp(logs) * MILLISECOND
    false = sum(rules.mann_whitney(a, b) < rules.ALPHA for a, b in pairs)
    assert abs(false - 50) < 5 * math.sqrt(1000 * 0.05 * 0.95)
    missed = sum(not low <= 1 <= high for low, high in (rules.bootstrap(a, b) for a, b in pairs))
    assert abs(missed - 50) < 5 * math.sqrt(1000 * 0.05 * 0.95)
