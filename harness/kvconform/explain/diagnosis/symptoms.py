"""Symptoms: what one probe shows. Each output token is compared with the reference, and the circumstances that may
explain a wrong one are recorded beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from kvconform.errors import WorkerDied
from kvconform.explain.diagnosis.cache_edits import CacheModel, views
from kvconform.explain.diagnosis.probes import Probe
from kvconform.judging.judge import judge, observe
from kvconform.judging.mismatch import Mismatch, died
from kvconform.judging.observed import Array
from kvconform.worker.execute import StepResult, Trace
from kvconform.worker.protocol import Traces
from kvconform_specs.claims import Claims, Precision, changes_at
from kvconform_specs.clause import Case, Relation
from kvconform_specs.config import Config
from kvconform_specs.history import Histories, epoch_of
from kvconform_specs.program import (
    AliasHandle,
    Append,
    Close,
    Fork,
    Generate,
    Marks,
    Poison,
    Program,
    Reject,
    Reorder,
    Reset,
    Step,
    Truncate,
    UncachedForward,
)
from kvconform_specs.reference.oracle import Expected, ReferenceForward, expect

Facts = Mapping[str, int]
"""The circumstances of one output token by name: numbers, and 0 or 1 for what holds or does not."""
ANOTHER, EARLIER_PROGRAM = "after another sequence", "after another sequence in the process"
BEFORE_A_CHANGE = "cached before a change"
RELATIONS = (Relation.PARITY, Relation.LENGTHS, Relation.FREE_SLOTS, Relation.CONTENTS, Relation.GENERATED)
"""What a probe is judged by: the first that it breaks is reported."""


@dataclass(frozen=True)
class OutputCell:
    """One output token of a probe.

    first: whether nothing was wrong before in its sequence. parts: the heads, logits or channels that are wrong.
    """

    step: int
    row: int
    column: int
    wrong: bool
    raised: bool
    first: bool
    facts: Facts
    parts: tuple[int, ...] = ()


@dataclass(frozen=True)
class Symptom:
    """What one probe showed.

    outputs: for each step, its output and bound, ``(b, t, e)``; None where it has none. mismatch: the first
    violation, None where the probe is right.
    """

    probe: Probe
    cells: tuple[OutputCell, ...]
    outputs: tuple[tuple[Array, Array] | None, ...]
    mismatch: Mismatch | None

    @property
    def wrong(self) -> bool:
        return self.mismatch is not None


@dataclass
class ReferenceOutputs:
    """What the reference gives, computed once for each program."""

    precision: Precision
    forward: Callable[[Config], ReferenceForward] | None = None
    known: dict[Program, tuple[Expected | None, ...]] = field(default_factory=dict)

    def expected(self, program: Program) -> tuple[Expected | None, ...]:
        """Raises WorkerDied where a black box's own forward ends its process."""
        found = self.known.get(program)
        if found is None:
            own = None if self.forward is None else self.forward(program.config)
            found = self.known[program] = expect(program, (0,), self.precision, own)
        return found


def symptom(probe: Probe, trace: Trace, reference: ReferenceOutputs, claims: Claims, earlier: bool) -> Symptom:
    """What a probe's trace shows; ``earlier``: whether the process ran another program before. Raises WorkerDied where
    a black box's own forward ends its process."""
    expected = reference.expected(probe.program)
    reading = _Reading(probe.program, claims, earlier)
    for number, done in enumerate(trace):
        reading.read(number, done, expected[number])
    mismatch = _mismatch(probe.program, trace, claims, expected)
    return Symptom(probe, tuple(reading.cells), tuple(reading.outputs), mismatch)


def death(probe: Probe, error: WorkerDied, claims: Claims, earlier: bool) -> Symptom:
    """The symptom of a probe that ended the backend's process: nothing is known of the steps before."""
    reading = _Reading(probe.program, claims, earlier)
    for number in range(max(error.step, 0)):
        reading.enter(probe.program.steps[number])
    reading.failed(max(error.step, 0), raised=True)
    outputs = (None,) * len(probe.program.steps)
    return Symptom(probe, tuple(reading.cells), outputs, died(error, program=0))


def _mismatch(program: Program, trace: Trace, claims: Claims, expected: Sequence[Expected | None]) -> Mismatch | None:
    """The first violation: of the steps before one that failed, else of that one."""
    ran = len(observe(program, trace, claims, expected)[0].expected)
    for stop in sorted({max(ran, 1), len(trace)}):
        case, traces = Case((Program(program.config, program.steps[:stop]),)), Traces(1, None, (trace[:stop],))
        found = judge(case, RELATIONS, claims, [traces], [expected[:stop]]).mismatch
        if found is not None:
            return found
    return None


def _shaped(output: Array | None, config: Config, want: Expected) -> Array | None:
    """The output as ``(b, t, e)``; None where its shape or dtype is wrong."""
    b, t = want.real.shape
    shape = (b, config.heads, t, config.head_dim) if config.profile == "attention" else (b, t, config.outputs)
    if output is None or output.shape[1:] != shape or output.dtype != np.float32:
        return None
    got: Array = output[0]
    if config.profile != "attention":
        return got
    return np.asarray(got.swapaxes(1, 2).reshape(b, t, config.heads * config.head_dim))


class _Reading:
    """Goes through a trace step by step."""

    def __init__(self, program: Program, claims: Claims, earlier: bool) -> None:
        self.program, self.config, self.claims, self.earlier = program, program.config, claims, earlier
        self.cells: list[OutputCell] = []
        self.outputs: list[tuple[Array, Array] | None] = []
        self.histories, self.marks = Histories(), Marks()
        self.facts: dict[str, dict[str, int]] = {}  # by open sequence
        self.wrong_before: set[str] = set()  # sequences
        self.first_context: dict[tuple[int, int], int] = {}  # of each prompt that was run, by stream and length
        changes = changes_at(self.config, claims)
        self.changes, self.held = changes, views(program, CacheModel()) if changes else ()
        self.last_context = self.prompt_context = 0  # of the last call, and of the last one on an empty cache

    def read(self, number: int, done: StepResult, want: Expected | None) -> None:
        step = self.program.steps[number]
        if done.error is not None:
            self.failed(number, raised=True)
        elif want is None or isinstance(step, Generate) or not isinstance(step, Append | UncachedForward):
            self.enter(step)
            self.outputs.append(None)
        else:
            want = want.last() if self.claims.returns == "last" and isinstance(step, Append) else want
            got = _shaped(done.output, self.config, want)
            if got is None:
                self.failed(number, raised=False)
            else:
                self._compare(number, step, got, want)

    def _compare(self, number: int, step: Append | UncachedForward, got: Array, want: Expected) -> None:
        cached = self.enter(step)
        with np.errstate(invalid="ignore"):
            error = np.abs(got - want.value[0])
            judged = want.real[..., None] & np.isfinite(want.value[0])  # what a tenant's own NaN gives is not
            off = ~(error <= want.bound_lower[0]) & judged
            if off.any():
                off = ~(error <= want.bound[0]) & judged
        self.outputs.append((got, want.bound[0] if off.any() else want.bound_lower[0]))
        self._add(number, step, cached, want.real, off)

    def failed(self, number: int, raised: bool) -> None:
        """A step that raised, or whose output is malformed."""
        step = self.program.steps[number]
        cached = self.enter(step)
        self.outputs.append(None)
        if isinstance(step, Append | UncachedForward) and not isinstance(step, Generate):
            real = np.arange(max(step.counts))[None, :] < np.array(step.counts)[:, None]
            self._add(number, step, cached, real, None, raised)

    def enter(self, step: Step) -> list[int]:
        """Follows the step, and returns how many tokens each row of its sequence held before."""
        self._follow(step)
        rows = self.histories.rows.get(step.seq, ()) if isinstance(step, Append) else ()
        cached = [len(row) for row in rows]
        self.histories.apply(step)
        self.marks.apply(step)
        return cached

    def _add(
        self,
        number: int,
        step: Append | UncachedForward,
        cached: list[int],
        real: Array,
        off: Array | None,
        raised: bool = False,
    ) -> None:
        cached = cached or [0] * len(step.counts)
        first = step.seq not in self.wrong_before
        common = self._common(step, cached)
        lengths = [c + n for c, n in zip(cached, step.counts, strict=True)]
        reached = self.marks.marks(step.seq) if isinstance(step, Append) else lengths
        for row, count in enumerate(step.counts):
            columns = np.flatnonzero(real[row])
            for index, column in enumerate(columns):
                place = count - len(columns) + index  # in the step; an output may be of the last token only
                wrong = off is None or bool(off[row, column].any())
                facts = common | {
                    "row": row,
                    "past": cached[row],
                    "q": count,
                    "position": cached[row] + place,
                    "length": lengths[row],
                    "reached": reached[row],
                    "first token of the step": place == 0,
                    "last token of the step": place == count - 1,
                    "full": lengths[row] == self.config.capacity,
                    "last row": row == len(step.counts) - 1,
                    "longest": lengths[row] == max(lengths),
                }
                if self.changes:
                    facts |= {BEFORE_A_CHANGE: self._before_a_change(number, row, cached[row], lengths[row])}
                parts = () if off is None else self._parts(off[row, column])
                self.cells.append(OutputCell(number, row, int(column), wrong, raised, first, facts, parts))
                if wrong:
                    self.wrong_before.add(step.seq)

    def _before_a_change(self, number: int, row: int, cached: int, length: int) -> bool:
        """Whether a token was cached when there were too few for a change of outputs that has come since. Token 0 does
        not count: its key is rotated by no angle, whatever the factors are."""
        held = self.held[number]
        then = () if held is None else ((past + count) for _token, past, count in held[row][1:cached])
        return any(epoch_of(total, self.changes) != epoch_of(length, self.changes) for total in then)

    def _common(self, step: Append | UncachedForward, cached: Sequence[int]) -> dict[str, int]:
        lengths = {a + b for a, b in zip(cached, step.counts, strict=True)}
        if isinstance(step, Append) and not any(cached):
            first = self.first_context.setdefault((step.seed, max(step.counts)), step.context)
            self.facts[step.seq]["prompt first in another context"] = first != step.context
        facts: dict[str, int] = {
            **self.facts.get(step.seq, {}),
            "uncached forward": not isinstance(step, Append),
            "batch": len(step.counts),
            "different counts": len(set(step.counts)) > 1,
            "different lengths": len(lengths) > 1,
            step.distribution: True,
            "last only": step.last_only,
            "context": step.context > 0,
            "prompt in another context": any(cached) and self.prompt_context != step.context,
            "after another context": bool(self.cells) and self.last_context != step.context,
        }
        self.last_context = step.context
        if not any(cached):
            self.prompt_context = step.context
        if isinstance(step, Append):
            facts |= {
                "left padding": step.pad is not None and step.pad[0] == "left",
                "mask": bool(step.masked),
                "layout": step.layout != "contiguous",
                "in place": step.in_place,
            }
        return facts

    def _parts(self, off: Array) -> tuple[int, ...]:
        elements = np.flatnonzero(off)
        if self.config.profile == "attention":
            elements = np.unique(elements // self.config.head_dim)
        return tuple(int(element) for element in elements)

    def _follow(self, step: Step) -> None:
        """Records what each sequence has gone through."""
        if isinstance(step, Reject):
            self.facts.setdefault(step.step.seq, {})["after a refused call"] = 1
            return
        own = self.facts.setdefault(step.seq, {})
        match step:
            case Append():
                if "appends" not in own:
                    others = any("appends" in facts for name, facts in self.facts.items() if name != step.seq)
                    own[ANOTHER] = others
                    own[EARLIER_PROGRAM] = others or self.earlier
                own["appends"] = own.get("appends", 0) + 1
                own["decodes"] = own.get("decodes", 0) + (max(step.counts) == 1)
            case Fork() | AliasHandle():
                name = "fork" if isinstance(step, Fork) else "older handle"
                own[f"after a {name}"] = 1
                self.facts[step.into] = {**own, f"copy of a {name}": 1}
                if step.seq in self.wrong_before:
                    self.wrong_before.add(step.into)
            case Reset():
                kept = {name: own[name] for name in (ANOTHER, EARLIER_PROGRAM) if name in own}
                self.facts[step.seq] = {**kept, "after a reset": 1, "appends": 0}
                self.wrong_before.discard(step.seq)
            case Close():
                own["closed"] = 1
                self.wrong_before.discard(step.seq)
            case Truncate():
                own["after a truncation"] = 1
            case Reorder():
                own["after a reorder"] = 1
            case Poison():
                own["after poison"] = 1
