"""Small ONNX decoders in every naming convention, correct or with a mistake."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

LAYERS, HEADS, HEAD_DIM, VOCABULARY, TABLE = 2, 2, 6, 17, 64
WIDTH = HEADS * HEAD_DIM
TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "int32": TensorProto.INT32}
TYPES |= {"int64": TensorProto.INT64, "bool": TensorProto.BOOL}


@dataclass(frozen=True)
class Style:
    """The convention of a decoder. past, present: names for layer ``{n}`` and its ``{part}``; without a part both are
    stacked. tokens_first: ``(b, s, h, d)``. presents: whether it returns the cache. table: its number of positions.
    last_only: only logits of the last token. needs_past: it raises on an empty past. mistake: its fault."""

    past: str = "past_key_values.{n}.{part}"
    present: str = "present.{n}.{part}"
    dtype: str = "float32"
    ids: str = "int64"
    tokens_first: bool = False
    mask: bool = False
    position_ids: bool = False
    cache_position: bool = False
    hidden: bool = False
    cached: bool = True
    presents: bool = True
    table: int = TABLE
    last_only: bool = False
    needs_past: bool = False
    mistake: str = ""

    @property
    def stacked(self) -> bool:
        return "{part}" not in self.past

    def names(self, pattern: str) -> list[str]:
        parts = [""] if self.stacked else ["key", "value"]
        return [pattern.format(n=n, part=part) for n in range(LAYERS) for part in parts]


CONVENTIONS = {
    "plain": Style(),
    "stacked": Style(past="past_{n}", present="present_{n}", mask=True),
    "numbered last": Style(past="past_{part}_{n}", present="present_{part}_{n}", dtype="float16"),
    "tokens first": Style(past="past.{n}.{part}", tokens_first=True, position_ids=True),
    "32 bits": Style(ids="int32", cache_position=True, mask=True),
    "hidden": Style(hidden=True),
    "last": Style(last_only=True),
    "short table": Style(table=23),
}
"""One graph each; merged graphs and pairs of files are built separately."""


class Builder:
    """Nodes and constants of one graph; methods append a node and return the name of its output."""

    def __init__(self, style: Style, prefix: str = "") -> None:
        self.style, self.prefix = style, prefix
        self.nodes: list[NodeProto] = []
        self.constants: dict[str, NDArray[Any]] = {}

    def op(self, kind: str, *inputs: str, to: str = "", **attributes: Any) -> str:
        name = to or f"{self.prefix}{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def constant(self, x: Any, dtype: Any = np.int64) -> str:
        name = f"{self.prefix}constant_{len(self.constants)}"
        self.constants[name] = np.asarray(x, dtype)
        return name

    def weight(self, name: str, *shape: int) -> str:
        noise = np.random.Generator(np.random.Philox(key=sum(name.encode())))
        self.constants[name] = (noise.standard_normal(shape) * 0.3).astype(self.style.dtype)
        return name

    def size(self, x: str, axis: int) -> str:
        return self.op("Squeeze", self.op("Shape", x, start=axis, end=axis + 1))

    # --- the decoder ---
    def build(self, pasts: dict[str, str]) -> list[str]:
        """The names of logits and presents. ``pasts``: the available pasts, by name."""
        s = self.style
        tokens = "inputs_embeds" if s.hidden else "input_ids"
        t = self.size(tokens, 1)
        axis = (1 if s.tokens_first else 2) + s.stacked
        if s.mistake == "drops the newest":
            ends = self.constant([0]), self.constant([-1]), self.constant([axis])
            pasts = {name: self.op("Slice", x, *ends) for name, x in pasts.items()}
        first = pasts.get(s.names(s.past)[0])
        past = self.constant(0) if first is None else self.size(first, axis)
        at = self.op("Range", past, self.op("Add", past, t), self.constant(1))
        if s.position_ids:
            at = "position_ids"
        elif s.cache_position:
            at = "cache_position"
        if s.mistake == "positions restart":
            at = self.op("Range", self.constant(0), t, self.constant(1))
        x = tokens if s.hidden else self.op("Gather", self.weight("embed", VOCABULARY, WIDTH), tokens)
        x = self.op("Add", x, self.op("Gather", self.weight("position", s.table, WIDTH), at))
        seen = self.seen(past, t)
        presents: list[str] = []
        for n in range(LAYERS):
            x = self.op("Add", x, self.layer(n, x, seen, pasts, presents))
        if s.last_only:
            x = self.op("Gather", x, self.constant(-1), axis=1)
        return [self.op("MatMul", x, self.weight("head", WIDTH, VOCABULARY)), *presents]

    def touched(self, logits: str) -> str:
        """The logits, after reading the past's last token, which raises if there is none."""
        if not self.style.needs_past:
            return logits
        axis = (1 if self.style.tokens_first else 2) + self.style.stacked
        newest = self.op("Gather", self.style.names(self.style.past)[0], self.constant(-1), axis=axis)
        nothing = self.op("Mul", self.op("ReduceMax", newest, keepdims=0), self.constant(0, self.style.dtype))
        return self.op("Add", logits, nothing)

    def seen(self, past: str, t: str) -> str:
        """bool (t, s): which of the ``s`` cached and new tokens each new one sees."""
        end = t if self.style.mistake == "mask of the chunk" else self.op("Add", past, t)
        whole = self.op("Range", self.constant(0), end, self.constant(1))
        start = {"top-left mask": self.constant(0), "off by one": self.op("Add", past, self.constant(1))}
        first = start.get(self.style.mistake, past)
        query = self.op("Range", first, self.op("Add", first, t), self.constant(1))
        return self.op("LessOrEqual", whole, self.op("Unsqueeze", query, self.constant([1])))

    def layer(self, n: int, x: str, seen: str, pasts: dict[str, str], presents: list[str]) -> str:
        s = self.style
        shape = self.constant([0, 0, HEADS, HEAD_DIM])
        parts = {}
        for part in ("query", "key", "value"):
            made = self.op("Reshape", self.op("MatMul", x, self.weight(f"{part}{n}", WIDTH, WIDTH)), shape)
            keeps = s.tokens_first and part != "query"
            parts[part] = made if keeps else self.op("Transpose", made, perm=[0, 2, 1, 3])
        grown = {}
        for index, part in enumerate(("key", "value")):
            old = pasts.get(s.past.format(n=n, part=part))
            if old is not None and s.stacked:
                old = self.op("Gather", old, self.constant(index), axis=0)
            new = parts[part]
            if old is not None:
                new = self.op("Concat", old, new, axis=1 if s.tokens_first else 2)
            grown[part] = new
        if s.stacked:
            halves = [self.op("Unsqueeze", grown[part], self.constant([0])) for part in ("key", "value")]
            presents.append(self.op("Concat", *halves, axis=0))
        else:
            presents += [grown["key"], grown["value"]]
        if s.tokens_first:
            grown = {part: self.op("Transpose", y, perm=[0, 2, 1, 3]) for part, y in grown.items()}
        scores = self.op("MatMul", parts["query"], self.op("Transpose", grown["key"], perm=[0, 1, 3, 2]))
        scaled = self.op("Mul", scores, self.constant(HEAD_DIM**-0.5, s.dtype))
        masked = self.op("Where", seen, scaled, self.constant(-np.inf, s.dtype))
        mixed = self.op("MatMul", self.op("Softmax", masked, axis=-1), grown["value"])
        flat = self.op("Reshape", self.op("Transpose", mixed, perm=[0, 2, 1, 3]), self.constant([0, 0, WIDTH]))
        return self.op("MatMul", flat, self.weight(f"output{n}", WIDTH, WIDTH))


def inputs_of(style: Style) -> list[ValueInfoProto]:
    """The inputs other than the past."""
    made = [
        helper.make_tensor_value_info("inputs_embeds", TYPES[style.dtype], ["batch", "new", WIDTH])
        if style.hidden
        else helper.make_tensor_value_info("input_ids", TYPES[style.ids], ["batch", "new"])
    ]
    if style.mask:
        made.append(helper.make_tensor_value_info("attention_mask", TYPES[style.ids], ["batch", "total"]))
    if style.position_ids:
        made.append(helper.make_tensor_value_info("position_ids", TYPES[style.ids], ["batch", "new"]))
    if style.cache_position:
        made.append(helper.make_tensor_value_info("cache_position", TYPES[style.ids], ["new"]))
    return made


def cache_of(style: Style, pattern: str, length: str) -> list[ValueInfoProto]:
    inner: list[int | str] = [length, HEADS] if style.tokens_first else [HEADS, length]
    axes: list[int | str | None] = [*([2] if style.stacked else []), "batch", *inner, HEAD_DIM]
    return [helper.make_tensor_value_info(name, TYPES[style.dtype], axes) for name in style.names(pattern)]


def outputs_of(style: Style) -> list[ValueInfoProto]:
    logits = helper.make_tensor_value_info(
        "logits", TYPES[style.dtype], ["batch", VOCABULARY] if style.last_only else ["batch", "new", VOCABULARY]
    )
    return [logits, *(cache_of(style, style.present, "total") if style.presents else [])]


def finished(nodes: list[NodeProto], style: Style, inputs: list[ValueInfoProto], builders: list[Builder]) -> ModelProto:
    constants = {name: x for builder in builders for name, x in builder.constants.items()}
    graph = helper.make_graph(
        nodes, "decoder", inputs, outputs_of(style), [numpy_helper.from_array(x, name) for name, x in constants.items()]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


def decoder(style: Style) -> ModelProto:
    """One graph with a past, or without (``cached=False``)."""
    builder = Builder(style)
    pasts = {name: name for name in style.names(style.past)} if style.cached else {}
    logits, *presents = builder.build(pasts)
    made = [builder.touched(logits), *presents]
    for name, output in zip(made, outputs_of(style), strict=False):
        builder.op("Identity", name, to=output.name)
    inputs = [*inputs_of(style), *(cache_of(style, style.past, "past") if style.cached else [])]
    return finished(builder.nodes, style, inputs, [builder])


def merged(style: Style) -> ModelProto:
    """Two branches, chosen by ``use_cache_branch``; only the one with a past has the mistake."""
    builders, branches = [], []
    for name, pasts in (("cached", {n: n for n in style.names(style.past)}), ("first", {})):
        builder = Builder(style if pasts else replace(style, mistake=""), f"{name}_")
        outputs = builder.build(pasts)
        values = [ValueInfoProto(name=x) for x in outputs]
        branches.append(helper.make_graph(builder.nodes, name, [], values))
        builders.append(builder)
    names = ["either", *(output.name for output in outputs_of(style)[1:])]
    choice = helper.make_node("If", ["use_cache_branch"], names, then_branch=branches[0], else_branch=branches[1])
    end = Builder(style)
    end.op("Identity", end.touched("either"), to="logits")
    flag = helper.make_tensor_value_info("use_cache_branch", TensorProto.BOOL, [1])
    inputs = [*inputs_of(style), *cache_of(style, style.past, "past"), flag]
    return finished([choice, *end.nodes], style, inputs, [*builders, end])


def saved(model: ModelProto, folder: Path, name: str = "decoder.onnx") -> Path:
    path = folder / name
    onnx.save(model, path)
    return path
