"""The page of measured serving engines shows what the records say, and keeps of a run what it shows."""

from __future__ import annotations

from typing import Any

import serving_page

RESULTS: dict[str, Any] = {
    "suite": "1",
    "seed": 0,
    "started": "2026-01-01T00:00:00+00:00",
    "seconds": 50.0,
    "served": {
        "engine": "toy",
        "version": "1",
        "model": "m",
        "requests": 100,
        "hits": 7,
        "noise": 1e-6,
        "floor": 2e-6,
        "effect": 0.5,
        "changes": 24,
        "seen": 24,
        "bound": 3e-4,
    },
    "verdicts": [
        {"clause": "serving.rescore", "outcome": "pass", "sentence": "", "seconds": 4.0},
        {"clause": "serving.errors", "outcome": "fail", "sentence": "was refused", "steps": "(one)", "seconds": 20.0},
        {"clause": "serving.forks", "outcome": "unsupported", "sentence": "no n", "seconds": 0.0},
        {"clause": "serving.bitwise-hit", "outcome": "refuted", "sentence": "differs", "seconds": 16.0},
    ],
}


def test_the_time_to_the_first_verdict_is_the_run_without_the_other_clauses() -> None:
    assert serving_page.compact(RESULTS, "float32")["first_verdict"] == 14.0


def test_a_broken_clause_makes_the_engine_non_conformant_and_is_quoted() -> None:
    page = serving_page.render([serving_page.compact(RESULTS, "float32", {**RESULTS, "seed": 1})], None)
    runs = "200 in 2: 2 broken"
    assert (
        f"| toy 1 | float32 | **not conformant**: errors | 100 (7) | {runs} | 14 s | 2e-06 | 0.5 (24 of 24) | 0.0003 |"
        in page
    )
    assert "| errors | **✗** |" in page
    assert "| forks |  |" in page
    assert "serving.errors: was refused\n  Requests: (one)." in page


def test_times_to_the_first_token_and_the_model_as_a_reference_are_kept() -> None:
    first = {
        "length": 64,
        "cached": 48,
        "cold": 0.02,
        "warm": 0.005,
        "ratio": 4.0,
        "low": 3.5,
        "high": 4.5,
        "pairs": 20,
    }
    served = {**RESULTS["served"], "seconds_to_first": [first], "reference": "hf:tiny", "reference_bound": 2e-4}
    record = serving_page.compact({**RESULTS, "served": served}, "float32")
    assert (record["judged_by_model"], record["reference_bound"]) == (True, 2e-4)
    page = serving_page.render([record], None)
    assert "| toy | float32 | 64 | 48 | 20 ms | 5 ms | 4 [3.5, 4.5] |" in page
    untimed = serving_page.render([serving_page.compact(RESULTS, "float32")], None)
    assert "Time to the first token" not in untimed


def test_a_guarantee_that_does_not_hold_is_no_failure() -> None:
    held = {**RESULTS, "verdicts": [verdict for verdict in RESULTS["verdicts"] if verdict["outcome"] != "fail"]}
    page = serving_page.render([serving_page.compact(held, "float32")], None)
    assert "| conformant |" in page
    assert "| bitwise-hit | no |" in page
    assert "differs" not in page


def test_a_blind_engine_has_no_bound_and_no_verdict() -> None:
    blind = {"clause": "serving.order", "outcome": "inconclusive", "sentence": "blind"}
    served = {**RESULTS["served"], "bound": None, "seen": 3}
    record = serving_page.compact({**RESULTS, "served": served, "verdicts": [blind]}, "bfloat16")
    page = serving_page.render([record], None)
    assert "no verdict on 1 clauses" in page
    assert "none: blind" in page


def test_a_planted_mistake_that_nothing_detects_is_shown_as_such() -> None:
    rows = [
        {"fault": None, "what": "nothing is planted", "detected": "", "requests": 5},
        {"fault": "salt", "what": "no salt", "detected": "", "requests": 6},
        {"fault": "order", "what": "no order", "detected": "serving.divergence", "programs": 2, "requests": 7},
    ]
    page = serving_page.render([], {"version": "9", "faults": rows})
    assert "| nothing is planted | nothing to detect |  | 5 |" in page
    assert "| no salt | **not detected** |  | 6 |" in page
    assert "| no order | divergence | 2 | 7 |" in page
