"""Planted slowdowns: the numpy decoder with a known extra share of CPU time in each step.

The study compares what a timer measures with what the workers report: ``runtime_info`` reports the CPU time of the work
and of the slowdown so far. Both are CPU time of this thread, so neither preemption nor another process counts. A step
compensates for the overshoot of the step before it: the share is exact over a run, and within one reading of the clock
(below a microsecond on Linux) in every step.
"""

from __future__ import annotations

import time
from typing import Any

from kvconform_backends.numpy.cache import Array, Cache, NumpyCache


class Slowed(NumpyCache):
    """The reference: it reads the clock like the slowed classes and adds no time. The outputs are NumpyCache's."""

    share = 0.0
    """CPU time added to each step, as a share of the CPU time of the step."""

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
