"""The sign-flip test of the gate, on one number for each restart, and why equal code rarely fails it.

A restart starts both workers and gives a case one number ``d``: the median over its rounds of log(head / base). The
test flips signs: of all ``2^n`` ways to give the ``n`` magnitudes a sign, ``p`` is the part whose sum is at least the
one that was observed (Fisher 1935, "The Design of Experiments", section 21).

Its false-alarm rate. Which environment starts first, and which runs first in each round, is drawn for each restart;
the rest of a restart treats both alike. If both run the same code, exchanging their names in a restart therefore
changes the sign of that ``d`` and nothing else, and all ``2^n`` sign vectors are equally likely given the magnitudes:
``P(p <= a) <= floor(a 2^n) / 2^n <= a``, for any distribution of ``d``, heavy tails, drift from restart to restart and
correlation of rounds included. (Nothing at all is assumed of rounds; a test on pooled rounds would need them to be
independent.) The screen's restarts and the confirmation's are different ones, so the levels multiply: a case of equal
code is called a regression with probability at most ``decision.RATE = .05 * .01``, and an improvement likewise. Cases
of one run share their restarts; a run with ``m`` of them alarms with probability at most ``m * RATE`` (Boole). The
threshold on the median makes it rarer still.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray


@cache
def _signs(n: int) -> NDArray[np.float64]:
    """``(2^n, n)``: every sign vector; the first is all ones."""
    bits = np.arange(2**n)[:, None] >> np.arange(n) & 1
    return np.where(bits, -1.0, 1.0)


def sign_flip(values: Sequence[float]) -> float:
    """The exact one-sided ``p``: how often the sum would be as large if each sign were a coin's."""
    d = np.asarray(values, np.float64)
    sums = _signs(len(d)) @ d
    # sums that are equal but for the rounding of n additions count as equal, which makes p larger, never smaller
    slack = len(d) * np.finfo(np.float64).eps * np.abs(d).sum()
    return float((sums >= sums[0] - slack).mean(dtype=np.float64))
