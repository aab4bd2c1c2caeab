"""The numbers of the protocol ``pair-v1``, and how a record tells them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from kvconform.bench.analysis.ratios import (
    MAX_LOAD_PER_CORE,
    MAX_RATIO_HALF_WIDTH,
    MAX_RESTART_STD,
    MAX_TIME_HALF_WIDTH,
)
from kvconform.bench.eligibility import COLUMNS, MOST_STEPS
from kvconform.bench.presets import Preset
from kvconform.bench.worker.timer import digest, tokens

NAME, RESTARTS = "pair-v1", 5
"""How often all workers are started anew. Of equal spread, five starts give an interval half as wide as three:
Student's t over the root of their number is 1.24 and not 2.48."""
BLOCK_NS = 1_000_000
"""A block lasts about this long: k = max(1, floor(1 ms / median step of the slowest arm))."""
WARM_SECONDS, WARM_AGREE = 2.0, 0.10
"""An arm is warm when the medians of three blocks agree so well, or after so many seconds."""
DEVICE_BLOCKS = 5
"""So many device times in each restart and arm, after all wall times of the restart."""
WARM_STEPS, WARM_BLOCK_NS = 5, 20_000_000
"""A block of the warm-up: at most so many steps, and no more than fit this time."""
WARM_SHARE = 0.1
"""The part of a case's seconds that its warm-up may take, all arms together."""
ENOUGH_ROUNDS, TARGET_HALF_WIDTH = 60, 0.02
"""A case stops, in one restart, when it has so many rounds and all its intervals are this narrow (half-width of log
ratios)."""
ROUNDS_WANTED, OVERTIME = 6, 3.0
"""A case of slow steps goes on until it has so many rounds, up to so many times its seconds."""
SECONDS_PER_CASE = 2.0
"""Of one restart. The protocol as it was tried has eight; most cases are done with 60 narrow rounds before two."""


THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
TUNABLES = "GLIBC_TUNABLES"


def variables(threads: int) -> dict[str, str]:
    """What the environment of every timed worker says: its threads, and that large allocations lie on huge pages.

    numpy, which reads the ceilings, asks for huge pages by itself; torch and ONNX Runtime do not, and read a large
    matrix from small pages more slowly, by how these lie in each start. glibc asks for all (from 2.35 on, where the
    system leaves it to programs). Where the caller's environment says so or otherwise, that holds.
    """
    tunables = [own for own in (os.environ.get(TUNABLES),) if own]
    if "glibc.malloc.hugetlb" not in "".join(tunables):
        tunables.append("glibc.malloc.hugetlb=1")
    return {**dict.fromkeys(THREADS, str(threads)), TUNABLES: ":".join(tunables)}


def processors(threads: int, restart: int) -> tuple[int, ...] | None:
    """On which processors all workers of a restart run, those of the next restart beside them; None: on any, where
    there are no more than threads, or the system does not tell.

    One worker runs at a time. If each had the processor that it happens to start on, what else loads that one (another
    machine on the same core, or whose core is warm) would lie on one arm alone, for as long as its process lives.
    """
    known = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if len(known) <= threads:
        return None
    return tuple(known[(restart * threads + i) % len(known)] for i in range(threads))


def described(
    presets: Iterable[Preset],
    results_dir: Path | None,
    seconds: float,
    seed: int,
    threads: int,
    restarts: int,
    phases: Sequence[str] = (),
    budget: float | None = None,
) -> dict[str, Any]:
    """What a record says about how it was made."""
    a_case = f"{seconds:g} s a case and restart after the warm-up"
    if budget is not None:
        a_case = f"a case's part of {budget:g} s, warm-up included"
    results = "conformance results were not asked for" if results_dir is None else f"exit code 0 in {results_dir}"
    return {
        "name": NAME,
        "restarts": restarts,
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
        "stop_rule": f"{ENOUGH_ROUNDS} rounds and all half-widths <= {TARGET_HALF_WIDTH:.0%}, or {a_case} "
        f"(up to {OVERTIME:g} times that for the first {ROUNDS_WANTED} rounds)",
        "recompute": "a backend without a cache-less forward prefills all tokens instead",
        "seconds_per_case": seconds if budget is None else None,
        "seconds": budget,
        "phases": list(phases) or "all",
        "validity": f"at least 2 restarts, half-width <= {MAX_RATIO_HALF_WIDTH:.0%}, standard deviation between restarts "
        f"<= {MAX_RESTART_STD:.0%}, load average <= {MAX_LOAD_PER_CORE:g} x cores; of a time by itself: half-width <= {MAX_TIME_HALF_WIDTH:.0%}",
        "interval": "95 %, Student's t over the restarts' median log ratios",
        "conformance": f"{results}; outputs at every position of the timed inputs within the bound, "
        f"on at most {COLUMNS} drawn logits, in each restart",
    }
