"""Failures grouped by what they share, across backends, configs and clauses."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from kvconform.explain.diagnosis.mistakes import MISTAKES
from kvconform.results.results import Results
from kvconform_reports.view.outcomes import labels
from kvconform_reports.view.tables import Failure


@dataclass(frozen=True)
class Cause:
    """What several failures share: ``words``; the backends, configs and clauses, each once; the failures."""

    words: str
    backends: tuple[str, ...]
    configs: tuple[str, ...]
    clauses: tuple[str, ...]
    failures: tuple[Failure, ...]


def causes(results: Sequence[Results], failures: Sequence[Failure]) -> tuple[Cause, ...]:
    """The causes of two failures or more: those of most backends first, then those of most failures.

    A failure's cause is the exception that its steps raised, numbers apart; else the mistake that the diagnosis of its
    backend under its config names; else the clause, and in which way it broke.
    """
    mistakes = {
        (label, config): diagnosis.mistake
        for label, result in zip(labels(results), results, strict=True)
        for config, diagnosis in result.diagnoses.items()
    }
    found: dict[tuple[str, ...], list[Failure]] = defaultdict(list)
    for one in failures:
        found[_cause(one, mistakes.get((one.label, one.verdict.config), ""))].append(one)
    shared = [_of(_words(cause), those) for cause, those in found.items() if len(those) > 1]
    return tuple(sorted(shared, key=lambda cause: (-len(cause.backends), -len(cause.failures))))


def _cause(failure: Failure, mistake: str) -> tuple[str, ...]:
    mismatch = failure.verdict.mismatch
    if mismatch is not None and mismatch.error is not None:
        return "error", *mismatch.error.pattern
    if mistake:
        return "mistake", mistake
    return "clause", failure.verdict.clause, "" if mismatch is None else mismatch.kind.value


def _words(cause: tuple[str, ...]) -> str:
    match cause:
        case ("error", kind, message):
            return f"{kind}: {message}"
        case ("mistake", mistake):
            return f"{MISTAKES[mistake].words} ({mistake})" if mistake in MISTAKES else mistake
        case (_, clause, kind):
            return f"{clause}: {kind}" if kind else clause
    raise AssertionError(cause)


def _of(words: str, those: Sequence[Failure]) -> Cause:
    return Cause(
        words,
        tuple(dict.fromkeys(one.label for one in those)),
        tuple(dict.fromkeys(one.verdict.config for one in those)),
        tuple(dict.fromkeys(one.verdict.clause for one in those)),
        tuple(those),
    )
