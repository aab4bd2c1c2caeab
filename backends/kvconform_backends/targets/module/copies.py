"""Finds by trial how a sequence of a target is forked, and how its rows are put in another order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from kvconform_backends.targets.module import identifiers
from kvconform_backends.targets.module.calls import ModuleSequence
from kvconform_backends.targets.module.conventions import Convention
from kvconform_backends.targets.module.recognised import Recognised
from kvconform_backends.targets.module.trials import STEPPED, Array, Trials, close
from kvconform_backends.targets.third_party import ThirdPartyError, guarded

BEFORE, AFTER = 4, 3
"""Tokens before a fork or a new order, and after it."""
SWAPPED, MORE = [1, 0], [1, 0, 1]
"""New orders of two rows."""


class Copies(Trials):
    """Each ``measure_`` method stores its results in the given ``Recognised``."""

    def measure_fork(self, made: Recognised) -> None:
        """A past is forked by a method of its own if it has one, right or wrong, and otherwise by a deep copy if cached
        calls on both then agree: a copy that shares memory is none."""
        c = made.convention
        if c.fork or c.owned or c.begin:
            return
        past = self._held(made).past
        for name in identifiers.FORKS if _of_the_target(past) else ():
            trial = replace(made, convention=replace(c, fork=f"past.{name}()"))
            if self._agrees(trial, self._forked) is not None:
                made.convention = trial.convention
                _used(made, name)
                return
        trial = replace(made, convention=replace(c, fork="copy.deepcopy(past)"))
        if self._agrees(trial, self._forked):
            made.convention = trial.convention

    def measure_reorder(self, made: Recognised) -> None:
        """Rows are put in another order by a method of the target if it has one, right or wrong, and otherwise by
        picking them in each array of the past, if cached calls then agree."""
        c = made.convention
        if c.reorder or made.batch != 2 or c.sequence_first:
            return
        for name, convention in self._reorders(made):
            trial = replace(made, convention=convention)
            agrees = self._agrees(trial, self._swapped)
            if agrees is None or (agrees and not self._agrees(trial, self._more)):
                continue
            if agrees or name:
                made.convention = convention
                sequence = self._held(made)
                with guarded():
                    caller = self.caller(convention)
                    made.reordered_new = caller.reorder(sequence, SWAPPED).past is not sequence.past
                _used(made, name)
                return

    def _reorders(self, made: Recognised) -> Iterator[tuple[str, Convention]]:
        """The name of a method of the target, or nothing, and the convention that reorders."""
        c, past = made.convention, self._held(made).past
        orders = ("torch.tensor(rows, device=device)", "rows")
        for owner, text in ((past, "past.{}({})"), (self.target.module, "module.{}(past, {})")):
            for name in identifiers.REORDERS:
                if (owner is not past or _of_the_target(past)) and callable(getattr(owner, name, None)):
                    yield from ((name, replace(c, reorder=text.format(name, order))) for order in orders)
        picked = None if c.owned or c.begin else _picked(past, "past")
        if picked is not None and c.batched:
            yield "", replace(c, reorder=picked)

    def _held(self, made: Recognised) -> ModuleSequence:
        caller, x = self.caller(made.convention), self.sample(made, BEFORE)
        return self.appended(caller, caller.start(len(x)), x, made.chunk)[1]

    def _agrees(self, made: Recognised, trial: Callable[[Recognised], Iterator[tuple[Array, Array]]]) -> bool | None:
        """Whether the outputs of a trial are those that are wanted; None if it raised."""
        try:
            with guarded():
                return all(close(got, want, self.tolerance) for got, want in list(trial(made)))
        except ThirdPartyError as error:
            self.note(error, STEPPED)
            return None

    def _forked(self, made: Recognised) -> Iterator[tuple[Array, Array]]:
        caller, x = self.caller(made.convention), self.sample(made, BEFORE + AFTER)
        y = np.concatenate([x[:, :BEFORE], x[:, BEFORE:][:, ::-1]], axis=1)  # other tokens than the original's
        wants = [self.caller(made.convention).uncached(tokens)[:, -1:] for tokens in (x, y)]
        sequence = self.appended(caller, caller.start(len(x)), x[:, :BEFORE], made.chunk)[1]
        fork = caller.fork(sequence)
        if type(fork.past) is not type(sequence.past):
            raise TypeError("another kind of past")
        held = [sequence, fork]
        for at in range(BEFORE, BEFORE + AFTER):
            for index, tokens in enumerate((x, y)):
                got, held[index] = caller.step(held[index], tokens[:, at : at + 1])
                if at == BEFORE + AFTER - 1:
                    yield got, wants[index]

    def _swapped(self, made: Recognised) -> Iterator[tuple[Array, Array]]:
        return self._reordered(made, SWAPPED)

    def _more(self, made: Recognised) -> Iterator[tuple[Array, Array]]:
        return self._reordered(made, MORE)

    def _reordered(self, made: Recognised, rows: list[int]) -> Iterator[tuple[Array, Array]]:
        caller, x = self.caller(made.convention), self.sample(made, BEFORE + 1)
        want = self.caller(made.convention).uncached(x[rows])
        sequence = self.appended(caller, caller.start(len(x)), x[:, :BEFORE], made.chunk)[1]
        got, _sequence = caller.step(caller.reorder(sequence, rows), x[rows][:, BEFORE:])
        yield got[:, -1:], want[:, -1:]


def _of_the_target(past: Any) -> bool:
    """Whether a past is an object of a class of its own, not a container or an array."""
    return type(past).__module__.partition(".")[0] not in ("builtins", "collections", "torch", "numpy")


def _used(made: Recognised, name: str) -> None:
    made.operations = tuple(words for words in made.operations if not words.startswith(f"{name} of"))


def _picked(value: Any, name: str, deep: int = 0) -> str | None:
    """An expression for a past with the ``rows`` of each of its arrays; None for other structures."""
    if isinstance(value, Tensor | np.ndarray):
        return f"{name}[rows]" if value.ndim else name
    if value is None or isinstance(value, int | float | str):
        return name
    item = "xyz"[deep] * 2 if deep < 3 else ""
    if type(value) is dict and value and item:
        texts = {_picked(one, item, deep + 1) for one in value.values()}
        text = texts.pop()
        return None if text is None or texts else f"{{key: {text} for key, {item} in {name}.items()}}"
    if type(value) in (list, tuple) and value and item:
        texts = {_picked(one, item, deep + 1) for one in value}
        if None in texts:
            return None
        kind = type(value).__name__
        if len(texts) == 1:
            return f"{kind}({texts.pop()} for {item} in {name})"
        each = ", ".join(str(_picked(one, f"{name}[{index}]", deep + 1)) for index, one in enumerate(value))
        return f"{kind}([{each}])"
    return None
