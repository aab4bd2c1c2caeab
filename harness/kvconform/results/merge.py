"""``kvconform merge``: one results file of several parts of a run, joined cell by cell.

A part is a shard, a selection of clauses or configs, or an interrupted run. Parts may come from several hosts: kernels,
processors and load may differ; versions, the backend's file, its claims, the device and what was asked may not.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from kvconform.files import write_atomically
from kvconform.judging.verdict import Outcome, Reason, Verdict
from kvconform.results.guarantees import measured
from kvconform.results.results import SAME_RUN, Results, configs_of
from kvconform_specs import SUITE_VERSION
from kvconform_specs.clauses import ALL
from kvconform_specs.configs import CONFIGS, label
from kvconform_specs.errors import SpecError
from kvconform_specs.serving import clauses as serving


def merged(parts: Sequence[Results], names: Sequence[str] = ()) -> Results:
    """The results of all cells that the parts have judged. ``names``: of the parts, for messages.

    Raises SpecError if the parts are not of one run, a shard is missing, or a cell had other programs in two parts.
    """
    named = list(zip(names or [_name(part, at) for at, part in enumerate(parts, 1)], parts, strict=True))
    first_name, first = named[0]
    for name, part in named:
        if part.unavailable:
            raise SpecError(name, part.unavailable)
        _same_run(first_name, first, name, part)
    verdicts = _in_order(_cells(named), first)
    found = msgspec.structs.replace(
        first,
        shard="",
        verdicts=verdicts,
        environment=_environment(parts),
        started=min(part.started for part in parts),
        seconds=round(sum(part.seconds for part in parts), 3),
        runtime_info=_by_config(part.runtime_info for part in parts),
        guarantees=measured(verdicts),
        known_failures=list({row.place: row for part in parts for row in part.known_failures}.values()),
        stale=list(dict.fromkeys(words for part in parts for words in part.stale)),
        maps=_by_config(part.maps for part in parts),
        diagnoses=_by_config(part.diagnoses for part in parts),
        target=_target(parts),
        clauses=[],
        configs=[],
        finished=True,
    )
    if found.partial or found.suite != SUITE_VERSION:  # of another suite it is not known which cells there are
        _all_shards(named)
        found.finished = all(part.finished for part in parts)
        found.clauses, found.configs = first.clauses, first.configs
        if any((part.clauses, part.configs) != (first.clauses, first.configs) for part in parts):
            found.clauses = list(dict.fromkeys(verdict.clause for verdict in verdicts))
            found.configs = list(dict.fromkeys(verdict.config for verdict in verdicts))
    return found


def _name(part: Results, at: int) -> str:
    return f"shard {part.shard}" if part.shard else f"part {at}"


def _same_run(one_name: str, one: Results, name: str, part: Results) -> None:
    pairs: list[tuple[str, Any, Any]] = []
    for field in SAME_RUN:
        mine, its = getattr(one, field), getattr(part, field)
        both = mine.keys() | its.keys() if isinstance(mine, dict) else ()
        pairs += [(f"{field}.{key}", mine.get(key), its.get(key)) for key in sorted(both)] or [(field, mine, its)]
    known = sorted(one.environment.keys() & part.environment.keys() - HOST)
    pairs += [(f"environment.{key}", one.environment[key], part.environment[key]) for key in known]
    kinds = sorted(_hosts(one)), sorted(_hosts(part))
    pairs += [("the kind of host", " and ".join(kinds[0]), " and ".join(kinds[1]))] if all(kinds) else []
    if one.target is not None and part.target is not None:
        pairs.append(("target.configs", one.target.configs, part.target.configs))
    for field, mine, its in pairs:
        if mine != its:
            raise SpecError("merge", f"{field} is {mine} in {one_name} and {its} in {name}")


HOST = {"machine", "platform"}
"""The entries of an environment that are about the host. Of them the system and the architecture must agree."""


def _hosts(part: Results) -> set[str]:
    """The systems and architectures of the hosts of a part: more than one where it was merged before."""
    machines, platforms = (_listed(part.environment.get(name)) for name in ("machine", "platform"))
    systems = {str(found).partition("-")[0] for found in platforms}
    return {
        " ".join([*sorted(systems), str(machine.get("machine"))]) for machine in machines if isinstance(machine, dict)
    }


def _listed(found: Any) -> list[Any]:
    return found if isinstance(found, list) else [] if found is None else [found]


def _environment(parts: Sequence[Results]) -> dict[str, Any]:
    """What the parts agree on; of the hosts, each one that differs."""
    found: dict[str, Any] = {}
    for part in parts:
        found = {**part.environment, **found}
    for name in HOST & found.keys():
        hosts: list[Any] = []
        for one in (one for part in parts for one in _listed(part.environment.get(name))):
            hosts += [one] if one not in hosts else []
        found[name] = hosts[0] if len(hosts) == 1 else hosts
    return found


def _cells(named: Sequence[tuple[str, Results]]) -> dict[tuple[str, str], Verdict]:
    found: dict[tuple[str, str], tuple[str, Verdict]] = {}
    for name, part in named:
        for verdict in part.verdicts:
            other, held = found.setdefault(verdict.key, (name, verdict))
            if held.digest and verdict.digest and held.digest != verdict.digest:
                cell = f"{verdict.clause} [{verdict.config}]"
                raise SpecError("merge", f"{cell} had other programs in {other} than in {name}: judge it again")
            if _strength(verdict) < _strength(held):  # of equal ones the first
                found[verdict.key] = name, verdict
    return {key: verdict for key, (_, verdict) in found.items()}


def _strength(verdict: Verdict) -> int:
    """Which of several verdicts on a cell stands, the smallest number first: a failure before a pass, and both before
    what decides nothing."""
    if verdict.outcome.broken:
        return 0
    if verdict.outcome in (Outcome.KNOWN_FAILURE, Outcome.REFUTED):
        return 1
    if verdict.reason is Reason.NOT_CONFIRMED:
        return 2
    return {Outcome.PASS: 3, Outcome.UNSUPPORTED: 4}.get(verdict.outcome, 5)


def _in_order(found: dict[tuple[str, str], Verdict], one: Results) -> list[Verdict]:
    """In the order of a whole run: config by config."""
    configs = (
        list(configs_of(one))
        if one.target
        else [serving.CONFIG]
        if one.served
        else [label(name, dtype) for dtype in one.dtypes for name in CONFIGS]
    )
    clauses = [*(clause.name for clause in ALL), *(clause.name for clause in serving.CLAUSES)]
    places = {key: at for at, key in enumerate((clause, config) for config in configs for clause in clauses)}
    return sorted(found.values(), key=lambda verdict: places.get(verdict.key, len(places)))


def _by_config(entries: Iterator[dict[str, Any]]) -> dict[str, Any]:
    """The entries of all parts; of several for a config the first that holds something."""
    found: dict[str, Any] = {}
    for one in entries:
        found |= {name: value for name, value in one.items() if not found.get(name)}
    return found


def _target(parts: Sequence[Results]) -> Any:
    targets = [part.target for part in parts if part.target is not None]
    if not targets:
        return None
    assumed = dict.fromkeys(words for target in targets for words in target.assumed)
    noise = {name: level for target in targets for name, level in target.noise.items()}
    return msgspec.structs.replace(targets[0], assumed=list(assumed), noise=noise)


def _all_shards(named: Sequence[tuple[str, Results]]) -> None:
    """Raises SpecError unless the shards among the parts are all shards of one division."""
    shards = [part.shard for _, part in named if part.shard]
    counts = sorted({shard.partition("/")[2] for shard in shards})
    if len(counts) > 1:
        raise SpecError("merge", f"the shards {', '.join(shards)} belong to different divisions")
    selected = {(tuple(part.clauses), tuple(part.configs)): name for name, part in named if part.shard}
    if len(selected) > 1:
        raise SpecError("merge", f"the selections of {' and '.join(list(selected.values())[:2])} differ")
    wanted = [f"{index}/{count}" for count in counts for index in range(1, int(count) + 1)]
    missing = [shard for shard in wanted if shard not in shards]
    if missing:
        raise SpecError("merge", f"shard {', '.join(missing)} is missing")


# --- the files beside the results ---
def vectors_of(path: Path) -> Path:
    """Where the outputs for the comparison of backends are, beside a results file."""
    return path.parent / "vectors" / f"{path.stem}.npz"


def folder_of(path: Path) -> Path:
    """The folder of the run that wrote a results file; shards have one of their own in it."""
    return path.parent.parent if path.parent.name == "shards" else path.parent


def gather(files: Sequence[Path], whole: Results, out: Path) -> list[str]:
    """Copies counterexamples and vectors of the parts ``files`` beside ``out``. Returns the counterexamples that the
    results name and no part has."""
    failures, vectors = out.parent / "failures" / whole.backend, {}
    missing = []
    for name in sorted({verdict.counterexample for verdict in whole.verdicts} - {""}):
        held = [folder_of(file) / "failures" / whole.backend / name for file in files]
        source = next((file for file in held if file.exists()), None)
        if source is None:
            missing.append(name)
        elif not (failures / name).exists():
            failures.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, failures / name)
    for file in files:
        if vectors_of(file).exists():
            with np.load(vectors_of(file), allow_pickle=False) as arrays:
                vectors.update({config: arrays[config] for config in arrays.files})
    if vectors:
        write_vectors(out.parent / "vectors" / f"{whole.backend}.npz", vectors)
    return missing


def write_vectors(path: Path, vectors: dict[str, Any]) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **vectors)
    write_atomically(path, buffer.getvalue())
