"""The known failures hides nothing: a row is replayed, and where it does not hold the run is not green."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from datetime import date, timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import pytest
from commands import kvconform_here
from lanes import slow_except

from kvconform import conformance
from kvconform.judging.verdict import Outcome, Reason
from kvconform.results import known_failures
from kvconform.results.known_failures import Row
from kvconform.results.results import Results, read
from kvconform.run.run import Plan, run_backend
from kvconform.search.counterexample import Counterexample
from kvconform.search.effort import Effort
from kvconform.worker.client import WorkerSpec
from kvconform_specs import SUITE_VERSION
from kvconform_specs.clause import Case
from kvconform_specs.configs import config_named
from kvconform_specs.errors import SpecError
from kvconform_specs.program import Append, Program

MINE = '''
import os
import numpy as np
from kvconform_backends.numpy.cache import NumpyCache


class Mine(NumpyCache):
    """Every output is wrong by one."""

    def step(self, cache, *inputs, **keywords):
        output, cache = super().step(cache, *inputs, **keywords)
        return output + np.float32(1), cache


class Dies(NumpyCache):
    def step(self, cache, *inputs, **keywords):
        os._exit(7)


class Killed(NumpyCache):
    def step(self, cache, *inputs, **keywords):
        os.kill(os.getpid(), 9)


class FallsBack(Mine):
    def runtime_info(self):
        return {"fallback": "another kernel ran"}


class Refuses(Mine):
    @classmethod
    def refuses(cls, config, device):
        return "no such layer here"
'''
ROW: dict[str, Any] = {
    "backend": "mine",
    "clause": "definition.attention",
    "config": "attention-gqa",
    "reason": "bug in the backend",
    "link": "https://github.com/o/r/issues/1",
    "versions": {"python": "3.*"},
    "expires": date.today() + timedelta(days=30),
    "counterexample": "stored.json",
}
PLACE = "definition.attention on mine [attention-gqa]: "
CELL = Plan(Effort("tiny", 2, 2, 60.0), clauses=("definition.attention",), configs=("attention-gqa",))
PLAN = replace(CELL, clauses=("definition.attention", "shape.output"))


def toml(**changes: Any) -> str:
    """A known_failures of one row; a change to None leaves the field out."""
    row = {name: value for name, value in {**ROW, **changes}.items() if value is not None}
    lines = [f"{name} = {_value(value)}" for name, value in row.items()]
    return "\n".join([f'schema = "{known_failures.SCHEMA}"', "[[known]]", *lines, ""])


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f'{name} = "{version}"' for name, version in value.items()) + " }"
    return value.isoformat() if isinstance(value, date) else f'"{value}"'


def stored(clause: str = "definition.attention", config: str = "attention-gqa", outcome: str = "fail") -> bytes:
    """A counterexample: a prefill of two tokens."""
    case = Case((Program(config_named(config), (Append("a", (2,), 0),)),))
    return msgspec.json.encode(
        Counterexample(
            suite=SUITE_VERSION,
            clause=clause,
            backend="mine.py:Mine",
            device="cpu",
            sentence="off by one",
            outcome=outcome,
            before=[],
            case=case.to_json(),
            reduced=True,
        )
    )


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with the backend, its known_failures and the counterexample."""
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "stored.json").write_bytes(stored())
    (tmp_path / "known_failures.toml").write_text(toml())
    return tmp_path


def run(place: Path, backend: str = "Mine", today: date | None = None, plan: Plan = PLAN) -> Results:
    known = known_failures.read(place / "known_failures.toml", today)
    return run_backend("mine", WorkerSpec(f"{place / 'mine.py'}:{backend}"), plan, place / "out", known_failures=known)


def outcomes(found: Results) -> dict[str, Outcome]:
    return {verdict.clause: verdict.outcome for verdict in found.verdicts}


def test_a_known_failure_is_replayed_and_says_why_it_is_known(place: Path) -> None:
    found = run(place)
    assert outcomes(found) == {"shape.output": Outcome.PASS, "definition.attention": Outcome.KNOWN_FAILURE}
    known = next(v for v in found.verdicts if v.outcome is Outcome.KNOWN_FAILURE)
    assert known.programs == 1  # it was not searched
    why = f"bug in the backend, known until {ROW['expires']}, {ROW['link']}: "
    assert known.sentence.startswith(f"{why}step 0 (append 2 to a)")
    assert (place / "out" / "failures" / "mine" / known.counterexample).exists()
    assert found.known_failures == [msgspec.convert(ROW, Row)]
    assert not found.stale
    assert read(place / "out" / "mine.json") == found
    code, words = (found.exit_code, found.summary)
    assert code == 5  # a core clause without a pass: a row excuses a failure, it is no pass
    assert "definition.attention" in words


@pytest.mark.parametrize(
    ("backend", "row", "file", "outcome", "words"),
    slow_except(
        [
            ("Mine", {"expires": date.today() - timedelta(days=1)}, {}, Outcome.FAIL, "the known failure expired on 2"),
            ("Mine", {"versions": {"python": "2.7"}}, {}, Outcome.FAIL, "is known with python 2.7, and this is 3."),
            ("Mine", {"versions": {"jax": "0.4"}}, {}, Outcome.FAIL, "with jax 0.4, and jax is not installed here"),
            ("Mine", {}, {"config": "attention-window"}, Outcome.FAIL, "of a config other than attention-gqa"),
            ("Dies", {}, {}, Outcome.CRASH, "the known fail is a crash now: step 0 (append 2 to a): the process ended"),
            ("Mine", {}, {"outcome": "crash"}, Outcome.FAIL, "the known crash is a fail now: step 0"),
            (
                "Refuses",
                {},
                {},
                Outcome.UNSUPPORTED,
                "is about a cell that is unsupported (no such layer here): remove the row",
            ),
            ("NumpyCache", {}, {}, Outcome.PASS, "the known failure no longer fails: remove the row"),
        ],
        3,
    ),
)
def test_a_stale_row_excuses_nothing_and_the_cell_is_searched(
    backend: str, row: dict[str, Any], file: dict[str, str], outcome: Outcome, words: str, place: Path
) -> None:
    (place / "known_failures.toml").write_text(toml(**row))
    (place / "stored.json").write_bytes(stored(**file))
    found = run(place, backend, plan=CELL)
    assert outcomes(found) == {"definition.attention": outcome}
    assert len(found.stale) == 1
    assert found.stale[0].startswith(PLACE)
    assert words in found.stale[0]
    assert found.known_failures == []
    assert found.exit_code == 1


def test_a_row_is_good_through_its_last_day(place: Path) -> None:
    last = ROW["expires"]
    assert outcomes(run(place, today=last))["definition.attention"] is Outcome.KNOWN_FAILURE
    assert outcomes(run(place, today=last + timedelta(days=1)))["definition.attention"] is Outcome.FAIL


def test_what_ran_instead_of_the_backend_is_no_known_failure(place: Path) -> None:
    assert outcomes(run(place, "FallsBack"))["definition.attention"] is Outcome.NOT_EXERCISED


@pytest.mark.parametrize("names", [{"clause": "definition.poetry"}, {"config": "decoder-rope"}, {"config": "*"}])
def test_a_row_of_no_cell_of_the_suite_is_stale(names: dict[str, str], place: Path) -> None:
    (place / "known_failures.toml").write_text(toml(**names))
    (place / "stored.json").write_bytes(stored(names.get("clause", ROW["clause"])))
    found = run(place)
    assert "the suite has no such cell: remove the row, or correct its names" in found.stale[0]
    assert outcomes(found)["definition.attention"] is Outcome.FAIL


def test_rows_of_what_is_not_judged_hide_nothing_and_are_no_error(place: Path) -> None:
    assert run(place, plan=replace(CELL, clauses=("shape.output",))).stale == []
    (place / "known_failures.toml").write_text(toml(backend="another"))
    found = run(place)
    assert (found.stale, found.known_failures) == ([], [])
    assert outcomes(found)["definition.attention"] is Outcome.FAIL


def test_a_row_may_name_any_distribution_of_the_worker(place: Path) -> None:
    versions = {"pytest": f"{version('pytest').partition('.')[0]}.*", "numpy": version("numpy")}
    (place / "known_failures.toml").write_text(toml(versions=versions))
    found = run(place, plan=CELL)
    assert (outcomes(found), found.stale) == ({"definition.attention": Outcome.KNOWN_FAILURE}, [])
    (place / "known_failures.toml").write_text(toml(versions={"pytest": "1.*"}))
    assert "is known with pytest 1.*, and this is" in run(place, plan=CELL).stale[0]


def test_a_row_of_another_device_neither_excuses_nor_is_stale(place: Path) -> None:
    (place / "known_failures.toml").write_text(toml(device="cuda"))
    found = run(place, plan=CELL)
    assert (outcomes(found), found.stale) == ({"definition.attention": Outcome.FAIL}, [])
    (place / "known_failures.toml").write_text(toml(device="cpu") + toml(device="cuda").partition("\n")[2])
    found = run(place, plan=CELL)
    assert (outcomes(found), found.stale) == ({"definition.attention": Outcome.KNOWN_FAILURE}, [])
    assert [row.device for row in found.known_failures] == ["cpu"]


def test_a_replay_that_is_killed_from_outside_is_inconclusive(place: Path) -> None:
    found = run(place, "Killed", plan=CELL)
    (verdict,) = found.verdicts
    assert (verdict.outcome, verdict.reason, found.stale) == (Outcome.INCONCLUSIVE, Reason.KILLED, [])
    assert "the known failure could not be replayed" in verdict.sentence


@pytest.mark.slow
def test_a_resumed_run_asks_its_ledger_again(place: Path) -> None:
    found = run(place)
    path = place / "out" / "mine.json"
    marked = [msgspec.structs.replace(verdict, seconds=12345.0) for verdict in found.verdicts]
    msgspec.structs.replace(found, verdicts=marked, finished=False).write(path)
    again = run(place)
    assert {v.clause: v.seconds == 12345.0 for v in again.verdicts} == {
        "shape.output": True,
        "definition.attention": False,
    }
    assert again.known_failures == found.known_failures
    msgspec.structs.replace(found, verdicts=marked, finished=False).write(path)
    (place / "known_failures.toml").write_text(f'schema = "{known_failures.SCHEMA}"\n')
    assert outcomes(run(place))["definition.attention"] is Outcome.FAIL


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("schema = ", "holds no known failures: Invalid value"),
        ("known = []", "holds no known failures: Object missing required field `schema`"),
        (
            'schema = "kvconform-known-failures/9"',
            "unknown schema 'kvconform-known-failures/9'; known: kvconform-known-failures/1",
        ),
        (toml(reason="works for me"), "unknown reason 'works for me'; known: bug in the backend, bug in a library"),
        (toml(link="see Slack"), "link: want the address of an issue, got 'see Slack'"),
        (toml(link=None), "missing required field `link`"),
        (toml(versions={}), "versions: want at least one"),
        (toml(versions={"torch": ">=2"}), "versions.torch: want a version such as 2.11.0 or 2.11.*, got '>=2'"),
        (toml(expires="soon"), "Invalid RFC3339"),
        (toml(expires=date.today() + timedelta(days=400)), "is more than a year ahead"),
        (toml(note="hush"), "unknown field `note`"),
        (toml(device="tpu"), "unknown device 'tpu'; known: cpu, cuda"),
        (toml(counterexample="none.json"), "none.json: cannot be read: No such file or directory"),
        (toml(counterexample="known_failures.toml"), "known_failures.toml: holds no counterexample"),
        (toml(clause="shape.output"), "counterexample: is about definition.attention, not about shape.output"),
        (toml() + toml().partition("\n")[2], "known[1]: a second row of definition.attention on mine [attention-gqa]"),
    ],
)
def test_a_malformed_ledger_is_one_sentence(text: str, words: str, place: Path) -> None:
    (place / "known_failures.toml").write_text(text)
    with pytest.raises(SpecError, match=re.escape(words)) as raised:
        known_failures.read(place / "known_failures.toml")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("wanted", "installed", "matches"),
    [
        ("2.11.0", "2.11.0", True),
        ("2.11.0", "2.11.0+cpu", True),
        ("2.11.0+cpu", "2.11.0+cpu", True),
        ("2.11.0+cpu", "2.11.0+cu130", False),
        ("2.11.0", "2.11.1", False),
        ("2.11.*", "2.11.3+cpu", True),
        ("2.1.*", "2.11.3", False),
        ("2.*", "2.11.3", True),
        ("2.11.3.*", "2.11.3", True),
        ("2.11", "2.11.3", False),
    ],
)
def test_a_version_is_exact_or_a_prefix(wanted: str, installed: str, matches: bool) -> None:
    row = msgspec.convert({**ROW, "versions": {"torch": wanted}}, Row)
    assert (row.outdated({"torch": installed}, date.today()) == "") is matches


def tool(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)


@pytest.mark.slow
def test_the_command_line_says_what_is_stale_and_exits_with_1(place: Path) -> None:
    (place / "known_failures.toml").write_text(toml(backend="Mine"))
    asked = ("kvconform", "run", "-b", "mine.py:Mine", "--config", "attention-gqa", "--clause", "definition.attention")
    known = tool(*asked, "--effort", "smoke", "--known-failures", "known_failures.toml", folder=place)
    assert known.returncode == 5, known.stdout + known.stderr
    assert "1 known failure; 1 programs" in known.stdout
    (place / "known_failures.toml").write_text(toml(backend="Mine", clause="definition.poetry"))
    (place / "stored.json").write_bytes(stored("definition.poetry"))
    stale = tool(*asked, "--effort", "smoke", "--known-failures", "known_failures.toml", folder=place)
    assert stale.returncode == 1
    assert "definition.poetry on Mine [attention-gqa]: the suite has no such cell" in stale.stdout
    malformed = tool(*asked, "--known-failures", "none.toml", folder=place)
    assert malformed.returncode == 2
    assert malformed.stderr == "kvconform: none.toml: cannot be read: No such file or directory\n"


@pytest.mark.slow
def test_in_pytest_a_known_failure_is_green_and_a_stale_row_is_not(place: Path) -> None:
    (place / "known_failures.toml").write_text(toml(backend="Mine"))
    asked = ["pytest", "-p", "no:cacheprovider", "-q", "-rxf", "--pyargs", "kvconform.pytest_plugin.suite"]
    asked += ["--kv-backend", "mine.py:Mine", "--kv-known-failures", "known_failures.toml"]
    asked += ["-k", "attention-gqa and (definition.attention or shape.output)"]
    known = tool(*asked, folder=place)
    assert known.returncode == 0, known.stdout
    assert "1 passed" in known.stdout
    assert "1 xfailed" in known.stdout
    assert "https://github.com/o/r/issues/1" in known.stdout
    (place / "known_failures.toml").write_text(toml(backend="Mine", versions={"python": "2.7"}))
    stale = tool(*asked, folder=place)
    assert stale.returncode == 1
    assert "is known with python 2.7" in stale.stdout
    (place / "known_failures.toml").write_text(toml(backend="Mine", config="attention-poetry"))
    stranger = tool(*asked, folder=place)
    assert stranger.returncode not in (0, 1)
    assert "the suite has no such cell" in stranger.stdout + stranger.stderr


@pytest.mark.slow
def test_conformance_takes_known_failures_and_raises_what_is_stale(place: Path) -> None:
    known: dict[str, Any] = {"known_failures": place / "known_failures.toml", "configs": ("attention-gqa",)}
    (place / "known_failures.toml").write_text(toml(backend="Mine", clause="numerics.large-scores"))
    (place / "stored.json").write_bytes(stored("numerics.large-scores"))
    clauses = ("numerics.large-scores", "shape.output")
    found = conformance(f"{place / 'mine.py'}:Mine", clauses=clauses, **known)
    assert outcomes(found)["numerics.large-scores"] is Outcome.KNOWN_FAILURE
    assert found.summary == "the selected part passed: 2 cells, with 1 known failure; conformance needs the whole suite"

    core = ("definition.attention", "shape.output")
    (place / "known_failures.toml").write_text(toml(backend="Mine"))
    (place / "stored.json").write_bytes(stored())
    with pytest.raises(AssertionError, match=r"no PASS on the core clauses definition\.attention"):
        conformance(f"{place / 'mine.py'}:Mine", clauses=core, **known)
    (place / "known_failures.toml").write_text(toml(backend="NumpyCache"))
    with pytest.raises(AssertionError, match="no longer fails: remove the row"):
        conformance(f"{place / 'mine.py'}:NumpyCache", clauses=core, **known)


def test_a_row_for_a_serving_engine_is_refused_and_the_gate_is_named(tmp_path: Path) -> None:
    (tmp_path / "known_failures.toml").write_text(toml(backend="toy-engine"))
    (tmp_path / "stored.json").write_bytes(stored())
    done = kvconform_here("run", "-b", "toy-engine", "--known-failures", "known_failures.toml", folder=tmp_path)
    assert done.returncode == 2
    assert "toy-engine is a serving engine: kvconform gate compares it with a baseline" in done.stderr
