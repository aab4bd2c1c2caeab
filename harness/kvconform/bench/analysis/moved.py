"""What moved between two speed runs: the time of each arm that both have timed, with its interval.

Two runs are not paired: the machine may have been slower in one of them. ``kvconform bench gate`` times both sides in
turns, and alone can tell a regression.
"""

from __future__ import annotations

import msgspec

from kvconform.bench.record import MACHINE, Record, Summary


class MovedTime(msgspec.Struct, frozen=True):
    """The time of one arm in two runs."""

    preset: str
    """Name of the preset."""
    backend: str
    """Name of the backend."""
    phase: str
    """What was timed: a key of ``PHASES``."""
    depth: int
    """Tokens in the cache, or in the prompt."""
    batch: int
    """Number of sequences."""
    new: int
    """Tokens that a generating phase makes; 0 for other phases."""
    was: tuple[float, float, float]
    """Median before, and the ends of its 95 % interval, in nanoseconds per step."""
    now: tuple[float, float, float]
    """The same, now."""

    @property
    def apart(self) -> bool:
        """Whether the intervals do not overlap."""
        return self.now[1] > self.was[2] or self.now[2] < self.was[1]

    @property
    def ratio(self) -> float:
        return self.now[0] / self.was[0]


def moved_times(before: Record, now: Record) -> list[MovedTime]:
    """The arms that both runs have timed with a valid median."""
    earlier = times(before)
    return [MovedTime(*key, earlier[key], time) for key, time in times(now).items() if key in earlier]


def not_comparable(before: Record, now: Record) -> str:
    """Why times of the two runs say nothing about the software, in one sentence; empty where they may."""
    for what, was, is_now in (
        ("device", before.device, now.device),
        *((name, before.machine.get(name), now.machine.get(name)) for name in ("cpu", "gpu", "cores")),
        ("threads", before.protocol.get("threads"), now.protocol.get("threads")),
    ):
        if was != is_now:
            return f"times are not compared: {what} is {is_now}, was {was}"
    return ""


Key = tuple[str, str, str, int, int, int]


def times(record: Record) -> dict[Key, tuple[float, float, float]]:
    """The time of each arm; of the most blocks, where several cases time it."""
    found: dict[Key, Summary] = {}
    for summary in record.summaries:
        case = record.cases[summary.case]
        arm = case.arms[summary.arm]
        key = case.preset, arm.backend, arm.phase, case.depth, case.batch, case.new
        if not summary.why_invalid and arm.backend != MACHINE and (key not in found or found[key].n < summary.n):
            found[key] = summary
    return {key: (one.median, one.low, one.high) for key, one in found.items()}
