"""Continuous batching of transformers in this process: two managers, one of them without shared blocks."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvconform.errors import Unavailable
from kvconform.serving.engine import Answer, Completion, Description, Engine
from kvconform_backends.servers import scripts
from kvconform_specs.serving.requests import Request

SECONDS = 60.0
"""How long a manager may take to start, and a token to come."""


class Batching(Engine):
    """Managers with a paged cache, on the CPU. Only the chosen token's log-probability is returned.

    Answers do not tell what was cached; it is read from the manager, which looks for the prefix of each new request
    with ``search_prefix_match``. page: tokens of a block; blocks: of the cache; chunk: the most tokens of one step.
    """

    def __init__(
        self,
        model: Path,
        dtype: str = "float32",
        attention: str = "sdpa",
        page: int = 32,
        blocks: int = 40,
        chunk: int = 64,
    ) -> None:
        try:
            import torch
            import transformers
        except ImportError as missing:
            raise Unavailable(f"continuous batching needs {missing.name!r}", "pip install 'kvconform[hf]'") from missing

        self.version, self.dtype = str(transformers.__version__), dtype
        self.name, self.page, self.blocks = Path(model).name, page, blocks
        self.found: dict[str, int] = {}
        self.managers = []
        generation: Any = transformers.GenerationConfig
        for sharing in (True, False):
            loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
                model, dtype=getattr(torch, dtype), attn_implementation=attention
            ).eval()  # type: ignore[no-untyped-call]
            self.vocabulary = int(loaded.config.vocab_size)
            self.context = min(int(loaded.config.max_position_embeddings), page * blocks)
            manager = loaded.init_continuous_batching(
                generation_config=generation(do_sample=False, eos_token_id=-1),
                continuous_batching_config=transformers.ContinuousBatchingConfig(
                    page_size=page,
                    num_blocks=blocks,
                    max_batch_tokens=chunk,
                    allow_block_sharing=sharing,
                    return_logprobs=True,
                    use_cuda_graph=False,
                ),
            )
            manager.start()
            self._watch(manager)
            self.managers.append(manager)
        self.number = 0

    def _watch(self, manager: Any) -> None:
        """Notes how many tokens of each request's prompt the manager finds in its cache."""
        ends = time.monotonic() + SECONDS
        while getattr(manager, "batch_processor", None) is None:
            if time.monotonic() > ends or not manager.is_running():
                raise Unavailable(f"continuous batching does not start within {SECONDS:.0f} s")
            time.sleep(0.01)
        cache = manager.batch_processor.cache
        search = cache.search_prefix_match

        def noted(name: str, prompt: list[int]) -> int:
            self.found[name] = int(search(name, prompt))
            return self.found[name]

        cache.search_prefix_match = noted

    def describe(self) -> Description:
        return Description(
            engine="transformers continuous batching",
            version=self.version,
            model=self.name,
            vocabulary=self.vocabulary,
            context=self.context,
            block=self.page,
            cache_off="second engine",
            reports_hits=True,
            abilities=frozenset({"abort", "concurrent"}),
            dtype=self.dtype,
            cache_tokens=self.page * self.blocks,
            assumed=("what was cached is read from the manager's search for a prefix",),
        )

    def source(self) -> str:
        return scripts.in_this_process("open_transformers")

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        began, names = time.perf_counter(), []
        for request in requests:
            self.number += 1
            names.append(f"kvconform-{self.number}")
            self._manager(request).add_request(
                list(request.prompt),
                request_id=names[-1],
                max_new_tokens=request.tokens,
                streaming=request.abort_after is not None,
            )
        arrived: dict[str, Any] = {}
        return [self._result(request, name, began, arrived) for request, name in zip(requests, names, strict=True)]

    def _manager(self, request: Request) -> Any:
        return self.managers[0 if request.cached else 1]

    def _result(self, request: Request, name: str, began: float, arrived: dict[str, Any]) -> Answer:
        """The answer of one request; what arrives for others meanwhile is kept, each output holds all tokens so far."""
        manager, ends = self._manager(request), time.monotonic() + SECONDS
        while True:
            output = arrived.pop(name, None) or manager.get_result(timeout=1.0)
            if output is None:
                if time.monotonic() > ends or not manager.is_running():
                    fatal = manager.background_thread_status.fatal_error
                    raise ConnectionError(f"the manager has stopped: {fatal}" if fatal else f"none in {SECONDS:.0f} s")
                continue
            if output.request_id != name:
                arrived[output.request_id] = output
                continue
            if output.error is not None:
                return Answer(error=str(output.error))
            left = request.abort_after is not None and len(output.generated_tokens) >= request.abort_after
            if left:
                manager.cancel_request(name)
            if left or output.is_finished():
                break
        rows = tuple({int(i): float(p)} for i, p in zip(output.generated_tokens, output.logprobs, strict=False))
        return Answer(
            completions=(Completion(tuple(map(int, output.generated_tokens)), rows),),
            cached=self.found.pop(name, 0),
            seconds_to_first=time.perf_counter() - began if request.tokens == 1 else None,
        )

    def close(self) -> None:
        for manager in self.managers:
            manager.stop(block=True)
