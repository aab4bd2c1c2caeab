"""What moved between two runs, grouped for readers: what must be acted on first, then improvements, then conditions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvconform.bench.analysis.moved import MovedTime
from kvconform.judging.verdict import Outcome
from kvconform.results.diff import Difference, Kind, words
from kvconform.results.gate import OK, RULE
from kvconform_reports.view.figures import UNITS, digits, unit
from kvconform_reports.view.outcomes import SYMBOLS

UNPAIRED = "the two runs are not paired; kvconform bench gate tests for a regression"
PLURALS = {
    Kind.LOST_PASS: "lost passes",
    Kind.NEW_FAILURE: "new failures",
    Kind.LOST_CELL: "lost cells",
    Kind.FEWER_VALUES: "cells with fewer values compared",
    Kind.NARROWED_CLAIM: "narrowed claims",
    Kind.STALE: "stale known failures",
    Kind.UNDECIDED: "undecided cells",
    Kind.FIXED: "fixed",
    Kind.OUTCOME: "changed outcomes",
    Kind.NEW_CELL: "new cells",
    Kind.CHANGED_CLAIM: "changed claims",
    Kind.ERROR: "moved errors",
}
HEADLINE = (Kind.LOST_PASS, Kind.NEW_FAILURE, Kind.FIXED, Kind.LOST_CELL, Kind.NARROWED_CLAIM, Kind.UNDECIDED)
"""The kinds that the headline counts."""
MOST_ERRORS = 3
"""How many cells whose error moved are listed: those that moved most."""


@dataclass(frozen=True)
class Group:
    """The differences of one kind. ``bad``: whether the gate objects to them; ``left_out``: how many have no line."""

    title: str
    symbol: str
    bad: bool
    lines: tuple[str, ...]
    left_out: int = 0


@dataclass(frozen=True)
class Moved:
    """What moved since an earlier run, for the top of the report. ``against``: which run, in words."""

    against: str
    headline: str
    groups: tuple[Group, ...]
    times: tuple[str, ...]
    unpaired: str = UNPAIRED


def since(against: str, differences: Sequence[Difference], moved: Sequence[MovedTime], no_times: str) -> Moved:
    """``no_times``: why times are not compared, in one sentence; empty where they are."""
    told = (no_times,) if no_times else times(moved)
    return Moved(f"Since {against}", headline(differences), groups(differences), told)


def groups(differences: Sequence[Difference], most: int | None = None) -> tuple[Group, ...]:
    """In the order of ``Kind``, at most ``most`` lines each; None lists all."""
    found = []
    for kind in Kind:
        those = [one for one in differences if one.kind is kind]
        limit = most
        if kind is Kind.ERROR:
            those.sort(key=lambda one: -abs(one.now - one.was))
            limit = MOST_ERRORS if most is None else min(most, MOST_ERRORS)
        if those:
            shown = those if limit is None else those[:limit]
            bad = RULE[kind] != OK
            several = len({one.backend for one in differences}) > 1
            lines = tuple(f"{one.backend}: {words(one)}" if several else words(one) for one in shown)
            found.append(Group(title(kind, len(those)), _symbol(kind), bad, lines, len(those) - len(shown)))
    return tuple(found)


def title(kind: Kind, count: int) -> str:
    """``2 new failures``."""
    if kind not in PLURALS:
        return kind.value
    return f"{count} {kind.value if count == 1 else PLURALS[kind]}"


def _symbol(kind: Kind) -> str:
    if RULE[kind] != OK:
        return SYMBOLS[Outcome.FAIL]
    return SYMBOLS[Outcome.PASS] if kind is Kind.FIXED else SYMBOLS[Outcome.UNSUPPORTED]


def headline(differences: Sequence[Difference]) -> str:
    """``2 new failures, 1 fixed``; what moved, in a few words."""
    counts = {kind: sum(one.kind is kind for one in differences) for kind in Kind}
    named = [title(kind, counts[kind]) for kind in HEADLINE if counts[kind]]
    named += [kind.value for kind in (Kind.UNAVAILABLE, Kind.LACKING, Kind.OTHER_DEVICE) if counts[kind]]
    if named:
        return ", ".join(named)
    return "nothing moved" if not differences else "no failure is new, no pass was lost"


def times(moved: Sequence[MovedTime]) -> tuple[str, ...]:
    """Times whose intervals do not overlap, the largest change first, each in one line."""
    return tuple(_time(one) for one in sorted(moved, key=lambda one: -abs(one.ratio - 1)) if one.apart)


def _time(one: MovedTime) -> str:
    of = unit([one.was[0], one.now[0]]) or UNITS[0]
    now, was = (f"{of.of(t[0])} ({of.of(t[1])} to {of.of(t[2])})" for t in (one.now, one.was))
    many = f", batch {one.batch}" if one.batch > 1 else ""
    where = f"{one.backend} {one.phase}({one.depth}) [{one.preset}{many}]"
    return f"{where}: {now} {of.name}, was {was} {of.name}: × {digits(one.ratio)}"
