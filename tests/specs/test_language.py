"""Right caches pass and wrong ones are convicted, of what the language of programs and claims says of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from lanes import slow_except

from kvconform import conformance
from kvconform.results.results import Results

CASES = Path(__file__).parents[1] / "support" / "language_cases.py"


def judged(name: str, *clauses: str, config: str) -> Results:
    return conformance(f"{CASES}:{name}", effort="smoke", clauses=clauses, configs=[config])


@pytest.mark.parametrize(
    ("right", "wrong", "clauses", "config"),
    slow_except(
        [
            ("Speculative", "SpeculativeAlike", ("batch.rollback", "lifecycle.rollback"), "attention-gqa"),
            ("LeftPaddedRing", "LeftPaddedRingBySlot", ("batch.",), "attention-window"),
            ("OnlyGenerates", "GeneratesLastTokenTwice", (), "decoder-rope"),
        ],
        3,
    ),
)
def test_the_right_one_passes_and_the_wrong_one_does_not(
    right: str, wrong: str, clauses: tuple[str, ...], config: str
) -> None:
    assert judged(right, *clauses, config=config).ok
    with pytest.raises(AssertionError, match=clauses[0] if clauses else "equivalence.generation"):
        judged(wrong, *clauses, config=config)


def test_what_only_generates_is_concluded_from_its_generations() -> None:
    results = conformance(f"{CASES}:OnlyGenerates", effort="smoke")
    passed = {(verdict.clause, verdict.config) for verdict in results.verdicts if verdict.sentence == ""}
    assert results.exit_code == 0
    assert {clause for clause, _config in passed if clause == "equivalence.generation"}
    assert (results.conclusion.why, results.conclusion.by) == ("decoder profile", "judged by its generations alone")
    assert "attention" not in results.conclusion


def test_a_malformed_call_is_named_in_its_sentence() -> None:
    with pytest.raises(AssertionError, match=r"reject append \d to a of \d rows, with one row alone\): was accepted"):
        conformance(
            "kvconform_backends.faults.errors:OneRowForAll",
            effort="smoke",
            clauses=["errors.malformed"],
            configs=["attention-gqa"],
        )


def test_a_cache_without_reset_passes_the_clause_that_is_demanded_of_all() -> None:
    assert judged("NoReset", "lifecycle.reset", config="attention-gqa").ok
