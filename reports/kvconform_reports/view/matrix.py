"""The matrix of clauses by backends, with the reasons for cells without a pass."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count

from kvconform.judging.every_clause import BY_NAME, CHAPTERS, ENGINES
from kvconform.judging.verdict import Outcome, Verdict
from kvconform.results import known_failures
from kvconform.results.results import Results
from kvconform_reports.view.outcomes import MEANINGS, WORST_FIRST, Chip, chip, chips, given_now, short
from kvconform_specs.clause import Level

LONGEST_NOTE = 60  # characters of a reason that a cell shows unopened


@dataclass(frozen=True)
class Part:
    """The configs of an entry with the same reason: (config, number of its failure or None). ``link``: (address, text)
    of a known failure.

    Configs are omitted if they are all of the row, or all except those of the cell's worse entries: 20 000 names would
    take half a megabyte.
    """

    configs: tuple[tuple[str, int | None], ...]
    sentence: str = ""
    link: tuple[str, str] | None = None


@dataclass(frozen=True)
class Entry:
    """The configs of a cell with the same outcome. ``note``: a short reason. ``parts``: empty if all configs of the row
    have this outcome and there is no more to say."""

    chip: Chip
    note: str
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Row:
    """A clause. ``configs``: all configs under which a backend was judged. ``cells``: for each backend its entries,
    worst first; empty if it was not run."""

    clause: str
    text: str
    remarks: str
    why: tuple[tuple[str, str], ...]
    configs: tuple[str, ...]
    cells: tuple[tuple[Entry, ...], ...]
    broken: bool
    short_of_pass: bool


@dataclass(frozen=True)
class Chapter:
    """``totals``: for each backend the number of cells per outcome."""

    name: str
    text: str
    rows: tuple[Row, ...]
    totals: tuple[tuple[Chip, ...], ...]

    @property
    def broken(self) -> bool:
        return any(row.broken for row in self.rows)


@dataclass(frozen=True)
class _Cell:
    """The verdicts of one backend for one clause, with the numbers of their failures."""

    verdicts: list[tuple[Verdict, int | None]]
    known: Mapping[tuple[str, str], known_failures.Row]


def chapters(results: Sequence[Results]) -> tuple[Chapter, ...]:
    """Every clause of the spec, and unknown ones in the results, by chapter."""
    known = [{(row.clause, row.config): row for row in result.known_failures} for result in results]
    asked = {result.served is not None for result in results} or {False}  # of engines, of backends
    cells: dict[str, list[_Cell]] = {
        name: [_Cell([], rows) for rows in known] for name in BY_NAME if (name in ENGINES) in asked
    }
    numbers = count(1)
    for column, result in enumerate(results):
        numbered = dict(zip((verdict.key for verdict in result.failures), numbers, strict=False))
        for verdict in result.verdicts:
            row = cells.setdefault(verdict.clause, [_Cell([], rows) for rows in known])
            row[column].verdicts.append((verdict, numbered.get(verdict.key)))
    ran = [bool(result.verdicts) for result in results]
    by_chapter: dict[str, list[str]] = {name: [] for name in CHAPTERS}
    for name in cells:
        by_chapter.setdefault(name.partition(".")[0], []).append(name)
    return tuple(
        Chapter(
            chapter,
            CHAPTERS.get(chapter, ""),
            tuple(_row(name, cells[name], ran) for name in names),
            tuple(
                chips(verdict.outcome for name in names for verdict, _ in cells[name][column].verdicts)
                for column in range(len(results))
            ),
        )
        for chapter, names in by_chapter.items()
        if names
    )


def legend(results: Sequence[Results]) -> tuple[tuple[Chip, str], ...]:
    """The outcomes that occur, worst first, with their meanings."""
    found = chips(verdict.outcome for result in results for verdict in result.verdicts)
    meanings = {outcome.value: words for outcome, words in MEANINGS.items()}
    return tuple((one, meanings[one.word]) for one in found)


def _row(name: str, cells: list[_Cell], ran: list[bool]) -> Row:
    clause = BY_NAME.get(name)
    configs = dict.fromkeys(verdict.config for cell in cells for verdict, _ in cell.verdicts)
    remarks = [] if clause is None else ["core"] * clause.core + ["should"] * (clause.level is Level.SHOULD)
    outcomes = {verdict.outcome for cell in cells for verdict, _ in cell.verdicts}
    missing = any(expected and not cell.verdicts for expected, cell in zip(ran, cells, strict=True))
    return Row(
        clause=name,
        text=clause.text if clause else "This clause is not in the installed spec.",
        remarks=", ".join(remarks),
        why=tuple((link, short(link)) for link in (clause.why if clause else ())),
        configs=tuple(configs),
        cells=tuple(tuple(_entries(cell, set(configs))) for cell in cells),
        broken=any(outcome.broken for outcome in outcomes),
        short_of_pass=missing or bool(outcomes - {Outcome.PASS}),
    )


def _entries(cell: _Cell, configs: set[str]) -> Iterator[Entry]:
    by_outcome: dict[Outcome, dict[str, list[tuple[Verdict, int | None]]]] = defaultdict(lambda: defaultdict(list))
    for verdict, number in cell.verdicts:
        by_outcome[verdict.outcome][_why(verdict)].append((verdict, number))
    seen = [outcome for outcome in WORST_FIRST if outcome in by_outcome]
    whole = {verdict.config for verdict, _ in cell.verdicts} == configs
    for outcome in seen:
        reasons = by_outcome[outcome]
        count = sum(map(len, reasons.values()))
        rest = whole and outcome is seen[-1] and not outcome.broken and len(reasons) == 1
        parts = tuple(
            _part(sentence, () if rest else found, next(_known(cell, found), None))
            for sentence, found in reasons.items()
        )
        known = [row for found in reasons.values() for row in _known(cell, found)]
        note, complete = _note(outcome, tuple(reasons), known)
        alone = rest and len(seen) == 1 and complete
        yield Entry(chip(outcome, count), note, () if alone else parts)


def _why(verdict: Verdict) -> str:
    """The reason that a cell gives; empty where it is shown elsewhere."""
    if verdict.outcome is Outcome.PASS or verdict.outcome.broken:
        return ""
    return given_now(verdict) if verdict.outcome is Outcome.KNOWN_FAILURE else verdict.sentence


def _known(cell: _Cell, found: Sequence[tuple[Verdict, int | None]]) -> Iterator[known_failures.Row]:
    return (cell.known[verdict.key] for verdict, _ in found if verdict.key in cell.known)


def _part(sentence: str, found: Sequence[tuple[Verdict, int | None]], row: known_failures.Row | None) -> Part:
    configs = tuple((verdict.config, number) for verdict, number in found)
    if row is None:
        return Part(configs, sentence)
    words = f"{row.reason}, known until {row.expires}: {sentence}"
    return Part(configs, words, (row.link, short(row.link)))


def _note(outcome: Outcome, reasons: Sequence[str], known: Sequence[known_failures.Row]) -> tuple[str, bool]:
    """A short reason beside an outcome, and whether it is complete."""
    if outcome is Outcome.PASS or outcome.broken:
        return "", True
    if outcome is Outcome.REFUTED:
        return "measured, not required", False
    if outcome is Outcome.KNOWN_FAILURE:
        return f"until {min(row.expires for row in known)}" if known else "", False
    if len(reasons) > 1:
        return f"{len(reasons)} reasons", False
    first = reasons[0]
    return (first, True) if len(first) <= LONGEST_NOTE else (f"{first[:LONGEST_NOTE]}…", False)
