"""The cells of one config of a backend, judged one after another on one worker: what one process of a run does.

Processes share nothing and say what they find as data. A backend is built once for each config, so that a config is
never divided.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kvconform.errors import StaleEntry
from kvconform.explain.diagnosis import disagreements
from kvconform.judging.order import REFERENCE_CLAUSE
from kvconform.judging.verdict import Outcome, Reason, Verdict
from kvconform.results.known_failures import KnownFailure, KnownFailures, Row
from kvconform.run import cross_backend
from kvconform.search import counterexample
from kvconform.search.cell import Cell, Key, Why, run_cell, unsupported
from kvconform.search.effort import Effort
from kvconform.worker.client import WorkerClient
from kvconform_specs.clause import Case
from kvconform_specs.clauses import BY_NAME
from kvconform_specs.program import UncachedForward

SAME_FUNCTION = "definition.decoder"
"""The clause that tests whether a black box computes what another artefact does that is its reference."""
DISAGREES = (
    "not judged: without a cache, too, the target computes something else than the reference; check it without "
    "--reference to judge its cache"
)


@dataclass(frozen=True)
class Task:
    """What is the same for all configs of a run.

    name: of the backend in results and known failures. failures: the folder of counterexamples. done: the verdicts of
    an interrupted run, by clause and config.
    """

    name: str
    effort: Effort
    seed: int
    failures: Path
    known_failures: KnownFailures
    done: Mapping[Key, Verdict]


@dataclass(frozen=True)
class Begun:
    """One cell is judged from now on."""

    key: Key


@dataclass(frozen=True)
class Judged:
    """One cell. known: the row of the known failures that it is. stale: why its row holds no longer, or nothing."""

    verdict: Verdict
    known: Row | None = None
    stale: str = ""
    runtime_info: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ConfigDone:
    """All cells of a config were judged. vectors: the outputs of the common program (``cross_backend``), if any cell
    passed. imported: versions of what the worker has imported by now."""

    config: str
    vectors: cross_backend.Outputs | None
    imported: dict[str, str]


def by_config(cells: Iterable[Cell]) -> dict[str, list[Cell]]:
    found: dict[str, list[Cell]] = {}
    for cell in cells:
        found.setdefault(cell.config_name, []).append(cell)
    return found


def judged_config(task: Task, cells: Sequence[Cell], client: WorkerClient) -> Iterator[Begun | Judged | ConfigDone]:
    """Judges the cells of one config in their order. Raises BackendUnavailable."""
    unreliable: Why | None = None
    passed = False
    for cell in cells:
        known = task.known_failures.find(task.name, cell, client.spec.device)
        verdict, stale = task.done.get(cell.key), ""
        if verdict is not None and known is None and verdict.outcome is not Outcome.KNOWN_FAILURE:
            passed = passed or verdict.outcome is Outcome.PASS
            yield Judged(verdict)
            continue
        yield Begun(cell.key)
        if unreliable is not None and unsupported(cell, client) is None:
            verdict = _not_judged(cell, client.spec.address, unreliable)
        else:
            verdict, stale = judged(cell, client, task.effort, task.seed, task.failures, known)
        unreliable = unreliable or _unjudgeable(client, cell, verdict, task.failures)
        passed = passed or verdict.outcome is Outcome.PASS
        row = known.row if known is not None and verdict.outcome is Outcome.KNOWN_FAILURE else None
        yield Judged(verdict, row, stale, client.runtime_info(cell.config))
    compared = passed and client.target is None
    vectors = cross_backend.outputs(client, cells[0].config) if compared else None
    yield ConfigDone(cells[0].config_name, vectors, client.imported())


def judged(
    cell: Cell, client: WorkerClient, effort: Effort, seed: int, failures: Path, known: KnownFailure | None
) -> tuple[Verdict, str]:
    """The verdict on one cell, and why its row of the known failures is stale, or nothing."""
    stale = ""
    if known is not None:
        try:
            return known.replay(cell, client, failures), ""
        except StaleEntry as words:
            stale = str(words)
    return run_cell(cell, client, effort, seed, failures), stale


def _unjudgeable(client: WorkerClient, cell: Cell, verdict: Verdict, failures: Path) -> Why | None:
    """Why the other clauses of a black box cannot be judged, or None.

    Its own forward, if that is the reference, breaks the clause of the reference without any cached step, too (the
    process of the reference runs no cached steps). Or another artefact is the reference, and disagrees with that
    forward: then every clause would report the same, and say nothing of the cache.
    """
    if client.target is None or not verdict.outcome.broken or verdict.raised:
        return None
    if client.reference_address:
        if verdict.clause != SAME_FUNCTION or disagreements.agrees(client, cell.config):
            return None
        return Reason.REFERENCE_DISAGREES, DISAGREES
    if verdict.clause != REFERENCE_CLAUSE or not verdict.counterexample:
        return None
    case = Case.from_json(counterexample.read(failures / verdict.counterexample).case)
    alone = [
        replace(program, steps=tuple(s for s in program.steps if isinstance(s, UncachedForward)))
        for program in case.programs
    ]
    if counterexample.replayed(BY_NAME[REFERENCE_CLAUSE], client, [], Case(tuple(alone))) is None:
        return None
    return Reason.REFERENCE_BROKEN, f"not judged: its own forward, the reference, breaks {REFERENCE_CLAUSE}"


def _not_judged(cell: Cell, backend: str, why: Why) -> Verdict:
    return Verdict(
        clause=cell.clause.name,
        config=cell.config_name,
        backend=backend,
        outcome=Outcome.INCONCLUSIVE,
        reason=why[0],
        sentence=why[1],
    )
