"""JSON over HTTP with the standard library, for adapters to servers: posts, server-sent events, requests at once."""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from typing import Any

from kvconform.serving.engine import Answer
from kvconform_specs.serving.requests import Request

KEY = "KVCONFORM_API_KEY"
"""The environment variable that holds the key of the server; it is sent, and neither stored nor printed."""


class Refused(Exception):
    """The server answered with an error. status: of HTTP; the text is what it said, at most 500 characters."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"HTTP {status}: {text}"[:500])
        self.status = status


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirection is an error: the key and the prompts go to the named server only."""

    def redirect_request(self, *_: object) -> None:
        return None


class Client:
    """One server. timeout: seconds without a byte, after which a request counts as refused."""

    def __init__(self, url: str, timeout: float = 120.0) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self.timeout = timeout
        self._opener = urllib.request.build_opener(NoRedirect, urllib.request.ProxyHandler({}))

    def get(self, path: str) -> str:
        """Raises Refused, or ConnectionError if the server cannot be reached."""
        with self._open(path, None) as response:
            return str(response.read().decode())

    def json(self, path: str) -> Any:
        """What a path gives, None if it gives no JSON. Raises ConnectionError."""
        try:
            return json.loads(self.get(path))
        except (Refused, ValueError):
            return None

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """Raises Refused, or ConnectionError."""
        with self._open(path, body) as response:
            text = response.read().decode()
        return json.loads(text) if text else None

    def events(self, path: str, body: Mapping[str, Any]) -> Iterator[Any]:
        """The data of server-sent events. The connection is closed with the iterator, also before the end."""
        with self._open(path, {**body, "stream": True}) as response:
            for line in response:
                data = line.decode().strip().removeprefix("data:").strip()
                if line.startswith(b"data:") and data != "[DONE]":
                    event = json.loads(data)
                    if "error" in event:
                        raise Refused(200, json.dumps(event["error"]))
                    yield event

    def _open(self, path: str, body: Mapping[str, Any] | None) -> Any:
        headers = {"Content-Type": "application/json"}
        if os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {os.environ[KEY]}"
        data = None if body is None else json.dumps(body).encode()
        try:
            return self._opener.open(urllib.request.Request(self.url + path, data, headers), timeout=self.timeout)
        except urllib.error.HTTPError as error:
            with error:
                raise Refused(error.code, error.read().decode(errors="replace")) from None
        except urllib.error.URLError as error:
            raise ConnectionError(f"{self.url} cannot be reached: {error.reason}") from error


def answers(requests: Sequence[Request], answer: Callable[[Request], Answer]) -> list[Answer]:
    """Answers all at the same time, each in its own thread; a refused request gives an answer with ``error``."""

    def one(request: Request) -> Answer:
        began = time.perf_counter()
        try:
            return answer(request)
        except Refused as refused:
            return Answer(error=str(refused))
        except TimeoutError:
            return Answer(error=f"no answer within {time.perf_counter() - began:.0f} s")
        except (HTTPException, json.JSONDecodeError) as error:
            return Answer(error=f"the answer breaks off: {error!r}"[:500])

    if len(requests) == 1:
        return [one(requests[0])]
    with ThreadPoolExecutor(len(requests)) as threads:
        return list(threads.map(one, requests))
