"""Serving engines for tests, each with one property."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from kvconform.serving.engine import Answer, Completion, Description
from kvconform_backends.servers.toy import Completing, ToyEngine
from kvconform_specs.serving.requests import Request


class WrongAfterLong(ToyEngine):
    """A hit has wrong positions where the request before it but one had a prompt of 24 tokens or more."""

    def __init__(self) -> None:
        super().__init__()
        self.lengths: list[int] = []

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        self.lengths += [len(one.prompt) for one in requests if one.cached]
        return super().answer(requests)

    def position_ids(self, sequence: Completing, past: int, count: int) -> NDArray[np.intp]:
        wrong = sequence.cached and past == sequence.cached and self.lengths[-3:-2] >= [24]
        return np.arange(count) if wrong else super().position_ids(sequence, past, count)


class Described(ToyEngine):
    """The toy engine, described otherwise."""

    changes: dict[str, object] = {}  # noqa: RUF012

    def describe(self) -> Description:
        return replace(super().describe(), **self.changes)  # type: ignore[arg-type]


class Silent(Described):
    """It does not tell what came from the cache."""

    changes = {"reports_hits": False, "block": None}  # noqa: RUF012

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        return [replace(answer, cached=None) for answer in super().answer(requests)]


class AlwaysCached(ToyEngine):
    """Its switch of the cache does nothing, and nothing is evicted."""

    blocks = 2000

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        return super().answer([replace(one, cached=True) for one in requests])


class Noisy(Described):
    """Each answer is off by up to 0.8, as with numbers of few bits."""

    def __init__(self) -> None:
        super().__init__()
        self.rng = np.random.default_rng(0)

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        return [
            replace(answer, completions=tuple(self._off(one) for one in answer.completions))
            for answer in super().answer(requests)
        ]

    def _off(self, one: Completion) -> Completion:
        rows = tuple({t: v + self.rng.uniform(-0.8, 0.8) for t, v in row.items()} for row in one.logprobs)
        return Completion(one.ids, rows)


class Coarse(Noisy):
    """The same, and it says that it computes with few bits."""

    changes = {"dtype": "float8"}  # noqa: RUF012


class Dies(ToyEngine):
    """It raises once two requests come at the same time."""

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        if len(requests) > 1:
            raise ConnectionError("connection reset by peer")
        return super().answer(requests)


class ChosenOnly(ToyEngine):
    """A generated token comes with its own log-probability only."""

    alternatives = 1


class RestartsChosenOnly(ChosenOnly):
    """The same, and the first tokens after a hit have positions as if nothing were cached."""

    def position_ids(self, sequence: Completing, past: int, count: int) -> NDArray[np.intp]:
        return np.arange(count) if past and past == sequence.cached else super().position_ids(sequence, past, count)


class Timed(ToyEngine):
    """It says that its first token takes a millisecond for each token that is not cached."""

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        return [
            replace(answer, seconds_to_first=1e-3 * (len(one.prompt) - (answer.cached or 0)))
            for one, answer in zip(requests, super().answer(requests), strict=True)
        ]


class Ends(ToyEngine):
    """Its process gets a signal where a prompt of more than two blocks is read from the cache."""

    signal = signal.SIGSEGV

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        found = super().answer(requests)
        if any((one.cached or 0) > 2 * self.block for one in found):
            self.end()
        return found

    def end(self) -> None:
        os.kill(os.getpid(), self.signal)


class Killed(Ends):
    """Somebody kills it."""

    signal = signal.SIGKILL


class Hangs(Ends):
    """There it gives no answer."""

    def end(self) -> None:
        time.sleep(3600)


class EndsAtOnce(ToyEngine):
    """It cannot even start."""

    def __init__(self) -> None:
        os.kill(os.getpid(), signal.SIGSEGV)


class ClosesItsPipe(ToyEngine):
    """It closes every file of its process and goes on."""

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        os.closerange(3, 1024)
        time.sleep(3600)
        return []
