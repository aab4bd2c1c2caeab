"""The demo needs no framework, finds the mistake, and each command that it prints works as it stands."""

from __future__ import annotations

import json
import os
import resource
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from commands import kvconform

FRAMEWORKS = ("torch", "onnx", "onnxruntime", "onnxscript", "transformers")
YOURS = ("my_module.py", "my_cache.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def done(folder: Path) -> subprocess.CompletedProcess[str]:
    """The demo where no framework can be imported."""
    for name in FRAMEWORKS:
        (folder / "absent").mkdir(exist_ok=True)
        (folder / "absent" / f"{name}.py").write_text(f"raise ModuleNotFoundError('no {name} here')\n")
    environment = {**os.environ, "PYTHONPATH": str(folder / "absent")}
    command = [sys.executable, "-m", "kvconform", "demo"]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, env=environment)


def test_a_right_and_a_broken_cache_are_judged_and_the_mistake_is_named(done: subprocess.CompletedProcess[str]) -> None:
    assert (done.returncode, done.stderr) == (0, "")
    right, _, broken = done.stdout.partition("\nThe same cache, ")
    assert "each output of " in right
    assert "fail" not in right
    assert "equivalence.decode: step 1 (append 1 to a)" in broken
    assert 'diagnosis [attention-gqa]: matches "the causal diagonal starts at the top left' in broken
    assert broken.count("expected           seen") == 1


@pytest.mark.slow
def test_each_command_that_the_demo_prints_works(done: subprocess.CompletedProcess[str], folder: Path) -> None:
    listed = done.stdout.partition("\nNext:\n")[2].splitlines()
    commands = [shlex.split(line)[1:] for line in listed if line.startswith("  kvconform ")]
    assert [command[0] for command in commands] == ["replay", "check", "run", "init", "report", "spec"]
    for command in commands:
        if not any(word.startswith(YOURS) for word in command):
            ended = kvconform(*command, folder=folder)
            assert ended.returncode == (command[0] == "replay"), ended.stdout + ended.stderr
    assert "<html" in (folder / "reports" / "out" / "report.html").read_text()


@pytest.mark.slow
def test_the_demo_prints_its_results_as_json_and_takes_less_than_15_seconds(tmp_path: Path) -> None:
    """Seconds of computing, which do not depend on what else the machine does."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ended = kvconform("demo", "--json", folder=tmp_path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    right, broken = json.loads(ended.stdout)
    assert {verdict["outcome"] for verdict in right["verdicts"]} == {"pass"}
    assert {verdict["outcome"] for verdict in broken["verdicts"]} == {"pass", "fail"}
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 15
