"""Judges the configs of a run one after another, or in several processes: Hypothesis is for one thread.

The processes take whole configs, the longest first, each with a worker of its own. What they find is the same cell by
cell, unless a backend leaks state from the model of one config into that of another.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing.queues import Queue
from queue import Empty
from threading import Thread
from typing import Protocol

from kvconform.errors import Unavailable
from kvconform.run.unit import Begun, ConfigDone, Judged, Task, judged_config
from kvconform.search.cell import Cell
from kvconform.worker.client import WorkerClient, WorkerSpec
from kvconform_specs.clauses import BY_NAME
from kvconform_specs.config import Config
from kvconform_specs.configs import share

Found = Begun | Judged | ConfigDone


class Executor(Protocol):
    """Judges units, and yields what is found as it is found: cells of one unit in their order, then its end.

    A unit is the cells of one config, or consecutive ones of them. ``client`` is of this process. Raises
    BackendUnavailable.
    """

    def __call__(self, task: Task, units: Sequence[Sequence[Cell]], client: WorkerClient) -> Iterator[Found]: ...


LOOK = 0.2
"""Seconds without news after which it is looked whether a process has ended."""


def in_processes(jobs: int = 1) -> Executor:
    """Executes units in ``jobs`` processes of this machine; in this one where there is one job or one unit.

    Raises BackendUnavailable, also where a process was killed.
    """

    def executor(task: Task, units: Sequence[Sequence[Cell]], client: WorkerClient) -> Iterator[Found]:
        if min(jobs, len(units)) <= 1:
            for cells in units:
                yield from judged_config(task, cells, client)
        else:
            yield from _in_pool(task, units, client.spec, jobs)

    return executor


def _in_pool(task: Task, units: Sequence[Sequence[Cell]], spec: WorkerSpec, jobs: int) -> Iterator[Found]:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the processes that are started below inherit it
    context = multiprocessing.get_context("spawn")
    news: Queue[Found] = context.Queue()
    longest_first = sorted(units, key=lambda cells: -len(cells) * share(cells[0].config_name))
    with ProcessPoolExecutor(min(jobs, len(units)), context, _begin, (spec, news)) as pool:
        try:
            waited = [pool.submit(_judge, _unit(task, cells)) for cells in longest_first]
            yield from _told(news, waited)
        finally:
            pool.shutdown(cancel_futures=True)  # what runs is waited for


def _told(news: Queue[Found], waited: Sequence[Future[None]]) -> Iterator[Found]:
    """What the processes say, until all units are done. Raises what ended one of them."""
    left = len(waited)
    while left:
        try:
            one = news.get(timeout=LOOK)
        except Empty:
            for future in waited:
                if future.done():
                    _raise_what_ended(future)
        else:
            left -= isinstance(one, ConfigDone)
            yield one


def _raise_what_ended(future: Future[None]) -> None:
    try:
        future.result()
    except BrokenExecutor as error:
        ended = "one of the processes that judge configs ended unexpectedly: killed, or out of memory"
        raise Unavailable(ended, "the run goes on where it stopped if it is started again") from error


@dataclass(frozen=True)
class _Unit:
    """The cells of one config, as data: a clause cannot be sent to another process."""

    task: Task
    config: Config
    name: str
    clauses: tuple[str, ...]


def _unit(task: Task, cells: Sequence[Cell]) -> _Unit:
    first, clauses = cells[0], tuple(cell.clause.name for cell in cells)
    done = {key: verdict for key, verdict in task.done.items() if key[1] == first.config_name}
    return _Unit(replace(task, done=done), first.config, first.config_name, clauses)


# --- in a process of the pool ---
class _Process:
    """What a process has for all of its configs. The first one starts its worker; what that raises is raised there."""

    def __init__(self, spec: WorkerSpec, news: Queue[Found]) -> None:
        self.spec, self.news = spec, news
        self.client: WorkerClient | None = None

    def judge(self, unit: _Unit) -> None:
        if self.client is None:
            self.client = WorkerClient(self.spec)
        cells = [Cell(BY_NAME[clause], unit.config, unit.name) for clause in unit.clauses]
        for one in judged_config(unit.task, cells, self.client):
            self.news.put(one)


_process: _Process


def _begin(spec: WorkerSpec, news: Queue[Found]) -> None:
    global _process
    gc.freeze()  # what was imported lives as long as the process: looking for garbage in it takes 5 % of the time
    _process = _Process(spec, news)
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A process whose parent was killed would wait for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _judge(unit: _Unit) -> None:
    _process.judge(unit)
