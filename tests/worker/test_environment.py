"""A record names every distribution that the worker imported, and the GPU where one was asked for."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import msgspec
import pytest

from kvconform import host
from kvconform.host import gpu
from kvconform.results.results import read
from kvconform.run.run import plan_for, run_backend
from kvconform.worker.client import WorkerClient, WorkerSpec

LATE = '''
from kvconform_backends.numpy.cache import NumpyCache
import yaml


class Late(NumpyCache):
    """Imports one package at once, and one where it is built."""

    def __init__(self, *given):
        import jinja2

        super().__init__(*given)
'''


@pytest.fixture
def spec(tmp_path: Path) -> WorkerSpec:
    (tmp_path / "late.py").write_text(LATE)
    return WorkerSpec(f"{tmp_path / 'late.py'}:Late")


def test_what_a_worker_imports_is_recorded_also_where_it_comes_late(spec: WorkerSpec, tmp_path: Path) -> None:
    with WorkerClient(spec) as client:
        early = dict(client.imported())
    assert early["PyYAML"] == version("PyYAML")
    assert "Jinja2" not in early
    plan = plan_for("smoke", clauses=["shape.output"], configs=["attention-gqa"])
    found = run_backend("late", spec, plan, tmp_path / "out").environment
    assert found["Jinja2"] == version("Jinja2")
    assert found["PyYAML"] == version("PyYAML")
    assert found["numpy"] == version("numpy")


def test_a_run_is_not_resumed_once_what_it_imports_late_has_changed(spec: WorkerSpec, tmp_path: Path) -> None:
    path = tmp_path / "out" / "late.json"
    plan = plan_for("smoke", clauses=["shape.output"], configs=["attention-gqa"])
    found = run_backend("late", spec, plan, tmp_path / "out")
    marked = [msgspec.structs.replace(verdict, seconds=12345.0) for verdict in found.verdicts]
    for jinja, resumed in ((version("Jinja2"), True), ("0.1", False)):
        environment = {**found.environment, "Jinja2": jinja}
        msgspec.structs.replace(found, verdicts=marked, finished=False, environment=environment).write(path)
        run_backend("late", spec, plan, tmp_path / "out")
        assert (read(path).verdicts == marked) is resumed


def test_the_versions_of_any_distributions_can_be_asked_for(spec: WorkerSpec) -> None:
    with WorkerClient(spec) as client:
        assert client.versions(["pytest", "no-such-distribution"]) == {"pytest": version("pytest")}


@pytest.mark.parametrize(
    ("visible", "found"),
    [
        (None, {"gpu": "NVIDIA H200", "driver": "570.1"}),
        ("1,0", {"gpu": "NVIDIA L4", "driver": "570.1"}),
        ("GPU-bb", {"gpu": "NVIDIA L4", "driver": "570.1"}),
        ("MIG-1", {"driver": "570.1"}),
    ],
)
def test_the_gpu_and_its_driver_are_those_that_cuda_may_use(
    visible: str | None, found: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\necho "0, GPU-aa11, NVIDIA H200, 570.1"\necho "1, GPU-bb22, NVIDIA L4, 570.1"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpu() == found


def test_where_there_is_no_gpu_nothing_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu() == {}


def test_free_memory_is_what_the_control_group_has_left_without_its_cache_of_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = host.free_memory()
    assert machine is not None
    assert machine > 0
    for name, text in (("memory.max", "3000\n"), ("memory.current", "2900\n"), ("memory.stat", "inactive_file 700\n")):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(host, "_cgroup_files", lambda *names: [tmp_path / name for name in names])
    assert host.free_memory() == 800
    (tmp_path / "memory.max").write_text("max\n")
    assert host.free_memory() != 800


def test_kills_by_the_out_of_memory_killer_are_read_from_the_control_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "memory.events").write_text("low 0\noom 3\noom_kill 2\n")
    monkeypatch.setattr(host, "_cgroup_files", lambda *names: [tmp_path / name for name in names])
    monkeypatch.setattr(host, "VMSTAT", tmp_path / "none")
    assert host.oom_kills() == 2
    (tmp_path / "memory.events").unlink()
    assert host.oom_kills() is None
