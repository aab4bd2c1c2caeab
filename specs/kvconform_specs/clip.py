"""Programs of drafted steps: whatever is drawn, no row exceeds the capacity, at any capacity from 1 up."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from kvconform_specs.config import Config
from kvconform_specs.program import Append, Generate, Lengths, Program, Reject, Reorder, Step, Truncate, UncachedForward


def clipped(config: Config, steps: Iterable[Step]) -> Program:
    """The program of these steps, with appends cut so that no row exceeds the capacity. What that leaves without a
    token, or without its sequence, is left out."""
    lengths = Lengths()
    kept: list[Step] = []
    for step in steps:
        fit = _clipped(config.capacity, lengths, step)
        if fit is not None:
            kept.append(fit)
            lengths.apply(fit)
    return Program(config, tuple(kept))


def _clipped(capacity: int, lengths: Lengths, step: Step) -> Step | None:
    if isinstance(step, Reject):
        inner = _clipped(capacity, lengths, step.step) if step.wrong else step.step
        assert inner is None or isinstance(inner, Append | Truncate | Reorder)
        return None if inner is None else replace(step, step=inner)
    if isinstance(step, Generate):
        count = min(*step.counts, capacity - 1)
        return replace(step, counts=(count,) * len(step.counts), new=min(step.new, capacity - count)) if count else None
    if isinstance(step, Append | UncachedForward):
        old = (lengths.of(step.seq) if isinstance(step, Append) else ()) or (0,) * len(step.counts)
        counts = tuple(min(count, capacity - length) for count, length in zip(step.counts, old, strict=True))
        if max(counts) < 1 and (any(step.counts) or not any(old)):
            return None
        ends = tuple(a + b for a, b in zip(old, counts, strict=True))
        kept = tuple(one for one in step.substitutions if one[1] < ends[one[0]])
        if isinstance(step, Append):
            step = replace(step, masked=tuple((row, at) for row, at in step.masked if at < ends[row]))
        return replace(step, counts=counts, substitutions=kept)
    rows = lengths.of(step.seq)
    if isinstance(step, Truncate) and rows:
        if isinstance(step.length, int):
            return replace(step, length=min(step.length, *rows))
        return replace(step, length=tuple(map(min, step.length, rows)))
    return step if rows else None
