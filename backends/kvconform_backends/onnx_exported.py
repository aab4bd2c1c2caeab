"""``onnx``: the torch decoder, exported once and run by ONNX Runtime: one graph for prefill, chunk and decode.

The present outputs of a step are bound as the past inputs of the next and never leave the device. They are never
written again, so that a fork is the same handles and an old handle stays good. Truncate and reorder go through numpy,
on CUDA as well.
"""

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

from kvconform.backend import Unavailable
from kvconform_backends import cuda_timing, onnx_graphs, onnx_runtime, torch_decoder
from kvconform_backends.onnx_counting import CountedSessions
from kvconform_backends.onnx_runtime import nodes
from kvconform_backends.validation import check_inputs
from kvconform_specs.claims import Claims
from kvconform_specs.config import Config
from kvconform_specs.tensors import weights as weights_of

Array = NDArray[Any]
Past = tuple[OrtValue, ...]
"""Key and value of each layer in turn, ``(b, g, s, d)`` each."""


class CannotRun(Exception):
    """CUDA is there and cannot run the graphs of this config: the reason."""


class OnnxExported(CountedSessions):
    """Attention is a hand-built ``Attention`` node, the decoder is exported; both keep a functional cache."""

    cache_design = "concatenation"
    claims = Claims(
        profiles=("attention", "decoder"),
        abilities=(
            "full", "length", "room", "truncate", "fork", "reorder", "reset", "functional", "mask", "contents", "bytes",
            "refusal",
        ),
        dtypes=("float32", "float16"),  # bfloat16: ONNX Runtime has no CPU kernels, and numpy has no such type
        devices=("cpu", "cuda"),
        overflow="refused",
        memory="length",
        # measured on 1.31.1: the CPU kernel of Attention rounds float16 scores to float16 before the softmax, whatever
        # softmax_precision says. In float32 the class has the same bound.
        intermediates="storage",
    )  # fmt: skip

    @classmethod
    def refuses(cls, config: Config, device: str) -> str | None:
        """On CUDA only built sessions know: it builds them, and the constructor does so again."""
        if (device, config.profile, config.dtype) == ("cuda", "attention", "float16") and onnx_graphs.has_bias(config):
            return "ONNX Runtime's kernels of Attention take the bias in the dtype of the query: float16 rounds it"
        return unable(config, device) if device == "cuda" else None

    def __init__(self, config: Config, weights: Mapping[str, NDArray[np.float32]], device: str = "cpu") -> None:
        onnxruntime.set_default_logger_severity(4)  # what fails here is raised, too
        self.config, self.weights, self.device = config, weights, device
        self.dtype = np.float16 if config.dtype == "float16" else np.float32
        self.sessions: dict[tuple[bool, bool], InferenceSession] = {}  # with a cache or without, masked or causal
        self.files: list[str] = []
        self.seen_on: str | None = None  # the device of the last outputs
        self.device_time = cuda_timing.DeviceTime(device)
        if device == "cuda":
            self.reach_device()
            self.prove_device()
        else:
            self.session(cached=True, masked=onnx_graphs.needs_mask(config))

    # --- lifecycle ---
    def start(self, batch: int) -> Past:
        empty = self.value(np.zeros((batch, self.config.kv_heads, 0, self.config.head_dim), self.dtype))
        return (empty,) * (2 * self.config.layers)

    def length(self, cache: Past) -> list[int]:
        batch, _, s, _ = cache[0].shape()
        return [s] * batch

    def room(self, cache: Past) -> list[int]:
        return [self.config.capacity - length for length in self.length(cache)]

    def bytes(self, cache: Past) -> int:
        return sum(int(x.tensor_size_in_bytes()) for x in cache)

    def contents(self, cache: Past) -> list[list[tuple[Array, Array]]]:
        held = [self.array(x) for x in cache]
        return [list(zip(*layer, strict=True)) for layer in zip(held[::2], held[1::2], strict=True)]

    def truncate(self, cache: Past, length: int) -> Past:
        s = cache[0].shape()[2]
        if not 0 <= length <= s:
            raise ValueError(f"cannot keep {length} of {s} tokens")
        return tuple(self.value(x.numpy()[:, :, :length].copy()) for x in cache)

    def fork(self, cache: Past) -> Past:
        return cache

    def reorder(self, cache: Past, rows: list[int]) -> Past:
        batch = cache[0].shape()[0]
        if not rows or not all(0 <= row < batch for row in rows):
            raise ValueError(f"want rows of 0..{batch - 1}, got {rows}")
        return tuple(self.value(x.numpy()[rows]) for x in cache)

    def reset(self, cache: Past) -> Past:
        return self.start(cache[0].shape()[0])

    # --- arithmetic ---
    def step(self, cache: Past, *inputs: Array, mask: Array | None = None) -> tuple[Array, Past]:
        batch, _, past, _ = cache[0].shape()
        t = check_inputs(self.config, batch, inputs)
        if past + t > self.config.capacity:
            raise ValueError(f"{past} + {t} tokens exceed the capacity of {self.config.capacity}")
        output, *present = self.attend(True, inputs, past, t, mask, cache)
        return self.array(output), tuple(present)

    def full(self, *inputs: Array) -> Array:
        """A graph of its own, which has no past to read."""
        return self.array(self.attend(False, inputs, 0, check_inputs(self.config, None, inputs), None, ())[0])

    def attend(
        self, cached: bool, inputs: tuple[Array, ...], past: int, t: int, allowed: Array | None, cache: Past
    ) -> list[OrtValue]:
        """The graph's outputs; its inputs are the tokens, the mask where it takes one, and the cache."""
        dtype = np.int64 if self.config.profile == "decoder" else self.dtype
        feeds = [self.value(x.astype(dtype, copy=False)) for x in inputs]
        masked = onnx_graphs.needs_mask(self.config) or allowed is not None
        if masked:
            mask = onnx_graphs.attention_mask(self.config, past, t, allowed)
            feeds.append(self.value(mask if mask.dtype == np.bool_ else mask.astype(self.dtype)))
        return self.run(self.session(cached, masked), [*feeds, *cache])

    def run(self, session: InferenceSession, feeds: list[OrtValue]) -> list[OrtValue]:
        named = zip((x.name for x in session.get_inputs()), feeds, strict=True)
        values = onnx_runtime.run(session, dict(named), self.device)
        self.seen_on = onnx_runtime.devices(values)
        return values

    def value(self, x: Array) -> OrtValue:
        return onnx_runtime.value_of(x, self.device)

    def array(self, value: OrtValue) -> Array:
        return onnx_runtime.widened(value)

    # --- timing ---
    def synchronise(self) -> None:
        """A session waits for its stream at the end of each run: nothing is left to do."""
        cuda_timing.synchronise(self.device)

    def device_ns(self, call: Callable[[int], object], steps: int) -> int | None:
        return self.device_time.ns(call, steps)

    # --- sessions ---
    def session(self, cached: bool, masked: bool) -> InferenceSession:
        """Built at first use: a subject that is never asked for ``full`` or a mask does not pay for its graph."""
        if (cached, masked) in self.sessions:
            return self.sessions[cached, masked]
        source: bytes | str
        if self.config.profile == "attention":
            source = onnx_graphs.attention_model(self.config, cached, masked)
        else:
            source = str(self.artefact(cached))
            self.files.append(Path(source).name)  # the folder is the run's own: artefacts, beside the results
        session = onnx_runtime.open_session(source, self.device)
        if self.device == "cuda":
            self.prove_session(session)
        self.sessions[cached, masked] = session
        return session

    def artefact(self, cached: bool) -> Path:
        """The exported file, made unless one of the same config, weights, versions and source is there."""
        digest = hashlib.sha256(json.dumps(self.config.to_json(), sort_keys=True).encode())
        for package in ("torch", "onnx", "onnxscript"):
            digest.update(importlib.metadata.version(package).encode())
        for module in (torch_decoder, onnx_graphs):
            digest.update(inspect.getsource(module).encode())
        for name, weight in self.weights.items():
            digest.update(name.encode() + np.ascontiguousarray(weight).tobytes())
        folder = Path(os.environ.get("KVCONFORM_ARTEFACTS") or self.scratch())
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"decoder-{'' if cached else 'full-'}{digest.hexdigest()[:12]}.onnx"
        if not path.exists():
            made = path.with_suffix(f".{os.getpid()}")
            made.write_bytes(onnx_graphs.decoder_model(self.config, self.weights, cached))
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
            _, cache = self.step(self.start(1), *self.probe(2))
            self.step(cache, *self.probe(1))
            self.full(*self.probe(2))
            if self.config.profile == "attention":
                self.step(cache, *self.probe(1), mask=np.ones((1, 3), np.bool_))
        except (Unavailable, CannotRun):
            raise
        except Exception as error:  # ONNX Runtime's errors (Fail, EPFail, ...) share no other base
            raise CannotRun(f"ONNX Runtime {onnxruntime.__version__} cannot run it on CUDA: {error}") from error

    def probe(self, t: int) -> list[Array]:
        c = self.config
        if c.profile == "decoder":
            return [np.zeros((1, t), np.int64)]
        return [np.zeros((1, heads, t, c.head_dim), np.float32) for heads in (c.heads, c.kv_heads, c.kv_heads)]

    def witness(self) -> dict[str, Any]:
        return {
            **{name: importlib.metadata.version(name) for name in ("torch", "onnx", "onnxscript")},
            **onnx_runtime.witness(self.sessions.values(), self.config.dtype, self.device),
            "device": self.seen_on,
            "device_time": self.device_time.said,
            "opset": onnx_graphs.OPSET,
            "files": self.files,
        }


@functools.cache
def unable(config: Config, device: str) -> str | None:
    """Why this config cannot run on the device. Raises Unavailable where nothing can."""
    try:
        OnnxExported(config, weights_of(config), device)
    except CannotRun as reason:
        return str(reason)
    return None
