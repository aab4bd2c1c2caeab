"""Verdicts are on the screen as they come, each reason once, and nothing from outside is read as markup or emoji."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from mismatches import cause
from places import ROOT

from kvconform.cli import options, progress
from kvconform.cli.progress import Progress
from kvconform.errors import Raised
from kvconform.judging.mismatch import Kind, Mismatch
from kvconform.judging.verdict import Outcome, Reason, Verdict
from kvconform.results.results import Results, Target
from kvconform.run import check as checks

RING = "ring_backend.py:Ring:"
WORDS = f"not tested: {RING} [red]took[/red] :x:"


def verdict(clause: str, outcome: Outcome = Outcome.PASS, config: str = "attention-gqa", **more: Any) -> Verdict:
    fields = {"compared": 1, "sentence": "" if outcome is Outcome.PASS else WORDS, **cause(outcome), **more}
    return Verdict(clause=clause, config=config, backend="x", outcome=outcome, **fields)


VERDICTS = (
    verdict("shape.output"),
    verdict("shape.length", Outcome.FAIL, counterexample="shape.length-1.json"),
    verdict("capacity.full", Outcome.NOT_EXERCISED, reason=Reason.FALLBACK),
    verdict("capacity.overflow", Outcome.NOT_EXERCISED, reason=Reason.FALLBACK),
    verdict("determinism.repeatable", Outcome.REFUTED),
    verdict("shape.output", config="attention-window", cut=True),
)

FOUND = Results(
    suite="0", backend="x", device="cpu", dtypes=[], effort="pr", seed=0, started="now", verdicts=list(VERDICTS)
)


@pytest.fixture(params=[False, True], ids=["log", "terminal"])
def screen(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    written = io.StringIO()
    console = options.plain(file=written, force_terminal=request.param, width=400)
    monkeypatch.setattr(options, "screen", console)
    return written


def test_failures_and_reasons_come_at_once_and_the_rest_is_counted(screen: io.StringIO) -> None:
    seen = []
    with Progress(RING, Path("out"), quiet=False) as shown:
        shown.begin(FOUND, [one.key for one in VERDICTS])
        for one in VERDICTS:
            shown.tell(one)
            seen.append(screen.getvalue())
    assert f"shape.length on {RING} [attention-gqa]: {WORDS}" in seen[1]
    assert f"replay: kvconform replay out/failures/{RING}/shape.length-1.json" in seen[1]
    assert f"not exercised: capacity.full on {RING} [attention-gqa]: {WORDS}" in seen[2]
    assert "capacity.overflow" not in screen.getvalue()  # for the same reason
    assert f"{RING} [attention-gqa]: 1 pass, 1 fail, 2 not exercised, 1 refuted\n" in screen.getvalue()
    assert f"{RING} [attention-window]: 1 pass, 1 cut by the time limit\n" in screen.getvalue()


def test_a_config_is_counted_once_all_of_its_cells_are_judged_whatever_else_is_judged_meanwhile(
    screen: io.StringIO,
) -> None:
    mixed = [verdict(clause, config=config) for clause in ("shape.output", "shape.length") for config in ("a", "b")]
    with Progress("x", Path("out"), quiet=False) as shown:
        shown.begin(FOUND, [one.key for one in mixed])
        for one in mixed[:3]:
            shown.tell(one)
        assert screen.getvalue().count("pass") == screen.getvalue().count("x [a]: 2 pass\n") == 1
        shown.tell(mixed[3])
        assert "x [b]: 2 pass\n" in screen.getvalue()


def test_json_and_nothing_else_is_printed_where_it_is_asked_for(screen: io.StringIO) -> None:
    with Progress(RING, Path("out"), quiet=True) as shown:
        for one in VERDICTS:
            shown.tell(one)
    assert screen.getvalue() == ""


def test_how_far_a_run_is_is_a_line_in_a_log_and_a_bar_on_a_terminal(
    screen: io.StringIO, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.05)
    cells = [*(one.key for one in VERDICTS), ("shape.length", "attention-window")]
    with Progress("mine", Path("out"), quiet=False) as shown:
        time.sleep(0.15)
        loading = screen.getvalue()
        shown.begin(FOUND, cells)
        for one in VERDICTS:
            shown.tell(msgspec.structs.replace(one, seconds=100.0 if one.clause == "shape.length" else 1.0))
        shown.running(cells[-1])
        time.sleep(0.15)
    judging = screen.getvalue()[len(loading) :]
    if "terminal" in request.node.callspec.id:
        assert "shape.length [attention-window]" in judging
        assert "about 1 min 40 s left" in judging
        assert " cells in " not in judging
    else:
        assert "mine: after 0 s: loading\n" in loading
        assert "mine: after 0 s: 6 of 7 cells; about 1 min 40 s left; shape.length [attention-window]\n" in judging


def test_a_cell_is_expected_to_take_as_long_as_its_clause_took_under_other_configs() -> None:
    pace = progress.Pace()
    pace.begin([("a", "x"), ("b", "x"), ("a", "y"), ("b", "y"), ("c", "y")])
    assert pace.seconds_left is None
    pace.tell(("a", "x"), 2.0)
    assert pace.seconds_left == pytest.approx(2.0 * 4)  # of the others nothing else is known
    pace.tell(("b", "x"), 10.0)
    assert pace.seconds_left == pytest.approx(2.0 + 10.0 + (2.0 + 10.0) / 2)
    pace.running |= {("a", "y"): None, ("b", "y"): None}  # two at once
    assert pace.seconds_left == pytest.approx(((2.0 + 10.0) + (2.0 + 10.0) / 2) / 2)
    assert pace.now == "a [y] and 1 more"
    for clause in "abc":
        pace.tell((clause, "y"), 1.0)
    assert pace.now == "explaining failures"
    assert pace.seconds_left == 0.0


@pytest.mark.parametrize("variables", [{}, {"NO_COLOR": "1"}], ids=["colours", "NO_COLOR"])
def test_failures_are_coloured_unless_the_environment_forbids_it(variables: dict[str, str]) -> None:
    written = io.StringIO()
    console = options.plain(file=written, force_terminal=True, color_system="standard", _environ=variables)
    options.say("a failure", console, "red")
    assert ("\x1b[31m" in written.getvalue()) is not bool(variables)
    assert "a failure" in written.getvalue()


def test_an_interrupted_run_has_counted_what_it_judged(screen: io.StringIO) -> None:
    def judge() -> None:
        with Progress("x", Path("out"), quiet=False) as shown:
            shown.tell(VERDICTS[0])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        judge()
    assert "x [attention-gqa]: 1 pass\n" in screen.getvalue()


def test_what_stands_beside_a_conclusion_is_explained_in_a_few_words() -> None:
    assert list(checks.remarks(FOUND)) == [
        f"  not exercised: capacity.full, capacity.overflow: {WORDS}",
        "  refuted: determinism.repeatable: measured guarantees that do not hold; conformance does not require them",
        "  cut: shape.output: the time limit ended before all planned programs were judged",
    ]
    assert list(checks.remarks(msgspec.structs.replace(FOUND, verdicts=[VERDICTS[0]]))) == []


def test_why_cells_are_not_judged_is_said_with_the_number_of_cells() -> None:
    left_out = [
        verdict(f"chapter.clause{i}", Outcome.UNSUPPORTED, reason=Reason.ABILITY, sentence=f"claims no {i // 2}")
        for i in range(13)
    ]
    words = ", ".join(f"claims no {i} (2)" for i in range(5))
    (line,) = checks.remarks(msgspec.structs.replace(FOUND, verdicts=left_out))
    assert line == f"  not applicable: {words} and 2 more reasons"


def test_of_a_target_its_header_comes_first_and_only_once(screen: io.StringIO) -> None:
    target = Target(recognised="called somehow", assumed=["it is small"], configs={})
    found = msgspec.structs.replace(FOUND, target=target, verdicts=[VERDICTS[0]])
    with Progress("x", Path("out"), quiet=False, chapters=True) as shown:
        shown.begin(found, [VERDICTS[0].key])
        shown.tell(VERDICTS[0])
    for line in ("x: called somehow\n", "  assumed: it is small\n", "  reference: its own forward without a cache; "):
        assert screen.getvalue().count(line) == 1
    assert "x [attention-gqa] shape: 1 pass\n" in screen.getvalue()
    later = msgspec.structs.replace(target, assumed=["it is small", "it is fast"], noise={"hidden-self": 1e-6})
    report = list(checks.lines(msgspec.structs.replace(found, target=later), Path("out"), shown.told))
    assert report[:2] == [
        "  assumed: it is fast",
        "  noise floor [hidden-self]: rounding moves outputs by at most 1e-06 of their size",
    ]


def test_every_console_of_the_command_line_prints_text_as_it_is() -> None:
    for console in (options.screen, options.errors, progress.progress_bar().console):
        with console.capture() as captured:
            console.print(WORDS)
        assert captured.get() == f"{WORDS}\n"


@pytest.mark.slow
def test_a_check_that_is_killed_has_shown_what_it_had(tmp_path: Path) -> None:
    """Standard output is a file here, no terminal."""
    target, log = ROOT / "examples" / "attention_broken.py", tmp_path / "log"
    command = [sys.executable, "-m", "kvconform", "check", f"{target}:Attention"]
    with (
        log.open("wb") as file,
        subprocess.Popen(command, cwd=tmp_path, stdout=file, start_new_session=True) as process,
    ):
        ends = time.monotonic() + 120
        while "[hidden-self] equivalence: 1 pass" not in log.read_text() or " on Attention [hidden-self]: " not in (
            log.read_text()
        ):
            assert time.monotonic() < ends, log.read_text()
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    assert json.loads((tmp_path / "results" / "check" / "Attention.json").read_text())["finished"] is False


def test_a_check_says_what_it_judges_before_anything_is_imported(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text("import time\ntime.sleep(600)\n")
    command = [sys.executable, "-m", "kvconform", "check", "slow.py:Net"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as checking:
        assert checking.stdout is not None
        line = checking.stdout.readline()
        checking.kill()
    assert line.startswith("judging py:slow.py:Net (effort check; start method fork)")


def test_an_error_that_was_told_is_not_told_again(screen: io.StringIO) -> None:
    mismatch = Mismatch(kind=Kind.RAISED, error=Raised("ValueError", "shape 3"))
    again = Mismatch(kind=Kind.RAISED, error=Raised("ValueError", "shape 4"))
    with Progress("x", Path("out"), quiet=False, chapters=True) as shown:
        shown.tell(verdict("shape.output", Outcome.FAIL, mismatch=mismatch))
        shown.tell(verdict("shape.length", Outcome.FAIL, mismatch=again))
    assert "shape.length on x [attention-gqa]: the error of shape.output" in screen.getvalue()
