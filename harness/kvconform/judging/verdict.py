"""What was found out about one clause on one backend under one config."""

from __future__ import annotations

from enum import Enum

import msgspec


class Outcome(Enum):
    """The closed set. Only PASS is a pass.

    REFUTED: a measured guarantee (``Level.SHOULD``) does not hold here. KNOWN_FAILURE: the cell is in the list of known
    failures, and its stored counterexample still fails. Neither is broken.
    """

    PASS = "pass"
    FAIL = "fail"
    CRASH = "crash"
    TIMEOUT = "timeout"
    REFUTED = "refuted"
    KNOWN_FAILURE = "known failure"
    INCONCLUSIVE = "inconclusive"
    UNSUPPORTED = "unsupported"
    NOT_EXERCISED = "not exercised"

    @property
    def broken(self) -> bool:
        """Whether the backend broke the clause."""
        return self in (Outcome.FAIL, Outcome.CRASH, Outcome.TIMEOUT)


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """One cell of the matrix.

    sentence: what is wrong (broken, refuted, known), or why there is no verdict (the others but PASS).
    counterexample: the name of its file. compared: numbers that were compared; programs, structures: what was judged
    and how many shapes they had. worst: largest error as a fraction of its bound, where the relation has bounds.
    found_after: programs judged up to and with the first that broke the clause. raised: a fail that is an exception of
    a legal step, so that no output was wrong.
    """

    clause: str
    config: str
    backend: str
    outcome: Outcome
    sentence: str = ""
    counterexample: str = ""
    compared: int = 0
    programs: int = 0
    structures: int = 0
    seconds: float = 0.0
    worst: float | None = None
    found_after: int | None = None
    raised: bool = False

    def __post_init__(self) -> None:
        if self.outcome is Outcome.PASS and self.compared == 0:
            raise ValueError(f"{self.clause} on {self.backend}: a pass must have compared something")
        if self.outcome is not Outcome.PASS and not self.sentence:
            raise ValueError(f"{self.clause} on {self.backend}: {self.outcome.value} must say why")

    @property
    def key(self) -> tuple[str, str]:
        return self.clause, self.config
