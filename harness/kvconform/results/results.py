"""Results: one versioned JSON file for each backend or shard, rewritten whole and atomically after every cell."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import msgspec

from kvconform.explain.diagnosis import Diagnosis
from kvconform.explain.visibility import Map
from kvconform.files import read_versioned, write_atomically
from kvconform.judging.verdict import Outcome, Verdict
from kvconform.results.guarantees import Guarantee, measured
from kvconform.results.known_failures import Row
from kvconform_specs.clauses import BY_NAME
from kvconform_specs.config import Config
from kvconform_specs.configs import CONFIGS
from kvconform_specs.errors import SpecError

SCHEMA = "kvconform-results/3"
SAME_RUN = ("schema", "suite", "backend", "device", "dtypes", "effort", "seed", "claims", "environment")
"""What two parts of one run have in common: all that could change a verdict."""


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """A black box, which is judged by its own cache-less forward: how it is called, what was assumed of it, and its own
    configs by name.

    noise: for each, how far an output may stray at most by rounding, relative to the outputs' size.
    """

    recognised: str
    assumed: list[str]
    configs: dict[str, Any]
    noise: dict[str, float] = {}


class Results(msgspec.Struct, kw_only=True):
    """What one run of one backend gave.

    unavailable: why the backend could not run here at all. finished: all cells were judged; a run that was killed
    leaves False and is resumed. runtime_info: what really ran, by config. environment: versions, machine.
    shard: ``i/n`` where these are the cells of shard ``i`` of ``n``; empty: of a whole run. known_failures: the rows of known
    failures that held. stale: one sentence for each row that did not. power: the suite's null-model power table, by clause
    and dtype (``power``). guarantees: the guarantees measured, by config (``guarantees``). target: what was judged by itself
    (claim ``reference``); None where the truth is the definition. maps, diagnoses: of configs under which something is
    broken (of a black box: of each), what outputs see of tokens, and what the backend behaves like.
    """

    schema: str = SCHEMA
    suite: str
    backend: str
    device: str
    dtypes: list[str]
    effort: str
    seed: int
    started: str
    environment: dict[str, Any] = {}
    claims: dict[str, Any] = {}
    unavailable: str = ""
    verdicts: list[Verdict] = []
    runtime_info: dict[str, Any] = {}
    shard: str = ""
    known_failures: list[Row] = []
    stale: list[str] = []
    power: dict[str, Any] = {}
    guarantees: dict[str, Guarantee] = {}
    target: Target | None = None
    maps: dict[str, list[Map]] = {}
    diagnoses: dict[str, Diagnosis] = {}
    seconds: float = 0.0
    finished: bool = False

    def write(self, path: Path) -> None:
        write_atomically(path, msgspec.json.format(msgspec.json.encode(self), indent=1))

    def same_run(self, other: Results) -> bool:
        """Whether ``other`` is an earlier part of this run: nothing that could change a verdict differs."""
        return all(getattr(self, name) == getattr(other, name) for name in (*SAME_RUN, "shard"))


def read(path: Path) -> Results:
    """Raises SpecError with one sentence where the file holds no results."""
    return read_versioned(path, Results, SCHEMA, "results")


def schema() -> dict[str, Any]:
    """The JSON Schema of a results file."""
    return msgspec.json.schema(Results)


def configs_of(results: Results) -> dict[str, Config]:
    """The configs that a backend is asked for: the suite's, or a black box's own."""
    if results.target is None:
        return CONFIGS
    return {name: Config.from_json(config) for name, config in results.target.configs.items()}


def missing_core(results: Results, profile: str) -> list[str]:
    """Core clauses of a profile without a PASS under any of its configs; all of them for a shard, a part of a run."""
    passed = {
        verdict.clause
        for verdict in results.verdicts
        if verdict.outcome is Outcome.PASS and verdict.config.startswith(profile) and not results.shard
    }
    concerned = {
        name
        for name, clause in BY_NAME.items()
        if clause.core
        and any(clause.concerns(c) for c in configs_of(results).values() if c.profile == profile)
        and not (results.target is not None and clause.blind)
    }
    return sorted(concerned - passed)


def exit_code(results: Results) -> tuple[int, str]:
    """0 conformant, 1 non-conformant, 3 infrastructure, 5 inconclusive or core clauses missing; and the sentence.

    A stale known failure gives 1. A shard concludes nothing: it gives 0 where nothing in it stands against conformance.
    """
    broken = [verdict for verdict in results.verdicts if verdict.outcome.broken]
    if broken:
        return 1, f"non-conformant: {len(broken)} of {len(results.verdicts)} cells broken"
    if results.stale:
        return 1, f"stale known failures: {_counted(len(results.stale), 'row')} to mend or to remove"
    if results.unavailable:
        return 3, results.unavailable
    if not results.finished:
        return 5, f"the run did not finish: {len(results.verdicts)} cells were judged"
    profiles = sorted({config.profile for config in configs_of(results).values()})
    missing = {profile: missing_core(results, profile) for profile in profiles}
    good = [profile for profile in profiles if not missing[profile]]
    undecided = [v for v in results.verdicts if v.outcome in (Outcome.INCONCLUSIVE, Outcome.NOT_EXERCISED)]
    if undecided:
        return 5, f"inconclusive or not exercised: {len(undecided)} of {len(results.verdicts)} cells"
    known = sum(verdict.outcome is Outcome.KNOWN_FAILURE for verdict in results.verdicts)
    more = f", but {_counted(known, 'known failure')}" if known else ""
    if results.shard:
        cells = _counted(len(results.verdicts), "cell")
        return 0, f"shard {results.shard}: {cells}, nothing broken{more}; merge the shards to conclude"
    if not good:
        profile = min(profiles, key=lambda p: len(missing[p]))
        return 5, f"not conformant: no PASS on the core clauses {', '.join(missing[profile])} ({profile} profile)"
    by = ", judged by its own forward" if results.target is not None else ""
    return 0, f"conformant: {' and '.join(good)} profile{by}{more}"


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def merged(parts: Sequence[Results]) -> Results:
    """The run whose shards these are, all of them. Raises SpecError with one sentence where they are not."""
    shards: dict[int, Results] = {}
    first = parts[0]
    for part in parts:
        index, count = _place(part)
        _same_run(first, part)
        if shards.setdefault(index, part) != part:
            raise SpecError(f"shard {part.shard}", "is given twice, and differs")
    missing = [f"{index}/{count}" for index in range(1, count + 1) if index not in shards]
    if missing:
        raise SpecError("merge", f"shard {', '.join(missing)} is missing")
    ordered = [shards[index] for index in range(1, count + 1)]
    verdicts = _dealt_back(ordered)
    environment = dict(first.environment)
    machines = [part.environment.get("machine") for part in ordered]
    if any(machine != machines[0] for machine in machines):
        environment["machine"] = machines
    return msgspec.structs.replace(
        first,
        shard="",
        verdicts=verdicts,
        environment=environment,
        started=min(part.started for part in ordered),
        seconds=round(sum(part.seconds for part in ordered), 3),
        runtime_info=_union("runtime_info", ordered, strict=False),
        power=_union("power", ordered),
        guarantees=measured(verdicts),
        known_failures=[row for part in ordered for row in part.known_failures],
        stale=list(dict.fromkeys(words for part in ordered for words in part.stale)),
    )


def _place(part: Results) -> tuple[int, int]:
    """Index and count of a finished shard."""
    if not part.shard:
        raise SpecError(f"results of {part.backend}", "are of a whole run, not of a shard")
    if part.unavailable or not part.finished:
        raise SpecError(f"shard {part.shard}", part.unavailable or "did not finish: run it again, it goes on")
    index, _, count = part.shard.partition("/")
    return int(index), int(count)


def _same_run(first: Results, part: Results) -> None:
    """Shards may run on different machines, but with the same versions of everything."""
    if first.shard.partition("/")[2] != part.shard.partition("/")[2]:
        raise SpecError("merge", f"shards {first.shard} and {part.shard} are not of one division")
    for name in SAME_RUN:
        mine, other = getattr(first, name), getattr(part, name)
        if isinstance(mine, dict):  # say which entry it is
            keys = [key for key in {**mine, **other} if key != "machine" and mine.get(key) != other.get(key)]
            name = f"{name}.{keys[0]}" if keys else name
            mine, other = (mine.get(keys[0]), other.get(keys[0])) if keys else (None, None)
        if mine != other:
            raise SpecError("merge", f"{name} of shard {first.shard} is {mine}, of shard {part.shard} {other}")


def _dealt_back(ordered: Sequence[Results]) -> list[Verdict]:
    """The verdicts of all shards in the order of the whole run: cells were dealt to shards in turn."""
    total = sum(len(part.verdicts) for part in ordered)
    for index, part in enumerate(ordered):
        due = len(range(index, total, len(ordered)))
        if len(part.verdicts) != due:
            words = f"has {_counted(len(part.verdicts), 'cell')}, its part of {total} is {due}: not one selection"
            raise SpecError(f"shard {part.shard}", words)
    turns = zip_longest(*(part.verdicts for part in ordered))
    verdicts = [verdict for turn in turns for verdict in turn if verdict is not None]
    seen: set[tuple[str, str]] = set()
    for verdict in verdicts:
        if verdict.key in seen:
            raise SpecError("merge", f"{verdict.clause} [{verdict.config}] is in two shards")
        seen.add(verdict.key)
    return verdicts


def _union(name: str, ordered: Sequence[Results], strict: bool = True) -> dict[str, Any]:
    """One dictionary of the shards' own; ``strict`` refuses different values of one key, else the last one counts."""
    found: dict[str, Any] = {}
    for part in ordered:
        for key, value in getattr(part, name).items():
            if strict and found.get(key, value) != value:
                raise SpecError("merge", f"{name}.{key} differs between shards")
            found[key] = value
    return found
