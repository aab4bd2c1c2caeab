"""Every generated file is what its sources say now; a message names the command that renews it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import regenerate
from places import ROOT
from regenerate import COMMAND, FILES, Generated

RENDERED = [file for file in FILES if not file.minutes]
BASELINES = [file for file in FILES if file.path.startswith("docs/baseline/")]


@pytest.mark.parametrize("file", RENDERED, ids=lambda file: file.path)
def test_a_generated_file_is_what_its_sources_say(file: Generated) -> None:
    assert not list(regenerate.stale(file)), f"renew it with: {COMMAND}"


@pytest.mark.parametrize("file", BASELINES, ids=lambda file: file.path)
def test_a_baseline_is_of_this_suite_and_has_every_clause(file: Generated) -> None:
    assert file.current(), f"renew it with: {COMMAND}"


BY_HAND = ("docs/studies/", "docs/guides/", "docs/upstream/")
"""Folders of programs and of pages that are written by hand."""


def test_every_file_of_a_page_or_baseline_is_generated_or_measured() -> None:
    known = tuple(file.path for file in FILES) + tuple(regenerate.MEASURED)
    beside = {
        "docs/black-boxes.md",
        "docs/gate-history.jsonl",
        "docs/interpreting.md",
        "docs/latency-samples.svg",
        "docs/latency-starts.svg",
        "docs/report.png",
    }
    listed = subprocess.run(["git", "ls-files", "docs"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("this is no git checkout")
    files = [path for path in listed.stdout.split() if not path.startswith(BY_HAND)]
    assert files
    assert not [path for path in files if not path.startswith(known) and path not in beside]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(regenerate, "ROOT", tmp_path)
    monkeypatch.setattr(regenerate, "STAMP", tmp_path / "stamp.json")
    return tmp_path


def test_only_what_is_out_of_date_is_written(folder: Path) -> None:
    made = {"docs/a/one.txt": b"1", "docs/a/two.txt": b"2"}
    file = Generated("docs/a", "nothing", lambda: made)
    (folder / "docs/a").mkdir(parents=True)
    (folder / "docs/a/one.txt").write_bytes(b"1")
    (folder / "docs/a/old.txt").write_bytes(b"0")
    before = (folder / "docs/a/one.txt").stat().st_mtime_ns
    assert set(regenerate.stale(file)) == {"docs/a/two.txt", "docs/a/old.txt"}
    words = regenerate.renew(file)
    assert "one.txt" not in words
    assert "two.txt" in words
    assert {path.name: path.read_bytes() for path in (folder / "docs/a").iterdir()} == {
        "one.txt": b"1",
        "two.txt": b"2",
    }
    assert (folder / "docs/a/one.txt").stat().st_mtime_ns == before
    assert regenerate.renew(file) == "up to date"


def test_a_file_that_is_certainly_up_to_date_is_not_made(folder: Path) -> None:
    asked: list[str] = []

    def make() -> dict[str, bytes]:
        asked.append("made")
        return {"a.txt": b"1"}

    file = Generated("a.txt", "nothing", make, minutes=1, current=lambda: True)
    assert regenerate.renew(file) == "up to date"
    assert not asked
    assert "a.txt" in regenerate.renew(file, force=True)
    assert asked == ["made"]


def test_the_command_lists_every_file_with_its_source() -> None:
    command = [sys.executable, "-m", "regenerate"]
    listed = subprocess.run([*command, "--list"], capture_output=True, text=True, check=True, cwd=ROOT / "docs/studies")
    lines = listed.stdout.splitlines()
    assert [line.partition(":")[0] for line in lines] == [*(file.path for file in FILES), *regenerate.MEASURED]
    unknown = subprocess.run(
        [*command, "nowhere"], capture_output=True, text=True, check=False, cwd=ROOT / "docs/studies"
    )
    assert unknown.returncode == 2
    assert "no generated file begins with nowhere" in unknown.stderr
