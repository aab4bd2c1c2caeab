"""Runs the command line in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def kvconform(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kvconform", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
