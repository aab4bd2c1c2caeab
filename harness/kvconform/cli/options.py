"""What the commands share: how they print, options that several have, and how backends are started."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from kvconform.api import file_name
from kvconform.search.effort import EFFORTS
from kvconform.worker.client import DEVICES, STEP_TIMEOUT, WorkerSpec
from kvconform.worker.start import FORK, START_METHODS
from kvconform_specs.config import DTYPES

plain = partial(Console, soft_wrap=True, markup=False, emoji=False, highlight=False)
"""A console that prints text as it is: names, paths and messages are never read as markup or as emoji."""
screen, errors = plain(), plain(stderr=True)

Backends = Annotated[
    list[str],
    typer.Option(
        "--backend", "-b", help="The backend: an installed name, module:Name or file.py:Name. May be repeated."
    ),
]
Device = Annotated[
    str,
    typer.Option(
        help=f"{' or '.join(DEVICES)}. With cuda, the backend must report the device that computed its outputs; "
        "otherwise no clause passes and nothing is timed."
    ),
]
Dtypes = Annotated[list[str], typer.Option("--dtype", help=f"{', '.join(DTYPES)}. May be repeated.")]
EffortName = Annotated[str, typer.Option("--effort", help=f"How much to try for each cell: {', '.join(EFFORTS)}.")]
Jobs = Annotated[int, typer.Option(min=1, help="How many processes judge configs at once; results are the same.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on standard output.")]
Junit = Annotated[Path | None, typer.Option(help="Also write JUnit XML.")]
On = Annotated[
    str, typer.Option(help="Use a Ray cluster: ray (of this machine) or ray:ADDRESS. Default: this machine alone.")
]
Out = Annotated[Path, typer.Option("--out", file_okay=False, help="The folder for results.")]
Pythons = Annotated[
    list[str],
    typer.Option(
        "--python",
        help="The interpreter of the workers: a path for all backends, or BACKEND=PATH for one. May be repeated.",
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print the conclusion only.")]
Seed = Annotated[int, typer.Option(help="The seed of the run; the same seed draws the same programs.")]
StepTimeout = Annotated[float, typer.Option(help="Seconds without progress after which a worker is killed.")]

StartMethod = Annotated[
    str,
    typer.Option(
        help=f"How workers are started: {' or '.join(START_METHODS)}. Default: forked from a process that has imported "
        "the frameworks, where that is possible (Linux, CPU). Verdicts are the same."
    ),
]


def say(text: str, console: Console = screen, style: str = "") -> None:
    """Prints text as it is, at once: a run that is killed has shown what it had. ``style``: its colour on a terminal,
    where NO_COLOR is not set."""
    console.print(text, style=style or None)
    console.file.flush()


def print_json(data: Any) -> None:
    """Prints a record, or a list of records, as JSON."""
    print(json.dumps(msgspec.to_builtins(data), indent=1))


def usage(sentence: str) -> typer.Exit:
    say(f"kvconform: {sentence}", errors)
    return typer.Exit(2)


def duration(seconds: float) -> str:
    """``40 s``, ``2 min 20 s``, ``1 h 5 min``."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def progress_bar(quiet: bool = False) -> Progress:
    """A bar on a terminal with what is running and how long the rest takes; nothing elsewhere."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}", markup=False),
        TextColumn("{task.fields[running]}", markup=False),
        console=screen,
        transient=True,
        disable=quiet or not screen.is_terminal,
    )


def worst(codes: list[int]) -> int:
    """The exit code of several backends: failures first, then regressions, missing infrastructure, undecided."""
    return next((code for code in (1, 4, 3, 5) if code in codes), 0)


def launches(
    backends: list[str], device: str, pythons: list[str], step_timeout: float = STEP_TIMEOUT, start_method: str = FORK
) -> dict[str, WorkerSpec]:
    """How to start each backend, by the name of its results."""
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
    made = {
        file_name(b): WorkerSpec(b, device, own.get(b, common), step_timeout, start_method=start_method)
        for b in backends
    }
    if len(made) < len(backends):
        raise usage(f"--backend: two of {', '.join(backends)} would write the same results")
    return made
