"""``onnx-reference``: the operator ``Attention`` of ONNX with past and present, as onnx's reference evaluator computes
it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto, helper
from onnx.reference import ReferenceEvaluator

from kvconform_backends.engines.operator import Operator
from kvconform_backends.numpy.cache import Array, Cache
from kvconform_specs.config import Config

OPSET, IR = 24, 10


def model(config: Config, masked: bool) -> ModelProto:
    """One causal node. masked: it has a mask as well, a float one that holds the bias if there is one."""
    bias = config.positions == "alibi"
    inputs = [(name, TensorProto.FLOAT) for name in ("query", "key", "value", "past_key", "past_value")]
    inputs.insert(3, ("mask", TensorProto.FLOAT if bias else TensorProto.BOOL))
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * 4) for name in ("y", "keys", "values")]
    names = [name if masked or name != "mask" else "" for name, _ in inputs]
    attributes: dict[str, Any] = {
        "is_causal": 1,
        "scale": abs(config.score_scale) or 1.0,
        "softcap": config.softcap or 0.0,
    }
    node = helper.make_node("Attention", names, ["y", "keys", "values"], **attributes)
    given = [helper.make_tensor_value_info(name, kind, [None] * 4) for name, kind in inputs if name in names]
    graph = helper.make_graph([node], "attention", given, outputs)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR)


class OnnxReference(Operator):
    """``onnx.reference.ReferenceEvaluator``. The sign of a scale is on the query: engines want a positive one."""

    options = ("softcap", "alibi")

    def __init__(self, config: Config, weights: Mapping[str, Array], device: str = "cpu") -> None:
        super().__init__(config, weights, device)
        self.sessions = {masked: self.opened(model(config, masked)) for masked in (False, True)}

    def opened(self, graph: ModelProto) -> Any:
        return ReferenceEvaluator(graph)

    def attend(self, cache: Cache, layer: int, query: Array, key: Array, value: Array) -> Array:
        c, (t, past) = self.config, (query.shape[2], cache.keys[layer].shape[2])
        feeds = {"query": query * np.sign(np.float32(c.score_scale)), "key": key, "value": value}
        feeds |= {"past_key": cache.keys[layer], "past_value": cache.values[layer]}
        mask = self.beyond_causality(t, past + t)
        if mask is not None:
            feeds["mask"] = mask
        output, cache.keys[layer], cache.values[layer] = self.sessions["mask" in feeds].run(None, feeds)
        return np.asarray(output)
