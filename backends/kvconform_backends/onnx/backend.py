"""What the backends of ONNX Runtime share: sessions, exported files, the forward without a cache, and the proof
that CUDA runs them."""

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
    """CUDA is there and cannot run the graphs of this config: the reason."""


class OnnxBackend(CountedSessions, Backend):
    """A backend adds a cache, and the graphs of a step on it: ``attention_model``, ``decoder_model``, ``MODULES``."""

    MODULES: tuple[Any, ...] = (torch_decoder, onnx_graphs)
    """An exported file depends on their source."""
    PREFIX = "decoder-"
    """Of the files' names."""

    @classmethod
    def refuses(cls, config: Config, device: str) -> str | None:
        """On CUDA only built sessions know: it builds them, and the constructor does so again."""
        backend: Any = cls  # mypy takes a class for no Hashable
        return unable(backend, config, device) if device == "cuda" else None

    def __init__(self, config: Config, weights: Mapping[str, NDArray[np.float32]], device: str = "cpu") -> None:
        onnxruntime.set_default_logger_severity(4)  # what fails here is raised, too
        self.config, self.weights, self.device = config, weights, device
        self.dtype = np.float16 if config.dtype == "float16" else np.float32
        self.sessions: dict[tuple[bool, bool], InferenceSession] = {}  # with a cache or without, masked or causal
        self.files: list[str] = []
        self.seen_on: str | None = None  # the device of the last outputs
        self.device_time = device_time.DeviceTime(device)
        if device == "cuda":
            self.reach_device()
            self.prove_device()
        else:
            self.session(cached=True, masked=self.masked())

    # --- arithmetic ---
    def uncached_forward(self, *inputs: Array, last_only: bool = False) -> Array:
        """A graph of its own, which has no past to read."""
        t = check_inputs(self.config, None, inputs)
        feeds = self.feeds(inputs, 0, t, None, last_only)
        return self.array(self.run(self.session(False, onnx_graphs.needs_mask(self.config)), feeds)[0])

    def feeds(self, inputs: tuple[Array, ...], past: int, t: int, allowed: Array | None, last: bool) -> list[OrtValue]:
        """What the graphs take before the cache: the tokens, and which of them give logits, or the mask."""
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
        self.seen_on = self.device  # or it would have raised
        return values

    @functools.cached_property
    def first(self) -> OrtValue:
        """Of a decode step's tokens the one that gives logits."""
        return self.value(np.zeros(1, np.int64))

    def value(self, x: Array) -> OrtValue:
        return onnx_runtime.value_of(x, self.device)

    def array(self, value: OrtValue) -> Array:
        return onnx_runtime.widened(value)

    # --- timing ---
    def synchronise(self) -> None:
        """A session waits for its stream at the end of each run: nothing is left to do."""
        device_time.synchronise(self.device)

    def device_ns(self, call: Callable[[int], object], steps: int) -> int | None:
        return self.device_time.ns(call, steps)

    # --- sessions ---
    def session(self, cached: bool, masked: bool) -> InferenceSession:
        """Built at first use: a backend that is never asked for ``full`` or a mask does not pay for its graph."""
        if (cached, masked) in self.sessions:
            return self.sessions[cached, masked]
        source: bytes | str
        if self.config.profile == "attention":
            source = self.attention_model(cached, masked)
        else:
            source = str(self.artefact(cached))
            self.files.append(Path(source).name)  # the folder is the run's own: artefacts, beside the results
        session = onnx_runtime.open_session(source, self.device)
        if self.device == "cuda":
            self.prove_session(session)
        self.sessions[cached, masked] = session
        return session

    def masked(self) -> bool:
        """Whether a step takes a mask where the caller gives none."""
        return onnx_graphs.needs_mask(self.config)

    def attention_model(self, cached: bool, masked: bool) -> bytes:
        return onnx_graphs.attention_model(self.config, cached, masked)

    def decoder_model(self, cached: bool) -> bytes:
        return onnx_graphs.decoder_model(self.config, self.weights, cached)

    def artefact(self, cached: bool) -> Path:
        """The exported file, made unless one of the same config, weights, versions and source is there."""
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
            made.replace(path)  # another worker sees the whole file or none
        return path

    def scratch(self) -> str:
        folder = tempfile.mkdtemp(prefix="kvconform-")
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        return folder

    # --- what really runs ---
    def reach_device(self) -> None:
        """Raises Unavailable where there is no CUDA: a session asked for it would run on the CPU without a word."""
        onnx_runtime.reach_cuda()

    def prove_session(self, session: InferenceSession) -> None:
        """Raises CannotRun unless CUDA runs every heavy node: the session itself would fall back in silence."""
        onnx_runtime.check_first(session)
        strays = onnx_runtime.strays(nodes(session))
        if strays:
            raise CannotRun(f"ONNX Runtime {onnxruntime.__version__} has no CUDA kernel for {', '.join(strays)} here")

    def prove_device(self) -> None:
        """Builds every graph and runs it: some kernels tell only then what they cannot do, such as grouped heads."""
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
            "device_time": self.device_time.said,
            "opset": onnx_graphs.OPSET,
            "files": self.files,
        }


@functools.cache
def unable(backend: Callable[..., OnnxBackend], config: Config, device: str) -> str | None:
    """Why this config cannot run on the device. Raises Unavailable where nothing can."""
    try:
        backend(config, weights_of(config), device)
    except CannotRun as reason:
        return str(reason)
    return None
