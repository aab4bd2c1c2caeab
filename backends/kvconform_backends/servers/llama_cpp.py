"""llama.cpp's server: by URL through its own ``/completion``, or started here from a GGUF file (package xllamacpp)."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from kvconform.errors import Unavailable
from kvconform.serving.engine import Answer, Completion, Description, Engine
from kvconform_backends.servers import scripts
from kvconform_backends.servers.http import Client, answers
from kvconform_specs.serving.requests import Request

Json = Mapping[str, Any]
ALTERNATIVES = 20
COMPLETIONS = 3
"""The most completions of one prompt that are asked for; the server has no more than slots."""


class LlamaCpp(Engine):
    """A running server. Its slots keep the last prompts; a prompt reuses the longest common prefix, token by token."""

    def __init__(self, url: str, dtype: str | None = None) -> None:
        self.client, self.dtype = Client(url), dtype

    def describe(self) -> Description:
        model = self.client.json("/v1/models")["data"][0]
        properties = self.client.json("/props")
        context = int(properties["default_generation_settings"]["n_ctx"])
        unknown = "its type of cache and flash attention are not told; option dtype"
        return Description(
            engine="llama.cpp",
            version=str(properties.get("build_info", "")),
            model=str(model["id"]),
            vocabulary=int(model["meta"]["n_vocab"]),
            context=context,
            cache_off="request",
            reports_hits=True,
            alternatives=ALTERNATIVES,
            abilities=frozenset({"abort", "concurrent", *(["n"] if properties["total_slots"] >= COMPLETIONS else [])}),
            dtype=self.dtype,
            assumed=() if self.dtype else (unknown,),
        )

    def source(self) -> str:
        return scripts.llama_cpp(self.client.url)

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        return answers(requests, self._answer)

    def _answer(self, request: Request) -> Answer:
        body = {
            "prompt": list(request.prompt),
            "n_predict": request.tokens,
            "cache_prompt": request.cached,
            "n_probs": ALTERNATIVES,
            "return_tokens": True,
            "temperature": 0.0,
            "ignore_eos": True,
            **({"n": request.n} if request.n > 1 else {}),
        }
        began = time.perf_counter()
        if request.abort_after is not None:
            return self._aborted(body, request.abort_after, began)
        found = self.client.post("/completion", body)
        took = time.perf_counter() - began
        parts = found if isinstance(found, list) else [found]
        return Answer(
            completions=tuple(_completion(part["tokens"], part["completion_probabilities"]) for part in parts),
            cached=max(int(part["timings"]["cache_n"]) for part in parts[:1]),
            prompt_tokens=int(parts[0]["tokens_evaluated"]),
            completion_tokens=sum(int(part["tokens_predicted"]) for part in parts),
            seconds_to_first=took if request.tokens == 1 else None,
        )

    def _aborted(self, body: Json, after: int, began: float) -> Answer:
        ids: list[int] = []
        rows: list[Json] = []
        first = None
        for event in self.client.events("/completion", body):
            first = first or time.perf_counter() - began
            ids += event["tokens"]
            rows += event.get("completion_probabilities", [])
            if len(ids) >= after or event["stop"]:
                break
        return Answer(completions=(_completion(ids, rows),), seconds_to_first=first)


def _completion(ids: Sequence[int], rows: Sequence[Json]) -> Completion:
    """Each row names the chosen token and the likeliest ones; a probability of 0 is -infinity and left out."""
    return Completion(
        tuple(ids),
        tuple({row["id"]: row["logprob"], **{t["id"]: t["logprob"] for t in row["top_logprobs"]}} for row in rows),
    )


class Started(LlamaCpp):
    """The server in this process, on a free port, with one thread.

    cache: type of keys and values, ``f32``, ``f16``, ``q8_0`` or ``q4_0``. flash: flash attention: on, off or auto.
    Keys and values in float32 with flash attention off separate wrong tokens from rounding; f16 and auto is what the
    server does by default. slots: requests at the same time. context: tokens of one slot. Other options are attributes
    of ``CommonParams``.
    """

    def __init__(
        self, model: Path, cache: str = "f32", flash: str = "off", slots: int = 4, context: int = 512, **options: Any
    ) -> None:
        try:
            import xllamacpp
        except ImportError as missing:
            raise Unavailable("llama.cpp needs 'xllamacpp'", "pip install xllamacpp gguf safetensors") from missing

        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(model)
        parameters.n_parallel, parameters.n_ctx = slots, slots * context
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
        parameters.warmup, parameters.verbosity = False, -1
        parameters.cache_type_k = parameters.cache_type_v = getattr(xllamacpp.ggml_type, f"GGML_TYPE_{cache.upper()}")
        ways = {"on": "ENABLED", "off": "DISABLED", "auto": "AUTO"}
        parameters.flash_attn_type = getattr(xllamacpp.llama_flash_attn_type, f"LLAMA_FLASH_ATTN_TYPE_{ways[flash]}")
        for name, value in options.items():
            setattr(parameters, name, value)
        self.server = xllamacpp.Server(parameters)
        self.version = str(xllamacpp.__version__)
        exact = cache == "f32" and flash == "off"
        coarse = {"f32": "float16" if flash != "off" else "float32", "f16": "float16"}.get(cache, cache)
        super().__init__(self.server.listening_address, "float32" if exact else coarse)

    def describe(self) -> Description:
        found = super().describe()
        return replace(found, version=f"xllamacpp {self.version}", model=Path(found.model).name)

    def close(self) -> None:
        del self.server
