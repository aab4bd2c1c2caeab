"""Rows for the templates: results sorted, counted and worded."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from kvconform.judging.every_clause import BY_NAME
from kvconform.judging.verdict import Outcome, Verdict
from kvconform.results import known_failures
from kvconform.results.guarantees import ENGINE_LEVELS, LEVELS
from kvconform.results.results import Results
from kvconform.run.cross_backend import Pair
from kvconform_reports.view.explanations import JudgedBy, judged_by
from kvconform_reports.view.outcomes import (
    WORST_FIRST,
    Chip,
    Standing,
    chip,
    chips,
    given_now,
    labels,
    replay_line,
    short,
    standing,
)

UNJUDGED = (Outcome.INCONCLUSIVE, Outcome.NOT_EXERCISED, Outcome.UNSUPPORTED)


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
    judged_by: JudgedBy
    standing: Standing
    chips: tuple[Chip, ...]
    segments: tuple[Segment, ...]
    cells: int
    programs: int
    structures: int
    seconds: float


@dataclass(frozen=True)
class Failure:
    """A broken cell. ``facts``: the fields of its mismatch, by name."""

    number: int
    label: str
    verdict: Verdict
    chip: Chip
    replay: str
    text: str
    facts: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class KnownRow:
    """A known failure. ``row`` is None if the results contain no entry for it. ``now``: its outcome in this run.
    ``steps``: of the program that breaks the clause."""

    label: str
    clause: str
    config: str
    row: known_failures.Row | None
    versions: str
    link: str
    now: str
    steps: str
    replay: str


@dataclass(frozen=True)
class Guarantee:
    """The strongest level of one backend under one config, and what refutes the next."""

    level: str
    refuted: str
    sentence: str
    replay: str
    strongest: bool


@dataclass(frozen=True)
class Reason:
    """Why cells of one backend have no verdict. ``cells``: (clause, its configs)."""

    label: str
    chip: Chip
    sentence: str
    cells: tuple[tuple[str, tuple[str, ...]], ...]


@dataclass(frozen=True)
class Share:
    """A number that should stay below 1. ``length``: of its bar, in percent of the bound."""

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
    """A comparison: for each name, one text per column."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[str, ...]], ...]


@dataclass(frozen=True)
class RuntimeFacts:
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
                label,
                result.device,
                judged_by(result),
                standing(result),
                counted,
                tuple(segments),
                len(result.verdicts),
                programs,
                structures,
                result.seconds,
            )
        )
    return tuple(found)


def failures(results: Sequence[Results], folder: str) -> tuple[Failure, ...]:
    """Every broken cell of each backend, the most useful to a reader first; the matrix links to their numbers."""
    found: list[Failure] = []
    for label, result in zip(labels(results), results, strict=True):
        for verdict in result.failures:
            clause = BY_NAME.get(verdict.clause)
            found.append(
                Failure(
                    len(found) + 1,
                    label,
                    verdict,
                    chip(verdict.outcome, 1),
                    replay_line(result.backend, verdict.counterexample, folder),
                    clause.text if clause else "",
                    tuple(facts(verdict)),
                )
            )
    return tuple(found)


def known(results: Sequence[Results], folder: str) -> tuple[KnownRow, ...]:
    """Every known failure: cells with that outcome, and entries without a cell."""
    found = []
    for label, result in zip(labels(results), results, strict=True):
        rows = {(row.clause, row.config): row for row in result.known_failures}
        verdicts = {verdict.key: verdict for verdict in result.verdicts if verdict.outcome is Outcome.KNOWN_FAILURE}
        for key in dict.fromkeys((*verdicts, *rows)):
            row, verdict = rows.get(key), verdicts.get(key)
            now, steps = (given_now(verdict), verdict.steps) if verdict else ("", "")
            versions = ", ".join(f"{name} {version}" for name, version in row.versions.items()) if row else ""
            link = row.link if row else ""
            replay = replay_line(result.backend, verdict.counterexample if verdict else "", folder)
            found.append(KnownRow(label, *key, row, versions, short(link), now, steps, replay))
    return tuple(found)


def guarantees(results: Sequence[Results], folder: str) -> tuple[tuple[str, tuple[Guarantee | None, ...]], ...]:
    """For each config the guarantee of each backend, None if none was measured."""
    configs = dict.fromkeys(config for result in results for config in result.guarantees)
    strongest = (tuple(LEVELS)[-1], tuple(ENGINE_LEVELS)[-1])
    return tuple(
        (
            config,
            tuple(
                Guarantee(
                    held.level,
                    held.refuted,
                    held.sentence,
                    replay_line(result.backend, held.counterexample, folder) if held.refuted else "",
                    held.level in strongest,
                )
                if (held := result.guarantees.get(config))
                else None
                for result in results
            ),
        )
        for config in configs
    )


def levels(results: Sequence[Results]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """The guarantees from weakest to strongest, with the clauses that decide each: of backends, of serving engines."""
    engines = [result.served is not None for result in results]
    own = LEVELS if not engines or not all(engines) else {}
    return (*own.items(), *(ENGINE_LEVELS.items() if any(engines) else ()))


def reasons(results: Sequence[Results]) -> tuple[Reason, ...]:
    """Why cells have no verdict, by backend, outcome and sentence."""
    found: list[Reason] = []
    for label, result in zip(labels(results), results, strict=True):
        groups: dict[tuple[Outcome, str], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
        for verdict in result.verdicts:
            if verdict.outcome in UNJUDGED:
                groups[verdict.outcome, verdict.sentence][verdict.clause].append(verdict.config)
        for (outcome, sentence), cells in sorted(groups.items(), key=lambda item: WORST_FIRST.index(item[0][0])):
            count = sum(map(len, cells.values()))
            by_clause = tuple((clause, tuple(configs)) for clause, configs in cells.items())
            found.append(Reason(label, chip(outcome, count), sentence, by_clause))
    return tuple(found)


def errors(results: Sequence[Results]) -> tuple[tuple[str, tuple[Share | None, ...]], ...]:
    """For each config the largest error of each backend as a fraction of its bound, and the clause where it
    occurred."""
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
    """A fraction of a bound, as text and bar. NaN exceeds every bound."""
    over = not value <= 1
    if not math.isfinite(value):
        return Share("not finite", 100, True, beside)
    text = f"{value:.3f}" if value < 10 else f"{value:.0f}×"
    return Share("< 0.001" if 0 < value < 0.0005 else text, round(100 * min(value, 1), 1), over, beside)


def environments(results: Sequence[Results]) -> Facts:
    return beside(labels(results), [result.environment for result in results])


def claims(results: Sequence[Results]) -> Facts:
    """What each backend declares; a limit of None means unlimited."""
    declared = [
        {name: "unlimited" if name.startswith("max_") and value is None else value for name, value in r.claims.items()}
        for r in results
    ]
    return beside(labels(results), declared)


def beside(columns: Sequence[str], trees: Sequence[Mapping[str, Any]]) -> Facts:
    """JSON trees side by side; missing names are empty."""
    flat = [dict(flattened(tree)) for tree in trees]
    names = list(dict.fromkeys(name for facts in flat for name in facts))
    return Facts(tuple(columns), tuple((n, tuple(facts.get(n, "") for facts in flat)) for n in names))


def runtime_info(results: Sequence[Results]) -> tuple[tuple[str, tuple[RuntimeFacts, ...]], ...]:
    """For each backend what ran; configs with equal runtime_info are grouped."""
    found = []
    for label, result in zip(labels(results), results, strict=True):
        groups: dict[tuple[tuple[str, str], ...], list[str]] = {}
        for config, runtime_info in result.runtime_info.items():
            groups.setdefault(tuple(flattened(runtime_info)), []).append(config)
        found.append((label, tuple(RuntimeFacts(tuple(configs), facts) for facts, configs in groups.items())))
    return tuple(found)


def facts(verdict: Verdict) -> list[tuple[str, str]]:
    """The fields of a verdict's mismatch that are set, by name, as texts."""
    return [] if verdict.mismatch is None else flattened(msgspec.to_builtins(verdict.mismatch))


def flattened(value: Any, name: str = "") -> list[tuple[str, str]]:
    """Dotted names and texts of a JSON tree; a list of plain values is one text."""
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
