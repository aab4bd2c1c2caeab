"""The conformance gate: results against a baseline. Only PASS is green, and green must not become less."""

from __future__ import annotations

from dataclasses import dataclass

from kvconform.results import Results
from kvconform.verdict import Outcome

OK, NEW_FAILURE, REGRESSION = 0, 1, 4


@dataclass(frozen=True)
class Difference:
    """One thing that moved. ``code``: what it does to the exit code; 0 is worth telling and blocks nothing."""

    code: int
    words: str


def compare(now: Results, baseline: Results) -> list[Difference]:
    """What moved from the baseline to now: new failures, passes lost, clauses gone, claims narrowed, less compared."""
    found = [Difference(REGRESSION, words) for words in _narrowed(now, baseline)]
    for name in ("device", "dtypes", "budget", "seed", "suite"):
        if getattr(now, name) != getattr(baseline, name):
            words = f"{name} is {getattr(now, name)}, the baseline's is {getattr(baseline, name)}: not comparable"
            found.append(Difference(REGRESSION, words))
    drawn = [results.environment.get("hypothesis") for results in (now, baseline)]
    if drawn[0] != drawn[1]:
        words = f"programs were drawn by hypothesis {drawn[0]}, the baseline's by {drawn[1]}: other values are compared"
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
    """1 if there is a new failure, else 4 if anything regressed, else 0."""
    codes = {difference.code for difference in differences}
    return NEW_FAILURE if NEW_FAILURE in codes else REGRESSION if REGRESSION in codes else OK


def _narrowed(now: Results, baseline: Results) -> list[str]:
    """Claims of the baseline that are no longer made."""
    found = []
    for name, was in baseline.claims.items():
        value = now.claims.get(name)
        if isinstance(was, list):
            gone = [item for item in was if item not in (value or [])]
            if gone:
                found.append(f"{now.backend} no longer claims {name}: {', '.join(gone)}")
        elif name.startswith("max_"):
            if value is not None and (was is None or value < was):
                found.append(f"{now.backend} narrowed {name} from {was or 'unlimited'} to {value}")
        elif was in ("refused", "all") and value != was:
            found.append(f"{now.backend} narrowed {name} from {was} to {value}")
    return found
