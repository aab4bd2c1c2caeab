"""Finds by trial what else a target can do: truncate a sequence, and take rows of different lengths."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from kvconform_backends.targets.module import identifiers
from kvconform_backends.targets.module.calls import ModuleSequence
from kvconform_backends.targets.module.conventions import Convention
from kvconform_backends.targets.module.recognised import Recognised
from kvconform_backends.targets.module.signature import extended
from kvconform_backends.targets.module.trials import STEPPED, Array, Trials, close
from kvconform_backends.targets.third_party import ThirdPartyError, guarded, largest

HELD, KEPT = 5, 2
"""Tokens before and after the truncation of a trial: as many as are kept cannot be taken for as many as are removed."""
FIRST, LATER = (3, 1), ((1, 2), (1, 1))
"""How many tokens each row takes in the first call of a trial, and in its second."""


class Operations(Trials):
    """Each ``measure_`` method stores its results in the given ``Recognised``."""

    # --- truncation ---
    def measure_truncation(self, made: Recognised) -> None:
        """How a sequence is truncated: by the first form after which cached calls agree, or else by the first after
        which the past tells the right length. Whether it then works is left for the suite to report."""
        if made.convention.truncate:
            return
        told: Convention | None = None
        for convention in self._truncations(made):
            trial = replace(made, convention=convention)
            right, agrees = self._truncated(trial)
            if agrees:
                told = convention
                break
            told = told or (convention if right else None)
        if told is not None:
            made.convention = told
            with guarded():
                caller, sequence = self._begun(made, HELD)
                made.truncated_new = caller.truncate(sequence, KEPT).past is not sequence.past
            name = told.truncate.partition("(")[0].rpartition(".")[2]
            made.operations = tuple(words for words in made.operations if not words.startswith(f"{name} of"))
            self._measure_rollback(made)

    def _truncations(self, made: Recognised) -> Iterator[Convention]:
        _output, sequence = self._begun(made, HELD)
        past, module = sequence.past, self.target.module
        owners: list[tuple[Any, str]] = [(past, "past.{}({})"), (module, "module.{}({})")]
        if isinstance(past, list | tuple) and past:
            owners.insert(1, (past[0], "[part.{}({}) for part in past]"))
        keep, remove = ("length", "cached - length")
        for owner, text in owners:
            for name in (*identifiers.KEEPS, *identifiers.REMOVES):
                method = getattr(owner, name, None)
                if callable(method) and _takes_one(method):
                    for form in (keep, remove) if name in identifiers.KEEPS else (remove, keep):
                        yield replace(made.convention, truncate=text.format(name, form))

    def _begun(self, made: Recognised, tokens: int) -> tuple[Any, ModuleSequence]:
        caller, x = self.caller(made.convention), self.sample(made, tokens)
        return caller, self.appended(caller, caller.start(len(x)), x, made.chunk)[1]

    def _truncated(self, made: Recognised) -> tuple[bool, bool]:
        """Whether the past tells the right length after a truncation, and whether calls after it agree."""
        x = self.sample(made, HELD)
        y = np.concatenate([x[:, :KEPT], x[:, KEPT:][:, ::-1]], axis=1)  # the tokens after it are others
        right = False
        try:
            with guarded():
                want = self.caller(made.convention).uncached(y)
                caller, sequence = self._begun(made, HELD)
                sequence = caller.truncate(sequence, KEPT)
                right = bool(made.convention.length) and caller.length(sequence) == KEPT
                got, _sequence = self.appended(caller, sequence, y[:, KEPT:], made.chunk)
        except ThirdPartyError as error:
            self.note(error, STEPPED)
            return right, False
        return right, close(got[:, -1:], want[:, -1:], self.tolerance)

    def _measure_rollback(self, made: Recognised) -> None:
        """How many tokens can be undone, if the target itself refuses more."""
        total = made.capacity

        def undoes(count: int) -> bool:
            try:
                with guarded():
                    caller, sequence = self._begun(made, total)
                    caller.truncate(sequence, total - count)
            except ThirdPartyError as error:
                self.note(error, STEPPED)
                return False
            return True

        if not undoes(total - 1) and self.error is not None and self.error.deliberate and undoes(1):
            made.rollback = largest(1, total - 1, undoes)

    # --- rows of different lengths ---
    def measure_ragged(self, made: Recognised) -> None:
        """How rows take different numbers of tokens: by the first form that has an effect on a second call, where the
        first agrees. Whether the second agrees is left for the suite to report."""
        if made.batch < 2 or made.last_only or made.chunk or made.convention.ragged:
            return
        for name in (n for n in made.signature.unknown if n in identifiers.LENGTHS):
            for form in ("torch.tensor(counts, device=x.device)", "counts"):
                text = extended(made.convention.call, name, form)
                trial = replace(made, convention=replace(made.convention, ragged=text))
                later = next((counts for counts in LATER if self._takes(trial, made.convention.call, counts)), None)
                if later is not None:
                    made.convention, made.ragged_later = trial.convention, later == LATER[0]
                    made.operations = tuple(words for words in made.operations if words != f"its argument {name}")
                    return

    def _takes(self, made: Recognised, without: str, later: tuple[int, ...]) -> bool:
        """Whether a first call with other numbers of tokens in each row agrees, and the argument that tells them has an
        effect on a call after it."""
        x = self.sample(made, max(FIRST) + max(later))
        untold = replace(made, convention=replace(made.convention, ragged=without))
        try:
            with guarded():
                first, told = self._ragged(made, x, later)
                for row, count in enumerate(FIRST):
                    want = self.caller(made.convention).uncached(np.repeat(x[row : row + 1, :count], len(x), 0))
                    if not close(first[row, :count], want[0], self.tolerance):
                        return False
                return not np.array_equal(told, self._ragged(untold, x, later)[1])
        except ThirdPartyError as error:
            self.note(error, STEPPED)
            return False

    def _ragged(self, made: Recognised, x: Array, later: tuple[int, ...]) -> tuple[Array, Array]:
        """The outputs of both calls."""
        caller, start = self.caller(made.convention), max(FIRST)
        first, sequence = caller.step(caller.start(len(x)), x[:, :start], 0, FIRST)
        return first, caller.step(sequence, x[:, start:], 0, later)[0]


def _takes_one(method: Any) -> bool:
    """Whether a method can be called with one argument."""
    try:
        inspect.signature(method).bind(0)
    except (TypeError, ValueError):
        return False
    return True
