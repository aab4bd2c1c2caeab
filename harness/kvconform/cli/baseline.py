"""``kvconform gate`` and ``merge``: results against a baseline, and the parts of a run together."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import typer

from kvconform.cli.options import Json, print_json, say
from kvconform.results import gate as gates
from kvconform.results import merge as merging
from kvconform.results import results
from kvconform.results.diff import words

MARKS = {
    gates.OK: "note",
    gates.NEW_FAILURE: "new failure",
    gates.REGRESSION: "regression",
    gates.UNDECIDED: "undecided",
}
CONCLUSIONS = {
    gates.OK: "no regression",
    gates.NEW_FAILURE: "new failures",
    gates.REGRESSION: "regressed",
    gates.UNDECIDED: "undecided",
}


def gate(
    files: Annotated[list[Path], typer.Argument(metavar="RESULTS...", help="The results files to compare.")],
    baseline: Annotated[Path, typer.Option(help="A results file, or a folder of them, to compare with.")],
    as_json: Json = False,
) -> None:
    """Compares results with a baseline.

    The exit code is 4 if a pass on the same programs, a clause or a claim was lost; else 1 for a failure that the
    baseline does not have; else 5 if something could not be decided. Cells that had other programs, because the effort
    or the seed differs, for example, are counted; they are no regression.
    """
    records, codes = [], []
    for file in files:
        now = results.read(file)
        differences = gates.compare(now, results.read(baseline / file.name if baseline.is_dir() else baseline))
        codes.append(gates.exit_code(differences))
        found = [{**msgspec.to_builtins(d), "code": gates.RULE[d.kind], "words": words(d)} for d in differences]
        records.append({"backend": now.backend, "exit_code": codes[-1], "differences": found})
        if not as_json:
            for difference in differences:
                say(f"{MARKS[gates.RULE[difference.kind]]}: {now.backend}: {words(difference)}")
            say(f"{now.backend}: {CONCLUSIONS[codes[-1]]}")
    if as_json:
        print_json(records)
    raise typer.Exit(gates.worst(codes))


def merge(
    files: Annotated[list[Path], typer.Argument(metavar="RESULTS...", help="Results of one backend.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The results file to write.")],
    as_json: Json = False,
) -> None:
    """Merges parts of a run: shards, selections of clauses or configs, interrupted runs. The exit code is that of the
    merged results.

    Parts are joined cell by cell. Where several have judged a cell, a failure stands before a pass, and a pass before
    what decides nothing. Counterexamples and the outputs for the comparison of backends are copied beside OUT.
    """
    whole = merging.merged([results.read(file) for file in files], [str(file) for file in files])
    whole.write(out)
    missing = merging.gather(files, whole, out)
    if as_json:
        print_json(whole)
    else:
        folder = out.parent / "failures" / whole.backend
        for name in missing:
            say(f"counterexample {name} is beside none of the parts: copy it to {folder}")
        for line in (*whole.stale, f"{whole.backend}: {whole.summary}"):
            say(line)
    raise typer.Exit(whole.exit_code)
