"""How much of a long sequence a module keeps is measured, and told beside its verdict."""

from __future__ import annotations

from pathlib import Path

import pytest
from places import SUPPORT

from kvconform.api import conformance
from kvconform.results.results import Held
from kvconform.run import check
from kvconform_reports.view.explanations import judged_by

pytest.importorskip("torch", reason="modules are torch's")

from kvconform_backends.targets.module.target import open_module

FILE = SUPPORT / "windowed_modules.py"
SEES = 2 * 5 + 1
"""Tokens that an output depends on: two layers, each of which reaches a window less one further back."""
GROWS = "nothing is evicted, and memory grows with every token"


@pytest.mark.parametrize(
    ("name", "kept", "words"),
    [
        ("NeverEvicts", 40, f"after 40 tokens the cache holds 40, of which an output sees the last {SEES}: {GROWS}"),
        ("EvictsLate", 20, f"after 40 tokens the cache holds 20, of which an output sees the last {SEES}"),
        ("Evicts", 5, ""),
    ],
)
def test_a_past_is_compared_with_what_outputs_see(name: str, kept: int, words: str) -> None:
    held = open_module(f"{FILE}:{name}", {}).held
    assert held == {"tokens": 40, "held": kept, "seen": SEES}
    assert Held(**held).sentence == words


def test_nothing_is_told_where_outputs_see_all() -> None:
    assert open_module(f"{FILE}:SeesAll", {}).held is None


def test_a_check_tells_it_beside_the_verdict(tmp_path: Path) -> None:
    results = conformance(f"py:{FILE}:NeverEvicts", effort="smoke", clauses=["shape.output"], out=tmp_path)
    assert not results.failures
    held = Held(tokens=40, held=40, seen=SEES)
    assert results.target is not None
    assert results.target.held == held
    assert f"  memory: {held.sentence}" in list(check.lines(results, tmp_path))
    assert ("memory", held.sentence) in judged_by(results).facts
