"""The worker's side of counting: it makes the calls that are counted, each as it is in the middle of a generation.

Counts depend neither on the numbers in the tokens nor on the time or place of the run. Only numpy is needed here; the
backend counts what its framework does (``Backend.count``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvconform_specs.config import Config
from kvconform_specs.tensors import Streams

Counts = dict[str, dict[str, int]]
"""Counter, then kind, then how much; the count is the sum over its kinds."""
STREAM = 0
"""The seed of the counted tokens."""
LOOP = 64
"""Decode steps in which nothing may be compiled."""
WARM = 2
"""Decode steps before those whose compilations count, after one that filled the cache."""


class Tally:
    """A built backend, and the tokens that it is counted on."""

    def __init__(self, backend: Any, config: Config) -> None:
        self.backend, self.config = backend, config
        self.tokens = np.array(Streams(config, config.capacity, (0,)).tape(STREAM), np.int64)  # (1, capacity)
        self._phases = {
            "decode": self._decode,
            "prefill": self._prefill,
            "recompute": self._recompute,
            "loop": self._loop,
        }

    def count(self, phase: str, depth: int) -> Counts:
        """The counts of one call of a phase; of ``loop``, those of a whole decode from the depth on."""
        counted = self._phases[phase](depth)
        return {counter: {kind: int(n) for kind, n in sorted(kinds.items())} for counter, kinds in counted.items()}

    def _decode(self, n: int) -> Counts:
        """One token at depth ``n``, after another decode step."""
        return self._both(lambda: self._decoder(n))

    def _prefill(self, n: int) -> Counts:
        """``n`` tokens into an empty cache, for the second time."""
        self._prefiller(n)()
        return self._both(lambda: self._prefiller(n))

    def _recompute(self, n: int) -> Counts:
        """``n + 1`` tokens by the cache-less forward, or where the backend claims none by a prefill."""
        if not self.backend.claims.can("uncached_forward"):
            return self._prefill(n + 1)

        def call() -> None:
            self.backend.uncached_forward(self._ids(0, n + 1))

        call()
        return self._dispatched(call)

    def _loop(self, n: int) -> Counts:
        """Graphs at the end, those of them that a decode loop compiled after its first steps, and the graph breaks in
        runtime_info(); empty for a backend that compiles none."""
        if not self.backend.claims.can("graph_count"):
            return {}
        last = min(n + WARM + LOOP, self.config.capacity)
        cache = self._filled(n)
        made = [int(self.backend.graph_count())]
        for position in range(n, last):
            _, cache = self.backend.step(cache, self._ids(position, position + 1))
            made.append(int(self.backend.graph_count()))
        self._close(cache)
        before, after = made[min(WARM, len(made) - 1)], made[-1]
        counts = {"graphs": {"": after}, "recompilations": {"": after - before}}
        seen = self.backend.runtime_info()
        return counts | ({"graph_breaks": {"": seen["graph_breaks"]}} if "graph_breaks" in seen else {})

    def _both(self, prepared: Callable[[], Callable[..., None]]) -> Counts:
        """The backend's meter in one step, and its own counts in another; of multiply-adds the latter, since a meter
        may have to use another kernel."""
        counts: Counts = {}
        if self.backend.claims.can("macs"):
            prepared()(count_macs=True)
            counts["multiply_adds"] = {"": int(self.backend.macs())}
        return counts | self._dispatched(prepared())

    def _dispatched(self, call: Callable[[], None]) -> Counts:
        """What the backend counts in a call."""
        return dict(self.backend.count(call))

    def _decoder(self, n: int) -> Callable[..., None]:
        cache = self._filled(n)

        def call(**keywords: bool) -> None:
            self._close(self.backend.step(cache, self._ids(n, n + 1), **keywords)[1])

        return call

    def _prefiller(self, n: int) -> Callable[..., None]:
        cache = self.backend.start(1)

        def call(**keywords: bool) -> None:
            self._close(self.backend.step(cache, self._ids(0, n), **keywords)[1])

        return call

    def _filled(self, n: int) -> Any:
        """A cache of ``n`` tokens whose last one came alone."""
        cache = self.backend.start(1)
        for start, stop in ((0, n - 1), (n - 1, n)):
            if stop > start:
                _, cache = self.backend.step(cache, self._ids(start, stop))
        return cache

    def _close(self, cache: Any) -> None:
        self.backend.close(cache)

    def _ids(self, start: int, stop: int) -> NDArray[np.int64]:
        return self.tokens[:, start:stop].copy()
