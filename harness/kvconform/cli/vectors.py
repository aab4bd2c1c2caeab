"""``kvconform vectors``: sets of programs, inputs and expected outputs as files, and the answers to them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from kvconform.api import file_name
from kvconform.cli.audit import CATALOGUE
from kvconform.cli.options import Device, Dtypes, Json, Seed, StartMethod, StepTimeout, print_json, progress_bar, say
from kvconform.judging.verdict import Reason, Verdict
from kvconform.mutation.fault import load_faults
from kvconform.run.check import counted, foremost, steps
from kvconform.run.run import plan_for
from kvconform.vectors import answer as answers
from kvconform.vectors import judge as judges
from kvconform.vectors import power as powers
from kvconform.vectors import write as writes
from kvconform.vectors.record import Vector
from kvconform.worker.client import STEP_TIMEOUT, WorkerClient, WorkerSpec
from kvconform.worker.start import FORK

app = typer.Typer(
    name="vectors",
    help="Writes test vectors as files, and judges the answers of any program, in any language, to them.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The folder of the set.")]


@app.command()
def write(
    folder: Folder,
    clause: Annotated[
        list[str], typer.Option(help="Only clauses whose name starts with this prefix. May be repeated.")
    ] = [],  # noqa: B006
    config: Annotated[
        list[str], typer.Option(help="Only configs whose name starts with this prefix. May be repeated.")
    ] = [],  # noqa: B006
    dtype: Dtypes = ["float32"],  # noqa: B006
    seed: Seed = 0,
    cases: Annotated[
        int, typer.Option(min=1, help="How many cases of each cell, for each of its claims.")
    ] = writes.CASES,
    as_json: Json = False,
) -> None:
    """Writes a set of vectors to a new folder: manifest.json, and a safetensors file for each vector.

    Without --clause and --config it is the core set: all clauses that are required and that outputs show, but for long
    contexts. The same options and versions give the same bytes.
    """
    plan = plan_for("smoke", seed, dtype, clause, config)
    sizes: list[int] = []
    with progress_bar(quiet=as_json) as bar:
        task = bar.add_task("vectors", total=None)

        def tell(vector: Vector, size: int) -> None:
            sizes.append(size)
            bar.update(task, advance=1, description=f"vectors {vector.name}")

        manifest = writes.write(folder, plan, cases, tell)
    if as_json:
        print_json({"digest": manifest.digest, "vectors": len(manifest.vectors), "bytes": sum(sizes)})
        return
    for line in (*writes.counted(manifest), f"{folder}: {sum(sizes) / 1e6:.1f} MB of tensors; {manifest.digest}"):
        say(line)


@app.command()
def answer(
    folder: Folder,
    out: Annotated[Path, typer.Argument(metavar="ANSWERS", help="The folder to write.")],
    backend: Annotated[
        str, typer.Option("--backend", "-b", help="The backend: an installed name, module:Name or file.py:Name.")
    ],
    device: Device = "cpu",
    python: Annotated[str, typer.Option(help="The interpreter of the worker.")] = sys.executable,
    step_timeout: StepTimeout = STEP_TIMEOUT,
    start_method: StartMethod = FORK,
) -> None:
    """Answers a set with a backend, as any other runner would."""
    with WorkerClient(WorkerSpec(backend, device, python, step_timeout, start_method=start_method)) as client:
        told = answers.answered(folder, client, file_name(backend), out)
    say(f"{told.runner}: answers in {out}; unsupported: {', '.join(told.unsupported) or 'nothing'}")
    for name, failure in told.failures.items():
        say(f"  {name}: step {failure.step} of program {failure.program}: {failure.message}")


@app.command()
def judge(
    folder: Folder,
    given: Annotated[Path, typer.Argument(metavar="ANSWERS", help="The folder with the answers.")],
    out: Annotated[Path, typer.Option("--out", file_okay=False, help="The folder for results.")] = Path("results"),
    as_json: Json = False,
) -> None:
    """Judges the answers of any program. Writes OUT/<runner>.json, and a counterexample for each failure.

    The exit code is that of kvconform run on a part of the suite: 0 if each core clause of the set passed and nothing
    failed, 1 if something failed, 2 if the answers are malformed, 5 if an answer is missing or nothing was judged. What
    a runner does not support is unsupported, and no pass.
    """

    def tell(verdict: Verdict) -> None:
        if as_json or not (verdict.outcome.broken or verdict.reason is Reason.NOTHING_COMPARED):
            return
        say(f"{verdict.clause} on {verdict.backend} [{verdict.config}]: {verdict.sentence}")
        for line in steps(verdict):
            say(line)

    results = judges.judged(folder, given, out / "failures", tell)
    path = out / f"{results.backend}.json"
    results.write(path)
    if as_json:
        print_json(results)
    else:
        for line in (*foremost(results), f"{results.backend}: {results.summary}"):
            say(line)
        programs = sum(verdict.programs for verdict in results.verdicts)
        say(f"  {counted(results.counts)}; {programs} programs in {results.seconds:.0f} s; {path}")
    raise typer.Exit(results.exit_code)


@app.command()
def power(
    folder: Folder,
    names: Annotated[
        list[str], typer.Argument(metavar="[FAULTS]...", help="Only faults whose name starts with one of these.")
    ] = [],  # noqa: B006
    faults: Annotated[str, typer.Option(help="The list of faults: module:LIST or path/file.py:LIST.")] = CATALOGUE,
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write.")] = Path("results/vectors-power.json"),
    as_json: Json = False,
) -> None:
    """Runs planted faults as runners, and says which of them the set detects. The exit code is 1 if one that outputs
    can show is not detected."""
    chosen = [fault for fault in load_faults(faults) if fault.name.startswith(tuple(names) or "")]

    def tell(tried: powers.Tried) -> None:
        if not as_json and not tried.detected_by:
            say(f"{tried.fault}: {tried.sentence}")

    found = powers.power(folder, chosen, tell)
    found.write(out)
    if as_json:
        print_json(found)
    else:
        say(f"{found.detected} of {found.shown} faults that outputs can show are detected; {out}")
    raise typer.Exit(int(found.detected < found.shown))
