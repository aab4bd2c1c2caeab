"""Rows for the template: what the results say, sorted and counted, in words."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from kvconform.pairwise import Pair
from kvconform.results import Results
from kvconform.verdict import Outcome, Verdict
from kvconform_reports.outcomes import WORST_FIRST, Chip, Standing, chip, chips, labels, replay_line, standing
from kvconform_specs.clause import Level
from kvconform_specs.clauses import BY_NAME, CHAPTERS


@dataclass(frozen=True)
class Segment:
    """A part of a bar, in percent of its length."""

    tone: str
    start: float
    length: float


@dataclass(frozen=True)
class Backend:
    label: str
    device: str
    standing: Standing
    chips: tuple[Chip, ...]
    segments: tuple[Segment, ...]
    cells: int
    programs: int
    structures: int
    seconds: float


@dataclass(frozen=True)
class Entry:
    """The configs of a cell with one outcome: (config, number of its failure or None).

    None are named where they are all configs of the row, or all but those that the cell's other entries name, which
    are the worse ones: 20 000 names are half a megabyte.
    """

    chip: Chip
    configs: tuple[tuple[str, int | None], ...]


@dataclass(frozen=True)
class Row:
    """A clause. ``configs``: all that a backend was judged under. ``cells``: for each backend its entries, worst first;
    empty where it was not run."""

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
    name: str
    text: str
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Failure:
    number: int
    label: str
    verdict: Verdict
    chip: Chip
    replay: str
    text: str


@dataclass(frozen=True)
class Reason:
    """Why cells of one backend have no verdict. ``cells``: (clause, its configs)."""

    label: str
    chip: Chip
    sentence: str
    cells: tuple[tuple[str, tuple[str, ...]], ...]


@dataclass(frozen=True)
class Share:
    """A number that should stay under 1. ``length``: of its bar, in percent of the bound."""

    text: str
    length: float
    over: bool
    beside: str = ""


@dataclass(frozen=True)
class Pairwise:
    configs: tuple[str, ...]
    rows: tuple[tuple[str, str, tuple[Share | None, ...]], ...]


@dataclass(frozen=True)
class Facts:
    """A comparison: for each name, one text for each column."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[str, ...]], ...]


@dataclass(frozen=True)
class Witness:
    configs: tuple[str, ...]
    facts: tuple[tuple[str, str], ...]


def backends(results: Sequence[Results]) -> tuple[Backend, ...]:
    found = []
    for label, result in zip(labels(results), results, strict=True):
        counted, start, segments = chips(v.outcome for v in result.verdicts), 0.0, []
        for part in reversed(counted):
            length = 100 * part.count / len(result.verdicts)
            segments.append(Segment(part.tone, round(start, 2), round(length, 2)))
            start += length
        programs, structures = (sum(getattr(v, name) for v in result.verdicts) for name in ("programs", "structures"))
        found.append(
            Backend(
                label, result.device, standing(result), counted, tuple(segments), len(result.verdicts), programs,
                structures, result.seconds,
            )
        )  # fmt: skip
    return tuple(found)


def chapters(results: Sequence[Results]) -> tuple[Chapter, ...]:
    """The matrix: every clause of the spec, and those that only the results know, by chapter."""
    cells: dict[str, list[list[tuple[Verdict, int | None]]]] = {name: [[] for _ in results] for name in BY_NAME}
    number = 0
    for column, result in enumerate(results):
        for verdict in result.verdicts:
            number += verdict.outcome.broken
            row = cells.setdefault(verdict.clause, [[] for _ in results])
            row[column].append((verdict, number if verdict.outcome.broken else None))
    ran = [bool(result.verdicts) for result in results]
    by_chapter: dict[str, list[Row]] = {name: [] for name in CHAPTERS}
    for name, row in cells.items():
        by_chapter.setdefault(name.partition(".")[0], []).append(_row(name, row, ran))
    return tuple(Chapter(name, CHAPTERS.get(name, ""), tuple(rows)) for name, rows in by_chapter.items() if rows)


def _row(name: str, cells: list[list[tuple[Verdict, int | None]]], ran: list[bool]) -> Row:
    clause = BY_NAME.get(name)
    configs = dict.fromkeys(verdict.config for cell in cells for verdict, _ in cell)
    entries = []
    for cell in cells:
        by_outcome: dict[Outcome, list[tuple[str, int | None]]] = defaultdict(list)
        for verdict, failure in cell:
            by_outcome[verdict.outcome].append((verdict.config, failure))
        seen = [outcome for outcome in WORST_FIRST if outcome in by_outcome]
        whole = {verdict.config for verdict, _ in cell} == set(configs)
        unnamed = {o for o in seen[-1:] if whole and not o.broken}
        entries.append(
            tuple(Entry(chip(o, len(by_outcome[o])), () if o in unnamed else tuple(by_outcome[o])) for o in seen)
        )
    remarks = [] if clause is None else ["core"] * clause.core + ["should"] * (clause.level is Level.SHOULD)
    outcomes = {verdict.outcome for cell in cells for verdict, _ in cell}
    missing = any(expected and not cell for expected, cell in zip(ran, cells, strict=True))
    return Row(
        clause=name,
        text=clause.text if clause else "This clause is not in the installed spec.",
        remarks=", ".join(remarks),
        why=tuple((link, _short(link)) for link in (clause.why if clause else ())),
        configs=tuple(configs),
        cells=tuple(entries),
        broken=any(outcome.broken for outcome in outcomes),
        short_of_pass=missing or bool(outcomes - {Outcome.PASS}),
    )


def _short(link: str) -> str:
    """``pytorch/executorch#2010`` of an address on GitHub; another address as it is."""
    owner, slash, rest = link.removeprefix("https://github.com/").partition("/")
    parts = rest.split("/")
    if link.startswith("https://github.com/") and slash and len(parts) == 3:
        return f"{owner}/{parts[0]}#{parts[2]}"
    return link.removeprefix("https://")


def failures(results: Sequence[Results], folder: str) -> tuple[Failure, ...]:
    """Every broken cell, numbered in the order in which the matrix links them."""
    found: list[Failure] = []
    for label, result in zip(labels(results), results, strict=True):
        for verdict in result.verdicts:
            if verdict.outcome.broken:
                clause = BY_NAME.get(verdict.clause)
                found.append(
                    Failure(
                        len(found) + 1, label, verdict, chip(verdict.outcome, 1),
                        replay_line(result.backend, verdict, folder), clause.text if clause else "",
                    )
                )  # fmt: skip
    return tuple(found)


def reasons(results: Sequence[Results]) -> tuple[Reason, ...]:
    """Why the cells that neither passed nor broke have no verdict, by backend, outcome and sentence."""
    found: list[Reason] = []
    for label, result in zip(labels(results), results, strict=True):
        groups: dict[tuple[Outcome, str], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
        for verdict in result.verdicts:
            if verdict.outcome is not Outcome.PASS and not verdict.outcome.broken:
                groups[verdict.outcome, verdict.sentence][verdict.clause].append(verdict.config)
        for (outcome, sentence), cells in sorted(groups.items(), key=lambda item: WORST_FIRST.index(item[0][0])):
            count = sum(map(len, cells.values()))
            by_clause = tuple((clause, tuple(configs)) for clause, configs in cells.items())
            found.append(Reason(label, chip(outcome, count), sentence, by_clause))
    return tuple(found)


def errors(results: Sequence[Results]) -> tuple[tuple[str, tuple[Share | None, ...]], ...]:
    """For each config the largest error of each backend as a fraction of its bound, and the clause where it was."""
    worst: dict[str, list[tuple[float, str] | None]] = {}
    for column, result in enumerate(results):
        for verdict in result.verdicts:
            if verdict.worst is None:
                continue
            row = worst.setdefault(verdict.config, [None] * len(results))
            was = row[column]
            if was is None or not verdict.worst <= was[0]:
                row[column] = verdict.worst, verdict.clause
    return tuple(
        (config, tuple(None if at is None else share(at[0], beside=at[1]) for at in row))
        for config, row in worst.items()
    )


def pairwise(pairs: Sequence[Pair]) -> Pairwise:
    """Rows are pairs of backends, columns configs: the largest difference over the sum of the two bounds."""
    configs = tuple(dict.fromkeys(pair.config for pair in pairs))
    rows: dict[tuple[str, str], dict[str, Share]] = defaultdict(dict)
    for pair in pairs:
        rows[pair.one, pair.other][pair.config] = share(pair.ratio)
    return Pairwise(configs, tuple((*names, tuple(row.get(c) for c in configs)) for names, row in rows.items()))


def share(value: float, beside: str = "") -> Share:
    """A fraction of a bound, to be read and drawn. What is not a number is over every bound."""
    over = not value <= 1
    if not math.isfinite(value):
        return Share("not finite", 100, True, beside)
    text = f"{value:.3f}" if value < 10 else f"{value:.0f}×"
    return Share("< 0.001" if 0 < value < 0.0005 else text, round(100 * min(value, 1), 1), over, beside)


def environments(results: Sequence[Results]) -> Facts:
    return beside(labels(results), [result.environment for result in results])


def claims(results: Sequence[Results]) -> Facts:
    """What each backend declares; a limit of None is none."""
    declared = [
        {name: "unlimited" if name.startswith("max_") and value is None else value for name, value in r.claims.items()}
        for r in results
    ]
    return beside(labels(results), declared)


def beside(columns: Sequence[str], trees: Sequence[Mapping[str, Any]]) -> Facts:
    """Trees of JSON beside one another; a name that a tree lacks is an empty text."""
    flat = [dict(flattened(tree)) for tree in trees]
    names = list(dict.fromkeys(name for facts in flat for name in facts))
    return Facts(tuple(columns), tuple((n, tuple(facts.get(n, "") for facts in flat)) for n in names))


def witnesses(results: Sequence[Results]) -> tuple[tuple[str, tuple[Witness, ...]], ...]:
    """For each backend what really ran; configs with the same witness stand together."""
    found = []
    for label, result in zip(labels(results), results, strict=True):
        groups: dict[tuple[tuple[str, str], ...], list[str]] = {}
        for config, witness in result.witnesses.items():
            groups.setdefault(tuple(flattened(witness)), []).append(config)
        found.append((label, tuple(Witness(tuple(configs), facts) for facts, configs in groups.items())))
    return tuple(found)


def flattened(value: Any, name: str = "") -> list[tuple[str, str]]:
    """Names with dots and texts of a tree of JSON; a list of plain values is one text."""
    if isinstance(value, Mapping) and (value or not name):
        return [pair for key, item in value.items() for pair in flattened(item, f"{name}.{key}" if name else str(key))]
    if isinstance(value, list | tuple):
        if any(isinstance(item, Mapping) for item in value):
            return [pair for i, item in enumerate(value) for pair in flattened(item, f"{name}[{i}]")]
        return [(name or "value", ", ".join(_text(item) for item in value) or "none")]
    return [(name or "value", _text(value))]


def _text(value: Any) -> str:
    if value is None or value == {}:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()
