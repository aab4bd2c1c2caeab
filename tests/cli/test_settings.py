"""Settings are the defaults of every command: found above the current folder, checked, and overruled by options."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from places import ROOT
from typer.testing import CliRunner

from kvconform.cli import run as commands
from kvconform.cli.main import app
from kvconform.cli.settings import CHOICES, KEYS, defaults, find, read
from kvconform.run.run import Plan, empty
from kvconform.worker.client import WorkerSpec

ALL = """
backends = ["numpy", "lib/mine.py:Mine", "my.package:Other"]
effort = "smoke"
dtypes = ["float16", "float32"]
device = "cuda"
seed = 7
python = "env/bin/python"
step-timeout = 9
start-method = "spawn"
results = "found"
baseline = "kept"
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / ".git").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[WorkerSpec, Plan, Path]]:
    """What is judged, in place of judging it."""
    found: list[tuple[WorkerSpec, Plan, Path]] = []

    def note(name: str, spec: WorkerSpec, plan: Plan, out: Path, *_: Any, **__: Any) -> Any:
        found.append((spec, plan, out))
        return empty(name, spec.device, plan)

    monkeypatch.setattr(commands, "run_backend", note)
    return found


def invoked(*arguments: str, code: int | None = None) -> str:
    done = CliRunner().invoke(app, arguments)
    assert code is None or done.exit_code == code, done.output
    return done.output


@pytest.mark.parametrize("file", ["kvconform.toml", "pyproject.toml"])
def test_a_run_takes_what_the_settings_say(file: str, project: Path, started: list[Any]) -> None:
    (project / file).write_text(ALL if file == "kvconform.toml" else f'[project]\nname = "x"\n[tool.kvconform]{ALL}')
    invoked("run")
    assert [spec.address for spec, _plan, _out in started] == ["numpy", "lib/mine.py:Mine", "my.package:Other"]
    spec, plan, out = started[1]
    assert (spec.device, spec.python, spec.step_timeout, spec.start_method) == ("cuda", "env/bin/python", 9.0, "spawn")
    assert (plan.effort.name, plan.dtypes, plan.seed, out) == ("smoke", ("float16", "float32"), 7, Path("found"))


def test_options_win(project: Path, started: list[Any]) -> None:
    (project / "kvconform.toml").write_text(ALL)
    invoked("run", "-b", "eager", "--effort", "pr", "--dtype", "bfloat16", "--device", "cpu", "--out", "here")
    ((spec, plan, out),) = started
    assert (spec.address, spec.device, plan.effort.name) == ("eager", "cpu", "pr")
    assert (plan.dtypes, plan.seed, out) == (("bfloat16",), 7, Path("here"))


def test_below_the_project_addresses_and_folders_are_those_of_the_file(
    project: Path, started: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (project / "kvconform.toml").write_text(ALL)
    (project / "deep" / "down").mkdir(parents=True)
    monkeypatch.chdir("deep/down")
    invoked("run")
    assert [spec.address for spec, *_ in started] == ["numpy", "../../lib/mine.py:Mine", "my.package:Other"]
    assert started[0][2] == Path("../../found")


def test_files_of_targets_are_those_of_the_file_and_their_options_are_kept(project: Path) -> None:
    (project / "model").mkdir()
    (project / "kvconform.toml").write_text(
        """backends = ["py:a/net.py:Net?{\\"init\\":{\\"path\\":\\"x:y.py\\"}}", "py:package.net:Net",
        'hf:model?{"cache":"static"}', "hf:LlamaConfig"]"""
    )
    found = defaults(read(project / "kvconform.toml"), project / "..")["run"]["backend"]
    assert found == [
        'py:../a/net.py:Net?{"init":{"path":"x:y.py"}}',
        "py:package.net:Net",
        'hf:model?{"cache":"static"}',  # there is no such folder from there: the name of a config class
        "hf:LlamaConfig",
    ]
    assert defaults(read(project / "kvconform.toml"), project)["run"]["backend"][2] == 'hf:model?{"cache":"static"}'


def test_no_file_above_the_repository_is_read(project: Path) -> None:
    (project / "kvconform.toml").write_text(ALL)
    inner = project / "inner"
    (inner / "deep").mkdir(parents=True)
    assert find(inner / "deep") == project / "kvconform.toml"
    (inner / ".git").mkdir()
    assert find(inner / "deep") is None
    (inner / "pyproject.toml").write_text("[tool.other]\n")
    assert find(inner) is None
    (inner / "pyproject.toml").write_text("[tool.kvconform]\n")
    assert find(inner) == inner / "pyproject.toml"
    (inner / "kvconform.toml").write_text("")
    assert find(inner) == inner / "kvconform.toml"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('efort = "pr"', "kvconform.toml: efort: unknown key; did you mean effort? known: backends, effort, dtypes,"),
        ('effort = "lots"', "kvconform.toml: effort: unknown value 'lots'; known: smoke, pr, nightly"),
        ('dtypes = ["float32", "int4"]', "kvconform.toml: dtypes: unknown value 'int4'; known: float32, bfloat16,"),
        ('device = "tpu"', "kvconform.toml: device: unknown value 'tpu'; known: cpu, cuda"),
        ('start-method = "x"', "kvconform.toml: start-method: unknown value 'x'; known: spawn, fork"),
        ('backends = "numpy"', "kvconform.toml: backends: Expected `array`, got `str`: 'numpy'"),
        ("backends = [1]", "kvconform.toml: backends: Expected `str`, got `int` - at `$[0]`: [1]"),
        ('seed = "1"', "kvconform.toml: seed: Expected `int`, got `str`: '1'"),
        ("effort = {}", "kvconform.toml: effort: Expected `str`, got `object`: {}"),
        ("seed = ", "kvconform.toml: cannot be read as TOML: "),
    ],
)
@pytest.mark.parametrize("command", ["run", "gate", "schema"])
def test_a_bad_key_is_one_sentence_and_exit_code_2(command: str, text: str, words: str, project: Path) -> None:
    (project / "kvconform.toml").write_text(text)
    output = invoked(command, code=2)
    assert output.startswith(f"kvconform: {words}")
    assert output.count("\n") == 1


def test_a_table_that_is_none_is_refused(project: Path) -> None:
    (project / "pyproject.toml").write_text('[tool]\nkvconform = "numpy"\n')
    assert "pyproject.toml: [tool.kvconform] must be a table, got 'numpy'\n" in invoked("run", code=2)


def test_gate_diff_and_report_take_the_results_and_the_baseline(project: Path) -> None:
    (project / "kvconform.toml").write_text('backends = ["eager"]\nbaseline = "kept"\nresults = "found"\n')
    assert "found/eager.json: cannot be read" in invoked("gate", code=2)
    assert "found: there are no results: kvconform run makes them" in invoked("report", code=2)
    for folder in ("found", "kept"):
        (project / folder).mkdir()
        shutil.copy(ROOT / "docs/baseline/eager.json", project / folder)
    (project / "found" / "other.json").write_text("{}")
    assert invoked("gate", code=0).endswith("eager: no regression\n")
    assert "nothing moved" in invoked("diff", code=0)
    assert [*json.loads(invoked("report", "--json", code=0))["backends"]] == ["eager"]


def test_every_key_is_used_and_each_choice_is_of_a_key(project: Path) -> None:
    """Without the key its default differs: nothing in the settings is without effect."""
    text = ALL + 'known-failures = "known.toml"\n'
    (project / "kvconform.toml").write_text(text)
    whole = str({c: {n: v for n, v in d.items() if not callable(v)} for c, d in _defaults(project).items()})
    for key in KEYS:
        lines = [line for line in text.splitlines() if not line.startswith(f"{key} ")]
        assert len(lines) == len(text.splitlines()) - 1
        (project / "kvconform.toml").write_text("\n".join(lines))
        less = str({c: {n: v for n, v in d.items() if not callable(v)} for c, d in _defaults(project).items()})
        assert less != whole, key
    assert set(CHOICES) <= set(KEYS)


def _defaults(project: Path) -> dict[str, Any]:
    return defaults(read(project / "kvconform.toml"), project)
