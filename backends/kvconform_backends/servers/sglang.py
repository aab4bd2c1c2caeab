"""SGLang's server by URL, through its own ``/generate``."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from kvconform.serving.engine import Answer, Completion, Description, Engine
from kvconform_backends.servers.http import Client, answers
from kvconform_specs.serving.requests import Request

ALTERNATIVES = 20
VOCABULARY = 256
"""How many token ids are used: the server does not tell how many it has."""


class SGLang(Engine):
    """A running server. A salt is its ``extra_key``, a part of the key of its radix cache.

    cold: the URL of a second server, started with ``--disable-radix-cache``; without it a fresh salt stands for it.
    """

    def __init__(self, url: str, cold: str | None = None, vocabulary: int = VOCABULARY) -> None:
        self.client, self.vocabulary = Client(url), vocabulary
        self.cold = None if cold is None else Client(cold)
        self.salts = (f"kvconform-cold-{os.getpid()}-{time.time_ns()}-{i}" for i in itertools.count())

    def describe(self) -> Description:
        told = self.client.json("/get_server_info") or {}
        dtype = str(told.get("dtype", ""))
        return Description(
            engine="SGLang",
            version=str(told.get("version", "")),
            model=str(told.get("served_model_name") or told.get("model_path", "")),
            vocabulary=self.vocabulary,
            context=int(told.get("context_length") or 512),
            block=told.get("page_size"),
            cache_off="salt" if self.cold is None else "second engine",
            reports_hits=True,
            alternatives=ALTERNATIVES,
            abilities=frozenset({"n", "abort", "salt", "reset", "concurrent"}),
            dtype=dtype if dtype not in ("", "auto") else None,
            cache_tokens=told.get("max_total_num_tokens"),
            assumed=(f"only token ids below {self.vocabulary} are used; option vocabulary",),
        )

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        return answers(requests, self._one)

    def reset(self) -> None:
        self.client.post("/flush_cache", {})

    def _one(self, request: Request) -> Answer:
        client = self.client if request.cached or self.cold is None else self.cold
        salt = request.salt if request.cached or self.cold is not None else next(self.salts)
        body = {
            "input_ids": list(request.prompt),
            "sampling_params": {
                "temperature": 0.0,
                "max_new_tokens": request.tokens,
                "ignore_eos": True,
                "n": request.n,
            },
            "return_logprob": True,
            "top_logprobs_num": ALTERNATIVES,
            **({} if salt is None else {"extra_key": salt}),
        }
        began = time.perf_counter()
        if request.abort_after is not None:
            found: Any = {}
            for found in client.events("/generate", body):  # each with all tokens so far
                if len(found["output_ids"]) >= request.abort_after:
                    break
            return Answer(completions=(_completion(found),), seconds_to_first=time.perf_counter() - began)
        answered = client.post("/generate", body)
        took = time.perf_counter() - began
        parts = answered if isinstance(answered, list) else [answered]
        told = [part["meta_info"] for part in parts]
        return Answer(
            completions=tuple(map(_completion, parts)),
            cached=told[0].get("cached_tokens"),
            prompt_tokens=told[0].get("prompt_tokens"),
            completion_tokens=sum(int(one["completion_tokens"]) for one in told),
            seconds_to_first=took if request.tokens == 1 else None,
        )


def _completion(part: Mapping[str, Any]) -> Completion:
    """Each entry is (log-probability, id, text)."""
    chosen = part["meta_info"]["output_token_logprobs"]
    others = part["meta_info"].get("output_top_logprobs") or [None] * len(chosen)
    rows = (
        {int(one[1]): float(one[0]) for one in (own, *(top or ()))} for own, top in zip(chosen, others, strict=True)
    )
    return Completion(tuple(int(own[1]) for own in chosen), tuple(rows))
