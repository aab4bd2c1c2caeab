"""The speed record as sentences, tables and charts: one section for each preset, one group for each of its batches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from kvconform.bench.record import Arm, Excluded, Record, Summary
from kvconform_reports.view import grids
from kvconform_reports.view.charts import Chart, Series, log_log
from kvconform_reports.view.figures import Proportion, Unit, digits, percent, roofline, unit
from kvconform_reports.view.findings import GENERATING, PREFILL, STEPS, UNCACHED, Findings, Numbered
from kvconform_reports.view.grids import Grid
from kvconform_reports.view.published import Comparison, compare
from kvconform_reports.view.tables import flattened

STROKES = dict(zip(STEPS, ("solid", "dashed", "dotted"), strict=True))


@dataclass(frozen=True)
class Timing:
    """One arm of one case. ``to``: its ratios to other arms. ``cached``: with the cache over without it. Where there is
    no time, ``median`` says why, and the rest is empty."""

    backend: str
    phase: str
    median: str
    interval: str = ""
    quartiles: str = ""
    p90: str = ""
    p99: str = ""
    device: str = ""
    blocks: int = 0
    restarts: str = ""
    spread: str = ""
    to: tuple[Proportion, ...] = ()
    cached: tuple[Proportion, ...] = ()


@dataclass(frozen=True)
class Timings:
    """The arms of one case that do such things."""

    depth: int
    steps: int
    rows: tuple[Timing, ...]


@dataclass(frozen=True)
class Table:
    """The arms of several cases. ``shown``: the optional fields of ``Timing`` that some row has."""

    cases: tuple[Timings, ...]
    shown: frozenset[str]


@dataclass(frozen=True)
class Standing:
    """One backend's decode step. ``every``, ``last``: its time over that of all positions, or the last alone, without
    the cache."""

    timing: Timing
    every: Proportion
    last: Proportion
    roof: Proportion


@dataclass(frozen=True)
class Answer:
    sentence: str
    depth: int
    rows: tuple[Standing, ...]
    shown: frozenset[str]


@dataclass(frozen=True)
class Generated:
    """One generating arm: the whole generation, and how its tokens came, in ``Generating.token``."""

    timing: Timing
    ttft: str
    tpot: str
    itl: str
    itl_p99: str
    throughput: str


@dataclass(frozen=True)
class Generating:
    """All of one prompt and as many new tokens. ``parts``: the arms of each case."""

    prompt: int
    new: int
    whole: Unit
    token: Unit
    parts: tuple[tuple[Generated, ...], ...]
    shown: frozenset[str]


@dataclass(frozen=True)
class Group:
    """One batch of a preset. ``unit``: of its steps and prefills."""

    batch: int
    unit: Unit
    answer: Answer | None
    chart: Chart | None
    scaling: Grid | None
    prefill: Table | None
    generating: tuple[Generating, ...]
    memory: Grid | None
    roofs: Grid | None
    times: Table | None


@dataclass(frozen=True)
class Section:
    """One preset."""

    preset: str
    about: str
    facts: tuple[tuple[str, str], ...]
    groups: tuple[Group, ...]
    throughput: Grid | None
    published: Comparison | None
    once: Grid | None
    excluded: tuple[Excluded, ...]


def sections(record: Record) -> tuple[Section, ...]:
    """What was measured, by preset; a preset of which every arm was excluded, too."""
    findings = Findings(record)
    found = []
    for name in dict.fromkeys([case.preset for case in record.cases] + [e.preset for e in record.excluded]):
        batches = sorted({case.batch for case in record.cases if case.preset == name})
        found.append(
            Section(
                name,
                *_described(record.presets.get(name)),
                tuple(_group(findings, name, batch) for batch in batches),
                grids.throughput(findings, name, batches),
                compare(findings, name, batches),
                grids.once(record.once, name),
                tuple(e for e in record.excluded if e.preset == name),
            )
        )
    return tuple(found)


def _described(preset: Any) -> tuple[str, tuple[tuple[str, str], ...]]:
    """A preset's sentence, and its config without what is not set; its depths are those of the tables."""
    if not isinstance(preset, dict):
        return "", ()
    config = preset.get("config", {})
    return str(preset.get("about", "")), tuple((name, text) for name, text in flattened(config) if text != "none")


def _group(findings: Findings, preset: str, batch: int) -> Group:
    record = findings.record
    kinds = {arm.phase for case in record.cases for arm in case.arms} - {*PREFILL, *GENERATING}
    steps, prompts = findings.cases(preset, batch, STEPS), findings.cases(preset, batch, PREFILL)
    others = findings.cases(preset, batch, tuple(kinds))
    timed = [
        s.median
        for n, case in (*others, *prompts)
        for i, arm in enumerate(case.arms)
        if arm.phase in {*STEPS, *PREFILL} and (s := findings.summaries.get((n, i))) is not None
    ]
    one = unit(timed, "ms")
    return Group(
        batch,
        one,
        _answer(findings, steps, batch, one),
        log_log(_series(findings, steps), one),
        grids.scaling(record, preset, batch),
        _timings(findings, prompts, PREFILL, one),
        tuple(_generating(findings, cases) for cases in findings.generating(preset, batch)),
        grids.memory([m for m in record.memory if (m.preset, m.batch) == (preset, batch)]),
        grids.roofs(findings, steps, one),
        _timings(findings, others, tuple(kinds), one),
    )


def _answer(findings: Findings, steps: list[Numbered], batch: int, one: Unit) -> Answer | None:
    """The decode step at the greatest depth that has a time."""
    timed = [
        case.depth
        for n, case in steps
        for i, arm in enumerate(case.arms)
        if arm.phase == "decode" and (n, i) in findings.summaries
    ]
    if not timed:
        return None
    depth = max(timed)
    cases = [(number, case) for number, case in steps if case.depth == depth]
    rows, medians = [], {}
    to = {
        arm: {r.against: r for place in findings.places(cases, arm) for r in findings.others(*place)}
        for arm in findings.arms(cases, ("decode",))
    }
    references = {name for ratios in to.values() for name in ratios}
    for arm, ratios in to.items():
        summary = findings.summary(cases, arm)
        if not ratios and arm.backend in references:
            ratios = {"": Proportion(absent="the reference")}
        row = Standing(
            _timing(findings, arm, summary, one, findings.places(cases, arm), tuple(ratios.values())),
            findings.without(cases, arm.backend, "recompute"),
            findings.without(cases, arm.backend, "recompute-last"),
            roofline(findings.roof(cases, arm)),
        )
        rows.append(row)
        if summary is not None:
            medians[arm.backend] = summary.median
    shown = _shown(row.timing for row in rows)
    least = min(medians, key=lambda name: medians[name])
    row = next(row for row in rows if row.timing.backend == least)
    slower = [findings.without(cases, least, phase, invert=True) for phase in UNCACHED["decode"]]
    return Answer(_sentence(row, slower, depth, batch, one, len(medians)), depth, tuple(rows), shown)


def _sentence(row: Standing, slower: Sequence[Proportion], depth: int, batch: int, one: Unit, backends: int) -> str:
    name, timing = row.timing.backend, row.timing
    what = "the next token takes" if batch == 1 else f"the next token of each of {batch} sequences takes"
    among = f", the least of {backends} backends" if backends > 1 else ""
    to = next((p for p in timing.to if p.against), None)
    if to is not None:
        among += f": {to.text} × {to.against}" if not to.why else f"; its ratio to {to.against} is not valid"
    sentences = [f"With {depth} tokens in the cache {what} {name} {timing.median} {one.name}{among}."]
    ways = ("all positions projected to logits", "the last position alone projected")
    longer = [f"{p.text} times as long with {way}" for p, way in zip(slower, ways, strict=True) if p.text]
    if longer:
        sentences.append(f"Without the cache it takes {', and '.join(longer)}.")
    unsure = [way for p, way in zip(slower, ways, strict=True) if p.why]
    if unsure:
        sentences.append(
            f"The ratio to the time without the cache, {' or '.join(unsure)}, is not valid: the reason is in the table."
        )
    return " ".join(sentences)


def _timing(
    findings: Findings,
    arm: Arm,
    summary: Summary | None,
    one: Unit,
    places: Sequence[tuple[int, int]],
    to: tuple[Proportion, ...],
    cached: tuple[Proportion, ...] = (),
) -> Timing:
    if summary is None:
        blocks = sum(findings.blocks[place] for place in places)
        return Timing(arm.backend, arm.phase, findings.timeless(places), blocks=blocks, to=to, cached=cached)
    return Timing(
        arm.backend,
        arm.phase,
        one.of(summary.median),
        one.interval(summary),
        f"{one.of(summary.q1)} to {one.of(summary.q3)}",
        one.of(summary.p90),
        one.of(summary.p99),
        one.of(summary.device),
        summary.n,
        str(summary.restarts),
        percent(summary.spread),
        to,
        cached,
    )


def _timings(findings: Findings, cases: list[Numbered], phases: Sequence[str], one: Unit) -> Table | None:
    found = []
    for number, case in cases:
        rows = [
            _timing(
                findings,
                arm,
                findings.summaries.get((number, i)),
                one,
                [(number, i)],
                findings.others(number, i),
                findings.itself(number, i),
            )
            for i, arm in enumerate(case.arms)
            if arm.phase in phases
        ]
        found.append(Timings(case.depth, case.steps, tuple(rows)))
    shown = _shown(row for timings in found for row in timings.rows)
    return Table(tuple(found), shown) if found else None


def _shown(rows: Iterable[Timing]) -> frozenset[str]:
    fields = ("p90", "p99", "device", "spread", "to", "cached")
    return frozenset(name for row in rows for name in fields if getattr(row, name))


def _series(findings: Findings, cases: list[Numbered]) -> list[Series]:
    """One line for each backend and phase, and the floor of the roofline under them."""
    arms = findings.arms(cases, STEPS)
    kin = {backend: i for i, backend in enumerate(dict.fromkeys(arm.backend for arm in arms))}
    depths = sorted({case.depth for _, case in cases})
    at = {depth: [item for item in cases if item[1].depth == depth] for depth in depths}
    found = []
    for arm in arms:
        points = [(depth, findings.summary(at[depth], arm)) for depth in depths]
        line = tuple((float(depth), s.median, s.low, s.high) for depth, s in points if s is not None)
        found.append(Series(f"{arm.backend} {arm.phase}", kin[arm.backend], STROKES[arm.phase], line))
    roofs = [(depth, findings.roof(at[depth], arm)) for depth in depths for arm in arms if arm.phase == "decode"]
    floors = {
        float(depth): roof.floor for depth, roof in reversed(roofs) if roof is not None and roof.floor is not None
    }
    floor = tuple((depth, value, value, value) for depth, value in floors.items())
    return [*found, Series("floor of the roofline", -1, "solid", floor)] if floor else found


def _generating(findings: Findings, cases: list[Numbered]) -> Generating:
    places = [
        ((number, i), arm) for number, case in cases for i, arm in enumerate(case.arms) if arm.phase in GENERATING
    ]
    summaries = {place: findings.summaries.get(place) for place, _ in places}
    found = {place: findings.generations.get(place) for place, _ in places}
    whole = unit(s.median for s in summaries.values() if s is not None)
    token = unit(v for g in found.values() if g is not None for v in (g.ttft, g.tpot, g.itl, g.itl_p99))
    parts: dict[int, list[Generated]] = {}
    for place, arm in places:
        timing = _timing(
            findings, arm, summaries[place], whole, [place], findings.others(*place), findings.itself(*place)
        )
        one, texts = found[place], ("", "", "", "", "")
        if one is not None:
            ttft, tpot, itl, itl_p99 = map(token.of, (one.ttft, one.tpot, one.itl, one.itl_p99))
            texts = ttft, tpot, itl, itl_p99, digits(one.throughput)
        parts.setdefault(place[0], []).append(Generated(timing, *texts))
    shown = _shown(row.timing for rows in parts.values() for row in rows)
    return Generating(cases[0][1].depth, cases[0][1].new, whole, token, tuple(map(tuple, parts.values())), shown)
