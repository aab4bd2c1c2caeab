"""The toy engine behind HTTP, in the dialects of real servers: what an adapter reads must be what the engine said."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from kvconform.serving.engine import Answer, Completion
from kvconform_backends.servers.tiny_models import FIRST
from kvconform_backends.servers.toy import ToyEngine
from kvconform_specs.serving.requests import Request

Json = Mapping[str, Any]


class Refusal(Exception):
    """HTTP 400."""


class Dialect:
    """``get`` and ``post`` map a path to JSON or text; ``parts`` gives an answer's events where it is streamed."""

    def __init__(self, engine: ToyEngine) -> None:
        self.engine, self.lock = engine, threading.Lock()
        self.said: list[tuple[Request, Answer]] = []

    def answer(self, request: Request) -> Answer:
        with self.lock:
            found = self.engine.answer([request])[0]
            self.said.append((request, found))
        if found.error is not None:
            raise Refusal(found.error)
        return found

    def get(self, path: str) -> Any:
        raise NotImplementedError

    def post(self, path: str, body: Json) -> Any:
        raise NotImplementedError

    def parts(self, path: str, body: Json) -> Iterator[Any]:
        raise NotImplementedError


def one_by_one(completion: Completion) -> Iterator[Completion]:
    for token, row in zip(completion.ids, completion.logprobs, strict=True):
        yield Completion((token,), (row,))


class Vllm(Dialect):
    """``token_id:N``, salts, and metrics."""

    salted = True

    def get(self, path: str) -> Any:
        e = self.engine
        return {
            "/v1/models": {"data": [{"id": "toy", "owned_by": "vllm", "max_model_len": e.context}]},
            "/version": {"version": "9.9"},
            "/metrics": f'vllm:cache_config_info{{block_size="{e.block}",num_gpu_blocks="{e.blocks}"}} 1.0\n'
            f'vllm:num_preemptions_total{{engine="0"}} {float(e.preempted)}\n',
        }.get(path)

    def request(self, body: Json) -> Request:
        if not isinstance(body["prompt"], list) or body["logprobs"] > self.engine.alternatives:
            raise Refusal(f"want a list of ids as prompt, and logprobs at most {self.engine.alternatives}")
        if "cache_salt" in body and not self.salted:
            raise Refusal("unknown field cache_salt")
        return Request(
            tuple(body["prompt"]),
            body["max_tokens"],
            n=body.get("n", 1),
            salt=body.get("cache_salt"),
            score="prompt_logprobs" in body,
        )

    def choice(self, completion: Completion, index: int = 0) -> dict[str, Any]:
        return {
            "index": index,
            "logprobs": {
                "tokens": [f"token_id:{i}" for i in completion.ids],
                "token_logprobs": [row[i] for i, row in zip(completion.ids, completion.logprobs, strict=True)],
                "top_logprobs": [{f"token_id:{i}": v for i, v in row.items()} for row in completion.logprobs],
            },
        }

    def post(self, path: str, body: Json) -> Any:
        assert path == "/v1/completions", path
        found = self.answer(self.request(body))
        choices = [self.choice(completion, index) for index, completion in enumerate(found.completions)]
        if found.prompt_logprobs:
            rows = [{str(i): {"logprob": v} for i, v in row.items()} for row in found.prompt_logprobs]
            choices[0]["prompt_logprobs"] = [None, *rows]
        usage = {"prompt_tokens": found.prompt_tokens, "completion_tokens": found.completion_tokens}
        details = {"cached_tokens": found.cached} if found.cached else None  # as vLLM: null where there was no hit
        return {"choices": choices[::-1], "usage": {**usage, "prompt_tokens_details": details}}

    def parts(self, path: str, body: Json) -> Iterator[Any]:
        for part in one_by_one(self.answer(self.request(body)).completions[0]):
            yield {"choices": [self.choice(part)]}
        yield {"choices": [], "usage": {}}


class MlxLm(Vllm):
    """Text in and out, ``content`` in the chat form, whose own id is not the chosen token's; no models, no metrics."""

    def get(self, path: str) -> Any:
        return {"/v1/models": {"data": []}}.get(path)

    def request(self, body: Json) -> Request:
        if not isinstance(body["logprobs"], bool) or not isinstance(body["prompt"], str):
            raise Refusal("logprobs must be of type bool, prompt of type str")
        return Request(tuple(ord(letter) - FIRST for letter in body["prompt"]), body["max_tokens"])

    def choice(self, completion: Completion, index: int = 0) -> dict[str, Any]:
        rows = [[{"id": i, "logprob": v} for i, v in sorted(row.items())] for row in completion.logprobs]
        text = "".join(chr(FIRST + i) for i in completion.ids)
        content = [{**row[0], "top_logprobs": row} for row in rows]
        return {"index": index, "text": text, "logprobs": {"content": content}}


class LlamaCpp(Dialect):
    """``/completion`` of llama.cpp."""

    def get(self, path: str) -> Any:
        e = self.engine
        return {
            "/props": {"total_slots": 4, "default_generation_settings": {"n_ctx": e.context}, "build_info": "b1"},
            "/v1/models": {"data": [{"id": "toy", "meta": {"n_vocab": e.describe().vocabulary}}]},
        }.get(path)

    def request(self, body: Json) -> Request:
        return Request(tuple(body["prompt"]), body["n_predict"], cached=body["cache_prompt"], n=body.get("n", 1))

    def part(self, completion: Completion, found: Answer, stop: bool = True) -> Json:
        return {
            "tokens": list(completion.ids),
            "stop": stop,
            "completion_probabilities": [
                {"id": i, "logprob": row[i], "top_logprobs": [{"id": t, "logprob": v} for t, v in row.items()]}
                for i, row in zip(completion.ids, completion.logprobs, strict=True)
            ],
            "timings": {"cache_n": found.cached},
            "tokens_evaluated": found.prompt_tokens,
            "tokens_predicted": len(completion.ids),
        }

    def post(self, path: str, body: Json) -> Any:
        assert path == "/completion", path
        found = self.answer(self.request(body))
        parts = [self.part(completion, found) for completion in found.completions]
        return parts if len(parts) > 1 else parts[0]

    def parts(self, path: str, body: Json) -> Iterator[Any]:
        found = self.answer(self.request(body))
        for part in one_by_one(found.completions[0]):
            yield self.part(part, found, stop=False)
        yield {"tokens": [], "stop": True}


class SGLang(Dialect):
    """``/generate`` of SGLang."""

    def get(self, path: str) -> Any:
        e = self.engine
        told = {"version": "9.9", "model_path": "toy", "context_length": e.context, "page_size": e.block}
        return {"/get_server_info": {**told, "max_total_num_tokens": e.blocks * e.block, "dtype": "float32"}}.get(path)

    def request(self, body: Json) -> Request:
        sampling = body["sampling_params"]
        ids = tuple(body["input_ids"])
        return Request(ids, sampling["max_new_tokens"], n=sampling["n"], salt=body.get("extra_key"))

    def part(self, completion: Completion, found: Answer, count: int | None = None) -> Json:
        ids, rows = completion.ids[:count], completion.logprobs[:count]
        return {
            "output_ids": list(ids),
            "meta_info": {
                "output_token_logprobs": [[row[i], i, None] for i, row in zip(ids, rows, strict=True)],
                "output_top_logprobs": [[[v, i, None] for i, v in row.items()] for row in rows],
                "cached_tokens": found.cached,
                "prompt_tokens": found.prompt_tokens,
                "completion_tokens": len(ids),
            },
        }

    def post(self, path: str, body: Json) -> Any:
        if path == "/flush_cache":
            with self.lock:
                self.engine.reset()
            return {}
        found = self.answer(self.request(body))
        parts = [self.part(completion, found) for completion in found.completions]
        return parts if len(parts) > 1 else parts[0]

    def parts(self, path: str, body: Json) -> Iterator[Any]:
        found = self.answer(self.request(body))
        for count in range(1, len(found.completions[0].ids) + 1):
            yield self.part(found.completions[0], found, count)


@contextmanager
def serving(dialect: Dialect) -> Iterator[str]:
    """A server on a free port of this machine; its URL."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def send(self, status: int, content: object) -> None:
            text = content if isinstance(content, str) else json.dumps(content)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def do_GET(self) -> None:
            found = dialect.get(self.path)
            self.send(404 if found is None else 200, found or "not found")

        def do_POST(self) -> None:
            text = self.rfile.read(int(self.headers["Content-Length"]))
            body = json.loads(text)
            try:
                if not body.get("stream"):
                    self.send(200, dialect.post(self.path, body))
                    return
                parts = list(dialect.parts(self.path, body))
            except Refusal as refused:
                self.send(400, {"error": str(refused)})
                return
            self.send_response(200)
            self.end_headers()
            for part in parts:
                self.wfile.write(b"data: " + json.dumps(part).encode() + b"\n\n")
            self.wfile.write(b"data: [DONE]\n\n")

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        server.server_close()
