"""Faults in graphs: attention and decoder, built node by node and run by ONNX Runtime, with something wrong in them.

Importing this module imports neither onnx nor ONNX Runtime: a subject needs them when it is built.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from kvconform.backend import Unavailable
from kvconform_backends.faults.planted import Planted
from kvconform_backends.numpy_cache import Array, Cache, NumpyCache
from kvconform_specs.config import Config

OPSET, IR = 20, 10
ATTENTION, DECODERS, WINDOWED = (
    ("attention-gqa", "attention-window"),
    ("decoder-rope", "decoder-learned"),
    ("attention-window", "decoder-learned"),
)


class Nodes:
    """A graph that grows: a call adds a node and gives the name of its output. Numbers become constants."""

    def __init__(self) -> None:
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
    """The cache of ``numpy`` as past and present of one graph of plain operators, which masks and counts positions."""

    claims = replace(
        NumpyCache.claims, abilities=tuple(a for a in NumpyCache.claims.abilities if a != "work"), dtypes=("float32",)
    )

    @classmethod
    def refuses(cls, config: Config, device: str) -> str | None:
        return "the graph has no sink" if config.sink is not None else super().refuses(config, device)

    def __init__(self, config: Config, weights: Mapping[str, Array], device: str = "cpu") -> None:
        super().__init__(config, weights, device)
        self.session = session_of(self.model())

    def run(self, cache: Cache, inputs: tuple[Array, ...], mask: Array | None = None) -> Array:
        past = [x for pair in zip(cache.keys, cache.values, strict=True) for x in pair]
        batch, t = inputs[0].shape[0], inputs[0].shape[1 if len(inputs) == 1 else 2]
        allowed = np.ones((batch, cache.length + t), bool) if mask is None else mask
        output, *present = self.call([*inputs, allowed, *past])
        cache.keys[:], cache.values[:] = present[::2], present[1::2]
        return output

    def call(self, feeds: list[Array]) -> list[Array]:
        """The graph's outputs: what the step gives, then each layer's present key and value."""
        names = (x.name for x in self.session.get_inputs())
        outputs: list[Array] = self.session.run(None, dict(zip(names, feeds, strict=True)))
        return outputs

    # --- the graph ---
    def model(self) -> tuple[Nodes, list[tuple[str, str, list[str | int]]], list[str]]:
        """Nodes, inputs ``(name, type, shape)`` and names of outputs."""
        c, add = self.config, Nodes()
        cached: list[str | int] = ["b", c.kv_heads, "p", c.head_dim]
        parts = [f"{layer}.{part}" for layer in range(c.layers) for part in ("key", "value")]
        inputs: list[tuple[str, str, list[str | int]]] = [("tokens", "INT64", ["b", "t"])]
        if c.profile == "attention":
            sizes = {"query": c.heads, "key": c.kv_heads, "value": c.kv_heads}
            inputs = [(name, "FLOAT", ["b", heads, "t", c.head_dim]) for name, heads in sizes.items()]
        inputs.append(("allowed", "BOOL", ["b", "s"]))
        inputs += [(f"past.{part}", "FLOAT", cached) for part in parts]
        t = tokens(add, inputs[0][0], axis=inputs[0][2].index("t"))
        alone = c.profile == "attention"
        result = self.mixed(add, 0, t, "query", "key", "value") if alone else self.logits(add, t)
        add("Identity", result, out="output")
        return add, inputs, ["output", *(f"present.{part}" for part in parts)]

    def mixed(self, add: Nodes, layer: int, t: str, query: str, key: str, value: str) -> str:
        """``(b, h, t, d)``: grows the layer's cache and attends."""
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
        """Alibi, as in ``NumpyLayers.bias``."""
        if self.config.positions != "alibi":
            return scores
        slopes = 2.0 ** (-8 * np.arange(1, self.config.heads + 1) / self.config.heads)
        return add("Sub", scores, add("Mul", add("Cast", behind, to=1), slopes[:, None, None]))

    def past(self, add: Nodes) -> str:
        """How many tokens the past holds."""
        return tokens(add, "past.0.key")

    def rows(self, add: Nodes, t: str) -> str:
        """``(t,)``: the positions of the new tokens, for the mask."""
        past = self.past(add)
        return add("Range", past, add("Add", past, t), 1)

    def shown(self, add: Nodes, layer: int, behind: str) -> str:
        """``(t, s)``: what is behind and within the window."""
        seen, window = add("GreaterOrEqual", behind, 0), self.config.window_of(layer)
        return seen if window is None else add("And", seen, add("Less", behind, window))

    def by_query_head(self, add: Nodes, x: str) -> str:
        return add("Gather", x, np.arange(self.config.heads) // self.config.group, axis=1)

    def weighed(self, add: Nodes, scores: str, seen: str) -> str:
        """The softmax over what is seen; a query that sees nothing gives zeros, not NaN."""
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
        """``(t,)``: the positions of the new tokens, for embedding and rope."""
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
    """The size of an axis, a scalar."""
    return add("Squeeze", add("Shape", x, start=axis, end=axis + 1))


def session_of(model: tuple[Nodes, list[tuple[str, str, list[str | int]]], list[str]]) -> Any:
    """An ONNX Runtime session on the CPU. Raises Unavailable where onnx or ONNX Runtime is missing."""
    try:
        import onnx
        import onnxruntime  # type: ignore[import-untyped]
    except ModuleNotFoundError as missing:
        raise Unavailable(f"graphs need {missing.name!r}; pip install 'kvconform[onnx]'") from missing
    make, (add, inputs, outputs) = onnx.helper, model
    graph = make.make_graph(
        [make.make_node(kind, names, [out], **attributes) for kind, names, out, attributes in add.nodes],
        "graph",
        [
            make.make_tensor_value_info(name, onnx.TensorProto.DataType.Value(kind), shape)
            for name, kind, shape in inputs
        ],
        [make.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in outputs],
        [onnx.numpy_helper.from_array(x, name) for name, x in add.constants.items()],
    )
    made = make.make_model(graph, opset_imports=[make.make_opsetid("", OPSET)], ir_version=IR)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])


class Wrong(Planted, Graph):
    """A graph that differs from the right one, which runs beside it to count where that shows."""

    def __init__(self, config: Config, weights: Mapping[str, Array], device: str = "cpu") -> None:
        super().__init__(config, weights, device)
        self.right = Graph(config, weights, device)

    def run(self, cache: Cache, inputs: tuple[Array, ...], mask: Array | None = None) -> Array:
        twin = self.fork(cache)
        right = [self.right.run(twin, inputs, mask), *twin.keys, *twin.values]
        output = super().run(cache, inputs, mask)
        wrong = [output, *cache.keys, *cache.values]
        self.faulty += not all(np.array_equal(x, y, equal_nan=True) for x, y in zip(wrong, right, strict=True))
        return output


# --- masks and positions ---
class DiagonalFromZero(
    Wrong, breaks=("causality.past-seen", "equivalence.decode"), kind="M1", bug="onnx/onnx/issues/8054"
):
    """The graph's causal mask compares with a range from zero, without the past's length."""

    def rows(self, add: Nodes, t: str) -> str:
        return add("Range", 0, t, 1)


class PastFromBatchAxis(
    Wrong,
    breaks=("causality.visibility", "shape.no-specialisation"),
    kind="M5",
    bug="sonos/torch-to-nnef/pull/217",
):
    """The graph takes the past's length from the wrong axis of its shape, the batch."""

    def past(self, add: Nodes) -> str:
        return tokens(add, "past.0.key", axis=0)


class ConstantPast(
    Wrong,
    breaks=("shape.no-specialisation", "capture.growth"),
    kind="X2",
    bug="huggingface/transformers/pull/10651",
    configs=ATTENTION,
):
    """The graph was traced with five tokens in the past, and the mask takes that number for a constant."""

    def past(self, add: Nodes) -> str:
        return add("Identity", 5)


class PlacesFromZero(
    Wrong,
    breaks=("definition.positions", "equivalence.decode"),
    kind="P1",
    bug="sonos/torch-to-nnef/pull/217",
    configs=DECODERS,
):
    """The graph has no input for positions, and counts those of new tokens from zero; its mask is right."""

    def places(self, add: Nodes, t: str) -> str:
        return add("Range", 0, t, 1)


class WindowInclusive(
    Wrong,
    breaks=("window.width", "causality.visibility"),
    kind="W1",
    bug="microsoft/onnxruntime/pull/25927",
    configs=WINDOWED,
):
    """The graph has LessOrEqual where Less would be right: the window is one token too wide."""

    def shown(self, add: Nodes, layer: int, behind: str) -> str:
        seen, window = add("GreaterOrEqual", behind, 0), self.config.window_of(layer)
        return seen if window is None else add("And", seen, add("LessOrEqual", behind, window))


class CappedWithBias(
    Wrong,
    breaks=("definition.softcap", "definition.bias"),
    kind="M11",
    bug="onnx/onnx/issues/7865",
    configs=("attention-softcap", "decoder-softcap"),
):
    """The graph adds the bias first, and caps the sum."""

    def capped(self, add: Nodes, scores: str) -> str:
        return scores

    def biased(self, add: Nodes, scores: str, behind: str) -> str:
        return super().capped(add, super().biased(add, scores, behind))


class UnguardedSoftmax(
    Wrong, breaks=("numerics.empty-row",), kind="M8", bug="robertknight/rten/pull/1321", stealth=True, configs=ATTENTION
):
    """The graph's softmax has no guard: a query that sees nothing gives NaN."""

    def weighed(self, add: Nodes, scores: str, seen: str) -> str:
        return add("Softmax", add("Where", seen, scores, -np.inf), axis=-1)


class LowestForMinusInfinity(
    Wrong,
    breaks=("numerics.empty-row",),
    kind="M8",
    bug="microsoft/onnxruntime/pull/28958",
    stealth=True,
    configs=ATTENTION,
):
    """The graph masks with the lowest finite number: a query that sees nothing gives the mean of all values."""

    def weighed(self, add: Nodes, scores: str, seen: str) -> str:
        return add("Softmax", add("Where", seen, scores, float(np.finfo(np.float32).min)), axis=-1)


# --- heads, past and present ---
class HeadsTiled(
    Wrong, breaks=("definition.grouping",), kind="H1", bug="onnx/onnx/pull/7274", configs=(*ATTENTION, *DECODERS)
):
    """The graph repeats the KV heads by Tile: the query heads take turns with them."""

    def by_query_head(self, add: Nodes, x: str) -> str:
        return add("Tile", x, [1, self.config.group, 1, 1])


class PresentCrossed(
    Wrong,
    breaks=("equivalence.decode", "contents.round-trip"),
    kind=("C1", "C5"),
    bug="pytorch/TensorRT/pull/4445",
    configs=ATTENTION,
):
    """Present key and present value, equal in shape, have changed names."""

    def call(self, feeds: list[Array]) -> list[Array]:
        output, *present = super().call(feeds)
        return [output, *(x for pair in zip(present[1::2], present[::2], strict=True) for x in pair)]


class PresentOnPast(
    Wrong,
    breaks=("equivalence.decode", "contents.past-unchanged"),
    kind="C5",
    bug="microsoft/onnxruntime/pull/31150",
    configs=ATTENTION,
):
    """The present is bound to the memory of the past, as for a buffer of the capacity; this one moves as it grows."""

    def call(self, feeds: list[Array]) -> list[Array]:
        first = len(feeds) - 2 * self.config.layers
        rooms = [self.room_of(past) for past in feeds[first:]]
        on_them = [room[: x.size].reshape(x.shape) for room, x in zip(rooms, feeds[first:], strict=True)]
        return bound(self.session, [*feeds[:first], *on_them], rooms)

    def room_of(self, past: Array) -> Array:
        """Memory for as many tokens as the capacity: that which the past lies in, or else a copy of it."""
        if isinstance(past.base, np.ndarray) and past.base.ndim == 1 and past.flags.c_contiguous:
            return past.base
        made = np.zeros(past.shape[0] * past.shape[1] * past.shape[3] * self.config.capacity, np.float32)
        made[: past.size] = past.ravel()
        return made


class RoomsTakeTurns(
    Wrong,
    breaks=("lifecycle.independent", "capture.growth"),
    kind=("C5", "C7"),
    bug="microsoft/onnxruntime-genai/pull/1604",
    stealth=True,
    configs=ATTENTION,
):
    """The present is bound to one of two buffers, and the next one to the other, for all sequences of a batch size."""

    turn = 0

    def call(self, feeds: list[Array]) -> list[Array]:
        if not self.cached:
            return super().call(feeds)
        self.turn = 1 - self.turn
        rooms: dict[tuple[int, int, int], Array] = self.__dict__.setdefault("_rooms", {})
        taken = []
        for number, x in enumerate(feeds[-2 * self.config.layers :]):
            fresh = np.zeros(x.shape[0] * x.shape[1] * x.shape[3] * self.config.capacity, np.float32)
            taken.append(rooms.setdefault((len(x), number, self.turn), fresh))
        return bound(self.session, feeds, taken)


def bound(session: Any, feeds: list[Array], rooms: list[Array]) -> list[Array]:
    """The outputs of a graph whose presents are written to the beginning of ``rooms``, one each."""
    binding, held = session.io_binding(), [np.ascontiguousarray(x) for x in feeds]
    for given, x in zip(session.get_inputs(), held, strict=True):
        binding.bind_input(given.name, "cpu", 0, x.dtype, x.shape, x.ctypes.data)
    b, g, _, d = feeds[-1].shape
    s = feeds[-len(rooms) - 1].shape[1]  # of what is allowed
    present = [room[: b * g * s * d].reshape(b, g, s, d) for room in rooms]
    output, *names = (x.name for x in session.get_outputs())
    binding.bind_output(output, "cpu")
    for name, x in zip(names, present, strict=True):
        binding.bind_output(name, "cpu", 0, x.dtype, x.shape, x.ctypes.data)
    session.run_with_iobinding(binding)
    return [binding.get_outputs()[0].numpy().copy(), *present]
