"""How much is tried for each cell."""

from __future__ import annotations

from dataclasses import dataclass

from kvconform.errors import BadArgument
from kvconform_specs.clause import Clause
from kvconform_specs.configs import share


@dataclass(frozen=True)
class Effort:
    """How many programs are tried for a cell, and how long a failure is analysed.

    structures: how many shapes of program are drawn for a cell.
    variants: how many seeds are tried with each structure, in one message to the worker.
    seconds: after so many seconds of a cell no new structure is begun.
    shrink: whether a failure is shrunk and confirmed on a fresh process; an audit only needs to know that it failed.
    rebuild: seconds of starting new processes for one failure (crashes, timeouts, leaked state).
    leaks: for how many failures by leaked state the list of earlier programs is shortened; later ones keep all of it.
    """

    name: str
    structures: int
    variants: int
    seconds: float
    shrink: bool = True
    rebuild: float = 45.0
    leaks: int = 1000

    def planned(self, clause: Clause, label: str = "") -> int:
        """How many structures are drawn for a cell of the clause, under the config with that label."""
        return max(2, round(self.structures * clause.share * share(label)))

    def seeds(self, clause: Clause) -> tuple[int, ...]:
        """The variants that are tried with each structure."""
        return tuple(range(min(self.variants, clause.variants)))


EFFORTS = {
    effort.name: effort
    for effort in (Effort("smoke", 12, 2, 120.0), Effort("pr", 20, 2, 120.0), Effort("nightly", 60, 6, 600.0))
}
DEFAULT_EFFORT = "pr"
CHECK = Effort("check", 8, 2, 20.0, rebuild=5.0, leaks=3)
"""The default of ``kvconform check``: a broken module shows in the first structures, and a small one takes less than a
minute."""
CHECK_LARGE = Effort("check-large", 4, 1, 60.0, rebuild=5.0, leaks=3)
"""The same for a model of more than ``LARGE`` weights, each of whose steps takes a hundred times as long."""
LARGE = 20_000_000
SHRINK_TRIALS, SHRINK_SECONDS = 400, 20.0
"""Shrinking a failure ends after so many trials or seconds."""
GUARANTEE_TRIALS, GUARANTEE_SECONDS = 60, 1.0
"""The same for a refuted guarantee: many backends refute many, and a small counterexample matters less."""
REBUILDS = 30
"""Shrinking a crash or timeout, and looking for leaked state, end after so many new workers or ``Effort.rebuild``."""


def effort_named(name: str) -> Effort:
    """Raises BadArgument if there is no such effort."""
    if name not in EFFORTS:
        raise BadArgument("effort", name, EFFORTS)
    return EFFORTS[name]
