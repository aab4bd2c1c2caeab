"""Whether steps ask for no more than a backend claims, as far as that depends on the steps before them."""

from __future__ import annotations

from collections.abc import Sequence

from kvconform_specs.claims import Claims
from kvconform_specs.program import (
    AliasHandle,
    Append,
    Call,
    Fork,
    Marks,
    Reject,
    Reorder,
    Step,
    Truncate,
    UncachedForward,
    called,
)


def claimed(steps: Sequence[Step], claims: Claims) -> bool:
    """Whether rows, tokens, open sequences, ragged rows and truncations stay within the claims. Abilities are not
    looked at, but for those that depend on a step's arguments."""
    state = Marks()
    for step in steps:
        call = called(step)
        if claims.interface == "generation" and not isinstance(call, UncachedForward):  # a generation is one, too
            return False
        if not _fits(call, state, claims):
            return False
        if isinstance(call, Append) and not _takes(call, state.begun(call.seq), claims):
            return False
        if isinstance(step, Reject):
            continue
        if isinstance(call, Append) and not _shaped(call, claims):
            return False
        if isinstance(step, Truncate) and not _reaches(step, state, claims):
            return False
        state.apply(step)
    return True


def _fits(call: Call, state: Marks, claims: Claims) -> bool:
    rows = tokens = 0
    names = set(state.rows)
    match call:
        case Append(seq, counts):
            rows, tokens = len(counts), max(counts)
            names.add(seq)
        case UncachedForward(counts=counts):
            rows = len(counts)
        case Fork(into=into) | AliasHandle(into=into):
            names.add(into)
        case Reorder(rows=order):
            rows = len(order)
    limits = ((rows, claims.max_batch), (tokens, claims.max_chunk), (len(names), claims.max_sequences))
    return all(limit is None or number <= limit for number, limit in limits)


def _shaped(step: Append, claims: Claims) -> bool:
    columns = max(step.counts)
    return not columns or claims.ragged_prompt(step.counts) or claims.longest(columns) == columns


def _takes(step: Append, begun: bool, claims: Claims) -> bool:
    if not max(step.counts):
        return claims.can("empty_append")
    if len(set(step.counts)) == 1:
        return True
    side = "right" if step.pad is None else step.pad[0]
    return claims.can("ragged") and side in claims.padding and (claims.ragged_appends == "any" or not begun)


def _reaches(step: Truncate, state: Marks, claims: Claims) -> bool:
    rows = state.of(step.seq)
    lengths = step.lengths(len(rows))
    if not isinstance(step.length, int) and not claims.can("truncate_rows"):
        return False
    if isinstance(step.length, int) and not claims.levels([length for length, _mark in rows]):
        return False
    return all(claims.keeps(mark) <= length for length, (_length, mark) in zip(lengths, rows, strict=True))
