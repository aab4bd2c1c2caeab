"""The null-model power table for the report: clauses by null models, and weak or blind clauses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from kvconform.mutation.power import stored
from kvconform.results.results import Results
from kvconform_reports.view.outcomes import percent
from kvconform_specs import SUITE_VERSION
from kvconform_specs.clauses import BY_NAME

WEAKEST = 6  # clauses and models that the summary names


class Entry(msgspec.Struct, frozen=True):
    """One row of the table (``kvconform.mutation.power.Power``), for one dtype."""

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


Cell = tuple[tuple[str, Entry], ...]
"""The results of a clause on a model: entries with their dtypes, without dtypes if all share one."""


@dataclass(frozen=True)
class Power:
    """The tables of all dtypes combined.

    summaries: sentences by dtype. chapters: for each chapter its clauses, each with a note that replaces its cells, or
    with its cells by model.
    """

    summaries: tuple[tuple[str, tuple[str, ...]], ...]
    models: tuple[str, ...]
    chapters: tuple[tuple[tuple[str, str, tuple[Cell, ...]], ...], ...]


def power(results: Sequence[Results]) -> Power | None:
    """The shipped tables for the dtypes of these results; None if there is none for their version of the suite.

    Black boxes have none: the power under the suite's configs does not carry over to other configs.
    """
    shown = [one for one in results if one.target is None and one.served is None and one.suite == SUITE_VERSION]
    dtypes = dict.fromkeys(dtype for one in shown for dtype in one.dtypes)
    read = {dtype: msgspec.convert(rows, list[Entry]) for dtype in dtypes if (rows := stored(dtype))}
    if not read:
        return None
    models = tuple(dict.fromkeys(entry.model for entries in read.values() for entry in entries if entry.model))
    summaries = tuple((name, tuple(_summary(entries, models))) for name, entries in read.items())
    return Power(summaries, models, _chapters(read, models))


def _chapters(
    read: Mapping[str, Sequence[Entry]], models: Sequence[str]
) -> tuple[tuple[tuple[str, str, tuple[Cell, ...]], ...], ...]:
    found = {name: {(entry.clause, entry.model): entry for entry in entries} for name, entries in read.items()}
    judged = dict.fromkeys(clause for entries in found.values() for clause, _ in entries)
    by_chapter: dict[str, list[tuple[str, str, tuple[Cell, ...]]]] = {}
    for clause in (*(name for name in BY_NAME if name in judged), *(c for c in judged if c not in BY_NAME)):
        notes = {entries[clause, ""].note if (clause, "") in entries else "" for entries in found.values()}
        note = notes.pop() if len(notes) == 1 else ""
        cells = () if note else tuple(_cell(found, clause, model) for model in models)
        by_chapter.setdefault(clause.partition(".")[0], []).append((clause, note, cells))
    return tuple(tuple(rows) for rows in by_chapter.values())


def _cell(found: Mapping[str, Mapping[tuple[str, str], Entry]], clause: str, model: str) -> Cell:
    groups: dict[Entry, list[str]] = {}
    for name, entries in found.items():
        entry = entries.get((clause, model)) or entries.get((clause, ""), Entry(clause, model))
        groups.setdefault(entry, []).append(name)
    return tuple((", ".join(names) if len(groups) > 1 else "", entry) for entry, names in groups.items())


def _summary(entries: Sequence[Entry], models: Sequence[str]) -> list[str]:
    """Sentences: how much is rejected, the weakest pairs, blind clauses, and models that no clause rejects."""
    tried = [entry for entry in entries if entry.tried]
    if not tried:
        return ["No null model was tried."]
    blind, partial = [e for e in tried if e.blind], sorted((e for e in tried if e.partial), key=_share)
    whole = len(tried) - len(blind) - len(partial)
    words = [
        f"Of {len(tried)} pairs of clause and null model, {whole} reject the model in every case, {len(partial)} in "
        f"some cases, {len(blind)} in none."
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
