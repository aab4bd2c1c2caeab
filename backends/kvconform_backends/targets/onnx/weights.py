"""The weights of an ONNX graph, perturbed by noise of the size of rounding.

A weight is a constant of more than one number, an initializer or the value of a ``Constant`` node, in the graph or in a
branch of it. Constants that nobody learned stay: scalars (epsilons, factors of scores), what holds only integers
(such as ranges), and what holds a number of ``HUGE`` and more (masks). Stored integers stay as well; the scales that
``DequantizeLinear`` and its like multiply them by are perturbed, single ones too, and those that ``Mul`` joins to
the scale of ``DynamicQuantizeLinear``. Scales of activations stay.

How many terms the sums have that a weight is part of is read off its use, behind ``Transpose``, ``Cast``, ``Identity``
and ``DequantizeLinear``: the axis that ``MatMul`` sums over (the last but one of its right operand, the last of its
left one), that of ``Gemm`` with its ``transA`` and ``transB``, all axes of ``Conv``'s weight but the first, ``K`` of
``MatMulNBits``. Of any other use, an embedding's among them, it is the last axis, and 1 of a vector.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

Array = NDArray[Any]
Shape = tuple[int, ...]

FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16)
SCALES = {"DequantizeLinear": 1, "MatMulNBits": 2, "GatherBlockQuantized": 2}
"""Which input of a node is the scale of stored integers."""
HUGE = 6e4
"""No weight is as large, and every mask is: the most negative float16 is -65504."""


def perturbed(model: ModelProto, storage: float, accumulation: float, seed: int) -> ModelProto:
    """A copy whose weights are perturbed (``kvconform.backend.BlackBox.perturbed``); they must be loaded.

    Raises ValueError where there are none: a bound made of nothing would accuse everybody.
    """
    copied = ModelProto()
    copied.CopyFrom(model)
    noise = np.random.Generator(np.random.Philox(key=seed))
    uses = Uses(copied.graph)
    moved_any = False
    for name, tensor in constants(copied.graph):
        if tensor.data_type not in FLOATS:
            continue
        weight = numpy_helper.to_array(tensor)
        if not (learned(weight) or uses.scales(name)):
            continue
        size = storage + accumulation * math.sqrt(uses.terms(name, weight.shape))
        # in 64 bits: the disturbance of a float32 weight is a few of its own last places
        moved = weight.astype(np.float64) * (1 + size * noise.uniform(-1, 1, weight.shape))
        tensor.CopyFrom(numpy_helper.from_array(moved.astype(weight.dtype), tensor.name))
        moved_any = True
    if not moved_any:
        raise ValueError("the graph holds no floating-point weights: what rounding does to it cannot be told")
    return copied


def learned(constant: Array) -> bool:
    """Whether a constant is a weight, as far as its numbers tell."""
    wide = constant.astype(np.float64)
    return wide.size > 1 and bool((np.abs(wide) < HUGE).all()) and not bool((wide == np.rint(wide)).all())


def graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """The graph and the branches and bodies in it."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else ())):
                yield from graphs(inner)


def constants(graph: GraphProto) -> Iterator[tuple[str, TensorProto]]:
    """The constants of a graph and its branches, by the name that nodes call them."""
    for inner in graphs(graph):
        for tensor in inner.initializer:
            yield tensor.name, tensor
        for node in inner.node:
            for attribute in node.attribute:
                if node.op_type == "Constant" and attribute.name == "value":
                    yield node.output[0], attribute.t


def dtypes(graph: GraphProto) -> set[str]:
    """What dtypes the matrices have, by numpy's names; stored integers are none."""
    found = {tensor.data_type for _name, tensor in constants(graph) if len(tensor.dims) > 1}
    return {helper.tensor_dtype_to_np_dtype(kind).name for kind in found if kind in FLOATS}


def embedding(graph: GraphProto, ids: str) -> tuple[int, int] | None:
    """Rows and columns of the table that token ids are looked up in; None where it is not found."""
    shapes = {name: tuple(tensor.dims) for name, tensor in constants(graph)}
    called = {ids}  # what they are called behind nodes that change none
    for inner in graphs(graph):
        for node in inner.node:
            if node.op_type in ("Reshape", "Cast", "Identity") and node.input[0] in called:
                called.add(node.output[0])
            if node.op_type == "Gather" and node.input[1] in called and len(shapes.get(node.input[0], ())) == 2:
                rows, columns = shapes[node.input[0]]
                return rows, columns
    return None


class Uses:
    """What a graph does with its constants."""

    def __init__(self, graph: GraphProto) -> None:
        self.shapes: dict[str, Shape] = {name: tuple(tensor.dims) for name, tensor in constants(graph)}
        self.nodes: dict[str, list[tuple[NodeProto, int]]] = defaultdict(list)
        self.makers: dict[str, str] = {}  # which kind of node a value comes from
        for inner in graphs(graph):
            for node in inner.node:
                self.makers |= dict.fromkeys(node.output, node.op_type)
                for index, name in enumerate(node.input):
                    self.nodes[name].append((node, index))

    def scales(self, name: str) -> bool:
        """Whether it is the scale of stored integers; that of activations is not."""
        activations = ("QuantizeLinear", "DynamicQuantizeLinear")
        for node, index in self.nodes[name]:
            if SCALES.get(node.op_type) == index and self.makers.get(node.input[0]) not in activations:
                return True
            if node.op_type == "Mul" and self.makers.get(node.input[1 - index]) == "DynamicQuantizeLinear":
                return True
        return False

    def terms(self, name: str, shape: Shape) -> int:
        """How many terms the longest sum has that a weight is part of."""
        return max((self._summed(node, index, shape) for node, index in self.nodes[name]), default=1)

    def _summed(self, node: NodeProto, index: int, shape: Shape) -> int:
        rest = shape[-1] if len(shape) > 1 else 1
        attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        kind = node.op_type
        if kind == "MatMulNBits":
            return int(attributes["K"])
        if kind == "MatMul" and shape:
            return shape[-2] if index == 1 and len(shape) > 1 else shape[-1]
        if kind == "Gemm" and len(shape) == 2 and index < 2:
            transposed = bool(attributes.get("transB" if index else "transA", 0))
            return shape[(index == 0) != transposed]
        if kind == "Conv" and index == 1:
            return math.prod(shape[1:])
        if kind == "Transpose":
            order = attributes.get("perm", range(len(shape))[::-1])
            return self.terms(node.output[0], tuple(shape[axis] for axis in order))
        if kind in ("Identity", "Cast") or (kind == "DequantizeLinear" and index == 0):
            return self.terms(node.output[0], shape)
        if kind == "DequantizeLinear" and index == 1:
            return self.terms(node.output[0], self.shapes.get(node.input[0], shape))
        return rest
