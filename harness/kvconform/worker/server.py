"""The process that a backend lives in: ``python -m kvconform.worker.server ADDRESS DEVICE PROGRESS_FILE``.

It may run under another interpreter: it needs numpy and this package, nothing more. It answers on a private copy of
its standard output, so that a backend may print what it likes, and it may die: the parent reads from the progress
file where it was.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import astuple
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from kvconform.backend import Backend, BlackBox, completed, unimplemented
from kvconform.errors import BackendUnavailable, InvalidBackend, Raised, Unavailable
from kvconform.worker.execute import execute
from kvconform.worker.protocol import PROGRESS, Header, pack, receive, send
from kvconform.worker.registry import load
from kvconform_specs.config import Config
from kvconform_specs.program import Program
from kvconform_specs.tensors import weights

Reply = tuple[Header, bytes]
Handler = Callable[[Header], Reply]
DISTRIBUTIONS = ("kvconform", "numpy", "torch", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu", "transformers")
"""Whose versions every record names, where they are installed; none of them is imported for it. Of other
distributions a record names those that the worker has imported."""


class Worker:
    """One backend, its built backends by config, and the messages it understands."""

    def __init__(self, address: str, device: str, progress: Callable[[int, int], None]) -> None:
        self.address, self.device, self.progress = address, device, progress
        self.backend: Any = None
        self.backends: dict[Config, Any] = {}
        self.perturbed: dict[tuple[Config, tuple[float, float, int]], Any] = {}
        self.varied: dict[Config, Mapping[str, Any]] = {}

    def answer(self, message: Header, blob: bytes = b"") -> Reply:
        return self.handlers(blob)[message["op"]](message)

    def handlers(self, blob: bytes) -> dict[str, Handler]:
        """What answers each message, by its ``op``; ``blob`` came with the message."""
        return {
            "describe": self.describe,
            "build": self.build,
            "run": self.run,
            "runtime_info": self.runtime_info,
            "script": self.script,
            "imported": self.imported,
            "versions": self.versions,
            "reference_forward": partial(self.reference_forward, blob=blob),
            "variants": self.variants,
        }

    def describe(self, message: Header) -> Reply:
        self.backend = load(self.address)
        claims = self.backend.claims.to_json()
        target = None
        if self.backend.claims.reference == "self":
            configs = {name: config.to_json() for name, config in self.backend.configs.items()}
            assumed = list(getattr(self.backend, "assumed", BlackBox.assumed))
            not_tried = list(getattr(self.backend, "not_tried", BlackBox.not_tried))
            told = {"recognised": self.backend.recognised, "assumed": assumed, "not_tried": not_tried}
            held = getattr(self.backend, "held", BlackBox.held)
            target = {
                **told,
                "configs": configs,
                "held": held and dict(held),
                "reference": getattr(self.backend, "reference", BlackBox.reference),
                "cache_dtype": getattr(self.backend, "cache_dtype", BlackBox.cache_dtype),
                "parameters": getattr(self.backend, "parameters", BlackBox.parameters),
            }
        return {"claims": claims, "environment": environment(self.backend), "target": target}, b""

    def build(self, message: Header) -> Reply:
        config = Config.from_json(message["config"])
        refuses = getattr(self.backend, "refuses", Backend.refuses)
        reason = refuses(config, self.device)
        if reason is not None:
            return {"refused": str(reason)}, b""
        began = time.perf_counter()
        if config not in self.backends:
            held = {} if self.backend.claims.reference == "self" else weights(config)
            built = completed(self.backend(config, held, self.device))
            wrong = unimplemented(type(built), built.claims)  # a target's claims are known only now
            if wrong:
                raise InvalidBackend(f"backend {self.address!r} {wrong}")
            self.backends[config] = built
        return {"seconds": time.perf_counter() - began}, b""

    def run(self, message: Header) -> Reply:
        program = Program.from_json(message["program"])
        return pack(execute(self.backends[program.config], program, tuple(message["indices"]), self.progress))

    def reference_forward(self, message: Header, blob: bytes) -> Reply:
        """The cache-less forward of a black box, perturbed or not (``oracle.ReferenceForward``)."""
        config = Config.from_json(message["config"])
        inputs = np.frombuffer(blob, message["dtype"]).reshape(message["shape"]).copy()
        backend = self.backends[config]
        if message["variant"]:
            backend = self._varied(config)[message["variant"]]
        elif message["seed"]:
            key = config, (message["storage"], message["accumulation"], message["seed"])
            if key not in self.perturbed:
                self.perturbed[key] = backend.perturbed(*key[1])
            backend = self.perturbed[key]
        told = {"context": message["context"]} if message["context"] else {}
        output = np.ascontiguousarray(backend.uncached_forward(inputs, **told))
        return {"shape": list(output.shape), "dtype": output.dtype.str}, output.tobytes()

    def variants(self, message: Header) -> Reply:
        """The variants of a black box, in words (``backend.BlackBox.variants``)."""
        return {"variants": list(self._varied(Config.from_json(message["config"])))}, b""

    def _varied(self, config: Config) -> Mapping[str, Any]:
        if config not in self.varied:
            self.varied[config] = self.backends[config].variants()
        return self.varied[config]

    def script(self, message: Header) -> Reply:
        """Programs of a black box as Python source (``backend.BlackBox.script``); null where it writes none."""
        backend = self.backends[Config.from_json(message["config"])]
        setup = backend.script_setup()
        if setup is None:
            return {"setup": None, "sources": []}, b""
        sources = [backend.script(Program.from_json(program), tag) for program, tag in message["programs"]]
        return {"setup": setup, "sources": sources}, b""

    def imported(self, message: Header) -> Reply:
        """The versions of the distributions that this process has imported by now."""
        tops = {name.partition(".")[0] for name in tuple(sys.modules)} - sys.stdlib_module_names
        names = {name for top in tops for name in distributions().get(top, ())}
        return {"versions": versions(sorted(names))}, b""

    def versions(self, message: Header) -> Reply:
        """The versions of the named distributions, of those that are installed."""
        return {"versions": versions(message["names"])}, b""

    def runtime_info(self, message: Header) -> Reply:
        backend = self.backends[Config.from_json(message["config"])]
        design = {} if backend.cache_design is None else {"cache_design": backend.cache_design}
        return {"runtime_info": {**design, **backend.runtime_info()}}, b""


def versions(names: Iterable[str]) -> dict[str, str]:
    """The installed versions, by name; what is not installed is left out."""
    found = {}
    for name in names:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


distributions = cache(packages_distributions)
"""The distributions that each importable top-level name comes from; reading them takes some 0.1 s, once a process."""


def environment(backend: Any) -> dict[str, str]:
    """What bears on a backend's results here: versions of what is installed, by name, and a digest of its own file."""
    found = {"python": platform.python_version(), "platform": platform.platform(), **versions(DISTRIBUTIONS)}
    own = getattr(sys.modules.get(backend.__module__), "__file__", None)
    source = Path(getattr(backend, "source", None) or own or "")
    if source.is_file():
        found["source"] = hashlib.sha256(source.read_bytes()).hexdigest()[:16]
    return found


def serve(worker: Worker, inbox: BinaryIO, outbox: BinaryIO) -> None:
    while (frame := receive(inbox)) is not None:
        try:
            header, blob = worker.answer(*frame)
            json.dumps(header)  # a runtime_info may hold what is no JSON
        except InvalidBackend as error:
            header, blob = {"raised": "InvalidBackend", "words": [str(error)]}, b""
        except BackendUnavailable as error:
            kind = Unavailable if isinstance(error, Unavailable) else BackendUnavailable
            header, blob = {"raised": kind.__name__, "words": [error.sentence, error.remedy]}, b""
        except Exception as raised:  # noqa: BLE001 - importing and building run a backend's code: its words go back
            header, blob = {"error": astuple(Raised.of(raised))}, b""
        send(outbox, header, blob)


def main(kind: type[Worker] = Worker) -> None:
    """Serves one backend until the parent closes the pipe. ``kind``: the messages that it understands."""
    address, device, path = sys.argv[1:4]
    inbox, outbox = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # what a backend prints goes to the log, never between two frames
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), PROGRESS.size) as shared:
        count = 0

        def progress(variant: int, step: int) -> None:
            nonlocal count
            count = (count + 1) & 0xFFFFFFFF
            PROGRESS.pack_into(shared, 0, count, variant, step)

        serve(kind(address, device, progress), inbox, outbox)


if __name__ == "__main__":
    main()
