"""Units on a cluster of two nodes on this machine: the same results, and what dies meanwhile costs nothing but time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from places import SUPPORT
from small_runs import FAULT, PLAN, without_times

from kvconform.fleet.on_ray import OnRay
from kvconform.judging.verdict import Outcome
from kvconform.mutation.audit import AuditPlan, audit
from kvconform.mutation.fault import load_faults
from kvconform.mutation.record import Audited
from kvconform.results.results import read
from kvconform.run.jobs import in_processes
from kvconform.run.run import run_backend
from kvconform.search.effort import EFFORTS
from kvconform.worker.client import WorkerSpec

ray = pytest.importorskip("ray", reason="needs Ray: nox -s fleet")
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ray"), pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)  # of the nodes
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    made.add_node(num_cpus=1)
    made.wait_for_nodes()
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.mark.parametrize("backend", ["numpy", FAULT])
def test_a_cluster_finds_what_one_process_finds(backend: str, cluster: Any, tmp_path: Path) -> None:
    one = run_backend("mine", WorkerSpec(backend), PLAN, tmp_path / "1", execute=in_processes(1))
    two = run_backend("mine", WorkerSpec(backend), PLAN, tmp_path / "2", execute=OnRay(cluster.address))
    assert without_times(one) == without_times(two)
    written = [{file.name: file.read_bytes() for file in (tmp_path / n / "failures").rglob("*.json")} for n in "12"]
    assert written[0] == written[1]


def test_a_backend_that_dies_is_a_verdict_and_is_not_started_again(cluster: Any, tmp_path: Path) -> None:
    backend = f"{SUPPORT / 'subjects.py'}:Segfaults"
    found = run_backend("mine", WorkerSpec(backend), PLAN, tmp_path, execute=OnRay(cluster.address))
    assert {verdict.outcome for verdict in found.verdicts if verdict.clause == "equivalence.decode"} == {Outcome.CRASH}


def test_a_node_that_is_lost_loses_no_cell_and_judges_none_twice(cluster: Any, tmp_path: Path) -> None:
    whole = run_backend("mine", WorkerSpec("numpy"), PLAN, tmp_path / "1", execute=in_processes(1))
    extra = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    told: list[tuple[str, str]] = []

    def tell(verdict: Any) -> None:
        if not told:
            cluster.remove_node(extra, allow_graceful=False)
        told.append(verdict.key)

    found = run_backend("mine", WorkerSpec("numpy"), PLAN, tmp_path / "2", tell, execute=OnRay(cluster.address))
    assert without_times(found) == without_times(whole)
    assert len(told) == len(set(told)) == len(whole.verdicts)


def test_a_driver_that_was_killed_goes_on_with_what_is_stored(cluster: Any, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "kvconform", "run", "-b", "numpy", "--effort", "smoke"]
    command += [word for config in PLAN.configs for word in ("--config", config)]
    command += [word for clause in PLAN.clauses for word in ("--clause", clause)]
    command += ["--on", f"ray:{cluster.address}", "--store", str(tmp_path / "units")]
    driver = subprocess.Popen([*command, "--out", str(tmp_path / "1")], stdout=subprocess.DEVNULL)
    end = time.monotonic() + 300
    while not list(tmp_path.glob("units/*.unit")) and time.monotonic() < end:
        time.sleep(0.01)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    kept = {file.name: file.stat().st_mtime_ns for file in tmp_path.glob("units/*.unit")}
    assert kept
    done = subprocess.run([*command, "--out", str(tmp_path / "2")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {name: (tmp_path / "units" / name).stat().st_mtime_ns for name in kept} == kept
    whole = run_backend("numpy", WorkerSpec("numpy"), PLAN, tmp_path / "3")
    assert without_times(read(tmp_path / "2" / "numpy.json")).verdicts == without_times(whole).verdicts


def test_an_audit_on_a_cluster_finds_what_one_process_finds(cluster: Any, tmp_path: Path) -> None:
    faults = [fault for fault in load_faults("kvconform_backends.faults:FAULTS") if fault.name.startswith("reset-k")]
    plan = AuditPlan((EFFORTS["smoke"],), 0)
    one = audit(plan, "faults", faults, [], tmp_path / "1.json")
    two = audit(plan, "faults", faults, [], tmp_path / "2.json", execute=OnRay(cluster.address).audits)
    assert len(faults) >= 1
    assert [without_seconds(audited) for audited in one.audited] == [without_seconds(a) for a in two.audited]


def without_seconds(audited: Audited) -> Audited:
    return msgspec.structs.replace(
        audited, trials=[msgspec.structs.replace(trial, seconds=0.0) for trial in audited.trials]
    )
