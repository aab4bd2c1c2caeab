"""Trials: random programs on which a condition is tested that was found on others.

They are functions of their numbers alone. Each has its own streams, and stays within the claims.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from random import Random

from kvconform.explain.diagnosis.probes import Probe, first_stream
from kvconform_specs.any_history import refusals
from kvconform_specs.claimed import claimed
from kvconform_specs.claims import Claims
from kvconform_specs.config import Config
from kvconform_specs.errors import SpecError
from kvconform_specs.program import (
    LAYOUTS,
    Append,
    Close,
    Fork,
    Lengths,
    Poison,
    Program,
    Reorder,
    Reset,
    Step,
    Truncate,
    UncachedForward,
)
from kvconform_specs.static_shapes import in_static_shapes

SCALES = ("normal", "large_queries", "zero_keys", "small_keys_large_values")
"""The distributions of trials: of finite numbers."""
LONGEST, LARGEST, ROWS = 26, 9, 3
"""The most tokens of a row, tokens of a step, and rows of a trial."""
RARELY = 0.12
"""The probability of an option or an operation that a claim allows, at each step."""

IN_CONTEXTS = 3
"""Every so many-th trial is in several contexts, where there are some."""


def trials(config: Config, claims: Claims, numbers: range) -> Iterator[Probe]:
    """The trials of these numbers, without those that do not fit the config."""
    for number in numbers:
        name = f"trial {number}"
        steps = _Draw(config, claims, number, first_stream(name)).steps()
        if config.contexts > 1 and claims.can("contexts") and number % IN_CONTEXTS == 0:
            steps = _in_contexts(steps, config.contexts)
        try:
            program = in_static_shapes(Program(config, tuple(steps)), claims)
        except SpecError:
            continue
        if steps and claimed(program.steps, claims):
            yield Probe(name, "a random program", program)


def _in_contexts(steps: list[Step], contexts: int) -> list[Step]:
    """The same steps, each sequence in a context of its own: 1 for the first, 0 for the second of two."""
    of: dict[str, int] = {}
    made: list[Step] = []
    for step in steps:
        if isinstance(step, Fork):
            of[step.into] = of[step.seq]
        if isinstance(step, Append | UncachedForward):
            context = of.setdefault(step.seq, (len(of) + 1) % contexts)
            step = replace(step, context=context)
        made.append(step)
    return made


class _Draw:
    """One program in the making."""

    def __init__(self, config: Config, claims: Claims, number: int, stream: int) -> None:
        self.config, self.claims, self.stream = config, claims, stream
        self.random = Random(number)
        self.lengths = Lengths()
        self.limit = min(LONGEST, config.capacity)
        self.names = ["a", "b"] if claims.can("two sequences") and self.happens(0.4) else ["a"]
        self.rows = 1 if self.happens(0.5) else self.between(1, min(claims.max_batch or ROWS, ROWS))
        self.ragged = claims.can("ragged") and self.rows > 1 and self.happens(0.4)
        self.layout, self.distribution = LAYOUTS[0], SCALES[0]
        if config.profile == "attention" and self.happens(RARELY):
            self.layout = self.one_of(LAYOUTS[:-1])
        if config.profile == "attention" and self.happens(2 * RARELY):
            self.distribution = self.one_of(SCALES)

    # ``Random.random`` is the one method whose numbers are the same in every version of Python
    def happens(self, probability: float) -> bool:
        return self.random.random() < probability

    def between(self, least: int, most: int) -> int:
        return least + int(self.random.random() * (most - least + 1))

    def one_of(self, values: tuple[str, ...] | list[str]) -> str:
        return values[self.between(0, len(values) - 1)]

    def steps(self) -> list[Step]:
        made: list[Step] = []
        for number in range(self.between(2, 8)):
            for drawn in (self.operations, self.append):
                for step in drawn(number):
                    self.lengths.apply(step)
                    made.append(step)
        return made

    def append(self, number: int) -> Iterator[Step]:
        seq = self.one_of(self.names)
        past = self.lengths.of(seq) or (0,) * self.rows
        most = min(self.limit - max(past), self.claims.max_chunk or LARGEST, LARGEST if any(past) else LONGEST)
        if most < 1:
            return
        size = 1 if self.happens(0.45) else self.between(1, most)
        counts = tuple(self.between(0, size) for _row in past) if self.ragged else (size,) * len(past)
        if not any(counts):
            return
        can, even = self.claims.can, len(set(counts)) == 1
        hidden = self.config.profile == "attention" and can("mask") and self.happens(RARELY)
        left = not even and can("left padding") and self.happens(0.5)
        yield Append(
            seq,
            counts,
            self.stream + 10 * number,
            masked=((0, self.between(0, past[0])),) if hidden and counts[0] and past[0] else (),
            pad=("left", self.stream + 900) if left else None,
            layout=self.layout,
            in_place=can("in_place") and self.happens(RARELY),
            last_only=self.config.profile == "decoder" and can("last_only") and even and self.happens(RARELY),
            distribution=self.distribution,
        )

    def operations(self, number: int) -> Iterator[Step]:
        """What comes before an append; seldom anything."""
        if self.claims.can("uncached_forward") and self.happens(RARELY):
            count = self.between(1, self.limit)
            yield UncachedForward("u", (count,) * self.rows, self.stream + 10 * number, distribution=self.distribution)
        seq = self.one_of(self.names)
        rows = self.lengths.of(seq)
        if not rows:
            return
        possible = ("truncate", "reset", "reorder", "fork", "close", "poison", "refusal")
        name = self.one_of(possible)
        if not self.happens(3 * RARELY) or not (name in ("close", "refusal") or self.claims.can(name)):
            return
        match name:
            case "truncate":
                yield Truncate(seq, self.between(0, min(rows)))
            case "reset":
                yield Reset(seq)
            case "reorder":
                count = self.between(1, min(self.claims.max_batch or ROWS, ROWS))
                yield Reorder(seq, tuple(self.between(0, len(rows) - 1) for _row in range(count)))
            case "fork" if self.claims.can("two sequences"):
                into = f"f{number}"
                self.names.append(into)
                yield Fork(seq, into)
            case "close":
                yield Close(seq)
            case "poison":
                yield Poison(seq, "junk", "junk")
            case "refusal":
                yield from refusals(self.config, self.claims, seq, rows, self.stream + 800)[:1]
