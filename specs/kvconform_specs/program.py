"""A program: a config, and steps over named sequences, as frozen data.

It can be printed, compared and stored as JSON, and it contains no tensor: contents come from seeds (``tensors.py``).
A *sequence* is a batch of rows that grow together. The content of a row is a *stream*: an endless series of tokens
that a seed identifies. Row ``r`` of a step with seed ``s`` reads stream ``s + r`` from the row's current length on. The
same seed gives the same tokens however they are split into steps, and row ``r`` alone is seed ``s + r``.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from kvconform_specs.config import Config
from kvconform_specs.errors import SpecError
from kvconform_specs.legal import check
from kvconform_specs.steps import (
    DISTRIBUTIONS,
    LAYOUTS,
    MALFORMED,
    MAX_SEED,
    NAMES,
    OPS,
    POISONS,
    AliasHandle,
    Append,
    Call,
    Close,
    Fork,
    Generate,
    Lengths,
    Marks,
    Poison,
    ReadCache,
    Reject,
    Reorder,
    Reset,
    Run,
    Sequences,
    Step,
    Truncate,
    UncachedForward,
    called,
)
from kvconform_specs.typed import checked, take, tuples

__all__ = [
    "DISTRIBUTIONS",
    "LAYOUTS",
    "MALFORMED",
    "MAX_SEED",
    "NAMES",
    "OPS",
    "POISONS",
    "AliasHandle",
    "Append",
    "Call",
    "Close",
    "Fork",
    "Generate",
    "Lengths",
    "Marks",
    "Poison",
    "Program",
    "ReadCache",
    "Reject",
    "Reorder",
    "Reset",
    "Run",
    "Sequences",
    "Step",
    "Truncate",
    "UncachedForward",
    "called",
    "step_from_json",
    "step_to_json",
]


@dataclass(frozen=True, slots=True)
class Program:
    """Steps over named sequences under one config. Raises SpecError where a step is not legal."""

    config: Config
    steps: tuple[Step, ...]

    def __post_init__(self) -> None:
        lengths = Lengths()
        for index, step in enumerate(self.steps):
            check(self.config, lengths, step, f"steps[{index}]")
            lengths.apply(step)

    @property
    def span(self) -> int:
        """An upper bound of the positions of its streams that the program reaches."""
        return sum(max(s.counts) for s in map(called, self.steps) if isinstance(s, Append | UncachedForward))

    @property
    def size(self) -> tuple[int, int]:
        """Number of steps, then of tokens; shrinking reduces it."""
        tokens = sum(sum(s.counts) for s in self.steps if isinstance(s, Append | UncachedForward))
        return len(self.steps), tokens + sum(s.new * len(s.counts) for s in self.steps if isinstance(s, Generate))

    def to_json(self) -> dict[str, Any]:
        return {"config": self.config.to_json(), "steps": [step_to_json(step) for step in self.steps]}

    @classmethod
    def from_json(cls, data: object, at: str = "program") -> Program:
        known = take(data, at, {"config", "steps"})
        if missing := [name for name in ("config", "steps") if name not in known]:
            raise SpecError(f"{at}.{missing[0]}", "is missing")
        config = Config.from_json(known["config"], f"{at}.config")
        if not isinstance(known["steps"], list):
            raise SpecError(f"{at}.steps", f"want a list, got {type(known['steps']).__name__}")
        return cls(config, tuple(step_from_json(s, f"{at}.steps[{i}]") for i, s in enumerate(known["steps"])))


def step_to_json(step: Step) -> dict[str, Any]:
    """A step as JSON, without the fields that have their default."""
    body = {f.name: getattr(step, f.name) for f in fields(step) if getattr(step, f.name) != f.default}
    if isinstance(step, Reject):
        body["step"] = step_to_json(step.step)
    return {"op": NAMES[type(step)], **body}


def step_from_json(data: object, at: str) -> Step:
    if not isinstance(data, dict):
        raise SpecError(at, f"want an object, got {type(data).__name__}")
    op = data.get("op")
    if not isinstance(op, str) or op not in OPS:
        raise SpecError(f"{at}.op", f"unknown op {op!r}; known: {', '.join(sorted(OPS))}")
    kind = OPS[op]
    body = take({key: value for key, value in data.items() if key != "op"}, at, {f.name for f in fields(kind)})
    if kind is Reject:
        inner = step_from_json(body.get("step"), f"{at}.step")
        if not isinstance(inner, Append | Truncate | Reorder):
            raise SpecError(f"{at}.step", f"want append, truncate or reorder, got {NAMES[type(inner)]}")
        return Reject(inner, str(body.get("wrong", "")))
    values = {key: tuples(value) for key, value in body.items()}
    checked(kind, values, at)
    step: Step = kind(**values)
    return step
