"""Servers with an OpenAI-compatible ``/v1/completions``: what they take and how they answer is found by trial."""

from __future__ import annotations

import itertools
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kvconform.errors import BackendUnavailable
from kvconform.serving.engine import Answer, CacheOff, Completion, Description, Engine
from kvconform_backends.servers import scripts
from kvconform_backends.servers.http import Client, Refused, answers
from kvconform_backends.servers.tiny_models import FIRST
from kvconform_specs.serving.requests import Request

Json = Mapping[str, Any]
COMPLETIONS = "/v1/completions"
VOCABULARY = 256
"""How many token ids are used where the server does not tell how many it has."""
TRIAL = 200
"""Tokens of the prompt with which a hit is tried, more than a block of any engine; half the context if that is less."""


@dataclass(frozen=True)
class Dialect:
    """How a server is asked. name: of the shape of its answers. ids: whether prompts are token ids; otherwise each id
    is one character (tiny_models). asked: what goes with a request for ``alternatives`` log-probabilities."""

    name: str
    ids: bool
    alternatives: int
    asked: Json


DIALECTS = (
    *(
        Dialect("token_id", True, k, {"logprobs": k, "return_tokens_as_token_ids": True, "ignore_eos": True})
        for k in (20, 5)
    ),
    Dialect("content", True, 10, {"logprobs": 10, "ignore_eos": True}),
    Dialect("content", False, 10, {"logprobs": True, "top_logprobs": 10}),
)
"""In the order in which they are tried: vLLM's legacy form with ``token_id:N``, and ``content`` of the chat form with
ids, for a prompt of ids (llama.cpp) or of text (mlx-lm)."""


class OpenAI(Engine):
    """A server at a URL.

    cold: the URL of a second server with the same model and without a prefix cache. vocabulary: how many ids to use.
    block: tokens of a block of its cache. dtype: of its computation. model: its name, of several.
    Raises BackendUnavailable if its answers hold no log-probabilities by token id, ConnectionError if it is not there.
    """

    def __init__(
        self,
        url: str,
        cold: str | None = None,
        vocabulary: int = VOCABULARY,
        block: int | None = None,
        context: int | None = None,
        dtype: str | None = None,
        model: str | None = None,
    ) -> None:
        self.client, self.cold = Client(url), None if cold is None else Client(cold)
        self.vocabulary, self.block, self.dtype = vocabulary, block, dtype
        served = (self.client.json("/v1/models") or {}).get("data") or [{"id": "default_model"}]
        self.models = {str(one["id"]): one for one in served}
        self.model = model or next(iter(self.models))
        told = self.models.get(self.model, {}).get("max_model_len")
        self.context, self.refuses_longer = context or int(told or 512), told is not None
        self.engine, self.version = _engine_of(self.client, next(iter(self.models.values())))
        self.dialect = self._tried()
        self.salts = (f"kvconform-cold-{os.getpid()}-{time.time_ns()}-{i}" for i in itertools.count())
        self.reports, self.off = self._hits()
        self.metrics = Metrics(self.client)

    def _tried(self) -> Dialect:
        said = []
        for dialect in DIALECTS:
            try:
                found = self.client.post(COMPLETIONS, self._body(Request((5, 6, 7), 2), dialect))
                completion = _completion(found["choices"][0], dialect)
            except (Refused, KeyError, ValueError, TypeError, IndexError) as error:
                said.append(f"{dialect.name}, {'ids' if dialect.ids else 'text'}: {error!r}"[:200])
                continue
            if len(completion.ids) == len(completion.logprobs) == 2:
                return dialect
            said.append(f"{dialect.name}: {len(completion.ids)} ids and {len(completion.logprobs)} rows for 2 tokens")
        raise BackendUnavailable(
            f"{self.client.url}{COMPLETIONS} returns no log-probabilities by token id: {'; '.join(said)}"
        )

    def _hits(self) -> tuple[bool, CacheOff]:
        """Whether answers tell what was cached, and whether a fresh salt switches it off."""
        prompt = self._served(min(TRIAL, self.context // 2))
        first, again = self._ask(prompt, self.client), self._ask(prompt, self.client)
        reports = bool(again.cached and not first.cached)
        if self.cold is not None:
            return reports, "second engine"
        try:
            salted = self._ask(replace(prompt, salt=next(self.salts)), self.client)
        except Refused:
            return reports, "none"
        return reports, "salt" if reports and salted.cached == 0 else "none"

    def _served(self, count: int) -> Request:
        """A request with a new prompt of so many tokens, or of fewer if the server refuses that many."""
        ids = tuple((7 * i * i + time.time_ns()) % self.vocabulary for i in range(count))
        try:
            self._ask(Request(((ids[0] + 1) % self.vocabulary, *ids[1:]), 1), self.client)
        except Refused:
            if count > 1:
                return self._served(count // 2)
            raise
        return Request(ids, 1)

    def describe(self) -> Description:
        told = self.metrics.cache()
        alone = {"n", "salt", "score"} if self.engine == "vLLM" else set()
        adapters = tuple(name for name, one in self.models.items() if one.get("parent"))
        assumed = [f"only token ids below {self.vocabulary} are used; option vocabulary"]
        if self.dialect.ids is False:
            assumed.append("each token is one character, as in kvconform's tiny models")
        return Description(
            engine=self.engine,
            version=self.version,
            model=self.model,
            vocabulary=self.vocabulary,
            context=self.context,
            refuses_longer=self.refuses_longer,
            block=self.block or told.get("block_size"),
            cache_off=self.off,
            reports_hits=self.reports,
            alternatives=self.dialect.alternatives,
            abilities=frozenset({"abort", "concurrent", *alone})
            | ({"preemptions"} if self.metrics.preemptions() is not None else frozenset())
            | ({"adapter"} if adapters else frozenset()),
            dtype=self.dtype,
            cache_tokens=told["block_size"] * told["num_gpu_blocks"]
            if {"block_size", "num_gpu_blocks"} <= told.keys()
            else None,
            adapters=adapters,
            assumed=tuple(assumed),
        )

    def source(self) -> str:
        if self.dialect.name != "token_id" or self.cold is not None:
            return super().source()
        return scripts.token_ids(self.client.url, self.model, self.dialect.alternatives)

    def preemptions(self) -> int:
        return self.metrics.preemptions() or 0

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        return answers(requests, self._one)

    def _one(self, request: Request) -> Answer:
        if request.cached:
            return self._ask(request, self.client)
        if self.cold is not None:
            return self._ask(request, self.cold)
        return self._ask(replace(request, salt=next(self.salts)), self.client)

    def _body(self, request: Request, dialect: Dialect) -> dict[str, Any]:
        prompt = list(request.prompt) if dialect.ids else "".join(chr(FIRST + i) for i in request.prompt)
        several = {"n": request.n, "temperature": 1.0, "top_k": 1} if request.n > 1 else {"temperature": 0.0}
        return {
            "model": request.adapter or self.model,
            "prompt": prompt,
            "max_tokens": request.tokens,
            **dialect.asked,
            **several,
            **({} if request.salt is None else {"cache_salt": request.salt}),
            **({"prompt_logprobs": dialect.alternatives} if request.score else {}),
        }

    def _ask(self, request: Request, client: Client) -> Answer:
        body, began = self._body(request, self.dialect), time.perf_counter()
        if request.abort_after is not None:
            return self._aborted(client, body, request.abort_after, began)
        found = client.post(COMPLETIONS, body)
        took = time.perf_counter() - began
        usage = found.get("usage") or {}
        choices = sorted(found["choices"], key=lambda choice: choice["index"])
        return Answer(
            completions=tuple(_completion(choice, self.dialect) for choice in choices),
            cached=_cached(usage) if self.__dict__.get("reports", True) else None,
            prompt_logprobs=tuple(map(_scores, (choices[0].get("prompt_logprobs") or [])[1:])),
            prompt_tokens=usage.get("prompt_tokens"),
            completion_tokens=usage.get("completion_tokens"),
            seconds_to_first=took if request.tokens == 1 else None,
        )

    def _aborted(self, client: Client, body: Json, after: int, began: float) -> Answer:
        ids: list[int] = []
        rows: list[Mapping[int, float]] = []
        first = None
        for event in client.events(COMPLETIONS, body):
            first = first or time.perf_counter() - began
            if event["choices"]:
                part = _completion(event["choices"][0], self.dialect)
                ids, rows = [*ids, *part.ids], [*rows, *part.logprobs]
            if len(ids) >= after:
                break
        return Answer(completions=(Completion(tuple(ids), tuple(rows)),), seconds_to_first=first)


def _cached(usage: Json) -> int | None:
    """Tokens from the cache; a server that reports hits leaves the details out, or null, where there was none."""
    return int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)


def _completion(choice: Json, dialect: Dialect) -> Completion:
    """The ids and rows of one choice, or of a part of it that was streamed."""
    found = choice.get("logprobs") or {}
    if dialect.name == "token_id":
        ids = tuple(map(_id, found.get("tokens", ())))
        chosen = zip(
            ids, found.get("token_logprobs", ()), found.get("top_logprobs") or itertools.repeat({}), strict=False
        )
        return Completion(ids, tuple({i: p, **{_id(t): v for t, v in (top or {}).items()}} for i, p, top in chosen))
    rows = tuple(dict(_entries(entry)) for entry in found.get("content", ()))
    if dialect.ids:
        return Completion(tuple(int(entry["id"]) for entry in found.get("content", ())), rows)
    return Completion(tuple(ord(letter) - FIRST for letter in choice["text"]), rows)


def _entries(entry: Json) -> Iterator[tuple[int, float]]:
    """An entry's own id need not be the chosen token's; its pair of id and log-probability is right all the same."""
    for one in (entry, *entry.get("top_logprobs", ())):
        yield int(one["id"]), float(one["logprob"])


def _id(token: str) -> int:
    """The number in ``token_id:N``. Raises ValueError for any other text."""
    return int(token.removeprefix("token_id:"))


def _scores(row: Json | None) -> dict[int, float]:
    return {int(token): float(one["logprob"]) for token, one in (row or {}).items()}


class Metrics:
    """What a server of vLLM's or SGLang's kind tells at ``/metrics``."""

    def __init__(self, client: Client) -> None:
        self.client = client

    def _text(self) -> str:
        try:
            return self.client.get("/metrics")
        except Refused:
            return ""

    def cache(self) -> dict[str, int]:
        """``block_size`` and ``num_gpu_blocks``, as far as the server reports them."""
        line = next((line for line in self._text().splitlines() if line.startswith("vllm:cache_config_info{")), "")
        return {name: int(value) for name, value in re.findall(r'(block_size|num_gpu_blocks)="(\d+)"', line)}

    def preemptions(self) -> int | None:
        counts = re.findall(r"^vllm:num_preemptions_total\{[^}]*\} ([\d.e+]+)", self._text(), re.MULTILINE)
        return sum(int(float(count)) for count in counts) if counts else None


def _engine_of(client: Client, model: Json) -> tuple[str, str]:
    """Name and version of what serves, as far as it tells."""
    owner = str(model.get("owned_by", ""))
    if owner == "vllm":
        return "vLLM", str((client.json("/version") or {}).get("version", ""))
    if owner == "sglang":
        return "SGLang", str((client.json("/get_server_info") or {}).get("version", ""))
    return "OpenAI-compatible", ""
