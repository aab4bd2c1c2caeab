"""The guarantee guarantees: the strongest level whose every lower level holds, and what refutes the next."""

from __future__ import annotations

from mismatches import cause

from kvconform.judging.verdict import Outcome, Verdict
from kvconform.results.guarantees import LEVELS, Guarantee, measured
from kvconform_specs.clause import Level
from kvconform_specs.clauses import BY_NAME


def verdict(clause: str, outcome: Outcome = Outcome.PASS, config: str = "decoder-rope") -> Verdict:
    words = "" if outcome is Outcome.PASS else f"{clause} does not hold"
    fields = {"sentence": words, "compared": 1, **cause(outcome)}
    return Verdict(clause=clause, config=config, backend="b", outcome=outcome, **fields)


ALL = [verdict(clause) for clauses in LEVELS.values() for clause in clauses if clause != "definition.attention"]


def test_every_level_is_decided_by_clauses_of_the_spec() -> None:
    decided = {clause for clauses in LEVELS.values() for clause in clauses}
    assert decided <= set(BY_NAME)
    assert {name for name, clause in BY_NAME.items() if clause.level is Level.SHOULD} <= decided


def test_the_strongest_level_is_reached_where_all_hold() -> None:
    assert measured(ALL) == {"decoder-rope": Guarantee(level="chunk-invariant")}


def test_a_level_counts_only_with_those_below_it() -> None:
    refuted = [verdict(v.clause, Outcome.REFUTED) if v.clause == "determinism.repeatable" else v for v in ALL]
    found = measured(refuted)["decoder-rope"]
    assert (found.level, found.refuted) == ("within bound", "bitwise repeatable")
    assert found.sentence == "determinism.repeatable does not hold"


def test_what_nobody_decided_is_not_refuted() -> None:
    open_ = [verdict(v.clause, Outcome.UNSUPPORTED) if v.clause == "determinism.batch-invariant" else v for v in ALL]
    found = measured(open_)["decoder-rope"]
    assert (found.level, found.refuted) == ("bitwise repeatable", "")


def test_a_config_without_tokens_begins_at_the_bound() -> None:
    attention = [verdict("definition.attention", config="a"), verdict("determinism.repeatable", Outcome.FAIL, "a")]
    assert measured(attention)["a"].level == "within bound"
    assert measured([verdict("shape.output")]) == {}
