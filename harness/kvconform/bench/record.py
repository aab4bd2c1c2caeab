"""The record of a speed run, ``kv-latency/2``: raw rounds first; every summary is recomputable from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from kvconform.files import family_of, read_versioned, schema_of, write_versioned

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
    """One phase of one backend.

    backend: name of the backend; ``machine`` for a ceiling.
    phase: a key of ``PHASES``. A recompute is the backend's own uncached forward, or, if it claims none, a prefill
        into an empty cache.
    """

    backend: str
    phase: str


class Case(msgspec.Struct, frozen=True):
    """Arms that are timed against one another in the same rounds.

    preset: name of the preset.
    depth: number of tokens n; see ``PHASES``.
    batch: number of sequences.
    arms: the arms; the first decode arm is the reference.
    steps: number of calls k in one block.
    new: number of tokens that a generating phase makes, where one block is one whole generation; 0 for other phases.
    """

    preset: str
    depth: int
    batch: int
    arms: list[Arm]
    steps: int
    new: int = 0


class Round(msgspec.Struct, frozen=True, array_like=True):
    """One timed block.

    case: index into ``cases``.
    restart: index of the restart of the workers.
    round: index of the round within the restart.
    place: index of the block in the random order of the round.
    arm: index into the arms of the case.
    ns: wall time of the k calls of the block, in nanoseconds.
    cpu_ns: CPU time of the k calls of the block, in nanoseconds.
    nivcsw: number of involuntary context switches during the block; recorded, never used as a filter.
    device_ns: time that the GPU measured, in nanoseconds; 0 if not measured.
    sm_mhz: SM clock of the GPU, in MHz; 0 if not measured.
    throttle: reasons for a reduced clock, bits of ``gpu.REASONS`` (no unit); 0 for none.
    """

    case: int
    restart: int
    round: int
    place: int
    arm: int
    ns: int
    cpu_ns: int
    nivcsw: int
    device_ns: int = 0
    sm_mhz: int = 0
    throttle: int = 0


class Tokens(msgspec.Struct, frozen=True, array_like=True):
    """When the tokens of one generation came.

    case, restart, round, arm: index of each, as in ``rounds``.
    ns: for each token, the time since the start of the generation, in nanoseconds.
    """

    case: int
    restart: int
    round: int
    arm: int
    ns: list[int]


class Memory(msgspec.Struct, frozen=True):
    """Size of the cache of one backend at one depth. None: not measured.

    preset: name of the preset.
    backend: name of the backend.
    depth: number of cached tokens in each sequence.
    batch: number of sequences.
    analytic: size by the formula ``2 l g n d itemsize b``, in bytes.
    reported: size that the backend reports, in bytes.
    resident: growth of the resident memory of the process while the cache was filled, in bytes.
    allocated: peak growth of the memory of the GPU's allocator, in bytes.
    """

    preset: str
    backend: str
    depth: int
    batch: int
    analytic: int
    reported: int | None = None
    resident: int | None = None
    allocated: int | None = None


class Once(msgspec.Struct, frozen=True):
    """What happens once in a restart.

    preset: name of the preset.
    backend: name of the backend.
    restart: index of the restart.
    load: time from starting the worker until it answers, in seconds.
    build: time of building the backend, in seconds.
    compile: for each phase, the time of its first call, which compiles, in seconds.
    """

    preset: str
    backend: str
    restart: int
    load: float
    build: float
    compile: dict[str, float]


class Summary(msgspec.Struct, frozen=True):
    """The time per step of one arm of one case.

    case: index into ``cases``.
    arm: index into the arms of the case.
    n: number of blocks.
    restarts: number of restarts.
    median: geometric mean over restarts of each restart's median, in nanoseconds per step.
    q1, q3: quartile of all blocks, in nanoseconds per step.
    low, high: end of the 95 % interval of ``median`` over restarts, in nanoseconds per step; with one restart, of the
        median within it.
    spread: standard deviation between restarts of the logarithm of the median (no unit); None with one restart.
    p90, p99: percentile of all blocks, in nanoseconds per step; None with too few blocks.
    device: like ``median``, of the time that the GPU measured, in nanoseconds per step; None if not measured.
    why_invalid: why the median is too uncertain to report, one sentence; empty if it is valid.
    """

    case: int
    arm: int
    n: int
    restarts: int
    median: float
    q1: float
    q3: float
    low: float
    high: float
    spread: float | None = None
    p90: float | None = None
    p99: float | None = None
    device: float | None = None
    why_invalid: str = ""


class Generation(msgspec.Struct, frozen=True):
    """Latencies of one generating arm of one case, medians over its blocks.

    case: index into ``cases``.
    arm: index into the arms of the case.
    ttft: time to first token, from the prompt, in nanoseconds.
    tpot: time per output token, ``(end - ttft) / (new - 1)``, in nanoseconds.
    itl: median time between two tokens, in nanoseconds.
    itl_p99: 99th percentile of the time between two tokens, in nanoseconds; None with too few.
    throughput: ``batch / tpot``, in tokens per second.
    """

    case: int
    arm: int
    ttft: float
    tpot: float
    itl: float
    itl_p99: float | None
    throughput: float


class Ratio(msgspec.Struct, frozen=True):
    """The time of one arm over that of a reference arm, paired within rounds.

    case: index into ``cases``.
    arm: index into the arms of the case: the numerator.
    reference: index into the arms of the case: the denominator.
    ratio: geometric mean over restarts of each restart's median ratio (no unit).
    low, high: end of the 95 % interval of ``ratio`` over restarts (no unit).
    n: number of paired blocks.
    restarts: number of restarts.
    valid: whether the ratio is certain enough to report.
    why_invalid: why it is not, one sentence; empty if it is valid.
    spread: standard deviation between restarts of the logarithm of the ratio (no unit); None with one restart.
    """

    case: int
    arm: int
    reference: int
    ratio: float
    low: float
    high: float
    n: int
    restarts: int
    valid: bool
    why_invalid: str = ""
    spread: float | None = None


class Roof(msgspec.Struct, frozen=True):
    """A decode arm compared with the roofline of the machine.

    case: index into ``cases``.
    arm: index into the arms of the case.
    bytes_min: least traffic of one step, weights and cache read once, in bytes.
    bytes_expected: traffic of one step for the cache design of the backend, in bytes; None if the design is unknown.
    flops: number of floating-point operations in one step.
    floor: the larger of ``bytes_min`` over measured bandwidth and ``flops`` over measured peak, in nanoseconds; None if
        the ceilings were measured on another device.
    fraction: ``floor`` over the measured time (no unit); None if ``flag`` names a reason.
    low, high: end of the 95 % interval of ``fraction`` (no unit); None without one.
    flag: why there is no fraction, one sentence; empty if there is one.
    """

    case: int
    arm: int
    bytes_min: int
    bytes_expected: int | None
    flops: int
    floor: float | None
    fraction: float | None
    low: float | None = None
    high: float | None = None
    flag: str = ""


class Exponent(msgspec.Struct, frozen=True):
    """How the time of one phase of one backend grows with the depth.

    preset: name of the preset.
    backend: name of the backend.
    batch: number of sequences.
    phase: a key of ``PHASES``; ``ratio`` and ``ratio-last`` for recompute and recompute-last over decode.
    depths: the depths of the last two octaves, numbers of tokens.
    exponent: slope of log time over log depth on ``depths`` (no unit).
    expected: slope of the formula there (no unit): of the multiply-adds without a cache, of the roofline with one.
    low, high: end of the 95 % interval of ``exponent`` over restarts (no unit); None with one restart.
    """

    preset: str
    backend: str
    batch: int
    phase: str
    depths: list[int]
    exponent: float
    expected: float
    low: float | None = None
    high: float | None = None


class Excluded(msgspec.Struct, frozen=True):
    """A backend that was not timed on a preset.

    backend: name of the backend.
    preset: name of the preset.
    why: the reason, one sentence: not conformant, unsupported, crashed.
    phase: the only phase that was not timed; empty if none was.
    """

    backend: str
    preset: str
    why: str
    phase: str = ""


class TimedRun(msgspec.Struct, kw_only=True):
    """What every timed run records.

    schema: name and version of this schema.
    suite: version of the suite.
    started: date and time of the start, ISO 8601.
    device: devices of the backends, ``cpu`` or ``cuda``, separated by commas.
    machine: facts about the machine, by name.
    software: by backend, its address, interpreter, environment and ``runtime_info``.
    protocol: how the times were measured: options and constants, by name.
    load: 1-minute load average at the start and after each restart, in runnable processes.
    presets: by name, the presets that were timed.
    cases: the cases that were timed.
    rounds: the timed blocks.
    seconds: duration of the run, in seconds.
    finished: whether the run was neither interrupted nor out of time.
    """

    schema: str
    suite: str
    started: str
    device: str
    machine: dict[str, Any]
    software: dict[str, Any]
    protocol: dict[str, Any]
    load: list[float]
    presets: dict[str, Any]
    cases: list[Case] = []
    rounds: list[Round] = []
    seconds: float = 0.0
    finished: bool = False


class Record(TimedRun, kw_only=True):
    """One speed run. Everything from ``summaries`` to ``notes`` follows from the raw rounds (``summarize.summarise``).

    tokens: when the tokens of each generation came.
    once: what happened once in each restart.
    memory: sizes of caches.
    summaries: time of each arm.
    generations: latencies of each generating arm.
    ratios: ratio of each arm to a reference.
    roofs: comparison of each decode arm with the roofline.
    exponents: growth of each phase with the depth.
    notes: sentences about the clock and the timer of a GPU.
    excluded: backends that were not timed, with the reason.
    """

    schema: str = SCHEMA
    tokens: list[Tokens] = []
    once: list[Once] = []
    memory: list[Memory] = []
    summaries: list[Summary] = []
    generations: list[Generation] = []
    ratios: list[Ratio] = []
    roofs: list[Roof] = []
    exponents: list[Exponent] = []
    notes: list[str] = []
    excluded: list[Excluded] = []


def write(record: TimedRun, path: Path) -> None:
    """Writes the file, whole or not at all."""
    write_versioned(path, record)


def is_record(path: Path) -> bool:
    """Whether a file is a speed record, of any version."""
    return family_of(path) == SCHEMA.partition("/")[0]


def read(path: Path) -> Record:
    """The speed record in a file. Raises SpecError with one sentence where the file holds none of this version."""
    return read_versioned(path, Record, SCHEMA, "speed record")


def json_schema() -> bytes:
    """The JSON Schema of a speed record."""
    return msgspec.json.format(msgspec.json.encode(schema_of(Record)), indent=1)
