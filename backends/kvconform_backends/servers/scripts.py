"""Source of ``send(requests)`` for scripts that reproduce a failure; of a server, with the standard library alone."""

from __future__ import annotations

HTTP = '''
import json
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

URL = {url!r}


def post(path, body, after=None):
    """JSON; of a stream, its events up to the one with enough tokens."""
    data = json.dumps(body).encode()
    sent = urllib.request.Request(URL + path, data, {{"Content-Type": "application/json"}})
    with urllib.request.urlopen(sent) as response:
        if after is None:
            return json.loads(response.read() or b"null")
        events = []
        for line in response:
            if line.startswith(b"data:") and b"[DONE]" not in line:
                events.append(json.loads(line[5:]))
                if len(events) >= after:
                    break
        return events


def send(requests):
    def one(request):
        try:
            return {{"error": None, "prompt_logprobs": [], **answer(request)}}
        except urllib.error.HTTPError as error:
            return {{"error": error.read().decode(), "completions": [], "cached": None}}

    with ThreadPoolExecutor(len(requests)) as threads:
        return list(threads.map(one, requests))
'''

LLAMA_CPP = """

def answer(request):
    body = {"prompt": request["prompt"], "n_predict": request["tokens"], "cache_prompt": request["cached"]}
    body |= {"n_probs": 20, "return_tokens": True, "temperature": 0.0, "ignore_eos": True}
    body |= {"n": request["n"]} if request["n"] > 1 else {}
    if request["abort_after"] is not None:
        events = post("/completion", body | {"stream": True}, request["abort_after"])
        return {"completions": [completion(event) for event in events], "cached": None}
    found = post("/completion", body)
    parts = found if isinstance(found, list) else [found]
    return {
        "completions": [completion(part) for part in parts],
        "cached": parts[0]["timings"]["cache_n"],
        "prompt_tokens": parts[0]["tokens_evaluated"],
        "completion_tokens": sum(part["tokens_predicted"] for part in parts),
    }


def completion(part):
    rows = part.get("completion_probabilities", [])
    return {
        "ids": part["tokens"],
        "logprobs": [{t["id"]: t["logprob"] for t in [row, *row["top_logprobs"]]} for row in rows],
    }
"""

VLLM = """

def answer(request):
    body = {{"model": request["adapter"] or {model!r}, "prompt": request["prompt"], "max_tokens": request["tokens"]}}
    body |= {{"logprobs": {alternatives}, "return_tokens_as_token_ids": True, "ignore_eos": True, "temperature": 0.0}}
    body |= {{"n": request["n"], "temperature": 1.0, "top_k": 1}} if request["n"] > 1 else {{}}
    body |= {{"prompt_logprobs": {alternatives}}} if request["score"] else {{}}
    salt = request["salt"] if request["cached"] else f"cold-{{random.random()}}"  # a salt that no request had before
    body |= {{"cache_salt": salt}} if salt else {{}}
    if request["abort_after"] is not None:
        events = post("/v1/completions", body | {{"stream": True}}, request["abort_after"])
        found = [completion(event["choices"][0]) for event in events if event["choices"]]
        return {{"completions": found, "cached": None}}
    found = post("/v1/completions", body)
    choices = sorted(found["choices"], key=lambda choice: choice["index"])
    scores = (choices[0].get("prompt_logprobs") or [])[1:]
    return {{
        "completions": [completion(choice) for choice in choices],
        "cached": (found["usage"].get("prompt_tokens_details") or {{}}).get("cached_tokens") or 0,
        "prompt_tokens": found["usage"]["prompt_tokens"],
        "completion_tokens": found["usage"]["completion_tokens"],
        "prompt_logprobs": [{{int(i): p["logprob"] for i, p in (row or {{}}).items()}} for row in scores],
    }}


def completion(choice):
    found = choice["logprobs"]
    ids = [number(token) for token in found["tokens"]]
    rows = zip(ids, found["token_logprobs"], found["top_logprobs"])
    return {{"ids": ids, "logprobs": [{{i: p, **{{number(t): v for t, v in top.items()}}}} for i, p, top in rows]}}


def number(token):
    return int(token.removeprefix("token_id:"))
"""

HERE = """
from dataclasses import asdict

from kvconform_backends.servers.opening import {opener}
from kvconform_specs.serving.requests import Request

engine = {opener}("", {{}})


def send(requests):
    found = engine.answer([Request(**{{**one, "prompt": tuple(one["prompt"])}}) for one in requests])
    return [asdict(answer) for answer in found]
"""


def in_this_process(opener: str) -> str:
    """Of an engine without a server, on its tiny model; kvconform starts it."""
    return HERE.format(opener=opener)


def llama_cpp(url: str) -> str:
    """Of a llama.cpp server."""
    return HTTP.format(url=url) + LLAMA_CPP


def token_ids(url: str, model: str, alternatives: int) -> str:
    """Of a server that answers in vLLM's form, with ``token_id:N``."""
    return HTTP.format(url=url) + VLLM.format(model=model, alternatives=alternatives)
