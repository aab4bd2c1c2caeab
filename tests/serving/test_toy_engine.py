"""The toy engine does what its file says, on requests that are judged by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvconform.serving.engine import Answer
from kvconform.serving.noise import difference
from kvconform_backends.servers.toy import VOCABULARY, ToyEngine
from kvconform_specs.serving.requests import Request

PROMPT = tuple((7 * i + 3) % VOCABULARY for i in range(30))
ROUNDING = 1e-4  # float32: measured 1.7e-6; a wrong token moves answers by 0.1 and more


def one(engine: ToyEngine, **changes: object) -> Answer:
    return engine.answer([replace(Request(PROMPT, 6), **changes)])[0]  # type: ignore[arg-type]


def test_a_repeated_prompt_reads_its_full_blocks_from_the_cache_and_answers_the_same() -> None:
    engine = ToyEngine()
    cold, first, again = one(engine, cached=False), one(engine), one(engine)
    assert (cold.cached, first.cached, again.cached) == (0, 0, 24)  # three blocks of 8 of 30 tokens
    assert again.completions[0].ids == cold.completions[0].ids
    assert difference(again.completions[0], cold.completions[0]) < ROUNDING


def test_the_last_token_of_a_prompt_is_computed_though_its_block_is_cached() -> None:
    engine = ToyEngine()
    assert [one(engine, prompt=PROMPT[:16]).cached for _ in range(2)] == [0, 8]


def test_more_requests_than_fit_are_preempted_and_answer_what_they_answer_alone() -> None:
    engine = ToyEngine()
    asked = [Request(tuple((i * 11 + 5 * j) % VOCABULARY for j in range(20)), 24) for i in range(6)]
    answers = engine.answer(asked)
    assert engine.preemptions() > 0
    for request, answer in zip(asked, answers, strict=True):
        alone = engine.answer([replace(request, cached=False)])[0]
        assert difference(answer.completions[0], alone.completions[0]) < ROUNDING


@pytest.mark.parametrize("part", ["salt", "adapter"])
def test_salts_and_adapters_share_no_block(part: str) -> None:
    engine = ToyEngine()
    one(engine)
    assert [one(engine, **{part: "first"}).cached for _ in range(2)] == [0, 24]


def test_forks_share_their_prompt_and_agree() -> None:
    found = one(ToyEngine(), n=3).completions
    assert len(found) == 3
    assert all(difference(completion, found[0]) == 0 for completion in found)


def test_a_client_that_leaves_gets_the_tokens_until_then() -> None:
    assert len(one(ToyEngine(), tokens=20, abort_after=2).completions[0].ids) == 2


def test_a_request_beyond_the_context_is_refused() -> None:
    answer = one(ToyEngine(), tokens=ToyEngine.context)
    assert answer.error is not None
    assert not answer.completions


def test_a_prompt_is_scored_from_the_cache_as_without_it() -> None:
    engine = ToyEngine()
    cold, _, warm = one(engine, cached=False, score=True), one(engine), one(engine, score=True)
    assert warm.cached == 24
    assert len(warm.prompt_logprobs) == len(PROMPT) - 1
    for got, want in zip(warm.prompt_logprobs, cold.prompt_logprobs, strict=True):
        assert all(abs(got[token] - want[token]) < ROUNDING for token in got.keys() & want.keys())


def test_every_block_is_free_again_once_all_requests_have_ended() -> None:
    engine = ToyEngine()
    for _ in range(3):
        engine.answer([Request(PROMPT[i:], 9, n=1 + i % 2, abort_after=i or None) for i in range(6)])
    assert len(engine.free) == engine.blocks
    assert not any(engine.readers)
