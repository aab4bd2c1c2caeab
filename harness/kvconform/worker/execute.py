"""Runs one program on one built backend and records what it did. Here is the one place that calls a backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, assert_never

import numpy as np
from numpy.typing import NDArray

from kvconform.errors import Raised
from kvconform.worker.caller_memory import CallerMemory, Overwritten, changed, room
from kvconform_specs.history import Histories
from kvconform_specs.program import (
    POISONS,
    AliasHandle,
    Append,
    Call,
    Close,
    Fork,
    Generate,
    Poison,
    Program,
    ReadCache,
    Reject,
    Reorder,
    Reset,
    Run,
    Step,
    Truncate,
    UncachedForward,
    called,
)
from kvconform_specs.tensors import Streams, malformed, mask

Array = NDArray[Any]
Feed = tuple[tuple[Array, ...], dict[str, Any]]
"""What a step hands to the backend: inputs and keywords."""
INPUTS = {"attention": ("query", "key", "value"), "decoder": ("token ids",), "hidden": ("hidden states",)}
"""What the inputs are called."""


class NotNumeric(TypeError):
    """A step gave something that is no array of numbers: ``returned`` is its type's name."""

    def __init__(self, output: object) -> None:
        self.returned = type(output).__name__
        super().__init__(f"the step gave {self.returned}, want an array of numbers")


@dataclass(frozen=True)
class StepResult:
    """What one step did. ``reported``: what the backend reports, by the names of its abilities: ``length`` and
    ``free_slots`` of each row, ``bytes``, ``graph_count``, ``macs``; and ``token_counts``, the tokens of each row that
    a read showed.

    ``error``: what a legal step raised. ``refused``: what a ``reject`` step raised. ``returned``: the name of the type
    that a step gave instead of an array of numbers, which is also an ``error``. input_changed: what the step, or a
    later one, wrote into the memory of its inputs. output_changed: what later steps of the program wrote into its
    output; ``output`` is then a copy of what it was when it was returned.
    """

    output: Array | None = None
    reported: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    error: Raised | None = None
    refused: Raised | None = None
    returned: str | None = None
    input_changed: Overwritten | None = None
    output_changed: Overwritten | None = None


Trace = tuple[StepResult, ...]
"""One entry for each step, to where the program stopped: after an ``error`` there is none."""


def execute(
    backend: Any,
    program: Program,
    indices: tuple[int, ...],
    at: Callable[[int, int], None] = lambda variant, step: None,
) -> list[Trace]:
    """The traces of the program's variants, one after another. ``at(variant, step)`` is called before each step."""
    feeds = feeds_of(program, indices)
    return [_traced(backend, program, feeds, variant, at) for variant in range(len(indices))]


def _traced(backend: Any, program: Program, feeds: list[Feed], variant: int, at: Callable[[int, int], None]) -> Trace:
    caches: dict[str, Any] = {}
    trace: list[StepResult] = []
    returned: list[bytes | None] = []  # the outputs as they were then
    memories: list[CallerMemory | None] = []
    reused = _reused(program, feeds, variant)
    for number, step in enumerate(program.steps):
        at(variant, number)
        call, feed, memory = called(step), feeds[number], None
        if feed[0]:
            arrays = _arrays(program, step, feed, variant)
            memory = reused if reused is not None and _reuses(call) else CallerMemory(room(arrays))
            feed = _handed(memory.hand_over(arrays), feed)
        done = _guarded(backend, caches, step, feed)
        returned.append(None if done.output is None else done.output.tobytes())
        if memory is not None and (written := memory.overwritten()) is not None:
            done = replace(done, input_changed=written)
        if memory is not None and memory is reused:
            memory.overwrite()
        memories.append(None if memory is reused else memory)
        trace.append(done)
        if done.error is not None:
            break
    for name in list(caches):  # what a program leaves open is ended; how that goes belongs to no step
        _guarded(backend, caches, Close(name), ((), {}))
    return tuple(_kept(*ends) for ends in zip(trace, memories, returned, strict=True))


# --- the caller's memory ---
def _reuses(call: Call) -> bool:
    return isinstance(call, Append) and call.reused


def _reused(program: Program, feeds: list[Feed], variant: int) -> CallerMemory | None:
    """The memory that all steps share which ask for it."""
    asked = [n for n, step in enumerate(program.steps) if _reuses(called(step))]
    sizes = [room(_arrays(program, program.steps[n], feeds[n], variant)) for n in asked]
    return CallerMemory(max(sizes)) if sizes else None


def _arrays(program: Program, step: Step, feed: Feed, variant: int) -> list[tuple[str, Array, str]]:
    """Name, numbers and layout of each array that a step hands over."""
    inputs, keywords = feed
    given, call = tuple(x[variant] for x in inputs), called(step)
    if isinstance(step, Reject) and isinstance(step.step, Append) and step.wrong:
        given = malformed(given, step.wrong, program.config)
    layout = call.layout if isinstance(call, Append) else "contiguous"
    named = [(name, x, layout) for name, x in zip(INPUTS[program.config.profile], given, strict=True)]
    return [*named, *((name, x, "contiguous") for name, x in keywords.items() if isinstance(x, np.ndarray))]


def _handed(views: list[Array], feed: Feed) -> Feed:
    """What a step is given, in the caller's memory."""
    inputs, keywords = feed
    arrays = iter(views[len(inputs) :])
    return tuple(views[: len(inputs)]), {
        name: next(arrays) if isinstance(x, np.ndarray) else x for name, x in keywords.items()
    }


def _kept(done: StepResult, memory: CallerMemory | None, returned: bytes | None) -> StepResult:
    """The result with the output as it was when the step returned it, and what later steps have done to it and to the
    inputs."""
    if memory is not None and done.input_changed is None and (written := memory.overwritten()) is not None:
        done = replace(done, input_changed=replace(written, later=True))
    if done.output is None or returned is None or done.output.tobytes() == returned:
        return done
    before = np.frombuffer(returned, done.output.dtype).reshape(done.output.shape)
    return replace(done, output=before, output_changed=changed("output", before, done.output))


def feeds_of(program: Program, indices: tuple[int, ...]) -> list[Feed]:
    """What each step hands over, inputs with all variants in front; steps that compute nothing hand over nothing."""
    streams = Streams(program.config, program.span, indices)
    histories = Histories()
    feeds: list[Feed] = []
    for step in program.steps:
        call = called(step)
        if isinstance(call, Append):
            grown = histories.after(call)
            feeds.append((streams.inputs(call, grown), _keywords(call, grown)))
        elif isinstance(call, UncachedForward):
            feeds.append((streams.inputs(call, histories.after(call)), _of_run(call)))
        else:
            feeds.append(((), {}))
        histories.apply(step)
    return feeds


def _keywords(step: Append, grown: tuple[Any, ...]) -> dict[str, Any]:
    """Those of ``Backend.step`` that the step asks for."""
    asked: dict[str, Any] = {}
    if len(set(step.counts)) > 1:
        asked["counts"] = np.array(step.counts)
        if step.pad is not None and step.pad[0] == "left":
            asked["padding"] = "left"
    if step.masked:
        asked["mask"] = mask(step, grown)
    asked |= {name: True for name in ("in_place", "count_macs") if getattr(step, name)}
    return asked | _of_run(step)


def _of_run(step: Run) -> dict[str, Any]:
    """Those that appends and forwards without a cache have in common."""
    return ({"last_only": True} if step.last_only else {}) | ({"context": step.context} if step.context else {})


def _guarded(backend: Any, caches: dict[str, Any], step: Step, feed: Feed) -> StepResult:
    open_before = set(caches)
    try:
        return _do(backend, caches, called(step), feed)
    except Exception as error:  # noqa: BLE001 - the one place that calls a backend; it records words, decides nothing
        raised = Raised.of(error)
        if not isinstance(step, Reject):
            return StepResult(error=raised, returned=error.returned if isinstance(error, NotNumeric) else None)
        for name in set(caches) - open_before:  # a refused call opens no sequence
            del caches[name]
        return StepResult(refused=raised)


def _do(backend: Any, caches: dict[str, Any], step: Call, feed: Feed) -> StepResult:
    inputs, keywords = feed
    match step:
        case Append(seq, counts):
            if seq not in caches:
                caches[seq] = backend.start(len(counts))
            output, caches[seq] = backend.step(caches[seq], *inputs, **keywords)
            return StepResult(_array(output), _reported(backend, caches[seq], step.count_macs))
        case Generate(new=new):
            return StepResult(_array(backend.generate(*inputs, new, **keywords)))
        case UncachedForward():
            return StepResult(_array(backend.uncached_forward(*inputs, **keywords)))
        case ReadCache(seq):
            output, token_counts = _contents(backend.contents(caches[seq]))
            return StepResult(output, {"token_counts": token_counts})
        case Close(seq):
            cache = caches.pop(seq)
            if not any(cache is other for other in caches.values()):
                backend.close(cache)
            return StepResult()
        case Truncate(seq, length):
            caches[seq] = backend.truncate(caches[seq], length if isinstance(length, int) else list(length))
        case Fork(seq, into):
            caches[into] = backend.fork(caches[seq])
        case AliasHandle(seq, into):
            caches[into] = caches[seq]
        case Reorder(seq, rows):
            caches[seq] = backend.reorder(caches[seq], list(rows))
        case Reset(seq):
            caches[seq] = backend.reset(caches[seq])
        case Poison(seq, keys, values):
            backend.poison(caches[seq], POISONS[keys], POISONS[values])
        case _:
            assert_never(step)
    return StepResult(reported=_reported(backend, caches[step.seq]))


def _reported(backend: Any, cache: Any, count_macs: bool = False) -> dict[str, tuple[int, ...]]:
    """What the backend says about the sequence that a step was about, as far as it claims to know."""
    can = backend.claims.can
    reported = {
        name: tuple(int(n) for n in getattr(backend, name)(cache)) for name in ("length", "free_slots") if can(name)
    }
    if can("bytes"):
        reported["bytes"] = (int(backend.bytes(cache)),)
    if can("graph_count"):
        reported["graph_count"] = (int(backend.graph_count()),)
    if count_macs:
        reported["macs"] = (int(backend.macs()),)
    return reported


def _array(output: Any) -> Array:
    array = np.asarray(output)
    if array.dtype.kind not in "fiub":
        raise NotNumeric(output)
    return array


def _contents(layers: Any) -> tuple[Array, tuple[int, ...]]:
    """``(b, s, n)``: the numbers of a token by layer, key and value, head, dim; rows that hold fewer tokens end in
    NaN. Where layers hold different numbers of tokens the newest are side by side, and what a layer evicted is NaN."""
    token_counts = tuple(max(layer[row][0].shape[1] for layer in layers) for row in range(len(layers[0])))
    stops = list(accumulate(x.shape[0] * x.shape[2] for layer in layers for x in layer[0]))
    output = np.full((len(token_counts), max(token_counts), stops[-1]), np.nan, np.float32)
    for row, tokens in enumerate(token_counts):
        parts = (x for layer in layers for x in layer[row])
        for x, start, stop in zip(parts, (0, *stops), stops, strict=False):
            output[row, tokens - x.shape[1] : tokens, start:stop] = x.swapaxes(0, 1).reshape(-1, stop - start)
    return output, token_counts
