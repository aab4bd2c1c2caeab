"""Bounds of rounding error, derived from the arithmetic; there is no tolerance anywhere else.

**Attention.** Unit roundoffs: ``u`` of storage, ``a`` of accumulation. Scores stray by at most
``e_j = (sqrt(d) + 2) a scale sum|q||k_j| + a |s_j|`` for key ``j``: a dot product of ``d`` terms whose rounding
errors are independent grows like ``sqrt(d)`` (Higham & Mary 2019, "A new approach to probabilistic rounding error
analysis", theorem 2.4), one rounding for the scale, one for storing the sum, one for the shift by the maximum. A
softcap makes the last term ``12 a |s_j|``: a tanh of at most 4 ulp (8 a), a division, a product, storing, the shift.
With ``E = max_j e_j``, softmax weights stray by a factor of at most ``exp(2 E)``, so that

    bound = (sum_j p_j |v_j|) (2 E + (N + 4) a + u) + u |o| + eta (1 + sum_visible |v_j|)

``N`` is the square root of the number of visible keys: the sums over keys have independent terms here, since the suite
draws K and V independently. ``eta`` covers probabilities that underflow. A row that sees nothing has value 0, bound 0.

**Decoder.** Errors pass through layers, so the bound is measured on the definition by Monte-Carlo arithmetic (Parker
1997, "Monte Carlo arithmetic", UCLA CSD-970002): it is run ``RUNS`` times with random noise of the size of each
rounding, and ``bound = C sigma``, sigma pooled over one position's vocabulary. ``C`` is Student's t at ``RUNS``
degrees of freedom for a two-sided false-alarm rate of ``FALSE_ALARM``: if all the error lies in one direction of the
vocabulary, eight runs are eight draws, and no more. That rate holds for a logit whose own sigma is the pooled one; a
logit's sigma is up to ``SPREAD`` times that (a test measures it on the suite's configs), for which 2e-6 is left. In 16
bits the noise has scores rounded to storage, too: an implementation that does so stays inside for a decoder, and is
told by the attention profile.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from kvconform_specs.config import Config
from kvconform_specs.definition import Arithmetic, Attended, expand

Array = NDArray[np.floating]

STORAGE = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}
"""Unit roundoff ``u`` of each dtype: 2^-p for a significand of p bits."""
ACCUMULATION = 2.0**-24
"""Unit roundoff ``a``: dot products and softmax accumulate in float32 for every dtype."""
UNDERFLOW = {"float32": 2.0**-126, "bfloat16": 2.0**-126, "float16": 2.0**-25}

RUNS = 8
FALSE_ALARM = 1e-9
C = 31.96
"""Student's t quantile: P(|t_8| > C) = 1e-9 (a test recomputes it)."""
SPREAD = 2.5
"""No logit's own sigma is more than so many times the one that is pooled over its position."""
SOFTCAP_ROUNDINGS = 12


def attention_bound(query: Array, keys: Array, values: Array, attended: Attended, config: Config) -> Array:
    """Bound of each output element ``(..., h, t, d)``; arguments as for ``definition.attention``."""
    a, u = ACCUMULATION, STORAGE[config.dtype]
    d, terms = query.shape[-1], attended.visible.sum(axis=-1)[:, None]  # (t, 1)
    keys, sizes = expand(keys, config.group), expand(np.abs(values), config.group)
    relative = SOFTCAP_ROUNDINGS if config.softcap is not None else 1
    errors = (np.sqrt(d) + 2) * a * abs(config.score_scale) * (np.abs(query) @ np.abs(keys).swapaxes(-1, -2))
    errors += relative * a * np.abs(attended.scores)  # (..., h, t, s)
    worst = np.where(attended.visible, errors, 0.0).max(axis=-1, keepdims=True)
    spread = attended.weights @ sizes  # sum_j p_j |v_j|
    present = attended.visible.astype(np.float64) @ sizes
    bound = spread * (2 * worst + (np.sqrt(terms) + 4) * a + u) + u * np.abs(attended.output)
    return np.asarray(bound + UNDERFLOW[config.dtype] * (1 + present))


class Noisy(Arithmetic):
    """The decoder's arithmetic with each rounding replaced by random noise of its size.

    Storage: ``u |x| xi``, ``xi`` uniform in (-1, 1). A dot product of ``n`` terms of root-mean-square size
    ``r = |x| |w| / n`` has partial sums of size ``sqrt(k) r``, each rounded by ``a`` times that; their errors add up to
    ``a n r / sqrt(2) = a |x| |w| / sqrt(2)``, and the noise is ``a |x| |w| xi``.
    The noise is enlarged by ``gain`` so that it stands out of the rounding of the run itself; errors of first order
    scale with it. ``xi`` is read from one fixed pool at random offsets, which costs a third of drawing it.
    """

    def __init__(self, u: float, seed: int) -> None:
        self.gain = max(1.0, 2.0**-13 / u)
        self._u = np.float32(u * self.gain)
        self._a = np.float32(ACCUMULATION * self.gain)
        self._offsets = np.random.Generator(np.random.Philox(key=seed))

    def _xi(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """Noise of this shape, to be read and not written."""
        size, pool = int(np.prod(shape)), _pool()
        if size > pool.size // 2:  # it repeats after a million numbers, which are never compared with one another
            return np.resize(np.roll(pool, int(self._offsets.integers(pool.size))), shape)
        start = int(self._offsets.integers(pool.size - size))
        return pool[start : start + size].reshape(shape)

    def stored(self, x: Array) -> Array:
        noise = self._xi(x.shape) * self._u
        noise *= x
        noise += x
        return noise

    def product(self, x: Array, w: Array) -> Array:
        out = x @ w
        size = np.sqrt(np.einsum("...n,...n->...", x, x))[..., None] * np.sqrt(np.sum(w * w, axis=-2, keepdims=True))
        noise = np.abs(out)
        noise *= self._u
        noise += self._a * size
        noise *= self._xi(out.shape)
        noise += out
        return np.asarray(noise)


@lru_cache(maxsize=1)
def _pool() -> NDArray[np.float32]:
    return np.random.Generator(np.random.Philox(key=1)).uniform(-1, 1, 1 << 20).astype(np.float32)


def single(weights: Mapping[str, Array]) -> dict[str, Array]:
    """The weights for the noisy runs, in float32: the enlarged noise is 2^11 times its rounding."""
    return {name: value.astype(np.float32) for name, value in weights.items()}


def decoder_bound(runs: Array, value: Array, gain: float) -> Array:
    """``C sigma`` for each position, ``(..., t, 1)``, from noisy logits ``(RUNS, ..., t, V)`` about the exact ones."""
    strays = runs - value
    variance = np.mean(np.square(strays, out=strays), axis=(0, -1))
    return np.asarray(C / gain * np.sqrt(variance))[..., None]
