"""ONNX Runtime sessions that say where they run: CUDA is proven, never assumed."""

from __future__ import annotations

import contextlib
import io
import os
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnxruntime  # type: ignore[import-untyped]
from numpy.typing import NDArray
from onnxruntime import InferenceSession, OrtValue

from kvconform.backend import Unavailable

Array = NDArray[Any]

HEAVY = ("MatMul", "Gemm", "FusedMatMul", "Attention", "MultiHeadAttention", "GroupQueryAttention", "Softmax")


def session_options() -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what fails is raised, too
    options.intra_op_num_threads = int(os.environ.get("OMP_NUM_THREADS", "0"))  # 0: ONNX Runtime's own choice
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # the machine may be shared
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    return options


def providers(device: str) -> list[Any]:
    """What to ask a session for; whether it gets it, ``nodes`` tells."""
    on_cpu: list[Any] = ["CPUExecutionProvider"]
    # TF32 is on by default; float32 means float32
    return [("CUDAExecutionProvider", {"use_tf32": "0"}), *on_cpu] if device == "cuda" else on_cpu


def open_session(model: str | bytes, device: str) -> InferenceSession:
    """A session of a file or of a model's bytes, which never falls back to other providers than it says."""
    session = InferenceSession(model, session_options(), providers=providers(device))
    session.disable_fallback()
    return session


def reach_cuda() -> None:
    """Raises Unavailable where there is no CUDA: a session asked for it would run on the CPU without a word."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):  # it prints what it cannot load
        onnxruntime.preload_dlls()
    try:
        OrtValue.ortvalue_from_numpy(np.zeros(1, np.float32), "cuda", 0)
    except RuntimeError as error:
        reasons = [line for line in printed.getvalue().splitlines() if line.startswith("Failed")]
        why = (reasons or [str(error).strip()])[0]
        raise Unavailable(f"ONNX Runtime {onnxruntime.__version__} cannot use CUDA: {why}") from error


def check_first(session: InferenceSession) -> None:
    """Raises Unavailable unless the session has CUDA as its first provider."""
    first = session.get_providers()[0]
    if first != "CUDAExecutionProvider":
        raise Unavailable(f"ONNX Runtime {onnxruntime.__version__} runs on {first}, not on CUDA")


def nodes(session: InferenceSession) -> Counter[tuple[str, str]]:
    """How many nodes of each kind each provider runs."""
    parts = session.get_provider_graph_assignment_info()
    return Counter((part.ep_name, node.op_type) for part in parts for node in part.get_nodes())


def strays(counted: Mapping[tuple[str, str], int]) -> list[str]:
    """The kinds of heavy nodes that do not run on CUDA."""
    return sorted({kind for (provider, kind) in counted if kind in HEAVY and "CUDA" not in provider})


def run(session: InferenceSession, feeds: Mapping[str, OrtValue], device: str) -> list[OrtValue]:
    """The graph's outputs, in their order, on the device: their memory is nobody else's."""
    binding = session.io_binding()
    for name, value in feeds.items():
        binding.bind_ortvalue_input(name, value)
    for output in session.get_outputs():
        binding.bind_output(output.name, device, 0)  # bound anew: each step's outputs are their own memory
    session.run_with_iobinding(binding)
    values: list[OrtValue] = binding.get_outputs()
    seen_on = devices(values)
    if seen_on != device:  # asked for 'cuda', ONNX Runtime may hand back 'cpu' without a word
        raise RuntimeError(f"outputs are on {seen_on}, not on {device}")
    return values


def devices(values: list[OrtValue]) -> str:
    """Where these values lie: ``cpu``, ``cuda``, or both."""
    return "/".join(sorted({value.device_name() for value in values}))


def value_of(x: Array, device: str) -> OrtValue:
    """On the CPU it shares the array's memory, which must be contiguous and not change while it lives."""
    return OrtValue.ortvalue_from_numpy(np.ascontiguousarray(x), device, 0)


def widened(value: OrtValue) -> Array:
    made: Array = value.numpy().astype(np.float32)  # a copy: OrtValue.numpy() is a view
    return made
