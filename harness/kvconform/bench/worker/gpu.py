"""The GPU as a worker and its parent see it: its clock, what reduces that, its lock, and what may be compared.

The driver is queried through NVML (``pynvml``, of the extra ``cuda``). Clocks are read, never set.
"""

from __future__ import annotations

import importlib
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
"""The share of the default clock below which a block is dropped, as in NVIDIA's nvbench."""
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
"""``nvmlClocksEventReason*`` (nvml.h). An idle GPU (0x001) slows no block: the reasons are read after the block."""
ORDER = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
"""In every timed worker's environment: CUDA numbers its devices as NVML does."""


class NoGpu(Exception):
    """There is no GPU whose clock can be read: one sentence."""


class Gpu:
    """The first CUDA device of this process. ``default_mhz``: the maximum of its SM clock, which it runs at unless
    something reduces it (NVML's default application clock is deprecated, and set by the machine's operator)."""

    def __init__(self) -> None:
        """Raises NoGpu with the reason."""
        try:
            pynvml: Any = importlib.import_module("pynvml")
        except ImportError as error:
            raise NoGpu(f"nvidia-ml-py cannot be imported ({error}): pip install 'kvconform[cuda]'") from error
        self._nvml = pynvml
        try:
            pynvml.nvmlInit()
            self._handle = self._visible(os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip())
            self.uuid, self.name = pynvml.nvmlDeviceGetUUID(self._handle), pynvml.nvmlDeviceGetName(self._handle)
            self.default_mhz = int(pynvml.nvmlDeviceGetMaxClockInfo(self._handle, pynvml.NVML_CLOCK_SM))
        except pynvml.NVMLError as error:
            raise NoGpu(f"the NVIDIA driver cannot be queried: {error}") from error

    @classmethod
    def open(cls) -> Gpu | None:
        """None if there is no GPU."""
        with suppress(NoGpu):
            return cls()
        return None

    def _visible(self, device: str) -> Any:
        """The handle behind an entry of CUDA_VISIBLE_DEVICES: a number, or a UUID or its beginning; for an instance
        (MIG) the handle of its GPU."""
        nvml = self._nvml
        if device.isdecimal():
            return nvml.nvmlDeviceGetHandleByIndex(int(device))
        if device.startswith("MIG-"):
            return nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(nvml.nvmlDeviceGetHandleByUUID(device))
        for handle in map(nvml.nvmlDeviceGetHandleByIndex, range(nvml.nvmlDeviceGetCount())):
            if device and nvml.nvmlDeviceGetUUID(handle).startswith(device):
                return handle
        raise NoGpu(f"CUDA_VISIBLE_DEVICES names no GPU: {device!r}")

    def sm_mhz(self) -> int:
        """The SM clock in MHz at this moment, to be read right after a block; 0 if NVML does not report it (as under
        some virtual GPUs)."""
        with suppress(self._nvml.NVMLError):
            return int(self._nvml.nvmlDeviceGetClockInfo(self._handle, self._nvml.NVML_CLOCK_SM))
        return 0

    def throttle(self) -> int:
        """What reduces the clock at this moment, to be read right after a block: bits of ``REASONS``; 0: nothing, or
        NVML does not report it."""
        for name in ("Event", "Throttle"):  # drivers before R535 have the older name alone
            with suppress(self._nvml.NVMLError):
                return int(getattr(self._nvml, f"nvmlDeviceGetCurrentClocks{name}Reasons")(self._handle)) & sum(REASONS)
        return 0

    def fingerprint(self) -> dict[str, Any]:
        """The GPU in a record; times of two GPUs are never compared."""
        clock = "read after each block" if self.sm_mhz() else "NVML does not report it: no block can be dropped"
        return {"gpu": self.name, "uuid": self.uuid, "default_mhz": self.default_mhz, "clock": clock}

    @contextmanager
    def lock(self, folder: Path | None = None) -> Iterator[None]:
        """Only one process at a time is inside: the parent, while its workers are timed. Raises GpuBusy at once if
        another one is. The system releases the lock when a process dies. The file stays: if it were deleted, two
        processes could hold two files of one name."""
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
            os.close(handle)  # which releases the lock


@contextmanager
def held(device: str) -> Iterator[dict[str, Any]]:
    """The GPU in a record, which belongs to this process meanwhile; empty on a CPU. If no GPU can be reached, the
    reason is recorded and the run goes on: each backend reports what it lacks. Raises GpuBusy."""
    if device != "cuda":
        yield {}
        return
    try:
        gpu = Gpu()
    except NoGpu as reason:
        yield {"gpu": f"not reached: {reason}"}
        return
    with gpu.lock():
        yield gpu.fingerprint()


def _shared() -> Path:
    """One folder for all users, whatever TMPDIR is: otherwise two benchmarks would hold two locks."""
    return Path("/tmp" if os.name == "posix" else tempfile.gettempdir())


def _opened(path: Path) -> tuple[int, bool]:
    """A handle of the file, and whether it is writable: another user's can only be read, which suffices for a lock."""
    no_link = getattr(os, "O_NOFOLLOW", 0)
    try:
        return os.open(path, os.O_CREAT | os.O_RDWR | no_link, 0o666), True
    except PermissionError:
        return os.open(path, os.O_RDONLY | no_link), False


if sys.platform == "win32":
    import msvcrt

    def _hold(handle: int) -> bool:
        """Locks a byte far behind the process id, so that others can read that."""
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
    """A timed block: ``timer.Block`` or ``record.Round``."""

    @property
    def sm_mhz(self) -> int: ...


Timed = TypeVar("Timed", bound=Clocked)


def default_mhz(machine: Mapping[str, Any]) -> int:
    """The default clock of the GPU in a record's ``machine`` (``Gpu.fingerprint``); 0 without a GPU."""
    return int(machine.get("default_mhz", 0))


def kept(blocks: Iterable[Timed], default_mhz: int) -> tuple[list[Timed], int]:
    """The blocks that count (``fast``), in their order, and the number of the others."""
    every = list(blocks)
    found = [block for block in every if fast(block, default_mhz)]
    return found, len(every) - len(found)


def fast(block: Clocked, default_mhz: int) -> bool:
    """Whether a block ran at ``MIN_CLOCK_FRACTION`` of the default clock or above, or no clock was read (0)."""
    return block.sm_mhz == 0 or block.sm_mhz >= MIN_CLOCK_FRACTION * default_mhz


RuntimeInfos = Mapping[str, Mapping[str, Any]]
"""What really ran, by backend (``Backend.runtime_info``)."""


def classes(runtime_infos: RuntimeInfos) -> str | None:
    """Why arms must not be compared, in one sentence: they compute in different classes of precision (TF32 is three
    digits and several times the speed), or one on a GPU does not report its class. None: they may be compared."""
    found = {name: str(info["precision"]) for name, info in runtime_infos.items() if "precision" in info}
    silent = [name for name, info in runtime_infos.items() if name not in found and _on_gpu(info)]
    if len(runtime_infos) > 1 and silent:
        return f"does not report its class of precision: {', '.join(silent)}"
    return _differing(found, "classes of precision differ") if len(set(found.values())) > 1 else None


def methods(runtime_infos: RuntimeInfos) -> str | None:
    """How device times were measured, and in which state of L2: in one way, or in different ways, and then they must
    not be compared. None: there are none. Step wall is not concerned."""
    found = {name: " and ".join(i["device_time"]) for name, i in runtime_infos.items() if i.get("device_time")}
    if len(set(found.values())) > 1:
        return _differing(found, "device times were measured in different ways")
    return f"device times of {', '.join(found)}: {next(iter(found.values()))}" if found else None


def _on_gpu(runtime_info: Mapping[str, Any]) -> bool:
    return str(runtime_info.get("device")).startswith("cuda")


def _differing(found: Mapping[str, str], what: str) -> str:
    return f"{what}: " + "; ".join(f"{name}: {words}" for name, words in found.items())


def unfit(runtime_info: Mapping[str, Any]) -> str | None:
    """Why an arm on a GPU may not be timed though its outputs are right: ONNX Runtime put nodes into its graph that
    copy between host and device in every step, or they were not counted. None: it may be timed."""
    if not _on_gpu(runtime_info) or "providers" not in runtime_info:
        return None
    count = runtime_info.get("memcpy_nodes")
    if count is None:
        return "the Memcpy nodes of its graphs were not counted"
    return f"its graphs have {count} Memcpy nodes: they copy between host and device in every step" if count else None
