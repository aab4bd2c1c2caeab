"""The conformance gate: compares results with a baseline. A cell that passed must still pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvconform.judging.verdict import Outcome
from kvconform.results.results import Results
from kvconform_specs.claims import Claims

OK, NEW_FAILURE, REGRESSION = 0, 1, 4


@dataclass(frozen=True)
class Difference:
    """One difference. ``code``: the exit code that it causes; 0 for a note. ``words``: the difference as a sentence."""

    code: int
    words: str


def compare(now: Results, baseline: Results) -> list[Difference]:
    """The differences: new failures, lost passes and clauses, narrowed claims, fewer compared values."""
    found = _moved_claims(now, baseline)
    for name in ("device", "dtypes", "effort", "seed", "suite", "shard"):
        mine, its = (getattr(results, name) or "the whole" for results in (now, baseline))
        if mine != its:
            found.append(Difference(REGRESSION, f"{name} is {mine}, in the baseline {its}: not comparable"))
    found += [Difference(NEW_FAILURE, f"stale known failure: {words}") for words in now.stale]
    drawn = [results.environment.get("hypothesis") for results in (now, baseline)]
    if drawn[0] != drawn[1]:
        words = f"hypothesis {drawn[0]} drew the programs, in the baseline hypothesis {drawn[1]}: the values differ"
        found.append(Difference(OK, words))
    if now.unavailable and not baseline.unavailable:
        found.append(Difference(REGRESSION, f"{now.backend} is no longer available: {now.unavailable}"))
    before = {verdict.key: verdict for verdict in baseline.verdicts}
    after = {verdict.key: verdict for verdict in now.verdicts}
    for key, verdict in after.items():
        name, was = f"{verdict.clause} [{verdict.config}]", before.get(key)
        old = "absent" if was is None else was.outcome.value
        if verdict.outcome.broken:
            if was is None or not was.outcome.broken:
                found.append(Difference(NEW_FAILURE, f"{name}: {old} -> {verdict.outcome.value}: {verdict.sentence}"))
        elif was is not None and was.outcome is Outcome.PASS and verdict.outcome is not Outcome.PASS:
            found.append(Difference(REGRESSION, f"{name}: pass -> {verdict.outcome.value}: {verdict.sentence}"))
        elif was is not None and was.outcome is Outcome.PASS and verdict.compared < was.compared:
            found.append(Difference(REGRESSION, f"{name}: compared {verdict.compared} values, was {was.compared}"))
        elif was is None or was.outcome is not verdict.outcome:
            found.append(Difference(OK, f"{name}: {old} -> {verdict.outcome.value}"))
    for key, was in before.items():
        if key not in after:
            found.append(Difference(REGRESSION, f"{was.clause} [{was.config}]: was {was.outcome.value}, is gone"))
    return found


def exit_code(differences: list[Difference]) -> int:
    """1 for a new failure, else 4 for a regression, else 0."""
    codes = {difference.code for difference in differences}
    return NEW_FAILURE if NEW_FAILURE in codes else REGRESSION if REGRESSION in codes else OK


WIDEST_FIRST = {
    "returns": ("all", "last"),
    "overflow": ("refused", "undefined"),
    "retention": ("all", "window"),
    "unused_slots": ("any", "finite"),
    "memory": ("length", "pages", "capacity"),
    "intermediates": ("single", "storage"),
    "reference": ("definition", "self"),
    "rounding": ("own", "shared"),
}
"""The values of claims that are a choice, from the one that promises most to the one that promises least."""


def _moved_claims(now: Results, baseline: Results) -> list[Difference]:
    """Claims that promise less than in the baseline, and, as notes, their other changes."""
    mine, its = ({**Claims().to_json(), **results.claims} for results in (now, baseline))
    found = []
    for name, was in its.items():
        value = mine.get(name)
        if isinstance(was, list):
            gone = [item for item in was if item not in (value or [])]
            if gone:
                words = f"{now.backend} no longer claims {name}: {', '.join(gone)}"
                found.append(Difference(REGRESSION, words))
        elif value != was:
            narrowed = _narrower(name, value, was, mine)
            words = f"{now.backend} {'narrowed' if narrowed else 'changed'} {name} from {_said(was)} to {_said(value)}"
            found.append(Difference(REGRESSION if narrowed else OK, words))
    return found


def _narrower(name: str, value: Any, was: Any, mine: dict[str, Any]) -> bool:
    """Whether a claim promises less than the one that it replaces. ``None`` means no limit."""
    if name in WIDEST_FIRST:
        order = WIDEST_FIRST[name]
        return order.index(value) > order.index(was)
    if name in ("max_batch", "max_chunk", "max_sequences"):
        return value is not None and (was is None or value < was)
    if name == "max_graphs":  # a limit of the backend, not of its caller: more graphs promise less
        return was is not None and (value is None or value > was)
    if name == "kv_bits":  # 0: the cache is not quantised
        return bool(value != 0 and (was == 0 or value < was))
    if name == "residual":
        return bool(mine["kv_bits"] != 0 and value < was)
    return False  # a different page size promises neither more nor less


def _said(value: Any) -> str:
    return "unlimited" if value is None else str(value)
