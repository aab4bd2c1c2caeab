"""How parent and worker talk: a frame is two lengths, a JSON header, and raw bytes. Standard library and numpy only.

One ``run`` message carries a whole program and the variants to run; one frame answers with all traces.
"""

from __future__ import annotations

import json
import struct
from dataclasses import asdict, astuple, dataclass, replace
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from kvconform.errors import Raised
from kvconform.worker.caller_memory import Overwritten
from kvconform.worker.execute import StepResult, Trace

LENGTHS = struct.Struct("<IQ")
"""Bytes of the header and of the blob behind it."""
PROGRESS = struct.Struct("<III")
"""In the progress file: a counter that rises with each step, the variant and the step under way."""
CHANGED = ("input_changed", "output_changed")
"""The fields of a ``StepResult`` about the caller's memory."""

Header = dict[str, Any]


def send(pipe: IO[bytes], header: Header, blob: bytes = b"") -> None:
    text = json.dumps(header).encode()
    pipe.write(LENGTHS.pack(len(text), len(blob)) + text + blob)
    pipe.flush()


def receive(pipe: IO[bytes]) -> tuple[Header, bytes] | None:
    """The next frame, or None at the end of the stream."""
    lengths = pipe.read(LENGTHS.size)
    if len(lengths) < LENGTHS.size:
        return None
    header, blob = LENGTHS.unpack(lengths)
    return json.loads(pipe.read(header)), pipe.read(blob)


@dataclass(frozen=True)
class Traces:
    """The traces of a program's variants: ``stacked`` where all went alike, outputs then ``(n, ...)``, else apart."""

    variants: int
    stacked: Trace | None
    separate: tuple[Trace, ...] = ()

    def apart(self) -> tuple[Trace, ...]:
        """One trace for each variant, outputs ``(1, ...)``."""
        if self.stacked is None:
            return self.separate
        return tuple(tuple(_variant(done, i) for done in self.stacked) for i in range(self.variants))


def pack(traces: list[Trace]) -> tuple[Header, bytes]:
    """Traces as header and blob. Variants that went alike are described once, arrays lie step by step."""
    notes = [[_note(done) for done in trace] for trace in traces]
    alike = all(note == notes[0] for note in notes[1:])
    if alike:
        arrays = [done.output for step in zip(*traces, strict=True) for done in step if done.output is not None]
    else:
        arrays = [done.output for trace in traces for done in trace if done.output is not None]
    header = {"variants": len(traces), "alike": alike, "steps": notes[:1] if alike else notes}
    return header, b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)


def unpack(header: Header, blob: bytes) -> Traces:
    n, offset = header["variants"], 0
    if not header["alike"]:
        apart = []
        for notes in header["steps"]:
            trace = []
            for note in notes:
                done, offset = _done(note, blob, offset, 1)
                trace.append(done)
            apart.append(tuple(trace))
        return Traces(n, None, tuple(apart))
    stacked = []
    for note in header["steps"][0]:
        done, offset = _done(note, blob, offset, n)
        stacked.append(done)
    return Traces(n, tuple(stacked))


def _variant(done: StepResult, i: int) -> StepResult:
    return done if done.output is None else replace(done, output=done.output[i : i + 1])


def _note(done: StepResult) -> Header:
    note: Header = {}
    if done.output is not None:
        note["shape"], note["dtype"] = list(done.output.shape), done.output.dtype.str
    for name, raised in (("error", done.error), ("refused", done.refused)):
        if raised is not None:
            note[name] = astuple(raised)
    note |= {name: value for name in ("reported", "returned") if (value := getattr(done, name))}
    note |= {name: asdict(value) for name in CHANGED if (value := getattr(done, name)) is not None}
    return note


def _done(note: Header, blob: bytes, offset: int, n: int) -> tuple[StepResult, int]:
    output: NDArray[Any] | None = None
    if "shape" in note:
        dtype, shape = np.dtype(note["dtype"]), (n, *note["shape"])
        size = int(np.prod(shape))
        output = np.frombuffer(blob, dtype, size, offset).reshape(shape)
        offset += size * dtype.itemsize
    reported = {name: tuple(numbers) for name, numbers in note.get("reported", {}).items()}
    error, refused = (Raised(*note[name]) if name in note else None for name in ("error", "refused"))
    changed = {name: _overwritten(note[name]) for name in CHANGED if name in note}
    return StepResult(output, reported, error, refused, note.get("returned"), **changed), offset


def _overwritten(note: Header) -> Overwritten:
    return Overwritten(**{**note, "index": tuple(note["index"])})
