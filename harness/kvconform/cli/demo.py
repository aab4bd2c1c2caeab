"""``kvconform demo``: a right cache and a broken one, judged in a few seconds."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from kvconform.api import file_name
from kvconform.cli.options import Json, print_json, say
from kvconform.results.results import Results
from kvconform.run import check as checks
from kvconform.run.run import plan_for, run_backend
from kvconform.worker.client import WorkerSpec

RIGHT, BROKEN = "numpy", "kvconform_backends.faults.causality:TopLeft"
CONFIG, CLAUSES = "attention-gqa", ("shape.output", "causality.", "equivalence.decode", "equivalence.chunks")


def demo(
    out: Annotated[Path, typer.Option("--out", file_okay=False, help="The folder for results.")] = Path("results/demo"),
    as_json: Json = False,
) -> None:
    """Judges a right cache and a broken one in a few seconds, without any framework.

    The exit code is 0 if the right one passes and the mistake of the other is found.
    """
    plan = plan_for("smoke", clauses=CLAUSES, configs=(CONFIG,), explain=True)
    found = []
    for address in (RIGHT, BROKEN):
        name = file_name(address)
        shutil.rmtree(out / "failures" / name, ignore_errors=True)  # of an earlier demo
        found.append(run_backend(name, WorkerSpec(address), plan, out))
        if not as_json:
            _print(found[-1])
    right, broken = found
    if as_json:
        print_json(found)
    else:
        _print_next(broken, out)
    raise typer.Exit(0 if right.ok and broken.failures else 1)


def _print(results: Results) -> None:
    programs = sum(verdict.programs for verdict in results.verdicts)
    title = "A right cache:"
    if results.backend != RIGHT:
        title = "\nThe same cache, with a causal mask that begins at the top left:"
    say(title, style="bold")
    if results.ok:
        say(f"  each output of {programs} programs is what attention without a cache gives", style="green")
    for verdict in results.failures[:1]:
        say(f"  {verdict.clause}: {verdict.sentence}", style="red")
    for line in (*checks.diagnosed(results), *checks.maps(results, drawn=1)):
        say(line)
    say(f"{results.backend}: {checks.counted(results.counts)}; {programs} programs in {results.seconds:.0f} s")


def _replay(results: Results, out: Path) -> str:
    return f"kvconform replay {out / 'failures' / results.backend / results.failures[0].counterexample}"


def _print_next(broken: Results, out: Path) -> None:
    """What to type next; each line works as it stands or names what to put in."""
    lines = {
        "kvconform check my_module.py:MyAttention": "your module, ONNX decoder or transformers model, as it is",
        "kvconform run -b my_cache.py:MyCache": "your cache, with an adapter",
        "kvconform init": "a configuration and a workflow for this repository",
        f"kvconform report {out / RIGHT}.json {out / broken.backend}.json": "the report of this demo as a page",
        "kvconform spec equivalence.decode": "what that clause asks, and which bugs it stops",
    }
    if broken.failures:
        lines = {f"{_replay(broken, out)}": "the smallest failing program again, in a new process", **lines}
    say("\nNext:", style="bold")
    for command, words in lines.items():
        say(f"  {command}\n      {words}")
