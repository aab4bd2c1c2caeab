"""Where the results of units are kept: a folder, or any place that fsspec can address, such as ``s3://bucket/path``."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from kvconform.errors import Unavailable
from kvconform.files import write_atomically
from kvconform.fleet.units import digest
from kvconform.judging.verdict import Reason, Verdict
from kvconform.results.known_failures import Row
from kvconform.run.jobs import Executor, Found
from kvconform.run.unit import ConfigDone, Judged, Task
from kvconform.search.cell import Cell
from kvconform.worker.client import WorkerClient

SCHEMA = "kvconform-unit/1"


class JudgedCell(msgspec.Struct, frozen=True):
    """One cell of a stored unit."""

    verdict: Verdict
    known: Row | None
    stale: str
    runtime_info: dict[str, Any]


class StoredUnit(msgspec.Struct, frozen=True):
    """What became of a unit: everything that a run takes from it. Written as MessagePack."""

    schema: str
    name: str
    """The digest."""
    config: str
    cells: list[JudgedCell]
    imported: dict[str, str]
    vectors: bytes
    """The outputs of the common program as a NumPy file; empty if there are none."""
    counterexamples: dict[str, bytes]
    """Files, by name."""


class Store:
    """Units by their digest. Raises Unavailable if the place needs a package that is not installed."""

    def __init__(self, place: str) -> None:
        self.place = place.rstrip("/")
        self._remote: Any = None
        if "://" in place:
            try:
                import fsspec
            except ImportError as error:
                raise Unavailable(f"the store {place} needs fsspec", "pip install fsspec") from error
            self._remote, self.place = fsspec.core.url_to_fs(self.place)

    def read(self, name: str) -> StoredUnit | None:
        """The unit; None if it is not stored, or was stored by another version."""
        try:
            data = self._remote.cat_file(self._path(name)) if self._remote else Path(self._path(name)).read_bytes()
            found = msgspec.msgpack.decode(data, type=StoredUnit)
        except (FileNotFoundError, msgspec.MsgspecError):
            return None
        return found if found.schema == SCHEMA and found.name == name else None

    def write(self, unit: StoredUnit) -> None:
        data = msgspec.msgpack.encode(unit)
        if self._remote is None:
            write_atomically(Path(self._path(unit.name)), data)
        else:
            self._remote.makedirs(self.place, exist_ok=True)
            self._remote.pipe_file(self._path(unit.name), data)

    def _path(self, name: str) -> str:
        return f"{self.place}/{name}.unit"


def packed(name: str, cells: Sequence[Judged], end: ConfigDone, failures: Path) -> StoredUnit:
    """A finished unit as data. ``failures``: where its counterexamples were written."""
    vectors = io.BytesIO()
    if end.vectors is not None:
        np.save(vectors, end.vectors, allow_pickle=False)
    named = {one.verdict.counterexample for one in cells} - {""}
    return StoredUnit(
        SCHEMA,
        name,
        end.config,
        [JudgedCell(one.verdict, one.known, one.stale, one.runtime_info) for one in cells],
        end.imported,
        vectors.getvalue(),
        {file: (failures / file).read_bytes() for file in sorted(named) if (failures / file).exists()},
    )


def unpacked(unit: StoredUnit, failures: Path) -> list[Found]:
    """What a unit found; its counterexamples are written into ``failures``."""
    for name, data in unit.counterexamples.items():
        write_atomically(failures / Path(name).name, data)
    vectors = np.load(io.BytesIO(unit.vectors), allow_pickle=False) if unit.vectors else None
    cells = [Judged(one.verdict, one.known, one.stale, one.runtime_info) for one in unit.cells]
    return [*cells, ConfigDone(unit.config, vectors, unit.imported)]


def stored(store: Store, execute: Executor) -> Executor:
    """Takes units that are stored from there, has the others executed, and stores each as it ends."""

    def executor(task: Task, units: Sequence[Sequence[Cell]], client: WorkerClient) -> Iterator[Found]:
        names = [digest(task, cells, client) for cells in units]
        missing = []
        for name, cells in zip(names, units, strict=True):
            unit = store.read(name)
            if unit is None:
                missing.append(cells)
            else:
                yield from unpacked(unit, task.failures)
        yield from _stored(store, execute(task, missing, client), dict(_by_cell(names, units)), task.failures)

    return executor


def _by_cell(
    names: Iterable[str], units: Iterable[Sequence[Cell]]
) -> Iterator[tuple[tuple[str, str], tuple[str, int]]]:
    """For each cell, its unit and the number of the unit's cells."""
    for name, cells in zip(names, units, strict=True):
        for cell in cells:
            yield cell.key, (name, len(cells))


def _stored(
    store: Store, news: Iterable[Found], units: dict[tuple[str, str], tuple[str, int]], failures: Path
) -> Iterator[Found]:
    """Units may be under way at once: their cells come mixed, those of one unit in order and before its end."""
    held: dict[str, list[Judged]] = {}
    for one in news:
        if isinstance(one, Judged):
            held.setdefault(units[one.verdict.key][0], []).append(one)
        elif isinstance(one, ConfigDone):
            for name, found in list(held.items()):
                whole = units[found[0].verdict.key][1] == len(found)
                if whole and found[0].verdict.config == one.config:
                    if not any(_of_this_machine(cell.verdict) for cell in found):
                        store.write(packed(name, found, one, failures))
                    del held[name]
                    break
        yield one


def _of_this_machine(verdict: Verdict) -> bool:
    """Whether the machine has decided: a worker was killed from outside, had no memory, or ran out of time. Such a unit
    is not done."""
    return verdict.cut or verdict.reason in (Reason.KILLED, Reason.OUT_OF_MEMORY)
