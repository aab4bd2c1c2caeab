"""The examination: the whole battery on one backend, and which tokens its outputs feel."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kvconform.explain.diagnosis.probes import SEEN, Probe, changes, probes
from kvconform.explain.diagnosis.symptoms import BLANK, FINE, MISSING, Symptom, Truth, alike, flat, symptom
from kvconform.judging.observed import Array
from kvconform.worker.execute import Trace
from kvconform_specs.claims import Claims
from kvconform_specs.config import Config
from kvconform_specs.program import Append, Program
from kvconform_specs.reference.oracle import Expected

SIGHT = "sight"
"""The name that the pattern of the changed tokens goes by."""
OVER = 2.0
"""A token is felt where the output moves by more than so many bounds."""
SOURCES = (
    "next",
    "future",
    "itself",
    "its chunk",
    "first",
    "last cached",
    "cached",
    "window's edge",
    "just outside",
    "outside",
)
"""What a changed token is to an output: the next one, a later one, the same, earlier in its own step, position 0, the
newest that was cached before, any other; the oldest in the window, the one before it, an older one."""
FORBIDDEN = frozenset(("next", "future", "just outside", "outside"))


def sight(probe: Probe, changed: Sequence[tuple[int, Program]], traces: Sequence[Trace], truth: Truth) -> str:
    """For each step and each of ``SOURCES``: ``.`` felt as it must be, ``x`` never, ``m`` at times only, ``-`` where
    there is none to judge. ``traces``: of the probe, then of each changed program. Steps that are missing: ``-``."""
    judged: list[_Judged] = []
    program = probe.program
    steps = [(number, step.counts[0]) for number, step in enumerate(program.steps) if isinstance(step, Append)]
    base = truth.expected(program)
    for (source, other), trace in zip(changed, traces[1:], strict=True):
        wanted, past = truth.expected(other), 0
        for number, count in steps:
            want, was = wanted[number], base[number]
            assert want is not None and was is not None
            here, there = (_output(of, number, program.config, want) for of in (traces[0], trace))
            if here is None or there is None or len(here) != len(there):
                break
            for column in range(count):
                bound = was.bound[0, 0, column]
                moves = np.abs(want.value - was.value)[0, 0, column]
                must, may = bool((moves > 2 * OVER * bound).any()), source <= past + column and bool(moves.any())
                place = column + len(here) - count  # the last one alone may be there
                if place < 0 or (may and not must):
                    continue
                moved = bool((np.abs(there - here)[place] > OVER * bound).any())
                judged.append(_Judged(number, past + column, past, source, must, moved))
            past += count
    # the window of a black box is not known: it is how far its own forward reaches
    window = program.config.window or max((one.position - one.source + 1 for one in judged if one.must), default=1)
    found: dict[tuple[int, str], list[bool]] = {}
    for one in judged:
        found.setdefault((one.step, _source(one, window)), []).append(one.moved == one.must)
    return "".join(_agreement(found.get((number, kind))) for number, _count in steps for kind in SOURCES)


@dataclass(frozen=True)
class _Judged:
    """One output and one changed token: whether the output must move and whether it did."""

    step: int
    position: int
    past: int
    source: int
    must: bool
    moved: bool


def _output(trace: Trace, number: int, config: Config, want: Expected) -> Array | None:
    """``(t, e)`` of one step's row 0, or of its last token alone; None where it has another shape."""
    output = trace[number].output if number < len(trace) else None
    rows = flat(output, config, want)
    rows = flat(output, config, want.last()) if rows is None else rows
    return None if rows is None else rows[0]


def _source(one: _Judged, window: int) -> str:
    behind = one.position - one.source
    if behind < 0:
        return "next" if behind == -1 else "future"
    if not one.must:
        return "just outside" if behind == window else "outside"
    if behind == 0:
        return "itself"
    if behind == window - 1 and one.source > 0:
        return "window's edge"
    if one.source >= one.past:
        return "its chunk"
    return "first" if one.source == 0 else "last cached" if one.source == one.past - 1 else "cached"


def _agreement(right: Sequence[bool] | None) -> str:
    if right is None:
        return MISSING
    return FINE if all(right) else "m" if any(right) else "x"


@dataclass(frozen=True)
class Examination:
    """What the battery showed of one backend under one config. ``pattern``: the letters of each probe, by its name."""

    symptoms: tuple[Symptom, ...]
    pattern: Mapping[str, str]

    @property
    def off(self) -> bool:
        return any(set(letters) - BLANK for letters in self.pattern.values())


def examine(run: Callable[[Program], Trace], config: Config, claims: Claims, truth: Truth) -> Examination:
    """Runs the battery. Raises what ``run`` does, and WorkerDied where a black box's own forward does."""
    found: list[Symptom] = []
    pattern: dict[str, str] = {}
    for probe in probes(config, claims):
        trace = run(probe.program)
        found.append(symptom(probe, trace, truth, claims, later=bool(found)))
        pattern[probe.name] = found[-1].pattern
        if probe.name == SEEN:
            changed = changes(probe)
            traces = [trace, *(run(program) for _position, program in changed)]
            pattern[SIGHT] = sight(probe, changed, traces, truth)
            again = symptom(probe, run(probe.program), truth, claims)
            if not alike(found[-1], again):  # what ran before is felt: nothing can be said of single tokens
                pattern[SIGHT] = MISSING * len(pattern[SIGHT])
    return Examination(tuple(found), pattern)
