"""The guarantee guarantees: what a backend's outputs are sure of beyond conformance, measured for each config.

Each level is a clause. They are ordered from the weakest to the strongest; a backend has a level where its clause and
those of all levels below it hold. What refutes the next one is its counterexample.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from kvconform.judging.verdict import Outcome, Verdict

LEVELS = {
    "same token given margin": ("determinism.same-token",),
    "within bound": ("definition.attention", "definition.decoder"),
    "bitwise repeatable": ("determinism.repeatable",),
    "batch-invariant": ("determinism.batch-invariant",),
    "chunk-invariant": ("determinism.chunk-invariant",),
}
"""From the weakest to the strongest, and the clauses that decide; a config has one of them, or none."""


class Guarantee(msgspec.Struct, frozen=True, kw_only=True):
    """What holds under one config."""

    level: str = ""
    """The strongest level that no program refuted, with all below it; empty: not even the weakest."""
    refuted: str = ""
    """The next level, where a program refutes it; empty where all hold, or where nothing decides on it."""
    sentence: str = ""
    """How it is refuted, or why it is not decided, in words."""
    counterexample: str = ""
    """Name of the file with the programs that refute it."""


def measured(verdicts: Sequence[Verdict]) -> dict[str, Guarantee]:
    """By config, for those that have a verdict on at least one level. A level that does not concern a config (tokens
    have no margin in the attention profile) is passed over."""
    known = {verdict.key: verdict for verdict in verdicts}
    found = {}
    for config in dict.fromkeys(verdict.config for verdict in verdicts):
        deciding = [
            (level, known[clause, config])
            for level, clauses in LEVELS.items()
            for clause in clauses
            if (clause, config) in known
        ]
        if deciding:
            found[config] = _guarantee(deciding)
    return found


def _guarantee(deciding: list[tuple[str, Verdict]]) -> Guarantee:
    held = ""
    for level, verdict in deciding:
        if verdict.outcome is not Outcome.PASS:
            refuted = level if verdict.outcome is Outcome.REFUTED or verdict.outcome.broken else ""
            return Guarantee(
                level=held, refuted=refuted, sentence=verdict.sentence, counterexample=verdict.counterexample
            )
        held = level
    return Guarantee(level=held)
