"""The machine, and how busy it is. Times of two machines are never compared."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any


def load_average() -> float:
    """The load average of the last minute; 0 if the system has none."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else 0.0


def machine() -> dict[str, Any]:
    """What identifies this kind of machine: processor, cores, platform."""
    model = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    return {"cpu": model, "cores": os.cpu_count() or 1, "platform": platform.platform(), "machine": platform.machine()}
