"""``ort-gqa``: ONNX Runtime's own operator ``GroupQueryAttention`` on the CPU, with past and present."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto, helper

from kvconform_backends.abilities import without
from kvconform_backends.engines.operator import Operator
from kvconform_backends.engines.ort_attention import session
from kvconform_backends.numpy.cache import Array, Cache
from kvconform_specs.config import Config

TOKENS, SIZES = ("query", "key", "value", "past_key", "past_value"), ("seqlens_k", "total_sequence_length")


def model(c: Config) -> ModelProto:
    more = ("attention_bias" if c.positions == "alibi" else "", "head_sink" if c.sink else "")
    sizes: dict[str, Any] = {"num_heads": c.heads, "kv_num_heads": c.kv_heads, "local_window_size": c.window or -1}
    scores: dict[str, Any] = {"scale": abs(c.score_scale) or 1.0, "softcap": c.softcap or 0.0}
    names, made = (*TOKENS, *SIZES, "", "", "", *more), ("output", "keys", "values")
    node = helper.make_node("GroupQueryAttention", names, made, domain="com.microsoft", **sizes, **scores)
    kinds = {name: TensorProto.INT32 if name in SIZES else TensorProto.FLOAT for name in (*names, *made) if name}
    values = {name: helper.make_tensor_value_info(name, kind, None) for name, kind in kinds.items()}
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph([node], "attention", [values.pop(name) for name in names if name], list(values.values()))
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


class OrtGroupQuery(Operator):
    claims = replace(Operator.claims, abilities=without(Operator.claims, "mask"))

    @classmethod
    def refuses(cls, config: Config, device: str) -> str | None:
        return "the operator wants head dims that are multiples of 8" if config.head_dim % 8 else None

    @cached_property
    def session(self) -> Any:
        return session(model(self.config))

    def attend(self, cache: Cache, layer: int, query: Array, key: Array, value: Array) -> Array:
        query = query * np.sign(np.float32(self.config.score_scale))  # the operator reads a scale of 0 as none given
        given = (query, key, value, cache.keys[layer], cache.values[layer])
        alone = given[3].shape[2] and query.shape[2] > 1  # behind a past it takes several tokens of one row only
        rows = [[x[row : row + 1] for x in given] for row in range(len(query))] if alone else [given]
        output, cache.keys[layer], cache.values[layer] = map(np.concatenate, zip(*map(self.called, rows), strict=True))
        return np.asarray(output)

    def called(self, given: Any) -> Any:
        (b, _, t, _), s = given[0].shape, given[3].shape[2] + given[0].shape[2]
        feeds = dict(zip(TOKENS, (*(x.swapaxes(1, 2).reshape(b, t, -1) for x in given[:3]), *given[3:]), strict=True))
        feeds |= {"seqlens_k": np.full(b, s - 1, np.int32), "total_sequence_length": np.array([s], np.int32)}
        feeds |= {"attention_bias": self.bias(t, s)[None]} if self.config.positions == "alibi" else {}
        feeds |= {"head_sink": self.sink()[:, 0, 0]} if self.config.sink else {}
        output, *cached = self.session.run(None, feeds)
        return self.split(output), *cached
