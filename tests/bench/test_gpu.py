"""The GPU from outside: its clock is read through the driver's libraries, one benchmark holds it, classes stay apart.

No GPU is needed: the two libraries are stubs here, which write what they are given where the real ones would.
"""

from __future__ import annotations

import ast
import ctypes
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvconform.bench.record import Round
from kvconform.bench.worker import gpu as gpu_module
from kvconform.bench.worker.gpu import (
    MIN_CLOCK_FRACTION,
    REASONS,
    Gpu,
    NoGpu,
    classes,
    held,
    kept,
    methods,
    unfit,
    ways,
)
from kvconform.bench.worker.timer import Block, Timer, tokens
from kvconform.errors import GpuBusy
from kvconform.worker.client import unproven
from kvconform_backends.numpy.cache import NumpyCache
from kvconform_specs.config import Config
from kvconform_specs.tensors import weights

UUID = "GPU-5f3c1b2a-0000-1111-2222-333344445555"
PLACE, HANDLE = b"0000:65:00.0", 0xABC


class Libraries(NamedTuple):
    cuda: Any
    nvml: Any
    called: list[str]


def libraries(*, mhz: int = 1800, bits: int = 0, failing: dict[str, int] | None = None, old: bool = False) -> Libraries:
    """``failing``: code by function; ``old``: a driver before R535."""
    called: list[str] = []
    codes = failing or {}

    def function(name: str, write: Callable[..., None]) -> Callable[..., int]:
        def answer(*arguments: Any) -> int:
            called.append(name)
            if name not in codes:
                write(*arguments)
            return codes.get(name, 0)

        return answer

    def place(text: Any, length: Any, number: Any) -> None:
        assert number.value == 7  # the device that cuDeviceGet gave, not its index
        text.value = PLACE

    def attribute(out: Any, which: Any, number: Any) -> None:
        out._obj.value = {13: 1_980_000, 38: 52_428_800}[which.value]

    def handle(at: Any, out: Any) -> None:
        assert at.value == PLACE
        out._obj.value = HANDLE

    def text(words: str) -> Callable[..., None]:
        def write(found: Any, out: Any, length: Any) -> None:
            assert found.value == HANDLE
            assert length.value >= len(words)
            out.value = words.encode()

        return write

    def clock(found: Any, kind: Any, out: Any) -> None:
        assert (found.value, kind.value) == (HANDLE, 1)
        out._obj.value = mhz

    def reasons(found: Any, out: Any) -> None:
        out._obj.value = bits

    cuda = {
        "cuInit": lambda flags: None,
        "cuDeviceGet": lambda out, index: setattr(out._obj, "value", 7 + index.value),
        "cuDeviceGetPCIBusId": place,
        "cuDeviceGetAttribute": attribute,
    }
    nvml = {
        "nvmlInit_v2": lambda: None,
        "nvmlDeviceGetHandleByPciBusId_v2": handle,
        "nvmlDeviceGetUUID": text(UUID),
        "nvmlDeviceGetName": text("NVIDIA H100 80GB HBM3"),
        "nvmlDeviceGetClockInfo": clock,
        f"nvmlDeviceGetCurrentClocks{'Throttle' if old else 'Event'}Reasons": reasons,
    }
    made = [SimpleNamespace(**{name: function(name, write) for name, write in part.items()}) for part in (cuda, nvml)]
    made[1].nvmlErrorString = lambda code: f"words for {code.value}".encode()
    return Libraries(*made, called)


def gpu(**options: Any) -> Gpu:
    cuda, nvml, _ = libraries(**options)
    return Gpu(cuda, nvml)


# --- the clock ---
def test_a_gpu_is_told_by_its_uuid_its_typical_clock_and_its_l2() -> None:
    found = gpu(mhz=1755)
    assert (found.uuid, found.default_mhz, found.l2_bytes, found.sm_mhz()) == (UUID, 1980, 52_428_800, 1755)
    assert found.fingerprint()["gpu"] == "NVIDIA H100 80GB HBM3"


def test_clocks_are_read_and_never_set() -> None:
    cuda, nvml, called = libraries(bits=0x4)
    found = Gpu(cuda, nvml)
    found.sm_mhz()
    found.throttle()
    found.fingerprint()
    assert "nvmlDeviceGetClockInfo" in called
    assert {name for name in called if name.startswith("nvmlDevice") and "Get" not in name} == set()
    assert "nvmlDeviceSet" not in Path(gpu_module.__file__).read_text()


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize(
    ("bits", "words"),
    [(0, []), (0x1, []), (0x4, ["power cap"]), (0x61, ["software thermal slowdown", "hardware thermal slowdown"])],
)
def test_what_holds_the_clock_down_is_told_in_words_and_idleness_is_none_of_it(
    bits: int, words: list[str], old: bool
) -> None:
    held_down = gpu(bits=bits, old=old).throttle()
    assert [said for bit, said in REASONS.items() if held_down & bit] == words
    assert bool(held_down) == bool(words)


def test_a_clock_that_nvml_does_not_tell_is_0_and_the_fingerprint_says_so() -> None:
    found = gpu(failing={"nvmlDeviceGetClockInfo": 3, "nvmlDeviceGetCurrentClocksEventReasons": 3})
    assert (found.sm_mhz(), found.throttle()) == (0, 0)
    assert found.fingerprint()["clock"] == "NVML tells none: no block can be dropped"


@pytest.mark.parametrize(
    ("failing", "sentence"),
    [
        ({"cuInit": 100}, "cuInit failed with code 100: no such CUDA device, or no driver that runs"),
        ({"cuDeviceGet": 101}, "cuDeviceGet failed with code 101"),
        ({"nvmlInit_v2": 9}, "nvmlInit_v2 failed with code 9: words for 9"),
        ({"nvmlDeviceGetUUID": 15}, "nvmlDeviceGetUUID failed with code 15: words for 15"),
    ],
)
def test_a_gpu_that_cannot_be_reached_says_which_call_failed(failing: dict[str, int], sentence: str) -> None:
    with pytest.raises(NoGpu, match=sentence):
        gpu(failing=failing)


def test_without_the_driver_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert Gpu.open() is None
    with pytest.raises(NoGpu, match=r"the NVIDIA driver's libraries are not there: \w+\.[\w.]+: cannot open"):
        Gpu.reach()


def test_it_needs_nothing_but_the_standard_library() -> None:
    tree = ast.parse(Path(gpu_module.__file__).read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in names} <= sys.stdlib_module_names


# --- the stopwatch ---
class Counting(NumpyCache):
    """Its device takes 7 ns a step; it makes steps on two copies."""

    made: ClassVar[list[int]] = []

    def device_ns(self, call: Callable[[int], object], steps: int) -> int:
        for copy in (0, 1) * steps:
            call(copy)
            self.made.append(copy)
        return 7 * steps


@pytest.mark.parametrize("phase", ["decode", "prefill", "recompute", "recompute-last"])
def test_a_step_is_made_again_on_any_copy_and_none_is_counted_twice(phase: str) -> None:
    config = Config("decoder", 2, 1, 4, layers=1, width=8, vocabulary=11, capacity=6)
    client = Counting(config, weights(config), "cpu")
    stopwatch = Timer(client, tokens(config, 0))
    assert stopwatch.device(phase, 5, 3, 2) == [21, 21]  # room for one step: each forgets what it added
    assert len(client.made) == 12
    client.made.clear()
    assert Timer(NumpyCache(config, weights(config), "cpu"), tokens(config, 0)).device(phase, 5, 3, 2) == [0, 0]


def test_the_clock_is_read_after_each_block_and_never_inside_it() -> None:
    config = Config("decoder", 2, 1, 4, layers=1, width=8, vocabulary=11, capacity=6)
    found = gpu(mhz=1234, bits=0x5)
    for waits in (True, False):
        client = NumpyCache(config, weights(config), "cpu")
        if waits:
            client.synchronise = lambda: None  # type: ignore[attr-defined]
        for phase in ("decode", "prefill"):
            (block,) = Timer(client, tokens(config, 0), gpu=found).blocks(phase, 3, 1, 1)
            assert (block.sm_mhz, block.throttle) == (1234, 0x4)


# --- the lock ---
HOLDER = """
import sys
from pathlib import Path
from kvconform.bench.worker.gpu import Gpu
gpu = object.__new__(Gpu)
gpu.uuid, gpu.name = sys.argv[1], "a GPU"
with gpu.lock(Path(sys.argv[2])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_one_process_at_a_time_holds_a_gpu_and_a_dead_one_does_not(tmp_path: Path) -> None:
    found = gpu()
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, UUID, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(GpuBusy, match=f"is being timed by another process, {other.pid}; see"), found.lock(tmp_path):
            pytest.fail("two processes held one GPU")
        other.kill()
        other.wait()
    (tmp_path / f"kvconform-{UUID}.lock").write_text("a longer line than ours\n")
    with found.lock(tmp_path):
        assert (tmp_path / f"kvconform-{UUID}.lock").read_text() == f"{os.getpid()}\n"


def test_a_lock_is_given_back_and_another_gpu_has_its_own(tmp_path: Path) -> None:
    found, beside = gpu(), gpu()
    beside.uuid = "GPU-another"
    with found.lock(tmp_path), beside.lock(tmp_path), pytest.raises(GpuBusy), gpu().lock(tmp_path):
        pytest.fail("one GPU was held twice")
    with found.lock(tmp_path):
        pass


def test_the_lock_file_of_another_user_is_only_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, found = tmp_path / f"kvconform-{UUID}.lock", gpu()
    path.write_text("4711\n")
    really = os.open

    def refused(at: Any, flags: int, *mode: int) -> int:
        if flags & os.O_CREAT:
            raise PermissionError(13, "Permission denied")
        return really(at, flags, *mode)

    monkeypatch.setattr(os, "open", refused)
    with found.lock(tmp_path), pytest.raises(GpuBusy, match="another process, 4711"), gpu().lock(tmp_path):
        pytest.fail("one GPU was held twice")
    assert path.read_text() == "4711\n"


def test_a_run_on_cuda_holds_its_gpu_and_the_record_tells_which(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = gpu()
    monkeypatch.setattr(gpu_module, "_shared", lambda: tmp_path)
    monkeypatch.setattr(Gpu, "reach", lambda: found)
    with held("cuda") as told:
        assert told["uuid"] == UUID
        with pytest.raises(GpuBusy), held("cuda"):
            pytest.fail("one GPU was held twice")
        with held("cpu") as nothing:
            assert nothing == {}


def test_a_run_without_a_gpu_goes_on_and_tells_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> None:
        raise NoGpu("no driver")

    monkeypatch.setattr(Gpu, "reach", none)
    with held("cuda") as told:
        assert told == {"gpu": "not reached: no driver"}


# --- what is kept, and compared ---
@given(st.lists(st.integers(1, 4000)), st.integers(1, 3000))
def test_blocks_under_three_quarters_of_the_default_clock_are_dropped_and_counted(mhz: list[int], default: int) -> None:
    blocks = [Block(1, 1, 0, clock) for clock in mhz]
    stay, dropped = kept(blocks, default)
    assert [block.sm_mhz for block in stay] == [clock for clock in mhz if 4 * clock >= 3 * default]
    assert len(stay) + dropped == len(blocks)
    assert MIN_CLOCK_FRACTION == 3 / 4


def test_rounds_without_a_clock_are_kept() -> None:
    rounds = [Round(0, 0, 0, 0, 0, 5, 5, 0, 0, mhz) for mhz in (0, 1484, 1485)]
    assert kept(rounds, 1980) == ([rounds[0], rounds[2]], 1)


def test_classes_of_precision_are_never_mixed() -> None:
    plain, fast = {"device": "cuda", "precision": "float32"}, {"device": "cuda", "precision": "float32 by tf32"}
    assert classes({"eager": plain, "onnx": dict(plain)}) is None
    assert classes({"eager": plain, "onnx": fast}) == (
        "classes of precision differ: eager: float32; onnx: float32 by tf32"
    )
    assert classes({"onnx": fast}) is None


def test_on_a_gpu_the_witness_tells_the_device() -> None:
    assert unproven({}, "cpu") == ""
    assert unproven({"device": "cuda:0"}, "cuda") == ""
    assert unproven({"device": None}, "cuda") == (
        "cuda was requested, but runtime_info() does not report the device that ran"
    )


def test_an_arm_that_does_not_tell_its_class_is_compared_on_a_cpu_alone() -> None:
    plain = {"device": "cuda", "precision": "float32"}
    assert classes({"eager": plain, "hf": {"device": "cuda:0"}}) == "does not tell its class of precision: hf"
    assert classes({"eager": plain, "mine": {"device": "cuda"}}) == "does not tell its class of precision: mine"
    assert classes({"eager": {"precision": "float32"}, "numpy": {}}) is None
    assert classes({"mine": {"device": "cuda"}}) is None


def test_device_times_measured_in_two_ways_are_not_compared() -> None:
    cold, warm = {"device_time": ["graph: L2 flushed"]}, {"device_time": ["cupti: L2 warm"]}
    assert methods({"eager": cold, "eager-static": cold, "numpy": {}}) is None
    assert methods({"eager": cold, "onnx": warm}) == (
        "device times were measured in different ways: eager: graph: L2 flushed; onnx: cupti: L2 warm"
    )
    assert ways({"eager": cold, "eager-static": cold, "numpy": {}}) == (
        "device times of eager, eager-static: graph: L2 flushed"
    )
    assert ways({"numpy": {}}) is None


def test_a_graph_that_copies_between_host_and_device_gets_no_time() -> None:
    onnx = {"device": "cuda", "providers": ["CUDAExecutionProvider"]}
    assert unfit({**onnx, "memcpy_nodes": 0}) is None
    assert unfit({**onnx, "memcpy_nodes": 2}) == (
        "its graphs have 2 Memcpy nodes: they copy between host and device in every step"
    )
    assert unfit(onnx) == "nobody has counted the Memcpy nodes of its graphs"
    assert unfit({**onnx, "device": "cpu"}) is None
    assert unfit({"device": "cuda", "precision": "float32"}) is None
