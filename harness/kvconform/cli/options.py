"""What all commands share: where they print, options that several have, and how backends are launched."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from kvconform.api import file_name
from kvconform.worker.client import STEP_TIMEOUT, WorkerSpec

screen, errors = Console(highlight=False, soft_wrap=True), Console(stderr=True, highlight=False, soft_wrap=True)

Backends = Annotated[
    list[str], typer.Option("--backend", "-b", help="Installed name, module:Name or file.py:Name. Repeatable.")
]
Device = Annotated[str, typer.Option(help="cpu or cuda; cuda is proven, or the run ends with exit code 3.")]
Out = Annotated[Path, typer.Option("--out", help="Folder of results.")]
Pythons = Annotated[list[str], typer.Option("--python", help="Interpreter of the workers, or BACKEND=INTERPRETER.")]
Seed = Annotated[int, typer.Option(help="Seed of the whole run.")]


def usage(sentence: str) -> typer.Exit:
    errors.print(f"kvconform: {escape(sentence)}")
    return typer.Exit(2)


def launches(
    backends: list[str], device: str, pythons: list[str], step_timeout: float = STEP_TIMEOUT
) -> dict[str, WorkerSpec]:
    """One launch for each backend, by the name of its results."""
    if device not in ("cpu", "cuda"):
        raise usage(f"--device: unknown device {device!r}; known: cpu, cuda")
    common, own = sys.executable, {}
    for item in pythons:
        name, equals, path = item.partition("=")
        if equals:
            own[name] = path
        else:
            common = item
    unknown = sorted(set(own) - set(backends))
    if unknown:
        raise usage(f"--python: no backend {unknown[0]!r} in this run; given: {', '.join(backends)}")
    made = {file_name(b): WorkerSpec(b, device, own.get(b, common), step_timeout) for b in backends}
    if len(made) < len(backends):
        raise usage(f"--backend: two of {', '.join(backends)} would write the same results")
    return made
