"""Failures grouped by what they share, in the report and in the summary of a pull request."""

from __future__ import annotations

import report_data as given

from kvconform.errors import Raised
from kvconform.explain.diagnosis.record import Diagnosis
from kvconform.judging.mismatch import Kind, Mismatch
from kvconform.judging.verdict import Outcome, Verdict
from kvconform.results.results import Results
from kvconform_reports import markdown
from kvconform_reports.html import render
from kvconform_reports.view import tables
from kvconform_reports.view.shared_causes import Cause, causes


def failed(clause: str, config: str = "attention-gqa", message: str = "", kind: Kind = Kind.AGREEMENT) -> Verdict:
    error = Raised("IndexError", message) if message else None
    mismatch = Mismatch(kind=Kind.RAISED if error else kind, error=error)
    return given.other(clause, config, Outcome.FAIL, message or "wrong", mismatch=mismatch)


def of(*results: Results) -> tuple[Cause, ...]:
    return causes(results, tables.failures(results, "results"))


def diagnosed(name: str, mistake: str, *verdicts: Verdict) -> Results:
    found = given.results(name, list(verdicts))
    found.diagnoses = {verdict.config: Diagnosis(mistake=mistake) for verdict in verdicts}
    return found


def test_one_exception_with_other_numbers_is_one_cause_across_backends() -> None:
    (shared,) = of(
        given.results("eager", [failed("shape.output", message="index 7 is out of range 4")]),
        given.results("onnx", [failed("lifecycle.reset", "decoder-rope", "index 9 is out of range 8")]),
    )
    assert shared.words == "IndexError: index 0 is out of range 0"
    assert (shared.backends, shared.configs) == (("eager", "onnx"), ("attention-gqa", "decoder-rope"))
    assert shared.clauses == ("shape.output", "lifecycle.reset")


def test_a_named_mistake_is_a_cause_and_what_raised_is_not_blamed_on_it() -> None:
    raised = failed("shape.output", message="no")
    found = of(
        diagnosed("eager", "M1", failed("equivalence.decode"), failed("equivalence.chunks"), raised),
        diagnosed("onnx", "M1", failed("equivalence.decode")),
    )
    assert [(len(one.failures), one.words) for one in found] == [
        (3, "the causal diagonal starts at the top left, as if nothing were cached (M1)")
    ]


def test_without_a_name_failures_of_one_clause_in_one_way_belong_together() -> None:
    found = of(
        given.results("eager", [failed("window.content"), failed("window.content", "attention-window")]),
        given.results("onnx", [failed("window.content", kind=Kind.SHAPE)]),
    )
    assert [one.words for one in found] == ["window.content: agreement"]


def test_causes_of_more_backends_come_first_and_a_single_failure_is_none() -> None:
    many = [failed("window.content", config) for config in ("attention-gqa", "attention-window", "decoder-rope")]
    both = failed("shape.output", message="boom")
    found = of(given.results("eager", [*many, both]), given.results("onnx", [both, failed("lifecycle.reset")]))
    assert [one.clauses for one in found] == [("shape.output",), ("window.content",)]


def test_the_report_links_each_cause_to_its_failures_and_the_summary_names_it() -> None:
    results = [given.results(name, [failed("shape.output", message="boom")]) for name in ("eager", "onnx")]
    page = render(results, [], None)
    table = page.partition('id="causes"')[2].partition("</table>")[0]
    assert "IndexError: boom" in table
    assert table.count('href="#failure-') == 2
    assert "- shared by 2 cells on eager, onnx: IndexError: boom" in markdown.render(results, [], None)
    alone = [given.results("eager", [failed("shape.output", message="boom")])]
    assert 'id="causes"' not in render(alone, [], None)
    assert "shared by" not in markdown.render(alone, [], None)
