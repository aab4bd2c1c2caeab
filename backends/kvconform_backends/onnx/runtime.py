"""ONNX Runtime sessions that say where they run: CUDA is proven, never assumed."""

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
"""The model of each session on CUDA: its graph is looked at when somebody asks for it, once."""
_COPIES: WeakKeyDictionary[InferenceSession, int] = WeakKeyDictionary()
"""Its copying nodes then."""
_NAMES: WeakKeyDictionary[InferenceSession, tuple[list[str], list[str]]] = WeakKeyDictionary()


def session_options() -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what fails is raised, too
    options.intra_op_num_threads = int(os.environ.get("OMP_NUM_THREADS", "0"))  # 0: ONNX Runtime's own choice
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # the machine may be shared
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    return options


def providers(device: str, stream: int | None = None) -> list[Any]:
    """What to ask a session for; whether it gets it, ``nodes`` tells. ``stream``: the CUDA stream to work on; None: one
    of its own."""
    on_cpu: list[Any] = ["CPUExecutionProvider"]
    if device != "cuda":
        return on_cpu
    options = {"use_tf32": "0"}  # TF32 is on by default; float32 means float32
    if stream:
        options["user_compute_stream"] = str(stream)  # has_user_compute_stream follows from it
    return [(CUDA, options), *on_cpu]


def compute_stream(device: str) -> int | None:
    """The handle of torch's current CUDA stream, so that torch's events and profiler see what ONNX Runtime does; None
    where torch has no CUDA.

    Torch begins on stream 0, which ONNX Runtime takes for no stream at all and makes its own (microsoft/onnxruntime
    pull 19619): torch is given one of its pool first, which stays its current one. A session waits for the stream at
    the end of each run, so that what is copied from other streams afterwards is there.
    """
    if device != "cuda" or find_spec("torch") is None:
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    if torch.cuda.current_stream().cuda_stream == 0:
        torch.cuda.set_stream(torch.cuda.Stream())  # type: ignore[no-untyped-call]  # the pool never destroys it
    return int(torch.cuda.current_stream().cuda_stream)


def open_session(model: str | bytes, device: str) -> InferenceSession:
    """A session of a file or of a model's bytes, which never falls back to other providers than it says."""
    session = InferenceSession(model, session_options(), providers=providers(device, compute_stream(device)))
    session.disable_fallback()
    if device == "cuda":
        _SOURCES[session] = model
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
    if first != CUDA:
        raise Unavailable(f"ONNX Runtime {onnxruntime.__version__} runs on {first}, not on CUDA")


def nodes(session: InferenceSession) -> Counter[tuple[str, str]]:
    """How many nodes of each kind each provider runs."""
    parts = session.get_provider_graph_assignment_info()
    return Counter((part.ep_name, node.op_type) for part in parts for node in part.get_nodes())


def memcpy_nodes(session: InferenceSession) -> int:
    """How many nodes ONNX Runtime put into the graph of a session on CUDA that copy between host and device; 0 on the
    CPU. A second session is made, which writes the graph as it is run: the assignment of nodes to providers
    (``nodes``) is recorded before they are put in, and never has them."""
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
    """Lets a session write the graph that it runs; weights go into a file beside it, which nobody reads."""
    options.optimized_model_filepath = str(path)
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights")
    options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")


def kinds(path: Path) -> Counter[str]:
    """How many nodes of each kind the graph in a file has, its branches and loops included."""
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
    """How many of these nodes copy between host and device."""
    return sum(count for kind, count in counted.items() if kind in ("MemcpyToHost", "MemcpyFromHost"))


def precision(dtype: str, options: Mapping[str, Mapping[str, str]]) -> str:
    """The class of precision of a session with these provider options (``get_provider_options``), as torch's is named
    in ``cuda_timing.precision``: what ONNX Runtime says that it does, not what it was asked for."""
    if dtype == "float32" and CUDA in options and options[CUDA].get("use_tf32") != "0":
        return "float32 by tf32"
    return dtype


def runtime_info(sessions: Iterable[InferenceSession], dtype: str, device: str) -> dict[str, Any]:
    """What really runs in these sessions: providers, nodes, copies, class of precision, and whose stream it is."""
    every = list(sessions)
    options = [session.get_provider_options() for session in every]
    counted = sum(map(nodes, every), Counter[tuple[str, str]]())
    found: dict[str, Any] = {
        "onnxruntime": onnxruntime.__version__,
        "providers": sorted({name for session in every for name in session.get_providers()}),
        "nodes": {f"{provider}:{kind}": count for (provider, kind), count in sorted(counted.items())},
        "precision": " and ".join(sorted({precision(dtype, told) for told in options})) or dtype,
    }
    if device == "cuda":
        found["memcpy_nodes"] = sum(map(memcpy_nodes, every))
        streams = {told.get(CUDA, {}).get("user_compute_stream") for told in options}
        found["stream"] = "torch's" if streams == {str(compute_stream(device))} else f"not torch's: {streams}"
    return found


def strays(counted: Mapping[tuple[str, str], int]) -> list[str]:
    """The kinds of heavy nodes that do not run on CUDA."""
    return sorted({kind for (provider, kind) in counted if kind in HEAVY and "CUDA" not in provider})


def names(session: InferenceSession) -> tuple[list[str], list[str]]:
    """Of its inputs and of its outputs, in their order; read once."""
    if session not in _NAMES:
        _NAMES[session] = [x.name for x in session.get_inputs()], [x.name for x in session.get_outputs()]
    return _NAMES[session]


def run(session: InferenceSession, feeds: Mapping[str, OrtValue], device: str) -> list[OrtValue]:
    """The graph's outputs, in their order, on the device: their memory is nobody else's."""
    binding = session.io_binding()
    for name, value in feeds.items():
        binding.bind_ortvalue_input(name, value)
    for name in names(session)[1]:
        binding.bind_output(name, device, 0)  # bound anew: each step's outputs are their own memory
    session.run_with_iobinding(binding)
    return given(binding, device)


def given(binding: IOBinding, device: str) -> list[OrtValue]:
    """What a run left in its binding. Raises RuntimeError where it is not on the device: asked for 'cuda', ONNX Runtime
    may hand back 'cpu' without a word."""
    values: list[OrtValue] = binding.get_outputs()
    seen_on = devices(values)
    if seen_on != device:
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
