"""How much is tried for each cell."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Effort:
    """structures: how many shapes of program are drawn for a cell; variants: seeds tried within each, in one message.

    seconds: no new structure is begun after that many seconds of a cell. shrink: whether a failure is made small and
    confirmed on a fresh process; an audit needs to know only that there was one. rebuild: seconds that may go into
    new processes for one failure (crashes, hangs, leaked state). leaks: of how many failures by leaked state the list
    of programs that must run before is made short; that of a further one is all that ran.
    """

    name: str
    structures: int
    variants: int
    seconds: float
    shrink: bool = True
    rebuild: float = 45.0
    leaks: int = 1000


EFFORTS = {
    effort.name: effort
    for effort in (Effort("smoke", 16, 2, 120.0), Effort("pr", 20, 3, 120.0), Effort("nightly", 250, 20, 600.0))
}
DEFAULT_EFFORT = "pr"
SHRINK_TRIALS, SHRINK_SECONDS = 400, 20.0
"""Shrinking a failure ends after so many trials or seconds."""
GUARANTEE_TRIALS, GUARANTEE_SECONDS = 60, 1.0
"""The same where a measured guarantee is refuted: many backends refute many, and that one does is what matters."""
REBUILDS = 30
"""Shrinking a crash or timeout, and looking for leaked state, end after so many new workers or ``Effort.rebuild``."""
