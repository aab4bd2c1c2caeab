"""The worker's side of a timed run: it times blocks of calls of one backend and answers with numbers.

Inputs are made and caches restored outside the timed regions; garbage collection is off inside them. Only numpy is
needed here. Of the harness a timed region holds one Python call for each step and, in a generation, the choice of the
token and one reading of the clock for each of them.
"""

from __future__ import annotations

import gc
import hashlib
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvconform.bench.worker.ceilings import Ceiling
from kvconform.bench.worker.gpu import Gpu
from kvconform_specs.config import Config
from kvconform_specs.tensors import Streams

Ids = NDArray[np.int64]


class Block(NamedTuple):
    """Wall nanoseconds, CPU nanoseconds of all threads, involuntary context switches; on a GPU its clock in MHz right
    after the block (0: not read) and the reasons for a reduced clock (bits of ``gpu.REASONS``); when the tokens of a
    generation came, in nanoseconds from its beginning."""

    ns: int
    cpu_ns: int
    nivcsw: int
    sm_mhz: int = 0
    throttle: int = 0
    tokens: tuple[int, ...] = ()


if sys.platform == "win32":

    def switches() -> int:
        """Windows does not count them."""
        return 0

else:
    import resource

    def switches() -> int:
        """Involuntary context switches of this process so far."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def tokens(config: Config, seed: int) -> Ids:
    """The ids ``(1, capacity)`` that every arm is timed on: those of a program's steps with this seed."""
    return np.array(Streams(config, config.capacity, (0,)).tape(seed), np.int64)


def digest(ids: Ids) -> str:
    return hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()[:16]


def resident() -> int | None:
    """Bytes of this process that are in memory; None if the system does not count them."""
    counted = Path("/proc/self/statm")
    return int(counted.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if counted.exists() else None


class Timer:
    """A built backend, the tokens it is timed on ``(1, capacity)``, and the one cache that is kept between blocks.
    All rows of a batch have the same tokens."""

    def __init__(
        self, backend: Any, ids: Ids, ceiling: Callable[[int, int], Ceiling] | None = None, gpu: Gpu | None = None
    ) -> None:
        self.backend, self.tokens, self.digest, self.gpu = backend, ids, digest(ids), gpu
        self.ceiling = ceiling  # of a decode step at a depth, for a batch
        self.kept: tuple[int, int, Any] | None = None  # batch, how many tokens it holds, and the cache
        self.measured: tuple[tuple[int, int], Ceiling] | None = None
        self._phases: dict[str, Callable[[int, int, int, int], Block]] = {
            "prefill": self._prefill,
            "decode": self._decode,
            "recompute": self._recompute,
            "recompute-last": self._recompute,
            "generate": self._generate,
            "regenerate": self._generate,
            "regenerate-last": self._generate,
            "read": self._ceiling,
            "multiply": self._ceiling,
        }
        self._phase = ""

    def blocks(self, phase: str, depth: int, steps: int, count: int, batch: int = 1, new: int = 0) -> list[Block]:
        """``count`` blocks of ``steps`` calls each, or of one generation of ``new`` tokens. Raises RuntimeError if the
        backend's length is wrong afterwards."""
        self._phase = phase
        return [self._phases[phase](depth, steps, batch, new) for _ in range(count)]

    def device(self, phase: str, depth: int, steps: int, count: int, batch: int = 1) -> list[int]:
        """``count`` times the device's own nanoseconds of ``steps`` steps; 0: not measured, runtime_info() says why.
        Called after the last block of this worker: a profiler may stay in the process."""
        self.drop()
        self._phase, caches = phase, dict[int, Any]()
        call = self._again(depth, batch, caches)
        found = [self.backend.device_ns(call, steps) or 0 for _ in range(count)]
        for cache in caches.values():
            self._close(cache, depth)
        return found

    def _again(self, n: int, batch: int, caches: dict[int, Any]) -> Callable[[int], object]:
        """One step that can be repeated on any number of caches: see ``Backend.device_ns``."""
        backend = self.backend
        if self._phase != "decode":
            prompt = self._ids(0, n if self._phase == "prefill" else n + 1, batch)
            forward = self._forward()
            if self._phase == "prefill":
                return lambda copy: backend.step(backend.start(batch), prompt)
            return lambda copy: forward(prompt)
        first, one = self._ids(0, n, batch), self._ids(n, n + 1, batch)

        def call(copy: int) -> None:
            if copy not in caches:
                caches[copy] = backend.step(backend.start(batch), first)[1]
            _, after = backend.step(caches[copy], one)
            if not backend.claims.can("immutable"):
                caches[copy] = backend.truncate(after, n)

        return call

    def memory(self, depth: int, batch: int) -> dict[str, int | None]:
        """Bytes of a cache of ``depth`` tokens: as the backend counts them, and the growth of the process."""
        self.drop()
        gc.collect()
        allocator = self.backend.allocated
        allocator()  # growth is counted from here
        before = resident()
        cache = self.backend.step(self.backend.start(batch), self._ids(0, depth, batch))[1]
        after, allocated = resident(), allocator()
        counted = int(self.backend.bytes(cache)) if self.backend.claims.can("bytes") else None
        self._close(cache, depth)
        grown = None if before is None or after is None else after - before
        return {"reported": counted, "resident": grown, "allocated": allocated}

    def _prefill(self, n: int, steps: int, batch: int, new: int) -> Block:
        """Into an empty cache, which is opened inside the timed region and closed outside."""
        self.drop()
        prompt = self._ids(0, n, batch)
        total = Block(0, 0, 0)
        for _ in range(steps):
            opened: list[Any] = []

            def call(opened: list[Any] = opened) -> None:
                opened.append(self.backend.step(self.backend.start(batch), prompt)[1])

            taken = self._timed(call)
            total = Block(
                total.ns + taken.ns,
                total.cpu_ns + taken.cpu_ns,
                total.nivcsw + taken.nivcsw,
                taken.sm_mhz,
                total.throttle | taken.throttle,
            )
            self._close(opened[0], n)
        return total

    def _decode(self, n: int, steps: int, batch: int, new: int) -> Block:
        """From depth ``n`` on. An untimed step leads to depth ``n``, so that the timed ones find what those of a
        generation find: a cache that a step has made, and warm processor caches."""
        if self.kept is None or self.kept[:2] != (batch, n - 1):
            self.drop()
            cache = self.backend.start(batch)
            if n > 1:
                _, cache = self.backend.step(cache, self._ids(0, n - 1, batch))
            self.kept = batch, n - 1, cache
        _, cache = self.backend.step(self.kept[2], self._ids(n - 1, n, batch))
        self.kept = None
        fed = [self._ids(position, position + 1, batch) for position in range(n, n + steps)]
        grown = [cache]

        def call() -> None:
            cache, step = grown[0], self.backend.step
            for one in fed:
                _, cache = step(cache, one)
            grown[0] = cache

        taken = self._timed(call)
        self._expect(grown[0], n + steps)
        if self.backend.claims.can("truncate"):
            self.kept = batch, n - 1, self.backend.truncate(grown[0], n - 1)
        else:
            self._close(grown[0], n + steps)
        return taken

    def _recompute(self, n: int, steps: int, batch: int, new: int) -> Block:
        """All ``n + 1`` tokens without a cache. The kept cache stays, unless the backend holds one sequence only."""
        if self.backend.claims.max_sequences == 1:
            self.drop()
        whole, forward = self._ids(0, n + 1, batch), self._forward()

        def call() -> None:
            for _ in range(steps):
                forward(whole)

        return self._timed(call)

    def _forward(self) -> Callable[[Ids], NDArray[Any]]:
        """The uncached forward, of the last position's logits if the phase is ``-last``; if the backend claims none, a
        prefill into an empty cache that is not used again."""
        backend, last = self.backend, {"last_only": True} if self._phase.endswith("-last") else {}
        if backend.claims.can("uncached_forward"):
            return lambda ids: backend.uncached_forward(ids, **last)
        return lambda ids: backend.step(backend.start(len(ids)), ids, **last)[0]

    def _generate(self, n: int, steps: int, batch: int, new: int) -> Block:
        """Greedy: ``new`` tokens after a prompt of ``n``, each picked from the newest logits; the last is never fed."""
        self.drop()
        ids = np.empty((batch, n + new), np.int64)
        ids[:, :n] = self.tokens[:, :n]
        came: list[int] = []
        ended: list[Any] = []
        cached = self._phase == "generate"

        def call() -> None:
            clock, began = time.perf_counter_ns, time.perf_counter_ns()
            if not cached:
                forward = self._forward()
                for at in range(n, n + new):
                    ids[:, at] = forward(np.ascontiguousarray(ids[:, :at]))[:, -1].argmax(axis=-1)
                    came.append(clock() - began)
                return
            step, prompt = self.backend.step, np.ascontiguousarray(ids[:, :n])
            last = {"last_only": True} if self.backend.claims.can("last_only") else {}
            logits, cache = step(self.backend.start(batch), prompt, **last)
            for at in range(n, n + new):
                if at > n:
                    logits, cache = step(cache, ids[:, at - 1 : at].copy())
                ids[:, at] = logits[:, -1].argmax(axis=-1)
                came.append(clock() - began)
            ended.append(cache)

        taken = self._timed(call)
        if cached:
            self._close(ended[0], n + new - 1)
        return taken._replace(tokens=tuple(came))

    def _ceiling(self, n: int, steps: int, batch: int, new: int) -> Block:
        """The machine's own time for the least that a decode step at depth ``n`` needs."""
        if self.ceiling is None:
            raise RuntimeError("no ceiling is known")
        if self.measured is None or self.measured[0] != (n, batch):
            self.measured = (n, batch), self.ceiling(n, batch)
        made, phase = self.measured[1], self._phase
        made.prepare(phase)

        def call() -> None:
            for _ in range(steps):
                made.call(phase)

        return timed(call)

    def _timed(self, call: Callable[[], None]) -> Block:
        """One timed region of the backend. It includes the wait for a device that is still working."""
        taken = self._waited(call)
        if self.gpu is None:
            return taken
        return taken._replace(sm_mhz=self.gpu.sm_mhz(), throttle=self.gpu.throttle())

    def _waited(self, call: Callable[[], None]) -> Block:
        def waited() -> None:
            call()
            self.backend.synchronise()

        self.backend.synchronise()
        return timed(waited)

    def _ids(self, start: int, stop: int, batch: int) -> Ids:
        """Contiguous and writable, so that no arm makes a copy that others do not."""
        return np.repeat(self.tokens[:, start:stop], batch, axis=0)

    def _expect(self, cache: Any, length: int) -> None:
        if self.backend.claims.can("length"):
            found = list(self.backend.length(cache))
            if found != [length] * len(found):
                raise RuntimeError(f"reports the length {found} after {length} tokens")

    def _close(self, cache: Any, length: int) -> None:
        self._expect(cache, length)
        self.backend.close(cache)

    def drop(self) -> None:
        """Closes the kept cache: the backend is needed otherwise, and some hold one sequence at a time."""
        if self.kept is not None:
            _, length, cache = self.kept
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
    return Block(wall, cpu, switched)
