"""Calls of a target on a few tokens, to find out what it takes and gives; they judge nothing."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from kvconform_backends.targets.foreign import Raised, foreign
from kvconform_backends.targets.module import conventions
from kvconform_backends.targets.module.calls import Caller
from kvconform_backends.targets.module.conventions import Convention
from kvconform_backends.targets.module.recognised import Recognised, Target

Array = NDArray[Any]

PROMPT, CHUNK = 3, 2
LENGTH = PROMPT + 1 + CHUNK
"""Tokens of a trial: a prompt, one more, and a chunk."""
CROWD = 32
"""Rows that stand for any number of them."""
SHORTEST = 8
"""A sequence has at least so many tokens, or programs would say nothing."""


class Trials:
    """One target's. ``raised``: the words of the last one that raised."""

    def __init__(self, target: Target) -> None:
        self.target, self.raised = target, ""

    def caller(self, convention: Convention) -> Caller:
        """Calls of a copy that no other trial has touched: what owns its cache may not be able to empty it."""
        module = self.target.module
        if isinstance(module, nn.Module) and (convention.owned or convention.always):
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
        """Whether the whole forward, or the first call with a cache, takes that many tokens, all of them ``token`` if
        one is given, in that many rows."""
        x = np.resize(self.sample(made, tokens), (rows or made.batch, tokens, *[made.width] * bool(made.width)))
        if token is not None:
            x = np.full_like(x, token)
        caller = self.caller(made.convention)
        try:
            with foreign():
                if cached:
                    caller.step(caller.start(len(x)), x)
                else:
                    caller.whole(x)
        except Raised as error:
            self.raised = str(error)
            return False
        return True

    def ranked(self, made: Recognised) -> None:
        """How far cached calls come. Agreement to half of the digits: it chooses among ways of calling, no more."""
        caller, x = self.caller(made.convention), self.sample(made, LENGTH)
        ends, ranks, start = (PROMPT, PROMPT + 1, LENGTH), [False] * 4, 0
        try:
            with foreign():
                wants = [caller.whole(x[:, :end]) for end in ends]  # before the sequence: it may live in the module
                held = caller.start(len(x))
                for number, (end, want) in enumerate(zip(ends, wants, strict=True)):
                    got, held = caller.step(held, x[:, start:end])
                    if number == 0:
                        made.last_only = got.shape[1] == 1
                    shown = 1 if made.whole_last or made.last_only else end - start
                    agrees = close(got[:, -shown:], want[:, -shown:])
                    for index in ((0,), (1, 2), (3,))[number]:
                        ranks[index] = agrees or index < 2
                    start = end
        except Raised as error:
            self.raised = str(error)
        made.rank = ranks[0], ranks[1], ranks[2], ranks[3]

    def outputs(self, out: Any, x: Array, convention: Convention) -> Iterator[tuple[str, bool]]:
        """Expressions for the output of a call, and whether it is of the last token alone."""
        batch, new = x.shape[:2]
        heads = (batch, new) if convention.batched else (new,)
        for expression, value in parts(out, conventions.OUTPUTS):
            shape = tuple(getattr(value, "shape", ()))
            if len(shape) == len(heads) + 1:
                if shape[:-1] == heads:
                    yield expression, False
                elif convention.batched and shape[:-1] == (batch, 1):
                    yield expression, True
            elif convention.batched and len(shape) == 2 and shape[0] == batch:
                yield f"{expression}[:, None]", True


def parts(out: Any, names: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """What a call returned, taken apart: expressions and values."""
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
