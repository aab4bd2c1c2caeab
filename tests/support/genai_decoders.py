"""Decoders in the shape of the files of ONNX Runtime GenAI's builder (0.18).

``GroupQueryAttention`` has packed projections and rotary tables, and takes cached lengths from the attention mask; the
head dim is told by ``genai_config.json`` only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

HEADS, GROUPS, HEAD_DIM, WIDTH, VOCABULARY, LAYERS, POSITIONS = 4, 2, 16, 24, 30, 2, 64


def genai_folder(folder: Path, window: int = 0, fewer: int = 0) -> Path:
    """Writes ``model.onnx`` and ``genai_config.json``. window: of layer 0, whose cache is then a ring. fewer: how many
    tokens too few the operator is told."""
    folder.mkdir(exist_ok=True)
    nodes: list[NodeProto] = []
    rng = np.random.default_rng(0)
    weights: dict[str, Any] = {
        "embed": rng.normal(size=(VOCABULARY, WIDTH)) * 0.5,
        "head": rng.normal(size=(WIDTH, VOCABULARY)) * 0.3,
    }
    angles = np.arange(POSITIONS)[:, None] * 10000.0 ** (-np.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))
    weights |= {"cos_cache": np.cos(angles), "sin_cache": np.sin(angles)}

    def op(kind: str, *inputs: str, to: str = "", domain: str = "", outputs: tuple[str, ...] = (), **given: Any) -> str:
        names = outputs or (to or f"{kind}_{len(nodes)}",)
        nodes.append(helper.make_node(kind, list(inputs), list(names), domain=domain, **given))
        return names[0]

    whole = {"one": np.array([1 + fewer]), "axis": np.array([1]), "second": np.array(1), "least": np.array([0])}
    counted = op("ReduceSum", "attention_mask", "axis", keepdims=0)
    lengths = op("Max", op("Sub", counted, "one"), "least")
    nodes.append(helper.make_node("Cast", [lengths], ["lengths"], to=TensorProto.INT32))
    total = op("Gather", op("Shape", "attention_mask"), "second", axis=0)
    nodes.append(helper.make_node("Cast", [total], ["total"], to=TensorProto.INT32))
    x = op("Gather", "embed", "input_ids")
    inputs = [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch_size", "sequence_length"])]
    inputs.append(
        helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch_size", "total_sequence_length"])
    )
    presents = []
    for n in range(LAYERS):
        ring = bool(window) and n == 0
        weights[f"qkv{n}"] = rng.normal(size=(WIDTH, (HEADS + 2 * GROUPS) * HEAD_DIM)) * 0.3
        weights[f"out{n}"] = rng.normal(size=(HEADS * HEAD_DIM, WIDTH)) * 0.3
        pasts = [f"past_key_values.{n}.key", f"past_key_values.{n}.value"]
        attended = op(
            "GroupQueryAttention",
            *(op("MatMul", x, f"qkv{n}"), "", "", *pasts, "lengths", "total", "cos_cache", "sin_cache"),
            outputs=(f"attended{n}", f"present.{n}.key", f"present.{n}.value"),
            domain="com.microsoft",
            num_heads=HEADS,
            kv_num_heads=GROUPS,
            scale=HEAD_DIM**-0.5,
            local_window_size=window if ring else -1,
            do_rotary=1,
            **({"sliding_window_cache": 1} if ring else {}),
        )
        x = op("Add", x, op("MatMul", attended, f"out{n}"))
        kind = "sliding" if ring else "sequence"
        for names, start, found in ((pasts, "past", inputs), (nodes[-3].output[1:], "total", presents)):
            axes = ["batch_size", GROUPS, f"{start}_{kind}_length", "kv_cache_dim"]
            found += [helper.make_tensor_value_info(name, TensorProto.FLOAT, axes) for name in names]
    op("MatMul", x, "head", to="logits")
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch_size", "sequence_length", VOCABULARY])
    constants = [numpy_helper.from_array(np.asarray(y, np.float32), name) for name, y in weights.items()]
    constants += [numpy_helper.from_array(np.asarray(y, np.int64), name) for name, y in whole.items()]
    graph = helper.make_graph(nodes, "decoder", inputs, [logits, *presents], constants)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), folder / "model.onnx")
    config = {"filename": "model.onnx", "head_size": HEAD_DIM, "num_attention_heads": HEADS}
    (folder / "genai_config.json").write_text(json.dumps({"model": {"decoder": config, "type": "llama"}}))
    return folder
