"""Runs one program on one built subject and records what it did. Here is the one place that calls a subject."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvconform_specs.history import Histories, after
from kvconform_specs.program import (
    Append,
    Call,
    Close,
    Fork,
    Full,
    Program,
    Reject,
    Reorder,
    Reset,
    Step,
    Truncate,
    called,
)  # fmt: skip
from kvconform_specs.tensors import Streams

Array = NDArray[Any]


@dataclass(frozen=True)
class Done:
    """What one step did. ``length`` is what the subject says that its rows hold, where it claims to know.

    ``refused``: a ``reject`` step raised, with these words. ``error``: a legal step raised, with these words.
    """

    output: Array | None = None
    length: tuple[int, ...] | None = None
    error: str | None = None
    refused: str | None = None


Trace = tuple[Done, ...]
"""One entry for each step, to where the program stopped: after an ``error`` there is none."""


def record(
    subject: Any,
    program: Program,
    indices: tuple[int, ...],
    at: Callable[[int, int], None] = lambda variant, step: None,
) -> list[Trace]:
    """The traces of the program's variants, one after another. ``at(variant, step)`` is called before each step."""
    feeds = inputs_of(program, indices)
    traces = []
    for variant in range(len(indices)):
        caches: dict[str, Any] = {}
        trace: list[Done] = []
        for number, step in enumerate(program.steps):
            at(variant, number)
            trace.append(_guarded(subject, caches, step, tuple(feed[variant] for feed in feeds[number])))
            if trace[-1].error is not None:
                break
        for name in list(caches):  # what a program leaves open is ended; how that goes belongs to no step
            _guarded(subject, caches, Close(name), ())
        traces.append(tuple(trace))
    return traces


def inputs_of(program: Program, indices: tuple[int, ...]) -> list[tuple[Array, ...]]:
    """What each step hands to the subject, all variants in front; steps that compute nothing hand over nothing."""
    streams = Streams(program.config, program.span, indices)
    histories = Histories()
    feeds: list[tuple[Array, ...]] = []
    for step in program.steps:
        call = called(step)
        if isinstance(call, Append):
            old = histories.rows.get(call.seq, ((),) * len(call.counts))
            feeds.append(streams.inputs(call, after(old, call)))
        elif isinstance(call, Full):
            feeds.append(streams.inputs(call, after(((),) * len(call.counts), call)))
        else:
            feeds.append(())
        histories.apply(step)
    return feeds


def _guarded(subject: Any, caches: dict[str, Any], step: Step, feed: tuple[Array, ...]) -> Done:
    try:
        return _do(subject, caches, called(step), feed)
    except Exception as raised:  # noqa: BLE001 - the one place that calls a subject; it records words, decides nothing
        words = f"{type(raised).__name__}: {str(raised).strip() or 'no message'}"[:500]
        words = words.encode(errors="replace").decode()  # a lone surrogate could not be written to a results file
        return Done(refused=words) if isinstance(step, Reject) else Done(error=words)


def _do(subject: Any, caches: dict[str, Any], step: Call, feed: tuple[Array, ...]) -> Done:
    output = None
    if isinstance(step, Append):
        if step.seq not in caches:
            caches[step.seq] = subject.start(len(step.counts))
        ragged = {"counts": np.array(step.counts)} if len(set(step.counts)) > 1 else {}
        output, caches[step.seq] = subject.step(caches[step.seq], *feed, **ragged)
    elif isinstance(step, Full):
        output = subject.full(*feed)
    elif isinstance(step, Truncate):
        caches[step.seq] = subject.truncate(caches[step.seq], step.length)
    elif isinstance(step, Fork):
        caches[step.into] = subject.fork(caches[step.seq])
    elif isinstance(step, Reorder):
        caches[step.seq] = subject.reorder(caches[step.seq], list(step.rows))
    elif isinstance(step, Reset):
        caches[step.seq] = subject.reset(caches[step.seq])
    elif isinstance(step, Close):
        cache = caches.pop(step.seq)
        if hasattr(subject, "close"):
            subject.close(cache)
    length = None
    if step.seq in caches and subject.claims.can("length") and not isinstance(step, Full):
        length = tuple(int(n) for n in subject.length(caches[step.seq]))
    array = None if output is None else np.asarray(output)
    if array is not None and array.dtype.kind not in "fiub":
        raise TypeError(f"the step gave {type(output).__name__}, want an array of numbers")
    return Done(array, length)
