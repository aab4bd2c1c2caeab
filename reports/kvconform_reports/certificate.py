"""The power certificate, to be read: clause by null model, and where a clause is weak or blind."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import msgspec

from kvconform.results import Results
from kvconform_reports.outcomes import labels, percent
from kvconform_specs.clauses import BY_NAME

WEAKEST = 6  # clauses and models that the summary names


class Entry(msgspec.Struct, frozen=True):
    """What results hold of ``kvconform.power.Power``, of one dtype."""

    clause: str
    model: str = ""
    cases: int = 0
    tried: int = 0
    rejected: int = 0
    note: str = ""

    @property
    def blind(self) -> bool:
        return self.tried > 0 and self.rejected == 0

    @property
    def partial(self) -> bool:
        return 0 < self.rejected < self.tried

    @property
    def share(self) -> str:
        return percent(self.rejected, self.tried) if self.tried else ""


@dataclass(frozen=True)
class Power:
    """The certificate of one dtype. ``labels``: the backends whose results hold it. ``rows``: by chapter, each clause
    with its entries by model, or with the note that stands for all of them. ``fault``: why it cannot be read."""

    dtype: str
    labels: tuple[str, ...]
    models: tuple[str, ...]
    chapters: tuple[tuple[str, tuple[tuple[str, str, tuple[Entry | None, ...]], ...]], ...]
    summary: tuple[str, ...]
    fault: str = ""


def powers(results: Sequence[Results]) -> tuple[Power, ...]:
    """The certificates that the results hold. One for each dtype; more only where results of different suites came
    together."""
    found: dict[tuple[str, bytes], list[str]] = {}
    for label, result in zip(labels(results), results, strict=True):
        for dtype, rows in result.power.items():
            if rows:
                found.setdefault((dtype, msgspec.json.encode(rows)), []).append(label)
    return tuple(_power(dtype, rows, holders) for (dtype, rows), holders in found.items())


def _power(dtype: str, rows: bytes, holders: list[str]) -> Power:
    try:
        entries = msgspec.json.decode(rows, type=list[Entry])
    except msgspec.ValidationError as error:
        return Power(dtype, tuple(holders), (), (), (), f"It cannot be read: {error}.")
    models = tuple(dict.fromkeys(entry.model for entry in entries if entry.model))
    by_clause: dict[str, dict[str, Entry]] = {}
    for entry in entries:
        by_clause.setdefault(entry.clause, {})[entry.model] = entry
    by_chapter: dict[str, list[tuple[str, str, tuple[Entry | None, ...]]]] = {}
    for clause in (*(name for name in BY_NAME if name in by_clause), *(c for c in by_clause if c not in BY_NAME)):
        row = by_clause[clause]
        note = row[""].note if "" in row else ""
        cells = () if note else tuple(row.get(model) for model in models)
        by_chapter.setdefault(clause.partition(".")[0], []).append((clause, note, cells))
    chapters = tuple((name, tuple(found)) for name, found in by_chapter.items())
    return Power(dtype, tuple(holders), models, chapters, tuple(_summary(entries, models)))


def _summary(entries: Sequence[Entry], models: Sequence[str]) -> list[str]:
    """What the table amounts to: how much is rejected, what is weakest, who is blind, what nobody rejects."""
    tried = [entry for entry in entries if entry.tried]
    if not tried:
        return ["No null model was tried."]
    blind, partial = [e for e in tried if e.blind], sorted((e for e in tried if e.partial), key=_share)
    whole = len(tried) - len(blind) - len(partial)
    words = [
        f"Of {len(tried)} pairs of a clause and a null model that were tried, {whole} reject it in every case, "
        f"{len(partial)} in some, {len(blind)} in none."
    ]
    if partial:
        named = "; ".join(f"{e.clause} on “{e.model}” {e.rejected}/{e.tried}" for e in partial[:WEAKEST])
        words.append(f"The weakest that are not blind: {named}.")
    seen, unseen = _by_clause(entry for entry in tried if not entry.blind), _by_clause(blind)
    spots = [
        f"{clause} to all but {', '.join(caught)}" if len(caught) < len(missed) else f"{clause} to {', '.join(missed)}"
        for clause, missed in unseen.items()
        if (caught := seen.get(clause))
    ]
    if spots:
        words.append(f"Blind to some models: {'; '.join(spots)}.")
    if dark := [clause for clause in unseen if clause not in seen]:
        words.append(f"Blind to every model tried: {', '.join(dark)}.")
    met = {entry.model for entry in tried}
    rejected = {entry.model for entry in tried if entry.rejected}
    free = [f"“{model}”" for model in models if model in met - rejected]
    words.append(f"No clause rejects {', '.join(free)}." if free else "Every model is rejected by some clause.")
    return words


def _by_clause(entries: Iterable[Entry]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for entry in entries:
        found.setdefault(entry.clause, []).append(f"“{entry.model}”")
    return found


def _share(entry: Entry) -> float:
    return entry.rejected / entry.tried
