"""The ONNX graphs of backend ``onnx``: the exported decoder, and the ``Attention`` node.

Inputs and outputs have the same order in both: ``past_key_values.N.key``, ``.value`` in, ``present.N.key``, ``.value``
out. Opset 23 is the first with ``Attention`` and ``RMSNormalization``, which the exporter uses instead of many small
nodes. IR 10 is supported by every ONNX Runtime that supports opset 23.
"""

from __future__ import annotations

import itertools
import logging
import warnings
from collections.abc import Callable, Mapping
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

from kvconform_backends.onnx.runtime import session_options
from kvconform_backends.torch.decoder import DTYPES, Decoder, attention, masks, mixing, positive_scale
from kvconform_specs.config import Config

OPSET, IR = 23, 10
PROBES = ((1, 1, 0, True), (2, 1, 7, True), (2, 3, 4, True), (2, 3, 4, False))
"""(batch, new, past, all logits or the last) of the check after export; torch.export tends to specialise sizes 0
and 1."""
SLACK = 256
"""Allowed deviation of a probe, in eps of the largest logit. A specialised axis fails or is off by the size of the
logits."""

Array = NDArray[Any]
Pairs = list[tuple[Tensor, Tensor]]


class Exportable(nn.Module):
    """The decoder with its past as plain inputs: token ids ``(b, t)``, per layer key and value ``(b, g, p, d)``.

    logit_positions: which of the ``t`` new tokens give logits, ``(k,)``. One graph serves all positions or only the
    last.
    """

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(
        self, input_ids: Tensor, logit_positions: Tensor, past: Pairs | None = None
    ) -> tuple[Tensor, Pairs] | Tensor:
        decoder, config, t = self.decoder, self.decoder.config, input_ids.shape[1]
        p = 0 if past is None else past[0][0].shape[2]
        positions = torch.arange(t, device=input_ids.device) + p
        seen = masks(config, positions, torch.arange(p + t, device=input_ids.device))
        present: Pairs = []

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            if past is not None:
                key, value = torch.cat((past[layer][0], key), dim=2), torch.cat((past[layer][1], value), dim=2)
                present.append((key, value))
            return attention(config, query, key, value, seen[layer])

        x = embedded(decoder, input_ids, positions)
        mix = mixing(config, rotation(decoder, positions.expand(input_ids.shape)), attend)
        for block in decoder.blocks:
            x = block(x, mix)
        logits = projected(decoder, x, logit_positions)
        return logits if past is None else (logits, present)


def embedded(decoder: Decoder, input_ids: Tensor, positions: Tensor) -> Tensor:
    """The first layer's input ``(b, t, width)`` for token ids ``(b, t)``."""
    x = functional.embedding(input_ids, decoder.embed)
    return x + decoder.position[positions] if decoder.config.positions == "learned" else x


def projected(decoder: Decoder, x: Tensor, logit_positions: Tensor) -> Tensor:
    """The logits ``(b, k, V)`` at some positions of the last layer's output ``(b, t, width)``."""
    x = x.index_select(1, logit_positions)
    return functional.rms_norm(x, x.shape[-1:], decoder.norm_final, 1e-6) @ decoder.lm_head


def rotation(decoder: Decoder, positions: Tensor) -> Callable[[Tensor], Tensor]:
    """``Decoder.rotation`` for positions ``(b, t)`` as one node of opset 23, for heads ``(b, heads, t, d)`` or rows
    ``(b, t, heads * d)``."""
    config = decoder.config
    if config.positions != "rope":
        return lambda x: x
    half = config.head_dim // 2
    cos, sin = decoder.cos[:, :half], decoder.sin[:, half:]  # (capacity, d / 2)

    def rotate(x: Tensor) -> Tensor:
        heads = 0 if x.ndim == 4 else x.shape[-1] // config.head_dim
        # float32 for every dtype: a rotated head is rounded once, when it is stored
        return torch.onnx.ops.rotary_embedding(x.float(), cos, sin, positions, num_heads=heads).to(x.dtype)

    return rotate


def pasts(config: Config) -> list[str]:
    return [f"past_key_values.{layer}.{part}" for layer in range(config.layers) for part in ("key", "value")]


def presents(config: Config) -> list[str]:
    return [name.replace("past_key_values", "present") for name in pasts(config)]


def decoder_model(config: Config, weights: Mapping[str, NDArray[np.float32]], cached: bool) -> bytes:
    """The exported decoder, checked against torch; without ``cached`` it has neither past nor present."""
    module = Exportable(Decoder(config, weights)).eval()
    # sizes are distinct and at least 2: torch.export treats 1 as a constant, and equal sizes as one axis
    given = example(config, 2, 3, 5, [0, 2, 1, 1], cached)
    b, t, p = Dim("batch"), Dim("new"), Dim("past")
    shapes = {
        "input_ids": {0: b, 1: t},
        "logit_positions": {0: Dim("asked")},
        "past": [({0: b, 2: p}, {0: b, 2: p})] * config.layers,
    }
    model = exported(
        module,
        given,
        {name: shapes[name] for name in given},
        ["input_ids", "logit_positions", *(pasts(config) if cached else [])],
        ["logits", *(presents(config) if cached else [])],
    )
    check_symbolic(
        model, {"input_ids": {0: "batch", 1: "new"}, "logit_positions": {0: "asked"}}, {0: "batch", 2: "past"}
    )
    data: bytes = model.SerializeToString()
    _check_values(data, module, config, cached)
    return data


def exported(
    module: nn.Module, given: dict[str, Any], shapes: dict[str, Any], inputs: list[str], outputs: list[str]
) -> onnx.ModelProto:
    """The module's graph. ``given``: its arguments; ``shapes``: their dynamic axes."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)  # one warning per missing torchvision operator
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # torch.export uses its own deprecated classes
            program = torch.onnx.export(
                module,
                kwargs=given,
                dynamo=True,
                dynamic_shapes=shapes,
                opset_version=OPSET,
                input_names=inputs,
                output_names=outputs,
                verbose=False,
            )
    finally:
        log.setLevel(level)
    assert program is not None  # dynamo=True returns the program
    model: onnx.ModelProto = program.model_proto
    model.ir_version = IR
    return model


def example(config: Config, b: int, t: int, p: int, asked: list[int], cached: bool) -> dict[str, Any]:
    """The module's arguments for ``t`` tokens after ``p`` others with random keys and values."""
    made = torch.Generator().manual_seed(b * 100 + t * 10 + p)
    ids = torch.randint(config.vocabulary, (b, t), generator=made)
    fresh = {"input_ids": ids, "logit_positions": torch.tensor(asked)}
    if not cached:
        return fresh
    shape = (b, config.kv_heads, p, config.head_dim)
    halves = [torch.randn(shape, generator=made).to(DTYPES[config.dtype]) for _ in range(2 * config.layers)]
    return {**fresh, "past": list(zip(halves[::2], halves[1::2], strict=True))}


def check_symbolic(model: onnx.ModelProto, known: Mapping[str, Mapping[int, str]], cache: Mapping[int, str]) -> None:
    """Raises RuntimeError if the export turned a dynamic axis into a constant. ``known``: the dynamic axes of inputs by
    name; ``cache``: those of all other inputs."""
    for value in model.graph.input:
        axes = [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        wanted = known.get(value.name, cache)
        if any(axes[axis] != name for axis, name in wanted.items()):
            raise RuntimeError(f"torch.onnx.export specialised {value.name}: axes {axes}, expected {wanted}")


def _check_values(model: bytes, module: Exportable, config: Config, cached: bool) -> None:
    """Raises RuntimeError if the graph and the exported module disagree on a probe."""
    session = onnxruntime.InferenceSession(model, session_options(), providers=["CPUExecutionProvider"])
    for b, t, p, every in PROBES:
        t = min(t, config.capacity)
        p = min(p, config.capacity - t)
        feeds = example(config, b, t, p, list(range(t)) if every else [t - 1], cached)
        with torch.no_grad():
            result = module(**feeds)
        wanted = [result] if not cached else [result[0], *itertools.chain(*result[1])]
        flat = [feeds["input_ids"], feeds["logit_positions"], *itertools.chain(*feeds.get("past", []))]
        names = [value.name for value in session.get_inputs()]
        got = session.run(None, {name: x.numpy() for name, x in zip(names, flat, strict=True)})
        for output, have, want in zip(session.get_outputs(), got, wanted, strict=True):
            if not close(have, want):
                raise RuntimeError(f"the exported graph's {output.name} differs from torch for (b, t, p) = {(b, t, p)}")


def close(have: Array, want: Tensor) -> bool:
    """Whether they differ by no more than a different summation order may cause."""
    slack = SLACK * torch.finfo(want.dtype).eps * float(want.abs().max())
    exact = want.float().numpy()
    return have.shape == exact.shape and bool((np.abs(have.astype(np.float32) - exact) <= slack).all())


def needs_mask(config: Config) -> bool:
    """Whether the graph always takes a mask, as an ``Attention`` node with more than causality does."""
    return config.profile == "attention" and (config.window is not None or has_bias(config))


def has_bias(config: Config) -> bool:
    """Whether the mask is a float that also changes visible scores."""
    return config.positions == "alibi" or config.sink is not None


def attention_mask(config: Config, past: int, t: int, allowed: Array | None) -> Array:
    """What the ``t`` newest of ``s = past + t`` tokens see: bool ``(b, 1, t, s)``, where ``b`` may be 1.

    allowed: bool ``(b, s)``, the caller's mask. If the config has a bias, the mask is float32 ``(b, h, t, s)``, -inf
    for hidden tokens; a sink adds a column. The query axis is always explicit: ONNX Runtime does not broadcast it.
    """
    seen = None if allowed is None else torch.tensor(allowed)
    mask = masks(config, torch.arange(past, past + t), torch.arange(past + t), seen)[0]
    mask = mask.reshape(-1, mask.shape[-3] if mask.ndim == 4 else 1, t, past + t)
    if config.sink is not None:
        bias = torch.where(mask, 0.0, -torch.inf) if mask.dtype == torch.bool else mask
        bias = bias.expand(-1, config.heads, -1, -1)
        sinks = torch.arange(1, config.heads + 1) * (config.sink / config.heads)  # (h,)
        mask = torch.cat((bias, sinks[:, None, None].expand(*bias.shape[:-1], 1)), dim=-1)
    made: Array = mask.numpy()
    return made


def attention_model(config: Config, cached: bool, masked: bool) -> bytes:
    """One ``Attention`` node with past and present.

    masked: the mask is an input (see ``attention_mask``); else ``is_causal``, counted from the end of the past. The
    operator has no sink: a zero key and value are appended. The key's score is its bias alone and the value adds
    nothing, so that only its share of the softmax's denominator remains. ONNX Runtime wants a positive scale: the sign
    of another one is a factor of the query.
    """
    c, kind = config, TensorProto.FLOAT16 if config.dtype == "float16" else TensorProto.FLOAT
    total = "total" if cached else "new"

    def heads(name: str, count: int, length: str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, ["batch", count, length, c.head_dim])

    inputs = [heads("query", c.heads, "new"), heads("key", c.kv_heads, "new"), heads("value", c.kv_heads, "new")]
    outputs = [heads("output", c.heads, "new")]
    if masked:
        axes = ["mask_batch", "mask_heads", "new", total if c.sink is None else "total_and_sink"]
        inputs.append(helper.make_tensor_value_info("mask", kind if has_bias(c) else TensorProto.BOOL, axes))
    if cached:
        inputs += [heads(name, c.kv_heads, "past") for name in pasts(c)]
        outputs += [heads(name, c.kv_heads, "total") for name in presents(c)]
    names = ["query", "key", "value", "mask" if masked else "", *(pasts(c) if cached else [])]
    made = [value.name for value in outputs]
    nodes, constants = [], []
    if c.sink is not None:  # the past is concatenated outside the node, since the zeros must come last
        names, made = ["query", "key_and_sink", "value_and_sink", "mask"], ["output"]
        for part, past, present in zip(("key", "value"), pasts(c), presents(c), strict=True):
            if cached:
                nodes.append(helper.make_node("Concat", [past, part], [present], axis=2))
            grown = present if cached else part
            nodes.append(helper.make_node("Pad", [grown, "one_behind", "", "axis"], [f"{part}_and_sink"]))
        constants = [numpy_helper.from_array(np.array(x), name) for name, x in (("one_behind", [0, 1]), ("axis", [2]))]
    sign, scale = positive_scale(c)
    if sign != 1:
        constants.append(numpy_helper.from_array(np.array(sign, helper.tensor_dtype_to_np_dtype(kind)), "sign"))
        nodes.append(helper.make_node("Mul", ["query", "sign"], ["signed_query"]))
        names[0] = "signed_query"
    attributes: dict[str, Any] = {"scale": scale, "is_causal": int(not masked), "softcap": c.softcap or 0.0}
    nodes.append(helper.make_node("Attention", names, made, **attributes))
    graph = helper.make_graph(nodes, "attention", inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR)
    onnx.checker.check_model(model, full_check=True)
    data: bytes = model.SerializeToString()
    return data
