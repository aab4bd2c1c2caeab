"""Results: one versioned JSON file for each backend, rewritten whole and atomically after every cell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from kvconform.storage import read_versioned, write_atomically
from kvconform.verdict import Outcome, Verdict
from kvconform_specs.clauses import BY_NAME
from kvconform_specs.points import POINTS

SCHEMA = "kvconform-results/1"


class Results(msgspec.Struct, kw_only=True):
    """What one run of one backend gave.

    unavailable: why the backend could not run here at all. finished: all cells were judged; a run that was killed
    leaves False and is resumed. witnesses: what really ran, by config. environment: versions, machine.
    """

    schema: str = SCHEMA
    suite: str
    backend: str
    device: str
    dtypes: list[str]
    budget: str
    seed: int
    started: str
    environment: dict[str, Any] = {}
    claims: dict[str, Any] = {}
    unavailable: str = ""
    verdicts: list[Verdict] = []
    witnesses: dict[str, Any] = {}
    seconds: float = 0.0
    finished: bool = False

    def write(self, path: Path) -> None:
        write_atomically(path, msgspec.json.format(msgspec.json.encode(self), indent=1))

    def same_run(self, other: Results) -> bool:
        """Whether ``other`` is an earlier part of this run: nothing that could change a verdict differs."""
        return all(
            getattr(self, name) == getattr(other, name)
            for name in ("schema", "suite", "backend", "device", "dtypes", "budget", "seed", "environment", "claims")
        )


def read(path: Path) -> Results:
    """Raises SpecError with one sentence where the file holds no results."""
    return read_versioned(path, Results, SCHEMA, "results")


def schema() -> dict[str, Any]:
    """The JSON Schema of a results file."""
    return msgspec.json.schema(Results)


def missing_core(results: Results, profile: str) -> list[str]:
    """Core clauses of a profile without a PASS under any of its configs."""
    passed = {
        verdict.clause
        for verdict in results.verdicts
        if verdict.outcome is Outcome.PASS and verdict.config.startswith(profile)
    }
    concerned = {
        name
        for name, clause in BY_NAME.items()
        if clause.core and any(clause.concerns(c) for c in POINTS.values() if c.profile == profile)
    }
    return sorted(concerned - passed)


def exit_code(results: Results) -> tuple[int, str]:
    """0 conformant, 1 non-conformant, 3 infrastructure, 5 inconclusive or core clauses missing; and the sentence."""
    broken = [verdict for verdict in results.verdicts if verdict.outcome.broken]
    if broken:
        return 1, f"non-conformant: {len(broken)} of {len(results.verdicts)} cells broken"
    if results.unavailable:
        return 3, results.unavailable
    if not results.finished:
        return 5, f"the run did not finish: {len(results.verdicts)} cells were judged"
    profiles = sorted({config.profile for config in POINTS.values()})
    missing = {profile: missing_core(results, profile) for profile in profiles}
    good = [profile for profile in profiles if not missing[profile]]
    undecided = [v for v in results.verdicts if v.outcome in (Outcome.INCONCLUSIVE, Outcome.NOT_EXERCISED)]
    if undecided:
        return 5, f"inconclusive or not exercised: {len(undecided)} of {len(results.verdicts)} cells"
    if not good:
        profile = min(profiles, key=lambda p: len(missing[p]))
        return 5, f"not conformant: no PASS on the core clauses {', '.join(missing[profile])} ({profile} profile)"
    return 0, f"conformant: {' and '.join(good)} profile"
