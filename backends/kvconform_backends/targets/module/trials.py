"""Calls of a target on a few tokens, to find out what it takes and gives. Nothing is judged here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvconform_backends.targets.module import identifiers
from kvconform_backends.targets.module.calls import Caller, ModuleSequence
from kvconform_backends.targets.module.conventions import Convention
from kvconform_backends.targets.module.past import grows_by_one, sizes
from kvconform_backends.targets.module.recognised import PROMPT, ProbedTarget, Recognised
from kvconform_backends.targets.third_party import ThirdPartyError, guarded

Array = NDArray[Any]

CHUNK = 2
LENGTH = PROMPT + 1 + CHUNK
"""Tokens of a trial: a prompt, one more, and a chunk."""
MANY_ROWS = 32
"""A number of rows that stands for any number."""


FINE, ROUGH = float(np.sqrt(np.finfo(np.float32).eps)), 0.125
"""Differences that a trial takes for agreement, which only chooses among ways of calling: half of the digits of
float32; with a cache of few bits, one digit."""
UNCACHED, PROMPTED, STEPPED = range(3)
"""How far a trial came that raised: not through the uncached forward, through it, through the first cached call."""


class Trials:
    """Trials of one target. ``error``: the last exception; ``raised``: it in words; ``likeliest``: in words the one of
    the trial that got furthest."""

    def __init__(self, target: ProbedTarget) -> None:
        self.target, self.tolerance = target, FINE
        self.error: ThirdPartyError | None = None
        self.raised, self.likeliest = "", ""
        self._furthest: tuple[int, tuple[int, ...]] = -1, ()

    def note(self, error: ThirdPartyError, stage: int = UNCACHED) -> None:
        """Keeps an exception; of equally far ones the first is the likeliest."""
        self.error, self.raised = error, str(error)
        if (stage, error.progress) > self._furthest:
            self._furthest, self.likeliest = (stage, error.progress), self.raised

    def caller(self, convention: Convention) -> Caller:
        """Calls a copy, since a call may change the state of a module: trials do not depend on one another."""
        c = convention
        module, names = self.target.copied(stateful=bool(c.owned or c.always or c.tell or c.begin))
        return Caller(module, convention, names, self.target.dtype)

    def sample(self, made: Recognised, tokens: int) -> Array:
        """The same tokens at each call, cut to length."""
        rng = np.random.default_rng(0)
        if made.convention.takes == "tokens":
            return rng.integers(0, made.vocabulary, (made.batch, max(tokens, 64)))[:, :tokens]
        states = rng.standard_normal((made.batch, max(tokens, 64), made.width), np.float32)
        return states[:, :tokens]

    def runs(
        self, made: Recognised, tokens: int, token: int | None = None, cached: bool = False, rows: int = 0
    ) -> bool:
        """Whether the uncached forward, or the first cached call, takes that many tokens in that many rows; all tokens
        are ``token`` if given."""
        x = np.resize(self.sample(made, tokens), (rows or made.batch, tokens, *[made.width] * bool(made.width)))
        if token is not None:
            x = np.full_like(x, token)
        caller = self.caller(made.convention)
        try:
            with guarded():
                if cached:
                    caller.step(caller.start(len(x)), x)
                else:
                    caller.uncached(x)
        except ThirdPartyError as error:
            self.note(error)
            return False
        return True

    def rank(self, made: Recognised, afresh: bool = False) -> None:
        """Ranks how far cached calls work. Agreement to half of the digits suffices: it only chooses among ways of
        calling. afresh: on a target whose file is executed again, so that nothing of earlier trials is left in it."""
        caller, x = self.caller(made.convention), self.sample(made, LENGTH)
        if afresh and self.target.rebuilt is not None:
            caller = Caller(*self._renewed(made.convention))
        ends = (PROMPT, PROMPT + 1, LENGTH) if made.chunk is None else (1, 2, 3)
        ranks, start, stage = [False] * 4, 0, UNCACHED
        made.begins = False
        try:
            with guarded():
                wants = [caller.uncached(x[:, :end]) for end in ends]  # first, since the module may own the cache
                sequence, stage = caller.start(len(x)), PROMPTED
                for number, (end, want) in enumerate(zip(ends, wants, strict=True)):
                    got, sequence = caller.step(sequence, x[:, start:end])
                    if number == 0:
                        made.last_only = got.shape[1] == 1
                    shown = 1 if made.uncached_last or made.last_only else end - start
                    agrees = close(got[:, -shown:], want[:, -shown:], self.tolerance)
                    made.begins |= number == 0 and agrees
                    for index in ((0,), (1, 2), (3,))[number]:
                        ranks[index] = agrees or index < 2
                    start, stage = end, STEPPED
        except ThirdPartyError as error:
            self.note(error, stage)
        made.rank = ranks[0], ranks[1], ranks[2], ranks[3]

    def _renewed(self, convention: Convention) -> tuple[Any, Convention, Mapping[str, Any], Any]:
        assert self.target.rebuilt is not None
        module, names = self.target.rebuilt()
        return module, convention, names, self.target.dtype

    def appended(
        self, caller: Caller, sequence: ModuleSequence, x: Array, chunk: int | None
    ) -> tuple[Array, ModuleSequence]:
        """The last output and the sequence after all tokens of ``x``, given in calls of at most ``chunk``."""
        size = chunk or x.shape[1]
        for start in range(0, x.shape[1], size):
            got, sequence = caller.step(sequence, x[:, start : start + size])
        return got, sequence

    def past_matters(self, made: Recognised) -> bool:
        """Whether the output of a call with all tokens changes if its past holds other ones."""
        x = self.sample(made, PROMPT + 1)
        other = x[:, ::-1].copy()
        try:
            with guarded():
                outputs = []
                for tokens in (x, other):
                    caller = self.caller(made.convention)
                    first = tokens[:, :PROMPT]
                    _output, sequence = self.appended(caller, caller.start(len(x)), first, made.chunk)
                    outputs.append(caller.step(replace(sequence, inputs=x[:, :PROMPT]), x[:, PROMPT:])[0])
        except ThirdPartyError:
            return True
        one, two = outputs
        return not np.array_equal(one, two)

    def repeats(self, made: Recognised) -> bool:
        """Whether a second sequence gives what the first one gave."""
        x = self.sample(made, PROMPT)
        try:
            with guarded():
                caller = self.caller(made.convention)
                one, two = (self.appended(caller, caller.start(len(x)), x, made.chunk)[0] for _number in range(2))
        except ThirdPartyError:
            return False
        return close(one, two)

    def remembers(self, made: Recognised) -> bool:
        """Whether a cached call after a prompt, of one token, gives one output that depends on what the prompt was, and
        lengthens the past by one token if anything in it grows."""
        x = self.sample(made, PROMPT + 1)
        other = x.copy()
        other[:, :PROMPT] = (x[:, :PROMPT] + 1) % made.vocabulary if made.vocabulary else -x[:, :PROMPT]
        outputs: list[Array] = []
        try:
            with guarded():
                for tokens in (x, other):
                    caller = self.caller(made.convention)
                    first = tokens[:, :PROMPT]
                    _output, sequence = self.appended(caller, caller.start(len(x)), first, made.chunk)
                    before = dict(sizes(sequence.past))
                    output, sequence = caller.step(sequence, x[:, PROMPT:])
                    outputs.append(output)
                    if not grows_by_one(before, dict(sizes(sequence.past))):
                        return False
        except ThirdPartyError as error:
            self.note(error, STEPPED)
            return False
        one, two = outputs
        return one.shape[1] == 1 and one.shape == two.shape and not np.array_equal(one, two)

    def outputs(self, out: Any, x: Array, convention: Convention) -> Iterator[tuple[str, bool]]:
        """Expressions for the output of a call, and whether it is that of the last token only."""
        batch, new = x.shape[:2]
        heads = (batch, new) if convention.batched else (new,)
        last = (batch, 1)
        if convention.sequence_first:
            heads, last = heads[::-1], last[::-1]
        for expression, value in parts(out, identifiers.OUTPUTS):
            shape = tuple(getattr(value, "shape", ()))
            if len(shape) == len(heads) + 1:
                if shape[:-1] == heads:
                    yield expression, False
                elif convention.batched and shape[:-1] == last:
                    yield expression, True
            elif convention.batched and len(shape) == 2 and shape[0] == batch:
                yield f"{expression}[None]" if convention.sequence_first else f"{expression}[:, None]", True


def parts(out: Any, names: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """The parts of a call's result: expressions and values."""
    if isinstance(out, Mapping) and not hasattr(out, names[0]):
        yield from ((f"out[{name!r}]", out[name]) for name in names if name in out)
    elif isinstance(out, tuple | list) and not hasattr(out, "_fields"):
        yield from ((f"out[{i}]", value) for i, value in enumerate(out))
    elif hasattr(out, "shape"):
        yield "out", out
    else:
        yield from ((f"out.{name}", getattr(out, name)) for name in names if getattr(out, name, None) is not None)


def close(got: Array, want: Array, tolerance: float = FINE) -> bool:
    """Whether two outputs agree, relative to the largest."""
    if got.shape != want.shape:
        return False
    scale = float(np.abs(want).max(initial=0.0))
    return bool((np.abs(got - want) <= tolerance * scale).all())
