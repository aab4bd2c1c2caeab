"""Adapters to servers read what the server said, in each dialect, and send what was asked."""

from __future__ import annotations

import http.server
import os
import random
import threading
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import pytest
import served_toy
from served_toy import Dialect, serving

from kvconform.errors import BackendUnavailable
from kvconform.serving.engine import Answer, Engine
from kvconform.serving.registry import open_engine
from kvconform_backends.servers.http import KEY, Client, Refused
from kvconform_backends.servers.openai import OpenAI
from kvconform_backends.servers.opening import discover, open_url
from kvconform_backends.servers.toy import VOCABULARY, ToyEngine
from kvconform_specs.serving.requests import Request

PROMPT = tuple((7 * i + 3) % VOCABULARY for i in range(30))
DIALECTS = (served_toy.Vllm, served_toy.MlxLm, served_toy.LlamaCpp, served_toy.SGLang)
EXPECTED = {served_toy.LlamaCpp: "llama.cpp", served_toy.SGLang: "sglang"}
Opened = tuple[Dialect, Engine]


@pytest.fixture(params=DIALECTS, ids=lambda dialect: dialect.__name__)
def opened(request: pytest.FixtureRequest) -> Iterator[Opened]:
    dialect = request.param(ToyEngine())
    with serving(dialect) as url:
        options = {} if isinstance(dialect, served_toy.LlamaCpp) else {"vocabulary": VOCABULARY}
        yield dialect, open_url(url, options)


def one(engine: Engine, **changes: object) -> Answer:
    return engine.answer([replace(Request(PROMPT, 6), **changes)])[0]  # type: ignore[arg-type]


def said(dialect: Dialect, prompt: tuple[int, ...]) -> Answer:
    """What the engine last answered to this prompt."""
    return next(answer for request, answer in reversed(dialect.said) if request.prompt == prompt)


def test_what_serves_at_a_url_is_recognised() -> None:
    for dialect in DIALECTS:
        with serving(dialect(ToyEngine())) as url:
            assert discover(url) == EXPECTED.get(dialect, "openai")


def test_ids_and_log_probabilities_are_those_of_the_engine(opened: Opened) -> None:
    got = one(opened[1])
    assert got.completions == said(opened[0], PROMPT).completions
    assert len(got.completions[0].ids) == got.completion_tokens == 6
    assert got.prompt_tokens == 30
    assert got.error is None


def test_a_hit_is_reported_and_a_first_request_has_none(opened: Opened) -> None:
    found = [one(opened[1]).cached for _ in range(2)]
    assert found == [0, 24]
    assert opened[1].describe().reports_hits


def test_an_answer_without_the_cache_reads_nothing_from_it(opened: Opened) -> None:
    if opened[1].describe().cache_off != "none":
        found = [one(opened[1], cached=cached).cached for cached in (True, False, True)]
        assert found == [0, 0, 24]


def test_several_completions_of_one_prompt(opened: Opened) -> None:
    if "n" in opened[1].describe().abilities:
        got = one(opened[1], n=3)
        assert got.completions == said(opened[0], PROMPT).completions
        assert (len(got.completions), got.completion_tokens) == (3, 18)


def test_a_client_that_leaves_keeps_the_tokens_that_came(opened: Opened) -> None:
    got = one(opened[1], tokens=20, abort_after=3).completions[0]
    want = said(opened[0], PROMPT).completions[0]
    assert (got.ids, got.logprobs) == (want.ids[:3], want.logprobs[:3])


def test_requests_are_sent_at_the_same_time_and_answered_in_order(opened: Opened) -> None:
    prompts = [PROMPT[:count] for count in (5, 12, 3, 20)]
    got = opened[1].answer([Request(prompt, 2) for prompt in prompts])
    assert [answer.prompt_tokens for answer in got] == [5, 12, 3, 20]
    assert [answer.completions for answer in got] == [said(opened[0], prompt).completions for prompt in prompts]


def test_a_refused_request_is_an_answer_with_what_the_server_said(opened: Opened) -> None:
    got = opened[1].answer([Request(PROMPT * 4, 6), Request(PROMPT, 6)])
    assert got[0].completions == ()
    assert "400" in (got[0].error or "")
    assert got[1].completions == said(opened[0], PROMPT).completions


def test_a_server_that_is_gone_is_a_connection_error() -> None:
    with serving(served_toy.LlamaCpp(ToyEngine())) as url:
        engine = open_url(url, {})
    with pytest.raises(ConnectionError, match="cannot be reached"):
        one(engine)


def test_salts_scores_metrics_and_reset_reach_the_engine() -> None:
    dialect = served_toy.Vllm(ToyEngine())
    with serving(dialect) as url:
        engine = open_url(url, {"vocabulary": VOCABULARY})
        facts = engine.describe()
        assert (facts.block, facts.cache_tokens, facts.context) == (8, 192, 96)
        assert {"n", "salt", "score", "preemptions", "abort", "concurrent"} == facts.abilities
        assert one(engine, salt="a").cached == 0
        assert one(engine, salt="a").cached == 24
        assert one(engine, salt="b").cached == 0
        scores = one(engine, score=True).prompt_logprobs
        assert scores == said(dialect, PROMPT).prompt_logprobs
        assert len(scores) == 29
    dialect = served_toy.SGLang(ToyEngine())  # type: ignore[assignment]
    with serving(dialect) as url:
        engine = open_url(url, {"vocabulary": VOCABULARY})
        one(engine)
        engine.reset()
        assert one(engine).cached == 0


def test_a_second_server_gives_the_cold_answers() -> None:
    warm, cold = served_toy.MlxLm(ToyEngine()), served_toy.MlxLm(ToyEngine())
    with serving(warm) as url, serving(cold) as other:
        engine = OpenAI(url, cold=other, vocabulary=VOCABULARY)
        before = len(warm.said)
        one(engine, cached=False)
        assert (len(warm.said), len(cold.said)) == (before, 1)
        assert engine.describe().cache_off == "second engine"


def test_a_server_without_salts_has_no_cold_answers_and_says_so() -> None:
    class Saltless(served_toy.Vllm):
        salted = False

    with serving(Saltless(ToyEngine())) as url:
        assert open_url(url, {"vocabulary": VOCABULARY}).describe().cache_off == "none"


def test_a_server_without_log_probabilities_by_id_is_unavailable_with_each_trial() -> None:
    class Plain(served_toy.Vllm):
        def choice(self, completion: object, index: int = 0) -> dict[str, object]:
            return {"index": index, "text": "words", "logprobs": None}

    with (
        serving(Plain(ToyEngine())) as url,
        pytest.raises(BackendUnavailable, match="no log-probabilities by token id"),
    ):
        open_engine(url)


def test_the_key_is_sent_from_the_environment_and_stands_in_no_message(monkeypatch: pytest.MonkeyPatch) -> None:
    received = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            received.append((self.path, self.headers.get("Authorization")))
            self.send_response(302 if self.path == "/moved" else 401)
            self.send_header("Location", "/elsewhere")
            self.end_headers()

    monkeypatch.setenv(KEY, "secret-key")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    client = Client(f"http://127.0.0.1:{server.server_address[1]}/v1/")
    for path in ("/closed", "/moved"):
        with pytest.raises(Refused) as refused:
            client.get(path)
        assert "secret-key" not in str(refused.value)
    server.shutdown()
    server.server_close()
    assert received == [("/closed", "Bearer secret-key"), ("/moved", "Bearer secret-key")]  # no redirection is followed
    assert os.environ[KEY] not in repr(vars(client))


@pytest.mark.parametrize("kind", [served_toy.Vllm, served_toy.LlamaCpp], ids=lambda kind: kind.__name__)
def test_the_source_for_scripts_says_what_the_adapter_says(kind: type[Dialect]) -> None:
    with serving(kind(ToyEngine())) as url:
        engine = open_url(url, {} if kind is served_toy.LlamaCpp else {"vocabulary": VOCABULARY})
        names: dict[str, Any] = {"random": random}
        exec(engine.source(), names)
        for changes in ({}, {"cached": False}, {"n": 2}, {"abort_after": 2}, {"prompt": PROMPT * 4}):
            request = replace(Request(PROMPT, 4), **changes)  # type: ignore[arg-type]
            one(engine)
            want, got = engine.answer([request])[0], names["send"]([asdict(request)])[0]
            assert (got["error"] is None) == (want.error is None)
            ids = [token for completion in got["completions"] for token in completion["ids"]]
            assert ids == [token for completion in want.completions for token in completion.ids]
            if want.error is None and request.abort_after is None:
                assert got["cached"] == want.cached
                rows = [dict(row) for completion in want.completions for row in completion.logprobs]
                assert rows == [row for completion in got["completions"] for row in completion["logprobs"]]
