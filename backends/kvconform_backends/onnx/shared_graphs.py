"""The ONNX graphs of backend ``onnx-shared``: ``GroupQueryAttention``, which writes to the buffer that it reads.

The operator is ONNX Runtime's (domain ``com.microsoft``, docs/ContribOperators.md there). Its past and present are
buffers ``(b, g, capacity, d)``; if both share memory, a step writes its tokens and copies nothing. Heads are packed in
rows, ``(b, t, (h + 2 g) * d)``: queries, keys, values. ``d`` is zero-padded to a multiple of 8, as the operator
requires: the zeros do not change scores, and padded values are cut off.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnxruntime  # type: ignore[import-untyped]
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional

from kvconform_backends.onnx import graphs as onnx_graphs
from kvconform_backends.onnx.graphs import Pairs, close, pasts, presents
from kvconform_backends.onnx.runtime import session_options
from kvconform_backends.torch.decoder import DTYPES, Decoder, alibi, positive_scale
from kvconform_specs.config import Config

Array = NDArray[Any]

PROBES = ((1, 1, 0), (2, 1, 7), (1, 3, 4), (2, 3, 0))
"""(batch, new, past) of the check after export; a chunk after others is only possible for a single row."""


def padded(config: Config) -> int:
    """The head dim of the buffers."""
    return -(-config.head_dim // 8) * 8


def arguments(config: Config) -> list[str]:
    """The graph's inputs before the buffers: the new tokens, the requested logits, and the positions.

    ``seqlens_k`` int32 ``(b,)`` is each row's number of tokens including the new ones, minus one;
    ``total_sequence_length`` int32 ``(1,)`` is the maximum length, on the CPU.
    """
    sizes = ["seqlens_k", "total_sequence_length"] + ["attention_bias"] * (config.positions == "alibi")
    if config.profile == "attention":
        return ["query_key_value", *sizes]
    placed = ["position_ids"] if config.positions in ("rope", "learned") else []
    return ["input_ids", "logit_positions", *placed, *sizes]


def attributes(config: Config, layer: int) -> dict[str, Any]:
    """The attributes of the layer's node."""
    window = config.window_of(layer)
    return {
        "num_heads": config.heads,
        "kv_num_heads": config.kv_heads,
        "scale": positive_scale(config)[1],
        "softcap": config.softcap or 0.0,
        "local_window_size": -1 if window is None else window,
    }


def sinks(config: Config) -> Array | None:
    """The score of each head's sink, ``(h,)``."""
    return None if config.sink is None else np.arange(1, config.heads + 1) * (config.sink / config.heads)


def bias(config: Config, past: int, t: int) -> Array:
    """ALiBi's bias on the scores of the ``t`` newest of ``s = past + t`` tokens, ``(1, h, t, s)``."""
    made: Array = alibi(config, torch.arange(past, past + t), torch.arange(past + t)).numpy()
    return made


class SharedBufferDecoder(nn.Module):
    """The decoder whose attention is the operator: logits ``(b, k, V)``, and the buffers after the step."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder, config = decoder, decoder.config
        held = sinks(config)
        self.sinks = None if held is None else nn.Buffer(torch.tensor(held).to(DTYPES[config.dtype]))

    def forward(
        self,
        input_ids: Tensor,
        logit_positions: Tensor,
        seqlens_k: Tensor,
        total_sequence_length: Tensor,
        past: Pairs,
        position_ids: Tensor | None = None,
        attention_bias: Tensor | None = None,
    ) -> tuple[Tensor, Pairs]:
        decoder, c, (b, t) = self.decoder, self.decoder.config, input_ids.shape
        places = input_ids if position_ids is None else position_ids  # a model without positions uses neither
        rotate = onnx_graphs.rotation(decoder, places)
        turned, padding = (c.heads + c.kv_heads) * c.head_dim, padded(c) - c.head_dim
        present: Pairs = []

        def mix(layer: int, y: Tensor) -> Tensor:
            if c.positions == "rope":
                y = torch.cat((rotate(y[..., :turned]), y[..., turned:]), dim=-1)  # queries and keys
            if padding:
                y = functional.pad(y.reshape(b, t, c.heads + 2 * c.kv_heads, c.head_dim), (0, padding)).flatten(2)
            sizes = seqlens_k, total_sequence_length
            mixed, *grown = torch.onnx.ops.symbolic_multi_out(
                "com.microsoft::GroupQueryAttention",
                (y, None, None, *past[layer], *sizes, None, None, None, attention_bias, self.sinks),
                attributes(c, layer),
                dtypes=(y.dtype,) * 3,
                shapes=([b, t, c.heads * padded(c)], *(buffer.shape for buffer in past[layer])),
                version=1,
            )
            present.append((grown[0], grown[1]))
            return mixed.reshape(b, t, c.heads, padded(c))[..., : c.head_dim].flatten(2) if padding else mixed

        x = onnx_graphs.embedded(decoder, input_ids, places)
        for block in decoder.blocks:
            x = block(x, mix)
        return onnx_graphs.projected(decoder, x, logit_positions), present


def decoder_model(config: Config, weights: Mapping[str, NDArray[np.float32]]) -> bytes:
    """The exported decoder, checked against the one of ``onnx_graphs`` in torch, which has its own attention."""
    decoder = Decoder(config, weights).eval()
    b, t, total, slots = Dim("batch"), Dim("new"), Dim("total"), Dim("slots")
    axes: dict[str, Any] = {
        "input_ids": {0: b, 1: t},
        "logit_positions": {0: Dim("asked")},
        "position_ids": {0: b, 1: t},
        "seqlens_k": {0: b},
        "total_sequence_length": {},
        "attention_bias": {2: t, 3: total},
        "past": [({0: b, 2: slots}, {0: b, 2: slots})] * config.layers,
    }
    example = _example(config, 2, 3, 5, [0, 2, 1, 1], 9)
    order = [*arguments(config), "past"]
    model = onnx_graphs.exported(
        SharedBufferDecoder(decoder).eval(),
        {name: example[name] for name in order},
        {name: axes[name] for name in order},
        [*arguments(config), *pasts(config)],
        ["logits", *presents(config)],
    )
    onnx_graphs.check_symbolic(
        model,
        {
            "input_ids": {0: "batch", 1: "new"},
            "logit_positions": {0: "asked"},
            "position_ids": {0: "batch", 1: "new"},
            "seqlens_k": {0: "batch"},
            "total_sequence_length": {},
            "attention_bias": {2: "new", 3: "total"},
        },
        {0: "batch", 2: "slots"},
    )
    data: bytes = model.SerializeToString()
    _check_values(data, onnx_graphs.Exportable(decoder).eval())
    return data


def _example(config: Config, b: int, t: int, p: int, asked: list[int], slots: int) -> dict[str, Any]:
    """Inputs for ``t`` tokens after ``p`` others in buffers of ``slots``."""
    plain = onnx_graphs.example(config, b, t, p, asked, cached=True)
    room = (0, padded(config) - config.head_dim, 0, slots - p)
    return {
        **plain,
        "position_ids": torch.arange(p, p + t).repeat(b, 1),
        "seqlens_k": torch.full((b,), p + t - 1, dtype=torch.int32),
        "total_sequence_length": torch.tensor([p + t], dtype=torch.int32),
        "attention_bias": torch.from_numpy(bias(config, p, t)).to(DTYPES[config.dtype]),
        "past": [(functional.pad(key, room), functional.pad(value, room)) for key, value in plain["past"]],
        "plain": plain,
    }


def _check_values(model: bytes, module: onnx_graphs.Exportable) -> None:
    """Raises RuntimeError if the graph and the decoder in torch disagree on a probe."""
    config = module.decoder.config
    session = onnxruntime.InferenceSession(model, session_options(), providers=["CPUExecutionProvider"])
    for b, t, p in PROBES:
        t = min(t, config.capacity)
        p = min(p, config.capacity - t)
        example = _example(config, b, t, p, list(range(t)), config.capacity)
        with torch.no_grad():
            logits, grown = module(**example["plain"])
        flat = [*(example[name] for name in arguments(config)), *(x for pair in example["past"] for x in pair)]
        names = [value.name for value in session.get_inputs()]
        got = session.run(None, {name: x.numpy() for name, x in zip(names, flat, strict=True)})
        cut = [x[:, :, : p + t, : config.head_dim] for x in got[1:]]
        wanted = [logits, *(x for pair in grown for x in pair)]
        for output, have, want in zip(session.get_outputs(), [got[0], *cut], wanted, strict=True):
            if not close(have, want):
                raise RuntimeError(f"the exported graph's {output.name} differs from torch for (b, t, p) = {(b, t, p)}")


def attention_model(config: Config) -> bytes:
    """One node on packed heads, ``(b, t, (h + 2 g) * d)``, to ``(b, t, h * d)``."""
    c, kind = config, TensorProto.FLOAT16 if config.dtype == "float16" else TensorProto.FLOAT
    axes: dict[str, list[str | int | None]] = {
        "query_key_value": ["batch", "new", (c.heads + 2 * c.kv_heads) * padded(c)],
        "seqlens_k": ["batch"],
        "total_sequence_length": [1],
        "attention_bias": [1, c.heads, "new", "total"],
    }
    whole = ("seqlens_k", "total_sequence_length")
    buffer: list[str | int | None] = ["batch", c.kv_heads, "slots", padded(c)]
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.INT32 if name in whole else kind, axes[name])
        for name in arguments(c)
    ]
    inputs += [helper.make_tensor_value_info(name, kind, buffer) for name in pasts(c)]
    outputs = [helper.make_tensor_value_info("output", kind, ["batch", "new", c.heads * padded(c)])]
    outputs += [helper.make_tensor_value_info(name, kind, buffer) for name in presents(c)]
    held = sinks(c)
    names = ["query_key_value", "", "", *pasts(c), "seqlens_k", "total_sequence_length", "", "", ""]
    names += ["attention_bias" if c.positions == "alibi" else "", "" if held is None else "sinks"]
    constants = (
        [] if held is None else [numpy_helper.from_array(held.astype(helper.tensor_dtype_to_np_dtype(kind)), "sinks")]
    )
    node = helper.make_node(
        "GroupQueryAttention", names, [value.name for value in outputs], domain="com.microsoft", **attributes(c, 0)
    )
    opsets = [helper.make_opsetid("", onnx_graphs.OPSET), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph([node], "attention", inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=opsets, ir_version=onnx_graphs.IR)
    onnx.checker.check_model(model)
    data: bytes = model.SerializeToString()
    return data
