"""What a run costs by units of work, as a page: seconds of whole configs, and machine hours of a nightly.

python -m fleet_page collect RESULTS... -o docs/evidence/fleet/costs.json
nox -s regenerate -- docs/fleet.md
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvconform.results import results
from kvconform_specs.configs import CONFIGS

COSTS = Path("evidence/fleet/costs.json")
BACKENDS, DTYPES, SEEDS = 14, 3, 3
"""What a nightly is priced for: backends that may be installed, dtypes and seeds."""


def collect(files: Sequence[Path]) -> list[dict[str, Any]]:
    """The cost of each config in results files: one row for each unit."""
    rows: list[dict[str, Any]] = []
    for file in files:
        found = results.read(file)
        for config in dict.fromkeys(verdict.config for verdict in found.verdicts):
            cells = [verdict for verdict in found.verdicts if verdict.config == config]
            rows.append(
                {
                    "backend": found.backend,
                    "effort": found.effort,
                    "config": config,
                    "cells": len(cells),
                    "programs": sum(verdict.programs for verdict in cells),
                    "seconds": round(sum(verdict.seconds for verdict in cells), 1),
                    "cpu": found.environment["machine"]["cpu"],
                }
            )
    return rows


def render(rows: Sequence[dict[str, Any]]) -> str:
    """The page. Every figure in it follows from ``rows``."""
    efforts = [name for name in ("smoke", "pr", "nightly") if any(row["effort"] == name for row in rows)]
    text = [
        INTRODUCTION,
        "## Cost of a unit",
        "",
        f"Measured on {', '.join(sorted({row['cpu'] for row in rows}))}.",
        "",
    ]
    text += ["| backend | effort | units | median | longest | time of a program |", "|---|---|---|---|---|---|"]
    for effort in efforts:
        for backend in dict.fromkeys(row["backend"] for row in rows if row["effort"] == effort):
            those = [row for row in rows if (row["backend"], row["effort"]) == (backend, effort)]
            seconds = [row["seconds"] for row in those]
            programs = sum(row["programs"] for row in those)
            each = 1000 * sum(seconds) / programs if programs else 0.0
            middle = statistics.median(seconds)
            text.append(
                f"| {backend} | {effort} | {len(those)} | {middle:.1f} s | {max(seconds):.1f} s | {each:.1f} ms |"
            )
    text += [
        "",
        "## Machine hours",
        "",
        PRICED,
        "",
        "| effort | units | machine hours | tenfold |",
        "|---|---|---|---|",
    ]
    count = BACKENDS * DTYPES * SEEDS * len(CONFIGS)
    for effort in efforts:
        hours = count * _mean(rows, effort) / 3600
        text.append(f"| {effort} | {count} | {hours:.1f} | {10 * hours:.0f} |")
    return "\n".join([*text, "", GROWTH, ""])


def _mean(rows: Sequence[dict[str, Any]], effort: str) -> float:
    """Mean seconds of a unit. Where only some configs were measured with an effort, those of ``pr`` are scaled by what
    the measured units take more."""
    seconds = {(row["backend"], row["config"]): row["seconds"] for row in rows if row["effort"] == effort}
    whole = {(row["backend"], row["config"]): row["seconds"] for row in rows if row["effort"] == "pr"}
    if seconds.keys() >= whole.keys() or not seconds.keys() <= whole.keys():
        return float(statistics.mean(seconds.values()))
    return float(statistics.mean(whole.values()) * sum(seconds.values()) / sum(whole[unit] for unit in seconds))


INTRODUCTION = """# Runs on more than one machine

<!-- made by docs/studies/fleet_page.py from docs/evidence/fleet/costs.json -->

A *unit* is one config of one backend, judged by all clauses that concern it. Its name is a digest of everything that
its result depends on: the suite and our sources, the backend with its claims and the versions in its environment, the
device, config, dtype, effort, seed, clauses and known failures. A stored unit is done, on whichever machine it was
judged.

```sh
kvconform run -b eager --jobs 4                                   # four processes of this machine
kvconform run -b eager --on ray:10.0.0.1:6379                     # a Ray cluster; kvconform[ray] on each node
kvconform run -b eager --on ray --store s3://bucket/kvconform     # what is stored is not judged again; kvconform[store]
kvconform audit --on ray:10.0.0.1:6379                            # each fault is a unit
```

One process, `--jobs`, a cluster and shards give the same results cell by cell: outcomes, digests, counts, sentences
and counterexamples (`tests/results/test_jobs.py`, `tests/fleet`; `nox -s fleet` runs a cluster of two nodes). Ray
gives each unit one CPU, and one GPU with `--device cuda`. The interpreter of a backend is that of `--python`, which
must exist on each node, or Ray's `--runtime-env FILE.json` makes it.

- A node that dies: Ray starts its units again elsewhere. No cell is lost or judged twice.
- A driver that is killed: the units that were stored are not judged again by the next one.
- A backend that dies in its worker: a verdict, as on one machine; the unit goes on.
- A node without the GPU, the driver or a package: the unit is tried on another one.
- Memory: Ray starts a unit again that its memory monitor killed; a worker that the system killed is *inconclusive*.

A config whose cells took longer than `--unit-seconds` in the results that it replaces is divided into slices.
"""
PRICED = (
    f"Of {BACKENDS} backends in {DTYPES} dtypes with {SEEDS} seeds, every config of the suite ({len(CONFIGS)}), at the "
    "mean cost of the units above;\nwhere only some configs were measured, that of `pr` times what these take more."
)
GROWTH = """Units are independent: ten times as many backends, or seeds, cost ten times the hours. The wall time is the
hours over the number of CPUs, as long as there are more units than CPUs; it cannot be shorter than the longest unit,
which `--unit-seconds` divides. A unit whose digest has not changed is read from the store."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    collected = commands.add_parser("collect", help="costs of units out of results files")
    collected.add_argument("files", nargs="+", type=Path)
    collected.add_argument("-o", "--out", type=Path, required=True)
    asked = parser.parse_args()
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n ".join(json.dumps(row) for row in collect(asked.files))
    asked.out.write_text(f"[\n {lines}\n]\n")


if __name__ == "__main__":
    main()
