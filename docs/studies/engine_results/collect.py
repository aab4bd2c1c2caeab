"""Keeps the results of an engine: ``python -m engine_results.collect RESULTS.json NAME``, the backend's name.

What is kept is small and names no path of the machine: versions, claims, outcomes of cells, and failures in words.
"""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path
from typing import Any

from kvconform.files import write_atomically
from kvconform.results.results import Results, read
from kvconform_specs.claims import Claims

EVIDENCE = Path(__file__).parents[2] / "evidence" / "engines"
NOT_VERSIONS = ("machine", "platform", "source", "hypothesis", "kvconform", "pip", "setuptools")
"""What an environment holds besides the versions of what the engine consists of."""


def kept(results: Results, name: str) -> dict[str, Any]:
    """The part of a run that the page needs."""
    cells: dict[str, dict[str, str]] = {}
    for verdict in results.verdicts:
        cells.setdefault(verdict.config, {})[verdict.clause] = verdict.outcome.value
    usual = Claims().to_json()
    return {
        "engine": name,
        "suite": results.suite,
        "effort": results.effort,
        "summary": results.summary,
        "exit_code": results.exit_code,
        "unavailable": results.unavailable,
        "date": results.started[:10],
        "versions": {k: v for k, v in results.environment.items() if isinstance(v, str) and k not in NOT_VERSIONS},
        "claims": {claim: value for claim, value in results.claims.items() if value != usual[claim]},
        "programs": sum(verdict.programs for verdict in results.verdicts),
        "seconds": results.seconds,
        "cells": {config: dict(sorted(clauses.items())) for config, clauses in sorted(cells.items())},
        "failures": [
            {"clause": one.clause, "config": one.config, "outcome": one.outcome.value, "sentence": one.sentence}
            for one in results.failures
            if one.outcome.broken
        ],
        "guarantees": sorted({one.clause for one in results.verdicts if one.outcome.value == "refuted"}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("name")
    parser.add_argument("-o", "--out", type=Path, default=EVIDENCE)
    options = parser.parse_args()
    body = json.dumps(kept(read(options.results), options.name), sort_keys=True)
    options.out.mkdir(parents=True, exist_ok=True)
    write_atomically(options.out / f"{options.name}.json.gz", gzip.compress(body.encode(), mtime=0))


if __name__ == "__main__":
    main()
