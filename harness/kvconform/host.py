"""What this machine is and how busy it is: times of two machines are never compared."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any


def load_average() -> float:
    """Of the last minute; 0 where the system keeps none."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else 0.0


def machine() -> dict[str, Any]:
    """The fingerprint of this machine."""
    model = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    return {"cpu": model, "cores": os.cpu_count() or 1, "platform": platform.platform(), "machine": platform.machine()}
