"""Measures how many tokens a past holds, and how many of them outputs depend on."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from kvconform_backends.targets.module.past import grown_axis, sizes
from kvconform_backends.targets.module.recognised import Recognised
from kvconform_backends.targets.module.trials import Array, Trials
from kvconform_backends.targets.third_party import ThirdPartyError, guarded


def held(trials: Trials, made: Recognised) -> Mapping[str, int] | None:
    """Of a sequence that fills the capacity (``tokens``): how many tokens its past holds (``held``), and how many its
    last output depends on (``seen``); None where that is all of them, or where it cannot be measured."""
    try:
        with guarded():
            seen = _seen(trials, made)
            if seen == made.capacity:
                return None
            return {"tokens": made.capacity, "held": _kept(trials, made), "seen": seen}
    except ThirdPartyError:
        return None


def _seen(trials: Trials, made: Recognised) -> int:
    """How far back the last output of the uncached forward sees, in tokens: it does not move by a bit if all tokens
    before those are others. The capacity where it is not known."""
    x = trials.sample(made, made.capacity)
    caller = trials.caller(made.convention)

    def output(changed: int) -> Array:
        """The last output with so many of the oldest tokens changed."""
        given = x.copy()
        given[:, :changed] = (given[:, :changed] + 1) % made.vocabulary if made.vocabulary else -given[:, :changed]
        return caller.uncached(given)[:, -1]

    right = output(0)
    if not np.isfinite(right).all() or not np.array_equal(right, output(0)):
        return made.capacity
    low, high = 0, made.capacity  # changing ``low`` tokens moves nothing
    while low + 1 < high:
        middle = 1 if low == 0 and high == made.capacity else (low + high) // 2
        low, high = (middle, high) if np.array_equal(right, output(middle)) else (low, middle)
    return made.capacity - low


def _kept(trials: Trials, made: Recognised) -> int:
    """The most tokens that an array of the past has room for when the capacity is reached, along the axis that grows
    with the first tokens; 0 if none grows."""
    x, caller = trials.sample(made, made.capacity), trials.caller(made.convention)
    sequence, shapes = caller.start(len(x)), []
    for token in range(made.capacity):
        _output, sequence = caller.step(sequence, x[:, token : token + 1])
        if token in (0, 1, made.capacity - 1):
            shapes.append(dict(sizes(sequence.past)))
    first, second, last = shapes
    grown = ((grown_axis(shape, second.get(at)), last.get(at)) for at, shape in first.items())
    return max((end[axis] for axis, end in grown if axis is not None and isinstance(end, tuple)), default=0)
