"""The soak finds what it looks for, and a small one finds nothing here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from soak import adapters, inputs, kills, steady
from soak.kills import Kills
from soak.mutations import changed_json, changed_toml
from soak.page import Record, render

from kvconform.errors import BadArgument


def nothing(_drawn: object) -> None:
    """Takes everything."""


def refuse(drawn: object) -> None:
    if drawn is not None:  # the input that is right
        raise BadArgument("x", drawn, ("y",))


def fail(drawn: object) -> None:
    if drawn is not None:
        inputs.checks.addresses(drawn, {})  # type: ignore[arg-type]


@pytest.mark.parametrize(("use", "refused", "tracebacks"), [(nothing, 0, 0), (refuse, 20, 0), (fail, 0, 20)])
def test_refusals_and_tracebacks_are_told_apart(use: Any, refused: int, tracebacks: int) -> None:
    found = inputs.tried("x", inputs.Trial(st.integers(), use, 1.0, None), 20)
    assert (found.tried, found.refused, found.tracebacks) == (20, refused, tracebacks)
    assert bool(found.places) is bool(tracebacks)
    assert all("AttributeError in check.py" in place for place in found.places)


@given(changed_json(b'{"a": [1, {"b": null}], "c": "x"}'), changed_toml('a = 1\n[[b]]\nc = "x"\n'))
def test_changed_files_are_bytes(changed: bytes, other: bytes) -> None:
    assert isinstance(changed, bytes)
    assert isinstance(other, bytes)


@pytest.mark.slow
def test_no_malformed_input_ends_in_a_traceback(tmp_path: Path) -> None:
    found = inputs.soak(300, tmp_path)
    assert [place for one in found for place in one.places] == []
    assert all(one.tried >= 6 and one.refused for one in found)


def test_a_short_run_is_steady() -> None:
    found = steady.soak(400)
    assert found.worker_files[0] == found.worker_files[1] > 0
    assert found.parent_mib[1] > 1


@pytest.mark.slow
def test_a_run_that_is_killed_loses_nothing(tmp_path: Path) -> None:
    found = kills.soak(3, tmp_path, seed=1)
    assert found.parents + found.groups + found.workers == 3
    assert (found.lost, found.twice, found.unreadable, found.left, found.convicted) == (0, 0, 0, 0, 0)


@pytest.mark.slow
def test_a_run_ends_with_verdicts_whatever_its_adapter_does(tmp_path: Path) -> None:
    names = ("Raises", "ExitsAtOnce", "PrintsMuch", "ReturnsText")
    found = {one.name: one.ending for one in adapters.soak(tmp_path, names)}
    assert found == {"Raises": "2 fail", "ExitsAtOnce": "2 crash", "PrintsMuch": "2 pass", "ReturnsText": "2 fail"}


def record(**more: Any) -> Record:
    kind = inputs.Kind(name="files", tried=10, refused=4, tracebacks=0)
    even = steady.Steady(
        programs=8, worker_mib=(30.0, 30.4), parent_mib=(50.0, 50.0), worker_files=(9.0, 9.0), parent_files=(9.0, 9.0)
    )
    return Record(**{"inputs": [kind], "kills": Kills(parents=1), "steady": even, **more})


def test_a_record_says_what_must_not_be() -> None:
    assert record().bad == []
    raised = inputs.Kind(name="files", tried=10, refused=4, tracebacks=1, places=["TypeError in x.py:1 (f): no"])
    assert record(inputs=[raised]).bad == ["files: 1 tracebacks: ['TypeError in x.py:1 (f): no']"]
    assert record(kills=Kills(lost=2)).bad == ["kills: lost: 2"]
    lost = adapters.Adapter(name="Exits", ending="traceback: KeyError: x")
    assert record(adapters=[lost]).bad == ["Exits: traceback: KeyError: x"]
    grown = steady.Steady(
        programs=8, worker_mib=(30.0, 32.0), parent_mib=(50.0, 50.0), worker_files=(9.0, 10.0), parent_files=(9.0, 9.0)
    )
    assert record(steady=grown).bad == ["worker: mib grew from 30.0 to 32.0", "worker: files grew from 9.0 to 10.0"]
    assert "| files | 10 | 4 | 0 |" in render(record(), "evidence/soak/record.json")
