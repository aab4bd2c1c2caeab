"""What moved between two runs, as text, as a comment on a pull request, and as annotations of GitHub."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kvconform.bench.analysis.moved import MovedTime
from kvconform.results.diff import Difference, words
from kvconform.results.gate import NEW_FAILURE, REGRESSION, RULE, UNDECIDED
from kvconform_reports.markdown import text
from kvconform_reports.view import moved

MARKER = "<!-- kvconform diff -->"
"""The first line of a comment, by which the next run finds it and replaces it."""
SHOWN = 5
"""How many lines a comment shows of each kind that the gate objects to: the whole fits on one screen."""
LEVELS = {REGRESSION: "error", NEW_FAILURE: "error", UNDECIDED: "warning"}
"""The level of a GitHub annotation, by the gate's code."""


def lines(differences: Sequence[Difference], times: Sequence[MovedTime], no_times: str) -> Iterator[str]:
    """For a terminal: what moved, one line each."""
    for group in moved.groups(differences):
        yield f"{group.symbol} {group.title}"
        yield from (f"    {line}" for line in group.lines)
        if group.left_out:
            yield f"    and {group.left_out} more"
    yield from _times(times, no_times)


def _times(times: Sequence[MovedTime], no_times: str) -> Iterator[str]:
    if no_times:
        yield no_times
    elif times:
        apart = moved.times(times)
        yield f"times: {len(apart)} of {len(times)} moved beyond their intervals ({moved.UNPAIRED})"
        yield from (f"    {line}" for line in apart)


def comment(differences: Sequence[Difference], times: Sequence[MovedTime], no_times: str) -> str:
    """GitHub Markdown that fits on one screen. It begins with ``MARKER``."""
    parts = [MARKER, f"### kvconform: {text(moved.headline(differences))}"]
    notes = []
    for group in moved.groups(differences, SHOWN):
        if group.bad:
            rest = [f"- and {group.left_out} more"] if group.left_out else []
            parts.append("\n".join((f"{group.symbol} **{group.title}**", "", *map(_item, group.lines), *rest)))
        else:
            left = len(group.lines) - 1 + group.left_out
            more = f", and {left} more" if left else ""
            notes.append(f"- {group.symbol} {text(group.title)}: {text(group.lines[0])}{more}")
    timed = list(_times(times, no_times))
    notes += [f"- {text(timed[0])}", *map(_item, timed[1 : 1 + SHOWN])] if timed else []
    if notes:
        parts.append("\n".join(("<details><summary>What else moved</summary>", "", *notes, "", "</details>")))
    return "\n\n".join(parts) + "\n"


def _item(line: str) -> str:
    return f"- {text(line.strip())}"


def workflow_commands(differences: Sequence[Difference]) -> Iterator[str]:
    """Workflow commands of GitHub Actions: one annotation for each difference that the gate objects to."""
    for one in differences:
        if RULE[one.kind] in LEVELS:
            yield f"::{LEVELS[RULE[one.kind]]} title={_property('kvconform: ' + one.kind.value)}::{_data(words(one))}"


def _data(value: str) -> str:
    return value.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(value: str) -> str:
    return _data(value).replace(":", "%3A").replace(",", "%2C")
