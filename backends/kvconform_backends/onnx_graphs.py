"""The ONNX graphs of backend ``onnx``: the exported decoder, and one ``Attention`` node.

Inputs, outputs and their order are the same in both: ``past_key_values.N.key``, ``.value`` in, ``present.N.key``,
``.value`` out. Opset 23 is the first with ``Attention`` and ``RMSNormalization``, which the exporter then uses
instead of a dozen small nodes. IR 10 is what every ONNX Runtime that knows opset 23 reads.
"""

from __future__ import annotations

import itertools
import logging
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnxruntime  # type: ignore[import-untyped]
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper
from torch import Tensor, nn
from torch.export import Dim

from kvconform_backends.torch_decoder import DTYPES, Decoder, attention, visible
from kvconform_specs.config import Config

OPSET, IR = 23, 10
PROBES = ((1, 1, 0), (2, 1, 7), (2, 3, 4))
"""(batch, new, past) of the check after export: sizes of 0 and 1 are those that torch.export likes to specialise."""
SLACK = 256
"""How many eps of the largest logit a probe may stray. A specialised axis fails or is off by the logits' own size."""

Pairs = list[tuple[Tensor, Tensor]]


class Exportable(nn.Module):
    """The decoder with its past as plain inputs: token ids ``(b, t)``, per layer key and value ``(b, g, p, d)``."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, input_ids: Tensor, past: Pairs | None = None) -> tuple[Tensor, Pairs] | Tensor:
        config, t = self.decoder.config, input_ids.shape[1]
        p = 0 if past is None else past[0][0].shape[2]
        positions = torch.arange(t, device=input_ids.device) + p
        mask = visible(positions, torch.arange(p + t, device=input_ids.device), config.window)  # (t, p + t)
        present: Pairs = []

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            if past is not None:
                key, value = torch.cat((past[layer][0], key), dim=2), torch.cat((past[layer][1], value), dim=2)
                present.append((key, value))
            return attention(config, query, key, value, mask)

        logits: Tensor = self.decoder(input_ids, positions, attend)
        return logits if past is None else (logits, present)


def pasts(config: Config) -> list[str]:
    return [f"past_key_values.{layer}.{part}" for layer in range(config.layers) for part in ("key", "value")]


def presents(config: Config) -> list[str]:
    return [name.replace("past_key_values", "present") for name in pasts(config)]


def decoder_model(config: Config, weights: Mapping[str, NDArray[np.float32]], cached: bool) -> bytes:
    """The exported decoder, checked against torch; without ``cached`` it has neither past nor present."""
    module = Exportable(Decoder(config, weights)).eval()
    # every size is 2 or more, and no two are equal: torch.export takes a 1 for a constant, and equal sizes for one axis
    example = _example(config, 2, 3, 5, cached)
    b, t, p = Dim("batch"), Dim("new"), Dim("past")
    shapes = {"input_ids": {0: b, 1: t}, "past": [({0: b, 2: p}, {0: b, 2: p})] * config.layers}
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)  # one line for each torchvision operator that is not installed
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # torch.export copies its own deprecated classes
            program = torch.onnx.export(
                module,
                kwargs=example,
                dynamo=True,
                dynamic_shapes={name: shapes[name] for name in example},
                opset_version=OPSET,
                input_names=["input_ids", *(pasts(config) if cached else [])],
                output_names=["logits", *(presents(config) if cached else [])],
                verbose=False,
            )
    finally:
        log.setLevel(level)
    assert program is not None  # dynamo=True returns the program
    model = program.model_proto
    model.ir_version = IR
    _check_symbolic(model)
    data: bytes = model.SerializeToString()
    _check_values(data, module, config, cached)
    return data


def _example(config: Config, b: int, t: int, p: int, cached: bool) -> dict[str, Tensor | Pairs]:
    made = torch.Generator().manual_seed(b * 100 + t * 10 + p)
    ids = torch.randint(config.vocabulary, (b, t), generator=made)
    if not cached:
        return {"input_ids": ids}
    shape = (b, config.kv_heads, p, config.head_dim)
    halves = [torch.randn(shape, generator=made).to(DTYPES[config.dtype]) for _ in range(2 * config.layers)]
    return {"input_ids": ids, "past": list(zip(halves[::2], halves[1::2], strict=True))}


def _check_symbolic(model: onnx.ModelProto) -> None:
    """Raises RuntimeError where the export turned a dynamic axis into a constant."""
    for value in model.graph.input:
        axes = [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        wanted = {0: "batch", 1: "new"} if value.name == "input_ids" else {0: "batch", 2: "past"}
        if any(axes[axis] != name for axis, name in wanted.items()):
            raise RuntimeError(f"torch.onnx.export specialised {value.name}: axes {axes}, want {wanted}")


def _check_values(model: bytes, module: Exportable, config: Config, cached: bool) -> None:
    """Raises RuntimeError where the graph and the module it was exported from disagree on a probe."""
    session = onnxruntime.InferenceSession(model, session_options(), providers=["CPUExecutionProvider"])
    for b, t, p in PROBES:
        t = min(t, config.capacity)
        p = min(p, config.capacity - t)
        feeds = _example(config, b, t, p, cached)
        with torch.no_grad():
            result = module(**feeds)
        wanted = [result] if not cached else [result[0], *itertools.chain(*result[1])]
        flat = [feeds["input_ids"], *itertools.chain(*feeds.get("past", []))]
        names = [value.name for value in session.get_inputs()]
        got = session.run(None, {name: x.numpy() for name, x in zip(names, flat, strict=True)})
        for output, have, want in zip(session.get_outputs(), got, wanted, strict=True):
            slack = SLACK * torch.finfo(want.dtype).eps * float(want.abs().max())
            exact = want.float().numpy()
            if have.shape != exact.shape or not (np.abs(have.astype(np.float32) - exact) <= slack).all():
                raise RuntimeError(f"the exported graph's {output.name} is not torch's for (b, t, p) = {(b, t, p)}")


def attention_model(config: Config, cached: bool) -> bytes:
    """One ``Attention`` node with past and present; ``is_causal`` counts from the past's end. A window needs a mask."""
    c, kind = config, TensorProto.FLOAT16 if config.dtype == "float16" else TensorProto.FLOAT
    s = "total" if cached else "new"

    def heads(name: str, count: int, length: str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, ["batch", count, length, c.head_dim])

    inputs = [heads("query", c.heads, "new"), heads("key", c.kv_heads, "new"), heads("value", c.kv_heads, "new")]
    outputs = [heads("output", c.heads, "new")]
    attributes: dict[str, Any] = {
        "scale": c.score_scale,
        "is_causal": int(c.window is None),
        "softcap": c.softcap or 0.0,
    }
    if c.window is not None:
        inputs.append(helper.make_tensor_value_info("mask", TensorProto.BOOL, ["new", s]))
    if cached:
        inputs += [heads(name, c.kv_heads, "past") for name in pasts(c)]
        outputs += [heads(name, c.kv_heads, "total") for name in presents(c)]
    node = helper.make_node(
        "Attention",
        ["query", "key", "value", "mask" if c.window is not None else "", *(pasts(c) if cached else [])],
        [value.name for value in outputs],
        **attributes,
    )
    graph = helper.make_graph([node], "attention", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR)
    onnx.checker.check_model(model, full_check=True)
    data: bytes = model.SerializeToString()
    return data


def session_options() -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # the machine may be shared
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    return options
