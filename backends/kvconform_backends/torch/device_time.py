"""Device time on CUDA, and what else the bench needs of a torch backend there.

Two numbers, never mixed. *Step wall* is measured by the timer: from before the call until the stream is empty. It
includes everything that a caller waits for: the checks of inputs, the copy of token ids to the device, every launch,
the work itself, and the copy of the logits to the host (a step returns numpy). *Device time* is the time in which the
device is busy: the step without both copies and without the host's launches. It is measured in one of two ways, which
are recorded with the number:

``graph``: a CUDA graph of ten steps or more, timed by events around its replay, behind another replay, so that it
includes no wait for a launch. The steps use copies of weights and cache in turn, so many that five times the bytes of
L2 are read before one is read again: L2 is *flushed*.
``cupti``: steps one after another under ``torch.profiler``, the union of the spans of all kernels: L2 is *warm* as it
is in a decode. For what cannot be captured: compiled steps, and ONNX Runtime, which waits for its own stream.

If neither is possible, the result is None and the reason is recorded. Events around plain steps are never used: they
include the launches. CUPTI stays in a process and slows its launches (pytorch issue 144455), so that wall times are
measured first.
"""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, supported_activities

from kvconform_backends.torch.decoder import Decoder

STEPS = 10
"""The fewest steps of a graph."""
ROTATED = 5
"""The bytes that are read before a copy is read again, as a multiple of L2."""
LEAD = 2
"""Replays that keep the device busy while the host hands over the one that is timed."""
GATHERED = ("embed", "position")
"""Weights of which a step reads a few rows; they are not counted."""

Call = Callable[[int], object]
"""One step from the case's depth, on the copy of the cache with this number, which is made at its first use. The step
removes what it added, on the host alone, so that it can be repeated, also inside a capture."""


class NotMeasured(Exception):
    """Why there is no device time."""


class Cupti:
    """Whether CUPTI was attached to this process; it is never detached."""

    attached = False


def synchronise(device: str) -> None:
    """Waits until the device has finished its work; does nothing on a CPU. Raises RuntimeError if a wall time would
    include the cost of a profiler."""
    if device != "cuda":
        return
    if Cupti.attached:
        raise RuntimeError("CUPTI is attached to this process: wall times come before device times, never after")
    if torch.cuda.is_available():  # else it is ONNX Runtime's device alone, which waits at the end of each run
        torch.cuda.synchronize()


def precision(dtype: torch.dtype, device: str) -> str:
    """The class of precision that matrix products of this dtype have now; times of two are never compared."""
    backends: Any = torch.backends
    name, cuda = str(dtype).removeprefix("torch."), backends.cuda.matmul
    if dtype == torch.float32:
        own = cuda.fp32_precision if device == "cuda" else backends.mkldnn.matmul.fp32_precision
        by = own if own != "none" else backends.fp32_precision
        return name if by in ("ieee", "none") else f"{name} by {by}"
    reduced = {
        torch.bfloat16: cuda.allow_bf16_reduced_precision_reduction,
        torch.float16: cuda.allow_fp16_reduced_precision_reduction,
    }.get(dtype, False)
    return f"{name}, sums in {name}" if device == "cuda" and reduced else name


class Allocator:
    """Peak growth of torch's CUDA allocator."""

    def __init__(self) -> None:
        self.before = 0

    def grown(self) -> int | None:
        """The peak in bytes above the allocation at the previous call; None without CUDA."""
        if not torch.cuda.is_available():
            return None
        stats = torch.cuda.memory_stats()
        peak, self.before = stats["allocated_bytes.all.peak"] - self.before, stats["allocated_bytes.all.current"]
        torch.cuda.reset_peak_memory_stats()
        return int(peak)


class DeviceTime:
    """Device times of one backend, and how they were measured (``methods``, for its runtime_info).

    ``backend``: one with the attributes of ``eager.Torch``: ``tensor`` (numpy to device), ``array`` (device to numpy)
    and ``decoder``. None: there are none; only CUPTI is used, and copies between host and device do not count.
    """

    def __init__(self, device: str, backend: Any = None) -> None:
        self.device, self.backend = device, backend
        self.methods: list[str] = []
        self._newest: tuple[Call, Graph | str] | None = None  # one: it holds copies of the weights

    def ns(self, call: Call, steps: int) -> int | None:
        """Nanoseconds of ``steps`` steps; None where they cannot be measured. Never inside a timed region."""
        try:
            if self.device != "cuda":
                raise NotMeasured(f"the device is {self.device}")
            taken = self._measured(call, steps)
        except NotMeasured as reason:
            self._note(f"not measured: {reason}")
            return None
        return taken

    def _measured(self, call: Call, steps: int) -> int:
        graph = self._graph(call, steps)
        if isinstance(graph, Graph):
            self._note("graph: CUDA graph of steps on copies of weights and cache in turn; L2 flushed")
            return round(graph.ns() * steps)
        try:
            taken = traced(call, steps, self.backend)
        except NotMeasured as reason:
            raise NotMeasured(f"no CUDA graph: {graph}; no CUPTI: {reason}") from reason
        self._note("cupti: union of kernel spans, step after step; L2 warm")
        return taken

    def _graph(self, call: Call, steps: int) -> Graph | str:
        """The captured graph of this call, or why there is none; either is found once while the call stays the same."""
        if self._newest is None or self._newest[0] is not call:
            self._newest = None  # its memory is free before the next one is captured
            try:
                self._newest = call, Graph(self.backend, call, steps)
            except NotMeasured as reason:
                self._newest = call, str(reason)
        return self._newest[1]

    def _note(self, words: str) -> None:
        self.methods = sorted({*self.methods, words})


class Graph:
    """A CUDA graph of steps, each on the next copy of weights and cache. Raises NotMeasured where it cannot be."""

    def __init__(self, backend: Any, call: Call, steps: int) -> None:
        decoder = getattr(backend, "decoder", None)
        if decoder is None:
            raise NotMeasured("the step has no torch decoder whose weights could be copied")
        copies = rotation(read(decoder), torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size)
        self.steps = copies * math.ceil(max(STEPS, steps) / copies)  # whole turns, so that one replay begins cold, too
        self.decoders = [decoder, *(copy.deepcopy(decoder) for _ in range(copies - 1))]
        self.graph, self.outputs = torch.cuda.CUDAGraph(), list[Tensor]()
        here, stream = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        used: set[int] = set()
        hooks = [one.register_forward_pre_hook(lambda module, _: used.add(id(module))) for one in self.decoders]
        collecting = gc.isenabled()
        try:
            with on_device(backend) as outputs:
                stream.wait_stream(here)
                with torch.cuda.stream(stream):  # makes the caches, the uploads and the workspaces of this stream
                    self._all(backend, call)
                torch.cuda.synchronize()
                outputs.clear()
                gc.collect()
                gc.disable()  # what it would free inside a capture is freed on the device, which ends the capture
                with torch.cuda.graph(self.graph, stream=stream):
                    self._all(backend, call)
                self.outputs = list(outputs)
        except RuntimeError as error:
            raise NotMeasured(f"the step cannot be captured: {str(error).splitlines()[0]}") from error
        finally:
            backend.decoder = decoder
            torch.cuda.set_stream(here)  # a capture that failed leaves its own stream behind
            if collecting:
                gc.enable()
            for hook in hooks:
                hook.remove()
        if len(used) < copies > 1:
            raise NotMeasured("the step does not read its weights from its decoder: they cannot be rotated")

    def _all(self, backend: Any, call: Call) -> None:
        for number in range(self.steps):
            backend.decoder = self.decoders[number % len(self.decoders)]
            call(number % len(self.decoders))

    def ns(self) -> float:
        """Nanoseconds of one step. Raises RuntimeError where a step left its output as it was before."""
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        for _ in range(LEAD):
            self.graph.replay()
        poison(self.outputs)
        began.record()
        self.graph.replay()
        ended.record()
        ended.synchronize()
        check_written(self.outputs)
        return float(began.elapsed_time(ended)) * 1e6 / self.steps


def traced(call: Call, steps: int, backend: Any = None) -> int:
    """Nanoseconds in which the device ran a kernel of these steps. Raises NotMeasured where CUPTI sees none."""
    if ProfilerActivity.CUDA not in supported_activities():  # type: ignore[no-untyped-call]
        raise NotMeasured(f"torch {torch.__version__} has no CUPTI")
    with on_device(backend) as outputs:
        call(0)
        poison(outputs)
        outputs.clear()  # the next step's output is likely to get this memory
        torch.cuda.synchronize()
        Cupti.attached = True
        with profile(activities=[ProfilerActivity.CUDA]) as trace:
            for _ in range(steps):
                call(0)
            torch.cuda.synchronize()
        check_written(outputs)
    spans = [
        (event.time_range.start, event.time_range.end)
        for event in trace.events() or ()
        if event.device_type.name == "CUDA" and not event.is_user_annotation and counts(event.name)
    ]
    if not spans:
        raise NotMeasured("CUPTI saw no kernel (another profiler holds it, or it lacks the permission)")
    return round(union(spans) * 1000)


def counts(name: str) -> bool:
    """Whether an activity is of the step itself: copies between host and device belong to step wall."""
    return not name.startswith(("Memcpy HtoD", "Memcpy DtoH"))


def union(spans: Iterable[tuple[float, float]]) -> float:
    """How long at least one of the spans ``(start, end)`` lasts: overlaps count once, gaps do not."""
    total, until = 0.0, -math.inf
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def rotation(weights: int, l2: int) -> int:
    """How many copies of ``weights`` bytes are read in turn so that ``ROTATED`` times the bytes of L2 lie between two
    reads of one: those of all the others."""
    return 1 if l2 == 0 or weights >= ROTATED * l2 else 1 + math.ceil(ROTATED * l2 / weights)


def read(decoder: Decoder) -> int:
    """Bytes of weights that every step reads whole."""
    return sum(x.nbytes for name, x in decoder.named_buffers() if name not in GATHERED)


@torch.inference_mode()  # outputs may have been made in it, and can be written only in it then
def poison(outputs: Iterable[Tensor]) -> None:
    """Makes NaN of outputs, so that a step that does not write its own is seen."""
    for output in outputs:
        output.fill_(torch.nan)


def check_written(outputs: Iterable[Tensor]) -> None:
    """Raises RuntimeError where an output is still poisoned."""
    if not all(bool(x.isfinite().all()) for x in outputs):
        raise RuntimeError("a step that was timed left its output unwritten")


@contextmanager
def on_device(backend: Any) -> Iterator[list[Tensor]]:
    """Takes numpy out of the backend's steps: while it lasts, an input is copied to the device the first time that it
    comes, and outputs stay where they are, in the list. Without a backend there are none."""
    outputs: list[Tensor] = []
    if backend is None:
        yield outputs
        return
    held: dict[tuple[Any, ...], Tensor] = {}
    upload = backend.tensor

    def tensor(x: Any) -> Tensor:
        key = x.dtype.str, x.shape, x.tobytes()
        if key not in held:
            held[key] = upload(x).clone()
        return held[key]

    def array(x: Tensor) -> Tensor:
        backend.seen_on = x.device.type
        outputs.append(x)
        return x

    backend.tensor, backend.array = tensor, array
    try:
        yield outputs
    finally:
        del backend.tensor, backend.array  # the class's own again
