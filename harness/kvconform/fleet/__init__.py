"""A run on more than one machine: units of work, where their results are kept, and who executes them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from kvconform.errors import BadArgument
from kvconform.fleet.store import Store, stored
from kvconform.fleet.units import Costs
from kvconform.results.results import read
from kvconform.run.jobs import Executor, in_processes
from kvconform_specs.errors import SpecError

if TYPE_CHECKING:
    from kvconform.fleet.on_ray import OnRay


def executor(jobs: int = 1, on: str = "", store: str = "", runtime_env: Path | None = None) -> Executor:
    """Who judges the units of a run. Raises BadArgument, and Unavailable where a package is missing.

    jobs: processes of this machine. on: ``ray`` or ``ray:ADDRESS`` instead. store: where units are kept, by digest.
    runtime_env: a JSON file with Ray's ``runtime_env``.
    """
    execute = in_processes(jobs)
    if on:
        if jobs > 1:
            raise BadArgument("jobs", jobs, (), "--jobs and --on exclude each other: a cluster runs a unit on each CPU")
        execute = cluster(on, runtime_env)
    return stored(Store(store), execute) if store else execute


def cluster(on: str, runtime_env: Path | None = None) -> OnRay:
    """The Ray cluster of ``ray`` or ``ray:ADDRESS``. Raises BadArgument, and Unavailable where Ray is missing."""
    from kvconform.fleet.on_ray import OnRay, ray_address

    return OnRay(ray_address(on), _json(runtime_env))


def _json(file: Path | None) -> dict[str, object]:
    if file is None:
        return {}
    try:
        return msgspec.json.decode(file.read_bytes(), type=dict[str, object])
    except (OSError, msgspec.MsgspecError) as error:
        raise BadArgument("runtime_env", str(file), (), f"{file} holds no JSON object: {error}") from error


def costs_of(path: Path) -> Costs:
    """Seconds of each cell in an earlier results file; nothing where there is none."""
    try:
        return {verdict.key: verdict.seconds for verdict in read(path).verdicts}
    except SpecError:
        return {}
