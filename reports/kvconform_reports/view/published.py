"""Published, reproduced, ours: the figures of a publication beside the same design and others in this record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from kvconform.bench.record import Arm, Summary
from kvconform.bench.worker.gpu import default_mhz, kept
from kvconform_reports.view.figures import Proportion, Unit, digits, unit
from kvconform_reports.view.findings import UNCACHED, Findings, Numbered, device_of, runs_on


@dataclass(frozen=True)
class Published:
    """The figures of a publication in words; empty if it gives none. ``every``, ``last``: whether its
    loop without a cache projects all positions or the last alone; neither where it is unknown."""

    what: str
    cached: str
    uncached: str
    ratio: str
    machine: str
    source: str
    every: bool
    last: bool
    differs: tuple[str, ...]


@dataclass(frozen=True)
class Measured:
    """One backend of this record. ``every``, ``last``: its time without the cache over that with it, all positions
    projected or the last alone. ``over``: its time with the cache over the reproduced design's."""

    kind: str
    backend: str
    what: str
    cached: str
    interval: str
    every: Proportion
    last: Proportion
    over: Proportion | None


@dataclass(frozen=True)
class Comparison:
    """``missing``: why nothing is reproduced, or empty. ``theirs``: the reproduced figures in the form of the
    publication."""

    published: tuple[Published, ...]
    measured: tuple[Measured, ...]
    machine: str
    missing: str
    theirs: tuple[str, ...] = ()


def compare(findings: Findings, preset: str, batches: Sequence[int]) -> Comparison | None:
    """None where the preset names nothing published. An entry's ``arm`` is the backend that has its design here, its
    ``phases`` what its figures are of, with the cache and without."""
    described = findings.record.presets.get(preset)
    entries = described.get("published") if isinstance(described, dict) else None
    entries = [entry for entry in entries if isinstance(entry, Mapping)] if isinstance(entries, list | tuple) else []
    if not entries:
        return None
    designs = dict.fromkeys(str(entry.get("arm") or preset) for entry in entries)
    phase, groups = _cases(findings, preset, batches, _phases(entries[0])[:1])
    arms = findings.arms([item for cases in groups for item in cases], (phase,))
    timed = [
        (cases, arm, findings.summary(cases, arm)) for cases in groups for arm in arms if findings.places(cases, arm)
    ]
    one = unit(summary.median for *_, summary in timed if summary is not None)
    rows = [_measured(findings, cases, arm, summary, designs, one) for cases, arm, summary in timed]
    missing = [name for name in designs if not any(row.backend == name for row in rows)]
    here = runs_on(findings.record)
    return Comparison(
        tuple(_published(entry, here) for entry in entries),
        tuple(sorted(rows, key=lambda row: row.kind != "reproduced")),
        device_of(findings.record),
        f"This record has no time of the published design ({', '.join(missing)})." if missing else "",
        tuple(words for entry in entries for words in (_theirs(findings, preset, batches, entry),) if words),
    )


def _theirs(findings: Findings, preset: str, batches: Sequence[int], entry: Mapping[str, Any]) -> str:
    """Mean and standard deviation over single runs, without restarts or pairs, if the publication gives those; of
    whole generations, each of which is one run here."""
    phases, wanted = _phases(entry), entry.get("runs", 1)
    name = str(entry.get("arm") or preset)
    rounds, _ = kept(findings.record.rounds, default_mhz(findings.record.machine))
    parts, means = [], []
    for phase, words in zip(phases, ("with", "without"), strict=False):
        cases = [item for item in findings.cases(preset, batches[0], (phase,)) if item[1].new] if batches else []
        places = set(findings.places(cases, Arm(name, phase)))
        runs = [block.ns for block in rounds if (block.case, block.arm) in places]
        if wanted < 2 or len(runs) < 2:
            return ""
        one = unit([fmean(runs)])
        parts.append(f"{one.of(fmean(runs))} ± {one.of(stdev(runs))} {one.name} {words} the cache ({len(runs)} runs)")
        means.append(fmean(runs))
    ratio = f": {digits(means[1] / means[0])} ×" if len(means) == 2 else ""
    return f"As published, mean ± standard deviation of single runs: {name} {', '.join(parts)}{ratio}." if parts else ""


def _cases(
    findings: Findings, preset: str, batches: Sequence[int], wanted: Sequence[str]
) -> tuple[str, list[list[Numbered]]]:
    """What the publication did, or else the generations, or else decode: the cached phase, and the cases of each row.
    Of the smallest batch; of decode the greatest depth."""
    for phase in (*wanted, "generate", "decode"):
        found = findings.cases(preset, batches[0], (phase,)) if batches and phase in UNCACHED else []
        if found and phase == "generate":
            return phase, findings.generating(preset, batches[0])
        if found:
            return phase, [[item for item in found if item[1].depth == found[-1][1].depth]]
    return "decode", []


def _phases(entry: Mapping[str, Any]) -> tuple[str, ...]:
    phases = entry.get("phases")
    return tuple(str(phase) for phase in phases) if isinstance(phases, list | tuple) else ()


def _measured(
    findings: Findings, cases: list[Numbered], arm: Arm, summary: Summary | None, designs: Mapping[str, None], one: Unit
) -> Measured:
    case, places = cases[0][1], findings.places(cases, arm)
    every, last = (findings.without(cases, arm.backend, phase, invert=True) for phase in UNCACHED[arm.phase])
    over = [findings.ratio(cases, arm, Arm(name, arm.phase)) for name in designs if name != arm.backend]
    what = f"generate {case.new} after {case.depth}" if case.new else f"decode at depth {case.depth}"
    return Measured(
        "reproduced" if arm.backend in designs else "ours",
        arm.backend,
        what,
        findings.timeless(places) if summary is None else f"{one.of(summary.median)} {one.name}",
        "" if summary is None else one.interval(summary),
        every,
        last,
        next((r for r in over if r is not None), None),
    )


def _published(entry: Mapping[str, Any], here: str) -> Published:
    """``here``: where this record was made, the first of what differs."""
    differs = entry.get("differs") or ()
    every, last = (any(phase in _phases(entry) for phase in column) for column in zip(*UNCACHED.values(), strict=True))
    sentences = [differs] if isinstance(differs, str) else differs if isinstance(differs, list | tuple) else ()
    return Published(
        _said(entry.get("what")),
        _said(entry.get("cached"), " s"),
        _said(entry.get("uncached"), " s"),
        _said(entry.get("ratio"), " ×"),
        _said(entry.get("machine")),
        _said(entry.get("source")),
        every,
        last,
        tuple(dict.fromkeys([here, *map(str, sentences)])),
    )


def _said(value: Any, suffix: str = "") -> str:
    """Text as it is, a number with its unit."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return digits(value) + suffix
    return "" if value is None else str(value)
