"""Units: named by everything that their result depends on, kept in a folder or a URL, and judged once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from small_runs import CONFIGS, FAULT, PLAN, without_times

from kvconform.errors import Unavailable
from kvconform.fleet import costs_of, executor
from kvconform.fleet.store import Store, stored
from kvconform.fleet.units import digest, divided
from kvconform.results.known_failures import EMPTY
from kvconform.run.jobs import Executor, Found, in_processes
from kvconform.run.run import cells, path_of, run_backend
from kvconform.run.unit import Judged, Task, by_config
from kvconform.search.cell import Cell
from kvconform.worker.client import WorkerClient, WorkerSpec


class Counting:
    """An executor that counts the units that it is given."""

    def __init__(self, most: int | None = None) -> None:
        self.units: list[Sequence[Cell]] = []
        self.most = most

    def __call__(self, task: Task, units: Sequence[Sequence[Cell]], client: WorkerClient) -> Iterator[Found]:
        for unit in units:
            if self.most is not None and len(self.units) == self.most:
                raise KeyboardInterrupt
            self.units.append(unit)
            yield from in_processes(1)(task, [unit], client)


def run(out: Path, execute: Executor, backend: str = "numpy", **more: Any) -> Any:
    return run_backend("mine", WorkerSpec(backend), replace(PLAN, **more), out, execute=execute)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["numpy", FAULT])
@pytest.mark.parametrize("place", ["{folder}", "memory://units"])
def test_a_stored_unit_is_not_judged_again_wherever_the_results_go(backend: str, place: str, tmp_path: Path) -> None:
    if "://" in place:
        pytest.importorskip("fsspec")
    place = place.format(folder=tmp_path / "units") + backend.rpartition(":")[2]
    first, second = Counting(), Counting()
    one = run(tmp_path / "1", stored(Store(place), first), backend)
    two = run(tmp_path / "2", stored(Store(place), second), backend)
    assert (len(first.units), len(second.units)) == (len(CONFIGS), 0)
    assert without_times(one) == without_times(two)
    written = [
        {file.name: file.read_bytes() for file in (tmp_path / n / "failures").rglob("*.json")} for n in ("1", "2")
    ]
    assert written[0] == written[1]
    assert bool(written[0]) == (backend == FAULT)


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_where_it_was(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "units"))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "1", stored(store, Counting(2)))
    rest = Counting()
    found = run(tmp_path / "2", stored(store, rest))
    assert len(rest.units) == len(CONFIGS) - 2
    assert without_times(found) == without_times(run(tmp_path / "3", in_processes(1)))


@pytest.mark.slow
def test_a_config_that_takes_long_is_divided_and_its_results_are_the_same(tmp_path: Path) -> None:
    whole = run(tmp_path / "1", in_processes(1))
    costs = costs_of(path_of("mine", PLAN, tmp_path / "1"))
    counting = Counting()
    halves = run(tmp_path / "2", divided(counting, costs, max(sum(costs.values()) / len(CONFIGS) / 2, 1e-6)))
    assert len(counting.units) > len(CONFIGS)
    assert without_times(halves) == without_times(whole)


def test_a_digest_covers_what_a_unit_depends_on(tmp_path: Path) -> None:
    units = list(by_config(cells(PLAN)).values())
    task = Task("mine", PLAN.effort, 0, tmp_path, EMPTY, {})
    with WorkerClient(WorkerSpec("numpy")) as client:
        same = digest(task, units[0], client)
        assert digest(replace(task, failures=tmp_path / "elsewhere"), units[0], client) == same
        client.environment = {**client.environment, "platform": f"{client.environment['platform']}-another-kernel"}
        assert digest(task, units[0], client) == same
        changed = {
            digest(replace(task, seed=1), units[0], client),
            digest(replace(task, name="other"), units[0], client),
            digest(replace(task, effort=replace(task.effort, structures=99)), units[0], client),
            digest(task, units[1], client),
            digest(task, units[0][1:], client),
        }
        client.environment = {**client.environment, "numpy": "0"}
        changed.add(digest(task, units[0], client))
    assert len({same, *changed}) == 7


def test_what_is_no_unit_is_judged_again(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    (tmp_path / "ab.unit").write_bytes(b"half a fi")
    assert store.read("ab") is None
    assert store.read("absent") is None


def test_a_missing_package_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(Unavailable, match="ray is not installed"):
        executor(on="ray")
    with pytest.raises(ValueError, match="unknown on 'slurm'; known: ray, ray:ADDRESS"):
        executor(on="slurm")


@pytest.mark.slow
def test_a_unit_that_the_machine_has_cut_short_is_not_kept(tmp_path: Path) -> None:
    def cut(task: Task, units: Sequence[Sequence[Cell]], client: WorkerClient) -> Iterator[Found]:
        for one in in_processes(1)(task, units, client):
            yield (
                replace(one, verdict=msgspec.structs.replace(one.verdict, cut=True)) if isinstance(one, Judged) else one
            )

    run(tmp_path / "1", stored(Store(str(tmp_path / "units")), cut))
    assert not list(tmp_path.glob("units/*.unit"))
