"""Calls of a target on a few tokens, to find out what it takes and gives. Nothing is judged here."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from kvconform_backends.targets.module import identifiers
from kvconform_backends.targets.module.calls import Caller
from kvconform_backends.targets.module.conventions import Convention
from kvconform_backends.targets.module.recognised import ProbedTarget, Recognised
from kvconform_backends.targets.third_party import ThirdPartyError, guarded

Array = NDArray[Any]

PROMPT, CHUNK = 3, 2
LENGTH = PROMPT + 1 + CHUNK
"""Tokens of a trial: a prompt, one more, and a chunk."""
MANY_ROWS = 32
"""A number of rows that stands for any number."""
MIN_CAPACITY = 8
"""Minimum length of a sequence for meaningful programs."""


class Trials:
    """Trials of one target. ``raised``: the last exception, in words."""

    def __init__(self, target: ProbedTarget) -> None:
        self.target, self.raised = target, ""

    def caller(self, convention: Convention) -> Caller:
        """Calls a fresh copy if the module has a state: its cache, which may not be possible to empty, or a context."""
        module = self.target.module
        if isinstance(module, nn.Module) and (convention.owned or convention.always or convention.tell):
            module = copy.deepcopy(module)
        return Caller(module, convention, self.target.namespace, self.target.dtype)

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
            self.raised = str(error)
            return False
        return True

    def rank(self, made: Recognised) -> None:
        """Ranks how far cached calls work. Agreement to half of the digits suffices: it only chooses among ways of
        calling."""
        caller, x = self.caller(made.convention), self.sample(made, LENGTH)
        ends, ranks, start = (PROMPT, PROMPT + 1, LENGTH), [False] * 4, 0
        try:
            with guarded():
                wants = [caller.uncached(x[:, :end]) for end in ends]  # first, since the module may own the cache
                sequence = caller.start(len(x))
                for number, (end, want) in enumerate(zip(ends, wants, strict=True)):
                    got, sequence = caller.step(sequence, x[:, start:end])
                    if number == 0:
                        made.last_only = got.shape[1] == 1
                    shown = 1 if made.uncached_last or made.last_only else end - start
                    agrees = close(got[:, -shown:], want[:, -shown:])
                    for index in ((0,), (1, 2), (3,))[number]:
                        ranks[index] = agrees or index < 2
                    start = end
        except ThirdPartyError as error:
            self.raised = str(error)
        made.rank = ranks[0], ranks[1], ranks[2], ranks[3]

    def wants_all(self, made: Recognised) -> bool:
        """Whether a cached call on all tokens so far agrees, and gives the new token's output alone: where it gives
        more, the past may play no part."""
        caller, x = self.caller(made.convention), self.sample(made, PROMPT + 1)
        try:
            with guarded():
                want = caller.uncached(x)
                _output, sequence = caller.step(caller.start(len(x)), x[:, :PROMPT])
                if made.last_only:
                    return False  # what a call computes beside its last output is not known
                got, _sequence = caller.step(replace(sequence, tokens=0), x)
        except ThirdPartyError as error:
            self.raised = str(error)
            return False
        return got.shape[1] == 1 and close(got, want[:, -1:])

    def outputs(self, out: Any, x: Array, convention: Convention) -> Iterator[tuple[str, bool]]:
        """Expressions for the output of a call, and whether it is that of the last token only."""
        batch, new = x.shape[:2]
        heads = (batch, new) if convention.batched else (new,)
        for expression, value in parts(out, identifiers.OUTPUTS):
            shape = tuple(getattr(value, "shape", ()))
            if len(shape) == len(heads) + 1:
                if shape[:-1] == heads:
                    yield expression, False
                elif convention.batched and shape[:-1] == (batch, 1):
                    yield expression, True
            elif convention.batched and len(shape) == 2 and shape[0] == batch:
                yield f"{expression}[:, None]", True


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


def close(got: Array, want: Array) -> bool:
    """Whether two outputs agree to half of their digits, relative to the largest."""
    if got.shape != want.shape:
        return False
    scale = float(np.abs(want).max(initial=0.0))
    return bool((np.abs(got - want) <= np.sqrt(np.finfo(np.float32).eps) * scale).all())
