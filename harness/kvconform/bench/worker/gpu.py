"""The GPU as a worker and the controller see it: its clock, what holds that down, its lock, and what may be compared.

Nothing but the standard library is needed here. The driver is asked through its own two libraries: ``libcuda`` for
what belongs to the CUDA device of this process (which ``CUDA_VISIBLE_DEVICES`` may have renumbered), ``libnvidia-ml``
(NVML) for the clock. Clocks are read, never set.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar

from kvconform.errors import GpuBusy

MIN_CLOCK_FRACTION = 0.75
"""The part of the default clock under which a block is dropped, as NVIDIA's nvbench does."""

CLOCK_RATE, L2_CACHE_SIZE = 13, 38
"""``CUdevice_attribute`` (cuda.h): its typical clock in kHz; bytes of L2."""
CLOCK_SM = 1
"""``nvmlClockType_t`` (nvml.h)."""
TEXT = 96
"""Bytes of a text buffer: as many as the longest of NVML's, a UUID's (``NVML_DEVICE_UUID_V2_BUFFER_SIZE``), needs."""
REASONS = {
    0x002: "clocks were set by someone",
    0x004: "power cap",
    0x008: "hardware slowdown",
    0x010: "sync boost",
    0x020: "software thermal slowdown",
    0x040: "hardware thermal slowdown",
    0x080: "power brake",
    0x100: "display clock setting",
}
"""``nvmlClocksEventReason*`` (nvml.h). That the GPU is idle (0x001) holds no block down: it is read after the block."""


class NoGpu(Exception):
    """There is no GPU whose clock can be read: one sentence."""


class Gpu:
    """One GPU. ``default_mhz``: its typical clock; ``l2_bytes``: of its second-level cache. Both
    come from the CUDA driver: NVML's default application clock is deprecated, and set by whoever runs the machine."""

    def __init__(self, cuda: Any, nvml: Any, index: int = 0) -> None:
        """``cuda`` and ``nvml`` are the two libraries, ``index`` is a CUDA device's. Raises NoGpu."""
        self._nvml, self._handle = nvml, ctypes.c_void_p()
        number, place = ctypes.c_int(), ctypes.create_string_buffer(TEXT)
        _driver(cuda, "cuInit", ctypes.c_uint(0))
        _driver(cuda, "cuDeviceGet", ctypes.byref(number), ctypes.c_int(index))
        _driver(cuda, "cuDeviceGetPCIBusId", place, ctypes.c_int(TEXT), number)
        self.default_mhz = _attribute(cuda, CLOCK_RATE, number) // 1000
        self.l2_bytes = _attribute(cuda, L2_CACHE_SIZE, number)
        self._ask("nvmlInit_v2")
        self._ask("nvmlDeviceGetHandleByPciBusId_v2", ctypes.c_char_p(place.value), ctypes.byref(self._handle))
        self.uuid, self.name = self._text("nvmlDeviceGetUUID"), self._text("nvmlDeviceGetName")
        self.clocked = True
        self.clocked = self.sm_mhz() > 0

    @classmethod
    def reach(cls, index: int = 0) -> Gpu:
        """The GPU of this process's CUDA device ``index``. Raises NoGpu with the reason."""
        windows = sys.platform == "win32"
        names = ("nvcuda.dll", "nvml.dll") if windows else ("libcuda.so.1", "libnvidia-ml.so.1")
        try:
            cuda, nvml = (ctypes.CDLL(name) for name in names)
        except OSError as error:
            raise NoGpu(f"the NVIDIA driver's libraries are not there: {error}") from error
        return cls(cuda, nvml, index)

    @classmethod
    def open(cls, index: int = 0) -> Gpu | None:
        """As ``reach``; None where there is none."""
        with suppress(NoGpu):
            return cls.reach(index)
        return None

    def sm_mhz(self) -> int:
        """The clock of the multiprocessors at this moment, to be read right after a block; 0 where NVML tells none
        (as under some virtual GPUs)."""
        mhz = ctypes.c_uint()
        asked = ctypes.c_int(CLOCK_SM), ctypes.byref(mhz)
        return mhz.value if self.clocked and self._code("nvmlDeviceGetClockInfo", self._handle, *asked) == 0 else 0

    def throttle(self) -> int:
        """What holds the clock down at this moment, to be read right after a block: bits of ``REASONS``; 0: nothing,
        or NVML does not tell."""
        bits = ctypes.c_ulonglong()
        # drivers before R535 have the older name alone
        for name in ("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons"):
            if hasattr(self._nvml, name):
                if self._code(name, self._handle, ctypes.byref(bits)) != 0:
                    return 0
                break
        return bits.value & sum(REASONS)

    def fingerprint(self) -> dict[str, Any]:
        """What a record tells of the GPU; times of two of them are never compared."""
        return {
            "gpu": self.name,
            "uuid": self.uuid,
            "default_mhz": self.default_mhz,
            "l2_bytes": self.l2_bytes,
            "clock": "read after each block" if self.clocked else "NVML tells none: no block can be dropped",
        }

    @contextmanager
    def lock(self, folder: Path | None = None) -> Iterator[None]:
        """Only one process at a time is inside, whoever's it is: the controller's, while its workers are timed.
        Raises GpuBusy at once where another is. The system gives the lock back when a process dies, and the file stays:
        to delete it would let two processes hold two files of one name."""
        path = (folder or _shared()) / f"kvconform-{re.sub(r'[^A-Za-z0-9-]', '_', self.uuid)}.lock"
        handle, writable = _opened(path)
        try:
            if not _hold(handle):
                holder = os.read(handle, 20).decode(errors="replace").strip() or "unknown"
                raise GpuBusy(f"{self.name} ({self.uuid}) is being timed by another process, {holder}; see {path}")
            if writable:
                os.ftruncate(handle, 0)
                os.write(handle, f"{os.getpid()}\n".encode())
            yield
        finally:
            os.close(handle)  # which gives the lock back

    def _code(self, name: str, *arguments: Any) -> int:
        return int(getattr(self._nvml, name)(*arguments))

    def _ask(self, name: str, *arguments: Any) -> None:
        code = self._code(name, *arguments)
        if code != 0:
            self._nvml.nvmlErrorString.restype = ctypes.c_char_p
            words = self._nvml.nvmlErrorString(ctypes.c_int(code)) or b"no words"
            raise NoGpu(f"{name} failed with code {code}: {words.decode(errors='replace')}")

    def _text(self, name: str) -> str:
        text = ctypes.create_string_buffer(TEXT)
        self._ask(name, self._handle, text, ctypes.c_uint(TEXT))
        return text.value.decode(errors="replace")


@contextmanager
def held(device: str) -> Iterator[dict[str, Any]]:
    """What a record tells of the GPU, which belongs to this process meanwhile; on a CPU nothing. Where no GPU can be
    reached the reason is told and the run goes on: each backend says by itself what it lacks. Raises GpuBusy."""
    gpu, why = None, ""
    if device == "cuda":
        try:
            gpu = Gpu.reach()
        except NoGpu as reason:
            why = str(reason)
    if gpu is None:
        yield {"gpu": f"not reached: {why}"} if why else {}
    else:
        with gpu.lock():
            yield gpu.fingerprint()


def _driver(cuda: Any, name: str, *arguments: Any) -> None:
    code = int(getattr(cuda, name)(*arguments))
    if code != 0:
        raise NoGpu(f"{name} failed with code {code}: no such CUDA device, or no driver that runs")


def _attribute(cuda: Any, attribute: int, number: ctypes.c_int) -> int:
    value = ctypes.c_int()
    _driver(cuda, "cuDeviceGetAttribute", ctypes.byref(value), ctypes.c_int(attribute), number)
    return value.value


def _shared() -> Path:
    """One folder for all users and whatever TMPDIR says: else two benchmarks would hold two locks."""
    return Path("/tmp" if os.name == "posix" else tempfile.gettempdir())


def _opened(path: Path) -> tuple[int, bool]:
    """A handle of the file, and whether it may be written: another user's may only be read, which is enough to lock."""
    no_link = getattr(os, "O_NOFOLLOW", 0)
    try:
        return os.open(path, os.O_CREAT | os.O_RDWR | no_link, 0o666), True
    except PermissionError:
        return os.open(path, os.O_RDONLY | no_link), False


if sys.platform == "win32":
    import msvcrt

    def _hold(handle: int) -> bool:
        """Locks a byte far behind the process id, which others may read then."""
        os.lseek(handle, 1 << 20, os.SEEK_SET)
        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        finally:
            os.lseek(handle, 0, os.SEEK_SET)
        return True
else:
    import fcntl

    def _hold(handle: int) -> bool:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


# --- what may be summarised, and compared ---
class Clocked(Protocol):
    """A timed block: ``stopwatch.Block``, ``record.Round`` or ``gate_record.GateBlock``."""

    @property
    def sm_mhz(self) -> int: ...


Timed = TypeVar("Timed", bound=Clocked)


def default_mhz(machine: Mapping[str, Any]) -> int:
    """Of the GPU that a record's ``machine`` tells of (``Gpu.fingerprint``); 0 without one."""
    return int(machine.get("default_mhz", 0))


def kept(blocks: Iterable[Timed], default_mhz: int) -> tuple[list[Timed], int]:
    """The blocks that count (``fast``), in their order, and how many do not."""
    every = list(blocks)
    found = [block for block in every if fast(block, default_mhz)]
    return found, len(every) - len(found)


def fast(block: Clocked, default_mhz: int) -> bool:
    """Whether a block ran at ``MIN_CLOCK_FRACTION`` of the default clock or above, or without a clock (0: on a CPU, or NVML tells
    none)."""
    return block.sm_mhz == 0 or block.sm_mhz >= MIN_CLOCK_FRACTION * default_mhz


RuntimeInfos = Mapping[str, Mapping[str, Any]]
"""What really ran, by backend (``Backend.runtime_info``)."""


def classes(runtime_infos: RuntimeInfos) -> str | None:
    """Why arms must not be compared, in one sentence: they compute in different classes of precision (TF32 is three
    digits and several times the speed), or on a GPU one does not tell its own. None: nothing is against it."""
    told = {name: str(seen["precision"]) for name, seen in runtime_infos.items() if "precision" in seen}
    silent = [name for name, seen in runtime_infos.items() if name not in told and _on_gpu(seen)]
    if len(runtime_infos) > 1 and silent:
        return f"does not tell its class of precision: {', '.join(silent)}"
    return _differing(told, "classes of precision differ")


def methods(runtime_infos: RuntimeInfos) -> str | None:
    """Why the device times of arms must not be compared: they were measured in different ways, or with L2 in another
    state. Step wall is not concerned."""
    return _differing(_ways(runtime_infos), "device times were measured in different ways")


def ways(runtime_infos: RuntimeInfos) -> str | None:
    """How device times came about, where that was the same for all that tell: the way, and the state of L2."""
    told = _ways(runtime_infos)
    return f"device times of {', '.join(told)}: {next(iter(told.values()))}" if told else None


def _ways(runtime_infos: RuntimeInfos) -> dict[str, str]:
    return {name: " and ".join(seen["device_time"]) for name, seen in runtime_infos.items() if seen.get("device_time")}


def _on_gpu(runtime_info: Mapping[str, Any]) -> bool:
    return str(runtime_info.get("device")).startswith("cuda")


def _differing(told: Mapping[str, str], what: str) -> str | None:
    if len(set(told.values())) < 2:
        return None
    return f"{what}: " + "; ".join(f"{name}: {words}" for name, words in told.items())


def unfit(runtime_info: Mapping[str, Any]) -> str | None:
    """Why an arm on a GPU gets no time though its outputs are right: ONNX Runtime put nodes into its graph that copy
    between host and device in every step, or nobody has counted them. None: nothing is against it."""
    if not _on_gpu(runtime_info) or "providers" not in runtime_info:
        return None
    count = runtime_info.get("memcpy_nodes")
    if count is None:
        return "nobody has counted the Memcpy nodes of its graphs"
    return f"its graphs have {count} Memcpy nodes: they copy between host and device in every step" if count else None
