"""The study of all causal language model classes: its independent measurement, and its page."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

STUDIES = ROOT / "docs" / "studies"


def run(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=STUDIES, capture_output=True, text=True, check=True, timeout=300
    )
    return done.stdout


def test_the_page_tells_confirmed_from_unconfirmed_and_unseen(tmp_path: Path) -> None:
    small, large = {"one row": 1e-6, "left padding": 2e-6}, {"one row": 1e-6, "left padding": 3.1}
    broken = {"outcome": "broken", "seconds": 9.0, "clauses": ["batch.left-padding"], "why": "got 1, want 2"}
    classes = {
        "AConfig": {"outcome": "conformant", "seconds": 8.0, "cpu_seconds": 12.0, "programs": 9, "plain": small},
        "BConfig": {**broken, "plain": large},
        "CConfig": {**broken, "plain": small},
        "DConfig": {"outcome": "conformant", "seconds": 7.0, "plain": large},
        "EConfig": {"outcome": "refused", "seconds": 2.0, "why": "E is not a decoder"},
    }
    (tmp_path / "found.json").write_text(json.dumps({"transformers": "5.0", "classes": classes}))
    issues = {
        "BConfig": {"cause": "positions", "link": "https://github.com/a/b/issues/7", "nearest": True},
        "DConfig": {"cause": "state"},
    }
    (tmp_path / "issues.json").write_text(json.dumps(issues))
    run("transformers_classes.page", str(tmp_path / "found.json"), "-o", str(tmp_path / "page.md"))
    page = (tmp_path / "page.md").read_text()
    assert "- 2 conformant" in page
    confirmed = "| BConfig | batch.left-padding | got 1, want 2 | confirmed: left padding: 3.1 | positions |"
    assert f"{confirmed} nearest: [b#7](https://github.com/a/b/issues/7) |" in page
    assert "| CConfig | batch.left-padding | got 1, want 2 | not confirmed |  | none found |" in page
    assert "- DConfig: left padding: 3.1 (state; reported: none found)" in page
    assert "No other value is larger than 2e-06." in page
    assert "12 s of processor time in the median and 12 s at most (1 measured)" in page
    assert "- EConfig: refused: E is not a decoder" in page


@pytest.mark.slow
def test_plain_transformers_shows_a_state_that_mixes_rows_and_nothing_on_a_right_model() -> None:
    pytest.importorskip("transformers", reason="it is what is measured here")
    found = {}
    for line in run("transformers_classes.plain", "LlamaConfig", "RwkvConfig", "RecurrentGemmaConfig").splitlines():
        found |= json.loads(line)
    assert all(off < 1e-4 for off in found["LlamaConfig"].values())
    assert len(found["LlamaConfig"]) == 6
    assert found["RwkvConfig"]["one row"] < 1e-4 < 0.1 < found["RwkvConfig"]["two rows"]
    assert "beams" not in found["RwkvConfig"]  # transformers refuses to
    gemma = found["RecurrentGemmaConfig"]
    assert gemma["one row"] < 1e-4 < 0.1 < gemma["one token after another prompt"]
