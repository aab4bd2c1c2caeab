"""Counts of a decoder's steps, ``kv-counters/1``: exact, so that every change can be gated on them.

A count is the program's, not the machine's. Some show on their own that a decode step uses no cache (``broken``);
against a baseline all show what has grown (``compare``). ``collect`` makes them, and what a backend counts itself.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from kvconform.bench import eligibility
from kvconform.bench.client import WORKER
from kvconform.bench.counters.record import (
    COUNTERS,
    Count,
    Missing,
    Record,
    attention_of,
    growth,
    is_record,
    positions,
    read,
)
from kvconform.bench.eligibility import Ineligible
from kvconform.bench.presets import Preset
from kvconform.errors import BackendUnavailable, WorkerDied
from kvconform.files import write_versioned
from kvconform.results.gate import OK, REGRESSION
from kvconform.worker.client import BUILD_TIMEOUT, WorkerClient, WorkerSpec
from kvconform_specs.config import Config

__all__ = ["Count", "Missing", "Record", "broken", "compare", "count", "is_record", "lines", "read"]

OF_VERSIONS = ("operators", "allocated", "graphs")
"""Counters that another version of the framework may change though the backend is the same."""
NEVER = ("memcpy", "bend", "recompilations", "graph_breaks")
"""Counters that are zero for a cache that works as it should."""
UPDATE = "update the baseline"
KINDS = 4
"""Kinds that a sentence names, those that moved most."""


# --- counting ---
def count(
    specs: Mapping[str, WorkerSpec], presets: Mapping[str, Preset], out: Path, say: Callable[[str], None] = print
) -> Record:
    """Counts every backend on every preset and writes ``out``. Nothing is timed, so workers run one after another."""
    record = Record(presets={name: sizes(preset) for name, preset in presets.items()})
    for name, spec in specs.items():
        artefacts = {"KVCONFORM_ARTEFACTS": str((out.parent / "artefacts").resolve()), "OMP_NUM_THREADS": "1"}
        spec = replace(spec, environment={**artefacts, **spec.environment}, module=WORKER)
        try:
            with WorkerClient(spec) as client:
                record.claims[name] = {"memory": client.claims.memory, "page": client.claims.page}
                for preset in presets.values():
                    _note(record, preset.name, name, _counted(record, name, client, preset), say)
        except BackendUnavailable as sentence:
            for preset_name in presets:
                _note(record, preset_name, name, str(sentence), say)
    write_versioned(out, record)
    return record


def sizes(preset: Preset) -> dict[str, Any]:
    """The sizes of a preset's counts."""
    return {"config": preset.config.to_json(), "depths": list(_spread(preset.depths)), "prompt": min(preset.prompts)}


def _spread(depths: Iterable[int]) -> tuple[int, ...]:
    """The first, a middle and the last of the depths: what a line is checked on."""
    known = sorted(set(depths))
    return tuple(sorted({known[0], known[len(known) // 2], known[-1]}))


def _note(record: Record, preset: str, backend: str, why: str, say: Callable[[str], None]) -> None:
    if why:
        record.missing.append(Missing(preset, backend, why))
    say(f"{preset}: {backend}: {f'no counts: {why}' if why else 'counted'}")


def _counted(record: Record, name: str, client: WorkerClient, preset: Preset) -> str:
    """Why the backend has no counts on the preset; empty if it has."""
    config = eligibility.config_of(client, preset)
    depths, prompt = _spread(preset.depths), min(preset.prompts)
    cells = [("loop", depths[0])]  # first: nothing has been compiled yet that it would compile
    cells += [("decode", n) for n in depths] + [("prefill", prompt), ("recompute", depths[0])]
    mine: list[Count] = []
    try:
        eligibility.build(client, preset)
        for phase, depth in cells:
            message = {"op": "count", "config": config.to_json(), "phase": phase, "depth": depth}
            reply = client.ask(message, BUILD_TIMEOUT)
            record.by[name] = {**reply["by"], "device": client.spec.device}
            unknown = [counter for counter in reply["counts"] if counter not in COUNTERS]
            if unknown:
                return f"counts {unknown[0]!r}, which is unknown; known: {', '.join(COUNTERS)}"
            for counter, kinds in reply["counts"].items():
                parts = {kind: n for kind, n in kinds.items() if kind}
                mine.append(Count(preset.name, name, phase, depth, counter, sum(kinds.values()), parts))
    except (Ineligible, WorkerDied, BackendUnavailable) as error:
        return str(error)
    if not mine:
        return "it counts nothing"
    decodes = [one for one in mine if one.phase == "decode"]
    if client.claims.reference == "definition":
        mine += [positions(one, config, client.claims) for one in decodes if one.counter == "multiply_adds"]
    record.counts += [*mine, *growth(decodes)]
    return ""


# --- what the counts show ---
class MovedCount(NamedTuple):
    """What a count shows. ``code``: the exit code that it causes; 0 for a note. ``words``: as a sentence."""

    code: int
    words: str


def broken(record: Record) -> list[MovedCount]:
    """Counts that no cached decode has, whatever the baseline."""
    found = []
    for one in record.counts:
        sentence = _law(one, record)
        if sentence:
            found.append(MovedCount(REGRESSION, f"{one.words} {_number(one)}: {sentence}"))
    return found


def _law(one: Count, record: Record) -> str:
    if one.counter == "positions" and one.value != 1:
        return "a cached step computes one query position for each new token"
    if one.counter in NEVER and one.value:
        return "it is 0 for a decode that is linear in the depth and compiles and copies nothing"
    if one.phase != "growth":
        return ""
    if one.counter == "operators" and one.value:
        return "a step does not need more operators at a greater depth"
    if one.counter == "allocated" and one.value > 0 and record.claims[one.backend]["memory"] == "capacity":
        return "a cache of fixed size needs no more memory at a greater depth"
    if one.counter == "multiply_adds":
        preset = record.presets[one.preset]
        config = Config.from_json(preset["config"])
        most = attention_of(config) * (preset["depths"][-1] - preset["depths"][0])
        if not 0 <= one.value <= most and any(_is_positions(other, one) for other in record.counts):
            return f"one query position's attention grows by {most} at most"
    return ""


def _is_positions(other: Count, one: Count) -> bool:
    return (other.preset, other.backend, other.counter) == (one.preset, one.backend, "positions")


def compare(base: Record, head: Record) -> list[MovedCount]:
    """What differs from the baseline: counts that grew, and counts that are gone, are regressions."""
    found: list[MovedCount] = []
    apart = {name for name in base.presets if name in head.presets and base.presets[name] != head.presets[name]}
    found += [
        MovedCount(REGRESSION, f"{name}: its sizes are not the baseline's: not comparable") for name in sorted(apart)
    ]
    bound = set()  # backends whose frameworks differ
    for name in base.by:
        was, now = base.by[name], head.by.get(name)
        if now is not None and now != was:
            bound.add(name)
            versions = f"{_versions(now)}, the baseline has {_versions(was)}"
            found.append(MovedCount(OK, f"{name}: {versions}: {', '.join(OF_VERSIONS)} are not comparable"))
    before, after = ({one.key: one for one in record.counts} for record in (base, head))
    gone: dict[tuple[str, str], list[Count]] = defaultdict(list)
    for key, was_count in before.items():
        if was_count.preset in apart or (was_count.backend in bound and was_count.counter in OF_VERSIONS):
            continue
        if key not in after:
            gone[was_count.preset, was_count.backend].append(was_count)
        elif after[key].value != was_count.value:
            found.append(_moved(was_count, after[key]))
    found += _lost(gone, head)
    had = {(one.preset, one.backend) for one in base.counts}
    for preset, backend in sorted({(one.preset, one.backend) for one in head.counts} - had):
        found.append(MovedCount(OK, f"{preset}, {backend}: is new; {UPDATE}"))
    fresh = [one for key, one in after.items() if key not in before and (one.preset, one.backend) in had]
    fresh = [one for one in fresh if one.preset not in apart]
    return found + [MovedCount(OK, f"{one.words} {_number(one)}: is new; {UPDATE}") for one in fresh]


def _moved(was: Count, now: Count) -> MovedCount:
    shares = {kind: now.kinds.get(kind, 0) - was.kinds.get(kind, 0) for kind in {*was.kinds, *now.kinds}}
    moved = sorted(((n, kind) for kind, n in shares.items() if n), key=lambda share: (-abs(share[0]), share[1]))
    kinds = f" ({', '.join(f'{kind} {n:+}' for n, kind in moved[:KINDS])})" if moved else ""
    change = f"{now.words} {was.value} -> {now.value}{kinds}"
    if now.value > was.value:
        return MovedCount(REGRESSION, change)
    return MovedCount(OK, f"{change}: an improvement; {UPDATE}")


def _lost(gone: Mapping[tuple[str, str], list[Count]], head: Record) -> Iterator[MovedCount]:
    """One sentence for a backend that is gone from a preset, or one for each of its counts."""
    reasons = {(one.preset, one.backend): one.why for one in head.missing}
    left = {(one.preset, one.backend) for one in head.counts}
    for (preset, backend), counts in gone.items():
        if (preset, backend) in left:
            yield from (MovedCount(REGRESSION, f"{one.words} was {one.value}, is no longer counted") for one in counts)
        else:
            why = reasons.get((preset, backend), "it was not part of the run")
            yield MovedCount(REGRESSION, f"{preset}, {backend}: is no longer counted: {why}")


def lines(differences: Iterable[MovedCount]) -> list[str]:
    """One line each: regressions first, then what does not block."""
    ordered = sorted(differences, key=lambda one: one.code != REGRESSION)
    return [f"{'regression' if one.code == REGRESSION else 'note'}: {one.words}" for one in ordered]


def _number(one: Count) -> str:
    kinds = sorted(one.kinds.items(), key=lambda kind: (-abs(kind[1]), kind[0]))[:KINDS]
    return f"{one.value}" + (f" ({', '.join(f'{kind} {n}' for kind, n in kinds)})" if kinds else "")


def _versions(by: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in sorted(by.items())) or "no versions"
