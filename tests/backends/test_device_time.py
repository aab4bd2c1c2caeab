"""Device time, as far as it can be tried without a GPU: who is asked, in which order, and what is said where nobody is.

``Fake`` stands for torch's CUDA calls and runs captured steps on the CPU: it shows which step reads which copy, not
how long anything takes. No test here times a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="device times are of torch backends")

from kvconform_backends.torch import device_time  # noqa: E402
from kvconform_backends.torch.device_time import (  # noqa: E402
    ROTATED,
    STEPS,
    DeviceTime,
    Graph,
    check_written,
    counts,
    on_device,
    poison,
    precision,
    rotation,
    union,
)
from kvconform_backends.torch.eager import Eager, EagerStatic  # noqa: E402
from kvconform_specs.config import Config  # noqa: E402
from kvconform_specs.tensors import weights  # noqa: E402

SMALL = Config("decoder", 2, 1, 4, layers=2, width=8, mlp=8, vocabulary=11, positions="rope", capacity=16)
IDS = np.array([[3, 1, 4, 1]])


def built(kind: type = EagerStatic) -> Any:
    return kind(SMALL, weights(SMALL), "cpu")


class Fake:
    """What ``torch.cuda`` does, on the CPU. ``writes``: whether a replay writes the outputs of its steps."""

    def __init__(self, l2: int, writes: bool = True, refuses: str = "") -> None:
        self.l2, self.writes, self.refuses = l2, writes, refuses
        self.log: list[str] = []
        self.outputs: Sequence[Any] = ()

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fake = self

        class Stream:
            def wait_stream(self, other: Any) -> None:
                pass

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                fake.log.append("event")

            def synchronize(self) -> None:
                pass

            def elapsed_time(self, other: Any) -> float:
                return 0.5  # milliseconds

        class CUDAGraph:
            def replay(self) -> None:
                fake.log.append("replay")
                if fake.writes:
                    with torch.inference_mode():
                        for output in fake.outputs:
                            output.fill_(1.0)

        @contextmanager
        def graph(made: Any, stream: Any) -> Iterator[None]:
            fake.log.append("capture")
            yield
            if fake.refuses:
                raise RuntimeError(f"{fake.refuses}\nand a stack")

        @contextmanager
        def stream(which: Any) -> Iterator[None]:
            yield

        really = device_time.poison

        def poisoned(outputs: Sequence[Any]) -> None:
            fake.log.append("poison")
            fake.outputs = outputs
            really(outputs)

        monkeypatch.setattr(device_time, "poison", poisoned)
        properties = SimpleNamespace(L2_cache_size=self.l2)
        for name, stands in {
            "Stream": Stream,
            "Event": Event,
            "CUDAGraph": CUDAGraph,
            "graph": graph,
            "stream": stream,
            "current_stream": Stream,
            "set_stream": lambda which: None,
            "synchronize": lambda: None,
            "current_device": lambda: 0,
            "get_device_properties": lambda device: properties,
        }.items():
            monkeypatch.setattr(torch.cuda, name, stands)


class Steps:
    """A decode step on a cache of its own for each copy, as a stopwatch makes it."""

    def __init__(self, backend: Any) -> None:
        self.backend, self.caches = backend, dict[int, Any]()
        self.log: list[tuple[int, Any]] = []

    def __call__(self, copy: int) -> None:
        if copy not in self.caches:
            self.caches[copy] = self.backend.step(self.backend.start(1), IDS)[1]
        self.log.append((copy, self.backend.decoder))
        _, after = self.backend.step(self.caches[copy], IDS[:, :1].copy())
        if not self.backend.claims.can("immutable"):
            self.backend.truncate(after, IDS.shape[1])


def weighs(backend: Any) -> int:
    return device_time.read(backend.decoder)


# --- the seams ---
@pytest.mark.parametrize("kind", [Eager, EagerStatic])
def test_a_step_without_numpy_computes_the_same_and_the_seams_are_put_back(kind: type) -> None:
    backend = built(kind)
    want, _ = backend.step(backend.start(1), IDS)
    with on_device(backend) as outputs:
        got, _ = backend.step(backend.start(1), IDS)
        assert isinstance(got, torch.Tensor)
    assert np.array_equal(outputs[0].numpy(), want)
    assert isinstance(backend.step(backend.start(1), IDS)[0], np.ndarray)


def test_an_input_is_uploaded_once() -> None:
    backend = built()
    with on_device(backend):
        first = backend.tensor(IDS[:, :1].copy())
        assert backend.tensor(IDS[:, :1].copy()) is first
        assert backend.tensor(IDS[:, 1:2].copy()) is not first


def test_an_output_that_no_step_writes_is_seen() -> None:
    backend = built()
    with on_device(backend) as outputs:
        backend.step(backend.start(1), IDS)
    check_written(outputs)
    poison(outputs)
    with torch.inference_mode():
        outputs[0][:, :-1] = 0.0  # written in part
    with pytest.raises(RuntimeError, match="left its output unwritten"):
        check_written(outputs)


# --- the graph ---
@given(st.integers(1, 10**9), st.integers(0, 10**8))
def test_five_times_l2_lies_between_two_reads_of_one_copy(size: int, l2: int) -> None:
    copies = rotation(size, l2)
    between = size * (copies - 1) if copies > 1 else size  # one copy: its own other bytes
    assert between >= ROTATED * l2
    assert copies == 1 or size * (copies - 2) < ROTATED * l2  # and no copy more than that


@pytest.mark.parametrize("kind", [Eager, EagerStatic])
def test_each_step_of_a_graph_reads_the_next_copy_of_weights_and_cache(
    kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = built(kind)
    own, fake = backend.decoder, Fake(l2=weighs(backend) // ROTATED + 1)  # a little more than one copy's bytes
    fake.install(monkeypatch)
    call = Steps(backend)
    graph = Graph(backend, call, steps=1)
    assert len(graph.decoders) == rotation(weighs(backend), fake.l2) == 3
    assert graph.steps == 12  # ten or more, in whole turns
    assert graph.steps >= STEPS
    captured = call.log[-graph.steps :]
    assert [copy for copy, _ in captured] == [0, 1, 2] * 4
    assert [decoder is graph.decoders[copy] for copy, decoder in captured] == [True] * 12
    assert len({id(cache) for cache in call.caches.values()}) == 3
    assert len({decoder.lm_head.data_ptr() for decoder in graph.decoders}) == 3
    assert len(graph.outputs) == 12
    assert backend.decoder is own


def test_a_graph_is_timed_behind_other_replays_and_told_per_step(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, fake = built(), Fake(l2=0)
    fake.install(monkeypatch)
    timed, call = DeviceTime("cuda", backend), Steps(backend)
    assert timed.ns(call, 4) == 500_000 * 4 // STEPS  # 0.5 ms for ten steps
    assert fake.log == ["capture", *["replay"] * 2, "poison", "event", "replay", "event"]
    assert timed.methods == ["graph: CUDA graph of steps on copies of weights and cache in turn; L2 flushed"]
    timed.ns(call, 4)
    assert fake.log.count("capture") == 1


def test_a_timed_replay_that_writes_nothing_gives_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = built()
    Fake(l2=0, writes=False).install(monkeypatch)
    with pytest.raises(RuntimeError, match="left its output unwritten"):
        DeviceTime("cuda", backend).ns(Steps(backend), 1)


def test_weights_that_a_step_reads_elsewhere_are_not_called_rotated(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, other = built(), built()
    Fake(l2=weighs(backend)).install(monkeypatch)
    call = Steps(other)
    with pytest.raises(device_time.NotMeasured, match="does not read its weights from its decoder"):
        Graph(backend, call, 1)


# --- what cannot be measured ---
def test_what_is_not_measured_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = built()
    timed = DeviceTime("cpu", backend)
    assert timed.ns(Steps(backend), 1) is None
    assert timed.methods == ["not measured: the device is cpu"]

    Fake(l2=0, refuses="operation not permitted when stream is capturing").install(monkeypatch)
    monkeypatch.setattr(device_time, "supported_activities", set)
    timed = DeviceTime("cuda", backend)
    assert timed.ns(Steps(backend), 1) is None
    assert timed.methods == [
        "not measured: no CUDA graph: the step cannot be captured: operation not permitted when stream is capturing; "
        f"no CUPTI: torch {torch.__version__} has no CUPTI"
    ]
    assert isinstance(backend.step(backend.start(1), IDS)[0], np.ndarray)  # all is as it was

    timed = DeviceTime("cuda")
    assert timed.ns(lambda copy: None, 1) is None
    assert timed.methods[0].startswith("not measured: no CUDA graph: the step has no torch decoder")


class Trace:
    """What ``torch.profiler`` gives: activities ``(name, start, end)`` in microseconds, one of them the host's."""

    def __init__(self, *activities: tuple[str, float, float]) -> None:
        self.activities = activities

    def __call__(self, activities: Any) -> Trace:
        return self

    def __enter__(self) -> Trace:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def events(self) -> list[Any]:
        made = [
            SimpleNamespace(
                name=name,
                time_range=SimpleNamespace(start=start, end=end),
                device_type=SimpleNamespace(name="CUDA"),
                is_user_annotation=False,
            )
            for name, start, end in self.activities
        ]
        host = SimpleNamespace(name="cudaLaunchKernel", time_range=SimpleNamespace(start=0.0, end=90.0))
        host.device_type, host.is_user_annotation = SimpleNamespace(name="CPU"), False
        return [host, *made]


@pytest.fixture
def profiler(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(device_time, "supported_activities", lambda: {torch.profiler.ProfilerActivity.CUDA})
    monkeypatch.setattr(device_time.Cupti, "attached", False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return monkeypatch


def test_kernels_count_and_copies_to_and_from_the_host_do_not(profiler: pytest.MonkeyPatch) -> None:
    trace = Trace(
        ("Memcpy HtoD (Pageable -> Device)", 0.0, 5.0),
        ("gemv", 6.0, 8.5),
        ("softmax", 8.0, 9.0),
        ("Memcpy DtoD (Device -> Device)", 10.0, 11.0),
        ("Memcpy DtoH (Device -> Pageable)", 12.0, 40.0),
    )
    profiler.setattr(device_time, "profile", trace)
    calls: list[int] = []
    timed = DeviceTime("cuda")
    assert timed.ns(calls.append, 3) == 4000  # 6 to 9 and 10 to 11 microseconds
    assert calls == [0] * 4  # one to warm up
    assert timed.methods == ["cupti: union of kernel spans, step after step; L2 warm"]


def test_no_kernel_seen_is_not_zero_nanoseconds(profiler: pytest.MonkeyPatch) -> None:
    profiler.setattr(device_time, "profile", Trace(("Memcpy HtoD (Pageable -> Device)", 0.0, 5.0)))
    timed = DeviceTime("cuda")
    assert timed.ns(lambda copy: None, 1) is None
    assert timed.methods[0].endswith("CUPTI saw no kernel (another profiler holds it, or it lacks the permission)")


def test_no_wall_time_follows_a_profiler(profiler: pytest.MonkeyPatch) -> None:
    device_time.synchronise("cuda")
    profiler.setattr(device_time, "profile", Trace(("gemv", 0.0, 1.0)))
    DeviceTime("cuda").ns(lambda copy: None, 1)
    with pytest.raises(RuntimeError, match="wall times come before device times"):
        device_time.synchronise("cuda")
    device_time.synchronise("cpu")


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 9)), max_size=8))
def test_overlaps_count_once_and_gaps_do_not(drawn: list[tuple[int, int]]) -> None:
    spans = [(start, start + length) for start, length in drawn]
    assert union(spans) == len({at for start, end in spans for at in range(start, end)})


def test_copies_on_the_device_are_the_steps_own() -> None:
    assert counts("Memcpy DtoD (Device -> Device)")
    assert counts("void gemv2T_kernel_val<int, int, float>")
    assert not counts("Memcpy HtoD (Pageable -> Device)")


# --- precision, memory ---
@pytest.fixture
def flags() -> Iterator[None]:
    was, cuda = torch.get_float32_matmul_precision(), torch.backends.cuda.matmul
    reduced = cuda.allow_bf16_reduced_precision_reduction
    yield
    torch.set_float32_matmul_precision(was)
    cuda.allow_bf16_reduced_precision_reduction = reduced


@pytest.mark.usefixtures("flags")
def test_tf32_is_a_class_of_its_own() -> None:
    torch.set_float32_matmul_precision("highest")
    assert precision(torch.float32, "cuda") == precision(torch.float32, "cpu") == "float32"
    torch.set_float32_matmul_precision("high")
    assert precision(torch.float32, "cuda") == "float32 by tf32"
    torch.set_float32_matmul_precision("medium")
    assert precision(torch.float32, "cpu") == "float32 by bf16"


@pytest.mark.usefixtures("flags")
def test_sums_in_sixteen_bits_are_a_class_of_their_own() -> None:
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True
    assert precision(torch.bfloat16, "cuda") == "bfloat16, sums in bfloat16"
    assert precision(torch.bfloat16, "cpu") == "bfloat16"
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    assert precision(torch.bfloat16, "cuda") == "bfloat16"


def test_growth_is_counted_from_when_it_was_last_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    stats = {"allocated_bytes.all.current": 100, "allocated_bytes.all.peak": 300}
    reset: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda: dict(stats))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: reset.append(1))
    allocator = device_time.Allocator()
    allocator.grown()
    stats |= {"allocated_bytes.all.current": 150, "allocated_bytes.all.peak": 180}
    assert (allocator.grown(), len(reset)) == (80, 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert allocator.grown() is None


# --- ONNX Runtime ---
@pytest.fixture
def runtime() -> Any:
    pytest.importorskip("onnxruntime", reason="its options are looked at")
    pytest.importorskip("onnx", reason="a graph is made with it")
    from kvconform_backends.onnx import runtime as onnx_runtime

    return onnx_runtime


def test_onnx_runtime_is_asked_for_torchs_stream_and_for_no_tf32(runtime: Any) -> None:
    (name, options), cpu = runtime.providers("cuda", 0x7F001234)
    assert (name, cpu) == ("CUDAExecutionProvider", "CPUExecutionProvider")
    assert options == {"use_tf32": "0", "user_compute_stream": str(0x7F001234)}
    assert runtime.providers("cuda")[0][1] == {"use_tf32": "0"}
    assert runtime.providers("cpu", 0x7F001234) == ["CPUExecutionProvider"]


def test_torch_leaves_stream_0_which_onnx_runtime_takes_for_none(runtime: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    current = [SimpleNamespace(cuda_stream=0)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "Stream", lambda: SimpleNamespace(cuda_stream=0xBEEF))
    monkeypatch.setattr(torch.cuda, "set_stream", current.append)
    assert runtime.compute_stream("cpu") is None
    assert [runtime.compute_stream("cuda"), runtime.compute_stream("cuda")] == [0xBEEF, 0xBEEF]
    assert len(current) == 2  # made once
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert runtime.compute_stream("cuda") is None


def model(*, branch: bool) -> bytes:
    """``y = x w``, within a branch or not."""
    from onnx import TensorProto, helper, numpy_helper

    def value(name: str, kind: int = TensorProto.FLOAT, shape: Sequence[Any] = ("b", 64)) -> Any:
        return helper.make_tensor_value_info(name, kind, shape)

    weight = numpy_helper.from_array(np.ones((64, 64), np.float32), "w")
    inner = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    nodes, inputs = inner, [value("x")]
    if branch:
        whole = helper.make_graph(inner, "then", [], [value("y")])
        other = helper.make_graph([helper.make_node("Relu", ["x"], ["z"])], "else", [], [value("z")])
        nodes = [helper.make_node("If", ["c"], ["out"], then_branch=whole, else_branch=other)]
        inputs = [value("x"), value("c", TensorProto.BOOL, ())]
    graph = helper.make_graph(nodes, "g", inputs, [value("out" if branch else "y")], [weight])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    return bytes(made.SerializeToString())


@pytest.mark.parametrize("branch", [False, True])
def test_the_nodes_of_a_graph_are_counted_as_it_is_run_and_its_branches_are_not_forgotten(
    runtime: Any, branch: bool, tmp_path: Path
) -> None:
    from onnxruntime import InferenceSession

    options = runtime.session_options()
    runtime.write_graph(options, tmp_path / "graph.onnx")
    InferenceSession(model(branch=branch), options, providers=["CPUExecutionProvider"])
    assert runtime.kinds(tmp_path / "graph.onnx")["MatMul"] == 1
    assert (tmp_path / "graph.onnx").stat().st_size < 64 * 64 * 4  # the weights lie beside it


def test_nodes_that_copy_between_host_and_device_are_counted(runtime: Any) -> None:
    assert runtime.copies({"MemcpyToHost": 1, "MemcpyFromHost": 2, "MatMul": 9}) == 3
    assert runtime.copies({"MatMul": 9}) == 0


def test_a_session_witnesses_what_it_runs_and_in_which_class(runtime: Any) -> None:
    session = runtime.open_session(model(branch=False), "cpu")
    told = runtime.runtime_info([session], "float32", "cpu")
    assert told["precision"] == "float32"
    assert told["nodes"] == {"CPUExecutionProvider:MatMul": 1}
    assert runtime.memcpy_nodes(session) == 0
    assert runtime.precision("float32", {"CUDAExecutionProvider": {"use_tf32": "1"}}) == "float32 by tf32"
    assert runtime.precision("float32", {"CUDAExecutionProvider": {}}) == "float32 by tf32"  # its default
    assert runtime.precision("float32", {"CUDAExecutionProvider": {"use_tf32": "0"}}) == "float32"


def test_a_session_on_cuda_is_counted_once_from_the_graph_that_it_writes(
    runtime: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = runtime.open_session(model(branch=False), "cpu")
    monkeypatch.setitem(runtime._SOURCES, session, model(branch=False))  # as if it were on CUDA
    monkeypatch.setattr(runtime, "providers", lambda device, stream=None: ["CPUExecutionProvider"])
    counted: list[Path] = []

    def kinds(path: Path) -> dict[str, int]:
        counted.append(path)
        assert path.exists()
        return {"MemcpyFromHost": 2, "MatMul": 1}

    monkeypatch.setattr(runtime, "kinds", kinds)
    assert [runtime.memcpy_nodes(session), runtime.memcpy_nodes(session)] == [2, 2]
    assert len(counted) == 1
    assert not counted[0].parent.exists()
    told = runtime.runtime_info([session], "float32", "cuda")
    assert told["memcpy_nodes"] == 2
    assert told["stream"] == "not torch's: {None}"
