"""The backend of a target ``onnx:``: sessions of its graphs, and a cache that is the presents of the latest step."""

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
from kvconform_backends.targets.foreign import Raised, foreign
from kvconform_backends.targets.onnx import weights
from kvconform_backends.targets.onnx.script import Call, Script
from kvconform_backends.targets.onnx.signature import Signature, read, unknown
from kvconform_specs.claims import Claims
from kvconform_specs.config import Config
from kvconform_specs.program import Program

Array = NDArray[Any]

MESSAGE = 2**31 - 2**20
"""Bytes of a model that is still one protobuf message; a larger one's weights lie in a file of their own."""


@dataclass(frozen=True)
class Graph:
    """One file, and what its graph takes and gives. ``model`` lacks the weights that lie in other files."""

    path: Path
    model: onnx.ModelProto = field(repr=False)
    signature: Signature

    @classmethod
    def load(cls, path: Path) -> Graph:
        """Raises BackendUnavailable where there is no such file, or none that holds a decoder."""
        if not path.is_file():
            raise BackendUnavailable(f"no file {path}")
        try:
            with foreign():
                model = onnx.load(path, load_external_data=False)
        except Raised as error:
            raise BackendUnavailable(f"{path} is no ONNX model: {error}") from error
        return cls(path.resolve(), model, read(model, path.name))

    def unknown(self, why: str) -> BackendUnavailable:
        return unknown(self.model, self.path.name, why)

    def kinds(self) -> set[str]:
        return {node.op_type for inner in weights.graphs(self.model.graph) for node in inner.node}

    def fixed(self, axis: int) -> int | None:
        """What that axis of the tokens is fixed to, if it is."""
        size = self.signature.tokens.axes[axis]
        return size if isinstance(size, int) else None


class Runner:
    """A graph in a session on a device, which is proven to be the one that was asked for (``onnx_runtime``)."""

    def __init__(self, signature: Signature, source: str | bytes, device: str) -> None:
        onnxruntime.set_default_logger_severity(4)  # what fails here is raised, too
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
        """Every output, by its name, for tokens ``x`` behind ``past`` others, whose keys and values are ``held``."""
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
class Held:
    """The cache of a sequence: how many tokens it was given, and the presents of the last step, none at first."""

    batch: int
    tokens: int = 0
    presents: tuple[OrtValue, ...] = ()


@dataclass
class Graphs:
    """Those of one decoder, and their sessions, each built at first use.

    later: the one with a past. whole: the one whose output on all tokens is the truth, the same where there is no
    other. dummy: how many tokens the past has of a sequence that has none. last: a call gives the output of its last
    token alone.
    """

    later: Graph
    whole: Graph
    dummy: int = 0
    last_only: bool = False
    runners: dict[tuple[Path, str], Runner] = field(default_factory=dict)

    @property
    def first(self) -> Graph:
        """The graph of a sequence's first step: the one without a past, if it hands a cache out."""
        handed = all(self.whole.signature.present(past.slot) for past in self.later.signature.pasts)
        return self.whole if handed else self.later

    def runner(self, graph: Graph, device: str) -> Runner:
        if (graph.path, device) not in self.runners:
            self.runners[graph.path, device] = Runner(graph.signature, str(graph.path), device)
        return self.runners[graph.path, device]

    def script(self, device: str) -> Script:
        names = {self.whole.path: "WHOLE", self.later.path: "STEP"}
        first, later, whole = (
            Call(names[graph.path], graph.path, graph.signature) for graph in (self.first, self.later, self.whole)
        )
        return Script(first, later, whole, device, self.dummy, self.last_only)


class OnnxDecoder(BlackBox):
    """The backend: one sequence's cache is its latest presents."""

    def __init__(self, graphs: Graphs, claims: Claims, config: Config, device: str) -> None:
        self.graphs, self.claims, self.config, self.device = graphs, claims, config, device
        self.whole = graphs.runner(graphs.whole, device)
        self.noise: tuple[float, float, int] | None = None

    def start(self, batch: int) -> Held:
        return Held(batch)

    def step(self, cache: Held, x: Array) -> tuple[Array, Held]:
        graph = self.graphs.later if cache.tokens else self.graphs.first
        runner = self.graphs.runner(graph, self.device)
        values = runner.run(x, cache.tokens, cache.presents, self.graphs.dummy)
        pasts = self.graphs.later.signature.pasts
        presents = tuple(values[graph.signature.present(past.slot) or ""] for past in pasts)
        return self._output(graph, values), Held(cache.batch, cache.tokens + x.shape[1], presents)

    def uncached_forward(self, x: Array) -> Array:
        """On an empty past, or by the graph that takes none. Where a call gives the last output alone, it is asked for
        every prefix."""
        if self.noise is not None and self.config.profile == "hidden":
            from kvconform_backends.targets.black_box import (
                disturbed_states,  # needs torch, which a decoder of ids does not
            )

            x = disturbed_states(x, *self.noise)
        ends = range(1, x.shape[1] + 1) if self.graphs.last_only else [x.shape[1]]
        parts = [self._output(self.graphs.whole, self.whole.run(x[:, :n], 0, (), self.graphs.dummy)) for n in ends]
        return np.concatenate(parts, axis=1)

    def length(self, cache: Held) -> list[int]:
        """What the present itself says."""
        axis = self.graphs.later.signature.pasts[0].tokens
        return [cache.presents[0].shape()[axis] if cache.presents else 0] * cache.batch

    def reset(self, cache: Held) -> Held:
        return Held(cache.batch)

    def perturbed(self, storage: float, accumulation: float, seed: int) -> OnnxDecoder:
        model = weights.perturbed(onnx.load(self.graphs.whole.path), storage, accumulation, seed)
        made = OnnxDecoder(self.graphs, self.claims, self.config, self.device)
        made.whole = Runner(self.graphs.whole.signature, _source(model, made), self.device)
        made.noise = storage, accumulation, seed
        return made

    def _output(self, graph: Graph, values: Mapping[str, OrtValue]) -> Array:
        """Float32 ``(b, t, e)``, where ``t`` may be the last token alone."""
        output = onnx_runtime.widened(values[graph.signature.output.name])
        return output[:, None] if output.ndim == 2 else output

    # --- what is told of it ---
    def script_setup(self) -> str:
        return self.graphs.script(self.device).setup()

    def script(self, program: Program, tag: str) -> str:
        return self.graphs.script(self.device).steps(program, tag)

    def runtime_info(self) -> dict[str, Any]:
        runners = {path.name: runner for (path, on), runner in self.graphs.runners.items() if on == self.device}
        counted = sum((runner.nodes for runner in runners.values()), Counter[tuple[str, str]]())
        strays = onnx_runtime.strays(counted) if self.device == "cuda" else []
        sessions = [runner.session for runner in runners.values()]
        found = {
            "onnx": importlib.metadata.version("onnx"),
            **onnx_runtime.runtime_info(sessions, self.config.dtype, self.device),
            "device": "/".join(sorted({runner.seen_on for runner in runners.values() if runner.seen_on})),
            "opset": max(
                entry.version for entry in self.graphs.later.model.opset_import if entry.domain in ("", "ai.onnx")
            ),
            "files": sorted(runners),
        }
        words = f"CUDA was asked for, and ONNX Runtime ran {', '.join(strays)} on the CPU"
        return {**found, "fallback": words} if strays else found


def _source(model: onnx.ModelProto, owner: object) -> str | bytes:
    """A model as bytes, or as a file that lives as long as its owner: one message holds no more than two GB."""
    if sum(len(tensor.raw_data) for _name, tensor in weights.constants(model.graph)) < MESSAGE:
        data: bytes = model.SerializeToString()
        return data
    folder = tempfile.mkdtemp(prefix="kvconform-")
    weakref.finalize(owner, shutil.rmtree, folder, ignore_errors=True)
    path = Path(folder) / "decoder.onnx"
    onnx.save_model(model, path, save_as_external_data=True, location="decoder.data")
    return str(path)
