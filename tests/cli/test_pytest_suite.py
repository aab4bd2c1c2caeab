"""The suite as pytest items: options, skips, the marker, and the results file."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from places import SUPPORT

from kvconform.judging.verdict import Outcome
from kvconform.results import gate
from kvconform.results.diff import words
from kvconform.results.gate import UNDECIDED, compare
from kvconform.results.results import read
from kvconform.run.run import cells, plan_for

SUBJECTS = SUPPORT / "subjects.py"
ONE_CONFIG = ("--kv-effort", "smoke", "--kv-config", "attention-gqa")
SHAPES = sum(1 for _ in cells(plan_for(clauses=["shape"], configs=["attention-gqa"])))
"""How many cells the chapter ``shape`` has under one config."""


def suite(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "-rs", "--strict-markers"]
    command += ["--pyargs", "kvconform.pytest_plugin.suite", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)


@pytest.mark.slow
def test_each_cell_is_an_item_and_the_results_are_a_file(tmp_path: Path) -> None:
    selected = ("--kv-clause", "shape", "--kv-clause", "lifecycle.reset", "--kv-clause", "contents.present")
    plan = plan_for("smoke", clauses=selected[1::2], configs=("attention-gqa",))
    asked = [(cell.clause.name, cell.config_name) for cell in cells(plan)]
    good = suite(tmp_path, "--kv-backend", "numpy", *ONE_CONFIG, *selected)
    assert good.returncode == 0, good.stdout
    assert f"{len(asked)} passed" in good.stdout
    assert f"kvconform: numpy: the selected part passed: {len(asked)} cells; conformance needs" in good.stdout
    found = read(tmp_path / "results" / "numpy.json")
    assert [verdict.key for verdict in found.verdicts] == asked
    assert (found.finished, found.ok, found.effort, found.backend) == (True, True, "smoke", "numpy")
    assert {"python", "hypothesis", "machine"} <= set(found.environment)
    assert found.runtime_info["attention-gqa"]["numpy"]
    assert found.claims["profiles"] == ["attention", "decoder"]
    assert found.guarantees == {}

    part = suite(tmp_path, "--kv-backend", f"{SUBJECTS}:FewAbilities", *ONE_CONFIG, *selected, "--kv-out", "other")
    lacking = Counter(v.outcome.value for v in read(tmp_path / "other" / "FewAbilities.json").verdicts)
    assert f"{lacking['pass']} passed, {lacking['unsupported']} skipped" in part.stdout
    assert lacking.total() == len(asked)
    assert "claims no contents" in part.stdout
    assert read(tmp_path / "other" / "FewAbilities.json").exit_code == 0


@pytest.mark.slow
def test_a_failure_has_its_replay_line_and_is_in_the_results(tmp_path: Path) -> None:
    wrong = suite(
        tmp_path, "--kv-backend", f"{SUBJECTS}:PrintsAndIsWrong", *ONE_CONFIG, "--kv-clause", "definition.attention"
    )
    assert wrong.returncode == 1
    assert "replay: kvconform replay results/failures/PrintsAndIsWrong/definition.attention-" in wrong.stdout
    (failure,) = read(tmp_path / "results" / "PrintsAndIsWrong.json").failures
    assert failure.outcome is Outcome.FAIL
    assert f"  steps: {failure.steps}" in wrong.stdout


@pytest.mark.slow
def test_what_pytest_selects_is_recorded_as_a_part_that_a_baseline_does_not_miss_cells_of(tmp_path: Path) -> None:
    whole = suite(tmp_path, "--kv-backend", "numpy", *ONE_CONFIG, "--kv-clause", "shape", "--kv-out", "whole")
    assert whole.returncode == 0, whole.stdout
    baseline = read(tmp_path / "whole" / "numpy.json")
    assert (baseline.clauses, baseline.configs) == (["shape"], ["attention-gqa"])
    done = suite(tmp_path, "--kv-backend", "numpy", *ONE_CONFIG, "--kv-clause", "shape", "-k", "shape.output")
    assert done.returncode == 0, done.stdout
    assert "kvconform: numpy: the selected part passed: 1 cell; " in done.stdout
    found = read(tmp_path / "results" / "numpy.json")
    assert (found.finished, found.clauses, found.configs) == (True, ["shape.output"], ["attention-gqa"])
    assert found.selection == "clauses shape.output, configs attention-gqa"
    (missing,) = compare(found, baseline)
    assert (gate.RULE[missing.kind], words(missing)) == (
        UNDECIDED,
        f"{SHAPES - 1} cells of the baseline not judged: only clauses shape.output, configs attention-gqa",
    )


@pytest.mark.slow
def test_a_run_that_lost_a_process_did_not_finish(tmp_path: Path) -> None:
    pytest.importorskip("xdist")
    (tmp_path / "ends_it.py").write_text(
        "import os\ndef pytest_runtest_call(item):\n    if 'shape.length' in item.nodeid:\n        os._exit(3)\n"
    )
    shapes = ("--kv-clause", "shape", "-p", "ends_it", "-n", "1")
    done = suite(tmp_path, "--kv-backend", "numpy", *ONE_CONFIG, *shapes)
    assert "crashed" in done.stdout
    found = read(tmp_path / "results" / "numpy.json")
    assert found.verdicts
    assert (found.finished, found.clauses) == (False, ["shape"])


@pytest.mark.slow
def test_a_machine_that_lacks_something_is_a_skip_and_a_broken_backend_is_a_failure(tmp_path: Path) -> None:
    lacking = suite(tmp_path, "--kv-backend", f"{SUBJECTS}:CannotRunHere", *ONE_CONFIG, "--kv-clause", "shape")
    assert (lacking.returncode, f"{SHAPES} skipped" in lacking.stdout) == (0, True)
    assert "this backend needs a quantum computer; install one" in lacking.stdout
    found = read(tmp_path / "results" / "CannotRunHere.json")
    assert (found.exit_code, found.lacking) == (3, True)
    unknown = suite(tmp_path, "--kv-backend", "eagr", *ONE_CONFIG, "--kv-clause", "shape.output")
    assert unknown.returncode == 1
    found = read(tmp_path / "results" / "eagr.json")
    assert (found.exit_code, found.lacking) == (3, False)


@pytest.mark.slow
def test_a_black_box_is_not_judged_under_configs_that_it_does_not_have(tmp_path: Path) -> None:
    box = f"{SUPPORT / 'black_boxes.py'}:BlackBox"
    done = suite(tmp_path, "--kv-backend", box, *ONE_CONFIG, "--kv-clause", "shape.output")
    assert done.returncode == 1
    assert "is a black box: judge it with kvconform check, or with conformance()" in done.stdout


@pytest.mark.slow
def test_items_have_a_marker_and_the_whole_suite_is_collected_with_the_default_effort(tmp_path: Path) -> None:
    collected = suite(tmp_path, "--kv-backend", "numpy", "--collect-only", "-m", "kvconform")
    assert re.search(rf"\b{sum(1 for _ in cells(plan_for()))} tests collected", collected.stdout)
    assert (
        "no tests collected" in suite(tmp_path, "--kv-backend", "numpy", "--collect-only", "-m", "not kvconform").stdout
    )
    assert not (tmp_path / "results").exists()


@pytest.mark.slow
def test_items_that_ran_in_other_processes_are_in_one_results_file(tmp_path: Path) -> None:
    pytest.importorskip("xdist")
    done = suite(tmp_path, "--kv-backend", "numpy", *ONE_CONFIG, "--kv-clause", "shape", "-n", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(read(tmp_path / "results" / "numpy.json").verdicts) == SHAPES


@pytest.mark.slow
def test_without_a_backend_it_is_a_usage_error(tmp_path: Path) -> None:
    done = suite(tmp_path)
    assert done.returncode != 0
    assert "--kv-backend: name at least one backend to judge" in done.stdout + done.stderr
