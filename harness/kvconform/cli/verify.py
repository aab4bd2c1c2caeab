"""``kvconform verify``: whether a results file says what running a part of it again finds."""

from __future__ import annotations

import secrets
import sys
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from kvconform.cli.options import Json, Out, StartMethod, StepTimeout, print_json, say
from kvconform.errors import BadArgument
from kvconform.results import results
from kvconform.run import verify as verifying
from kvconform.run.run import artefacts
from kvconform.run.verify import Agreement, Rechecked
from kvconform.worker.client import STEP_TIMEOUT, WorkerClient, WorkerSpec
from kvconform.worker.start import FORK

STYLES = {Agreement.DIFFERS: "red", Agreement.OTHER_PROGRAMS: "yellow", Agreement.UNDECIDED: "yellow"}

COUNTED = {
    Agreement.AGREES: "agree",
    Agreement.DIFFERS: "differ",
    Agreement.OTHER_PROGRAMS: "had other programs",
    Agreement.UNDECIDED: "undecided",
}


def verify(
    file: Annotated[Path, typer.Argument(metavar="RESULTS", help="A results file.")],
    number: Annotated[int, typer.Option("--sample", min=1, help="How many cells are run again.")] = 20,
    seed: Annotated[
        int | None,
        typer.Option(help="The seed of the sample; default: another one each time, so that no author can know it."),
    ] = None,
    backend: Annotated[str, typer.Option("--backend", "-b", help="The backend; default: the one in the file.")] = "",
    out: Out = Path("results/verify"),
    python: Annotated[str, typer.Option(help="The interpreter of the worker.")] = sys.executable,
    step_timeout: StepTimeout = STEP_TIMEOUT,
    start_method: StartMethod = FORK,
    as_json: Json = False,
) -> None:
    """Runs a random sample of the cells of a results file again, and says whether they agree.

    The exit code is 0 if all that could be compared agree, 1 if a cell differs, 5 if none could be compared: under
    another Hypothesis the programs are others.
    """
    before = results.read(file)
    if before.served is not None:
        words = f"{file} is of a serving engine: run it again, and compare the two with kvconform diff"
        raise BadArgument("file", str(file), sentence=words)
    drawn = secrets.randbelow(2**31) if seed is None else seed
    keys = verifying.sample(before, number, drawn)
    address = backend or next(verdict.backend for verdict in before.verdicts)
    spec = WorkerSpec(address, before.device, python, step_timeout, start_method=start_method)
    spec.environment["KVCONFORM_ARTEFACTS"] = artefacts(out)
    stored, found = (folder / "failures" / before.backend for folder in (file.parent, out))

    def tell(one: Rechecked) -> None:
        why = f": {one.sentence}" if one.sentence else ""
        outcomes = one.was.value if one.was is one.now else f"{one.was.value}, now {one.now.value}"
        if not as_json:
            text = f"{one.agreement.value}: {one.clause} [{one.config}]: {outcomes}{why}"
            say(text, style=STYLES.get(one.agreement, ""))

    with WorkerClient(spec) as client:
        checked = verifying.verify(before, keys, drawn, client, stored, found, tell)
    if as_json:
        print_json({**msgspec.to_builtins(checked), "exit_code": checked.exit_code})
        raise typer.Exit(checked.exit_code)
    for note in checked.notes:
        say(f"  note: {note}")
    counts = ", ".join(f"{checked.count(one)} {words}" for one, words in COUNTED.items() if checked.count(one))
    again = f"{len(checked.cells)} of {checked.of} decided cells were run again"
    say(f"{before.backend}: {again} (--seed {drawn}): {counts}")
    raise typer.Exit(checked.exit_code)
