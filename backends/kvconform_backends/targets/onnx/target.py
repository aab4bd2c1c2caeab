"""Targets ``onnx:decoder.onnx``: a decoder that returns its cache and takes it back, run by ONNX Runtime.

The reference is its own forward on an empty past, or a second graph without a past: that of option ``uncached``, or the
file beside it according to Optimum's names. The present outputs of a step are bound unchanged as the past inputs of the
next.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime  # type: ignore[import-untyped]
from numpy.typing import NDArray

from kvconform.errors import BackendUnavailable
from kvconform_backends.targets.onnx import weights
from kvconform_backends.targets.onnx.decoder import DecoderGraph, DecoderGraphs, OnnxDecoder
from kvconform_backends.targets.onnx.settings import beside, decoder_in
from kvconform_backends.targets.third_party import ThirdPartyError, guarded, largest
from kvconform_specs.claims import Claims
from kvconform_specs.config import Config

Array = NDArray[Any]

CAPACITY = 40
"""Maximum length of a sequence unless options or graph give less: programs stay short."""
OPTIONS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "uncached": ("the name of a file", lambda value: isinstance(value, str)),
    "capacity": ("a positive integer", lambda value: _integer(value, 1)),
    "vocabulary": ("a positive integer", lambda value: _integer(value, 1)),
    "width": ("a positive integer", lambda value: _integer(value, 1)),
    "head_dim": ("a positive integer", lambda value: _integer(value, 1)),
    "window": ("a positive integer", lambda value: _integer(value, 1)),
    "reserved": ("a list of token ids", lambda value: isinstance(value, list) and all(_integer(x, 0) for x in value)),
}
"""The type of each option."""
OPERATOR = "GroupQueryAttention"
PAIRS = {"decoder_with_past_model": "decoder_model"}
"""Optimum's names for a pair of files: of later steps, and of the first."""


def open_onnx(target: str, options: Mapping[str, Any]) -> OnnxTarget:
    """The backend around an ONNX file, or around the decoder of a folder. Raises BackendUnavailable.

    uncached: a file beside the target with a graph without a past. capacity, vocabulary, width, head_dim, window: sizes
    that the graph does not contain, head_dim and window in place of those that are written beside it (``settings``).
    reserved: token ids that no program uses.
    """
    for name, value in options.items():
        if name not in OPTIONS:
            raise BackendUnavailable(f"onnx:{target}: unknown option {name!r}; known: {', '.join(OPTIONS)}")
        if not OPTIONS[name][1](value):
            raise BackendUnavailable(f"onnx:{target}: option {name!r} is {value!r}, expected {OPTIONS[name][0]}")
    uncached: DecoderGraph | None = None
    path = decoder_in(Path(target)) if Path(target).is_dir() else Path(target)
    sizes = {name: options[name] for name in ("head_dim", "window") if name in options}
    settings = beside(path)
    if sizes:
        settings = replace(settings, **sizes, source="an option")
    cached, assumed = DecoderGraph.load(path, settings), list[str]()
    for second, first in PAIRS.items():
        files = [cached.path.with_stem(stem) for stem in (second, first)]
        pair = cached.path.stem == second or (cached.path.stem == first and not cached.signature.pasts)
        if "uncached" not in options and pair and all(file.is_file() for file in files):
            cached, uncached = (DecoderGraph.load(file, settings) for file in files)
            assumed.append(f"{uncached.path.name} beside it is the same decoder without a past")
    if not cached.signature.pasts:
        raise cached.unknown("no input is a past key or value")
    if "uncached" in options:
        uncached = DecoderGraph.load(cached.path.parent / options["uncached"], settings)
    if uncached is not None and uncached.signature.pasts:
        raise uncached.unknown("expected a graph without a past")
    return OnnxTarget(cached, uncached, options, assumed)


class OnnxTarget:
    """Its config and claims are read from the graph and probed; calling it builds the backend."""

    def __init__(
        self, cached: DecoderGraph, uncached: DecoderGraph | None, options: Mapping[str, Any], assumed: list[str]
    ) -> None:
        self.graphs, self.options = DecoderGraphs(cached, uncached or cached), options
        self.cached, self.uncached = cached, self.graphs.uncached
        self.source = str(cached.path)
        self._assumed = [*assumed, *cached.signature.assumed]
        self._check_sizes()
        on, outputs = self._probe()
        self.graphs.one_by_one = self._refuses_chunks_of_rows(on)
        config = self._config(outputs)
        self.configs = {f"{config.profile}-self": config}
        rows = {
            cached.fixed(0),
            self.uncached.fixed(0),
            *(past.tensor.axes[past.batch] for past in cached.signature.pasts),
        }
        grows = any(past.ring is None for past in cached.signature.pasts)
        self.claims = Claims(
            profiles=(config.profile,),
            abilities=("uncached_forward", *(["length"] if grows else []), "reset"),
            dtypes=(config.dtype,),
            devices=tuple(dict.fromkeys((on, "cuda"))),
            max_batch=1 if 1 in rows else None,
            max_chunk=cached.fixed(1),
            returns="last" if self.graphs.last_only else "all",
            cache_dtype="float16" if self._rounds_more() else "",
            reference="self",
        )
        self.recognised, self.assumed = self._words(), tuple(self._assumed)

    def __call__(self, config: Config, weights: Mapping[str, Array], device: str = "cpu") -> OnnxDecoder:
        return OnnxDecoder(self.graphs, self.claims, config, device)

    # --- probing ---
    def _check_sizes(self) -> None:
        """Raises BackendUnavailable if an axis that programs vary is fixed."""
        for graph in {self.cached.path: self.cached, self.uncached.path: self.uncached}.values():
            for axis, what in enumerate(("rows", "tokens at a time")):
                size = graph.fixed(axis)
                if size is not None and size != 1:
                    raise graph.unknown(f"it takes exactly {size} {what}")
        if self.uncached.fixed(1):
            raise self.uncached.unknown("it takes one token at a time; give a graph without a past by option uncached")

    def _probe(self) -> tuple[str, int]:
        """Runs the uncached forward on zeros. Returns a device that works and the size of a token's output; finds the
        past of an empty sequence, and the capacity. Raises BackendUnavailable if it cannot run without a past."""
        on = self._place()
        found = [self._tried(on, self.uncached, t) for t in (1, 2, 3)]
        if self.uncached.signature.branch is not None and all(isinstance(shape, str) for shape in found):
            self.graphs.dummy = 1  # a graph whose branch reads the past's shape, as Optimum's merged ones do
            found = [self._tried(on, self.uncached, t) for t in (1, 2, 3)]
        shapes = [shape for shape in found if not isinstance(shape, str)]
        if not shapes:
            raise BackendUnavailable(
                f"{self.uncached.path.name} cannot run on an empty past (of length 0), which the reference needs: "
                f"{found[0]}; give a graph without a past by option uncached"
            )
        begun = shapes[0] if self.graphs.first is self.uncached else self._tried(on, self.cached, 1)
        if isinstance(begun, str):
            raise BackendUnavailable(
                f"{self.cached.path.name} cannot run on an empty past (of length 0), and {self.uncached.path.name} "
                f"returns no cache to start with: {begun}"
            )
        self.graphs.last_only = any(
            len(shape) == 2 or shape[1] == 1 for shape in found[1:] if not isinstance(shape, str)
        )
        self.capacity = self.options.get("capacity", CAPACITY)
        if len(shapes) == len(found) and isinstance(self._tried(on, self.uncached, self.capacity), str):
            self.capacity = n = largest(
                3, self.capacity - 1, lambda t: not isinstance(self._tried(on, self.uncached, t), str)
            )
            self._assumed.append(f"a sequence has at most {n} tokens: its uncached forward raises on {n + 1}")
        return on, int(shapes[0][-1])

    def _refuses_chunks_of_rows(self, device: str) -> bool:
        """Whether ``GroupQueryAttention`` takes several tokens with a past from a single row only, as ONNX Runtime's
        kernels for CPUs do."""
        if OPERATOR not in self.cached.kinds() or self.cached.fixed(0) == 1 or self.cached.fixed(1):
            return False
        config = self._config(1)
        decoder = OnnxDecoder(self.graphs, Claims(), config, device)
        width = (self._width(),) if self.cached.signature.hidden else ()

        def refused(rows: int) -> bool:
            x = np.zeros((rows, 2, *width), self.cached.signature.tokens.dtype)
            try:
                with guarded():
                    decoder.step(decoder.step(decoder.start(rows), x)[1], x)
            except ThirdPartyError:
                return True
            return False

        return refused(2) and not refused(1)

    def _place(self) -> str:
        """The first device on which the uncached graph loads: CPU or CUDA."""
        words = ""
        for device in ("cpu", "cuda"):
            try:
                with guarded():
                    self.graphs.runner(self.uncached, device)
                return device
            except ThirdPartyError as error:
                words = words or str(error)
        raise BackendUnavailable(
            f"ONNX Runtime {onnxruntime.__version__} cannot load {self.uncached.path.name}: {words}"
        )

    def _tried(self, device: str, graph: DecoderGraph, t: int) -> tuple[int, ...] | str:
        """The shape of a graph's output for ``t`` tokens on an empty past, or the exception."""
        signature = graph.signature
        shape = (1, t, self._width()) if signature.hidden else (1, t)
        x = np.zeros(shape, signature.tokens.dtype)
        try:
            with guarded():
                values = self.graphs.runner(graph, device).run(x, 0, (), self.graphs.dummy)
        except ThirdPartyError as error:
            return str(error)
        return tuple(values[signature.output.name].shape())

    def _width(self) -> int:
        """The width of its hidden states."""
        size = self.cached.signature.tokens.axes[2]
        width = size if isinstance(size, int) else self.options.get("width")
        if width is None:
            raise self.cached.unknown(
                f"{self.cached.signature.tokens.name} has no fixed width; give it by option width"
            )
        return int(width)

    def _config(self, outputs: int) -> Config:
        signature = self.cached.signature
        past = signature.pasts[0]
        sizes: dict[str, Any] = {
            "heads": past.heads,
            "kv_heads": past.heads,
            "head_dim": past.head_dim,
            "layers": signature.layers,
            "capacity": self.capacity,
            **self._window(),
            "dtype": self._dtype(),
        }
        if signature.hidden:
            width = self._width()
            named = signature.output.name.endswith("logits")
            return Config("hidden", **sizes, width=width, vocabulary=outputs if named or outputs != width else 0)
        rows, width = weights.embedding(self.cached.model.graph, signature.tokens.name) or (outputs, 0)
        known = min(self.options.get("vocabulary", rows), outputs)
        reserved = {*range(known, outputs), *self.options.get("reserved", ())}
        return Config(
            "decoder",
            **sizes,
            width=width or past.heads * past.head_dim,
            vocabulary=outputs,
            reserved=tuple(sorted(reserved)),
        )

    def _dtype(self) -> str:
        """The dtype of weights, inputs and outputs that rounds most, up to float16; the cache may have another."""
        signature = self.cached.signature
        kinds = {signature.output.dtype, signature.tokens.dtype, *weights.dtypes(self.cached.model.graph)}
        return "float16" if "float16" in kinds else "float32"

    def _window(self) -> dict[str, int]:
        """The window that layers have, all or some of them; the operator counts the token itself as the definition
        does."""
        signature = self.cached.signature
        if signature.windows and signature.window < self.capacity:
            return {"window": signature.window, "window_every": 1 if len(signature.windows) == signature.layers else 2}
        windows = [
            next((one.i for one in node.attribute if one.name == "local_window_size"), -1)
            for node in self.cached.model.graph.node
            if node.op_type == OPERATOR
        ]
        found = {window for window in windows if 0 < window < self.capacity}
        return {"window": found.pop(), "window_every": 1 if min(windows) > 0 else 2} if len(found) == 1 else {}

    def _rounds_more(self) -> bool:
        """Whether the cache is kept in float16, and the rest is not."""
        kinds = {past.tensor.dtype for past in self.cached.signature.pasts}
        return self._dtype() != "float16" and "float16" in kinds

    def _words(self) -> str:
        signature, first = self.cached.signature, self.cached.signature.pasts[0]
        if signature.mask is not None:
            self._assumed.append("attention_mask is 1 for all cached and new tokens")
        for tensor in (signature.positions, signature.cache_position):
            if tensor is not None:
                self._assumed.append(f"{tensor.name} counts the tokens of a sequence from 0")
        if signature.branch is not None:
            dummy = f"whose past has a length of {self.graphs.dummy}"
            self._assumed.append(f"{signature.branch.name} is false for an empty cache, {dummy}, and true afterwards")
        if self._rounds_more():
            self._assumed.append("its cache is in float16, and the rest is not; errors of that size are allowed")
        if self.graphs.one_by_one:
            self._assumed.append(f"with a past, several rows take their tokens one by one: {OPERATOR} refuses more")
        rings = {past.ring for past in signature.pasts if past.ring is not None}
        if rings:
            self._assumed.append(f"a past of {rings.pop()} tokens is a ring, which begins with zeros")
        if "DynamicQuantizeLinear" in self.cached.kinds():
            self._assumed.append(
                "activations are quantised with one scale per call, so that each output depends on the other tokens"
            )
        layers = f"{signature.layers} layer" + "s" * (signature.layers > 1)
        return (
            f"ONNX decoder of {layers}: {signature.tokens.name} to {signature.output.name}, the past in "
            f"{first.tensor.name} {first.layout} {first.tensor.dtype}, ..., the present in "
            f"{signature.present(first.slot)}, ..."
        )


def _integer(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
