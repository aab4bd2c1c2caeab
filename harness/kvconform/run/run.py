"""A run: judges every selected cell of a backend, writes its results after each, and resumes an interrupted run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import msgspec

from kvconform.errors import BackendUnavailable, BadArgument, StaleEntry, Unavailable, UnknownClause
from kvconform.host import machine
from kvconform.judging.order import REFERENCE_CLAUSE
from kvconform.judging.verdict import Outcome, Reason, Verdict
from kvconform.results.guarantees import measured
from kvconform.results.known_failures import EMPTY, KnownFailure, KnownFailures
from kvconform.results.merge import vectors_of, write_vectors
from kvconform.results.results import Results, Target, read
from kvconform.run import cross_backend, explain_failures
from kvconform.search import counterexample
from kvconform.search.cell import Cell, run_cell
from kvconform.search.effort import CHECK, CHECK_LARGE, DEFAULT_EFFORT, EFFORTS, LARGE, Effort, effort_named
from kvconform.worker.client import WorkerClient, WorkerSpec
from kvconform_specs import SUITE_VERSION
from kvconform_specs.clause import Case
from kvconform_specs.clauses import ALL, BY_NAME, CHAPTERS
from kvconform_specs.config import DTYPES, Config
from kvconform_specs.configs import CONFIGS, config_named, label
from kvconform_specs.errors import SpecError
from kvconform_specs.program import UncachedForward


@dataclass(frozen=True)
class Plan:
    """What to run.

    clauses, configs: prefixes of names; only matching cells are kept; empty keeps all.
    shard: ``(i, n)`` keeps part ``i`` (from 1) of ``n`` of these cells: whole configs, as long as there are as many.
    explain: whether failures are also mapped and diagnosed.
    """

    effort: Effort
    seed: int = 0
    dtypes: tuple[str, ...] = ("float32",)
    clauses: tuple[str, ...] = ()
    configs: tuple[str, ...] = ()
    shard: tuple[int, int] | None = None
    explain: bool = False


def plan_for(
    effort: str = DEFAULT_EFFORT,
    seed: int = 0,
    dtypes: Sequence[str] = ("float32",),
    clauses: Sequence[str] = (),
    configs: Sequence[str] = (),
    shard: str = "",
    explain: bool = False,
) -> Plan:
    """The plan of a user's options. Raises BadArgument if one is unknown, UnknownClause if no cell matches."""
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise BadArgument("dtype", dtype, DTYPES)
    for clause in clauses:
        if not any(known.startswith(clause) for known in BY_NAME):
            known = ", ".join(CHAPTERS)
            raise UnknownClause("clause", clause, CHAPTERS, f"no clause starts with {clause!r}; chapters: {known}")
    named = [label(name, dtype) for dtype in dtypes for name in CONFIGS]
    for config in configs:
        if not any(known.startswith(config) for known in (*named, *OWN_CONFIGS)):
            raise BadArgument("config", config, named, f"no config starts with {config!r}; known: {', '.join(named)}")
    whole = Plan(effort_named(effort), seed, tuple(dtypes), tuple(clauses), tuple(configs), explain=explain)
    count = sum(1 for _ in cells(whole))
    if not count and not any(name.startswith(whole.configs) for name in OWN_CONFIGS):
        selected = f"clauses {', '.join(clauses)} and configs {', '.join(configs)}"
        raise UnknownClause(
            "clause", clauses, (), f"no cell matches {selected}: the clauses do not concern the configs"
        )
    plan = replace(whole, shard=parse_shard(shard) if shard else None)
    if count and plan.shard is not None and not any(True for _ in cells(plan)):
        raise BadArgument("shard", shard, (), f"shard {shard}: there are fewer cells than shards")
    return plan


def parse_shard(text: str) -> tuple[int, int]:
    """``2/5`` as ``(2, 5)``. Raises BadArgument if it is malformed."""
    index, slash, count = text.partition("/")
    if slash and index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count):
        return int(index), int(count)
    raise BadArgument("shard", text, (), f"shard: want i/n with i from 1 to n, such as 2/5, got {text!r}")


def cells(plan: Plan, own_configs: Mapping[str, Config] | None = None) -> Iterator[Cell]:
    """The cells of a plan, config by config, since a backend is built once for each. ``own_configs``: a black box's."""
    by_config: dict[str, list[Cell]] = {}
    for cell in _selected(plan, own_configs):
        by_config.setdefault(cell.config_name, []).append(cell)
    if plan.shard is not None:
        by_config = _dealt(by_config, *plan.shard)
    return (cell for dealt in by_config.values() for cell in dealt)


def _dealt(by_config: dict[str, list[Cell]], index: int, count: int) -> dict[str, list[Cell]]:
    """The cells of shard ``index`` of ``count``: whole configs, the largest dealt first, each to the shard that has the
    fewest cells. Where there are more shards than configs, each shard takes part of one config's cells."""
    names = sorted(by_config, key=lambda name: -len(by_config[name]))
    if len(names) < count:
        turn, place = divmod(index - 1, len(names) or 1)
        sharers = range(place, count, len(names) or 1)
        return {name: by_config[name][turn :: len(sharers)] for name in names[place : place + 1]}
    sizes, mine = [0] * count, set()
    for name in names:
        least = sizes.index(min(sizes))
        sizes[least] += len(by_config[name])
        if least == index - 1:
            mine.add(name)
    return {name: found for name, found in by_config.items() if name in mine}


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


_REFERENCE_CLAUSE = BY_NAME[REFERENCE_CLAUSE]
"""Judged first for a black box: if its own forward breaks this clause, it cannot be the reference of the others."""
OWN_CONFIGS = ("decoder-self", "hidden-self")
"""The configs of black boxes, which are known only after loading."""


def unmatched_entries(known_failures: KnownFailures, backend: str) -> list[str]:
    """One sentence for each row of a backend that matches no cell of the suite, whatever the run selects."""
    return known_failures.unmatched_entries(backend, cells(Plan(EFFORTS[DEFAULT_EFFORT], dtypes=DTYPES)))


def judged(
    cell: Cell, client: WorkerClient, plan: Plan, failures: Path, known: KnownFailure | None
) -> tuple[Verdict, str]:
    """The verdict on one cell, and why its row of the known failures is stale, or nothing."""
    stale = ""
    if known is not None:
        try:
            return known.replay(cell, client, failures), ""
        except StaleEntry as words:
            stale = str(words)
    return run_cell(cell, client, plan.effort, plan.seed, failures), stale


def path_of(name: str, plan: Plan, out: Path) -> Path:
    """Where a backend's results are written; shards have their own folder, so that ``out`` has one file a backend."""
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
    begin: Callable[[Results, int], None] = lambda results, cells: None,
) -> Results:
    """Judges every selected cell of a backend and writes its results (``path_of``) after each.

    A backend that cannot run here gives results that say why (``unavailable``). ``begin`` is called with what is
    known at the start and the number of cells, ``tell`` with each verdict. Raises InvalidBackend.
    """
    began = time.perf_counter()
    path, failures = path_of(name, plan, out), out / "failures" / name
    spec.environment.setdefault("KVCONFORM_ARTEFACTS", artefacts(out))
    results = empty(name, spec.device, plan)
    try:
        client = WorkerClient(spec)
    except BackendUnavailable as error:
        set_unavailable(results, error)
        results.finished = True
        results.write(path)
        return results
    with client:
        if plan.effort is CHECK and client.parameters > LARGE:
            plan = replace(plan, effort=CHECK_LARGE)
            results.effort = plan.effort.name
        describe(results, client)
        spent = _resume(results, path, client)
        done = {verdict.key: verdict for verdict in results.verdicts}
        results.verdicts = []
        results.stale = unmatched_entries(known_failures, name)
        unreliable: set[str] = set()
        begin(results, sum(1 for _ in cells(plan, client.configs)))
        for cell in cells(plan, client.configs):
            known = known_failures.find(name, cell, spec.device)
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
            except BackendUnavailable as error:
                set_unavailable(results, error)
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
            if len(results.verdicts) > len(done):  # until then the file of the interrupted run holds more
                results.write(path)
            tell(verdict)
        if not results.unavailable and results.target is None:
            _write_vectors(client, results, vectors_of(path))
        results.guarantees = measured(results.verdicts)
        results.environment = {**client.imported(), **results.environment}
        if plan.explain and not results.unavailable:
            asked = {cell.config_name: cell.config for cell in cells(plan, client.configs)}
            explain_failures.add(client, results, asked, failures)
        results.finished = not results.unavailable
        results.write(path)
    return results


def empty(name: str, device: str, plan: Plan) -> Results:
    """The results of a run that begins now."""
    return Results(
        suite=SUITE_VERSION,
        backend=name,
        device=device,
        dtypes=list(plan.dtypes),
        effort=plan.effort.name,
        seed=plan.seed,
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        shard="/".join(map(str, plan.shard or ())),
        clauses=list(plan.clauses),
        configs=list(plan.configs),
    )


def describe(results: Results, client: WorkerClient) -> None:
    """Fills in what the worker knows about the backend and its machine."""
    results.claims, results.workers = client.claims.to_json(), client.started
    results.target = None if client.target is None else msgspec.convert(client.target, Target)
    own = {"hypothesis": version("hypothesis"), "machine": machine()}
    results.environment = {**client.imported(), **client.environment, **own}


def set_unavailable(results: Results, error: BackendUnavailable) -> None:
    results.unavailable, results.lacking = str(error), isinstance(error, Unavailable)


def artefacts(out: Path) -> str:
    """Where backends keep files that they export, as the value of ``KVCONFORM_ARTEFACTS``."""
    return str((out / "artefacts").resolve())


def _reference_broken(client: WorkerClient, verdict: Verdict, failures: Path) -> bool:
    """Whether a black box's own forward is unusable as the reference: it breaks its clause without any cached step, too
    (the process of the reference runs no cached steps)."""
    about_reference = client.target is not None and verdict.clause == _REFERENCE_CLAUSE.name
    if not about_reference or not verdict.counterexample or verdict.raised:
        return False
    case = Case.from_json(counterexample.read(failures / verdict.counterexample).case)
    alone = [
        replace(program, steps=tuple(s for s in program.steps if isinstance(s, UncachedForward)))
        for program in case.programs
    ]
    return counterexample.replayed(_REFERENCE_CLAUSE, client, [], Case(tuple(alone))) is not None


def _not_judged(cell: Cell, backend: str) -> Verdict:
    return Verdict(
        clause=cell.clause.name,
        config=cell.config_name,
        backend=backend,
        outcome=Outcome.INCONCLUSIVE,
        reason=Reason.REFERENCE_BROKEN,
        sentence=f"not judged: its own forward, the reference, breaks {_REFERENCE_CLAUSE.name}",
    )


def _write_vectors(client: WorkerClient, results: Results, path: Path) -> None:
    """Stores the backend's outputs of the common program, for the comparison of backends (``cross_backend``)."""
    vectors = {}
    for config_name, config in named_configs([results]).items():
        if any(v.config == config_name and v.outcome is Outcome.PASS for v in results.verdicts):
            found = cross_backend.outputs(client, config)
            if found is not None:
                vectors[config_name] = found
    path.unlink(missing_ok=True)  # of an earlier run
    if vectors:
        write_vectors(path, vectors)


def _resume(results: Results, path: Path, client: WorkerClient) -> float:
    """Adopts the verdicts of an unfinished earlier part of the same run. Returns the seconds that it took."""
    if not path.exists():
        return 0.0
    try:
        earlier = read(path)
    except SpecError:
        return 0.0  # of another version of the schema: the file is replaced
    now = client.versions(earlier.environment)  # also of what will be imported later
    if earlier.finished or not results.same_run(earlier) or any(earlier.environment[name] != now[name] for name in now):
        return 0.0
    results.started, results.verdicts, results.runtime_info = earlier.started, earlier.verdicts, earlier.runtime_info
    return earlier.seconds


def named_configs(judged: Sequence[Results]) -> dict[str, Config]:
    """Every config in these results, by the name that they use."""
    dtypes = {dtype for results in judged for dtype in results.dtypes}
    return {label(name, dtype): config_named(name, dtype) for dtype in sorted(dtypes) for name in CONFIGS}
