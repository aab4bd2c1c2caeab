"""Visibility maps: which tokens each output depends on, measured from outside by changing one token at a time."""

from __future__ import annotations

import msgspec

from kvconform.explain.visibility.measure import BLIND, MISSING, SEES, UNKNOWN, MeasuredMap, memoized
from kvconform.explain.visibility.schedules import schedules
from kvconform.worker.client import WorkerClient
from kvconform_specs.config import Config

__all__ = ["BLIND", "FORBIDDEN", "MISSING", "REQUIRED", "SEES", "UNKNOWN", "Difference", "Map", "maps"]

FORBIDDEN, REQUIRED = "seen but forbidden", "not seen but required"
Difference = tuple[int, int, str]
"""The token whose output it is, the token that it sees or not, and ``FORBIDDEN`` or ``REQUIRED``."""


class Map(msgspec.Struct, frozen=True, kw_only=True):
    """Which of ``n`` tokens the output of each of them sees under one schedule."""

    schedule: str
    """`full` (the backend's own uncached forward), `prefill` (one append), `chunked`, `decode`, `rows` (two rows that
    grow together) or `sequences` (three, the last of which starts after the first is closed)."""
    sizes: list[int]
    """Tokens of each append, of every row or sequence."""
    wanted: list[str]
    """A string for each output, a character for each token: `x` must be seen, `.` must not, `?` not resolvable within
    the bounds, blank: there is no such output (claim `returns="last"`)."""
    seen: list[str]
    """The same for what was measured: `x` the output moved, `.` it did not, `?` unknown (`notes` say why), blank: no
    output came."""
    stopped: str = ""
    """The exception that ended the schedule, whose later outputs are then missing in `seen`."""
    rows: int = 1
    """How many rows or sequences; the `n` tokens are those of the first, then those of the second, and so on."""
    context: int | None = None
    """The index of the sequences' context; null where the backend has one only."""
    notes: list[str] = []
    """What else was noticed, one sentence each."""

    def __post_init__(self) -> None:
        sizes = [[len(line) for line in lines] for lines in (self.wanted, self.seen)]
        if sizes[0] != sizes[1] or not 1 <= self.rows <= max(len(self.wanted), 1):
            raise ValueError(f"the map {self.schedule}: wanted and seen have other sizes, or more rows than outputs")

    @property
    def differences(self) -> list[Difference]:
        """Where ``seen`` differs from ``wanted``, output by output."""
        kinds = {(BLIND, SEES): FORBIDDEN, (SEES, BLIND): REQUIRED}
        return [
            (query, key, kinds[pair])
            for query, lines in enumerate(zip(self.wanted, self.seen, strict=True))
            for key, pair in enumerate(zip(*lines, strict=True))
            if pair in kinds
        ]

    @property
    def right(self) -> bool:
        """Whether every output came, is known, and sees what it must."""
        return not self.stopped and not self.differences and not any(UNKNOWN in line for line in self.seen)

    @property
    def unresolved(self) -> int:
        """How many cells cannot be judged within the bounds."""
        return sum(line.count(UNKNOWN) for line in self.wanted)

    def place(self, token: int) -> tuple[int, int]:
        """Row, or sequence, and position of one of the ``n`` tokens."""
        return divmod(token, len(self.wanted) // self.rows)


def maps(client: WorkerClient, config: Config, least: int = 0) -> list[Map]:
    """The maps of a backend under one config, one for each schedule that its claims allow; none where it does not take
    the config. ``least``: the number of tokens after which a failure shows, which maps must reach. Raises WorkerDied.

    Where outputs differ between runs of the same tokens, the first schedule says so, and of the others only sequences
    are measured, each run in a fresh process.
    """
    claims = client.claims
    if config.profile not in claims.profiles or config.dtype not in claims.dtypes or client.build(config) is not None:
        return []
    own = None if client.reference_forward is None else memoized(client.reference_forward(config))
    found: list[Map] = []
    starts, fresh = client.starts, False
    context = 0 if config.contexts > 1 and claims.can("contexts") else None  # programs of schedules name no other
    for schedule in schedules(config, claims, least):
        if fresh and schedule.name != "sequences":
            continue
        measured = MeasuredMap(client, config, own, schedule, starts, fresh)
        found.append(_map(measured, context))
        if measured.unsteady and not fresh:
            fresh = True
            if schedule.name == "sequences":
                found[-1] = _map(MeasuredMap(client, config, own, schedule, starts, fresh), context)
    return found


def _map(measured: MeasuredMap, context: int | None) -> Map:
    measured.measure()
    schedule = measured.schedule
    return Map(
        schedule=schedule.name,
        sizes=list(schedule.sizes),
        rows=schedule.rows,
        wanted=_lines(measured.wanted().tolist()),
        seen=_lines(measured.seen().tolist()),
        stopped=measured.stopped,
        context=context,
        notes=measured.notes,
    )


def _lines(cells: list[list[str]]) -> list[str]:
    return ["".join(line) for line in cells]
