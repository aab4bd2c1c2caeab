"""``kvconform diff``: what moved between two runs, as data and in the words of each reader."""

from __future__ import annotations

import json
import re
from pathlib import Path

import msgspec
import pytest
import report_data
import speed_data
from commands import kvconform

from kvconform.bench import record as speeds
from kvconform.bench.analysis.moved import moved_times, not_comparable
from kvconform.judging.verdict import Outcome
from kvconform.results.diff import Kind, diff
from kvconform.results.gate import RULE, compare
from kvconform.results.results import Results
from kvconform_reports import html, moved
from kvconform_reports.view.moved import headline, since

CLAUSES = ("shape.output", "equivalence.decode", "lifecycle.truncate")


def before() -> Results:
    cells = [report_data.passed(clause, "attention-gqa") for clause in CLAUSES]
    cells[2] = report_data.other(CLAUSES[2], "attention-gqa", Outcome.FAIL, "it broke")
    return report_data.results("eager", cells)


def after() -> Results:
    cells = [report_data.passed(clause, "attention-gqa") for clause in CLAUSES]
    cells[0] = msgspec.structs.replace(cells[0], worst=0.75)
    cells[1] = report_data.other(CLAUSES[1], "attention-gqa", Outcome.FAIL, "it broke\n50% | <b>")
    now = report_data.results("eager", cells)
    return msgspec.structs.replace(now, environment={**now.environment, "numpy": "99.0"})


def test_each_difference_is_one_fact() -> None:
    found = {one.kind: one for one in diff(before(), after())}
    assert set(found) == {Kind.LOST_PASS, Kind.FIXED, Kind.ERROR, Kind.SOFTWARE}
    assert (found[Kind.LOST_PASS].clause, found[Kind.LOST_PASS].was, found[Kind.LOST_PASS].now) == (
        "equivalence.decode",
        "pass",
        "fail",
    )
    assert found[Kind.ERROR].now == 0.75
    assert (found[Kind.SOFTWARE].name, found[Kind.SOFTWARE].now) == ("numpy", "99.0")
    assert headline(list(found.values())) == "1 lost pass, 1 fixed"


def test_nothing_moved_between_a_run_and_itself() -> None:
    assert diff(after(), after()) == []
    assert headline([]) == "nothing moved"


def test_other_programs_are_said_as_such_and_are_no_regression() -> None:
    now = before()
    now.verdicts = [report_data.other(CLAUSES[0], "attention-gqa", Outcome.FAIL, "it broke"), *now.verdicts[1:]]
    for results, digest in ((was := before(), "a"), (now, "b")):
        results.verdicts = [msgspec.structs.replace(verdict, digest=digest) for verdict in results.verdicts]
    kinds = [one.kind for one in diff(was, now)]
    assert Kind.NEW_FAILURE in kinds
    assert Kind.OTHER_PROGRAMS in kinds
    assert Kind.LOST_PASS not in kinds


def test_the_gate_has_a_rule_for_every_kind() -> None:
    assert set(RULE) == set(Kind)
    assert {one.kind for one in compare(after(), before())} == {Kind.LOST_PASS, Kind.FIXED}


def test_a_comment_fits_on_a_screen_and_nothing_in_it_is_markup() -> None:
    was, now = before(), after()
    names = [f"layout.c{n}" for n in range(40)]
    was.verdicts += [report_data.passed(name, "attention-gqa") for name in names]
    now.verdicts += [report_data.other(name, "attention-gqa", Outcome.FAIL, "<img src=x>") for name in names]
    text = moved.comment(diff(was, now), [], "")
    assert text.startswith(moved.MARKER)
    assert len(text.splitlines()) <= 25
    assert "and 36 more" in text
    assert "<img" not in text


def test_annotations_are_workflow_commands() -> None:
    (line,) = moved.workflow_commands(diff(before(), after()))
    assert re.fullmatch(r"::error title=[^:,\n]+(%3A)?[^:,\n]*::[^\n]*", line)
    assert "%0A50%25" in line


def test_times_are_compared_on_one_machine_by_their_intervals() -> None:
    was, now = speed_data.latency(), speed_data.latency()
    now.summaries = [
        msgspec.structs.replace(s, median=3 * s.median, low=3 * s.low, high=3 * s.high) if at == 0 else s
        for at, s in enumerate(now.summaries)
    ]
    times = moved_times(was, now)
    assert sum(one.apart for one in times) == 1
    assert "× 3.00" in "\n".join(moved.lines([], times, ""))
    assert not_comparable(was, was) == ""
    now.machine = {**now.machine, "cpu": "another"}
    assert not_comparable(was, now) == f"times are not compared: cpu is another, was {was.machine['cpu']}"


def test_the_report_begins_with_what_moved() -> None:
    page = html.render([after()], [], None, moved=since("baseline", diff(before(), after()), [], ""))
    assert page.index("Since baseline: 1 lost pass, 1 fixed.") < page.index('id="verdict"')
    assert "it broke" in page
    assert 'id="moved"' not in html.render([after()], [], None)


@pytest.mark.slow
def test_the_command_compares_folders_and_files(tmp_path: Path) -> None:
    for folder, results in (("old", before()), ("new", after())):
        results.write(tmp_path / folder / "eager.json")
        speeds.write(speed_data.latency(), tmp_path / folder / "speed.json")
    after().write(tmp_path / "new" / "onnx.json")
    done = kvconform("diff", "old", "new", "--markdown", "comment.md", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1 lost pass, 1 fixed\n")
    assert "only now: onnx.json" in done.stdout
    assert (tmp_path / "comment.md").read_text().startswith(moved.MARKER)
    found = json.loads(kvconform("diff", "old/eager.json", "new/onnx.json", "--json", folder=tmp_path).stdout)
    assert [one["kind"] for one in found["differences"]].count("lost pass") == 1
    shown = kvconform("diff", "old", "new", "--annotations", folder=tmp_path).stdout
    assert shown.startswith("::error title=kvconform%3A lost pass::")
    assert kvconform("report", "new/eager.json", "--against", "old", "-o", "page.html", folder=tmp_path).returncode == 0
    assert "What moved" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(("left", "right"), [("absent", "absent"), (".", "absent")])
def test_a_path_that_holds_nothing_is_one_sentence(left: str, right: str, tmp_path: Path) -> None:
    done = kvconform("diff", left, right, folder=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("kvconform: ")
    assert "Traceback" not in done.stderr
