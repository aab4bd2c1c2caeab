"""Measures by trial how many rows and tokens a target takes: in one call, and in a sequence."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from kvconform_backends.targets.module import identifiers
from kvconform_backends.targets.module.recognised import CAPACITY, PROMPT, Recognised
from kvconform_backends.targets.module.trials import LENGTH, MANY_ROWS, STEPPED, Array, Trials, close
from kvconform_backends.targets.third_party import ThirdPartyError, guarded, largest


class Limits(Trials):
    """Each ``measure_`` method stores its results in the given ``Recognised``."""

    def _limiting(self, made: Recognised) -> tuple[bool, ...]:
        """Which calls limit it: uncached ones, and first cached ones if earlier trials leave nothing in the cache."""
        return (False, True) if made.rank[0] and made.restarts else (False,)

    def measure_rows(self, made: Recognised) -> None:
        """The maximum number of rows, if it takes two."""
        tokens = min(PROMPT, made.chunk or PROMPT)
        for cached in self._limiting(made) if made.batch == 2 else ():
            if not self.runs(made, tokens, cached=cached, rows=MANY_ROWS):
                made.refusal = self.raised
                rows = largest(2, MANY_ROWS - 1, lambda n: self.runs(made, tokens, cached=cached, rows=n))  # noqa: B023
                made.rows = rows if made.rows is None else min(rows, made.rows)

    def measure_tokens(self, made: Recognised) -> None:
        """The maximum length of a sequence, and of one cached call.

        A number that the target reports limits nothing unless a call beyond it raises. Where a sequence can be filled
        further by shorter calls, the longest call is a limit of calls, not of sequences.
        """
        longest = CAPACITY
        made.capacity, made.capacity_from = CAPACITY, ""
        if not self.runs(made, longest):
            longest = largest(LENGTH, CAPACITY, lambda n: self.runs(made, n))
            made.capacity, made.capacity_from = longest, "longest input without a cache"
        if True in self._limiting(made):
            self._measure_calls(made, longest)
            self._measure_reported(made)

    def _measure_calls(self, made: Recognised, longest: int) -> None:
        if made.chunk is None and not self.runs(made, longest, cached=True):
            prompt = largest(1, longest, lambda n: self.runs(made, n, cached=True))
            self.fills(made, (longest,))
            refusal = self.raised
            if prompt < longest and (self.fills(made, _pieces(longest, prompt)) or self.fills(made, (prompt, 1))):
                made.chunk, made.chunk_refusal = prompt, refusal
        self._measure_chunk(made, longest)
        step = made.chunk or longest
        filled = largest(1, longest, lambda n: self.fills(made, _pieces(n, step)))
        if filled < longest:
            made.capacity, made.capacity_from = filled, "longest sequence of cached calls"
        if made.capacity < CAPACITY:  # what its own forward refuses, cached calls must refuse as well
            accepted = self.fills(made, (*_pieces(made.capacity, step), 1))
            made.refuses = accepted or self._survives(made, step)

    def _measure_chunk(self, made: Recognised, longest: int) -> None:
        """The longest call beside a past: a limit only if the target itself refuses longer ones. An exception of an
        operation is left for the suite to report."""
        most = min(made.chunk or longest, longest - 1)
        if most > 1 and not self.fills(made, (1, most)) and self.error is not None and self.error.deliberate:
            refusal = self.raised
            shorter = largest(1, most, lambda n: self.fills(made, (1, n)))
            if shorter < most and self.fills(made, (1, *_pieces(longest - 1, shorter))):
                made.chunk, made.chunk_refusal = shorter, refusal

    def fills(self, made: Recognised, pieces: tuple[int, ...]) -> bool:
        """Whether cached calls of these lengths, one after another, raise nothing."""
        return self._filled(made, pieces) is not None

    def _filled(self, made: Recognised, pieces: tuple[int, ...]) -> tuple[Array, Array] | None:
        """The last output of such calls, and all their tokens; None if one raised."""
        x = self._tokens(made, sum(pieces))
        caller = self.caller(made.convention)
        try:
            with guarded():
                sequence, start = caller.start(len(x)), 0
                for size in pieces:
                    output, sequence = caller.step(sequence, x[:, start : start + size])
                    start += size
        except ThirdPartyError as error:
            self.note(error, STEPPED)
            return None
        return output[:, -1:], x

    def _survives(self, made: Recognised, step: int) -> bool:
        """Whether a sequence can go on after a call beyond the capacity has raised."""
        x = self._tokens(made, made.capacity + 1)
        caller, start = self.caller(made.convention), 0
        try:
            with guarded():
                want = self.caller(made.convention).uncached(x[:, :-1])[:, -1:]
                sequence = caller.start(len(x))
                for size in _pieces(made.capacity - 1, step):
                    _output, sequence = caller.step(sequence, x[:, start : start + size])
                    start += size
        except ThirdPartyError:
            return False
        try:
            with guarded():
                caller.step(sequence, x[:, start:][:, : made.chunk or 2])
        except ThirdPartyError:
            pass
        else:
            return False
        try:
            with guarded():
                return close(caller.step(sequence, x[:, start:-1])[0], want)
        except ThirdPartyError:
            return False

    def _tokens(self, made: Recognised, tokens: int) -> Array:
        x = self.sample(made, tokens)
        return np.resize(x, (made.batch, tokens, *x.shape[2:]))

    def _measure_reported(self, made: Recognised) -> None:
        """A capacity that the target reports, if cached calls agree with its forward up to it and not beyond: what
        comes then is not refused, as it should be."""
        step = made.chunk or made.capacity
        for value, name in self.target.reported(identifiers.CAPACITIES):
            if value == made.capacity and made.capacity_from:
                made.capacity_from = name
            elif LENGTH <= value < made.capacity and (
                self._agrees_at(made, value, step) and not self._agrees_at(made, value + 1, step)
            ):
                made.capacity, made.capacity_from, made.refuses = value, name, True
                return

    def _agrees_at(self, made: Recognised, tokens: int, step: int) -> bool:
        """Whether the output of a last call of one token agrees."""
        found = self._filled(made, (*_pieces(tokens - 1, step), 1))
        if found is None:
            return False
        output, x = found
        try:
            with guarded():
                return close(output, self.caller(made.convention).uncached(x)[:, -1:])
        except ThirdPartyError:
            return False

    def one_by_one(self, made: Recognised) -> Recognised | None:
        """The same with calls of one token after a first call of any length, if these agree and the target itself
        refuses several tokens then."""
        if self.error is None or not self.error.deliberate or not all(made.rank[:3]):
            return None
        convention = replace(made.convention, one_by_one=True)
        trial = replace(made, convention=convention, chunk_refusal=self.raised)
        self.rank(trial)
        return trial if all(trial.rank) else None

    def one_token_each(self, made: Recognised, refused: bool = False) -> Recognised | None:
        """The same with calls of one token, if these agree and cached calls of several are ``refused``: by the target
        itself, or by any exception if nothing else agrees."""
        if self.error is None or not (refused or self.error.deliberate):
            return None
        trial = replace(made, chunk=1, chunk_refusal=self.raised)
        self.rank(trial)
        return trial if all(trial.rank) else None

    def right_for_one_token(self, made: Recognised) -> Recognised | None:
        """The same, if calls of one token agree: it is called rightly, and wrong for several tokens, which it does not
        refuse."""
        trial = replace(made, chunk=1)
        self.rank(trial)
        return replace(trial, chunk=None) if all(trial.rank) else None


def _pieces(total: int, size: int) -> tuple[int, ...]:
    return (*[size] * (total // size), *[total % size] * bool(total % size))
