"""The backend of an ``onnx:`` target: sessions of its graphs, and the latest presents as the cache."""

from __future__ import annotations

import importlib.metadata
import shutil
import tempfile
import weakref
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime  # type: ignore[import-untyped]
from numpy.typing import NDArray
from onnxruntime import InferenceSession, OrtValue

from kvconform.backend import BlackBox
from kvconform.errors import BackendUnavailable
from kvconform_backends.onnx import runtime as onnx_runtime
from kvconform_backends.targets.onnx import weights
from kvconform_backends.targets.onnx.script import GraphCall, OnnxScript
from kvconform_backends.targets.onnx.settings import Settings, beside
from kvconform_backends.targets.onnx.signature import GraphSignature, read, unknown
from kvconform_backends.targets.third_party import ThirdPartyError, guarded
from kvconform_specs.claims import Claims
from kvconform_specs.config import Config
from kvconform_specs.program import Program

Array = NDArray[Any]

MESSAGE = 2**31 - 2**20
"""Bytes of a model that still fit into one protobuf message; weights of larger ones go into a separate file."""


@dataclass(frozen=True)
class DecoderGraph:
    """One file and its signature. ``model`` lacks weights stored in other files."""

    path: Path
    model: onnx.ModelProto = field(repr=False)
    signature: GraphSignature

    @classmethod
    def load(cls, path: Path, settings: Settings | None = None) -> DecoderGraph:
        """``settings``: sizes given in place of those that are written beside it. Raises BackendUnavailable unless the
        file exists and contains a decoder."""
        if not path.is_file():
            raise BackendUnavailable(f"no file {path}")
        try:
            with guarded():
                model = onnx.load(path, load_external_data=False)
        except ThirdPartyError as error:
            raise BackendUnavailable(f"{path} is not an ONNX model: {error}") from error
        path = path.resolve()
        return cls(path, model, read(model, path.name, settings or beside(path)))

    def unknown(self, why: str) -> BackendUnavailable:
        return unknown(self.model, self.path.name, why)

    def kinds(self) -> set[str]:
        return {node.op_type for inner in weights.graphs(self.model.graph) for node in inner.node}

    def fixed(self, axis: int) -> int | None:
        """The size of that axis of the tokens, if it is fixed."""
        size = self.signature.tokens.axes[axis]
        return size if isinstance(size, int) else None


class Runner:
    """A graph in a session on a device."""

    def __init__(self, signature: GraphSignature, source: str | bytes, device: str) -> None:
        onnxruntime.set_default_logger_severity(4)  # failures are raised as exceptions too
        if device == "cuda":
            onnx_runtime.reach_cuda()
        self.signature, self.device = signature, device
        self.session: InferenceSession = onnx_runtime.open_session(source, device)
        if device == "cuda":
            onnx_runtime.check_first(self.session)
        self.nodes = onnx_runtime.nodes(self.session)
        self.names = [output.name for output in self.session.get_outputs()]
        self.seen_on: str | None = None  # the device of the last outputs

    def run(self, x: Array, past: int, held: tuple[OrtValue, ...], dummy: int = 0) -> dict[str, OrtValue]:
        """Every output by name, for tokens ``x`` after ``past`` others with the keys and values ``held``."""
        arrays = self.signature.feeds(x, past, branch=past > 0)
        if not past:
            arrays |= {p.tensor.name: p.empty(len(x), dummy) for p in self.signature.pasts}
        feeds = {name: onnx_runtime.value_of(array, self.device) for name, array in arrays.items()}
        if past:
            feeds |= {p.tensor.name: value for p, value in zip(self.signature.pasts, held, strict=True)}
        values = onnx_runtime.run(self.session, feeds, self.device)
        self.seen_on = onnx_runtime.devices(values)
        return dict(zip(self.names, values, strict=True))


@dataclass(frozen=True)
class OnnxSequence:
    """The cache of a sequence: its rows and tokens, and the presents of the last step."""

    batch: int
    tokens: int = 0
    presents: tuple[OrtValue, ...] = ()


@dataclass
class DecoderGraphs:
    """The graphs of one decoder, and their sessions, built at first use.

    cached: the graph with a past. uncached: the graph that computes the reference, by default the same. dummy: the
    length of an empty sequence's past. last_only: a call returns only the output of its last token. one_by_one: with a
    past, several rows take their tokens one by one.
    """

    cached: DecoderGraph
    uncached: DecoderGraph
    dummy: int = 0
    last_only: bool = False
    one_by_one: bool = False
    runners: dict[tuple[Path, str], Runner] = field(default_factory=dict)

    @property
    def first(self) -> DecoderGraph:
        """The graph of a sequence's first step: the one without a past, if it returns the cache."""
        handed = all(self.uncached.signature.present(past.slot) for past in self.cached.signature.pasts)
        return self.uncached if handed else self.cached

    def runner(self, graph: DecoderGraph, device: str) -> Runner:
        if (graph.path, device) not in self.runners:
            self.runners[graph.path, device] = Runner(graph.signature, str(graph.path), device)
        return self.runners[graph.path, device]

    def script(self, device: str) -> OnnxScript:
        names = {self.uncached.path: "UNCACHED", self.cached.path: "STEP"}
        first, cached, uncached = (
            GraphCall(names[graph.path], graph.path, graph.signature)
            for graph in (self.first, self.cached, self.uncached)
        )
        return OnnxScript(first, cached, uncached, device, self.dummy, self.last_only, self.one_by_one)


class OnnxDecoder(BlackBox):
    """The backend."""

    def __init__(self, graphs: DecoderGraphs, claims: Claims, config: Config, device: str) -> None:
        self.graphs, self.claims, self.config, self.device = graphs, claims, config, device
        self.uncached = graphs.runner(graphs.uncached, device)
        self.noise: tuple[float, float, int] | None = None

    def start(self, batch: int) -> OnnxSequence:
        return OnnxSequence(batch)

    def step(self, cache: OnnxSequence, x: Array) -> tuple[Array, OnnxSequence]:
        alone = self.graphs.one_by_one and cache.tokens and cache.batch > 1
        outputs = []
        for part in np.split(x, x.shape[1], axis=1) if alone else [x]:
            output, cache = self._call(cache, part)
            outputs.append(output)
        return np.concatenate(outputs, axis=1), cache

    def _call(self, cache: OnnxSequence, x: Array) -> tuple[Array, OnnxSequence]:
        graph = self.graphs.cached if cache.tokens else self.graphs.first
        runner = self.graphs.runner(graph, self.device)
        values = runner.run(x, cache.tokens, cache.presents, self.graphs.dummy)
        pasts = self.graphs.cached.signature.pasts
        presents = tuple(values[graph.signature.present(past.slot) or ""] for past in pasts)
        return self._output(graph, values), OnnxSequence(cache.batch, cache.tokens + x.shape[1], presents)

    def uncached_forward(self, x: Array) -> Array:
        """Uses an empty past, or the graph without one; called per prefix if it returns only the last output."""
        if self.noise is not None and self.config.profile == "hidden":
            from kvconform_backends.targets.black_box import perturbed_states  # only this case needs torch

            x = perturbed_states(x, *self.noise)
        ends = range(1, x.shape[1] + 1) if self.graphs.last_only else [x.shape[1]]
        parts = [
            self._output(self.graphs.uncached, self.uncached.run(x[:, :n], 0, (), self.graphs.dummy)) for n in ends
        ]
        return np.concatenate(parts, axis=1)

    def length(self, cache: OnnxSequence) -> list[int]:
        """From the shape of a present that grows."""
        pasts = self.graphs.cached.signature.pasts
        index = next(index for index, past in enumerate(pasts) if past.ring is None)
        return [cache.presents[index].shape()[pasts[index].tokens] if cache.presents else 0] * cache.batch

    def reset(self, cache: OnnxSequence) -> OnnxSequence:
        return OnnxSequence(cache.batch)

    def perturbed(self, storage: float, accumulation: float, seed: int) -> OnnxDecoder:
        model = weights.perturbed(onnx.load(self.graphs.uncached.path), storage, accumulation, seed)
        made = OnnxDecoder(self.graphs, self.claims, self.config, self.device)
        made.uncached = Runner(self.graphs.uncached.signature, _source(model, made), self.device)
        made.noise = storage, accumulation, seed
        return made

    def _output(self, graph: DecoderGraph, values: Mapping[str, OrtValue]) -> Array:
        """Float32 ``(b, t, e)``, where ``t`` may be the last token only."""
        output = onnx_runtime.widened(values[graph.signature.output.name])
        return output[:, None] if output.ndim == 2 else output

    # --- scripts and runtime info ---
    def script_setup(self) -> str:
        return self.graphs.script(self.device).setup()

    def script(self, program: Program, tag: str) -> str:
        return self.graphs.script(self.device).steps(program, tag)

    def runtime_info(self) -> dict[str, Any]:
        runners = {path.name: runner for (path, on), runner in self.graphs.runners.items() if on == self.device}
        counted = sum((runner.nodes for runner in runners.values()), Counter[tuple[str, str]]())
        on_cpu = onnx_runtime.off_cuda(counted) if self.device == "cuda" else []
        sessions = [runner.session for runner in runners.values()]
        found = {
            "onnx": importlib.metadata.version("onnx"),
            **onnx_runtime.runtime_info(sessions, self.config.dtype, self.device),
            "device": "/".join(sorted({runner.seen_on for runner in runners.values() if runner.seen_on})),
            "opset": max(
                entry.version for entry in self.graphs.cached.model.opset_import if entry.domain in ("", "ai.onnx")
            ),
            "files": sorted(runners),
        }
        words = f"CUDA was requested, but ONNX Runtime ran {', '.join(on_cpu)} on the CPU"
        return {**found, "fallback": words} if on_cpu else found


def _source(model: onnx.ModelProto, owner: object) -> str | bytes:
    """A model as bytes, or as a temporary file that exists as long as its owner, since a message is limited to 2 GB."""
    if sum(len(tensor.raw_data) for _name, tensor in weights.constants(model.graph)) < MESSAGE:
        data: bytes = model.SerializeToString()
        return data
    folder = tempfile.mkdtemp(prefix="kvconform-")
    weakref.finalize(owner, shutil.rmtree, folder, ignore_errors=True)
    path = Path(folder) / "decoder.onnx"
    onnx.save_model(model, path, save_as_external_data=True, location="decoder.data")
    return str(path)
