"""The machine, and how busy it is. Times of two machines are never compared."""

from __future__ import annotations

import os
import platform
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any


def load_average() -> float:
    """The load average of the last minute; 0 if the system has none."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else 0.0


def oom_kills() -> int | None:
    """How many processes the system's out-of-memory killer has ended, as far as can be read (control group, kernel);
    None where no count can be read."""
    counts = [_field(path, "oom_kill") for path in (*_cgroup_files("memory.events", "memory.oom_control"), VMSTAT)]
    known = [count for count in counts if count is not None]
    return sum(known) if known else None


def free_memory() -> int | None:
    """Bytes that a process can still get: of the machine, and of the control group; None where it cannot be known."""
    available = _field(Path("/proc/meminfo"), "MemAvailable:")
    if available is None:
        return None
    free = [available * 1024]
    for limit, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
        for file in _cgroup_files(limit):
            most, now = _number(file), _number(file.with_name(used))
            if most is not None and now is not None:  # a cache of files is given back when memory is asked for
                free.append(most - now + (_field(file.with_name("memory.stat"), "inactive_file") or 0))
    return min(free)


def peak_memory(process: int) -> int | None:
    """The most bytes that a process has held in memory; None where it cannot be known."""
    peak = _field(Path(f"/proc/{process}/status"), "VmHWM:")
    return None if peak is None else peak * 1024


def address_space_limited(process: int) -> bool:
    """Whether a process may only use so much address space (``ulimit -v``)."""
    try:
        import resource

        return resource.prlimit(process, resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY
    except (ImportError, AttributeError, OSError):  # not on Linux, or the process has gone
        return False


VMSTAT = Path("/proc/vmstat")


def _cgroup_files(*names: str) -> list[Path]:
    """Where this process' control group for memory, of version 2 or 1, may have these files."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers == "" or "memory" in controllers.split(","):
            root = Path("/sys/fs/cgroup", "memory" if controllers else "")
            folder = root / path.lstrip("/")
            found.append(folder if folder.is_dir() else root)  # a container may see its own group as the root
    return [folder / name for folder in found for name in names]


def _field(path: Path, name: str) -> int | None:
    """The number beside a name in a file of lines ``name number``; None where there is none."""
    with suppress(OSError):
        for line in path.read_text().splitlines():
            words = line.split()
            if len(words) > 1 and words[0] == name and words[1].isdecimal():
                return int(words[1])
    return None


def _number(path: Path) -> int | None:
    with suppress(OSError, ValueError):
        return int(path.read_text())
    return None  # no such file, or "max"


def gpu() -> dict[str, str]:
    """Name and driver of the first GPU that CUDA may use, as ``gpu`` and ``driver``; what is not known is left out."""
    query = ["nvidia-smi", "--query-gpu=index,uuid,name,driver_version", "--format=csv,noheader"]
    try:
        listed = subprocess.run(query, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    rows = [[field.strip() for field in line.split(",")] for line in listed.splitlines()]
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0].strip()
    for index, uuid, name, driver in (row for row in rows if len(row) == 4):
        if index == first or (first.startswith("GPU-") and uuid.startswith(first)):
            return {"gpu": name, "driver": driver}
    return {"driver": rows[0][3]} if rows and len(rows[0]) == 4 else {}  # an instance (MIG) is in no such list


def machine() -> dict[str, Any]:
    """What identifies this kind of machine: processor, cores, platform."""
    model = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    return {"cpu": model, "cores": os.cpu_count() or 1, "platform": platform.platform(), "machine": platform.machine()}
