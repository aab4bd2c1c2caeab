"""Runs the command line: in a process of its own, or in this one, which takes a twentieth of the time."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import traceback
from pathlib import Path

from typer.testing import CliRunner


def kvconform(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kvconform", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)


def kvconform_here(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """What ``kvconform`` gives in a process of its own; an exception that escapes is a traceback in ``stderr``."""
    from kvconform.cli.main import app

    with contextlib.chdir(folder):
        done = CliRunner().invoke(app, list(arguments), prog_name="kvconform")
    escaped = done.exception if not isinstance(done.exception, SystemExit) else None
    trace = "".join(traceback.format_exception(escaped)) if escaped else ""
    return subprocess.CompletedProcess(arguments, done.exit_code, done.stdout, done.stderr + trace)
