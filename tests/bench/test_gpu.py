"""The GPU from outside: its clock is read through NVML, one benchmark holds it, classes stay apart.

No GPU is needed: ``pynvml`` is a stand-in here, which answers as the driver would.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvconform.bench.protocol import variables
from kvconform.bench.record import Round
from kvconform.bench.worker import gpu as gpu_module
from kvconform.bench.worker.gpu import MIN_CLOCK_FRACTION, REASONS, Gpu, NoGpu, classes, held, kept, methods, unfit
from kvconform.bench.worker.timer import Block, Timer, tokens
from kvconform.errors import GpuBusy
from kvconform.worker.client import unproven
from kvconform_backends.numpy.cache import NumpyCache
from kvconform_specs.config import Config
from kvconform_specs.tensors import weights

UUID = "GPU-5f3c1b2a-0000-1111-2222-333344445555"
OTHER = "GPU-99990000-0000-1111-2222-333344445555"


class Nvml(SimpleNamespace):
    """``pynvml`` on a machine with two GPUs: device 0 is ``OTHER``, device 1 is ``UUID``, and has an instance."""

    NVML_CLOCK_SM = 1

    class NVMLError(Exception):
        pass

    def __init__(self, mhz: int = 1800, bits: int = 0, failing: tuple[str, ...] = (), old: bool = False) -> None:
        super().__init__(called=[])
        answers: dict[str, Callable[..., Any]] = {
            "nvmlInit": lambda: None,
            "nvmlDeviceGetCount": lambda: 2,
            "nvmlDeviceGetHandleByIndex": lambda index: (OTHER, UUID)[index],
            "nvmlDeviceGetHandleByUUID": lambda uuid: f"instance {uuid}",
            "nvmlDeviceGetDeviceHandleFromMigDeviceHandle": lambda handle: {"instance MIG-7": UUID}[handle],
            "nvmlDeviceGetUUID": lambda handle: handle,
            "nvmlDeviceGetName": lambda handle: "NVIDIA H100 80GB HBM3",
            "nvmlDeviceGetMaxClockInfo": lambda handle, kind: {1: 1980}[kind],
            "nvmlDeviceGetClockInfo": lambda handle, kind: {1: mhz}[kind],
            "nvmlDeviceGetCurrentClocksEventReasons": lambda handle: bits,
            "nvmlDeviceGetCurrentClocksThrottleReasons": lambda handle: bits,
        }
        failing += ("nvmlDeviceGetCurrentClocksEventReasons",) if old else ()
        for name, answer in answers.items():
            setattr(self, name, self._function(name, answer, name in failing))

    def _function(self, name: str, answer: Callable[..., Any], fails: bool) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            self.called.append(name)
            if fails:
                raise self.NVMLError(f"{name} failed")
            return answer(*arguments)

        return call


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Nvml]:
    """Installs a stand-in; CUDA shows device 1 alone."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")

    def install(**options: Any) -> Nvml:
        nvml = Nvml(**options)
        monkeypatch.setitem(sys.modules, "pynvml", nvml)
        return nvml

    install()
    return install


# --- the clock ---
def test_a_gpu_is_identified_by_its_uuid_and_its_default_clock(driver: Any) -> None:
    driver(mhz=1755)
    found = Gpu()
    assert (found.uuid, found.default_mhz, found.sm_mhz()) == (UUID, 1980, 1755)
    assert found.fingerprint() == {
        "gpu": "NVIDIA H100 80GB HBM3",
        "uuid": UUID,
        "default_mhz": 1980,
        "clock": "read after each block",
    }


@pytest.mark.parametrize(
    ("visible", "uuid"), [("0,1", OTHER), ("1", UUID), (UUID, UUID), ("GPU-5f3c", UUID), ("MIG-7", UUID), (None, OTHER)]
)
def test_the_gpu_is_the_first_that_cuda_shows_to_the_process(
    visible: str | None, uuid: str, driver: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert Gpu().uuid == uuid
    assert variables(1)["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"  # a number means the same to CUDA and to NVML


@pytest.mark.parametrize("visible", ["", "-1", "GPU-unknown"])
def test_a_process_to_which_cuda_shows_no_gpu_has_none(
    visible: str, driver: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(NoGpu, match=f"CUDA_VISIBLE_DEVICES names no GPU: '{visible}'"):
        Gpu()


def test_clocks_are_read_and_never_set(driver: Any) -> None:
    nvml = driver(bits=0x4)
    found = Gpu()
    found.sm_mhz()
    found.throttle()
    found.fingerprint()
    assert "nvmlDeviceGetClockInfo" in nvml.called
    assert {name for name in nvml.called if name.startswith("nvmlDevice") and "Get" not in name} == set()
    assert "nvmlDeviceSet" not in Path(gpu_module.__file__).read_text()


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize(
    ("bits", "words"),
    [(0, []), (0x1, []), (0x4, ["power cap"]), (0x61, ["software thermal slowdown", "hardware thermal slowdown"])],
)
def test_what_reduces_the_clock_is_reported_in_words_and_idleness_is_not_one_of_them(
    bits: int, words: list[str], old: bool, driver: Any
) -> None:
    driver(bits=bits, old=old)
    reduced = Gpu().throttle()
    assert [said for bit, said in REASONS.items() if reduced & bit] == words
    assert bool(reduced) == bool(words)


def test_a_clock_that_nvml_does_not_report_is_0_and_the_fingerprint_says_so(driver: Any) -> None:
    reasons = (f"nvmlDeviceGetCurrentClocks{name}Reasons" for name in ("Event", "Throttle"))
    driver(failing=("nvmlDeviceGetClockInfo", *reasons))
    found = Gpu()
    assert (found.sm_mhz(), found.throttle()) == (0, 0)
    assert found.fingerprint()["clock"] == "NVML does not report it: no block can be dropped"


@pytest.mark.parametrize("name", ["nvmlInit", "nvmlDeviceGetHandleByIndex", "nvmlDeviceGetUUID"])
def test_a_gpu_that_cannot_be_reached_says_which_call_failed(name: str, driver: Any) -> None:
    driver(failing=(name,))
    with pytest.raises(NoGpu, match=f"the NVIDIA driver cannot be queried: {name} failed"):
        Gpu()
    assert Gpu.open() is None


def test_without_nvidia_ml_py_there_is_no_gpu_and_the_reason_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert Gpu.open() is None
    with pytest.raises(NoGpu, match=r"nvidia-ml-py cannot be imported \(.*\): pip install 'kvconform\[cuda\]'"):
        Gpu()


def test_the_real_nvml_without_a_driver_is_one_sentence() -> None:
    pynvml = pytest.importorskip("pynvml", reason="of the extra cuda")
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        with pytest.raises(NoGpu, match="the NVIDIA driver cannot be queried: "):
            Gpu()
    else:
        assert Gpu().default_mhz > 0


def test_a_worker_needs_nvml_only_for_a_gpu() -> None:
    code = "import sys, kvconform.bench.worker.server; print('pynvml' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_a_conformance_worker_imports_no_timing_code() -> None:
    code = "import sys, kvconform.worker.server; print([n for n in sys.modules if n.startswith('kvconform.bench')])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# --- the timer ---
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
    timer = Timer(client, tokens(config, 0))
    assert timer.device(phase, 5, 3, 2) == [21, 21]  # room for one step: each forgets what it added
    assert len(client.made) == 12
    client.made.clear()
    assert Timer(NumpyCache(config, weights(config), "cpu"), tokens(config, 0)).device(phase, 5, 3, 2) == [0, 0]


def test_the_clock_is_read_after_each_block_and_never_inside_it(driver: Any) -> None:
    config = Config("decoder", 2, 1, 4, layers=1, width=8, vocabulary=11, capacity=6)
    driver(mhz=1234, bits=0x5)
    found = Gpu()
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


def test_one_process_at_a_time_holds_a_gpu_and_a_dead_one_does_not(tmp_path: Path, driver: Any) -> None:
    found = Gpu()
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


def test_a_lock_is_given_back_and_another_gpu_has_its_own(tmp_path: Path, driver: Any) -> None:
    found, beside = Gpu(), Gpu()
    beside.uuid = "GPU-another"
    with found.lock(tmp_path), beside.lock(tmp_path), pytest.raises(GpuBusy), Gpu().lock(tmp_path):
        pytest.fail("one GPU was held twice")
    with found.lock(tmp_path):
        pass


def test_the_lock_file_of_another_user_is_only_read(
    tmp_path: Path, driver: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, found = tmp_path / f"kvconform-{UUID}.lock", Gpu()
    path.write_text("4711\n")
    really = os.open

    def refused(at: Any, flags: int, *mode: int) -> int:
        if flags & os.O_CREAT:
            raise PermissionError(13, "Permission denied")
        return really(at, flags, *mode)

    monkeypatch.setattr(os, "open", refused)
    with found.lock(tmp_path), pytest.raises(GpuBusy, match="another process, 4711"), Gpu().lock(tmp_path):
        pytest.fail("one GPU was held twice")
    assert path.read_text() == "4711\n"


def test_a_run_on_cuda_holds_its_gpu_and_the_record_names_it(
    tmp_path: Path, driver: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_module, "_shared", lambda: tmp_path)
    with held("cuda") as found:
        assert found["uuid"] == UUID
        with pytest.raises(GpuBusy), held("cuda"):
            pytest.fail("one GPU was held twice")
        with held("cpu") as nothing:
            assert nothing == {}


def test_a_run_without_a_gpu_goes_on_and_records_why(driver: Any) -> None:
    driver(failing=("nvmlInit",))
    with held("cuda") as found:
        assert found == {"gpu": "not reached: the NVIDIA driver cannot be queried: nvmlInit failed"}


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


def test_on_a_gpu_the_runtime_info_reports_the_device() -> None:
    assert unproven({}, "cpu") == ""
    assert unproven({"device": "cuda:0"}, "cuda") == ""
    assert unproven({"device": None}, "cuda") == (
        "cuda was requested, but runtime_info() does not report the device that ran"
    )


def test_an_arm_that_does_not_report_its_class_is_compared_on_a_cpu_alone() -> None:
    plain = {"device": "cuda", "precision": "float32"}
    assert classes({"eager": plain, "hf": {"device": "cuda:0"}}) == "does not report its class of precision: hf"
    assert classes({"eager": plain, "mine": {"device": "cuda"}}) == "does not report its class of precision: mine"
    assert classes({"eager": {"precision": "float32"}, "numpy": {}}) is None
    assert classes({"mine": {"device": "cuda"}}) is None


def test_device_times_measured_in_two_ways_are_not_compared() -> None:
    cold, warm = {"device_time": ["graph: L2 flushed"]}, {"device_time": ["cupti: L2 warm"]}
    assert methods({"eager": cold, "onnx": warm}) == (
        "device times were measured in different ways: eager: graph: L2 flushed; onnx: cupti: L2 warm"
    )
    assert methods({"eager": cold, "eager-static": cold, "numpy": {}}) == (
        "device times of eager, eager-static: graph: L2 flushed"
    )
    assert methods({"numpy": {}}) is None


def test_a_graph_that_copies_between_host_and_device_gets_no_time() -> None:
    onnx = {"device": "cuda", "providers": ["CUDAExecutionProvider"]}
    assert unfit({**onnx, "memcpy_nodes": 0}) is None
    assert unfit({**onnx, "memcpy_nodes": 2}) == (
        "its graphs have 2 Memcpy nodes: they copy between host and device in every step"
    )
    assert unfit(onnx) == "the Memcpy nodes of its graphs were not counted"
    assert unfit({**onnx, "device": "cpu"}) is None
    assert unfit({"device": "cuda", "precision": "float32"}) is None
