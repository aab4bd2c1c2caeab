"""The record of a speed run, ``kv-latency/1``: raw rounds first; every summary is recomputable from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from kvconform.files import family_of, read_versioned, write_atomically

SCHEMA = "kv-latency/1"

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
    """Who does what (``PHASES``). A recompute is the backend's own cache-less forward, or where it claims none a
    prefill into an empty cache."""

    backend: str
    phase: str


class Case(msgspec.Struct, frozen=True):
    """Arms that are timed against one another in the same rounds. ``depth``: n. ``steps``: k, calls in one block; 0 if
    nothing was timed. ``new``: tokens that a generating phase makes; a block is one whole generation then."""

    preset: str
    depth: int
    batch: int
    arms: list[Arm]
    steps: int
    new: int = 0


class Round(msgspec.Struct, frozen=True, array_like=True):
    """One timed block: indices of case, restart, round, place in the round's random order, and arm; then wall and CPU
    nanoseconds of the block's k steps, and involuntary context switches meanwhile (recorded, never filtered). On a GPU
    also the device's own nanoseconds and its SM clock in MHz (0: not measured), and the reasons for a reduced clock
    (bits of ``gpu.REASONS``)."""

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
    """When the tokens of a generation came: nanoseconds from its beginning, one for each token."""

    case: int
    restart: int
    round: int
    arm: int
    ns: list[int]


class Memory(msgspec.Struct, frozen=True):
    """What the cache of one backend takes at a depth, in bytes. ``analytic``: ``2 l g n d itemsize b``; ``reported``:
    the backend's own count; ``resident``: growth of the process while the cache was filled; ``allocated``: peak growth
    of the GPU's allocator. None: not measured."""

    preset: str
    backend: str
    depth: int
    batch: int
    analytic: int
    reported: int | None = None
    resident: int | None = None
    allocated: int | None = None


class Once(msgspec.Struct, frozen=True):
    """What happens once in a restart: seconds from starting the worker until it answers (``load``), of building the
    backend (``build``), and of the first call of each phase, which compiles (``compile``)."""

    preset: str
    backend: str
    restart: int
    load: float
    build: float
    compile: dict[str, float]


class Summary(msgspec.Struct, frozen=True):
    """One arm of one case: nanoseconds per step, from n blocks in so many restarts.

    median: the geometric mean over restarts of each restart's median; low, high: its 95 % interval over restarts, or
    with one restart that of the median within it. q1, q3, p90, p99: of all blocks; None where n allows none.
    spread: standard deviation between restarts, of the logarithm; None with one restart. device: as median, of the
    device's own time; None: not measured. why_invalid: a sentence, empty where the median is worth its digits.
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
    """One generating arm of one case, nanoseconds, medians over its blocks. ttft: from the prompt to the first token;
    tpot: ``(end - ttft) / (new - 1)``; itl: p50 of the times between tokens; itl_p99: None where there are too few;
    throughput: ``batch / tpot`` in tokens a second."""

    case: int
    arm: int
    ttft: float
    tpot: float
    itl: float
    itl_p99: float | None
    throughput: float


class Ratio(msgspec.Struct, frozen=True):
    """time(arm) / time(reference), paired within rounds: the geometric mean over restarts of each restart's median
    ratio, with its 95 % interval over restarts. ``spread``: standard deviation between restarts, of the logarithm."""

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
    """A decode arm against what the machine allows: ``floor`` nanoseconds is the larger of bytes_min / measured read
    bandwidth and flops / measured peak; None where the ceilings are another device's. fraction: floor / time, with its
    interval; ``flag`` says why there is none.
    bytes_expected: what the backend's cache design moves; None where nobody knows."""

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
    """How the time of one backend's phase grows with the depth: slope of log time on log depth over the last two
    octaves, and the slope that the formula has there: multiply-adds without a cache, the roofline's floor with one.
    ``phase`` ``ratio``, ``ratio-last``: recompute, recompute-last over decode. ``low``, ``high``: the 95 % interval
    over restarts; None with one restart."""

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
    """What has no time on a preset, and why: a backend that is not conformant, unsupported or crashed; or, with an
    empty ``backend``, a case that the time limit left out.

    ``phase``: only this phase has no time; empty: none of the backend's has. Of a case its phase and depth, as in
    ``decode(64)``.
    """

    backend: str
    preset: str
    why: str
    phase: str = ""


class TimedRun(msgspec.Struct, kw_only=True):
    """What every timed run records: its machine, its protocol, its cases and their raw rounds. ``load``: 1-minute load
    average at the start and after each restart. ``software``: by backend, its address, interpreter, environment and
    ``runtime_info``. ``seconds``: duration of the run. ``finished``: False if the run was interrupted or ran out of
    time."""

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
    """One speed run. Summaries, generations, ratios, roofs, exponents and notes (sentences about the times of a
    device) follow from the raw rounds (``summarize.summarise``)."""

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
    write_atomically(path, msgspec.json.format(msgspec.json.encode(record), indent=1))


def is_record(path: Path) -> bool:
    """Whether a file is a speed record, of any version."""
    return family_of(path) == SCHEMA.partition("/")[0]


def read(path: Path) -> Record:
    """The speed record in a file. Raises SpecError with one sentence where the file holds none of this version."""
    return read_versioned(path, Record, SCHEMA, "speed record")


def json_schema() -> bytes:
    """The JSON Schema of a speed record."""
    return msgspec.json.encode(msgspec.json.schema(Record))
