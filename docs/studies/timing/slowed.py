"""Planted slowdowns: the numpy decoder with a known extra share of CPU time in each step.

What a stopwatch says of them is held against what they say of themselves: ``runtime_info`` tells the CPU time of the work
and of the slowdown so far. Both are of this thread alone, so that neither a preemption nor another process counts, and
a step makes good what the one before it overshot: the share is exact over a run, and within one look at the clock
(below a microsecond on Linux) in every step.
"""

from __future__ import annotations

import time
from typing import Any

from kvconform_backends.numpy.cache import Array, Cache, NumpyCache


class Slowed(NumpyCache):
    """The clean ground: it looks at the clock like the slowed ones and adds nothing. Its outputs are NumpyCache's."""

    share = 0.0
    """CPU time added to each step, as a share of the step's own."""

    own_ns = extra_ns = 0  # CPU nanoseconds of this thread: of the steps' work, and of what was added

    def step(self, cache: Cache, *inputs: Array, **keywords: Any) -> tuple[Array, Cache]:
        began = time.thread_time_ns()
        found = super().step(cache, *inputs, **keywords)
        done = now = time.thread_time_ns()
        self.own_ns += done - began
        due = self.share * self.own_ns - self.extra_ns
        while now - done < due:
            now = time.thread_time_ns()
        self.extra_ns += now - done
        return found

    def runtime_info(self) -> dict[str, Any]:
        return {**super().runtime_info(), "own_ns": self.own_ns, "extra_ns": self.extra_ns}


class Slower5(Slowed):
    """5 % more CPU time in each step."""

    share = 0.05


class Slower10(Slowed):
    """10 % more CPU time in each step."""

    share = 0.10


class Slower20(Slowed):
    """20 % more CPU time in each step."""

    share = 0.20
