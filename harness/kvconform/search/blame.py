"""Failures that a backend may not be to blame for: a signal from outside, and memory that the machine does not have.

Such a failure is held against the backend only if it comes again at the same place, in two fresh processes, without a
sign that memory was short. These run nothing else, or, where it does not come again, what the first process ran before:
a backend may end its process at the n-th call.
"""

from __future__ import annotations

from kvconform.host import address_space_limited, free_memory, peak_memory
from kvconform.judging.mismatch import Mismatch
from kvconform.judging.render import render
from kvconform.judging.verdict import Reason
from kvconform.search.counterexample import replayed
from kvconform.worker.client import WorkerClient
from kvconform_specs.clause import Case, Clause
from kvconform_specs.program import Program

TIMES = 2
"""In how many fresh processes it must come again."""


def excuse(
    clause: Clause, client: WorkerClient, case: Case, broken: Mismatch, earlier: list[Program]
) -> tuple[Reason, str] | None:
    """Why a failure proves nothing about the backend, or None where it does. ``case``: the failing one, its seeds those
    of variant 0; ``earlier``: what its process ran before it."""
    if not doubtful(broken):
        return None
    if _short_of_memory(client, broken):
        return _out_of_memory(broken)
    for before in [[], earlier] if earlier else [[]]:
        for number in range(TIMES):
            found = replayed(clause, client, before, case)
            if found is None or not _alike(found, broken):
                break
            if _short_of_memory(client, found):
                return _out_of_memory(found)
            if number + 1 == TIMES:
                return None
    words = "it did not come again in a fresh process, so it may have come from outside"
    return suspicion(broken), f"{render(broken)}; {words}"


def _out_of_memory(broken: Mismatch) -> tuple[Reason, str]:
    return Reason.OUT_OF_MEMORY, f"memory ran out, or may have: {render(broken)}"


def suspicion(broken: Mismatch) -> Reason:
    """What a doubtful failure may come from."""
    return Reason.OUT_OF_MEMORY if broken.ended is None or broken.ended.oom else Reason.KILLED


def doubtful(broken: Mismatch) -> bool:
    """Whether it may have come from outside the backend."""
    if broken.ended is not None:
        return broken.ended.from_outside
    return broken.error is not None and broken.error.out_of_memory


def _alike(one: Mismatch, other: Mismatch) -> bool:
    ends = [None if found.ended is None else found.ended.signal for found in (one, other)]
    return (one.kind, one.program, one.step, ends[0]) == (other.kind, other.program, other.step, ends[1])


def _short_of_memory(client: WorkerClient, broken: Mismatch) -> bool:
    """Whether the machine may lack memory, so that failing to get some says nothing about the backend. Of a worker that
    lives: less is free than it has ever held, or it is not known how much."""
    if broken.ended is not None:
        return broken.ended.oom
    worker = client.process
    if client.spec.device != "cpu" or worker is None or address_space_limited(worker):
        return True
    free, held = free_memory(), peak_memory(worker)
    return free is None or held is None or free < held
