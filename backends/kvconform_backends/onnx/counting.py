"""Counts a call's nodes, output bytes, multiply-adds and device copies from ONNX Runtime's profile.

The profile describes the optimised graph that runs, not the file. Profiling must be enabled when a session is created;
the counted call therefore runs on separate sessions of the same models.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnxruntime  # type: ignore[import-untyped]
from onnxruntime import InferenceSession

from kvconform_backends.onnx.runtime import HEAVY, providers, session_options

Counts = dict[str, Mapping[str, int]]
Node = dict[str, Any]
"""``op_name``, ``output_size`` in bytes, ``input_type_shape`` and ``output_type_shape``: each tensor's type and shape.
Inputs exclude weights."""

FREE = ("Softmax",)
"""Heavy nodes without a matrix product."""


class CountedSessions:
    """Adds the methods ``count`` and ``counted_by`` to an ONNX backend."""

    device: str
    sessions: dict[tuple[bool, bool], InferenceSession]  # keys: (cached, masked)
    artefact: Callable[[bool], Path]

    def model_of(self, cached: bool, masked: bool) -> str | bytes:
        """The model of a session: a file, or its bytes."""
        return str(self.artefact(cached))

    def count(self, call: Callable[[], None]) -> Counts:
        """Raises RuntimeError if the call runs on none of the existing sessions."""
        plain = self.sessions
        with tempfile.TemporaryDirectory(prefix="kvconform-") as folder:
            self.sessions = {
                key: profiled(self.model_of(*key), self.device, f"{folder}/{number}")
                for number, key in enumerate(plain)
            }
            try:
                call()
            finally:
                watched, self.sessions = self.sessions, plain
                files = [watched[key].end_profiling() for key in plain]
            ran = [node for file in files for node in nodes_of(Path(file))]
        if not ran:
            raise RuntimeError("no node ran in the counted sessions")
        return counts(ran)

    def counted_by(self) -> dict[str, str]:
        exporters = {name: version(name) for name in ("torch", "onnx", "onnxscript")}
        return {"onnxruntime": onnxruntime.__version__, **exporters}


def profiled(model: str | bytes, device: str, prefix: str) -> InferenceSession:
    """A session that writes its profile to a file whose name starts with ``prefix``."""
    options = session_options()
    options.enable_profiling, options.profile_file_prefix = True, prefix
    session = InferenceSession(model, options, providers=providers(device))
    session.disable_fallback()
    return session


def nodes_of(file: Path) -> list[Node]:
    """The executed nodes of a profile, in order: one event per kernel run."""
    events = json.loads(file.read_text())
    return [event["args"] for event in events if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")]


def counts(ran: Iterable[Node]) -> Counts:
    operators: Counter[str] = Counter()
    allocated: Counter[str] = Counter()
    products: dict[str, int] | None = {}
    for node in ran:
        kind = node["op_name"]
        operators[kind] += 1
        allocated[kind] += fresh(node)
        work = multiply_adds(node)
        products = None if work is None or products is None else {**products, kind: products.get(kind, 0) + work}
    made: Counts = {
        "operators": dict(operators),
        "allocated": dict(+allocated),
        "memcpy": {kind: number for kind, number in operators.items() if kind.startswith("Memcpy")},
    }
    if products is not None:
        made["multiply_adds"] = {kind: number for kind, number in products.items() if number}
    return made


def fresh(node: Node) -> int:
    """Newly allocated output bytes of a node: a present of ``GroupQueryAttention`` with the shape of its past shares
    the past's memory."""
    size = int(node["output_size"])
    if node["op_name"] != "GroupQueryAttention":
        return size
    numbers = [math.prod(shape) for shape in shapes(node["output_type_shape"])]
    outputs, inputs = node["output_type_shape"], node["input_type_shape"]
    kept = sum(count for count, shape in zip(numbers[1:], outputs[1:], strict=True) if shape in inputs)
    return size * (sum(numbers) - kept) // sum(numbers)


def multiply_adds(node: Node) -> int | None:
    """Of one run of a node; None without a formula, so that the whole call has no count."""
    kind = node["op_name"]
    if kind not in HEAVY or kind in FREE:
        return 0
    inputs, outputs = shapes(node["input_type_shape"]), shapes(node["output_type_shape"])
    if kind in ("MatMul", "FusedMatMul"):
        return math.prod(outputs[0]) * inputs[0][-1]  # (..., m, n) of (..., m, k)
    if kind == "Attention" and len(inputs[0]) == 4:
        slots = max(int(tensor[2]) for tensor in (inputs[1], *outputs[1:]))  # of the keys, or of the present
        return 2 * math.prod(inputs[0]) * slots
    return None


def shapes(tensors: list[dict[str, list[int]]]) -> list[list[int]]:
    """Shapes of tensors in a profile: ``[{"float": [1, 8, 1, 32]}]``."""
    return [shape for tensor in tensors for shape in tensor.values()]
