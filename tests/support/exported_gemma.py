"""A tiny Gemma 2 as an ONNX decoder, with the weights of a model of transformers; right, or with what exports lose.

The names of inputs and outputs are those of Optimum, or of the exporter in transformers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

WINDOW, HEADS, GROUPS, HEAD_DIM, WIDTH, VOCABULARY, LAYERS = 5, 4, 2, 12, 24, 40, 2
LOSSES = {
    "window": "without its window",
    "scale": "with scores scaled by the root of 16, the head dim being 12",
    "heads": "with its query heads dealt to the key heads in turn",
    "soft cap": "without its soft cap of scores",
    "logit soft cap": "without its soft cap of logits",
}
"""What an export has lost or changed, and how it is named; ``float16 cache`` is one more, which its file tells."""
OPTIMUM = ("past_key_values.{n}.{part}", "present.{n}.{part}", ("key", "value"))
TRANSFORMERS = (
    "input.past_key_values.layers.{n}.{part}",
    "output.past_key_values.layers.{n}.{part}",
    ("keys", "values"),
)
Array = NDArray[Any]


def saved_model(folder: Path, seed: int = 0) -> Any:
    """A model of transformers, saved in a folder; it has a window, soft caps and grouped heads."""
    import torch
    import transformers

    config = transformers.Gemma2Config(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        head_dim=HEAD_DIM,
        query_pre_attn_scalar=HEAD_DIM,
        sliding_window=WINDOW,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=5.0,
        max_position_embeddings=64,
    )
    torch.manual_seed(seed)
    model = transformers.Gemma2ForCausalLM(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0.0, 0.3)
    model.save_pretrained(folder)
    return model


@dataclass
class Gemma:
    """The graph. loss: what it has lost (``LOSSES``), ``positions`` that are shifted by one after the first step, or
    nothing."""

    model: Any
    loss: str = ""
    names: tuple[str, str, tuple[str, str]] = OPTIMUM
    nodes: list[NodeProto] = field(default_factory=list)
    constants: dict[str, Array] = field(default_factory=dict)

    def op(self, kind: str, *inputs: str, to: str = "", **attributes: Any) -> str:
        name = to or f"{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def cast(self, x: str, dtype: int) -> str:
        name = f"Cast_{len(self.nodes)}"
        self.nodes.append(helper.make_node("Cast", [x], [name], to=dtype))
        return name

    def constant(self, x: Any, dtype: Any = np.float32) -> str:
        name = f"constant_{len(self.constants)}"
        self.constants[name] = np.asarray(x, dtype)
        return name

    def weight(self, module: Any) -> Array:
        return np.asarray(module.weight.detach().numpy())

    def linear(self, x: str, module: Any) -> str:
        return self.op("MatMul", x, self.constant(self.weight(module).T))

    def normed(self, x: str, module: Any) -> str:
        mean = self.op("ReduceMean", self.op("Mul", x, x), self.constant([-1], np.int64), keepdims=1)
        root = self.op("Sqrt", self.op("Add", mean, self.constant(module.eps)))
        return self.op("Mul", self.op("Div", x, root), self.constant(1 + self.weight(module)))

    def capped(self, x: str, cap: float) -> str:
        size = self.constant(cap)
        return self.op("Mul", self.op("Tanh", self.op("Div", x, size)), size)

    def size(self, x: str, axis: int) -> str:
        return self.op("Squeeze", self.op("Shape", x, start=axis, end=axis + 1))

    def build(self) -> ModelProto:
        body, zero, one = self.model.model, self.constant(0, np.int64), self.constant(1, np.int64)
        past, t = self.size(self.name(0, 0, 0), 2), self.size("input_ids", 1)
        end = self.op("Add", past, t)
        at = self.op("Range", past, end, one)  # (t)
        positions = at
        if self.loss == "positions":
            positions = self.op("Add", at, self.op("Min", past, one))
        angles = self.op(
            "MatMul",
            self.op("Unsqueeze", self.cast(positions, TensorProto.FLOAT), self.constant([1], np.int64)),
            self.constant(body.rotary_emb.inv_freq.numpy()[None]),
        )
        self.turns = [self.op(kind, self.op("Concat", angles, angles, axis=-1)) for kind in ("Cos", "Sin")]  # (t, d)
        rows = self.op("Unsqueeze", at, self.constant([1], np.int64))
        ages = self.op("Sub", rows, self.op("Range", zero, end, one))  # (t, s)
        causal = self.op("GreaterOrEqual", ages, zero)
        near = self.op("And", causal, self.op("Less", ages, self.constant(WINDOW, np.int64)))
        x = self.op("Gather", self.constant(self.weight(body.embed_tokens)), "input_ids")
        x = self.op("Mul", x, self.constant(WIDTH**0.5))
        for n, layer in enumerate(body.layers):
            windowed = layer.self_attn.sliding_window is not None and self.loss != "window"
            mixed = self.attended(
                n, self.normed(x, layer.input_layernorm), layer.self_attn, near if windowed else causal
            )
            x = self.op("Add", x, self.normed(mixed, layer.post_attention_layernorm))
            y = self.normed(x, layer.pre_feedforward_layernorm)
            gate = self.op("Gelu", self.linear(y, layer.mlp.gate_proj), approximate="tanh")
            y = self.linear(self.op("Mul", gate, self.linear(y, layer.mlp.up_proj)), layer.mlp.down_proj)
            x = self.op("Add", x, self.normed(y, layer.post_feedforward_layernorm))
        logits = self.linear(self.normed(x, body.norm), self.model.lm_head)
        self.op("Identity", logits if self.loss == "logit soft cap" else self.capped(logits, 5.0), to="logits")
        return self.finished()

    def attended(self, n: int, x: str, layer: Any, seen: str) -> str:
        query = self.rotated(self.heads(self.linear(x, layer.q_proj), HEADS))
        new = [self.rotated(self.heads(self.linear(x, layer.k_proj), GROUPS))]
        new.append(self.heads(self.linear(x, layer.v_proj), GROUPS))
        grown = []
        for index, part in enumerate(new):
            if self.loss == "float16 cache":
                part = self.cast(part, TensorProto.FLOAT16)
            held = self.op("Concat", self.name(0, n, index), part, axis=2, to=self.name(1, n, index))
            grown.append(self.cast(held, TensorProto.FLOAT) if self.loss == "float16 cache" else held)
        places = np.arange(HEADS) % GROUPS if self.loss == "heads" else np.arange(HEADS) // (HEADS // GROUPS)
        keys, values = (self.op("Gather", part, self.constant(places, np.int64), axis=1) for part in grown)
        size = 16 if self.loss == "scale" else HEAD_DIM
        scores = self.op("MatMul", query, self.op("Transpose", keys, perm=[0, 1, 3, 2]))
        scores = self.op("Mul", scores, self.constant(size**-0.5))
        if self.loss != "soft cap":
            scores = self.capped(scores, 2.0)
        masked = self.op("Where", seen, scores, self.constant(-np.inf))
        mixed = self.op("Transpose", self.op("MatMul", self.op("Softmax", masked, axis=-1), values), perm=[0, 2, 1, 3])
        flat = self.op("Reshape", mixed, self.constant([0, 0, HEADS * HEAD_DIM], np.int64))
        return self.linear(flat, layer.o_proj)

    def heads(self, x: str, heads: int) -> str:
        split = self.op("Reshape", x, self.constant([0, 0, heads, HEAD_DIM], np.int64))
        return self.op("Transpose", split, perm=[0, 2, 1, 3])

    def rotated(self, x: str) -> str:
        halves = [f"{x}_first", f"{x}_second"]
        self.nodes.append(helper.make_node("Split", [x], halves, axis=-1, num_outputs=2))
        turned = self.op("Concat", self.op("Neg", halves[1]), halves[0], axis=-1)
        cosine, sine = self.turns
        return self.op("Add", self.op("Mul", x, cosine), self.op("Mul", turned, sine))

    def name(self, end: int, n: int, part: int) -> str:
        return self.names[end].format(n=n, part=self.names[2][part])  # type: ignore[union-attr]

    def cache(self, end: int) -> list[onnx.ValueInfoProto]:
        dtype = TensorProto.FLOAT16 if self.loss == "float16 cache" else TensorProto.FLOAT
        axes: list[Any] = ["batch", GROUPS, ("past", "past + new")[end], HEAD_DIM]
        if self.names is TRANSFORMERS:
            axes = ["s0", str(GROUPS), ("s1", "s1 + s2")[end], str(HEAD_DIM)]
        return [
            helper.make_tensor_value_info(self.name(end, n, part), dtype, axes)
            for n in range(LAYERS)
            for part in (0, 1)
        ]

    def finished(self) -> ModelProto:
        ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "new"])
        logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "new", VOCABULARY])
        weights = [numpy_helper.from_array(x, name) for name, x in self.constants.items()]
        graph = helper.make_graph(self.nodes, "gemma", [ids, *self.cache(0)], [logits, *self.cache(1)], weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        onnx.checker.check_model(model)
        return model
