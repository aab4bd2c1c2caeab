"""What the definition does not express is judged as a black box: recurrent states, normalised keys, parallel blocks."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from in_process import broken
from places import ROOT, SUPPORT

from kvconform.worker.registry import load

pytest.importorskip("torch", reason="the decoders are torch modules")

FILE = SUPPORT / "hybrids.py"
ASKED = ("equivalence.decode", "equivalence.chunks", "lifecycle.independent", "causality.future-blind", "shape.output")
WRONG = {"StateNotCarried": "equivalence.chunks", "KeysNormalisedTwice": "equivalence.decode"}


def test_a_right_hybrid_breaks_no_clause() -> None:
    assert broken(load(f"py:{FILE}:Right"), ASKED) == {}


@pytest.mark.parametrize(("name", "clause"), WRONG.items(), ids=WRONG)
def test_a_mistake_in_a_part_that_the_definition_does_not_express_is_found(name: str, clause: str) -> None:
    assert clause in broken(load(f"py:{FILE}:{name}"), ASKED)


def test_the_black_box_of_the_page_is_conformant_and_judged(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/black-boxes.md").read_text(), re.DOTALL)
    file = tmp_path / "recurrent.py"
    file.write_text(code)
    assert broken(load(f"{file}:Recurrent"), ASKED) == {}
    file.write_text(code.replace("for token in tokens.T:", "for token in tokens.T[::-1]:"))
    assert "equivalence.decode" in broken(load(f"{file}:Recurrent"), ASKED)
