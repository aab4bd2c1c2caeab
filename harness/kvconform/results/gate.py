"""The conformance gate: a rule over the differences between results and a baseline."""

from __future__ import annotations

from kvconform.results.diff import Difference, Kind, diff
from kvconform.results.results import Results

OK, NEW_FAILURE, REGRESSION, UNDECIDED = 0, 1, 4, 5
MOST_SEVERE_FIRST = (REGRESSION, NEW_FAILURE, UNDECIDED)
RULE = {
    Kind.LOST_PASS: REGRESSION,
    Kind.NEW_FAILURE: NEW_FAILURE,
    Kind.LOST_CELL: REGRESSION,
    Kind.FEWER_VALUES: REGRESSION,
    Kind.NARROWED_CLAIM: REGRESSION,
    Kind.UNAVAILABLE: REGRESSION,
    Kind.LACKING: UNDECIDED,
    Kind.STALE: NEW_FAILURE,
    Kind.UNDECIDED: UNDECIDED,
    Kind.OTHER_DEVICE: UNDECIDED,
    Kind.NOT_SELECTED: UNDECIDED,
    Kind.FIXED: OK,
    Kind.OUTCOME: OK,
    Kind.NEW_CELL: OK,
    Kind.CHANGED_CLAIM: OK,
    Kind.OTHER_SUITE: OK,
    Kind.OTHER_PROGRAMS: OK,
    Kind.CUT: OK,
    Kind.SOFTWARE: OK,
    Kind.ERROR: OK,
}
"""The exit code that each kind of difference causes; 0 for a note."""


def compare(now: Results, baseline: Results) -> list[Difference]:
    """The differences that the gate tells: all but those that can never matter to it."""
    return [found for found in diff(baseline, now) if found.kind not in (Kind.ERROR, Kind.SOFTWARE)]


def exit_code(differences: list[Difference]) -> int:
    """4 for a regression, else 1 for a new failure, else 5 where something could not be decided, else 0."""
    return worst([RULE[difference.kind] for difference in differences])


def worst(codes: list[int]) -> int:
    return next((code for code in MOST_SEVERE_FIRST if code in codes), OK)
