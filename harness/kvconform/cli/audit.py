"""``kvconform audit`` and ``power``: whether the clauses detect wrong backends."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from kvconform.cli.options import Json, On, Seed, print_json, say
from kvconform.files import write_atomically
from kvconform.fleet import cluster
from kvconform.mutation import audit as audits
from kvconform.mutation import power as powers
from kvconform.mutation import record as records
from kvconform.mutation.fault import load_faults
from kvconform.run.run import parse_shard
from kvconform.search.effort import DEFAULT_EFFORT, EFFORTS, effort_named
from kvconform_specs.config import DTYPES
from kvconform_specs.configs import CONFIGS, config_named

CATALOGUE = "kvconform_backends.faults:FAULTS"
"""The default list of faults."""


def audit(
    names: Annotated[
        list[str], typer.Argument(help="Only faults, or clauses, whose name starts with one of these; default: all.")
    ] = [],  # noqa: B006
    faults: Annotated[str, typer.Option(help="The list of faults: module:LIST or path/file.py:LIST.")] = CATALOGUE,
    effort: Annotated[list[str], typer.Option(help=f"How much to try: {', '.join(EFFORTS)}. May be repeated.")] = [  # noqa: B006
        DEFAULT_EFFORT
    ],
    seed: Seed = 0,
    clause: Annotated[
        list[str],
        typer.Option(
            help="Try the clauses whose name starts with this prefix, or all, instead of those that a fault names. "
            "May be repeated."
        ),
    ] = [],  # noqa: B006
    controls: Annotated[
        bool, typer.Option(help="Also try the correct backends in the list CONTROLS of the same module.")
    ] = False,
    shard: Annotated[str, typer.Option(help="Only part i of n of the faults, as i/n.")] = "",
    jobs: Annotated[int, typer.Option(min=1, help="How many faults are tried in parallel.")] = os.cpu_count() or 1,
    on: On = "",
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write.")] = Path("results/audit.json"),
    as_json: Json = False,
) -> None:
    """Tries the clauses on backends with planted faults.

    Prints which clauses detect each fault, and after how many programs and seconds.
    The exit code is 0 if every fault is detected and no control is; 1 if a fault survives or a control is detected; 3
    if some could not run here. An exception does not count as detection for a clause about numbers.
    """
    efforts = tuple(effort_named(name) for name in dict.fromkeys(effort))
    part = parse_shard(shard) if shard else None
    plan = audits.AuditPlan(efforts, seed, tuple(names), ("",) if "all" in clause else tuple(clause), part)
    wrong = load_faults(faults)
    right = load_faults(f"{faults.rpartition(':')[0]}:CONTROLS") if controls else ()

    def tell(audited: records.Audited) -> None:
        for line in () if as_json else records.lines(audited, effort):
            say(line)

    def progress(fault: str, trial: records.AuditTrial) -> None:
        if not as_json:
            say(records.progress(fault, trial))

    execute = cluster(on).audits if on else None
    record = audits.audit(plan, faults, wrong, right, out, jobs, execute, tell, progress)
    if as_json:
        print_json(record)
    else:
        for line in records.summary(record):
            say(line)
        say(f"{len(record.audited)} faults in {record.seconds:.0f} s; {out}")
    raise typer.Exit(records.exit_code(record))


def power(
    dtype: Annotated[str, typer.Option(help=f"{', '.join(DTYPES)}.")] = "float32",
    write: Annotated[Path | None, typer.Option(help="Compute all dtypes and write the table that is shipped.")] = None,
    as_json: Json = False,
) -> None:
    """Computes the null-model power table.

    It says which wrong models each clause rejects, and which it cannot detect.
    """
    if write is not None:
        write_atomically(write, powers.shipped_as(powers.power_table(name) for name in DTYPES))
        return
    config_named(next(iter(CONFIGS)), dtype)  # refuses an unknown dtype
    table = powers.power_table(dtype)
    if as_json:
        print_json(table)
        return
    for row in table:
        if row.note:
            say(f"{row.clause:30}{row.note}")
        elif row.cases:
            share = f"{row.rejected} of {row.tried}" if row.tried else "within the bound everywhere"
            say(f"{row.clause:30}{row.model:28}{share}{'  blind' if row.tried and not row.rejected else ''}")
