"""A correct graph of attention and decoder, built from plain operators and run by ONNX Runtime.

Importing this module imports neither onnx nor ONNX Runtime; building the backend needs both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from kvconform.errors import Unavailable
from kvconform_backends.abilities import without
from kvconform_backends.numpy.cache import Array, Cache, NumpyCache
from kvconform_specs.config import Config

OPSET, IR = 20, 10


class Nodes:
    """A graph under construction: a call adds a node and returns the name of its output. Numbers become constants."""

    def __init__(self) -> None:
        self.inputs: list[tuple[str, str, list[str | int]]] = []  # name, type, shape
        self.outputs: list[str] = []
        self.nodes: list[tuple[str, list[str], str, dict[str, Any]]] = []
        self.constants: dict[str, Array] = {}

    def __call__(self, kind: str, *inputs: Any, out: str = "", **attributes: Any) -> str:
        names = [x if isinstance(x, str) else self.constant(np.asarray(x)) for x in inputs]
        out = out or f"{kind}.{len(self.nodes)}"
        self.nodes.append((kind, names, out, attributes))
        return out

    def constant(self, x: Array) -> str:
        name = f"constant.{len(self.constants)}"
        self.constants[name] = x.astype(np.float32) if x.dtype.kind == "f" else x
        return name


class Graph(NumpyCache):
    """The cache of ``numpy`` as past and present of a single graph, which also computes masks and positions."""

    claims = replace(
        NumpyCache.claims, abilities=without(NumpyCache.claims, "macs", "contexts", "empty_append"), dtypes=("float32",)
    )

    designs: tuple[str, ...] = ()

    @classmethod
    def refuses(cls, config: Config, device: str) -> str | None:
        unfit = [name for name in ("sink", "rotary") if getattr(config, name) is not None]
        return f"the graph has no {unfit[0]}" if unfit else super().refuses(config, device)

    def __init__(self, config: Config, weights: Mapping[str, Array], device: str = "cpu") -> None:
        super().__init__(config, weights, device)
        self.session = session_of(self.model())

    def run(self, cache: Cache, inputs: tuple[Array, ...], mask: Array | None = None) -> Array:
        past = [x for pair in zip(cache.keys, cache.values, strict=True) for x in pair]
        batch, t = inputs[0].shape[0], inputs[0].shape[1 if len(inputs) == 1 else 2]
        allowed = np.ones((batch, cache.length + t), bool) if mask is None else mask
        output, *present = self.call([*inputs, allowed, *past])
        cache.keys[:], cache.values[:] = present[::2], present[1::2]
        return output[:, -1:] if self.last_only else output

    def call(self, feeds: list[Array]) -> list[Array]:
        """The graph's outputs: the step's output, then each layer's present key and value."""
        names = (x.name for x in self.session.get_inputs())
        outputs: list[Array] = self.session.run(None, dict(zip(names, feeds, strict=True)))
        return outputs

    # --- the graph ---
    def model(self) -> Nodes:
        c, add = self.config, Nodes()
        if c.profile == "attention":
            heads = {"query": c.heads, "key": c.kv_heads, "value": c.kv_heads}
            add.inputs = [(name, "FLOAT", ["b", count, "t", c.head_dim]) for name, count in heads.items()]
            result = self.mixed(add, 0, tokens(add, "query"), "query", "key", "value")
        else:
            add.inputs = [("tokens", "INT64", ["b", "t"])]
            result = self.logits(add, tokens(add, "tokens", axis=1))
        parts = [f"{layer}.{part}" for layer in range(c.layers) for part in ("key", "value")]
        add.inputs += [("allowed", "BOOL", ["b", "s"])]
        add.inputs += [(f"past.{part}", "FLOAT", ["b", c.kv_heads, "p", c.head_dim]) for part in parts]
        add.outputs = [result, *(f"present.{part}" for part in parts)]
        return add

    def mixed(self, add: Nodes, layer: int, t: str, query: str, key: str, value: str) -> str:
        """``(b, h, t, d)``: appends to the layer's cache and attends."""
        keys, values = self.grown(add, layer, key, value)
        scores = add("MatMul", query, add("Transpose", self.by_query_head(add, keys), perm=[0, 1, 3, 2]))
        scores = add("Mul", scores, self.config.score_scale)
        behind = add("Sub", add("Unsqueeze", self.rows(add, t), [1]), add("Range", 0, tokens(add, keys), 1))
        scores = self.biased(add, self.capped(add, scores), behind)
        seen = add("And", self.shown(add, layer, behind), add("Unsqueeze", "allowed", [1, 2]))  # (b, 1, t, s)
        return add("MatMul", self.weighed(add, scores, seen), self.by_query_head(add, values))

    def grown(self, add: Nodes, layer: int, key: str, value: str) -> tuple[str, str]:
        keys = add("Concat", f"past.{layer}.key", key, axis=2, out=f"present.{layer}.key")
        return keys, add("Concat", f"past.{layer}.value", value, axis=2, out=f"present.{layer}.value")

    def capped(self, add: Nodes, scores: str) -> str:
        cap = self.config.softcap
        return scores if cap is None else add("Mul", add("Tanh", add("Div", scores, cap)), cap)

    def biased(self, add: Nodes, scores: str, behind: str) -> str:
        """ALiBi, as in ``NumpyLayers.bias``."""
        if self.config.positions != "alibi":
            return scores
        slopes = 2.0 ** (-8 * np.arange(1, self.config.heads + 1) / self.config.heads)
        return add("Sub", scores, add("Mul", add("Cast", behind, to=1), slopes[:, None, None]))

    def past(self, add: Nodes) -> str:
        """The number of tokens in the past."""
        return tokens(add, "past.0.key")

    def rows(self, add: Nodes, t: str) -> str:
        """``(t,)``: the positions of the new tokens, for the mask."""
        past = self.past(add)
        return add("Range", past, add("Add", past, t), 1)

    def shown(self, add: Nodes, layer: int, behind: str) -> str:
        """``(t, s)``: the causal mask and the window."""
        seen, window = add("GreaterOrEqual", behind, 0), self.config.window_of(layer)
        return seen if window is None else add("And", seen, add("Less", behind, window))

    def by_query_head(self, add: Nodes, x: str) -> str:
        return add("Gather", x, np.arange(self.config.heads) // self.config.group, axis=1)

    def weighed(self, add: Nodes, scores: str, seen: str) -> str:
        """The softmax over the visible scores; a query that sees nothing gives zeros, not NaN."""
        weights = add("Softmax", add("Where", seen, scores, -np.inf), axis=-1)
        return add("Where", add("IsNaN", weights), 0.0, weights)

    def logits(self, add: Nodes, t: str) -> str:
        c, w = self.config, self.weights
        places = self.places(add, t)
        x = add("Gather", w["embed"], "tokens", axis=0)
        if c.positions == "learned":
            x = add("Add", x, add("Gather", w["position"], places, axis=0))
        for layer in range(c.layers):
            at = f"layers.{layer}."
            y = self.normed(add, x, w[at + "norm_attention"])
            q, k, v = (self.heads(add, add("MatMul", y, w[at + name])) for name in ("query", "key", "value"))
            if c.positions == "rope":
                q, k = self.turned(add, q, places), self.turned(add, k, places)
            mixed = add("Transpose", self.mixed(add, layer, t, q, k, v), perm=[0, 2, 1, 3])
            mixed = add("Reshape", mixed, [0, 0, c.heads * c.head_dim])
            x = add("Add", x, add("MatMul", mixed, w[at + "output"]))
            if c.mlp:
                y = self.normed(add, x, w[at + "norm_mlp"])
                gate = add("MatMul", y, w[at + "gate"])
                hidden = add("Mul", add("Mul", gate, add("Sigmoid", gate)), add("MatMul", y, w[at + "up"]))
                x = add("Add", x, add("MatMul", hidden, w[at + "down"]))
        return add("MatMul", self.normed(add, x, w["norm_final"]), w["lm_head"])

    def places(self, add: Nodes, t: str) -> str:
        """``(t,)``: the positions of the new tokens, for embedding and RoPE."""
        return Graph.rows(self, add, t)

    def normed(self, add: Nodes, x: str, gain: Array) -> str:
        square = add("ReduceMean", add("Mul", x, x), [-1], keepdims=1)
        return add("Mul", add("Div", x, add("Sqrt", add("Add", square, 1e-6))), gain)

    def heads(self, add: Nodes, x: str) -> str:
        return add("Transpose", add("Reshape", x, [0, 0, -1, self.config.head_dim]), perm=[0, 2, 1, 3])

    def turned(self, add: Nodes, x: str, places: str) -> str:
        half = self.config.head_dim // 2
        angle = np.arange(self.config.capacity)[:, None] * 10000.0 ** (-np.arange(half) / half)
        cos, sin = (add("Gather", table, places, axis=0) for table in (np.cos(angle), np.sin(angle)))
        a, b = add("Slice", x, [0], [half], [3]), add("Slice", x, [half], [2 * half], [3])
        return add(
            "Concat",
            add("Sub", add("Mul", a, cos), add("Mul", b, sin)),
            add("Add", add("Mul", b, cos), add("Mul", a, sin)),
            axis=3,
        )


def tokens(add: Nodes, x: str, axis: int = 2) -> str:
    """The size of an axis, as a scalar."""
    return add("Squeeze", add("Shape", x, start=axis, end=axis + 1))


def session_of(model: Nodes) -> Any:
    """An ONNX Runtime session on the CPU. Raises Unavailable if onnx or ONNX Runtime is not installed."""
    try:
        import onnx
        import onnxruntime  # type: ignore[import-untyped]
    except ModuleNotFoundError as missing:
        raise Unavailable(f"graphs need {missing.name!r}; pip install 'kvconform[onnx]'") from missing
    make = onnx.helper
    graph = make.make_graph(
        [make.make_node(kind, names, [out], **attributes) for kind, names, out, attributes in model.nodes],
        "graph",
        [
            make.make_tensor_value_info(name, onnx.TensorProto.DataType.Value(kind), shape)
            for name, kind, shape in model.inputs
        ],
        [make.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in model.outputs],
        [onnx.numpy_helper.from_array(x, name) for name, x in model.constants.items()],
    )
    made = make.make_model(graph, opset_imports=[make.make_opsetid("", OPSET)], ir_version=IR)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])
