"""The numbers of the protocol ``pair-v1``, and how a record describes it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from kvconform.bench.eligibility import COLUMNS, MOST_STEPS
from kvconform.bench.presets import Preset
from kvconform.bench.worker.gpu import ORDER
from kvconform.bench.worker.timer import digest, tokens

NAME, RESTARTS = "pair-v1", 5
"""The protocol, and how often all workers are restarted. Of equal spread, five restarts give an interval half as wide
as three: Student's t over the root of their number is 1.24 and not 2.48."""
BLOCK_NS = 1_000_000
"""Nanoseconds that a block lasts at least: k = max(1, floor(1 ms / median step of the slowest arm))."""
WARM_SECONDS, WARM_AGREE = 2.0, 0.10
"""An arm is warm when the medians of three blocks agree so well, or after so many seconds."""
WARM_STEPS, WARM_BLOCK_NS = 5, 20_000_000
"""A block of the warm-up: at most so many steps, and no more than fit into so many nanoseconds."""
WARM_SHARE = 0.1
"""The share of a case's seconds that its warm-up may take, all arms together."""
DEVICE_BLOCKS = 5
"""Device times in each restart and arm, after all wall times of the restart."""
ENOUGH_ROUNDS, TARGET_HALF_WIDTH = 60, 0.02
"""A case stops, in one restart, when it has so many rounds and all its intervals are this narrow (half-width of log
ratios)."""
ROUNDS_WANTED, OVERTIME = 6, 3.0
"""A case of slow steps goes on until it has so many rounds, up to so many times its seconds."""
SECONDS_PER_CASE = 2.0
"""Seconds of one case in one restart. The protocol as it was studied has eight; most cases have 60 narrow rounds before
two."""
MIN_SECONDS = 0.05
"""Seconds that a case gets at least when a time limit is divided."""

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
TUNABLES = "GLIBC_TUNABLES"


def variables(threads: int) -> dict[str, str]:
    """The environment variables of every timed worker: its threads, the order of GPUs, and huge pages.

    numpy, which reads the ceilings, requests huge pages; torch and ONNX Runtime do not, and read a large matrix from
    small pages more slowly, depending on how these lie in each start. glibc requests them for all (from 2.35 on, if
    the system leaves that to programs). A setting in the caller's environment takes precedence.
    """
    tunables = [own for own in (os.environ.get(TUNABLES),) if own]
    if "glibc.malloc.hugetlb" not in "".join(tunables):
        tunables.append("glibc.malloc.hugetlb=1")
    return {**dict.fromkeys(THREADS, str(threads)), **ORDER, TUNABLES: ":".join(tunables)}


def processors(threads: int, restart: int) -> tuple[int, ...] | None:
    """The processors on which all workers of a restart run; the next restart uses the ones after them. None: on any,
    if there are no more than threads, or the system cannot say.

    One worker runs at a time. If each had the processor that it happens to start on, other load on that one (another
    machine on the same core, a warm core) would affect one arm alone, for as long as its process lives.
    """
    known = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if len(known) <= threads:
        return None
    return tuple(known[(restart * threads + i) % len(known)] for i in range(threads))


def described(
    presets: Iterable[Preset], seconds_per_case: float, seed: int, threads: int, time_limit: float | None
) -> dict[str, Any]:
    """How blocks were measured, for the record; times in seconds."""
    a_case = f"{seconds_per_case:g} s" if time_limit is None else f"a case's part of {time_limit:g} s"
    return {
        "threads": threads,
        "variables": variables(threads),
        "processors": "all workers of a restart on the same, one a thread; the next restart on those beside",
        "order_seed": seed,
        "input_seed": seed,
        "input_digest": {preset.name: digest(tokens(preset.config, seed)) for preset in presets},
        "clock": "perf_counter_ns in the worker, around the block; CPU: process_time_ns, all threads",
        "steps_rule": f"k = max(1, floor({BLOCK_NS / 1e6:g} ms / slowest arm's median step)), at most {MOST_STEPS}",
        "warm_up": f"3 block medians within {WARM_AGREE:.0%}, or {WARM_SECONDS:g} s an arm, "
        f"or {WARM_SHARE:.0%} of the case's time for all arms",
        "stop_rule": f"{ENOUGH_ROUNDS} rounds and all half-widths <= {TARGET_HALF_WIDTH:.0%}, or {a_case} in a restart "
        f"after the warm-up (up to {OVERTIME:g} times that for the first {ROUNDS_WANTED} rounds)",
        "recompute": "a backend without an uncached forward prefills all tokens instead",
        "seconds_per_case": seconds_per_case if time_limit is None else None,
        "seconds": time_limit,
        "outputs": f"at every position of the timed inputs within the bound, on at most {COLUMNS} drawn logits",
    }
