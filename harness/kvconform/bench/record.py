"""The record of a speed run, ``kv-latency/2``: raw rounds first; every summary is recomputable from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from kvconform.files import family_of, read_versioned, write_versioned

SCHEMA = "kv-latency/2"

PHASES = {
    "prefill": "n tokens into an empty cache",
    "decode": "one token at depth n, with the cache",
    "recompute": "n + 1 tokens without a cache, all positions projected to logits",
    "recompute-last": "n + 1 tokens without a cache, the last position alone projected to logits",
    "generate": "greedy generation with the cache: a prefill of n tokens, then a decode step for each but the last",
    "regenerate": "greedy generation without a cache, all positions projected to logits each time",
    "regenerate-last": "greedy generation without a cache, the last position alone projected to logits",
    "read": "the machine's ceiling: reads once as many bytes as a decode step must at least",
    "multiply": "the machine's ceiling: as many multiply-adds as a decode step at least, on small matrices",
}
"""What one timed step is. ``n``: the case's depth. The ceilings are the machine's, measured in the worker of the
reference."""
CEILINGS = ("read", "multiply")
MACHINE = "machine"
"""The backend of an arm that is a ceiling."""


class Arm(msgspec.Struct, frozen=True):
    """One phase of one backend."""

    backend: str
    """Name of the backend; ``machine`` for a ceiling."""
    phase: str
    """A key of ``PHASES``. A recompute is the backend's own uncached forward, or, if it claims none, a prefill into an
    empty cache."""


class Case(msgspec.Struct, frozen=True):
    """Arms that are timed against one another in the same rounds."""

    preset: str
    """Name of the preset."""
    depth: int
    """Number of tokens n; see ``PHASES``."""
    batch: int
    """Number of sequences."""
    arms: list[Arm]
    """The arms; the first decode arm is the reference."""
    steps: int
    """Number of calls k in one block; 0 if nothing was timed."""
    new: int = 0
    """Number of tokens that a generating phase makes, where one block is one whole generation; 0 for other phases."""


class Round(msgspec.Struct, frozen=True, array_like=True):
    """One timed block."""

    case: int
    """Index into ``cases``."""
    restart: int
    """Index of the restart of the workers."""
    round: int
    """Index of the round within the restart."""
    place: int
    """Index of the block in the random order of the round."""
    arm: int
    """Index into the arms of the case."""
    ns: int
    """Wall time of the k calls of the block, in nanoseconds."""
    cpu_ns: int
    """CPU time of the k calls of the block, in nanoseconds."""
    nivcsw: int
    """Number of involuntary context switches during the block; recorded, never used as a filter."""
    device_ns: int = 0
    """Time that the GPU measured, in nanoseconds; 0 if not measured."""
    sm_mhz: int = 0
    """SM clock of the GPU, in MHz; 0 if not measured."""
    throttle: int = 0
    """Reasons for a reduced clock, bits of ``gpu.REASONS`` (no unit); 0 for none."""


class Tokens(msgspec.Struct, frozen=True, array_like=True):
    """When the tokens of one generation came."""

    case: int
    """Index into ``cases``."""
    restart: int
    """Index of the restart of the workers."""
    round: int
    """Index of the round within the restart."""
    arm: int
    """Index into the arms of the case."""
    ns: list[int]
    """For each token, the time since the start of the generation, in nanoseconds."""


class Memory(msgspec.Struct, frozen=True):
    """Size of the cache of one backend at one depth; null: not measured."""

    preset: str
    """Name of the preset."""
    backend: str
    """Name of the backend."""
    depth: int
    """Number of cached tokens in each sequence."""
    batch: int
    """Number of sequences."""
    analytic: int
    """Size by the formula ``2 l g n d itemsize b``, in bytes."""
    reported: int | None = None
    """Size that the backend reports, in bytes."""
    resident: int | None = None
    """Growth of the resident memory of the process while the cache was filled, in bytes."""
    allocated: int | None = None
    """Peak growth of the memory of the GPU's allocator, in bytes."""


class Once(msgspec.Struct, frozen=True):
    """What happens once in a restart."""

    preset: str
    """Name of the preset."""
    backend: str
    """Name of the backend."""
    restart: int
    """Index of the restart."""
    load: float
    """Time from starting the worker until it answers, in seconds."""
    build: float
    """Time of building the backend, in seconds."""
    compile: dict[str, float]
    """For each phase, the time of its first call, which compiles, in seconds."""


class Summary(msgspec.Struct, frozen=True):
    """The time per step of one arm of one case."""

    case: int
    """Index into ``cases``."""
    arm: int
    """Index into the arms of the case."""
    n: int
    """Number of blocks."""
    restarts: int
    """Number of restarts."""
    median: float
    """Geometric mean over restarts of each restart's median, in nanoseconds per step."""
    q1: float
    """First quartile of all blocks, in nanoseconds per step."""
    q3: float
    """Third quartile of all blocks, in nanoseconds per step."""
    low: float
    """Lower end of the 95 % interval of ``median`` over restarts, in nanoseconds per step; with one restart, of
    the median within it."""
    high: float
    """Upper end of the 95 % interval of ``median`` over restarts, in nanoseconds per step; with one restart, of
    the median within it."""
    spread: float | None = None
    """Standard deviation between restarts of the logarithm of the median (no unit); null with one restart."""
    p90: float | None = None
    """90th percentile of all blocks, in nanoseconds per step; null with too few blocks."""
    p99: float | None = None
    """99th percentile of all blocks, in nanoseconds per step; null with too few blocks."""
    device: float | None = None
    """Like ``median``, of the time that the GPU measured, in nanoseconds per step; null if not measured."""
    why_invalid: str = ""
    """Why the median is too uncertain to report, one sentence; empty if it is valid."""


class Generation(msgspec.Struct, frozen=True):
    """Latencies of one generating arm of one case, medians over its blocks."""

    case: int
    """Index into ``cases``."""
    arm: int
    """Index into the arms of the case."""
    ttft: float
    """Time to first token, from the prompt, in nanoseconds."""
    tpot: float
    """Time per output token, ``(end - ttft) / (new - 1)``, in nanoseconds."""
    itl: float
    """Median time between two tokens, in nanoseconds."""
    itl_p99: float | None
    """99th percentile of the time between two tokens, in nanoseconds; null with too few."""
    throughput: float
    """``batch / tpot``, in tokens per second."""


class Ratio(msgspec.Struct, frozen=True):
    """The time of one arm over that of a reference arm, paired within rounds."""

    case: int
    """Index into ``cases``."""
    arm: int
    """Index into the arms of the case: the numerator."""
    reference: int
    """Index into the arms of the case: the denominator."""
    ratio: float
    """Geometric mean over restarts of each restart's median ratio (no unit)."""
    low: float
    """Lower end of the 95 % interval of ``ratio`` over restarts (no unit)."""
    high: float
    """Upper end of the 95 % interval of ``ratio`` over restarts (no unit)."""
    n: int
    """Number of paired blocks."""
    restarts: int
    """Number of restarts."""
    valid: bool
    """Whether the ratio is certain enough to report."""
    why_invalid: str = ""
    """Why it is not, one sentence; empty if it is valid."""
    spread: float | None = None
    """Standard deviation between restarts of the logarithm of the ratio (no unit); null with one restart."""


class Roof(msgspec.Struct, frozen=True):
    """A decode arm compared with the roofline of the machine."""

    case: int
    """Index into ``cases``."""
    arm: int
    """Index into the arms of the case."""
    bytes_min: int
    """Least traffic of one step, weights and cache read once, in bytes."""
    bytes_expected: int | None
    """Traffic of one step for the cache design of the backend, in bytes; null if the design is unknown."""
    flops: int
    """Number of floating-point operations in one step."""
    floor: float | None
    """The larger of ``bytes_min`` over measured bandwidth and ``flops`` over measured peak, in nanoseconds; null if the
    ceilings were measured on another device."""
    fraction: float | None
    """``floor`` over the measured time (no unit); null if ``flag`` names a reason."""
    low: float | None = None
    """Lower end of the 95 % interval of ``fraction`` (no unit); null without one."""
    high: float | None = None
    """Upper end of the 95 % interval of ``fraction`` (no unit); null without one."""
    flag: str = ""
    """Why there is no fraction, one sentence; empty if there is one."""


class Exponent(msgspec.Struct, frozen=True):
    """How the time of one phase of one backend grows with the depth."""

    preset: str
    """Name of the preset."""
    backend: str
    """Name of the backend."""
    batch: int
    """Number of sequences."""
    phase: str
    """A key of ``PHASES``; ``ratio`` and ``ratio-last`` for recompute and recompute-last over decode."""
    depths: list[int]
    """The depths of the last two octaves, numbers of tokens."""
    exponent: float
    """Slope of log time over log depth on ``depths`` (no unit)."""
    expected: float
    """Slope of the formula there (no unit): of the multiply-adds without a cache, of the roofline with one."""
    low: float | None = None
    """Lower end of the 95 % interval of ``exponent`` over restarts (no unit); null with one restart."""
    high: float | None = None
    """Upper end of the 95 % interval of ``exponent`` over restarts (no unit); null with one restart."""


class Excluded(msgspec.Struct, frozen=True):
    """A backend or a case that was not timed on a preset."""

    backend: str
    """Name of the backend; empty for a case that the time limit left out."""
    preset: str
    """Name of the preset."""
    why: str
    """The reason, one sentence: not conformant, unsupported, crashed, out of time."""
    phase: str = ""
    """The only phase of the backend that was not timed, or phase and depth of the case, ``decode(64)``; empty if no
    phase of the backend was timed."""


class TimedRun(msgspec.Struct, kw_only=True):
    """What every timed run records."""

    schema: str
    """Name and version of this schema."""
    suite: str
    """Version of the suite."""
    started: str
    """Date and time of the start, ISO 8601."""
    device: str
    """Devices of the backends, ``cpu`` or ``cuda``, separated by commas."""
    machine: dict[str, Any]
    """Facts about the machine, by name."""
    software: dict[str, Any]
    """By backend, its address, interpreter, environment and ``runtime_info``."""
    protocol: dict[str, Any]
    """How the times were measured: options and constants, by name."""
    load: list[float]
    """1-minute load average at the start and after each restart, in runnable processes."""
    presets: dict[str, Any]
    """By name, the presets that were timed."""
    cases: list[Case] = []
    """The cases that were timed."""
    rounds: list[Round] = []
    """The timed blocks."""
    seconds: float = 0.0
    """Duration of the run, in seconds."""
    finished: bool = False
    """Whether the run was neither interrupted nor out of time."""


class Record(TimedRun, kw_only=True):
    """One speed run. The fields from ``summaries`` to ``notes`` follow from the rounds (``summarize.summarise``)."""

    schema: str = SCHEMA
    tokens: list[Tokens] = []
    """When the tokens of each generation came."""
    once: list[Once] = []
    """What happened once in each restart."""
    memory: list[Memory] = []
    """Sizes of caches."""
    summaries: list[Summary] = []
    """Time of each arm."""
    generations: list[Generation] = []
    """Latencies of each generating arm."""
    ratios: list[Ratio] = []
    """Ratio of each arm to a reference."""
    roofs: list[Roof] = []
    """Comparison of each decode arm with the roofline."""
    exponents: list[Exponent] = []
    """Growth of each phase with the depth."""
    notes: list[str] = []
    """Sentences about the clock and the timer of a GPU."""
    excluded: list[Excluded] = []
    """Backends that were not timed, with the reason."""


def write(record: TimedRun, path: Path) -> None:
    """Writes the file, whole or not at all."""
    write_versioned(path, record)


def is_record(path: Path) -> bool:
    """Whether a file is a speed record, of any version."""
    return family_of(path) == SCHEMA.partition("/")[0]


def read(path: Path) -> Record:
    """The speed record in a file. Raises SpecError with one sentence where the file holds none of this version."""
    return read_versioned(path, Record, SCHEMA, "speed record")
