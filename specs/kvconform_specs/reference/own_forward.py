"""What is measured of a black box's own forward before it is the reference."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from kvconform_specs.config import Config
from kvconform_specs.reference.solver import Numbers, ReferenceForward, model
from kvconform_specs.tensors import Streams

Array = NDArray[np.floating]
Own = Callable[..., Array]
"""``solver.ReferenceForward`` with the config in front of its arguments."""

SAMPLES = ((32, 8), (1, 12), (3, 5), (8, 16), (2, 9), (16, 3), (1, 2), (1, 4), (2, 2))
"""Sequences, and tokens of each, on which ``shares_rounding`` runs a black box, until one of them tells: whether a
shared product moves depends on its sizes: that of experts may move in short sequences alone."""
AGAIN, FEW = 3, 48
"""How often the samples of at most so many tokens are run again with others: whether a shared product moves depends on
its numbers, too, and where half of all samples show it, one box in a quarter of a million is missed."""
ROWS = 8
"""Sequences on which ``length_changes`` runs it."""
SCANNED = 128
"""The longest sequences of which ``length_changes`` runs every prefix."""


def shares_rounding(own: Own, config: Config) -> bool:
    """Whether a change of the last token of sequences changes an earlier output of the forward by a bit."""
    few = tuple((rows, tokens) for rows, tokens in SAMPLES if rows * tokens <= FEW)
    samples = [*SAMPLES, *few * AGAIN]
    return any(
        _moves(own, config, rows, min(config.capacity, tokens), 100 * number)
        for number, (rows, tokens) in enumerate(samples)
    )


def _moves(own: Own, config: Config, rows: int, tokens: int, seed: int) -> bool:
    streams = Streams(config, tokens, range(rows))
    base, changed = streams.tape(11 + seed).copy(), streams.tape(11 + seed).copy()
    changed[:, -1] = streams.tape(12 + seed)[:, -1]
    before, after = (own(config, inputs, 0.0, 0.0, 0)[:, :-1] for inputs in (base, changed))
    return not np.array_equal(before, after, equal_nan=True)


def length_changes(own: Own, config: Config) -> tuple[int, ...]:
    """The lengths at which the forward gives the tokens before the last other outputs than with one token less, by more
    than the bounds (``Claims.changes_at``).

    Empty where outputs depend on which tokens follow, or differ from call to call: that is a mistake, and for a clause
    to find. For sequences of more than ``SCANNED`` tokens every length counts as a change if any does.
    """
    capacity = config.capacity
    streams = Streams(config, capacity, range(ROWS))
    tape, other = streams.tape(13)[:, None], streams.tape(14)[:, None]
    forward: ReferenceForward = partial(own, config)

    def run(length: int) -> Numbers:
        return model(config, forward, lambda: tape[:, :, :length], 0).numbers

    whole = run(capacity)
    lengths = sorted({2, capacity // 4, capacity // 2, capacity - 1} & set(range(1, capacity)))
    shorter = {length: run(length) for length in lengths}
    if not any(_apart(numbers, whole, length) for length, numbers in shorter.items()):
        return ()
    half = capacity // 2
    followed = np.concatenate([tape[:, :, :half], other[:, :, half:]], axis=2)
    if _apart(whole, model(config, forward, lambda: followed, 0).numbers, half):
        return ()
    repeated = [_apart(numbers, run(length), length) for length, numbers in {**shorter, capacity: whole}.items()]
    if any(repeated):
        return ()
    if capacity > SCANNED:
        return tuple(range(2, capacity + 1))
    found: list[int] = []
    first = last = run(1)
    for length in range(2, capacity + 1):
        now = run(length)
        begun = found[-1] if found else 1
        if _apart(last, now, length - 1) or _apart(first, now, begun):
            found.append(length)
            first = now
        last = now
    return tuple(found)


def _apart(one: Numbers, other: Numbers, tokens: int) -> bool:
    """Whether outputs of the first tokens differ by more than the bounds."""
    error = np.abs(one("value")[:, :, :tokens] - other("value")[:, :, :tokens])
    for kind in ("bound_lower", "bound"):
        if bool(np.all(error <= one(kind)[:, :, :tokens] + other(kind)[:, :, :tokens])):
            return False
    return True
