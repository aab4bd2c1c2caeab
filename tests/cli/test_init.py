"""``init`` finds what a repository holds, keeps what exists, and writes settings and a workflow that work."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
import yaml
from commands import kvconform
from places import ROOT
from typer.testing import CliRunner

from kvconform.cli import settings
from kvconform.cli.discover import Found, discover
from kvconform.cli.main import app

ADAPTER = """
from kvconform import Backend, Claims

class Mine(Backend):
    claims = Claims(profiles=("attention",))
    def start(self, batch): ...
    def step(self, cache, *inputs): ...

class Duck:
    claims: Claims = Claims(profiles=("attention",))
    def start(self, batch): ...
    def step(self, cache, *inputs): ...

class OnlyClaims:
    claims = 1

class _Hidden(Backend):
    def step(self, cache, *inputs): ...
"""
MODULES = """
import torch.nn as nn

class Plain(nn.Module):
    def forward(self, x, *, kv_cache=None): ...

class Sized(nn.Module):
    def __init__(self, width, heads=2, *, scale, bias=True): ...
    def forward(self, x, past_key_values): ...

class NoCache(nn.Module):
    def forward(self, x): ...

class NoModule:
    def forward(self, x, past): ...
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(folder: Path, **files: str | bytes) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode() if isinstance(text, str) else text)


def initialised(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["init", *arguments])
    assert done.exit_code == 0, done.output
    return done.output


def test_what_has_a_cache_is_found_and_nothing_else(folder: Path) -> None:
    config = {"model_type": "llama", "vocab_size": 50}
    write(
        folder,
        **{
            "adapter.py": ADAPTER,
            "src/pkg/__init__.py": "",
            "src/pkg/deep/__init__.py": "",
            "src/pkg/deep/nets.py": MODULES,
            "tests/nets.py": MODULES,
            "test_nets.py": MODULES,
            "venv/pyvenv.cfg": "",
            "venv/lib/nets.py": MODULES,
            ".hidden/nets.py": MODULES,
            "broken.py": "class (",
            "nul.py": b"\0",
            "decoder.onnx": b"..past_key_values.0.key..",
            "classifier.onnx": b"..pixel_values..",
            "empty.onnx": b"",
            "model/config.json": json.dumps(config),
            "vision/config.json": json.dumps({"model_type": "vit", "num_hidden_layers": 2}),
            "encoder/config.json": json.dumps({**config, "architectures": ["BertModel"]}),
            "named/config.json": json.dumps({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}),
            "other/config.json": "[1]",
            "bad/config.json": "{",
        },
    )
    assert discover(folder) == [
        Found("adapter.py:Mine"),
        Found("adapter.py:Duck"),
        Found("py:pkg.deep.nets:Plain", extra="torch"),
        Found("py:pkg.deep.nets:Sized", ("width", "scale"), "torch"),
        Found("onnx:decoder.onnx", extra="onnx"),
        Found('hf:model?{"cache":"dynamic"}', extra="hf"),
        Found('hf:model?{"cache":"static"}', extra="hf"),
        Found('hf:named?{"cache":"dynamic"}', extra="hf"),
        Found('hf:named?{"cache":"static"}', extra="hf"),
    ]


def test_the_examples_of_this_project_are_found() -> None:
    found = {one.address for one in discover(ROOT)}
    wanted = {"attention.py:Attention", "attention_broken.py:Attention", "buffers.py:Decoder", "hybrid.py:Decoder"}
    assert {f"py:examples/{name}" for name in wanted} <= found
    assert 'hf:examples/tiny_llama?{"cache":"static"}' in found


@pytest.mark.parametrize("file", ["pyproject.toml", "kvconform.toml"])
def test_the_settings_are_read_by_the_commands_and_written_once(file: str, folder: Path) -> None:
    before = '[project]\nname = "x"  # a comment\n\n[tool.other]\nx = 1'
    if file == "pyproject.toml":
        write(folder, **{file: before})
    write(folder, **{"adapter.py": ADAPTER, "again.py": ADAPTER, "nets.py": MODULES})
    printed = initialised()
    assert f"wrote: {file}\n" in printed
    assert "found: py:nets.py:Sized; its constructor needs width, scale\n" in printed
    text = (folder / file).read_text()
    assert text.startswith(before if file == "pyproject.toml" else "# The defaults of")
    read = settings.read(folder / file)
    assert read.backends == ["adapter.py:Mine", "adapter.py:Duck", "py:nets.py:Plain"]
    assert (read.effort, read.dtypes, read.results, read.baseline) == (
        "pr",
        ["float32"],
        "results",
        "kvconform-baseline",
    )
    commented = [line.strip("# ,") for line in text.splitlines() if "nets.py:Sized" in line]
    assert tomllib.loads(f"a = [{commented[0].partition(',  ')[0]}]")["a"] == [
        'py:nets.py:Sized?{"init":{"width":1,"scale":1}}'
    ]
    workflow = folder / ".github/workflows/kvconform.yml"
    workflow.write_text("mine")
    again = initialised()
    assert f"kept: {file}, which exists\n" in again
    assert (folder / file).read_text() == text
    assert workflow.read_text() == "mine"


def test_what_is_named_stands_in_place_of_what_is_found(folder: Path) -> None:
    write(folder, **{"adapter.py": ADAPTER})
    told = json.loads(initialised("-b", "numpy", "--json"))
    assert told["found"] == [{"address": "numpy", "lacking": []}]
    assert settings.read(folder / "kvconform.toml").backends == ["numpy"]


def test_where_nothing_is_found_the_message_says_what_to_do(folder: Path) -> None:
    assert "found nothing to judge: name it in the settings (backends), or write an adapter" in initialised()
    assert settings.read(folder / "kvconform.toml").backends == []


def test_the_workflow_installs_what_is_there_and_uses_the_inputs_of_the_action(folder: Path) -> None:
    write(folder, **{"pyproject.toml": '[project]\nname = "x"\n', "nets.py": MODULES, "d.onnx": b"past_key_values.0"})
    initialised()
    workflow = yaml.safe_load((folder / ".github/workflows/kvconform.yml").read_text())
    steps = workflow["jobs"]["conformance"]["steps"]
    assert [step["run"] for step in steps if "run" in step] == [
        "pip install torch --index-url https://download.pytorch.org/whl/cpu",
        "pip install .",
    ]
    (action,) = [step for step in steps if step.get("uses", "").startswith("kvconform/kvconform@")]
    known = yaml.safe_load((ROOT / "action.yml").read_text())["inputs"]
    assert set(action["with"]) <= set(known)
    assert action["with"]["extras"] == "onnx,torch"
    assert "backend" not in action["with"]  # it takes the settings


@pytest.mark.slow
def test_after_init_a_run_needs_no_option(tmp_path: Path) -> None:

    (tmp_path / "pyproject.toml").write_text("")
    assert kvconform("init", "-b", "numpy", folder=tmp_path).returncode == 0
    part = ("--effort", "smoke", "--config", "attention-gqa", "--clause", "shape.output")
    done = kvconform("run", *part, "--out", "kvconform-baseline", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert kvconform("run", *part, folder=tmp_path).returncode == 0
    assert kvconform("gate", folder=tmp_path).stdout == "numpy: no regression\n"
