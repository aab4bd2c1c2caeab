"""A run: judges every selected cell of a backend, writes its results meanwhile, and resumes an interrupted run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec

from kvconform.errors import BackendUnavailable, BadArgument, Unavailable, UnknownClause
from kvconform.host import machine
from kvconform.judging.order import REFERENCE_CLAUSE
from kvconform.judging.verdict import Verdict
from kvconform.results.guarantees import measured
from kvconform.results.known_failures import EMPTY, KnownFailures
from kvconform.results.merge import vectors_of, write_vectors
from kvconform.results.results import SAME_RUN, Results, Target, read
from kvconform.run import explain_failures
from kvconform.run.jobs import Executor, in_processes
from kvconform.run.unit import SAME_FUNCTION, Begun, ConfigDone, Judged, Task, by_config
from kvconform.search.cell import Cell, Key
from kvconform.search.effort import CHECK, CHECK_LARGE, DEFAULT_EFFORT, EFFORTS, LARGE, Effort, effort_named
from kvconform.worker.client import WorkerClient, WorkerSpec
from kvconform_specs import SUITE_VERSION
from kvconform_specs.clauses import ALL, BY_NAME, CHAPTERS
from kvconform_specs.config import DTYPES, Config
from kvconform_specs.configs import CONFIGS, config_named, label
from kvconform_specs.errors import SpecError


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
    found = by_config(_selected(plan, own_configs))
    if plan.shard is not None:
        found = _dealt(found, *plan.shard)
    return (cell for dealt in found.values() for cell in dealt)


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
        for clause in sorted(ALL, key=lambda one: FIRST.get(one.name, len(FIRST))) if own_configs else ALL:
            if clause.concerns(config) and (not plan.clauses or clause.name.startswith(plan.clauses)):
                yield Cell(clause, config, name)


FIRST = {name: place for place, name in enumerate((REFERENCE_CLAUSE, SAME_FUNCTION))}
"""Judged first for a black box: if its own forward breaks these, it or another artefact cannot be the reference of the
others."""
PAUSE = 1.0
"""Seconds between two writings of the results: the file holds all cells, and writing it after each takes longer and
longer. What was judged since is judged again if the run is killed."""
IN_THIS_PROCESS = in_processes(1)
OWN_CONFIGS = ("decoder-self", "hidden-self")
"""The configs of black boxes, which are known only after loading."""


def unmatched_entries(known_failures: KnownFailures, backend: str) -> list[str]:
    """One sentence for each row of a backend that matches no cell of the suite, whatever the run selects."""
    return known_failures.unmatched_entries(backend, cells(Plan(EFFORTS[DEFAULT_EFFORT], dtypes=DTYPES)))


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
    begin: Callable[[Results, Sequence[Key]], None] = lambda results, keys: None,
    execute: Executor = IN_THIS_PROCESS,
    running: Callable[[Key], None] = lambda key: None,
) -> Results:
    """Judges every selected cell of a backend, and writes its results (``path_of``) meanwhile and at the end.

    A backend that cannot run here gives results that say why (``unavailable``). ``begin`` is called with what is
    known at the start and the keys of the cells, ``running`` with the key of each cell that is begun, ``tell`` with
    each verdict as it comes. ``execute``: who judges the configs; the results have verdicts in the order of the cells.
    Raises InvalidBackend.
    """
    began = time.perf_counter()
    path = path_of(name, plan, out)
    spec.environment.setdefault("KVCONFORM_ARTEFACTS", artefacts(out))
    results = empty(name, spec.device, plan)
    try:
        client = WorkerClient(spec)
    except BackendUnavailable as error:
        set_unavailable(results, error)
        results.finished = True
        if not _interrupted(results, path):  # its verdicts stay for the next run
            results.write(path)
        return results
    with client:
        if plan.effort is CHECK and client.parameters > LARGE:
            plan = replace(plan, effort=CHECK_LARGE)
            results.effort = plan.effort.name
        describe(results, client)
        spent = _resume(results, path, client)
        done = {verdict.key: verdict for verdict in results.verdicts}
        results.stale = unmatched_entries(known_failures, name)
        asked = list(cells(plan, client.configs))
        begin(results, [cell.key for cell in asked])
        task = Task(name, plan.effort, plan.seed, out / "failures" / name, known_failures, done)
        found = _Found(results, asked)
        written = 0.0  # until there are more verdicts, the file of an interrupted run holds more
        try:
            for one in execute(task, list(by_config(asked).values()), client):
                if isinstance(one, Begun):
                    running(one.key)
                    continue
                found.add(one)
                if isinstance(one, Judged):
                    tell(one.verdict)
                results.seconds = round(spent + time.perf_counter() - began, 3)
                if len(found.cells) > len(done) and time.perf_counter() - written > PAUSE:
                    found.write(path)
                    written = time.perf_counter()
        except BackendUnavailable as error:
            set_unavailable(results, error)
        except BaseException:
            if len(found.cells) > len(done):
                found.write(path)
            raise
        found.gather()
        if not results.unavailable and results.target is None:
            vectors_of(path).unlink(missing_ok=True)  # of an earlier run
            if found.vectors:
                ordered = {name: found.vectors[name] for name in by_config(asked) if name in found.vectors}
                write_vectors(vectors_of(path), ordered)
        results.guarantees = measured(results.verdicts)
        results.environment = {**client.imported(), **found.imported, **results.environment}
        if plan.explain and not results.unavailable:
            configs = {cell.config_name: cell.config for cell in asked}
            explain_failures.add(client, results, configs, task.failures)
        results.finished = not results.unavailable
        results.seconds = round(spent + time.perf_counter() - began, 3)
        results.write(path)
    return results


class _Found:
    """What has been found so far, which ``gather`` puts into the results in the order of the cells."""

    def __init__(self, results: Results, asked: Sequence[Cell]) -> None:
        self.results, self.asked = results, asked
        self.cells: dict[Key, Judged] = {}
        self.vectors: dict[str, Any] = {}
        self.imported: dict[str, str] = {}
        self._stale = results.stale

    def add(self, one: Judged | ConfigDone) -> None:
        if isinstance(one, Judged):
            self.cells[one.verdict.key] = one
            return
        self.imported |= one.imported
        if one.vectors is not None:
            self.vectors[one.config] = one.vectors

    def gather(self) -> None:
        ordered = [self.cells[cell.key] for cell in self.asked if cell.key in self.cells]
        self.results.verdicts = [one.verdict for one in ordered]
        self.results.runtime_info |= {one.verdict.config: one.runtime_info for one in ordered if one.runtime_info}
        self.results.known_failures = [one.known for one in ordered if one.known is not None]
        self.results.stale = [*self._stale, *(one.stale for one in ordered if one.stale)]

    def write(self, path: Path) -> None:
        self.gather()
        self.results.write(path)


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


def _interrupted(results: Results, path: Path) -> bool:
    """Whether the file holds verdicts of a run like this one that did not come to its end."""
    try:
        earlier = read(path)
    except SpecError:
        return False
    alike = all(getattr(results, name) == getattr(earlier, name) for name in (*SAME_RUN, "shard") if name != "claims")
    return alike and not earlier.finished and bool(earlier.verdicts)


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
