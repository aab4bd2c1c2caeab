"""The page of measured speeds is that of the records beside it, and prints what they say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
from speed_data import latency
from speed_page import render

from kvconform.bench.analysis.summarize import summarise
from kvconform.bench.record import Excluded, read
from kvconform_reports.view.figures import digits

ROOT = Path(__file__).parents[2]


def test_the_page_in_the_documents_is_that_of_the_records_beside_it() -> None:
    records = sorted((ROOT / "docs" / "evidence").glob("*.json"))
    assert records
    assert (ROOT / "docs" / "speed.md").read_text() == render({path.name: read(path) for path in records})


def test_what_a_published_record_says_follows_from_its_raw_rounds() -> None:
    for path in (ROOT / "docs" / "evidence").glob("*.json"):
        stored, again = read(path), read(path)
        summarise(again)
        assert again.rounds
        assert again == stored, path.name


def test_a_published_record_names_no_place_of_the_machine_that_made_it() -> None:
    for path in (ROOT / "docs" / "evidence").glob("*.json"):
        for name, notes in read(path).software.items():
            for place in (notes["interpreter"], *notes["variables"].values()):
                assert not Path(place).is_absolute(), (path.name, name, place)


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


def test_who_has_no_time_and_a_run_that_was_cut_are_told() -> None:
    record = latency()
    record.finished, record.notes = False, ["one block was slow"]
    record.excluded = [Excluded("mine", next(iter(record.presets)), "it is wrong")]
    page = render({"a.json": record})
    assert "did not finish" in page
    assert "one block was slow." in page
    assert "No time for mine: it is wrong" in page


def test_the_command_writes_the_page(tmp_path: Path) -> None:
    records = tmp_path / "evidence"
    records.mkdir()
    (records / "one.json").write_bytes(msgspec.json.encode(latency()))
    command = [sys.executable, "-m", "speed_page", str(records / "one.json"), "-o", "speed.md"]
    subprocess.run(command, check=True, cwd=tmp_path)
    assert (tmp_path / "speed.md").read_text() == render({"one.json": latency()})
