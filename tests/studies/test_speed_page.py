"""docs/speed.md is generated from docs/evidence, and what it prints is in the records."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from speed_data import latency
from speed_page import render

from kvconform.bench.analysis.summarize import summarise
from kvconform.bench.record import Excluded, read, write
from kvconform_reports.view.figures import digits

ROOT = Path(__file__).parents[2]


EVIDENCE = sorted((ROOT / "docs" / "evidence").glob("*.json*"))


def test_the_evidence_is_there_and_is_small() -> None:
    assert len(EVIDENCE) >= 5
    assert sum(path.stat().st_size for path in EVIDENCE) < 2_000_000


@pytest.mark.parametrize("path", EVIDENCE, ids=lambda path: path.name)
def test_what_a_published_record_says_follows_from_its_raw_rounds(path: Path) -> None:
    stored, again = read(path), read(path)
    summarise(again)
    assert again.rounds
    assert again.summaries
    assert again == stored


@pytest.mark.parametrize("path", EVIDENCE, ids=lambda path: path.name)
def test_a_published_record_names_no_place_of_the_machine_that_made_it(path: Path) -> None:
    software = read(path).software
    assert software
    for name, notes in software.items():
        for place in (notes["interpreter"], *notes["variables"].values()):
            assert not Path(place).is_absolute(), (name, place)


def test_every_decode_step_and_every_valid_ratio_of_one_is_on_the_page() -> None:
    record = latency()
    page = render({"a.json": record})
    assert "[The record](evidence/a.json)" in page
    decodes = [
        (s, record.cases[s.case]) for s in record.summaries if record.cases[s.case].arms[s.arm].phase == "decode"
    ]
    assert decodes
    for summary, case in decodes:
        name = case.arms[summary.arm].backend
        if name != "machine":
            assert f"| {case.depth} | {name} |" in page
    shown = [
        r
        for r in record.ratios
        if r.valid and {record.cases[r.case].arms[i].phase for i in (r.arm, r.reference)} == {"decode"}
    ]
    assert shown
    assert all(digits(one.ratio) in page for one in shown)
    for e in record.exponents:
        assert f"{e.exponent:.2f} \\[{e.low:.2f}, {e.high:.2f}\\] (expected {e.expected:.2f})" in page


def test_what_is_not_valid_has_its_reason_and_no_number() -> None:
    record = latency()
    record.ratios = [msgspec.structs.replace(r, valid=False, why_invalid="too noisy here") for r in record.ratios]
    page = render({"a.json": record})
    assert "too noisy here" in page
    assert all(f"{digits(r.ratio)} ×" not in page for r in record.ratios)


def test_an_excluded_backend_and_an_interrupted_run_are_named() -> None:
    record = latency()
    record.finished, record.notes = False, ["one block was slow"]
    record.excluded = [Excluded("mine", next(iter(record.presets)), "it is wrong")]
    page = render({"a.json": record})
    assert "did not finish" in page
    assert "one block was slow." in page
    assert "Not timed: mine: it is wrong" in page


def test_the_command_writes_the_page(tmp_path: Path) -> None:
    records = tmp_path / "evidence"
    records.mkdir()
    write(latency(), records / "one.json")
    command = [sys.executable, "-m", "speed_page", str(records / "one.json"), "-o", "speed.md"]
    subprocess.run(command, check=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT / "docs" / "studies")})
    assert (tmp_path / "speed.md").read_text() == render({"one.json": latency()})
