"""The results as plain text: a short table for a terminal or log."""

from __future__ import annotations

from collections.abc import Sequence

from kvconform.judging.verdict import Outcome
from kvconform.results.results import Results
from kvconform_reports.view.outcomes import MEANINGS, WORST_FIRST, duration, labels, standing


def table(results: Sequence[Results]) -> str:
    """One line for each backend: cells by outcome, programs, time, verdict; outcomes that no backend has are left out.

    >>> print(table([]))
    no results
    """
    if not results:
        return "no results"
    shown = [o for o in reversed(WORST_FIRST) if o is Outcome.PASS or any(_count(r, o) for r in results)]
    rows = [["backend", *(outcome.value for outcome in shown), "programs", "time", "verdict"]]
    for label, result in zip(labels(results), results, strict=True):
        stands = standing(result)
        remarks = (*stands.notes, *(f"stale known failure: {words}" for words in stands.stale))
        rows.append(
            [
                printable(label),
                *(str(_count(result, outcome)) for outcome in shown),
                str(sum(verdict.programs for verdict in result.verdicts)),
                duration(result.seconds),
                printable("; ".join((f"{stands.symbol} {stands.word}: {stands.sentence}", *remarks))),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(_line(row, widths) for row in rows)


def legend(results: Sequence[Results]) -> str:
    """What explains an outcome of the table that is easily taken for a failure; empty where none is there."""
    refuted = any(_count(result, Outcome.REFUTED) for result in results)
    return f"refuted: {MEANINGS[Outcome.REFUTED]}" if refuted else ""


def printable(text: str) -> str:
    """Text on one line without control characters."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _count(results: Results, outcome: Outcome) -> int:
    return sum(verdict.outcome is outcome for verdict in results.verdicts)


def _line(cells: list[str], widths: list[int]) -> str:
    first, *numbers, last = zip(cells, widths, strict=True)
    return "  ".join((first[0].ljust(first[1]), *(text.rjust(width) for text, width in numbers), last[0]))
