"""The stateful model of ``openvino``: in the form of exported ones, which the plug-in replaces by its own attention."""

from __future__ import annotations

import numpy as np
import openvino as ov
from openvino import opset13 as op

from kvconform_specs.config import Config


def model(c: Config) -> ov.Model:
    named = {"query": c.heads, "key": c.kv_heads, "value": c.kv_heads}
    tokens = {name: op.parameter([-1, heads, -1, c.head_dim], np.float32, name=name) for name, heads in named.items()}
    mask = op.parameter([-1, -1, -1, -1], np.float32, name="mask")
    beams = op.parameter([-1], np.int32, name="beam_idx")
    batch, axis = op.shape_of(beams), op.constant(np.int64(0))
    heads, assigned = [tokens["query"]], []
    for name in ("key", "value"):
        empty = op.concat([batch, op.constant(np.array([c.kv_heads, 0, c.head_dim]))], 0)
        zero = op.broadcast(op.constant(np.float32(0)), empty)
        past = op.gather(ov.opset6.read_value(zero, name, np.float32, [-1, c.kv_heads, -1, c.head_dim]), beams, axis)
        grown = op.concat([past, tokens[name]], 2)
        assigned.append(ov.opset6.assign(grown, name))
        if c.group > 1:
            spread = op.constant(np.array([1, 1, c.group, 1, 1]))
            wide = op.broadcast(op.unsqueeze(grown, op.constant(np.int64(2))), spread, broadcast_spec="BIDIRECTIONAL")
            grown = op.reshape(wide, op.constant(np.array([0, c.heads, -1, c.head_dim])), special_zero=True)
        heads.append(grown)
    output = op.result(op.scaled_dot_product_attention(*heads, mask, op.constant(np.float32(c.score_scale))))
    return ov.Model([output], assigned, [*tokens.values(), mask, beams])
