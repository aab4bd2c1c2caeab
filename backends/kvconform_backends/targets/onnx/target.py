"""Targets ``onnx:decoder.onnx``: a decoder that hands its cache out and takes it back, run by ONNX Runtime.

It is judged by its own forward on an empty past, or by a second graph that takes no past: that of option ``full``, or
the file beside it that Optimum's names promise. The present outputs of a step are bound as the past inputs of the next
as they are; nothing here looks into them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime  # type: ignore[import-untyped]
from numpy.typing import NDArray

from kvconform.errors import BackendUnavailable
from kvconform_backends.targets.foreign import Raised, foreign
from kvconform_backends.targets.onnx import weights
from kvconform_backends.targets.onnx.decoder import Graph, Graphs, OnnxDecoder
from kvconform_specs.claims import Claims
from kvconform_specs.config import Config

Array = NDArray[Any]

CAPACITY = 40
"""Tokens that a sequence may have where neither the options nor the graph say less: programs stay short."""
OPTIONS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "full": ("the name of a file", lambda value: isinstance(value, str)),
    "capacity": ("a positive integer", lambda value: _whole(value, 1)),
    "vocabulary": ("a positive integer", lambda value: _whole(value, 1)),
    "width": ("a positive integer", lambda value: _whole(value, 1)),
    "reserved": ("a list of token ids", lambda value: isinstance(value, list) and all(_whole(x, 0) for x in value)),
}
"""What each must be."""
PAIRS = {"decoder_with_past_model": "decoder_model"}
"""Optimum's names of a pair of files: of the later steps, and of the first."""


def open_onnx(target: str, options: Mapping[str, Any]) -> OnnxTarget:
    """The backend around an ONNX file. Raises BackendUnavailable with one sentence.

    full: the file beside the target of a graph that takes no past. capacity, vocabulary, width: what the graph does
    not tell. reserved: token ids that no program uses.
    """
    for name, value in options.items():
        if name not in OPTIONS:
            raise BackendUnavailable(f"onnx:{target}: unknown option {name!r}; known: {', '.join(OPTIONS)}")
        if not OPTIONS[name][1](value):
            raise BackendUnavailable(f"onnx:{target}: option {name!r} is {value!r}, want {OPTIONS[name][0]}")
    whole: Graph | None = None
    later, assumed = Graph.load(Path(target)), list[str]()
    for second, first in PAIRS.items():
        files = [later.path.with_stem(stem) for stem in (second, first)]
        pair = later.path.stem == second or (later.path.stem == first and not later.signature.pasts)
        if "full" not in options and pair and all(file.is_file() for file in files):
            later, whole = (Graph.load(file) for file in files)
            assumed.append(f"{whole.path.name} beside it is the same decoder without a past.")
    if not later.signature.pasts:
        raise later.unknown("no input is a past key or value")
    if "full" in options:
        whole = Graph.load(later.path.parent / options["full"])
    if whole is not None and whole.signature.pasts:
        raise whole.unknown("it is to be the graph without a past")
    return OnnxTarget(later, whole, options, assumed)


class OnnxTarget:
    """A backend: its config and claims are read off the graph and probed; a call builds the backend."""

    def __init__(self, later: Graph, whole: Graph | None, options: Mapping[str, Any], assumed: list[str]) -> None:
        self.graphs, self.options = Graphs(later, whole or later), options
        self.later, self.whole = later, self.graphs.whole
        self.source = str(later.path)
        self._assumed = [*assumed, *later.signature.assumed]
        self._check_sizes()
        on, outputs = self._probe()
        config = self._config(outputs)
        self.configs = {f"{config.profile}-self": config}
        rows = {later.fixed(0), self.whole.fixed(0), *(past.tensor.axes[past.batch] for past in later.signature.pasts)}
        self.claims = Claims(
            profiles=(config.profile,),
            abilities=("uncached_forward", "length", "reset"),
            dtypes=(config.dtype,),
            devices=tuple(dict.fromkeys((on, "cuda"))),
            max_batch=1 if 1 in rows else None,
            max_chunk=later.fixed(1),
            returns="last" if self.graphs.last_only else "all",
            reference="self",
        )
        self.recognised, self.assumed = self._words(), tuple(self._assumed)

    def __call__(self, config: Config, weights: Mapping[str, Array], device: str = "cpu") -> OnnxDecoder:
        return OnnxDecoder(self.graphs, self.claims, config, device)

    # --- what it is ---
    def _check_sizes(self) -> None:
        """Raises BackendUnavailable where an axis is fixed that programs must vary."""
        for graph in {self.later.path: self.later, self.whole.path: self.whole}.values():
            for axis, what in enumerate(("rows", "tokens at a time")):
                size = graph.fixed(axis)
                if size is not None and size != 1:
                    raise graph.unknown(f"it takes exactly {size} {what}")
        if self.whole.fixed(1):
            raise self.whole.unknown("it takes one token at a time; name a graph without a past by option full")

    def _probe(self) -> tuple[str, int]:
        """Runs the own forward on zeros: where it can, and how many numbers a token's output has. Finds what the past
        of a sequence without tokens is, and the capacity. Raises BackendUnavailable where it cannot run without a past."""
        on = self._place()
        found = [self._tried(on, self.whole, t) for t in (1, 2, 3)]
        if self.whole.signature.branch is not None and all(isinstance(shape, str) for shape in found):
            self.graphs.dummy = 1  # a graph whose branch reads the past's shape, as Optimum's merged ones do
            found = [self._tried(on, self.whole, t) for t in (1, 2, 3)]
        shapes = [shape for shape in found if not isinstance(shape, str)]
        if not shapes:
            raise BackendUnavailable(
                f"{self.whole.path.name} cannot run on an empty past (of length 0), by which it would be judged: "
                f"{found[0]}; name a graph without a past by option full"
            )
        begun = shapes[0] if self.graphs.first is self.whole else self._tried(on, self.later, 1)
        if isinstance(begun, str):
            raise BackendUnavailable(
                f"{self.later.path.name} cannot run on an empty past (of length 0), and {self.whole.path.name} hands "
                f"no cache out to begin with: {begun}"
            )
        self.graphs.last_only = any(
            len(shape) == 2 or shape[1] == 1 for shape in found[1:] if not isinstance(shape, str)
        )
        self.capacity = self.options.get("capacity", CAPACITY)
        if len(shapes) == len(found) and isinstance(self._tried(on, self.whole, self.capacity), str):
            least, most = 3, self.capacity
            while most - least > 1:
                middle = (least + most) // 2
                works = not isinstance(self._tried(on, self.whole, middle), str)
                least, most = (middle, most) if works else (least, middle)
            self.capacity = least
            self._assumed.append(f"A sequence holds at most {least} tokens: its own forward raises on {least + 1}.")
        return on, int(shapes[0][-1])

    def _place(self) -> str:
        """Where a session of the own forward can be made: on the CPU, else on CUDA."""
        words = ""
        for device in ("cpu", "cuda"):
            try:
                with foreign():
                    self.graphs.runner(self.whole, device)
                return device
            except Raised as error:
                words = words or str(error)
        raise BackendUnavailable(f"ONNX Runtime {onnxruntime.__version__} cannot load {self.whole.path.name}: {words}")

    def _tried(self, device: str, graph: Graph, t: int) -> tuple[int, ...] | str:
        """The shape of what a graph gives on ``t`` tokens and no others, or what it raises."""
        signature = graph.signature
        shape = (1, t, self._width()) if signature.hidden else (1, t)
        x = np.zeros(shape, signature.tokens.dtype)
        try:
            with foreign():
                values = self.graphs.runner(graph, device).run(x, 0, (), self.graphs.dummy)
        except Raised as error:
            return str(error)
        return tuple(values[signature.output.name].shape())

    def _width(self) -> int:
        """Of hidden states that it takes."""
        size = self.later.signature.tokens.axes[2]
        width = size if isinstance(size, int) else self.options.get("width")
        if width is None:
            raise self.later.unknown(
                f"{self.later.signature.tokens.name} does not tell its width; tell it by option width"
            )
        return int(width)

    def _config(self, outputs: int) -> Config:
        signature = self.later.signature
        past = signature.pasts[0]
        kinds = {past.tensor.dtype, signature.output.dtype, signature.tokens.dtype}
        kinds |= weights.dtypes(self.later.model.graph)
        sizes: dict[str, Any] = {
            "heads": past.heads,
            "kv_heads": past.heads,
            "head_dim": past.head_dim,
            "layers": signature.layers,
            "capacity": self.capacity,
            "dtype": "float16" if "float16" in kinds else "float32",
        }
        if signature.hidden:
            width = self._width()
            named = signature.output.name.endswith("logits")
            return Config("hidden", **sizes, width=width, vocabulary=outputs if named or outputs != width else 0)
        rows, width = weights.embedding(self.later.model.graph, signature.tokens.name) or (outputs, 0)
        known = min(self.options.get("vocabulary", rows), outputs)
        reserved = {*range(known, outputs), *self.options.get("reserved", ())}
        return Config(
            "decoder",
            **sizes,
            width=width or past.heads * past.head_dim,
            vocabulary=outputs,
            reserved=tuple(sorted(reserved)),
        )

    def _words(self) -> str:
        signature, first = self.later.signature, self.later.signature.pasts[0]
        if signature.mask is not None:
            self._assumed.append("attention_mask is 1 for every cached and every new token.")
        for tensor in (signature.positions, signature.cache_position):
            if tensor is not None:
                self._assumed.append(f"{tensor.name} counts a sequence's tokens from 0.")
        if signature.branch is not None:
            dummy = f"whose past has a length of {self.graphs.dummy}"
            self._assumed.append(f"{signature.branch.name} is false on an empty cache, {dummy}, and true from then on.")
        if "DynamicQuantizeLinear" in self.later.kinds():
            self._assumed.append(
                "It quantises activations with one scale for all tokens of a call, so that each output depends on what "
                "is computed with it."
            )
        layers = f"{signature.layers} layer" + "s" * (signature.layers > 1)
        return (
            f"ONNX decoder of {layers}: {signature.tokens.name} to {signature.output.name}, the past in "
            f"{first.tensor.name} {first.layout} {first.tensor.dtype}, ..., the present in "
            f"{signature.present(first.slot)}, ..."
        )


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
