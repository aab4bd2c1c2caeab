"""Symptoms: what the outputs of one probe are, token by token, next to the truth, and a pattern of letters of them.

A pattern does not depend on sizes: a chunk of three and one of thirty whose last token alone is off have one letter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from kvconform.explain.diagnosis.probes import Probe
from kvconform.judging.observed import Array, Observed, at
from kvconform.judging.outputs import generated
from kvconform.worker.execute import StepResult, Trace
from kvconform_specs.claims import Claims, Precision
from kvconform_specs.config import Config
from kvconform_specs.describe import describe
from kvconform_specs.history import Histories
from kvconform_specs.program import (
    AliasHandle,
    Append,
    Close,
    Fork,
    Generate,
    Program,
    ReadCache,
    Reject,
    Reorder,
    Reset,
    Truncate,
    UncachedForward,
)
from kvconform_specs.reference.oracle import Expected, Generation, ReferenceForward, expect

Facts = Mapping[str, int]
"""What holds of one output token: numbers, and 0 or 1 for what holds or does not."""
FINE, UNTOLD, MISSING = ".", "?", "-"
BLANK = frozenset((FINE, UNTOLD, MISSING))
"""Letters that show nothing wrong."""


@dataclass(frozen=True)
class Cell:
    """One output token of a probe. status: ``ok``, ``bad``, ``raised``. first: nothing was wrong before in what its
    sequence had gone through. parts: the heads, logits or channels that are off."""

    probe: str
    step: int
    row: int
    column: int
    status: str
    first: bool
    facts: Facts
    parts: tuple[int, ...] = ()


@dataclass(frozen=True)
class Symptom:
    """What one probe showed. ``outputs[i]``: what step ``i`` gave and its bound, ``(b, t, e)``, None where it has none
    (token ids ``(b, new, 1)`` of a generation, and zero);
    ``words``: its first output that is off, in words, or what else is; empty where nothing is."""

    probe: Probe
    cells: tuple[Cell, ...]
    pattern: str
    words: str
    outputs: tuple[tuple[Array, Array] | None, ...]

    @property
    def off(self) -> bool:
        return bool(set(self.pattern) - BLANK)


@dataclass
class Truth:
    """What outputs are judged by, computed once for each program."""

    precision: Precision
    own: Callable[[Config], ReferenceForward] | None = None
    known: dict[Program, tuple[Expected | None, ...]] = field(default_factory=dict)

    def expected(self, program: Program) -> tuple[Expected | None, ...]:
        """Raises WorkerDied where a black box's own forward does."""
        found = self.known.get(program)
        if found is None:
            own = None if self.own is None else self.own(program.config)
            found = self.known[program] = expect(program, (0,), self.precision, own)
        return found


def symptom(probe: Probe, trace: Trace, truth: Truth, claims: Claims, later: bool = True) -> Symptom:
    """What a probe's trace shows; ``later``: something ran before in the process. Raises WorkerDied where a black box's own
    forward does."""
    return _Reading(probe, trace, truth.expected(probe.program), claims, later).symptom()


class _Reading:
    """Goes through a trace step by step."""

    def __init__(
        self, probe: Probe, trace: Trace, expected: Sequence[Expected | None], claims: Claims, later: bool
    ) -> None:
        self.probe, self.trace, self.expected, self.claims, self.later = probe, trace, expected, claims, later
        self.config = probe.program.config
        self.cells: list[Cell] = []
        self.letters: list[str] = []
        self.outputs: list[tuple[Array, Array] | None] = []
        self.words = ""
        self.histories = Histories()
        self.facts: dict[str, dict[str, int]] = {}  # of each open sequence
        self.tainted: set[str] = set()
        self.everywhere: set[bool] = set()  # whether all heads were off, of each output that is

    def symptom(self) -> Symptom:
        for number, step in enumerate(self.probe.program.steps):
            self._follow(number)
            before = {name: [len(row) for row in rows] for name, rows in self.histories.rows.items()}
            self.histories.apply(step)
            done = self.trace[number] if number < len(self.trace) else None
            self.letters.append(self._letters(number, done, before) + self._told(number, done))
        if self.config.profile == "attention" and self.everywhere:
            self.letters.append("a" if self.everywhere == {True} else "s")
        else:
            self.letters.append(UNTOLD if self.config.profile != "attention" else FINE)
        return Symptom(self.probe, tuple(self.cells), "".join(self.letters), self.words, tuple(self.outputs))

    def _letters(self, number: int, done: StepResult | None, before: Mapping[str, Sequence[int]]) -> str:
        step, want = self.probe.program.steps[number], self.expected[number]
        if isinstance(step, Generate):
            return self._loop(number, step, done, want)
        if not isinstance(step, Append | UncachedForward) or want is None:
            self.outputs.append(None)
            if done is None:
                return MISSING
            if done.error is not None:
                self._say(number, f"raised {done.error}")
                return "!"
            if isinstance(step, Reject) and done.refused is None:
                self._say(number, "was accepted and must be refused")
                return "A"
            return self._read(number, done, want) if isinstance(step, ReadCache) and want is not None else FINE
        rows = len(step.counts)
        if done is None:
            self.outputs.append(None)
            return MISSING * rows
        if done.error is not None:
            self.outputs.append(None)
            self._say(number, f"raised {done.error}")
            self._add(number, before, np.ones((rows, max(step.counts)), np.bool_), None, "raised")
            self.tainted.add(step.seq)
            return "!" * rows
        if self.claims.returns == "last" and isinstance(step, Append):
            want = want.last()
        got = flat(done.output, self.config, want)
        if got is None:
            self.outputs.append(None)
            self._say(number, "its output has another shape")
            self._add(number, before, np.array(want.real), None, "bad")
            self.tainted.add(step.seq)
            return "#" * rows
        with np.errstate(invalid="ignore"):
            error = np.abs(got - want.value[0])
            off = ~(error <= want.bound_lower[0]) & want.real[..., None]
            if off.any():
                off = ~(error <= want.bound[0]) & want.real[..., None]
        self.outputs.append((got, want.bound[0] if off.any() else want.bound_lower[0]))
        bad: Array = np.asarray(off.any(axis=-1))
        self._add(number, before, bad, off, "bad", want)
        if bad.any():
            self._say_value(number, want, got, off)
            self.tainted.add(step.seq)
        finite: Array = np.asarray(np.isfinite(got).all(axis=-1))
        return "".join(_letter(bad[row][real], finite[row][real]) for row, real in enumerate(want.real))

    def _add(
        self,
        number: int,
        before: Mapping[str, Sequence[int]],
        bad: Array,
        off: Array | None,
        status: str,
        want: Expected | None = None,
    ) -> None:
        step = self.probe.program.steps[number]
        assert isinstance(step, Append | UncachedForward)
        cached = before.get(step.seq, [0] * len(step.counts)) if isinstance(step, Append) else [0] * len(step.counts)
        real = want.real if want is not None else np.ones(bad.shape, bool)
        common = self._common(number, cached)
        for row, count in enumerate(step.counts):
            columns = np.flatnonzero(real[row])
            for index, column in enumerate(columns):
                place = count - len(columns) + index  # of the step's tokens of this row; the last alone may be there
                parts = () if off is None else self._parts(off[row, column])
                wrong = bool(bad[row, column])
                if wrong and parts and self.config.profile == "attention":
                    self.everywhere.add(len(parts) == self.config.heads)
                length = cached[row] + count
                facts = common | {
                    "row": row,
                    "past": cached[row],
                    "q": count,
                    "position": cached[row] + place,
                    "length": length,
                    "first token of the step": place == 0,
                    "last token of the step": place == count - 1,
                    "full": length == self.config.capacity,
                    "last row": row == len(step.counts) - 1,
                    "longest": length == max(c + n for c, n in zip(cached, step.counts, strict=True)),
                }
                first = step.seq not in self.tainted
                self.cells.append(
                    Cell(self.probe.name, number, row, int(column), status if wrong else "ok", first, facts, parts)
                )

    def _common(self, number: int, cached: Sequence[int]) -> dict[str, int]:
        step = self.probe.program.steps[number]
        assert isinstance(step, Append | UncachedForward)
        appended = isinstance(step, Append)
        padded = isinstance(step, Append) and step.pad is not None and step.pad[0] == "left"
        return self.facts.get(step.seq, {}) | {
            "whole": not appended,
            "batch": len(step.counts),
            "ragged": len(set(step.counts)) > 1,
            "left padding": padded,
            "uneven": len({*(a + b for a, b in zip(cached, step.counts, strict=True))}) > 1,
            "hidden": isinstance(step, Append) and bool(step.masked),
            "large_queries": step.distribution == "large_queries",
            "layout": isinstance(step, Append) and step.layout != "contiguous",
            "zero_keys": step.distribution == "zero_keys",
            "small_keys_large_values": step.distribution == "small_keys_large_values",
            "shared": isinstance(step, Append) and step.in_place,
            "alone": step.last_only,
        }

    def _parts(self, off: Array) -> tuple[int, ...]:
        elements = np.flatnonzero(off)
        if self.config.profile == "attention":
            elements = np.unique(elements // self.config.head_dim)
        return tuple(int(element) for element in elements)

    def _follow(self, number: int) -> None:
        """Keeps what each sequence has gone through, before step ``number``."""
        step = self.probe.program.steps[number]
        if isinstance(step, Reject):
            self.facts.setdefault(step.step.seq, {})["after a refused call"] = 1
            return
        own = self.facts.setdefault(step.seq, {})
        if isinstance(step, Append):
            if "appends" not in own:
                others = any("appends" in facts for name, facts in self.facts.items() if name != step.seq)
                own["after another sequence"] = others
                own["after another sequence in the process"] = others or self.later
            own["appends"] = own.get("appends", 0) + 1
            own["decodes"] = own.get("decodes", 0) + (max(step.counts) == 1)
        elif isinstance(step, Fork | AliasHandle):
            word = "fork" if isinstance(step, Fork) else "keep"
            own[f"after a {word}"] = 1
            self.facts[step.into] = {**own, f"copy of a {word}": 1}
            if step.seq in self.tainted:
                self.tainted.add(step.into)
        elif isinstance(step, Reset):
            self.facts[step.seq] = {"after a reset": 1, "appends": 0}
            self.tainted.discard(step.seq)
        elif isinstance(step, Close):
            own["closed"] = 1
            self.tainted.discard(step.seq)
        elif isinstance(step, Truncate):
            own["after a truncation"] = 1
        elif isinstance(step, Reorder):
            own["after a reorder"] = 1
        elif not isinstance(step, UncachedForward | ReadCache):
            own["after poison"] = 1

    def _told(self, number: int, done: StepResult | None) -> str:
        """Length and room as the backend tells them after a step."""
        step = self.probe.program.steps[number]
        rows = [len(row) for row in self.histories.rows.get(getattr(step, "seq", ""), ())]
        letters = ""
        for name, letter, right in (
            ("length", "l", rows),
            ("free_slots", "r", [self.config.capacity - length for length in rows]),
        ):
            told = None if done is None else done.reported.get(name)
            wrong = told is not None and list(told) != right
            if wrong:
                self._say(number, f"tells {name} {list(told or ())}, want {right}")
            letters += UNTOLD if told is None else letter if wrong else FINE
        return letters

    def _read(self, number: int, done: StepResult, want: Expected) -> str:
        held, got = done.reported.get("token_counts", ()), done.output
        if got is None or got.shape[-1] != want.value.shape[-1]:
            return "#"
        for row, tokens in enumerate(held):
            length = len(want.rows[row])
            if tokens > length or (tokens < length and self.claims.retention == "all"):
                self._say(number, f"shows {tokens} tokens of row {row}, which holds {length}")
                return "H" if tokens > length else "h"
            value, bound = (x[0, row, length - tokens : length] for x in (want.value, want.bound))
            mine = got[0, row, :tokens]
            if not bool(np.all((np.abs(mine - value) <= bound) | np.isnan(mine))):
                self._say(number, f"shows other keys or values of row {row} than were appended")
                return "x"
        return FINE

    def _loop(self, number: int, step: Generate, done: StepResult | None, want: Expected | None) -> str:
        """A generation is judged as a whole: what its tokens are picked from is not shown."""
        got = None if done is None or done.error is not None else done.output
        # token ids are equal or not
        self.outputs.append(None if got is None or got.ndim != 3 else (got[0, ..., None], np.zeros((1, 1, 1))))
        if done is None:
            return MISSING
        if done.error is not None:
            self._say(number, f"raised {done.error}")
            return "!"
        return self._generated(number, step, done, want) if isinstance(want, Generation) else FINE

    def _generated(self, number: int, step: Generate, done: StepResult, want: Generation) -> str:
        if done.output is None or done.output.shape != (1, len(step.counts), step.new) or done.output.dtype != np.int64:
            self._say(number, "it is no list of as many tokens as were asked for")
            return "#"
        alone = Observed(Program(self.config, (step,)), (done,), (want,), (None,), self.claims)
        words, _compared, _worst = generated([alone])
        if words is not None:
            self._say(number, words.removeprefix(f"{at(alone.program, 0)}, "))
        return FINE if words is None else "x"

    # --- words ---
    def _say(self, number: int, words: str) -> None:
        if not self.words:
            self.words = f"step {number} ({describe(self.probe.program, number)}): {words}"

    def _say_value(self, number: int, want: Expected, got: Array, off: Array) -> None:
        row, column = (int(i) for i in np.argwhere(off.any(axis=-1))[0])
        later = int(np.count_nonzero(want.real[row, column:]))
        position, wrong = len(want.rows[row]) - later, np.flatnonzero(off[row, column])
        parts = self._parts(off[row, column])
        noun = {"attention": "head", "decoder": "logit"}.get(self.config.profile, "channel")
        count = self.config.heads if noun == "head" else self.config.outputs
        which = f"every {noun}" if len(parts) == count else f"{noun}{'s' if len(parts) > 1 else ''} {_some(parts)}"
        element = int(wrong[np.argmax(np.nan_to_num(np.abs(got - want.value[0])[row, column, wrong], nan=np.inf))])
        value = want.value[0, row, column, element]
        self._say(
            number, f"row {row}, position {position}, {which}: got {got[row, column, element]:.4g}, want {value:.4g}"
        )


def _some(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:4])) + (" …" if len(numbers) > 4 else "")


def flat(output: Array | None, config: Config, want: Expected) -> Array | None:
    """``(b, t, e)`` of one variant, or None where the shape or dtype is another."""
    b, t = want.real.shape
    shape = (b, config.heads, t, config.head_dim) if config.profile == "attention" else (b, t, config.outputs)
    if output is None or output.shape[1:] != shape or output.dtype != np.float32:
        return None
    got = output[0]
    return np.asarray(got.swapaxes(1, 2).reshape(b, t, -1)) if config.profile == "attention" else got


def _letter(bad: Array, finite: Array) -> str:
    """Which of a row's columns are off: ``x`` all, ``f`` the first, ``l`` the last, ``b`` all but the first, ``e`` all
    but the last, ``m`` others; ``N`` where one is not finite."""
    if not bad.any():
        return FINE
    if not finite.all():
        return "N"
    if bad.all():
        return "x"
    count = int(bad.sum())
    if count == 1 and (bad[0] or bad[-1]):
        return "f" if bad[0] else "l"
    if count == len(bad) - 1 and not (bad[0] and bad[-1]):
        return "e" if bad[0] else "b"
    return "m"


def alike(mine: Symptom, its: Symptom) -> bool:
    """Whether two runs of one probe have the same outputs, bad ones included, within the sum of their bounds."""
    if mine.pattern != its.pattern:
        return False
    for one, other in zip(mine.outputs, its.outputs, strict=True):
        if one is None or other is None or one[0].shape != other[0].shape:
            if one is not other:
                return False
            continue
        with np.errstate(invalid="ignore"):
            near = (np.abs(one[0] - other[0]) <= one[1] + other[1]) | (one[0] == other[0])
        # columns without a token have no bound
        if not bool(np.all(near | (np.isnan(one[0]) & np.isnan(other[0])) | np.isnan(one[1]))):
            return False
    return True
