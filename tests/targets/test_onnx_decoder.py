"""The backend of targets ``onnx:``: its runtime_info, perturbed weights, and scripts."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime", reason="targets of ONNX run on it")

import onnx
from decoder_graphs import CONVENTIONS, LAYERS, WIDTH, Style, decoder, merged, saved
from onnx import helper, numpy_helper

from kvconform.errors import Unavailable
from kvconform.worker.execute import execute, feeds_of
from kvconform.worker.registry import load
from kvconform_backends.onnx import runtime as onnx_runtime
from kvconform_backends.targets.onnx import weights
from kvconform_specs.program import AliasHandle, Append, Close, Program, Reset, UncachedForward


def opened(style: Style, folder: Path, **options: Any) -> Any:
    return load(f"onnx:{saved(decoder(style), folder)}?{json.dumps(options)}")


def built(target: Any) -> Any:
    (config,) = target.configs.values()
    return target(config, {}, "cpu")


# --- CUDA ---
def test_missing_cuda_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object) -> None:
        raise RuntimeError("no CUDA-capable device is detected")

    monkeypatch.setattr("onnxruntime.OrtValue.ortvalue_from_numpy", unreachable)
    with pytest.raises(Unavailable, match=r"cannot use CUDA: "):
        onnx_runtime.reach_cuda()


def test_heavy_nodes_off_cuda_are_a_fallback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = opened(Style(), tmp_path)
    backend = built(target)
    assert "fallback" not in backend.runtime_info()
    seen = Counter({("CUDAExecutionProvider", "MatMul"): 3, ("CPUExecutionProvider", "Softmax"): 2})
    runner = target.graphs.runner(target.cached, "cpu")
    monkeypatch.setattr(runner, "nodes", seen)
    monkeypatch.setattr(backend, "device", "cuda")
    monkeypatch.setattr(onnx_runtime, "memcpy_nodes", lambda session: 2)
    target.graphs.runners = {(target.cached.path, "cuda"): runner}
    assert backend.runtime_info()["memcpy_nodes"] == 2
    assert backend.runtime_info()["fallback"] == "CUDA was requested, but ONNX Runtime ran Softmax on the CPU"


def test_the_runtime_info_describes_what_ran(tmp_path: Path) -> None:
    backend = built(opened(Style(), tmp_path))
    backend.uncached_forward(np.ones((1, 3), np.int64))
    runtime_info = backend.runtime_info()
    assert (runtime_info["providers"], runtime_info["device"], runtime_info["opset"]) == (
        ["CPUExecutionProvider"],
        "cpu",
        21,
    )
    assert runtime_info["nodes"]["CPUExecutionProvider:Softmax"] == LAYERS
    assert runtime_info["files"] == ["decoder.onnx"]


# --- perturbed weights ---
def test_only_weights_are_perturbed_according_to_the_length_of_their_sums() -> None:
    made = {
        "wide": np.full((4, 9), 0.3),
        "turned": np.full((9, 4), 0.3),
        "gemm": np.full((4, 9), 0.3),
        "table": np.full((5, 4), 0.3),
        "gain": np.full(9, 0.3),
        "scale": np.array([0.3]),
        "mask": np.full((3, 3), -3e38),
        "range": np.arange(9.0),
        "held": np.full((4, 9), 3),
        "step": np.array(0.5),
    }
    kinds = {name: np.int8 if name == "held" else np.float32 for name in made}
    node = helper.make_node
    nodes = [
        node("MatMul", ["x", "wide"], ["a"]),
        node("Transpose", ["turned"], ["t"]),
        node("MatMul", ["x", "t"], ["b"]),
        node("Gemm", ["y", "gemm"], ["c"], transB=1),
        node("Gather", ["table", "ids"], ["d"]),
        node("Mul", ["a", "gain"], ["e"]),
        node("Mul", ["e", "scale"], ["f"]),
        node("Add", ["f", "mask"], ["g"]),
        node("Add", ["g", "range"], ["h"]),
        node("DequantizeLinear", ["held", "step"], ["q"]),
        node("MatMul", ["x", "q"], ["i"]),
    ]
    tensors = [numpy_helper.from_array(x.astype(kinds[name]), name) for name, x in made.items()]
    model = helper.make_model(helper.make_graph(nodes, "g", [], [], tensors))
    new = weights.perturbed(model, 0.0, 0.01, seed=1)
    moved = {x.name: np.abs(numpy_helper.to_array(x) / made[x.name] - 1).max() for x in new.graph.initializer[:6]}
    moved["step"] = abs(float(numpy_helper.to_array(new.graph.initializer[9])) / 0.5 - 1)
    terms = {"wide": 4, "turned": 4, "gemm": 9, "table": 4, "gain": 1, "step": 4}
    for name, n in terms.items():
        assert 0 < moved[name] <= 0.0101 * np.sqrt(n), name
    for name in ("wide", "turned", "gemm", "table"):  # the largest of at least 20 draws comes near the end
        assert moved[name] > 0.008 * np.sqrt(terms[name]), name
    assert list(new.graph.initializer[5:9]) == list(model.graph.initializer[5:9])
    assert new == weights.perturbed(model, 0.0, 0.01, seed=1)
    assert new != weights.perturbed(model, 0.0, 0.01, seed=2)


def test_a_graph_without_weights_has_no_bound() -> None:
    model = helper.make_model(helper.make_graph([], "g", [], [], [numpy_helper.from_array(np.arange(4), "range")]))
    with pytest.raises(ValueError, match="the graph has no floating-point weights"):
        weights.perturbed(model, 0.1, 0.1, seed=1)


def test_scales_of_weights_are_perturbed_and_those_of_activations_are_not() -> None:
    node = helper.make_node
    nodes = [
        node("DynamicQuantizeLinear", ["x"], ["xq", "xs", "xz"]),
        node("Mul", ["xs", "weight"], ["both"]),
        node("QuantizeLinear", ["x", "activation"], ["y"]),
        node("DequantizeLinear", ["y", "activation"], ["z"]),
        node("Gather", ["table", "ids"], ["rows"]),
        node("DequantizeLinear", ["rows", "embedding"], ["w"]),
    ]
    names = ("weight", "activation", "embedding")
    tensors = [numpy_helper.from_array(np.array(0.5, np.float32), name) for name in names]
    graph = helper.make_graph(
        nodes, "g", [], [], [*tensors, numpy_helper.from_array(np.ones((3, 2), np.int8), "table")]
    )
    new = weights.perturbed(helper.make_model(graph), 0.1, 0.0, seed=1)
    moved = {x.name for x, old in zip(new.graph.initializer, graph.initializer, strict=True) if x != old}
    assert moved == {"weight", "embedding"}


@pytest.mark.parametrize("form", [decoder, merged])
def test_perturbed_weights_change_the_uncached_forward_and_not_the_backend(form: Any, tmp_path: Path) -> None:
    path = tmp_path / "decoder.onnx"
    onnx.save_model(form(Style()), path, save_as_external_data=True, location="decoder.data", size_threshold=256)
    backend = built(load(f"onnx:{path}"))
    ids = np.arange(8).reshape(2, 4)
    before = backend.uncached_forward(ids)
    moved = [np.abs(backend.perturbed(2.0**-13, 0.0, seed).uncached_forward(ids) - before).max() for seed in (1, 2)]
    assert moved[0] != moved[1]
    assert all(2.0**-16 < x < 2.0**-6 for x in moved)  # of logits of size 1
    assert (backend.uncached_forward(ids) == before).all()


def test_hidden_states_are_perturbed(tmp_path: Path) -> None:
    backend = built(opened(Style(hidden=True), tmp_path))
    x = np.ones((1, 3, WIDTH), np.float32)
    still = backend.perturbed(0.0, 0.0, 1)
    assert (still.uncached_forward(x) == backend.uncached_forward(x)).all()
    assert (backend.perturbed(2.0**-13, 0.0, 1).uncached_forward(x) != backend.uncached_forward(x)).any()


# --- scripts ---
HIDE = """
import sys
for name in ("kvconform", "kvconform_specs", "kvconform_backends", "onnx", "torch"):
    sys.modules[name] = None
import numpy as np
globals().update(np.load("inputs.npz"))
"""
KEEP = "np.savez('outputs.npz', **{name: x for name, x in list(globals().items()) if name.startswith('y_')})"


def ran(backend: Any, program: Program, folder: Path) -> None:
    """Runs the program's script in a process that cannot import this package: outputs must equal the recorded ones."""
    (trace,) = execute(backend, program, (0,))
    inputs = {f"x_{n}": given[0][0] for n, (given, _) in enumerate(feeds_of(program, (0,))) if given}
    np.savez(folder / "inputs.npz", **inputs)
    lines = [HIDE, backend.script_setup(), backend.script(program, "_"), KEEP]
    (folder / "script.py").write_text("\n".join(lines))
    subprocess.run([sys.executable, "script.py"], cwd=folder, check=True, timeout=60)
    got = np.load(folder / "outputs.npz")
    assert len(got.files) == len(inputs)
    for name in got.files:
        assert got[name].dtype == np.float32
        np.testing.assert_array_equal(got[name], trace[int(name[2:])].output)


@pytest.mark.parametrize("name", [*CONVENTIONS, "merged", "two files"])
def test_a_script_computes_the_same_without_this_package(name: str, tmp_path: Path) -> None:
    if name == "two files":
        saved(decoder(Style(cached=False)), tmp_path, "decoder_model.onnx")
        path = saved(decoder(Style(needs_past=True)), tmp_path, "decoder_with_past_model.onnx")
    else:
        model = merged(Style(mask=True, needs_past=True)) if name == "merged" else decoder(CONVENTIONS[name])
        path = saved(model, tmp_path)
    backend = built(load(f"onnx:{path}"))
    steps = (
        Append("a", (3, 3), 5),
        Append("a", (1, 1), 5),
        UncachedForward("f", (4, 4), 5),
        Append("b", (2,), 9),
        Reset("a"),
        Append("a", (2, 2), 1),
        Append("a", (2, 2), 1),
        Close("b"),
        Append("b", (1,), 3),
    )
    ran(backend, Program(backend.config, steps), tmp_path)
    text = backend.script(Program(backend.config, steps), "")
    assert [line.partition("  # ")[2] for line in text.splitlines() if "  # " in line] == [
        "append 3 to a of 2 rows",
        "append 1 to a of 2 rows",
        "uncached_forward 4 to f of 2 rows",
        "append 2 to b",
        "reset a",
        "append 2 to a of 2 rows",
        "append 2 to a of 2 rows",
        "close b",
        "append 1 to b",
    ]


def test_a_script_of_an_unsupported_step_is_an_error(tmp_path: Path) -> None:
    backend = built(opened(Style(), tmp_path))
    with pytest.raises(ValueError, match="an ONNX target does not support AliasHandle"):
        backend.script(Program(backend.config, (Append("a", (1,), 0), AliasHandle("a", "b"))), "")
