"""What the commands print: JSON, the version, help, completion, and text that is never read as markup."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from commands import kvconform
from places import ROOT, SUPPORT
from typer.testing import CliRunner

from kvconform import __version__
from kvconform.cli import spec
from kvconform.cli.main import app
from kvconform.cli.options import say, screen
from kvconform.mutation import power as powers
from kvconform.mutation.record import AuditRecord
from kvconform.results.results import EXIT_CODES, Results
from kvconform_specs import SUITE_VERSION
from kvconform_specs.clauses import ALL, BY_NAME
from kvconform_specs.serving.clauses import BY_NAME as SERVING

SUBJECTS = SUPPORT / "subjects.py"
ONE_CELL = ("--effort", "smoke", "--config", "attention-gqa", "--clause", "definition.attention")


def printed(folder: Path, *arguments: str, code: int = 0) -> Any:
    """What a command prints with ``--json``, which must be all that it prints."""
    done = kvconform(*arguments, "--json", folder=folder)
    assert done.returncode == code, done.stdout + done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout)


@pytest.mark.slow
def test_commands_that_judge_print_their_results_as_json(tmp_path: Path) -> None:
    backends = ("-b", "numpy", "-b", f"{SUBJECTS}:PrintsAndIsWrong")
    good, bad = msgspec.convert(printed(tmp_path, "run", *backends, *ONE_CELL, code=1), list[Results])
    assert (good.backend, good.ok) == ("numpy", True)
    assert (bad.backend, len(bad.failures)) == ("PrintsAndIsWrong", 1)
    file = f"results/failures/PrintsAndIsWrong/{bad.failures[0].counterexample}"
    broken = printed(tmp_path, "replay", file, code=1)
    assert (broken["clause"], broken["broken"], broken["script"]) == ("definition.attention", True, None)
    assert broken["sentence"] == bad.failures[0].sentence
    assert not printed(tmp_path, "replay", file, "-b", "numpy")["broken"]
    (gated,) = printed(tmp_path, "gate", "results/numpy.json", "--baseline", "results/numpy.json")
    assert gated == {"backend": "numpy", "exit_code": 0, "differences": []}
    for shard in ("1/2", "2/2"):
        (part,) = printed(
            tmp_path, "run", "-b", "numpy", *ONE_CELL, "--clause", "shape.output", "--shard", shard, "--out", "parts"
        )
        assert part["shard"] == shard
    parts = [str(file) for file in sorted((tmp_path / "parts" / "shards").glob("*.json"))]
    merged = msgspec.convert(printed(tmp_path, "merge", *parts, "-o", "whole.json"), Results)
    assert len(merged.verdicts) == 2


@pytest.mark.slow
def test_a_check_prints_its_results_as_json(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("raise OSError('libmagic.so.1: not found')\n")
    (found,) = msgspec.convert(printed(tmp_path, "check", "broken.py:Net", code=3), list[Results])
    assert (found.effort, found.backend, found.verdicts) == ("check", "Net", [])
    assert "OSError: libmagic.so.1: not found" in found.unavailable


def test_an_audit_prints_its_record_as_json(tmp_path: Path) -> None:
    names = ("no-mask-with-cache", "--clause", "causality.future-blind", "--effort", "smoke", "--jobs", "1")
    record = msgspec.convert(printed(tmp_path, "audit", *names), AuditRecord)
    assert [fault.name for fault in record.audited] == ["no-mask-with-cache"]


def test_the_backends_are_printed_as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spec, "installed", lambda: ["numpy", f"{SUBJECTS}:CannotRunHere", "eagr"])
    done = CliRunner().invoke(app, ["backends", "--json"])
    assert (done.exit_code, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    numpy, *_others, unknown = [one for one in found if one["kind"] == "backend"]
    engines = [one for one in found if one["kind"] == "engine"]
    assert {"toy-engine", "llama.cpp", "vllm"} <= {one["name"] for one in engines}
    assert {one["state"] for one in engines} == {"not tried"}
    assert (numpy["name"], numpy["state"], numpy["claims"]["profiles"]) == ("numpy", "ready", ["attention", "decoder"])
    assert (unknown["state"], unknown["claims"]) == ("broken", None)
    assert unknown["sentence"].startswith("no backend named 'eagr'; installed: ")


@pytest.mark.slow
def test_the_spec_is_printed_as_json(tmp_path: Path) -> None:
    assert [clause["name"] for clause in printed(tmp_path, "spec")] == [*BY_NAME, *SERVING]
    chapter = printed(tmp_path, "spec", "causality")
    assert {clause["chapter"] for clause in chapter} == {"causality"}
    (one,) = printed(tmp_path, "spec", "shape.output")
    assert (one["core"], one["level"], one["relations"]) == (True, "must", ["shape"])


def test_the_version_is_an_option(tmp_path: Path) -> None:
    assert kvconform("--version", folder=tmp_path).stdout == f"kvconform {__version__}, suite {SUITE_VERSION}\n"


def test_the_help_lists_commands_completion_and_exit_codes(tmp_path: Path) -> None:
    text = kvconform("--help", folder=tmp_path).stdout
    assert "--install-completion" in text
    for code, words in EXIT_CODES.items():
        assert f"  {code}  {words}\n" in text
    for command in app.registered_commands:
        assert command.callback is not None
        assert f"\n  {command.name or command.callback.__name__} " in text


OUTSIDE = ("a [red]word[/red]", "Ring: :smiley: [link=https://x.org]x[/link]", "[/]", "1234 'x' https://example.org")


@pytest.mark.parametrize("text", OUTSIDE)
def test_text_from_outside_is_printed_as_it_is(text: str) -> None:
    with screen.capture() as captured:
        say(text)
    assert captured.get() == f"{text}\n"


def test_a_backend_may_have_a_name_that_looks_like_markup(tmp_path: Path) -> None:
    folder = tmp_path / "[red]"
    folder.mkdir()
    (folder / "mine.py").write_text("raise OSError('[bold]Ring: :x: gone[/bold]')\n")
    done = kvconform("run", "-b", "[red]/mine.py:Mine", *ONE_CELL, folder=tmp_path)
    assert done.returncode == 3
    assert (
        "backend '[red]/mine.py:Mine' is installed but failed to load: OSError: [bold]Ring: :x: gone[/bold]"
        in done.stdout
    )


@pytest.mark.slow
def test_a_report_is_printed_as_json(tmp_path: Path) -> None:
    asked = printed(tmp_path, "report", str(ROOT / "docs/baseline/eager.json"), "-o", "report.html")
    assert asked["backends"]["eager"]["exit_code"] == 0
    assert Path(asked["report"]) == tmp_path / "report.html"


def test_the_power_table_is_printed_as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    some = [ALL[0], BY_NAME["equivalence.decode"]]
    table = powers.power_table
    monkeypatch.setattr(powers, "power_table", lambda dtype: table(dtype, some, powers.NULLS[:2]))
    done = CliRunner().invoke(app, ["power", "--json"])
    assert done.exit_code == 0
    assert {row["clause"] for row in json.loads(done.stdout)} == {clause.name for clause in some}
