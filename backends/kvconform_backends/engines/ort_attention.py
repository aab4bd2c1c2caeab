"""``ort-attention``: the operator ``Attention`` of ONNX on ONNX Runtime's CPU provider."""

from __future__ import annotations

from typing import Any

from onnx import ModelProto
from onnxruntime import InferenceSession, SessionOptions, set_default_logger_severity  # type: ignore[import-untyped]

from kvconform_backends.engines.onnx_attention import OnnxReference


def session(graph: ModelProto) -> Any:
    set_default_logger_severity(4)  # failures are raised as exceptions too
    options = SessionOptions()
    options.intra_op_num_threads = 1
    return InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])


class OrtAttention(OnnxReference):
    def opened(self, graph: ModelProto) -> Any:
        return session(graph)
