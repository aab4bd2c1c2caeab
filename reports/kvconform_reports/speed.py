"""The speed record as tables and charts: one group for each preset and batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvconform.speed.record import Case, Excluded, Ratio, Record, Summary
from kvconform_reports.charts import Chart, Series, log_log
from kvconform_reports.tables import flattened

DRAWN = ("decode", "recompute")


@dataclass(frozen=True)
class Proportion:
    """A ratio of times in words. ``why``: the reason that it is no ratio; then there is no number."""

    text: str
    interval: str
    against: str
    why: str


@dataclass(frozen=True)
class Timing:
    """One arm of one case. ``to``: its ratios to other backends. ``cached``: with the cache over without it."""

    backend: str
    phase: str
    median: str
    interval: str
    blocks: int
    to: tuple[Proportion, ...]
    cached: tuple[Proportion, ...]


@dataclass(frozen=True)
class Group:
    preset: str
    batch: int
    units: str
    about: str
    facts: tuple[tuple[str, str], ...]
    chart: Chart | None
    depths: tuple[tuple[int, int, tuple[Timing, ...]], ...]
    excluded: tuple[Excluded, ...]


def groups(record: Record) -> tuple[Group, ...]:
    """What was measured, by preset and batch; a preset of which every arm was excluded too."""
    found = []
    places = dict.fromkeys((case.preset, case.batch) for case in record.cases)
    for preset, batch in places:
        cases = [(i, c) for i, c in enumerate(record.cases) if (c.preset, c.batch) == (preset, batch)]
        found.append(_group(record, preset, batch, sorted(cases, key=_order)))
    bare = dict.fromkeys(e.preset for e in record.excluded if e.preset not in {preset for preset, _ in places})
    return (*found, *(_group(record, preset, 0, []) for preset in bare))


def _order(item: tuple[int, Case]) -> tuple[bool, int]:
    """What the chart draws comes first, by depth."""
    _, case = item
    return not any(arm.phase in DRAWN for arm in case.arms), case.depth


def _group(record: Record, preset: str, batch: int, cases: list[tuple[int, Case]]) -> Group:
    numbers = {number for number, _ in cases}
    summaries = {(s.case, s.arm): s for s in record.summaries if s.case in numbers}
    least = min((s.median for s in summaries.values()), default=0.0)
    units = "µs" if least < 10_000 else "ms"  # nanoseconds; one unit for the whole table, so that a column compares
    depths = []
    for number, case in cases:
        ratios = [ratio for ratio in record.ratios if ratio.case == number]
        rows = []
        for arm, who in enumerate(case.arms):
            summary = summaries.get((number, arm))
            rounds = sum((r.case, r.arm) == (number, arm) for r in record.rounds) if summary is None else 0
            median, interval, blocks = _timed(summary, units, rounds)
            rows.append(
                Timing(
                    who.backend, who.phase, median, interval, blocks, _to_others(case, ratios, arm),
                    _to_itself(case, ratios, arm),
                )
            )  # fmt: skip
        depths.append((case.depth, case.steps, tuple(rows)))
    return Group(
        preset, batch, units, *_described(record.presets.get(preset)),
        log_log(_series(cases, summaries), units), tuple(depths),
        tuple(e for e in record.excluded if e.preset == preset),
    )  # fmt: skip


def _described(preset: Any) -> tuple[str, tuple[tuple[str, str], ...]]:
    """A preset's sentence, and its config without what is not set; its depths are those of the table."""
    if not isinstance(preset, dict):
        return "", ()
    config = preset.get("config", preset)
    about = preset.get("about", "")
    return str(about), tuple((name, text) for name, text in flattened(config) if text != "none")


def _series(cases: list[tuple[int, Case]], summaries: dict[tuple[int, int], Summary]) -> Sequence[Series]:
    """One line for each backend and phase."""
    points: dict[tuple[str, str], list[tuple[float, float, float, float]]] = {}
    for number, case in cases:
        for arm, who in enumerate(case.arms):
            summary = summaries.get((number, arm))
            if summary is not None and who.phase in DRAWN:
                line = points.setdefault((who.backend, who.phase), [])
                if all(depth != case.depth for depth, *_ in line):  # decode's own case comes first, with more rounds
                    line.append((float(case.depth), summary.median, summary.low, summary.high))
    kin = {backend: i for i, backend in enumerate(dict.fromkeys(backend for backend, _ in points))}
    return [
        Series(f"{backend} {phase}", kin[backend], phase != "decode", tuple(line))
        for (backend, phase), line in points.items()
    ]


def _to_others(case: Case, ratios: list[Ratio], arm: int) -> tuple[Proportion, ...]:
    """The ratios of this arm to arms of other backends."""
    found = []
    for ratio in ratios:
        one, other = case.arms[ratio.arm], case.arms[ratio.reference]
        if ratio.arm == arm and one.backend != other.backend:
            against = other.backend if one.phase == other.phase else f"{other.backend} {other.phase}"
            found.append(_proportion(ratio, against, invert=False))
    return tuple(found)


def _to_itself(case: Case, ratios: list[Ratio], arm: int) -> tuple[Proportion, ...]:
    """The ratios of a backend's decode to its recompute, whichever of the two the record took for reference."""
    found = []
    for ratio in ratios:
        one, other = case.arms[ratio.arm], case.arms[ratio.reference]
        if one.backend != other.backend:
            continue
        if ratio.arm == arm and (one.phase, other.phase) == DRAWN:
            found.append(_proportion(ratio, "", invert=False))
        elif ratio.reference == arm and (other.phase, one.phase) == DRAWN:
            found.append(_proportion(ratio, "", invert=True))
    return tuple(found)


def _proportion(ratio: Ratio, against: str, *, invert: bool) -> Proportion:
    if not ratio.valid:
        return Proportion("", "", against, ratio.why_invalid or "no reason given")
    middle, low, high = ratio.ratio, ratio.low, ratio.high
    if invert:
        middle, low, high = 1 / middle, 1 / high, 1 / low
    return Proportion(_digits(middle), f"{_digits(low)} to {_digits(high)}", against, "")


def _timed(summary: Summary | None, units: str, rounds: int) -> tuple[str, str, int]:
    if summary is None:
        return "too few blocks" if rounds else "not measured", "", rounds
    per = 1e6 if units == "ms" else 1e3
    low, high = (_digits(value / per) for value in (summary.low, summary.high))
    return _digits(summary.median / per), f"{low} to {high}", summary.n


def _digits(value: float) -> str:
    """Three digits that mean something: 0.0123, 1.23, 12.3, 1230."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.3g}" if value < 0.001 else f"{value:#.3g}".rstrip(".")
