"""Perturbs the weights of an ONNX graph by noise of the size of rounding.

A weight is a constant of more than one number: an initializer or the value of a ``Constant`` node, also in subgraphs.
Scalars (epsilons, score factors), integer-valued constants (ranges) and constants with a magnitude of ``HUGE`` or more
(masks) are not perturbed. Stored integers are not perturbed either, but their scales are: inputs of
``DequantizeLinear`` and similar nodes, including scalars, and factors of ``DynamicQuantizeLinear``'s scale. Scales of
activations are not.

The number of terms in the sums of a weight follows from its use, looking through ``Transpose``, ``Cast``, ``Identity``
and ``DequantizeLinear``: the axis that ``MatMul`` sums over (the second-to-last of its right operand, the last of its
left one), that of ``Gemm`` according to ``transA`` and ``transB``, all axes of ``Conv``'s weight except the first,
``K`` of ``MatMulNBits``. For other uses, such as embeddings, it is the last axis, and 1 for vectors.
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
"""The index of each node kind's scale input."""
HUGE = 6e4
"""Weights are smaller, masks are not: the most negative float16 is -65504."""


def perturbed(model: ModelProto, storage: float, accumulation: float, seed: int) -> ModelProto:
    """A copy with perturbed weights (``kvconform.backend.BlackBox.perturbed``); they must be loaded.

    Raises ValueError without weights: the rounding bound would be zero.
    """
    copied = ModelProto()
    copied.CopyFrom(model)
    noise = np.random.Generator(np.random.Philox(key=seed))
    uses = Uses(copied.graph)
    any_perturbed = False
    for name, tensor in constants(copied.graph):
        if tensor.data_type not in FLOATS:
            continue
        weight = numpy_helper.to_array(tensor)
        if not (learned(weight) or uses.scales(name)):
            continue
        size = storage + accumulation * math.sqrt(uses.terms(name, weight.shape))
        # in float64: the perturbation of a float32 weight is a few units in its last place
        noisy = weight.astype(np.float64) * (1 + size * noise.uniform(-1, 1, weight.shape))
        tensor.CopyFrom(numpy_helper.from_array(noisy.astype(weight.dtype), tensor.name))
        any_perturbed = True
    if not any_perturbed:
        raise ValueError("the graph has no floating-point weights, so that its rounding error cannot be estimated")
    return copied


def learned(constant: Array) -> bool:
    """Whether a constant looks like a weight."""
    wide = constant.astype(np.float64)
    return wide.size > 1 and bool((np.abs(wide) < HUGE).all()) and not bool((wide == np.rint(wide)).all())


def graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """The graph and its subgraphs."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else ())):
                yield from graphs(inner)


def constants(graph: GraphProto) -> Iterator[tuple[str, TensorProto]]:
    """The constants of a graph and its subgraphs, by name."""
    for inner in graphs(graph):
        for tensor in inner.initializer:
            yield tensor.name, tensor
        for node in inner.node:
            for attribute in node.attribute:
                if node.op_type == "Constant" and attribute.name == "value":
                    yield node.output[0], attribute.t


def dtypes(graph: GraphProto) -> set[str]:
    """The dtypes of the matrices by numpy name, without stored integers."""
    found = {tensor.data_type for _name, tensor in constants(graph) if len(tensor.dims) > 1}
    return {helper.tensor_dtype_to_np_dtype(kind).name for kind in found if kind in FLOATS}


def embedding(graph: GraphProto, ids: str) -> tuple[int, int] | None:
    """Rows and columns of the embedding table of the token ids; None if it is not found."""
    shapes = {name: tuple(tensor.dims) for name, tensor in constants(graph)}
    called = {ids}  # their names after nodes that do not change them
    for inner in graphs(graph):
        for node in inner.node:
            if node.op_type in ("Reshape", "Cast", "Identity") and node.input[0] in called:
                called.add(node.output[0])
            if node.op_type == "Gather" and node.input[1] in called and len(shapes.get(node.input[0], ())) == 2:
                rows, columns = shapes[node.input[0]]
                return rows, columns
    return None


class Uses:
    """How a graph uses its constants."""

    def __init__(self, graph: GraphProto) -> None:
        self.shapes: dict[str, Shape] = {name: tuple(tensor.dims) for name, tensor in constants(graph)}
        self.nodes: dict[str, list[tuple[NodeProto, int]]] = defaultdict(list)
        self.makers: dict[str, str] = {}  # the kind of node that produces each value
        for inner in graphs(graph):
            for node in inner.node:
                self.makers |= dict.fromkeys(node.output, node.op_type)
                for index, name in enumerate(node.input):
                    self.nodes[name].append((node, index))

    def scales(self, name: str) -> bool:
        """Whether it is a scale of stored integers, as opposed to activations."""
        activations = ("QuantizeLinear", "DynamicQuantizeLinear")
        for node, index in self.nodes[name]:
            if SCALES.get(node.op_type) == index and self.makers.get(node.input[0]) not in activations:
                return True
            if node.op_type == "Mul" and self.makers.get(node.input[1 - index]) == "DynamicQuantizeLinear":
                return True
        return False

    def terms(self, name: str, shape: Shape) -> int:
        """The number of terms in the longest sum that includes a weight."""
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
