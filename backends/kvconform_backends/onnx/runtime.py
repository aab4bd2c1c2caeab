"""ONNX Runtime sessions and where they run: the use of CUDA is verified."""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import onnxruntime  # type: ignore[import-untyped]
from numpy.typing import NDArray
from onnxruntime import InferenceSession, IOBinding, OrtValue

from kvconform.errors import Unavailable

Array = NDArray[Any]

CUDA = "CUDAExecutionProvider"
HEAVY = ("MatMul", "Gemm", "FusedMatMul", "Attention", "MultiHeadAttention", "GroupQueryAttention", "Softmax")

_SOURCES: WeakKeyDictionary[InferenceSession, str | bytes] = WeakKeyDictionary()
"""The model of each session on CUDA, for inspecting its graph on demand."""
_COPIES: WeakKeyDictionary[InferenceSession, int] = WeakKeyDictionary()
"""The number of its copying nodes, computed once."""
_NAMES: WeakKeyDictionary[InferenceSession, tuple[list[str], list[str]]] = WeakKeyDictionary()


def session_options() -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # failures are raised as exceptions too
    options.intra_op_num_threads = int(os.environ.get("OMP_NUM_THREADS", "0"))  # 0: ONNX Runtime's choice
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # the machine may be shared
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    return options


def providers(device: str, stream: int | None = None) -> list[Any]:
    """The providers to request; ``nodes`` tells which are used. ``stream``: the CUDA stream to use; None: a new one."""
    on_cpu: list[Any] = ["CPUExecutionProvider"]
    if device != "cuda":
        return on_cpu
    options = {"use_tf32": "0"}  # TF32 is on by default
    if stream:
        options["user_compute_stream"] = str(stream)  # implies has_user_compute_stream
    return [(CUDA, options), *on_cpu]


def compute_stream(device: str) -> int | None:
    """The handle of torch's current CUDA stream, so that torch's events and profiler cover ONNX Runtime's work; None if
    torch has no CUDA.

    Torch starts on stream 0, which ONNX Runtime treats as no stream and replaces by its own (microsoft/onnxruntime pull
    19619): torch is switched to a pool stream first. A session waits for the stream at the end of each run, so that
    copies on other streams afterwards are safe.
    """
    if device != "cuda" or find_spec("torch") is None:
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    if torch.cuda.current_stream().cuda_stream == 0:
        torch.cuda.set_stream(torch.cuda.Stream())  # type: ignore[no-untyped-call]  # pool streams are never destroyed
    return int(torch.cuda.current_stream().cuda_stream)


def open_session(model: str | bytes, device: str) -> InferenceSession:
    """A session of a file or of a model's bytes, without provider fallback."""
    session = InferenceSession(model, session_options(), providers=providers(device, compute_stream(device)))
    session.disable_fallback()
    if device == "cuda":
        _SOURCES[session] = model
    return session


def reach_cuda() -> None:
    """Raises Unavailable without CUDA: a session would otherwise silently run on the CPU."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):  # it prints what it fails to load
        onnxruntime.preload_dlls()
    try:
        OrtValue.ortvalue_from_numpy(np.zeros(1, np.float32), "cuda", 0)
    except RuntimeError as error:
        reasons = [line for line in printed.getvalue().splitlines() if line.startswith("Failed")]
        why = (reasons or [str(error).strip()])[0]
        raise Unavailable(f"ONNX Runtime {onnxruntime.__version__} cannot use CUDA: {why}") from error


def check_first(session: InferenceSession) -> None:
    """Raises Unavailable unless CUDA is the session's first provider."""
    first = session.get_providers()[0]
    if first != CUDA:
        raise Unavailable(f"ONNX Runtime {onnxruntime.__version__} runs on {first}, not on CUDA")


def nodes(session: InferenceSession) -> Counter[tuple[str, str]]:
    """The number of nodes of each kind per provider."""
    parts = session.get_provider_graph_assignment_info()
    return Counter((part.ep_name, node.op_type) for part in parts for node in part.get_nodes())


def memcpy_nodes(session: InferenceSession) -> int:
    """The number of host-device copy nodes that ONNX Runtime inserted into a session's graph on CUDA; 0 on the CPU. A
    second session writes the final graph: the node assignment (``nodes``) is recorded before the insertion."""
    if session in _COPIES or session not in _SOURCES:
        return _COPIES.get(session, 0)
    options = session_options()
    with tempfile.TemporaryDirectory(prefix="kvconform-") as folder:
        path = Path(folder) / "graph.onnx"
        write_graph(options, path)
        InferenceSession(_SOURCES[session], options, providers=providers("cuda", compute_stream("cuda")))
        _COPIES[session] = copies(kinds(path))
    return _COPIES[session]


def write_graph(options: onnxruntime.SessionOptions, path: Path) -> None:
    """Makes a session write its final graph; weights go into a separate, unused file."""
    options.optimized_model_filepath = str(path)
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights")
    options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")


def kinds(path: Path) -> Counter[str]:
    """The number of nodes of each kind in a file's graph, including subgraphs."""
    import onnx

    counted: Counter[str] = Counter()
    graphs = [onnx.load(path, load_external_data=False).graph]
    while graphs:
        for node in graphs.pop().node:
            counted[node.op_type] += 1
            for attribute in node.attribute:
                graphs += [attribute.g] if attribute.HasField("g") else attribute.graphs
    return counted


def copies(counted: Mapping[str, int]) -> int:
    """The number of nodes that copy between host and device."""
    return sum(count for kind, count in counted.items() if kind in ("MemcpyToHost", "MemcpyFromHost"))


def precision(dtype: str, options: Mapping[str, Mapping[str, str]]) -> str:
    """The precision class of a session with these provider options (``get_provider_options``), named as in
    ``device_time.precision``: what ONNX Runtime reports, not what was requested."""
    if dtype == "float32" and CUDA in options and options[CUDA].get("use_tf32") != "0":
        return "float32 by tf32"
    return dtype


def runtime_info(sessions: Iterable[InferenceSession], dtype: str, device: str) -> dict[str, Any]:
    """What runs in these sessions: providers, nodes, copies, precision class, and the CUDA stream."""
    every = list(sessions)
    options = [session.get_provider_options() for session in every]
    counted = sum(map(nodes, every), Counter[tuple[str, str]]())
    found: dict[str, Any] = {
        "onnxruntime": onnxruntime.__version__,
        "providers": sorted({name for session in every for name in session.get_providers()}),
        "nodes": {f"{provider}:{kind}": count for (provider, kind), count in sorted(counted.items())},
        "precision": " and ".join(sorted({precision(dtype, option) for option in options})) or dtype,
    }
    if device == "cuda":
        found["memcpy_nodes"] = sum(map(memcpy_nodes, every))
        streams = {option.get(CUDA, {}).get("user_compute_stream") for option in options}
        found["stream"] = "torch's" if streams == {str(compute_stream(device))} else f"not torch's: {streams}"
    return found


def off_cuda(counted: Mapping[tuple[str, str], int]) -> list[str]:
    """The kinds of heavy nodes that do not run on CUDA."""
    return sorted({kind for (provider, kind) in counted if kind in HEAVY and "CUDA" not in provider})


def names(session: InferenceSession) -> tuple[list[str], list[str]]:
    """The names of its inputs and outputs, in order; cached."""
    if session not in _NAMES:
        _NAMES[session] = [x.name for x in session.get_inputs()], [x.name for x in session.get_outputs()]
    return _NAMES[session]


def run(session: InferenceSession, feeds: Mapping[str, OrtValue], device: str) -> list[OrtValue]:
    """The graph's outputs in order, on the device, in memory of their own."""
    binding = session.io_binding()
    for name, value in feeds.items():
        binding.bind_ortvalue_input(name, value)
    for name in names(session)[1]:
        binding.bind_output(name, device, 0)  # bind again: each step's outputs get new memory
    session.run_with_iobinding(binding)
    return given(binding, device)


def given(binding: IOBinding, device: str) -> list[OrtValue]:
    """The outputs in a binding. Raises RuntimeError if they are not on the device: ONNX Runtime may silently return
    'cpu' instead of 'cuda'."""
    values: list[OrtValue] = binding.get_outputs()
    seen_on = devices(values)
    if seen_on != device:
        raise RuntimeError(f"outputs are on {seen_on}, not on {device}")
    return values


def devices(values: list[OrtValue]) -> str:
    """The devices of these values: ``cpu``, ``cuda``, or both."""
    return "/".join(sorted({value.device_name() for value in values}))


def value_of(x: Array, device: str) -> OrtValue:
    """On the CPU it shares the array's memory, which must be contiguous and stay unchanged."""
    return OrtValue.ortvalue_from_numpy(np.ascontiguousarray(x), device, 0)


def widened(value: OrtValue) -> Array:
    made: Array = value.numpy().astype(np.float32)  # a copy: OrtValue.numpy() is a view
    return made
