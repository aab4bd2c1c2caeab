"""The runners in examples/runners, which are not Python, conform, and fail with their planted fault."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from places import ROOT

from kvconform.judging.verdict import Outcome
from kvconform.results.results import Results
from kvconform.run.run import plan_for
from kvconform.vectors.judge import judged
from kvconform.vectors.write import write

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("runners")]
RUNNERS = ROOT / "examples" / "runners"
CLAUSES = (
    "shape",
    "equivalence",
    "causality",
    "lifecycle",
    "batch",
    "window.width",
    "capacity",
    "errors",
    "numerics",
    "contents",
    "definition",
)
ATTENTION = plan_for("smoke", clauses=CLAUSES, configs=("attention-odd", "attention-small"))
DECODER = plan_for("smoke", clauses=("equivalence", "lifecycle", "errors"), configs=("decoder-learned",))
NODE = pytest.mark.skipif(shutil.which("node") is None, reason="there is no Node here")
COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ here")
ONNXRUNTIME_NODE = os.environ.get("ONNXRUNTIME_NODE", "")
"""A folder in which onnxruntime-node is installed (``nox -s runners`` makes one)."""


@pytest.fixture(scope="module")
def attention(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("attention") / "set"
    write(folder, ATTENTION)
    return folder


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("compiled") / "attention"
    command = ["g++", "-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", str(RUNNERS / "attention.cpp"), "-o"]
    subprocess.run([*command, str(program)], check=True)
    return program


def results_of(command: Sequence[str | Path], folder: Path, tmp_path: Path, *more: str, cwd: Path = ROOT) -> Results:
    """Runs a runner on a set, and judges its answers."""
    answers = tmp_path / "answers"
    subprocess.run([*map(str, command), str(folder), str(answers), *more], check=True, cwd=cwd)
    return judged(folder, answers, tmp_path / "failures")


def conforms(results: Results) -> bool:
    """Whether every cell passed; a set of these configs has none that the runners do not support."""
    assert {verdict.outcome for verdict in results.verdicts} == {Outcome.PASS}
    return results.exit_code == 0


def failed(results: Results) -> set[str]:
    assert results.exit_code == 1
    return {verdict.clause for verdict in results.failures}


@COMPILER
def test_the_runner_in_cpp_conforms(compiled: Path, attention: Path, tmp_path: Path) -> None:
    assert conforms(results_of([compiled], attention, tmp_path))


@COMPILER
def test_a_mask_from_the_top_left_in_cpp_is_detected(compiled: Path, attention: Path, tmp_path: Path) -> None:
    found = failed(results_of([compiled], attention, tmp_path, "--fault", "top-left"))
    assert {"equivalence.decode", "equivalence.chunks", "causality.past-seen"} <= found


@NODE
def test_the_runner_in_javascript_conforms(attention: Path, tmp_path: Path) -> None:
    assert conforms(results_of(["node", RUNNERS / "attention.mjs"], attention, tmp_path))


@NODE
def test_a_fork_that_shares_its_rows_in_javascript_is_detected(attention: Path, tmp_path: Path) -> None:
    runner = ["node", RUNNERS / "attention.mjs"]
    assert "lifecycle.fork" in failed(results_of(runner, attention, tmp_path, "--fault", "shared-fork"))


@NODE
@pytest.mark.skipif(not ONNXRUNTIME_NODE, reason="needs onnxruntime-node: nox -s runners")
@pytest.mark.parametrize("fault", ["", "keys-only"])
def test_exported_decoders_in_javascript_conform_unless_reorder_moves_keys_only(fault: str, tmp_path: Path) -> None:
    folder, decoders = tmp_path / "set", tmp_path / "decoders"
    write(folder, DECODER)
    subprocess.run([sys.executable, str(RUNNERS / "export_decoders.py"), str(folder), str(decoders)], check=True)
    more = ["--fault", fault] if fault else []
    runner = ["node", RUNNERS / "decoder.mjs"]
    results = results_of(runner, folder, tmp_path, str(decoders), *more, cwd=Path(ONNXRUNTIME_NODE))
    if fault:
        assert "lifecycle.reorder" in failed(results)
    else:
        assert results.exit_code == 0
        assert {verdict.outcome for verdict in results.verdicts} == {Outcome.PASS}
