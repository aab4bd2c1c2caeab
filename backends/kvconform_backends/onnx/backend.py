"""Base class of the ONNX Runtime backends: sessions, exported files, the uncached forward, and the proof that CUDA is
used."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import inspect
import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime  # type: ignore[import-untyped]
from numpy.typing import NDArray
from onnxruntime import InferenceSession, OrtValue

from kvconform.backend import Backend
from kvconform.errors import Unavailable
from kvconform_backends import rotary
from kvconform_backends.onnx import graphs as onnx_graphs
from kvconform_backends.onnx import runtime as onnx_runtime
from kvconform_backends.onnx.counting import CountedSessions
from kvconform_backends.onnx.runtime import nodes
from kvconform_backends.torch import decoder as torch_decoder
from kvconform_backends.torch import device_time
from kvconform_backends.validation import check_inputs
from kvconform_specs.config import Config
from kvconform_specs.tensors import weights as weights_of

Array = NDArray[Any]


class CannotRun(Exception):
    """CUDA is available but cannot run the graphs of this config; the message is the reason."""


class OnnxBackend(CountedSessions, Backend):
    """A subclass adds a cache and the graphs of a step on it: ``attention_model``, ``decoder_model``, ``MODULES``."""

    MODULES: tuple[Any, ...] = (torch_decoder, rotary, onnx_graphs)
    """An exported file depends on their source."""
    PREFIX = "decoder-"
    """Prefix of the file names."""

    @classmethod
    def refuses(cls, config: Config, device: str) -> str | None:
        """On CUDA, only building the sessions can tell; the constructor builds them again."""
        lacks = rotary.lacking(config)
        if lacks is not None:
            return lacks
        backend: Any = cls  # mypy does not treat a class as Hashable
        return unable(backend, config, device) if device == "cuda" else None

    def __init__(self, config: Config, weights: Mapping[str, NDArray[np.float32]], device: str = "cpu") -> None:
        onnxruntime.set_default_logger_severity(4)  # failures are raised as exceptions too
        self.config, self.weights, self.device = config, weights, device
        self.dtype = np.float16 if config.dtype == "float16" else np.float32
        self.sessions: dict[tuple[bool, bool], InferenceSession] = {}  # keys: (cached, masked)
        self.files: list[str] = []
        self.seen_on: str | None = None  # the device of the last outputs
        self.device_time = device_time.DeviceTime(device)
        if device == "cuda":
            self.reach_device()
            self.prove_device()
        else:
            self.session(cached=True, masked=self.masked())

    # --- sizes ---
    def free_slots(self, cache: Any) -> list[int]:
        return [self.config.capacity - length for length in self.length(cache)]

    # --- arithmetic ---
    def uncached_forward(self, *inputs: Array, last_only: bool = False) -> Array:
        """Uses a graph without past inputs."""
        t = check_inputs(self.config, None, inputs)
        feeds = self.feeds(inputs, 0, t, None, last_only)
        return self.array(self.run(self.session(False, onnx_graphs.needs_mask(self.config)), feeds)[0])

    def feeds(self, inputs: tuple[Array, ...], past: int, t: int, allowed: Array | None, last: bool) -> list[OrtValue]:
        """The graph's inputs before the cache: the tokens, and either the positions that give logits or the mask."""
        dtype = np.int64 if self.config.profile == "decoder" else self.dtype
        feeds = [self.value(x.astype(dtype, copy=False)) for x in inputs]
        if self.config.profile == "decoder":
            feeds.append(self.first if t == 1 else self.value(np.arange(t - 1 if last else 0, t)))
        elif onnx_graphs.needs_mask(self.config) or allowed is not None:
            mask = onnx_graphs.attention_mask(self.config, past, t, allowed)
            feeds.append(self.value(mask if mask.dtype == np.bool_ else mask.astype(self.dtype)))
        return feeds

    def run(self, session: InferenceSession, feeds: list[OrtValue]) -> list[OrtValue]:
        named = dict(zip(onnx_runtime.names(session)[0], feeds, strict=True))
        values = onnx_runtime.run(session, named, self.device)
        self.seen_on = self.device  # otherwise the run raises
        return values

    @functools.cached_property
    def first(self) -> OrtValue:
        """The position that gives logits in a decode step."""
        return self.value(np.zeros(1, np.int64))

    def value(self, x: Array) -> OrtValue:
        return onnx_runtime.value_of(x, self.device)

    def array(self, value: OrtValue) -> Array:
        return onnx_runtime.widened(value)

    # --- timing ---
    def synchronise(self) -> None:
        """A session waits for its stream at the end of each run, so that nothing remains to be done."""
        device_time.synchronise(self.device)

    def device_ns(self, call: Callable[[int], object], steps: int) -> int | None:
        return self.device_time.ns(call, steps)

    # --- sessions ---
    def session(self, cached: bool, masked: bool) -> InferenceSession:
        """Built at first use, so that unused graphs (uncached, masked) cost nothing."""
        if (cached, masked) in self.sessions:
            return self.sessions[cached, masked]
        source: bytes | str
        if self.config.profile == "attention":
            source = self.attention_model(cached, masked)
        else:
            source = str(self.artefact(cached))
            self.files.append(Path(source).name)  # the folder is specific to a run
        session = onnx_runtime.open_session(source, self.device)
        if self.device == "cuda":
            self.prove_session(session)
        self.sessions[cached, masked] = session
        return session

    def masked(self) -> bool:
        """Whether a step takes a mask even if the caller gives none."""
        return onnx_graphs.needs_mask(self.config)

    def attention_model(self, cached: bool, masked: bool) -> bytes:
        return onnx_graphs.attention_model(self.config, cached, masked)

    def decoder_model(self, cached: bool) -> bytes:
        return onnx_graphs.decoder_model(self.config, self.weights, cached)

    def artefact(self, cached: bool) -> Path:
        """The exported file; it is reused for the same config, weights, package versions and source."""
        digest = hashlib.sha256(json.dumps(self.config.to_json(), sort_keys=True).encode())
        for package in ("torch", "onnx", "onnxscript"):
            digest.update(importlib.metadata.version(package).encode())
        for module in self.MODULES:
            digest.update(inspect.getsource(module).encode())
        for name, weight in self.weights.items():
            digest.update(name.encode() + np.ascontiguousarray(weight).tobytes())
        folder = Path(os.environ.get("KVCONFORM_ARTEFACTS") or self.scratch())
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.PREFIX if cached else 'decoder-full-'}{digest.hexdigest()[:12]}.onnx"
        if not path.exists():
            made = path.with_suffix(f".{os.getpid()}")
            made.write_bytes(self.decoder_model(cached))
            made.replace(path)  # atomic for other workers
        return path

    def scratch(self) -> str:
        folder = tempfile.mkdtemp(prefix="kvconform-")
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        return folder

    # --- execution providers ---
    def reach_device(self) -> None:
        """Raises Unavailable without CUDA: a session would otherwise silently run on the CPU."""
        onnx_runtime.reach_cuda()

    def prove_session(self, session: InferenceSession) -> None:
        """Raises CannotRun unless CUDA runs every heavy node: sessions fall back silently."""
        onnx_runtime.check_first(session)
        missing = onnx_runtime.off_cuda(nodes(session))
        if missing:
            raise CannotRun(f"ONNX Runtime {onnxruntime.__version__} has no CUDA kernel for {', '.join(missing)} here")

    def prove_device(self) -> None:
        """Builds and runs every graph: some kernels report unsupported cases, such as grouped heads, only then."""
        try:
            self.try_out()
        except (Unavailable, CannotRun):
            raise
        except Exception as error:  # ONNX Runtime's errors (Fail, EPFail, ...) share no other base
            raise CannotRun(f"ONNX Runtime {onnxruntime.__version__} cannot run it on CUDA: {error}") from error

    def try_out(self) -> None:
        """Runs every graph once."""
        raise NotImplementedError

    def probe(self, t: int) -> list[Array]:
        c = self.config
        if c.profile == "decoder":
            return [np.zeros((1, t), np.int64)]
        return [np.zeros((1, heads, t, c.head_dim), np.float32) for heads in (c.heads, c.kv_heads, c.kv_heads)]

    def runtime_info(self) -> dict[str, Any]:
        return {
            **{name: importlib.metadata.version(name) for name in ("torch", "onnx", "onnxscript")},
            **onnx_runtime.runtime_info(self.sessions.values(), self.config.dtype, self.device),
            "device": self.seen_on,
            "device_time": self.device_time.methods,
            "opset": onnx_graphs.OPSET,
            "files": self.files,
        }


@functools.cache
def unable(backend: Callable[..., OnnxBackend], config: Config, device: str) -> str | None:
    """Why this config cannot run on the device. Raises Unavailable if no config can."""
    try:
        backend(config, weights_of(config), device)
    except CannotRun as reason:
        return str(reason)
    return None
