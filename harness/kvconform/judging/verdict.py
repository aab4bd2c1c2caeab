"""What was found out about one clause on one backend under one config."""

from __future__ import annotations

from enum import Enum

import msgspec

from kvconform.judging.mismatch import Mismatch


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


class Reason(Enum):
    """Why a cell has no verdict on the backend."""

    PROFILE = "profile not claimed"
    DTYPE = "dtype not claimed"
    ABILITY = "ability not claimed"
    REFUSED = "config refused"
    REFERENCE = "about the reference"
    REFERENCE_BROKEN = "reference broken"
    REFERENCE_DISAGREES = "disagrees with the reference"
    NOT_CONFIRMED = "not confirmed"
    FALLBACK = "fallback ran"
    UNKNOWN_RUNTIME = "what ran is not known"
    NOTHING_COMPARED = "nothing compared"
    SITUATION = "a situation was not reached"
    KILLED = "killed from outside"
    OUT_OF_MEMORY = "out of memory"
    BLIND = "an error cannot be told from rounding"
    NO_REFERENCE = "no answer without the prefix cache"
    NO_EVIDENCE = "the engine reported no hit or preemption"
    LIMIT = "the limit of requests or seconds is reached"


class Verdict(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One cell of the matrix: what was found out about one clause on one backend under one config."""

    clause: str
    """Name of the clause, such as `equivalence.decode`."""
    config: str
    """Name of the config, with its dtype where that is not float32."""
    backend: str
    """Address of the backend."""
    outcome: Outcome
    """What it comes to; only `pass` is a pass."""
    reason: Reason | None = None
    """Why there is no verdict, where the outcome is inconclusive, unsupported or not exercised."""
    mismatch: Mismatch | None = None
    """What broke the clause, where something did."""
    sentence: str = ""
    """The mismatch or the reason in words, for people: nothing reads it; empty for a pass."""
    steps: str = ""
    """The steps of the program that broke the clause, up to the one that did, in words; empty where none was
    running."""
    counterexample: str = ""
    """Name of the file with the programs that break the clause; empty where none was written."""
    compared: int = 0
    """How many numbers were compared."""
    programs: int = 0
    """How many programs were judged, each variant of its seeds counted."""
    structures: int = 0
    """How many different shapes of programs these had."""
    planned: int = 0
    """How many shapes were planned; fewer are judged where one breaks the clause, or where time ended (`cut`)."""
    digest: str = ""
    """Of the planned programs: cells with equal digests planned the same inputs; empty where none were planned."""
    cut: bool = False
    """Whether the time limit of the effort ended the cell before all planned shapes were judged."""
    situations: dict[str, int] = {}
    """For each situation that the clause is about, and that this cell can reach, how many judged cases reached it."""
    seconds: float = 0.0
    """Wall time of the cell, in seconds."""
    worst: float | None = None
    """Largest error as a fraction of its bound, up to the first mismatch; null where no relation has bounds."""
    found_after: int | None = None
    """How many programs were judged up to and with the first that broke the clause."""

    def __post_init__(self) -> None:
        if self.outcome is Outcome.PASS and self.compared == 0:
            raise ValueError(f"{self.clause} on {self.backend}: a pass must have compared something")
        if self.outcome is not Outcome.PASS and not self.sentence:
            raise ValueError(f"{self.clause} on {self.backend}: {self.outcome.value} must say why")
        violated = self.outcome.broken or self.outcome in (Outcome.REFUTED, Outcome.KNOWN_FAILURE)
        if violated and self.mismatch is None:
            raise ValueError(f"{self.clause} on {self.backend}: {self.outcome.value} must have a mismatch")
        if (self.reason is None) is not (violated or self.outcome is Outcome.PASS):
            raise ValueError(f"{self.clause} on {self.backend}: a reason is given if and only if there is no verdict")

    @property
    def raised(self) -> bool:
        """Whether a legal step raised, so that no output was wrong."""
        return self.mismatch is not None and self.mismatch.raised

    @property
    def error_pattern(self) -> tuple[str, ...]:
        """What the exception of a legal step has in common with equal ones of other cells; empty where none raised."""
        error = self.mismatch.error if self.raised and self.mismatch is not None else None
        return () if error is None else (self.config, *error.pattern)

    @property
    def key(self) -> tuple[str, str]:
        return self.clause, self.config
