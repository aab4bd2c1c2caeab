"""A run: every cell of one backend, its results written as they come, resumed where it was killed."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np

from kvconform import pairwise
from kvconform.budget import Budget
from kvconform.cell import Cell, run_cell
from kvconform.machine import machine
from kvconform.results import Results, read
from kvconform.storage import write_atomically
from kvconform.subject import Infrastructure, Launch, Subject
from kvconform.verdict import Outcome, Verdict
from kvconform_specs import SUITE_VERSION
from kvconform_specs.clauses import ALL
from kvconform_specs.config import Config
from kvconform_specs.errors import SpecError
from kvconform_specs.points import POINTS, label, point


@dataclass(frozen=True)
class Plan:
    """What to run. ``clauses`` and ``configs`` keep the cells whose names begin so; empty keeps all."""

    budget: Budget
    seed: int = 0
    dtypes: tuple[str, ...] = ("float32",)
    clauses: tuple[str, ...] = ()
    configs: tuple[str, ...] = ()


def cells(plan: Plan) -> Iterator[Cell]:
    """The cells of a plan, config by config: a subject is built once for each."""
    for dtype in plan.dtypes:
        for name in POINTS:
            if plan.configs and not name.startswith(plan.configs):
                continue
            config = point(name, dtype)
            for clause in ALL:
                if clause.concerns(config) and (not plan.clauses or clause.name.startswith(plan.clauses)):
                    yield Cell(clause, config, label(name, dtype))


def run_backend(
    name: str,
    launch: Launch,
    plan: Plan,
    out: Path,
    tell: Callable[[Verdict], None] = lambda verdict: None,
) -> Results:
    """Judges every cell of a backend; ``out/<name>.json`` grows with each. A backend that cannot run here gives
    results that say why (``unavailable``)."""
    began = time.perf_counter()
    path, failures = out / f"{name}.json", out / "failures" / name
    launch.environment.setdefault("KVCONFORM_ARTEFACTS", str((out / "artefacts").resolve()))
    results = Results(
        suite=SUITE_VERSION, backend=name, device=launch.device, dtypes=list(plan.dtypes), budget=plan.budget.name,
        seed=plan.seed, started=datetime.now(UTC).isoformat(timespec="seconds"),
    )  # fmt: skip
    try:
        subject = Subject(launch)
    except Infrastructure as sentence:
        results.unavailable, results.finished = str(sentence), True
        results.write(path)
        return results
    with subject:
        results.claims = subject.claims.to_json()
        results.environment = {**subject.environment, "hypothesis": version("hypothesis"), "machine": machine()}
        spent = _resume(results, path)
        known = {verdict.key: verdict for verdict in results.verdicts}
        results.verdicts = []
        for cell in cells(plan):
            verdict = known.get((cell.clause.name, cell.config_name))
            if verdict is not None:  # not written: the file holds more than what was gone through again so far
                results.verdicts.append(verdict)
                tell(verdict)
                continue
            try:
                verdict = run_cell(cell, subject, plan.budget, plan.seed, failures)
            except Infrastructure as sentence:
                results.unavailable = str(sentence)
                break
            witness = subject.witness(cell.config)
            if witness:
                results.witnesses[cell.config_name] = witness
            results.verdicts.append(verdict)
            results.seconds = round(spent + time.perf_counter() - began, 3)
            results.write(path)
            tell(verdict)
        if not results.unavailable:
            _write_vectors(subject, results, out / "vectors" / f"{name}.npz")
        results.finished = not results.unavailable
        results.write(path)
    return results


def _write_vectors(subject: Subject, results: Results, path: Path) -> None:
    """Keeps the backend's outputs of the common program, for ``pairwise``."""
    vectors = {}
    for config_name, config in named_configs([results]).items():
        if any(v.config == config_name and v.outcome is Outcome.PASS for v in results.verdicts):
            found = pairwise.outputs(subject, config)
            if found is not None:
                vectors[config_name] = found
    path.unlink(missing_ok=True)  # of an earlier run
    if vectors:
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **vectors)
        write_atomically(path, buffer.getvalue())


def _resume(results: Results, path: Path) -> float:
    """Takes over what an unfinished earlier part of the same run found. Returns the seconds that it took."""
    if not path.exists():
        return 0.0
    try:
        earlier = read(path)
    except SpecError:
        return 0.0  # not results of this version: they are replaced
    if earlier.finished or not results.same_run(earlier):
        return 0.0
    results.started, results.verdicts, results.witnesses = earlier.started, earlier.verdicts, earlier.witnesses
    return earlier.seconds


def named_configs(judged: Sequence[Results]) -> dict[str, Config]:
    """Every config that these results speak of, by the name that they use."""
    dtypes = {dtype for results in judged for dtype in results.dtypes}
    return {label(name, dtype): point(name, dtype) for dtype in sorted(dtypes) for name in POINTS}


def summary(results: Results) -> dict[str, int]:
    """How many cells had each outcome."""
    counts = {outcome.value: 0 for outcome in Outcome}
    for verdict in results.verdicts:
        counts[verdict.outcome.value] += 1
    return counts
