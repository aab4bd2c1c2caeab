"""A run: every cell of one backend or of its shard, its results written as they come, resumed where it was killed."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import islice
from pathlib import Path

import msgspec
import numpy as np

from kvconform.errors import BackendUnavailable, StaleEntry
from kvconform.files import write_atomically
from kvconform.host import machine
from kvconform.judging.verdict import Outcome, Verdict
from kvconform.mutation.power import stored
from kvconform.results.guarantees import measured
from kvconform.results.known_failures import EMPTY, KnownFailure, KnownFailures
from kvconform.results.results import Results, Target, read
from kvconform.run import cross_backend, explain_failures
from kvconform.search import counterexample
from kvconform.search.cell import Cell, run_cell
from kvconform.search.effort import DEFAULT_EFFORT, EFFORTS, Effort
from kvconform.worker.client import WorkerClient, WorkerSpec
from kvconform_specs import SUITE_VERSION
from kvconform_specs.clause import Case
from kvconform_specs.clauses import ALL, BY_NAME
from kvconform_specs.config import DTYPES, Config
from kvconform_specs.configs import CONFIGS, config_named, label
from kvconform_specs.errors import SpecError
from kvconform_specs.program import UncachedForward


@dataclass(frozen=True)
class Plan:
    """What to run. ``clauses`` and ``configs`` keep the cells whose names begin so; empty keeps all.

    shard: ``(i, n)`` keeps every ``n``-th of these cells, from the ``i``-th on (from 1): each config's cells are dealt
    to all shards in turn, whatever the backend. explain: whether what is broken is also mapped and diagnosed.
    """

    effort: Effort
    seed: int = 0
    dtypes: tuple[str, ...] = ("float32",)
    clauses: tuple[str, ...] = ()
    configs: tuple[str, ...] = ()
    shard: tuple[int, int] | None = None
    explain: bool = False


def parse_shard(text: str) -> tuple[int, int]:
    """``2/5`` as ``(2, 5)``. Raises SpecError with one sentence where it is none."""
    index, slash, count = text.partition("/")
    if slash and index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count):
        return int(index), int(count)
    raise SpecError("shard", f"want i/n with i from 1 to n, such as 2/5, got {text!r}")


def cells(plan: Plan, own_configs: Mapping[str, Config] | None = None) -> Iterator[Cell]:
    """The cells of a plan, config by config: a backend is built once for each. ``own_configs``: a black box's own."""
    index, count = plan.shard or (1, 1)
    return islice(_selected(plan, own_configs), index - 1, None, count)


def _selected(plan: Plan, own_configs: Mapping[str, Config] | None) -> Iterator[Cell]:
    asked = own_configs or {label(name, dtype): config_named(name, dtype) for dtype in plan.dtypes for name in CONFIGS}
    for name, config in asked.items():
        if plan.configs and not name.startswith(plan.configs):
            continue
        for clause in (
            (_REFERENCE_CLAUSE, *(clause for clause in ALL if clause is not _REFERENCE_CLAUSE)) if own_configs else ALL
        ):
            if clause.concerns(config) and (not plan.clauses or clause.name.startswith(plan.clauses)):
                yield Cell(clause, config, name)


_REFERENCE_CLAUSE = BY_NAME["equivalence.full-stable"]
"""What a black box is judged by must hold first; the others are not asked where it does not."""


def unmatched_entries(known_failures: KnownFailures, backend: str) -> list[str]:
    """One sentence for each row of a backend that is of no cell of the suite. What a run selects does not matter: a row
    of a cell that is not judged hides nothing."""
    return known_failures.unmatched_entries(backend, cells(Plan(EFFORTS[DEFAULT_EFFORT], dtypes=DTYPES)))


def judged(
    cell: Cell, client: WorkerClient, plan: Plan, failures: Path, known: KnownFailure | None
) -> tuple[Verdict, str]:
    """The verdict on one cell; and why its row of the known failures is stale, if it has one that is."""
    stale = ""
    if known is not None:
        try:
            return known.replay(cell, client, failures), ""
        except StaleEntry as words:
            stale = str(words)
    return run_cell(cell, client, plan.effort, plan.seed, failures), stale


def path_of(name: str, plan: Plan, out: Path) -> Path:
    """Where a backend's results go: those of shards lie apart, so that ``out`` holds one file a backend."""
    if plan.shard is None:
        return out / f"{name}.json"
    return out / "shards" / f"{name}-{plan.shard[0]}-of-{plan.shard[1]}.json"


def run_backend(
    name: str,
    spec: WorkerSpec,
    plan: Plan,
    out: Path,
    tell: Callable[[Verdict], None] = lambda verdict: None,
    known_failures: KnownFailures = EMPTY,
    begin: Callable[[int], None] = lambda cells: None,
) -> Results:
    """Judges every cell of a backend; its results (``path_of``) grow with each. A backend that cannot run here gives
    results that say why (``unavailable``). ``begin`` is told how many cells there are, ``tell`` each verdict."""
    began = time.perf_counter()
    path, failures = path_of(name, plan, out), out / "failures" / name
    spec.environment.setdefault("KVCONFORM_ARTEFACTS", str((out / "artefacts").resolve()))
    results = Results(
        suite=SUITE_VERSION,
        backend=name,
        device=spec.device,
        dtypes=list(plan.dtypes),
        effort=plan.effort.name,
        seed=plan.seed,
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        shard="/".join(map(str, plan.shard or ())),
    )
    try:
        client = WorkerClient(spec)
    except BackendUnavailable as sentence:
        results.unavailable, results.finished = str(sentence), True
        results.write(path)
        return results
    with client:
        results.claims = client.claims.to_json()
        results.target = None if client.target is None else msgspec.convert(client.target, Target)
        results.environment = {**client.environment, "hypothesis": version("hypothesis"), "machine": machine()}
        spent = _resume(results, path)
        done = {verdict.key: verdict for verdict in results.verdicts}
        results.verdicts = []
        results.stale = unmatched_entries(known_failures, name)
        unreliable: set[str] = set()
        begin(sum(1 for _ in cells(plan, client.configs)))
        for cell in cells(plan, client.configs):
            known = known_failures.find(name, cell)
            verdict = done.get((cell.clause.name, cell.config_name))
            if verdict is not None and known is None and verdict.outcome is not Outcome.KNOWN_FAILURE:
                results.verdicts.append(verdict)
                tell(verdict)
                continue
            try:
                if cell.config_name in unreliable and not cell.clause.blind:
                    verdict, stale = _not_judged(cell, spec.address), ""
                else:
                    verdict, stale = judged(cell, client, plan, failures, known)
                if _reference_broken(client, verdict, failures):
                    unreliable.add(cell.config_name)
            except BackendUnavailable as sentence:
                results.unavailable = str(sentence)
                break
            runtime_info = client.runtime_info(cell.config)
            if runtime_info:
                results.runtime_info[cell.config_name] = runtime_info
            results.verdicts.append(verdict)
            if known is not None and verdict.outcome is Outcome.KNOWN_FAILURE:
                results.known_failures.append(known.row)
            if stale:
                results.stale.append(stale)
            results.seconds = round(spent + time.perf_counter() - began, 3)
            if len(results.verdicts) > len(done):  # until then the file holds more than what was gone through again
                results.write(path)
            tell(verdict)
        if not results.unavailable and results.target is None:
            _write_vectors(client, results, out / "vectors" / f"{name}.npz")
        results.guarantees = measured(results.verdicts)
        if plan.explain and not results.unavailable:
            asked = {cell.config_name: cell.config for cell in cells(plan, client.configs)}
            explain_failures.add(client, results, asked, failures)
        if results.target is None:  # what the clauses see in the definition's configs says nothing about others
            results.power = {dtype: stored(dtype) for dtype in plan.dtypes}
        results.finished = not results.unavailable
        results.write(path)
    return results


def _reference_broken(client: WorkerClient, verdict: Verdict, failures: Path) -> bool:
    """Whether a black box's own forward has been found to be no yardstick: it breaks the clause about it by itself, and
    not only beside cached steps, which the truth's own process never runs."""
    if (
        client.target is None
        or verdict.clause != _REFERENCE_CLAUSE.name
        or not verdict.counterexample
        or verdict.raised
    ):
        return False
    case = Case.from_json(counterexample.read(failures / verdict.counterexample).case)
    alone = [
        replace(program, steps=tuple(s for s in program.steps if isinstance(s, UncachedForward)))
        for program in case.programs
    ]
    return isinstance(counterexample.replayed(_REFERENCE_CLAUSE, client, [], Case(tuple(alone))), counterexample.Broken)


def _not_judged(cell: Cell, backend: str) -> Verdict:
    words = f"not judged: its own forward, which it would be judged by, breaks {_REFERENCE_CLAUSE.name}"
    return Verdict(
        clause=cell.clause.name, config=cell.config_name, backend=backend, outcome=Outcome.INCONCLUSIVE, sentence=words
    )


def _write_vectors(client: WorkerClient, results: Results, path: Path) -> None:
    """Keeps the backend's outputs of the common program, for ``pairwise``."""
    vectors = {}
    for config_name, config in named_configs([results]).items():
        if any(v.config == config_name and v.outcome is Outcome.PASS for v in results.verdicts):
            found = cross_backend.outputs(client, config)
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
    results.started, results.verdicts, results.runtime_info = earlier.started, earlier.verdicts, earlier.runtime_info
    return earlier.seconds


def named_configs(judged: Sequence[Results]) -> dict[str, Config]:
    """Every config that these results speak of, by the name that they use."""
    dtypes = {dtype for results in judged for dtype in results.dtypes}
    return {label(name, dtype): config_named(name, dtype) for dtype in sorted(dtypes) for name in CONFIGS}


def summary(results: Results) -> dict[str, int]:
    """How many cells had each outcome."""
    counts = {outcome.value: 0 for outcome in Outcome}
    for verdict in results.verdicts:
        counts[verdict.outcome.value] += 1
    return counts
