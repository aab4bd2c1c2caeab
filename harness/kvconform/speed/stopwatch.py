"""The worker's side of a speed run: it times blocks of calls of one subject and answers numbers.

Inputs are made and caches put back outside the timed regions; garbage collection is off inside them. Nothing but
numpy is needed here.
"""

from __future__ import annotations

import gc
import hashlib
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvconform_specs.config import Config
from kvconform_specs.tensors import Streams

Block = tuple[int, int, int]
"""Wall nanoseconds, CPU nanoseconds of all threads, involuntary context switches."""

if sys.platform == "win32":

    def switches() -> int:
        """Windows does not count them."""
        return 0

else:
    import resource

    def switches() -> int:
        """Involuntary context switches of this process so far."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def tokens(config: Config, seed: int) -> NDArray[np.int64]:
    """The ids ``(1, capacity)`` that every arm is timed on: those of a program's steps with this seed."""
    return np.array(Streams(config, config.capacity, (0,)).tape(seed), np.int64)


def digest(ids: NDArray[np.int64]) -> str:
    return hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()[:16]


class Stopwatch:
    """A built subject, the tokens it is timed on, and the one cache that is kept between blocks."""

    def __init__(self, subject: Any, config: Config, seed: int) -> None:
        self.subject = subject
        self.tokens = tokens(config, seed)
        self.digest = digest(self.tokens)
        self.kept: tuple[int, Any] | None = None  # how many tokens it holds, and the cache
        self._phases = {"prefill": self._prefill, "decode": self._decode, "recompute": self._recompute}

    def blocks(self, phase: str, depth: int, steps: int, count: int) -> list[Block]:
        """``count`` blocks of ``steps`` calls each. Raises RuntimeError where the subject loses count of tokens."""
        return [self._phases[phase](depth, steps) for _ in range(count)]

    def _prefill(self, n: int, steps: int) -> Block:
        """Into an empty cache, which is opened inside the timed region and closed outside."""
        self._drop()
        prompt = self._ids(0, n)
        total = (0, 0, 0)
        for _ in range(steps):
            opened: list[Any] = []

            def call(opened: list[Any] = opened) -> None:
                opened.append(self.subject.step(self.subject.start(1), prompt)[1])

            ns, cpu, switched = timed(call)
            total = total[0] + ns, total[1] + cpu, total[2] + switched
            self._close(opened[0], n)
        return total

    def _decode(self, n: int, steps: int) -> Block:
        """From depth ``n`` on. An untimed step leads to depth ``n``, so that the timed ones find what those of a
        generation find: a cache that a step has made, and warm processor caches."""
        if self.kept is None or self.kept[0] != n - 1:
            self._drop()
            cache = self.subject.start(1)
            if n > 1:
                _, cache = self.subject.step(cache, self._ids(0, n - 1))
            self.kept = n - 1, cache
        _, cache = self.subject.step(self.kept[1], self._ids(n - 1, n))
        self.kept = None
        fed = [self._ids(position, position + 1) for position in range(n, n + steps)]
        grown = [cache]

        def call() -> None:
            cache, step = grown[0], self.subject.step
            for one in fed:
                _, cache = step(cache, one)
            grown[0] = cache

        taken = timed(call)
        self._expect(grown[0], n + steps)
        if self.subject.claims.can("truncate"):
            self.kept = n - 1, self.subject.truncate(grown[0], n - 1)
        else:
            self._close(grown[0], n + steps)
        return taken

    def _recompute(self, n: int, steps: int) -> Block:
        """All ``n + 1`` tokens anew, logits of all positions: by the cache-less forward, or where the subject claims
        none by a prefill into an empty cache, whose keys nobody reads again."""
        whole = self._ids(0, n + 1)
        start, step = self.subject.start, self.subject.step
        full = self.subject.full if self.subject.claims.can("full") else lambda ids: step(start(1), ids)

        def call() -> None:
            for _ in range(steps):
                full(whole)

        return timed(call)

    def _ids(self, start: int, stop: int) -> NDArray[np.int64]:
        return self.tokens[:, start:stop].copy()  # contiguous and writable: no arm pays for a copy that others don't

    def _expect(self, cache: Any, length: int) -> None:
        if self.subject.claims.can("length") and list(self.subject.length(cache)) != [length]:
            raise RuntimeError(f"says that it holds {list(self.subject.length(cache))} tokens after {length}")

    def _close(self, cache: Any, length: int) -> None:
        self._expect(cache, length)
        if hasattr(self.subject, "close"):
            self.subject.close(cache)

    def _drop(self) -> None:
        if self.kept is not None:
            length, cache = self.kept
            self.kept = None
            self._close(cache, length)


def timed(call: Callable[[], None]) -> Block:
    """One timed region."""
    gc.disable()
    try:
        switched, cpu, wall = switches(), time.process_time_ns(), time.perf_counter_ns()
        call()
        wall, cpu, switched = time.perf_counter_ns() - wall, time.process_time_ns() - cpu, switches() - switched
    finally:
        gc.enable()
    return wall, cpu, switched
