"""Environments of the gate: made from git refs, each with its own code, and compared as a person asks for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kvconform.bench.engine import Options
from kvconform.bench.gate import record as gate_record
from kvconform.bench.gate import runner
from kvconform.bench.gate.decision import NOT_COMPARABLE, REGRESSION
from kvconform.bench.gate.environments import Environment, environment
from kvconform.bench.presets import Preset
from kvconform_specs.config import Config
from kvconform_specs.errors import SpecError

pytestmark = pytest.mark.xdist_group("environments")  # each ref is installed once

TINY = Preset(
    "tiny",
    Config("decoder", heads=4, kv_heads=2, head_dim=6, width=10, vocabulary=13, positions="rope", capacity=30),
    depths=(12,),
    prompts=(9,),
    about="as small as it can be",
)

PLANTED = '''
import time
from kvconform_backends.numpy.cache import NumpyCache

class Steady(NumpyCache):
    """A decode step waits for a while, so that its time is known."""
    wait = 0.001
    def step(self, cache, *inputs, **more):
        until = time.perf_counter() + self.wait * (inputs[0].shape[1] == 1)
        found = super().step(cache, *inputs, **more)
        while time.perf_counter() < until:
            pass
        return found
'''

PROJECT = """
[project]
name = "planted"
version = "1"
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[tool.hatch.build.targets.wheel]
only-include = ["planted.py"]
"""


def git(root: Path, *words: str) -> str:
    command = ["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@example.org", *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project of somebody's own: the first commit waits a millisecond in a decode step, the second two;
    the working tree has a line more."""
    root = tmp_path_factory.mktemp("theirs")
    git(root, "init", "--quiet", "--initial-branch", "trunk")
    (root / "pyproject.toml").write_text(PROJECT)
    for code in (PLANTED, PLANTED.replace("wait = 0.001", "wait = 0.002")):
        (root / "planted.py").write_text(code)
        git(root, "add", ".")
        git(root, "commit", "--quiet", "--message", "a change")
    (root / "planted.py").write_text((root / "planted.py").read_text() + "CHANGED = True\n")
    return root


@pytest.fixture(scope="module")
def made(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Environment]:
    folder = tmp_path_factory.mktemp("environments")
    return {ref: environment(ref, folder, repository=repository) for ref in ("trunk~1", "trunk", ".")}


def asked(of: Environment, code: str, cwd: Path) -> str:
    done = subprocess.run(
        [of.python, "-c", code], capture_output=True, text=True, check=True, cwd=cwd, env={**os.environ, **of.variables}
    )
    return done.stdout.strip()


@pytest.mark.slow
def test_an_environment_has_the_code_of_its_ref_and_shares_the_rest(
    made: dict[str, Environment], repository: Path
) -> None:
    code = (
        "import planted, numpy, kvconform.worker.server; "
        "print(planted.Steady.wait, hasattr(planted, 'CHANGED'), planted.__file__, numpy.__file__)"
    )
    told = {ref: asked(of, code, repository).split() for ref, of in made.items()}  # a planted.py lies in this folder
    assert {ref: words[:2] for ref, words in told.items()} == {
        "trunk~1": ["0.001", "False"],
        "trunk": ["0.002", "False"],
        ".": ["0.002", "True"],
    }
    assert {words[3] for words in told.values()} == {np.__file__}
    assert all(Path(words[2]).is_relative_to(Path(made[ref].python).parents[1]) for ref, words in told.items())
    assert len({len(words[2]) for words in told.values()}) == 1  # paths of one length
    assert made["trunk"].commit == git(repository, "rev-parse", "trunk")
    assert made["."].commit == made["trunk"].commit + "+"
    assert git(repository, "worktree", "list").count("\n") == 0


def test_a_backend_that_is_given_by_its_file_is_the_file_of_the_ref(
    made: dict[str, Environment], repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(repository)
    tree = made["trunk~1"].tree
    assert made["trunk~1"].spec("planted.py:Steady").address == f"{tree}/planted.py:Steady"
    assert made["trunk~1"].spec(f"{repository}/planted.py:Steady").address == f"{tree}/planted.py:Steady"
    assert made["trunk~1"].spec('py:planted.py:Model?{"a": "b.py:c"}').address == (
        f'py:{tree}/planted.py:Model?{{"a": "b.py:c"}}'
    )
    assert [made["trunk"].spec(name).address for name in ("numpy", "planted:Steady", "/a/b.py:C")] == [
        "numpy",
        "planted:Steady",
        "/a/b.py:C",
    ]


def test_an_environment_that_is_none_is_one_sentence(repository: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"environment 'mian': no interpreter and no git ref of .*; known: trunk, any"):
        environment("mian", tmp_path, repository=repository)
    with pytest.raises(SpecError, match="environment '--all': no interpreter and no git ref"):
        environment("--all", tmp_path, repository=repository)
    with pytest.raises(SpecError, match=r"environment 'HEAD': no interpreter, and .* is in no git repository"):
        environment("HEAD", tmp_path, repository=tmp_path)
    whole = environment(sys.executable, tmp_path, repository=tmp_path)
    assert (whole.python, whole.commit, whole.variables) == (sys.executable, "", {})


def test_what_cannot_be_installed_is_one_sentence(tmp_path: Path) -> None:
    git(tmp_path, "init", "--quiet")
    (tmp_path / "pyproject.toml").write_text(PROJECT.replace('version = "1"', ""))
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "--message", "no version")
    with pytest.raises(SpecError, match=r"environment 'HEAD': .* failed: .*version"):
        environment("HEAD", tmp_path / "folder", repository=tmp_path)


@pytest.mark.slow
def test_a_step_that_takes_twice_as_long_is_a_regression_between_two_commits(
    made: dict[str, Environment], tmp_path: Path
) -> None:
    base, head = made["trunk~1"], made["trunk"]
    told: list[str] = []
    record = runner.gate(
        base.spec("planted:Steady"),
        head.spec("planted:Steady"),
        {"tiny": TINY},
        "planted",
        Options(tmp_path / "gate.json", 0.1, say=told.append),
        {"base": base, "head": head},
    )
    decode, prefill = record.verdicts
    assert (decode.verdict, record.exit_code) == (REGRESSION, 4)
    assert decode.ratio == pytest.approx(2, rel=0.25)
    assert prefill.verdict not in (REGRESSION, NOT_COMPARABLE)
    assert gate_record.read(tmp_path / "gate.json") == record
    assert record.finished
    assert [side.name for side in record.sides.values()] == ["trunk~1", "trunk"]
    assert record.software["head"]["environment"]["numpy"] == np.__version__
    orders = {(block.restart, block.round): block.arm for block in record.rounds if (block.place, block.case) == (0, 0)}
    assert 0.2 < np.mean(list(orders.values())) < 0.8  # either runs first in a round
    assert any(line.startswith("confirm 10/10: 1 of 1 cases") for line in told)
