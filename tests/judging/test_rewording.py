"""No code reads a sentence: with every mismatch reworded to nonsense, all that comes after judging is the same."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from places import SUPPORT
from typer.testing import CliRunner

import kvconform_reports.html
import kvconform_reports.junit
import kvconform_reports.markdown
import kvconform_reports.terminal
from kvconform.cli.main import app
from kvconform.explain import repro
from kvconform.judging.mismatch import Mismatch
from kvconform.judging.render import render
from kvconform.results import gate
from kvconform.results.results import Results
from kvconform.run.run import Plan, run_backend
from kvconform.search import counterexample
from kvconform.search.effort import Effort
from kvconform.worker.client import WorkerClient, WorkerSpec

NONSENSE = "Colourless: step 9 (green), row 8, position 7, want ideas 6 ± 5 in step 4, raised sleep: could not be built"
FAULTS = "kvconform_backends.faults"
BROKEN = (
    (f"{FAULTS}.causality:TopLeft", "equivalence.decode", "attention-gqa"),
    (f"{SUPPORT / 'subjects.py'}:Raises", "definition.attention", "attention-gqa"),
    (f"{FAULTS}.contents:KeysTurnedAgain", "contents.past-unchanged", "decoder-rope"),
    (f"{FAULTS}.accounting:Recomputed", "accounting.affine", "decoder-rope"),
    (f"{FAULTS}.generation:LastPromptTokenTwice", "equivalence.generation", "decoder-rope"),
    (f"{SUPPORT / 'subjects.py'}:Segfaults", "definition.attention", "attention-gqa"),
    (f"{SUPPORT / 'subjects.py'}:GlobalCache", "shape.first-step", "attention-gqa"),
)
BRIEF = Effort("brief", 8, 2, 20.0)


def reworded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces ``render`` in every module that has imported it."""

    def nonsense(mismatch: Mismatch) -> str:
        return NONSENSE

    for module in [module for module in sys.modules.values() if getattr(module, "render", None) is render]:
        monkeypatch.setattr(module, "render", nonsense)


def run(address: str, clause: str, config: str, out: Path) -> Results:
    plan = Plan(BRIEF, clauses=(clause,), configs=(config,))
    return run_backend("broken", WorkerSpec(address), plan, out)


def facts(results: Results) -> Any:
    """Verdicts and guarantees without their sentences and times."""
    found = [msgspec.structs.replace(verdict, sentence="-", seconds=0.0) for verdict in results.verdicts]
    return found, {name: (held.level, held.refuted) for name, held in results.guarantees.items()}, results.exit_code


def stored(results: Results, out: Path) -> counterexample.Counterexample:
    (verdict,) = results.verdicts
    return counterexample.read(out / "failures" / "broken" / verdict.counterexample)


def without_docstring(script: str) -> str:
    return re.sub(r'\A""".*?"""', "", script, count=1, flags=re.DOTALL)


@pytest.mark.parametrize(
    ("address", "clause", "config"),
    [
        pytest.param(*one, id=one[0].rpartition(":")[2], marks=[pytest.mark.slow] * (one in BROKEN[2:]))
        for one in BROKEN
    ],
)
def test_results_counterexamples_replay_and_repro_scripts_stay_the_same(
    address: str, clause: str, config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with WorkerClient(WorkerSpec(address)) as client:
        before = run(address, clause, config, tmp_path / "before")
        said = repro.script(stored(before, tmp_path / "before"), client)
        reworded(monkeypatch)
        after = run(address, clause, config, tmp_path / "after")
        found = stored(after, tmp_path / "after")
        again = repro.script(found, client)
    assert after.verdicts[0].sentence == found.sentence == NONSENSE != before.verdicts[0].sentence
    assert facts(after) == facts(before)
    assert found.mismatch == stored(before, tmp_path / "before").mismatch
    assert without_docstring(again) == without_docstring(said)
    file = tmp_path / "after" / "failures" / "broken" / after.verdicts[0].counterexample
    replayed = CliRunner().invoke(app, ["replay", str(file)])
    assert replayed.exit_code == 1
    assert NONSENSE in " ".join(replayed.output.split())


REPORTS: dict[str, Callable[[Results], str]] = {
    "html": lambda results: kvconform_reports.html.render([results], [], None),
    "markdown": lambda results: kvconform_reports.markdown.render([results], [], None),
    "junit": lambda results: kvconform_reports.junit.render([results]),
    "terminal": lambda results: kvconform_reports.terminal.table([results]),
}


def without(report: str, sentence: str) -> str:
    return report.replace(kvconform_reports.markdown.text(sentence), "").replace(sentence, "")


def test_reports_and_the_gate_stay_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = run(*BROKEN[0], tmp_path)
    (verdict,) = results.verdicts
    written = {name: report(results) for name, report in REPORTS.items()}
    reworded(monkeypatch)
    results.verdicts = [msgspec.structs.replace(verdict, sentence=NONSENSE)]
    for name, report in REPORTS.items():
        if name == "html":  # the results are embedded in it, compressed
            continue
        assert without(report(results), NONSENSE) == without(written[name], verdict.sentence)
    assert verdict.mismatch is not None
    assert f"<dd>{verdict.mismatch.got}</dd>" in REPORTS["html"](results)
    clean = run("numpy", BROKEN[0][1], BROKEN[0][2], tmp_path)
    assert gate.exit_code(gate.compare(results, clean)) == gate.REGRESSION
