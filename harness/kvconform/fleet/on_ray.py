"""Executes units on a Ray cluster (extra ``ray``). Ray schedules, retries and moves data; nothing of that is ours.

A unit runs in a process of Ray, which starts the worker of the backend as on one machine: what the backend does there,
its death included, is a verdict and never retried. The death of a node, or of Ray's process, is retried by Ray.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from kvconform.errors import BadArgument, Unavailable
from kvconform.fleet.store import StoredUnit, packed, unpacked
from kvconform.mutation.audit import Task as AuditTask
from kvconform.mutation.audit import audit_fault
from kvconform.mutation.record import Audited
from kvconform.run.jobs import Found
from kvconform.run.unit import ConfigDone, Judged, Task, judged_config
from kvconform.search.cell import Cell
from kvconform.worker.client import WorkerClient, WorkerSpec
from kvconform_specs.clauses import BY_NAME

PREFIX = "ray"
RETRIES = 5
"""How often Ray starts a unit again whose node died."""


def ray_address(place: str) -> str | None:
    """The address in ``ray:ADDRESS``; None for ``ray``: a cluster of this machine alone. Raises BadArgument."""
    kind, _, address = place.partition(":")
    if kind != PREFIX:
        raise BadArgument("on", place, (PREFIX, f"{PREFIX}:ADDRESS"))
    return address or None


class OnRay:
    """An executor on the cluster at ``address``, one CPU for each unit. ``runtime_env``: Ray's, for the engine."""

    def __init__(self, address: str | None, runtime_env: Mapping[str, Any] | None = None) -> None:
        try:
            import ray
        except ImportError as error:
            raise Unavailable("ray is not installed", "pip install 'kvconform[ray]'") from error
        self.ray = ray
        if not ray.is_initialized():
            ray.init(address=address, log_to_driver=False, configure_logging=False)
        self.runtime_env = dict(runtime_env or {})

    def __call__(self, task: Task, units: Sequence[Sequence[Cell]], client: WorkerClient) -> Iterator[Found]:
        """Raises Unavailable where a unit is lost for good."""
        spec = replace(client.spec, python="" if client.spec.python == sys.executable else client.spec.python)
        waiting = [self._sent(task, spec, cells) for cells in units]
        for future in self._ended(waiting):
            yield from unpacked(self._got(future), task.failures)

    def audits(self, tasks: Sequence[AuditTask]) -> Iterator[tuple[int, Audited]]:
        """Audits each fault as a unit of its own: an executor of ``mutation.audit``."""
        remote = self.ray.remote(audit_fault).options(**self._options(gpus=0))
        numbers = {remote.remote(task.fault, task.plan): number for number, task in enumerate(tasks)}
        for future in self._ended(list(numbers)):
            yield numbers[future], self._got(future)

    def _ended(self, waiting: list[Any]) -> Iterator[Any]:
        """Tasks of Ray as they end; what still runs when the caller stops is cancelled."""
        try:
            while waiting:
                (ready, *_), waiting = self.ray.wait(waiting)
                yield ready
        finally:
            for future in waiting:
                self.ray.cancel(future, force=True)

    def _options(self, gpus: int) -> dict[str, Any]:
        options: dict[str, Any] = {"num_cpus": 1, "num_gpus": gpus, "max_retries": RETRIES}
        # a node without the GPU, the driver or a package is no failure of the backend: another one may have it
        options |= {"retry_exceptions": [Unavailable], "scheduling_strategy": "SPREAD"}
        return options | ({"runtime_env": self.runtime_env} if self.runtime_env else {})

    def _sent(self, task: Task, spec: WorkerSpec, cells: Sequence[Cell]) -> Any:
        name = cells[0].config_name
        done = {key: verdict for key, verdict in task.done.items() if key[1] == name}
        sent = replace(task, failures=Path(), done=done)
        clauses = tuple(cell.clause.name for cell in cells)
        options = self._options(gpus=1 if spec.device == "cuda" else 0)
        return self.ray.remote(judge).options(**options).remote(sent, spec, cells[0].config, name, clauses)

    def _got(self, future: Any) -> Any:
        errors = self.ray.exceptions
        try:
            return self.ray.get(future)
        except errors.OutOfMemoryError as error:
            raise Unavailable(
                "the nodes had too little memory for a unit", "start Ray with fewer CPUs a node"
            ) from error
        except (errors.WorkerCrashedError, errors.NodeDiedError, errors.ObjectLostError) as error:
            raise Unavailable(
                f"the node of a unit died {RETRIES + 1} times",
                "the run goes on where it stopped if it is started again",
            ) from error


def judge(task: Task, spec: WorkerSpec, config: Any, name: str, clauses: tuple[str, ...]) -> StoredUnit:
    """On a node: judges the cells of one unit in a scratch folder, and returns everything as data."""
    cells = [Cell(BY_NAME[clause], config, name) for clause in clauses]
    with tempfile.TemporaryDirectory(prefix="kvconform-") as scratch:
        here = replace(task, failures=Path(scratch))
        with WorkerClient(_here(spec, scratch)) as client:
            found = list(judged_config(here, cells, client))
        judged = [one for one in found if isinstance(one, Judged)]
        (end,) = (one for one in found if isinstance(one, ConfigDone))
        return packed("", judged, end, here.failures)


def _here(spec: WorkerSpec, scratch: str) -> WorkerSpec:
    """On this node: its own interpreter, unless another one was asked for, and a folder of its own for artefacts."""
    environment = {**spec.environment, "KVCONFORM_ARTEFACTS": str(Path(scratch) / "artefacts")}
    return replace(spec, python=spec.python or sys.executable, environment=environment)
