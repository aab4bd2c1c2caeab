"""``action.yml``: its steps run as a script, as a runner of GitHub Actions would run them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import venv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

CHECKOUT = Path(__file__).parents[2]
ACTION = yaml.safe_load((CHECKOUT / "action.yml").read_text())
BROKEN = "kvconform_backends.faults.published:FirstListing"
PART = "--config attention-gqa --clause equivalence.decode"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("packaging"),
    pytest.mark.skipif(sys.platform == "win32", reason="the steps are bash"),
]

GH = """#!/bin/sh
echo "$*" >> "$GH_CALLS"
case "$*" in *--jq*) [ -z "$OLD_COMMENT" ] || echo "$OLD_COMMENT" ;; esac
"""
"""In place of GitHub's command line: notes how it was called, and finds an old comment if there is one."""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new virtual environment, in which the first step installs the package."""
    place = tmp_path_factory.mktemp("action") / "venv"
    venv.create(place, with_pip=True)
    gh = place / "bin" / "gh"
    gh.write_text(GH)
    gh.chmod(0o755)
    return place


def filled(text: str, values: Mapping[str, str]) -> str:
    return re.sub(r"\$\{\{\s*([\w.-]+)\s*\}\}", lambda found: values[found[1]], str(text))


def run(environment: Path, folder: Path, old_comment: str = "", **inputs: str) -> tuple[int, str]:
    """Runs every step. Returns the exit code of the last one and what all have printed."""
    given = {name: str(value.get("default", "")) for name, value in ACTION["inputs"].items()} | inputs
    values = {f"inputs.{name}": value for name, value in given.items()}
    values |= {"github.token": "secret", "github.event.pull_request.number": "7"}
    output, printed = folder / "output", ""
    own = {
        "PATH": f"{environment / 'bin'}:{os.environ['PATH']}",
        "HOME": str(folder),
        "GITHUB_ACTION_PATH": str(CHECKOUT),
        "GITHUB_OUTPUT": str(output),
        "GITHUB_STEP_SUMMARY": str(folder / "summary.md"),
        "GITHUB_REPOSITORY": "you/yours",
        "GH_CALLS": str(folder / "calls"),
        "OLD_COMMENT": old_comment,
    }
    kept = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
    code = 0
    for step in ACTION["runs"]["steps"]:
        if output.exists():
            values |= {
                f"steps.judge.outputs.{name}": value
                for name, _, value in (line.partition("=") for line in output.read_text().splitlines())
            }
        env = {name: filled(value, values) for name, value in step.get("env", {}).items()}
        command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]]
        done = subprocess.run(
            command, cwd=folder, env={**kept, **own, **env}, text=True, check=False, capture_output=True
        )
        printed, code = printed + done.stdout + done.stderr, done.returncode
        assert code == 0 or step is ACTION["runs"]["steps"][-1], printed
    return code, printed


def test_every_step_runs_a_shell_and_no_input_is_pasted_into_it() -> None:
    steps: list[dict[str, Any]] = ACTION["runs"]["steps"]
    assert all(step["shell"] == "bash" for step in steps)
    assert not any("${{" in step["run"] for step in steps), "inputs come as variables, so that none is run as code"


def test_a_new_failure_is_shown_and_commented_on_and_ends_the_job(environment: Path, tmp_path: Path) -> None:
    code, printed = run(environment, tmp_path, backend="numpy", effort="smoke", options=PART)
    assert code == 0, printed
    results = tmp_path / "kvconform-results"
    assert (results / "report.html").exists()
    assert "numpy" in (tmp_path / "summary.md").read_text()
    assert not (tmp_path / "calls").exists()

    baseline = tmp_path / "baseline" / "FirstListing.json"
    baseline.parent.mkdir()
    baseline.write_text((results / "numpy.json").read_text())
    now = {"results": "now", "baseline": "baseline", "comment": "true"}
    code, printed = run(environment, tmp_path, backend=BROKEN, effort="smoke", options=PART, **now)
    assert code in (1, 4), printed
    assert "::error title=kvconform" in printed
    assert (tmp_path / "now" / "moved.md").read_text().startswith("<!-- kvconform diff -->")
    assert "What moved" in (tmp_path / "now" / "report.html").read_text()
    assert "-X POST repos/you/yours/issues/7/comments" in (tmp_path / "calls").read_text()

    run(environment, tmp_path, "99", backend=BROKEN, effort="smoke", options=PART, **now)
    assert "-X PATCH repos/you/yours/issues/comments/99" in (tmp_path / "calls").read_text()


def test_without_a_backend_the_settings_of_the_repository_say_what_is_judged(environment: Path, tmp_path: Path) -> None:
    (tmp_path / "kvconform.toml").write_text('backends = ["numpy", "numpy-static"]\neffort = "smoke"\n')
    code, printed = run(environment, tmp_path, options=PART)
    assert code == 0, printed
    assert {path.stem for path in (tmp_path / "kvconform-results").glob("*.json")} == {"numpy", "numpy-static"}
    assert '"effort": "smoke"' in (tmp_path / "kvconform-results" / "numpy.json").read_text()
