"""Units of work: whole configs of a backend, or slices of one that would take too long, named by a digest.

The digest covers everything that the unit's result depends on, so that a unit that is stored anywhere is done.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec

import kvconform_specs
from kvconform import worker
from kvconform.run.jobs import Executor, Found
from kvconform.run.unit import Task
from kvconform.search.cell import Cell, Key
from kvconform.worker.client import WorkerClient
from kvconform_specs import SUITE_VERSION
from kvconform_specs.config import Config

OF_THE_HOST = ("platform", "machine")
"""Entries of an environment that may differ between the machines of a fleet. Of the platform the system and the
architecture count."""
PLACES = ("judging", "search", "worker", "run", "backend.py", "errors.py")
"""The parts of the harness whose sources are covered: what draws, executes and judges. Specs and shipped backends are
covered whole: a backend's own file is not all that it is made of."""
Costs = Mapping[Key, float]
"""Seconds of cells, by clause and config, as an earlier run took them."""


def divided(execute: Executor, costs: Costs, target: float) -> Executor:
    """Has configs that take longer than ``target`` seconds executed in slices."""

    def executor(task: Task, units: Sequence[Sequence[Cell]], client: WorkerClient) -> Iterator[Found]:
        yield from execute(task, list(_units(units, costs, target)), client)

    return executor


def _units(configs: Sequence[Sequence[Cell]], costs: Costs, target: float) -> Iterator[Sequence[Cell]]:
    """Whole configs, and slices of those whose cost is known to exceed ``target`` seconds.

    A config without known costs is not divided: a backend is built once for each unit.
    """
    for cells in configs:
        total = sum(costs.get(cell.key, 0.0) for cell in cells)
        if total <= target:
            yield cells
        else:
            yield from _slices(cells, costs, total / -(-total // target))


def _slices(cells: Sequence[Cell], costs: Costs, share: float) -> Iterator[Sequence[Cell]]:
    """Consecutive cells of about ``share`` seconds."""
    found: list[Cell] = []
    spent = 0.0
    for cell in cells:
        cost = costs.get(cell.key, 0.0)
        if found and spent + cost / 2 > share:
            yield found
            found, spent = [], 0.0
        found.append(cell)
        spent += cost
    yield found


def digest(task: Task, cells: Sequence[Cell], client: WorkerClient) -> str:
    """32 hexadecimal digits. ``client``: of the backend, for its claims and the versions of its environment."""
    config: Config = cells[0].config
    known = [task.known_failures.find(task.name, cell, client.spec.device) for cell in cells]
    depends: dict[str, Any] = {
        "suite": SUITE_VERSION,
        "sources": _sources(),
        "backend": [task.name, client.spec.address],
        "claims": client.claims.to_json(),
        "environment": _environment(client.environment),
        "device": client.spec.device,
        "config": [cells[0].config_name, config.to_json()],
        "clauses": [cell.clause.name for cell in cells],
        "effort": repr(task.effort),
        "seed": task.seed,
        "known": [None if one is None else msgspec.to_builtins(one.row) for one in known],
    }
    return hashlib.sha256(msgspec.json.encode(depends, order="sorted")).hexdigest()[:32]


def _environment(environment: Mapping[str, Any]) -> dict[str, Any]:
    found = {name: value for name, value in environment.items() if name not in OF_THE_HOST}
    system, _, rest = str(environment.get("platform", "")).partition("-")
    architectures = [word for word in ("x86_64", "aarch64", "arm64", "AMD64") if word in rest]
    return {**found, "system": [system, *architectures]}


@cache
def _sources() -> str:
    """A digest of our own code."""
    harness = Path(worker.__file__).parent.parent
    shipped = find_spec("kvconform_backends")  # not imported: it is the worker's
    roots = [
        Path(kvconform_specs.__file__).parent,
        harness,
        *map(Path, (shipped and shipped.submodule_search_locations) or ()),
    ]
    found = hashlib.sha256()
    for root in roots:
        for file in sorted(root.rglob("*.py")):
            inside = file.relative_to(root)
            if root != harness or inside.parts[0] in PLACES:
                found.update(f"{root.name}/{inside}".encode() + file.read_bytes())
    return found.hexdigest()[:16]
