"""What decides a verdict on an engine: references, noise, evidence, and what ran before."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from engines import AlwaysCached, ChosenOnly, Coarse, Dies, Noisy, RestartsChosenOnly, Silent, Timed, WrongAfterLong

from kvconform.errors import Raised
from kvconform.judging.mismatch import Kind
from kvconform.judging.verdict import Outcome, Reason, Verdict
from kvconform.search.effort import EFFORTS
from kvconform.serving.engine import Completion, Engine
from kvconform.serving.first_token import first_tokens
from kvconform.serving.judge import Judged, compared
from kvconform.serving.noise import Calibration, between, calibrate, ulp
from kvconform.serving.search import Search, smaller
from kvconform.serving.session import Limits, Session, common
from kvconform.serving.verdict import Trial
from kvconform_backends.servers.toy import ToyEngine
from kvconform_specs.serving.clauses import BY_NAME, CLAUSES
from kvconform_specs.serving.program import Own, Program, Reset, Span, Together, request
from kvconform_specs.serving.strategies import Sizes, alone
from kvconform_specs.strategies import drawn

LIMITS = Limits(requests=100_000, seconds=600.0)
SMOKE = replace(EFFORTS["smoke"], shrink=False)


def trial(engine: Engine, folder: Path, limits: Limits = LIMITS) -> tuple[Trial, Calibration]:
    session = Session(engine, limits, 0)
    gauge = calibrate(session)
    return Trial(session, gauge, "engine", folder, SMOKE, 0, []), gauge


def verdict(engine: Engine, clause: str, folder: Path) -> Verdict:
    return trial(engine, folder)[0].judge(BY_NAME[clause])


# --- references, noise and evidence ---
def test_an_engine_that_does_not_tell_what_was_cached_is_not_exercised(tmp_path: Path) -> None:
    found = verdict(Silent(), "serving.prefix-hit", tmp_path)
    assert (found.outcome, found.reason) == (Outcome.NOT_EXERCISED, Reason.NO_EVIDENCE)
    assert found.compared > 0


def test_a_reference_that_was_read_from_the_cache_is_void(tmp_path: Path) -> None:
    whole, gauge = trial(AlwaysCached(), tmp_path)
    assert gauge.void > 0
    found = whole.judge(BY_NAME["serving.prefix-hit"])
    assert (found.outcome, found.reason) == (Outcome.NOT_EXERCISED, Reason.NO_REFERENCE)
    assert "were read from it all the same" in found.sentence


def test_where_a_wrong_token_moves_no_more_than_rounding_the_engine_is_blind(tmp_path: Path) -> None:
    found = verdict(Coarse(), "serving.prefix-hit", tmp_path)
    assert (found.outcome, found.reason) == (Outcome.INCONCLUSIVE, Reason.BLIND)
    assert "what helps: float32" in found.sentence
    assert verdict(Coarse(), "serving.accounting", tmp_path).outcome is Outcome.PASS  # counts need no bound


def test_noise_that_the_dtype_does_not_explain_is_found_by_scoring_again(tmp_path: Path) -> None:
    found = verdict(Noisy(), "serving.rescore", tmp_path)
    assert found.outcome is Outcome.FAIL
    assert found.mismatch is not None
    assert found.mismatch.reference == "prefill"


def test_an_engine_that_gives_no_answer_has_crashed(tmp_path: Path) -> None:
    found = verdict(Dies(), "serving.neighbours", tmp_path)
    assert found.outcome is Outcome.CRASH
    assert found.mismatch is not None
    assert found.mismatch.error == Raised("ConnectionError", "connection reset by peer")


@pytest.mark.parametrize("clause", ["serving.prefix-hit", "serving.divergence", "serving.rescore"])
def test_the_log_probability_of_the_chosen_token_alone_is_enough(clause: str, tmp_path: Path) -> None:
    assert verdict(ChosenOnly(), clause, tmp_path).outcome is Outcome.PASS


def test_the_log_probability_of_the_chosen_token_alone_shows_a_fault(tmp_path: Path) -> None:
    assert verdict(RestartsChosenOnly(), "serving.prefix-hit", tmp_path).outcome is Outcome.FAIL


def test_the_bound_lies_between_noise_and_effect() -> None:
    assert between(1e-6, 1e-2) == pytest.approx(1e-4)
    assert between(1e-6, 1.0) == pytest.approx(3e-4)  # at most 300 times the noise
    assert between(1e-2, 2e-2) is None
    assert ulp(6.0, "bfloat16") == 2.0**-5  # 0.031, the jump that servers in bfloat16 show
    assert ulp(6.0, "float32") == 2.0**-21


def test_the_time_to_the_first_token_is_told_cold_and_warm_by_length() -> None:
    found = first_tokens(Session(Timed(), LIMITS, 0), 0)
    assert [(one.length, one.cached, one.pairs) for one in found] == [(17, 16, 15), (47, 40, 15), (94, 88, 15)]
    for one in found:
        assert one.cold == pytest.approx(1e-3 * one.length)
        assert one.warm == pytest.approx(1e-3 * (one.length - one.cached))
        assert one.low == one.ratio == one.high == pytest.approx(one.cold / one.warm)


def test_an_engine_that_reads_no_cache_has_no_times() -> None:
    assert first_tokens(Session(Silent(), LIMITS, 0), 0) == []


# --- comparison ---
def completion(*rows: dict[int, float]) -> Completion:
    return Completion(tuple(max(row, key=lambda t: row[t]) for row in rows), rows)


def mismatch(got: Completion, want: Completion, bound: float = 0.01) -> Kind | None:
    found = compared(got, want, bound, "cold", Judged())
    return None if found is None else found.kind


def test_after_a_legal_tie_nothing_is_compared() -> None:
    tie = {1: -1.000, 2: -1.001}
    other = {1: -1.001, 2: -1.000}
    assert mismatch(completion(tie, {3: -0.5}), completion(other, {4: -2.0})) is None


def test_another_token_than_one_that_leads_is_wrong() -> None:
    assert mismatch(Completion((2,), ({2: -3.0},)), completion({1: -0.1, 3: -2.0})) is Kind.CHOICE


def test_a_number_that_is_not_a_number_is_wrong() -> None:
    assert mismatch(completion({1: float("nan")}), completion({1: -1.0})) is Kind.LOG_PROBABILITY
    assert mismatch(completion({1: -1.0, 2: float("-inf")}), completion({1: -1.0, 2: float("-inf")})) is None


def test_a_token_too_few_is_wrong() -> None:
    assert mismatch(completion({1: -1.0}), completion({1: -1.0}, {2: -1.0})) is Kind.COUNT


# --- programs and their history ---
def test_a_program_survives_its_json_and_shares_no_prefix_with_itself_renamed() -> None:
    sizes = Sizes(8, 96, 4, 2, 192, ToyEngine().describe().abilities)
    for clause in CLAUSES:
        for program in drawn(clause.strategy(sizes), 20):
            assert Program.from_json(program.to_json()) == program
            step = program.steps[0]
            assert isinstance(step, Together)
            first, second = (request(step.asks[0], name, [], 48, 96).prompt for name in (1, 2))
            assert len(first) == len(second)
            assert common(first, second) < 4


@pytest.mark.slow
def test_every_situation_of_a_clause_is_drawn() -> None:
    sizes = Sizes(8, 96, 4, 2, 192, ToyEngine().describe().abilities)
    for clause in CLAUSES:
        about = {program.about for program in drawn(clause.strategy(sizes), 200)}
        assert {words for words, possible in clause.situations if possible(sizes)} <= about


def test_an_answer_that_came_short_is_filled_up() -> None:
    ask = alone(Span(seed=0, stop=2), Own(step=0, stop=3)).asks[0]
    assert len(request(ask, 0, [[(5,)]], 48, 96).prompt) == 5


def test_a_step_that_a_later_one_refers_to_stays() -> None:
    steps = (alone(Span(seed=0, stop=2)), Reset(), alone(Own(step=0, stop=1)), alone(Span(seed=1, stop=2)))
    found = [program.steps for program in smaller(Program(steps=steps))]
    assert steps[:3] in found
    assert all(program[0] == steps[0] for program in found)


def test_what_only_fails_after_another_program_is_found_with_it() -> None:
    session = Session(WrongAfterLong(), LIMITS, 0)
    before = Program(steps=(alone(Span(seed=9, stop=30)),))
    program = Program(steps=(alone(Span(seed=1, stop=9)), alone(Span(seed=1, stop=9))))
    search = Search(BY_NAME["serving.prefix-hit"], session, calibrate(session), EFFORTS["smoke"], 0, [before])
    assert search._judged(program).mismatch is None
    found = search._after_others(program)
    assert found is not None
    assert (found.program, found.before, found.mismatch.earlier_programs) == (program, (before,), 1)
