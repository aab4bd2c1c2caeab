"""Guarantees: what holds for a backend's outputs beyond conformance, measured for each config.

Each level is a clause. The levels are ordered from the weakest to the strongest; a backend has a level if its clause
and those of all lower levels hold. The next level is refuted by a counterexample.
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
ENGINE_LEVELS = {
    "repeatable answers": ("serving.repeatable",),
    "the same beside others": ("serving.batch-invariant",),
    "the same from the cache": ("serving.bitwise-hit",),
}
"""The same of serving engines."""


class Guarantee(msgspec.Struct, frozen=True, kw_only=True):
    """The guarantee under one config."""

    level: str = ""
    """The strongest level that holds, with all lower ones; empty if not even the weakest holds."""
    refuted: str = ""
    """The next level, if a program refutes it; empty if all hold or the next one is undecided."""
    sentence: str = ""
    """How the next level is refuted, or why it is undecided."""
    counterexample: str = ""
    """The name of the file that refutes it."""


def measured(verdicts: Sequence[Verdict]) -> dict[str, Guarantee]:
    """By config, for those that have a verdict on at least one level besides the definition's. A level that does not
    concern a config is skipped (in the attention profile there are no tokens)."""
    known = {verdict.key: verdict for verdict in verdicts}
    found = {}
    for config in dict.fromkeys(verdict.config for verdict in verdicts):
        deciding = [
            (level, known[clause, config])
            for level, clauses in (*LEVELS.items(), *ENGINE_LEVELS.items())
            for clause in clauses
            if (clause, config) in known
        ]
        if any(verdict.clause not in LEVELS["within bound"] for _level, verdict in deciding):
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
