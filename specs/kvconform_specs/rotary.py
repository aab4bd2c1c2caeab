"""Scaled rotary factors: how the angles of rope are changed for contexts longer than those of training.

Without scaling, the pair ``i`` of ``d / 2`` turns by ``f_i = base^(-2 i / d)`` for each position (Su et al. 2021,
2104.09864). With ``r = factor`` and ``L = original``:

- ``linear``: ``f_i / r`` (position interpolation, Chen et al. 2023, 2306.15595, eq. 4);
- ``ntk``: the base becomes ``base r^(d / (d - 2))``, so that the slowest pair is interpolated and the fastest is not
  (bloc97 2023, "NTK-aware scaled RoPE"; Peng et al. 2023, 2309.00071, section 3.1);
- ``dynamic``: as ``ntk`` with ``r`` replaced by ``max(r n / L - (r - 1), 1)`` for a context of ``n`` tokens: it changes
  with every token beyond ``L`` (2309.00071, section 3.3; transformers' ``_compute_dynamic_ntk_parameters``);
- ``yarn``: ``f_i (1 - m_i) / r + f_i m_i``, the ramp ``m_i`` falling from 1 to 0 between the pairs that make
  ``beta_fast`` and ``beta_slow`` turns in ``L`` tokens, and an attention factor ``0.1 ln r + 1`` (2309.00071, eq. 17,
  19 to 23);
- ``longrope``: ``f_i / short_i`` for contexts of up to ``L`` tokens, ``f_i / long_i`` beyond, and an attention factor
  ``sqrt(1 + ln r / ln L)`` (Ding et al. 2024, 2402.13753, section 3.2; Phi-3, 2404.14219, as in transformers'
  ``_compute_longrope_parameters``): it changes once.

The attention factor multiplies cosines and sines of queries and keys alike, and so the scores by its square. Where the
factors change with the length, *all* keys turn by those of the whole context: a cache keeps keys unrotated, or rotates
them again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvconform_specs.errors import SpecError

Array = NDArray[np.float64]
BASE = 10000.0
KINDS = ("linear", "ntk", "dynamic", "yarn", "longrope")


@dataclass(frozen=True, slots=True)
class Rotary:
    """One scaling of rope; see the module for ``kind``, ``factor`` and ``original``.

    beta_fast, beta_slow: turns within ``original`` tokens (``yarn``). short, long: the divisors of each pair, ``d / 2``
    numbers (``longrope``).
    """

    kind: str
    factor: float
    original: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    short: tuple[float, ...] = ()
    long: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise SpecError("rotary.kind", f"unknown value {self.kind!r}; known: {', '.join(KINDS)}")
        if not self.factor >= 1:
            raise SpecError("rotary.factor", f"want a number of at least 1, got {self.factor!r}")
        if not isinstance(self.original, int) or self.original < 2:
            raise SpecError("rotary.original", f"want an integer of at least 2, got {self.original!r}")
        if self.kind == "longrope" and (len(self.short) != len(self.long) or not self.short):
            raise SpecError("rotary.long", f"{len(self.long)} long and {len(self.short)} short divisors")

    def changes_at(self, capacity: int) -> tuple[int, ...]:
        """The lengths, up to a capacity, from which on other factors apply to all tokens."""
        last = {"dynamic": capacity, "longrope": min(self.original + 1, capacity)}.get(self.kind, 0)
        return tuple(range(self.original + 1, last + 1))

    @property
    def attention_factor(self) -> float:
        """What cosines and sines are multiplied by."""
        if self.kind == "yarn":
            return 0.1 * math.log(self.factor) + 1.0
        if self.kind == "longrope":
            return math.sqrt(1.0 + math.log(self.factor) / math.log(self.original))
        return 1.0


def frequencies(rotary: Rotary | None, d: int, length: int) -> Array:
    """``(d / 2,)``: the angle of each pair for one position, in a context of ``length`` tokens."""
    pairs = np.arange(d // 2)
    plain = BASE ** (-2 * pairs / d)
    if rotary is None:
        return np.asarray(plain)
    r, original = rotary.factor, rotary.original
    if rotary.kind == "linear":
        return np.asarray(plain / r)
    if rotary.kind in ("ntk", "dynamic"):
        ratio = r if rotary.kind == "ntk" else max(r * length / original - (r - 1), 1.0)
        return np.asarray((BASE * ratio ** (d / (d - 2))) ** (-2 * pairs / d))
    if rotary.kind == "longrope":
        return np.asarray(plain / np.array(rotary.long if length > original else rotary.short))
    # yarn: the pair that makes so many turns in the original length, and the ramp between the two
    fast, slow = (
        d * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(BASE))
        for turns in (rotary.beta_fast, rotary.beta_slow)
    )
    low, high = max(math.floor(fast), 0), min(math.ceil(slow), d - 1)
    kept = 1 - np.clip((pairs - low) / (high - low or 0.001), 0, 1)
    return np.asarray(plain / r * (1 - kept) + plain * kept)


def attention_factor(rotary: Rotary | None) -> float:
    return 1.0 if rotary is None else rotary.attention_factor
