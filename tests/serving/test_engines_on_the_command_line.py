"""``run -b ENGINE``, ``check``, ``replay``, ``report`` and ``gate`` of a serving engine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from lanes import slow_except
from typer.testing import CliRunner

from kvconform.cli.main import app
from kvconform.judging.verdict import Outcome
from kvconform.results import results as records
from kvconform_specs.serving.clauses import CLAUSES

FAULTY = "engine:kvconform_backends.servers.toy_faults:{}"


def kvconform(*words: str | Path, code: int = 0) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == code, done.output
    return done.output


def counterexample(out: Path, name: str, clause: str) -> Path:
    (found,) = (out / "failures" / name).glob(f"{clause}-*.json")
    return found


@pytest.mark.slow
def test_a_whole_run_of_the_clean_engine_is_conformant_and_says_what_it_found(tmp_path: Path) -> None:
    printed = kvconform("run", "-b", "toy-engine", "--effort", "smoke", "--max-seconds", "900", "--out", tmp_path)
    assert "conformant: serving profile, judged by its answers without the prefix cache" in printed
    assert "effect of one wrong token: 24 of 24 move answers" in printed
    found = records.read(tmp_path / "toy-engine.json")
    assert {verdict.clause for verdict in found.verdicts} == {clause.name for clause in CLAUSES}
    assert not found.partial
    assert found.served is not None
    assert found.served.hits > 100
    assert found.served.preemptions > 0
    assert found.served.bound is not None
    assert found.served.noise < found.served.bound < found.served.effect
    assert len(found.served.seconds_to_first) == 3
    report = tmp_path / "report.html"
    summary = kvconform("report", tmp_path / "toy-engine.json", "-o", report, "--markdown", tmp_path / "report.md")
    assert "serving.divergence" in report.read_text(), summary
    assert "| serving |" in (tmp_path / "report.md").read_text()
    assert "| causality |" not in (tmp_path / "report.md").read_text()
    kvconform("gate", tmp_path / "toy-engine.json", "--baseline", tmp_path / "toy-engine.json")


def test_some_clauses_do_not_decide_conformance(tmp_path: Path) -> None:
    printed = kvconform("run", "-b", "toy-engine", "--clause", "serving.pre", "--effort", "smoke", "--out", tmp_path)
    assert "conformance needs the whole suite" in printed


@pytest.mark.parametrize(
    ("fault", "clause"),
    slow_except(
        [
            ("AdapterIgnored", "serving.partition"),
            ("TooManyTogether", "serving.errors"),
            ("ChunkSeesFuture", "serving.rescore"),
            ("StaleLogProbabilities", "serving.prompt-logprobs"),
            ("NotYetComputed", "serving.second-turn"),
            ("UsageOfOneTokenLess", "serving.accounting"),
            ("ResetKeepsKeys", "serving.eviction"),
        ],
        3,
    ),
)
def test_a_fault_is_replayed_and_its_script_shows_it(fault: str, clause: str, tmp_path: Path) -> None:
    where = ("--clause", clause, "--effort", "smoke", "--max-seconds", "900", "--out", tmp_path)
    printed = kvconform("run", "-b", FAULTY.format(fault), *where, code=1)
    assert f"{clause} on {fault} [serving]: " in printed
    file, script = counterexample(tmp_path, fault, clause), tmp_path / "bug.py"
    assert "exits with 1" in kvconform("replay", file, "--script", script, code=1)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stdout
    assert "holds now" in kvconform("replay", file, "-b", "toy-engine")


def test_a_counterexample_is_as_small_as_the_fault_allows(tmp_path: Path) -> None:
    where = ("--clause", "serving.divergence", "--effort", "smoke", "--out", tmp_path)
    kvconform("run", "-b", FAULTY.format("FirstTokenIgnored"), *where, code=1)
    found = json.loads(counterexample(tmp_path, "FirstTokenIgnored", "serving.divergence").read_text())
    assert len(found["program"]["steps"]) == 2  # a prompt, and the same with another first token
    assert found["reduced"]
    assert "before" not in found or not found["before"]


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("check", "http://192.0.2.1:8000/v1"), 2, "--allow-remote"),
        (("run", "-b", "engine:kvconform_backends.servers.toy:Model"), 2, "want a subclass"),
        (("run", "-b", "engine:no_such_module:Engine"), 3, "no_such_module"),
        (("run", "-b", "toy-engine", "--clause", "serving.nothing"), 2, "no clause about serving"),
    ],
)
def test_what_is_no_engine_is_one_sentence(words: tuple[str, ...], code: int, says: str, tmp_path: Path) -> None:
    assert says in kvconform(*words, "--out", tmp_path, code=code)


def test_the_limit_of_requests_ends_a_run_without_a_verdict(tmp_path: Path) -> None:
    kvconform("run", "-b", "toy-engine", "--max-requests", "150", "--out", tmp_path, code=5)
    found = records.read(tmp_path / "toy-engine.json")
    assert found.served is not None
    assert found.served.requests <= 150
    assert any(verdict.outcome is Outcome.NOT_EXERCISED and verdict.cut for verdict in found.verdicts)


def test_a_clause_is_explained_with_a_program() -> None:
    printed = kvconform("spec", "serving.divergence")
    assert "for example" in printed
    assert "kvconform run -b ENGINE --clause serving.divergence" in printed


def test_parts_of_a_run_are_merged_and_a_part_is_compared_with_the_whole(tmp_path: Path) -> None:
    for folder, clause in (("one", "serving.prefix-hit"), ("two", "serving.rescore")):
        kvconform("run", "-b", "toy-engine", "--effort", "smoke", "--clause", clause, "--out", tmp_path / folder)
    parts, whole = [tmp_path / folder / "toy-engine.json" for folder in ("one", "two")], tmp_path / "toy-engine.json"
    assert "the selected part passed: 2 cells" in kvconform("merge", *parts, "-o", whole)
    found = records.read(whole)
    assert found.served is not None
    assert {verdict.outcome for verdict in found.verdicts} == {Outcome.PASS}
    assert "1 new cell" in kvconform("diff", parts[0], whole)
    assert "no regression" in kvconform("gate", whole, "--baseline", parts[0])


def test_what_is_for_backends_alone_is_refused_with_one_sentence(tmp_path: Path) -> None:
    kvconform("run", "-b", "toy-engine", "--effort", "smoke", "--clause", "serving.rescore", "--out", tmp_path)
    words = (
        f"{tmp_path / 'toy-engine.json'} is of a serving engine: run it again, and compare the two with kvconform diff"
    )
    assert words in kvconform("verify", tmp_path / "toy-engine.json", code=2)
