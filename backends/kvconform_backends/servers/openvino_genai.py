"""OpenVINO GenAI's continuous batching in this process: two pipelines, one of them without a prefix cache."""

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from kvconform.errors import Unavailable
from kvconform.serving.engine import Answer, Completion, Description, Engine
from kvconform_backends.servers import scripts
from kvconform_specs.serving.requests import Request


class OpenVino(Engine):
    """Pipelines on the CPU, stepped by this adapter, from a GGUF file of float16 matrices.

    precision: of keys and values, ``f32`` for a verdict; None is the default of the CPU, 8 bits. blocks: of the cache.
    chunk: the most tokens of one step. Only the chosen token's log-probability is returned, and answers do not tell
    what was cached. Of a request alone the steps tell it: each computes at most ``chunk`` tokens of the prompt, so that
    the others were read from the cache.
    """

    BLOCK = 32  # of the CPU

    def __init__(
        self, model: Path, precision: str | None = "f32", blocks: int = 40, chunk: int = 32, vocabulary: int = 256
    ) -> None:
        try:
            import openvino
            import openvino_genai
        except ImportError as missing:
            raise Unavailable("OpenVINO GenAI needs 'openvino-genai'", "pip install openvino-genai") from missing

        self.tensor, self.config = openvino.Tensor, openvino_genai.GenerationConfig
        self.ignored = openvino_genai.GenerationStatus.IGNORED
        self.name, self.precision, self.chunk = Path(model).name, precision, chunk
        self.blocks, self.vocabulary = blocks, vocabulary
        exact = {} if precision is None else {"KV_CACHE_PRECISION": precision, "INFERENCE_PRECISION_HINT": "f32"}
        self.pipelines = []
        for caching in (True, False):
            scheduler = openvino_genai.SchedulerConfig()
            scheduler.enable_prefix_caching, scheduler.dynamic_split_fuse = caching, True
            scheduler.num_kv_blocks, scheduler.max_num_batched_tokens = blocks, chunk
            self.pipelines.append(openvino_genai.ContinuousBatchingPipeline(str(model), scheduler, "CPU", exact))
        self.number = 0

    def describe(self) -> Description:
        return Description(
            engine="OpenVINO GenAI",
            version=version("openvino-genai"),
            model=self.name,
            vocabulary=self.vocabulary,
            context=self.blocks * self.BLOCK,
            block=self.BLOCK,
            cache_off="second engine",
            reports_hits=True,
            abilities=frozenset({"abort", "concurrent"}),
            dtype="float32" if self.precision == "f32" else self.precision or "uint8",
            cache_tokens=self.blocks * self.BLOCK,
            assumed=("what was cached is told by the number of steps of a request alone",),
        )

    def source(self) -> str:
        return scripts.in_this_process("open_openvino")

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Requests with the cache in one pipeline, the others in the second one, at the same time."""
        answers = [Answer()] * len(requests)
        for pipeline, cached in zip(self.pipelines, (True, False), strict=True):
            places = [place for place, request in enumerate(requests) if request.cached is cached]
            found = self._together(pipeline, [requests[place] for place in places])
            for place, answer in zip(places, found, strict=True):
                answers[place] = answer
        return answers

    def _together(self, pipeline: Any, requests: Sequence[Request]) -> list[Answer]:
        handles: dict[int, Any] = {}
        answers = [Answer()] * len(requests)
        for place, request in enumerate(requests):
            ids = self.tensor(np.array([request.prompt], np.int64))
            handles[place] = pipeline.add_request(self.number, ids, self._parameters(request))
            self.number += 1
        found: dict[int, tuple[list[int], list[float]]] = {place: ([], []) for place in handles}
        began, first, steps, prefill = time.perf_counter(), dict.fromkeys(handles, 0.0), 0, 0
        while pipeline.has_non_finished_requests():
            pipeline.step()
            steps += 1
            for place, handle in list(handles.items()):
                while handle.can_read():
                    for part in handle.read().values():
                        found[place][0].extend(part.generated_ids)
                        found[place][1].extend(part.generated_log_probs)
                    first[place] = first[place] or time.perf_counter() - began
                    prefill = prefill or steps
                after = requests[place].abort_after
                if after is not None and len(found[place][0]) >= after:
                    handle.cancel()
                    del handles[place]
        for place, (ids, values) in found.items():
            if place in handles and handles[place].get_status() == self.ignored:
                answers[place] = Answer(error="IGNORED: the cache has no room for it")
                continue
            length = len(requests[place].prompt)
            rows = tuple({token: value} for token, value in zip(ids, values, strict=True))
            answers[place] = Answer(
                completions=(Completion(tuple(ids), rows),),
                cached=max(length - prefill * self.chunk, 0) if len(requests) == 1 else None,
                seconds_to_first=first[place],
            )
        return answers

    def _parameters(self, request: Request) -> Any:
        config = self.config()
        config.max_new_tokens, config.ignore_eos, config.do_sample, config.logprobs = request.tokens, True, False, 1
        return config
