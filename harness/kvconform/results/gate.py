"""The conformance gate: compares results with a baseline.

What a cell came to is a regression only where both runs planned the same programs (``Verdict.digest``) on the same kind
of device, by the same suite: then the subject has changed. A pass under other programs is not compared. A failure under
other programs is a new failure: the subject breaks a clause, and the baseline does not show that it did not before.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from kvconform.judging.verdict import Outcome, Verdict
from kvconform.results.results import Results, counted
from kvconform_specs.claims import MANY_OF, Claims

OK, NEW_FAILURE, REGRESSION, UNDECIDED = 0, 1, 4, 5
MOST_SEVERE_FIRST = (REGRESSION, NEW_FAILURE, UNDECIDED)


@dataclass(frozen=True)
class Difference:
    """One difference. ``code``: the exit code that it causes; 0 for a note. ``words``: the difference as a sentence."""

    code: int
    words: str


def compare(now: Results, baseline: Results) -> list[Difference]:
    """The differences: lost passes, new failures, narrowed claims, and what could not be compared."""
    found = [*_moved_claims(now, baseline), *_conditions(now, baseline)]
    found += [Difference(NEW_FAILURE, f"stale known failure: {words}") for words in now.stale]
    if now.unavailable and not baseline.unavailable:
        code = UNDECIDED if now.lacking else REGRESSION
        return [*found, Difference(code, f"{now.backend} is no longer available: {now.unavailable}")]
    before = {verdict.key: verdict for verdict in baseline.verdicts}
    conditions = " and ".join(f"another {name}" for name in CONDITIONS if _differs(name, now, baseline))
    other = cut = 0
    for verdict in now.verdicts:
        was = before.get(verdict.key)
        programs = "" if was is None else _programs(verdict, was)
        found += _cell(verdict, was, " and ".join(filter(None, (conditions, programs))))
        other += programs == OTHER
        cut += verdict.cut
    if other:
        reasons = "; ".join(_reasons(now, baseline)) or "the strategies have changed"
        found.append(Difference(OK, f"{other} of {counted(len(now.verdicts), 'cell')} had other programs: {reasons}"))
    if cut:
        words = "the time limit ended before all planned programs were judged"
        found.append(Difference(OK, f"{cut} of {counted(len(now.verdicts), 'cell')} cut: {words}"))
    return [*found, *_gone(now, baseline)]


def exit_code(differences: list[Difference]) -> int:
    """4 for a regression, else 1 for a new failure, else 5 where something could not be decided, else 0."""
    return worst([difference.code for difference in differences])


def worst(codes: list[int]) -> int:
    return next((code for code in MOST_SEVERE_FIRST if code in codes), OK)


CONDITIONS = {"device": UNDECIDED, "suite": OK}
"""What makes passes incomparable, whatever the programs, and the code where it differs."""
OTHER = "other programs"


def _conditions(now: Results, baseline: Results) -> Iterator[Difference]:
    for name, code in CONDITIONS.items():
        if words := _differs(name, now, baseline):
            yield Difference(code, f"{words}: passes are not compared")


def _reasons(now: Results, baseline: Results) -> Iterator[str]:
    """Why cells may have other programs than in the baseline."""
    yield from filter(None, (_differs(name, now, baseline) for name in ("suite", "effort", "seed")))
    mine, its = (results.environment.get("hypothesis") for results in (now, baseline))
    if mine != its:
        yield f"hypothesis is {mine}, in the baseline {its}"
    if now.claims != baseline.claims:
        yield "the claims differ"
    if now.target is not None and baseline.target is not None and now.target.configs != baseline.target.configs:
        yield "the target's configs differ"


def _differs(name: str, now: Results, baseline: Results) -> str:
    mine, its = getattr(now, name), getattr(baseline, name)
    return "" if mine == its else f"{name} is {mine}, in the baseline {its}"


def _programs(verdict: Verdict, was: Verdict) -> str:
    """In what the programs that decided this verdict differ from the baseline's; cells without programs do not tell."""
    if verdict.digest and was.digest and verdict.digest != was.digest:
        return OTHER
    if was.cut and (verdict.found_after or 0) > was.programs:
        return "programs that the baseline had no time for"
    return ""


def _cell(verdict: Verdict, was: Verdict | None, differs: str) -> Iterator[Difference]:
    """What became of a cell. ``differs``: what else was asked than in the baseline; empty where the same was asked."""
    name, now = f"{verdict.clause} [{verdict.config}]", verdict.outcome
    old = "absent" if was is None else was.outcome.value
    moved = f"{name}: {old} -> {now.value}"
    if was is None or was.outcome is not Outcome.PASS:
        if now.broken and (was is None or not was.outcome.broken):
            yield Difference(NEW_FAILURE, f"{moved}: {verdict.sentence}")
        elif not now.broken and old != now.value:
            yield Difference(OK, moved)
    elif now is Outcome.PASS:
        if not differs and not verdict.cut and verdict.compared < was.compared:
            yield Difference(REGRESSION, f"{name}: compared {verdict.compared} values, was {was.compared}")
    elif now is Outcome.INCONCLUSIVE or (now is Outcome.NOT_EXERCISED and verdict.cut):
        yield Difference(UNDECIDED, f"{moved}: {verdict.sentence}")
    elif not differs:
        yield Difference(REGRESSION, f"{moved}: {verdict.sentence}")
    else:
        code = NEW_FAILURE if now.broken else OK if now is Outcome.REFUTED else UNDECIDED
        yield Difference(code, f"{moved} under {differs}: {verdict.sentence}")


def _gone(now: Results, baseline: Results) -> Iterator[Difference]:
    """The cells of the baseline that were not judged; in one line where this run is a part, or of another suite."""
    after = {verdict.key for verdict in now.verdicts}
    gone = [was for was in baseline.verdicts if was.key not in after and was.outcome is not Outcome.UNSUPPORTED]
    part = now.selection or (f"dtypes {', '.join(now.dtypes)}" if now.dtypes != baseline.dtypes else "")
    many = f"{counted(len(gone), 'cell')} of the baseline not judged"
    if gone and now.suite != baseline.suite:
        yield Difference(OK, f"{many}: the suites differ")
    elif gone and part:
        yield Difference(UNDECIDED, f"{many}: only {part}")
    else:
        for was in gone:
            yield Difference(REGRESSION, f"{was.clause} [{was.config}]: was {was.outcome.value}, is gone")


WIDEST_FIRST = {
    "returns": ("all", "last"),
    "overflow": ("refused", "undefined"),
    "retention": ("all", "window"),
    "unused_slots": ("any", "finite"),
    "memory": ("length", "pages", "capacity"),
    "intermediates": ("single", "storage"),
    "reference": ("definition", "self"),
    "rounding": ("own", "shared"),
    "inputs": ("copied", "kept"),
    "too_deep": ("refused", "undefined"),
    "ragged_appends": ("any", "first"),
    "sees_nothing": ("zeros", "finite"),
    "interface": ("steps", "generation"),
}
"""The values of claims that are a choice, from the one that promises most to the one that promises least."""


def _moved_claims(now: Results, baseline: Results) -> list[Difference]:
    """Claims that promise less than in the baseline, and, as notes, their other changes."""
    mine, its = ({**Claims().to_json(), **results.claims} for results in (now, baseline))
    found = []
    for name, was in its.items():
        value = mine.get(name)
        if name in MANY_OF:
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
    if name in ("max_batch", "max_chunk", "max_sequences", "rollback"):
        return value is not None and (was is None or value < was)
    if name == "max_graphs":  # a limit of the backend, not of its caller: more graphs promise less
        return was is not None and (value is None or value > was)
    if name == "kv_bits":  # 0: the cache is not quantised
        return bool(value != 0 and (was == 0 or value < was))
    if name == "residual":
        return bool(mine["kv_bits"] != 0 and value < was)
    if name == "static_shapes":  # empty: any shape
        return bool(value) and not (was and set(was) <= set(value))
    if name == "cache_dtype":  # empty: that of the config
        return bool(was == "" and value)
    return False  # a different page size or quantiser promises neither more nor less


def _said(value: Any) -> str:
    return "unlimited" if value is None else str(value)
