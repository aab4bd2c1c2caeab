"""Visibility maps: which tokens each output depends on, recovered from outside by changing one token at a time."""

from __future__ import annotations

import msgspec

from kvconform.explain.visibility.measure import BLIND, MISSING, SEES, UNTOLD, Sight, remembered
from kvconform.explain.visibility.schedules import schedules
from kvconform.worker.client import WorkerClient
from kvconform_specs.config import Config

__all__ = ["BLIND", "FORBIDDEN", "MISSING", "REQUIRED", "SEES", "UNTOLD", "Difference", "Map", "maps"]

FORBIDDEN, REQUIRED = "seen but forbidden", "not seen but required"
Difference = tuple[int, int, str]
"""The token whose output it is, the token that it sees or not, and ``FORBIDDEN`` or ``REQUIRED``."""


class Map(msgspec.Struct, frozen=True, kw_only=True):
    """What each of `n` tokens' outputs sees of `n` tokens under one schedule."""

    schedule: str
    """`full` (the backend's own uncached forward), `prefill` (one append), `chunked`, `decode`, `rows` (two rows that
    grow together) or `sequences` (three, the last one after the first is closed)."""
    sizes: list[int]
    """How many tokens each append adds to each row or sequence."""
    wanted: list[str]
    """A string for each output, a character for each token: `x` must be seen, `.` must not, `?` not resolvable because
    the bounds do not allow to say, blank: there is no such output (claim `returns="last"`)."""
    seen: list[str]
    """Like `wanted`: `x` the output moved, `.` it did not, `?` cannot be told (`notes` say why), blank: no output
    came."""
    stopped: str = ""
    """What ended the schedule, in words; the outputs after it are missing in `seen`."""
    rows: int = 1
    """How many rows or sequences; the `n` tokens are those of the first, then those of the second, and so on."""
    notes: list[str] = []
    """What else was noticed, one sentence each."""

    @property
    def differences(self) -> list[Difference]:
        """Where ``seen`` is not what is ``wanted``, output by output."""
        kinds = {(BLIND, SEES): FORBIDDEN, (SEES, BLIND): REQUIRED}
        return [
            (query, key, kinds[pair])
            for query, lines in enumerate(zip(self.wanted, self.seen, strict=True))
            for key, pair in enumerate(zip(*lines, strict=True))
            if pair in kinds
        ]

    @property
    def right(self) -> bool:
        """Whether every output came, could be told, and sees what it must."""
        return not self.stopped and not self.differences and not any(UNTOLD in line for line in self.seen)

    @property
    def unresolved(self) -> int:
        """How many cells the bounds do not allow to judge."""
        return sum(line.count(UNTOLD) for line in self.wanted)

    def place(self, token: int) -> tuple[int, int]:
        """Row, or sequence, and position of one of the ``n`` tokens."""
        return divmod(token, len(self.wanted) // self.rows)


def maps(client: WorkerClient, config: Config) -> list[Map]:
    """The maps of a backend under one config, one for each schedule that its claims allow; none where it does not take
    the config. Raises WorkerDied.

    Where outputs change from run to run though no token does, one schedule tells so, and only sequences are looked at
    further: each run of them on a fresh process.
    """
    claims = client.claims
    if config.profile not in claims.profiles or config.dtype not in claims.dtypes or client.build(config) is not None:
        return []
    own = None if client.reference_forward is None else remembered(client.reference_forward(config))
    found: list[Map] = []
    starts, fresh = client.starts, False
    for schedule in schedules(config, claims):
        if fresh and schedule.name != "sequences":
            continue
        sight = Sight(client, config, own, schedule, starts, fresh)
        found.append(_map(sight))
        if sight.unsteady and not fresh:
            fresh = True
            if schedule.name == "sequences":
                found[-1] = _map(Sight(client, config, own, schedule, starts, fresh))
    return found


def _map(sight: Sight) -> Map:
    sight.look()
    schedule = sight.schedule
    return Map(
        schedule=schedule.name,
        sizes=list(schedule.sizes),
        rows=schedule.rows,
        wanted=_lines(sight.wanted().tolist()),
        seen=_lines(sight.seen().tolist()),
        stopped=sight.stopped,
        notes=sight.notes,
    )


def _lines(cells: list[list[str]]) -> list[str]:
    return ["".join(line) for line in cells]
