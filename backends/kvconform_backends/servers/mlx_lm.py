"""mlx-lm's server, started here with a HF directory, beside a second one without a prompt cache."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from kvconform.errors import Unavailable
from kvconform.serving.engine import Answer, Description, Engine
from kvconform_backends.servers.http import Client
from kvconform_backends.servers.openai import OpenAI
from kvconform_specs.serving.requests import Request

SECONDS = 120.0
"""How long a server may take to start."""


class MlxLm(Engine):
    """The server takes text, has no ``n``, and ends an answer at the end of a text. Its model is one of tiny_models,
    where text and token ids are the same and no answer ends early."""

    def __init__(self, model: Path, context: int = 512) -> None:
        try:
            self.version = version("mlx-lm")
        except PackageNotFoundError as missing:
            raise Unavailable("mlx-lm's server needs 'mlx-lm'", "pip install mlx-lm 'mlx[cpu]'") from missing
        self.started: list[subprocess.Popen[bytes]] = []
        try:
            warm, cold = self._start(model), self._start(model, "--prompt-cache-size", "0")
            self.engine = OpenAI(warm, cold=cold, context=context, dtype="float32", model="default_model")
        except BaseException:
            self.close()
            raise
        self.name = Path(model).name

    def _start(self, model: Path, *options: str) -> str:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        command = (sys.executable, "-m", "mlx_lm", "server", "--model", str(model), "--port", port, *options)
        offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
        self.started.append(
            subprocess.Popen(command, env=offline, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        )
        client, ends = Client(f"http://127.0.0.1:{port}"), time.monotonic() + SECONDS
        while time.monotonic() < ends and self.started[-1].poll() is None:
            try:
                client.get("/health")
                return client.url
            except OSError:
                time.sleep(0.2)
        raise Unavailable(f"{' '.join(command)} does not answer; exit status {self.started[-1].poll()}")

    def describe(self) -> Description:
        return replace(self.engine.describe(), engine="mlx-lm", version=self.version, model=self.name)

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        return self.engine.answer(requests)

    def close(self) -> None:
        for server in self.started:
            server.terminate()
            server.wait()
