"""Bounds of rounding error, derived from the arithmetic; there is no tolerance anywhere else.

**Attention.** Unit roundoffs: ``u`` of storage, ``a`` of accumulation (float32), and ``w`` of the scores: ``w = a``
where they are kept in float32 (intermediates ``single``: FlashAttention, Dao 2023, 2307.08691), ``w = u`` where every
one of them is stored (``storage``: the math path of PyTorch's SDPA, the function body of ONNX ``Attention``).

*Scores.* The error of key ``j``'s exponent is at most ``e_j``, the sum of

- ``a sqrt(d) A_j`` with ``A_j = |scale| sum|q||k_j|``: a dot product of ``d`` terms with independent rounding errors
  (Higham & Mary 2019, "A new approach to probabilistic rounding error analysis", theorem 2.4);
- ``2 w A_j``: the scale, on the product or its root on both operands; ``w |x_j|``: the product ``x_j``, stored;
- softcap: ``8 a |x_j| + 3 w |x_j|``: a tanh of at most 4 ulp; division, tanh and product, stored. Earlier errors do
  not grow, since the slope of ``c tanh(x / c)`` is at most 1;
- alibi: ``2 w |b_j| + w |s_j|``: the slope, the bias ``b_j = slope (i - j)``, and the score ``s_j`` it is added to;
- ``2 w (m - s_j)``: the shift by the maximum ``m``, in one base or another; ``8 a + w``: an exp of at most 4 ulp,
  stored.

A sink is one more score, with error ``2 w |s| + 2 w (m - s) + 8 a + w`` and without a value.

*Weights.* If the error of every exponent is at most its ``e_j``, each weight ``p_j`` is multiplied by at most
``exp(e_j) Z`` and by at least ``1 / (exp(e_j) Z)``, ``Z = sum_k p_k exp(e_k)``, with the sink among the ``k``. Its
error is therefore at most ``r_j = min(p_j (exp(e_j) Z - 1), 1)``. Weights sum to one, so that no error exceeds the sum
of all others:

    r'_j = min(r_j, sum_k r_k - r_j)        weighted = min(sum_j r'_j |v_j|, |o| + max|v|)

The second bound on ``weighted`` holds because the output is a mean of values. It is the smaller one where scores of
several hundred are rounded to 16 bits; where some ``e_j`` exceeds ``MAX_EXPONENT_ERROR``, only the second is used.

*Sums.* Denominator and output are sums over the ``n`` visible keys, of error ``N a`` each. ``N = sqrt(n)``, since the
suite draws K and V independently; ``N = n`` where keys repeat (all zero) and errors may all have one sign. Then two
roundings ``a`` of the normalisation, one ``u`` of the weights on their way into the product with V (matrix units take
both operands in storage precision), and one ``u`` of the result:

    mean  = sum_j p_j |v_j| + weighted
    core  = weighted + mean ((2 N + 2) a + u)
    bound = core + u (|o| + core) + eta (1 + n max|v|)

``eta`` covers weights and results that underflow. A query that sees no key has value 0 and
bound 0; no bound where any finite number is claimed.

*Quantised cache.* An element has an error of at most ``h`` (``quantisation.py``). The error of scores then grows by
``|scale| sum|q| h`` of the key, that of the output by ``sum_j (p_j + r'_j) h`` of the values. Tokens from
``exact_from`` on are not quantised. In a cache of another dtype than the config's, of unit roundoff ``c``, each key and
value is rounded once: ``h = c |x| + eta``.

**Decoder.** Errors pass through layers, so the bound is measured on the definition by Monte-Carlo arithmetic (Parker
1997, "Monte Carlo arithmetic", UCLA CSD-970002): it is run ``RUNS`` times with random noise of the size of each
rounding, and ``bound = C sigma``, sigma pooled over one position's vocabulary. ``C`` is Student's t at ``RUNS`` degrees
of freedom for a two-sided false-positive rate of ``FALSE_ALARM``: if all the error has one direction in the vocabulary,
eight runs are only eight samples. That rate holds for a logit whose own sigma is the pooled one; a logit's sigma is up
to ``SPREAD`` times that (a test measures it on the suite's configs), with a rate of 5e-6. In 16 bits the noise includes
scores that are rounded to storage, so that a decoder which does this is within the bound; the attention profile detects
it. Latent attention is run as defined, with expanded keys ``k = W c``; the absorbed form multiplies ``q W`` by the
latent ``c``. Its two products have errors of ``a |q| |W| |c|`` each, of which the run has one, that of ``W c`` seen
through ``q``: the ratio of at most about two is far from ``C``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from kvconform_specs.claims import Precision
from kvconform_specs.config import Config
from kvconform_specs.reference.definition import Arithmetic, Attended, expand, sinks
from kvconform_specs.reference.quantisation import ACCUMULATION, UNDERFLOW, quantisation_error
from kvconform_specs.reference.quantisation import STORAGE as STORAGE  # of every module that measures bounds

Array = NDArray[np.floating]


RUNS = 8
FALSE_ALARM = 1e-9
C = 31.96
"""Student's t quantile: P(|t_8| > C) = 1e-9 (a test recomputes it)."""
SPREAD = 3.0
"""The largest ratio of a logit's own sigma to the one that is pooled over its position."""
ELEMENTARY = 8
"""Error of exp and tanh in units of ``a``: at most 4 ulp."""
MAX_EXPONENT_ERROR = 300.0
"""If the error of an exponent exceeds this, no bound on its row's weights is computed, so that nothing overflows."""


def attention_bound(
    query: Array,
    keys: Array,
    values: Array,
    attended: Attended,
    config: Config,
    precision: Precision = Precision(),  # noqa: B008 - it is frozen
    *,
    biased: bool = False,
    exact_from: int | None = None,
) -> Array:
    """Bound of each output element ``(..., h, t, d)``; arguments as for ``definition.attention``.

    biased: keys repeat, so that rounding errors of the sums over keys may all have one sign. exact_from: the first
    position whose tokens are not quantised; None: all are quantised.
    """
    a, u = ACCUMULATION, STORAGE[config.dtype]
    w = u if precision.intermediates == "storage" else a
    counted = attended.visible.sum(axis=-1)[..., None]  # (..., t, 1)
    terms = counted if biased else np.sqrt(counted)
    sizes = expand(np.abs(values), config.group)
    errors = _score_errors(query, keys, attended, config, a, w)  # (..., h, t, s)
    lossy = precision.kv_bits > 0 or precision.cache_dtype not in ("", config.dtype)
    if lossy:
        key_error, value_error = (
            expand(quantisation_error(x, precision, config.dtype, part=part, exact_from=exact_from), config.group)
            for part, x in (("keys", keys), ("values", values))
        )
        errors += abs(config.score_scale) * (np.abs(query) @ key_error.swapaxes(-1, -2))
    unbounded = np.max(errors, axis=-1, keepdims=True, initial=0.0, where=attended.visible) > MAX_EXPONENT_ERROR
    shifts = _weight_errors(np.minimum(errors, MAX_EXPONENT_ERROR), attended, config, a, w)
    output = np.abs(attended.output)
    highest = sizes.max(axis=-2, keepdims=True, initial=0.0)
    largest = output + highest
    weighted = np.where(unbounded, largest, np.minimum(shifts @ sizes, largest))
    mean = attended.weights @ sizes + weighted
    core = weighted + mean * ((2 * terms + 2) * a + u)
    if lossy:
        core += np.where(unbounded, value_error.max(axis=-2, keepdims=True), (attended.weights + shifts) @ value_error)
    bound = core + u * (output + core) + UNDERFLOW[config.dtype] * (1 + counted * highest)
    return np.where(counted > 0, bound, 0.0 if precision.sees_nothing == "zeros" else np.inf)


def _score_errors(query: Array, keys: Array, attended: Attended, config: Config, a: float, w: float) -> Array:
    """``e_j`` of each key, ``(..., h, t, s)``, without quantisation."""
    errors = np.abs(query) @ expand(np.abs(keys), config.group).swapaxes(-1, -2)
    errors *= (np.sqrt(query.shape[-1]) * a + 2 * w) * abs(config.score_scale)
    scores, bias = attended.scores, attended.bias
    product = w if config.softcap is None else ELEMENTARY * a + 4 * w
    errors += product * np.abs(scores if bias is None else scores - bias)
    if bias is not None:
        errors += w * (2 * np.abs(bias) + np.abs(scores))
    errors += 2 * w * np.abs(attended.top - scores) + (ELEMENTARY * a + w)
    return errors


def _weight_errors(errors: Array, attended: Attended, config: Config, a: float, w: float) -> Array:
    """``r'_j`` of each key, ``(..., h, t, s)``."""
    grown = attended.weights * np.exp(errors)
    z = grown.sum(axis=-1, keepdims=True)
    if config.sink is None:
        shifts = np.minimum(grown * z - attended.weights, 1.0)
        return np.asarray(np.minimum(shifts, shifts.sum(axis=-1, keepdims=True) - shifts))
    sink = sinks(config)
    weight = np.exp(sink - attended.top) / attended.total
    heavy = weight * np.exp(2 * w * (np.abs(sink) + attended.top - sink) + ELEMENTARY * a + w)
    z += heavy
    shifts = np.minimum(grown * z - attended.weights, 1.0)
    others = shifts.sum(axis=-1, keepdims=True) + np.minimum(heavy * z - weight, 1.0) - shifts
    return np.asarray(np.minimum(shifts, others))


@dataclass(frozen=True)
class Lossy:
    """A cache that does not give back what it was given. relative: how large its error is (``kept``)."""

    config: Config
    precision: Precision

    @property
    def relative(self) -> float:
        return kept(self.config, self.precision)

    def error(self, x: Array, part: str) -> Array:
        """The largest error of each of the keys or values ``(..., g, s, d)`` of whole rows."""
        residual = self.precision.residual
        exact_from = x.shape[-2] - residual if residual else None
        return quantisation_error(x, self.precision, self.config.dtype, part=part, exact_from=exact_from)


def lossy(config: Config, precision: Precision) -> Lossy | None:
    """The cache of an implementation, or None if it keeps keys and values as they are."""
    same = not precision.kv_bits and precision.cache_dtype in ("", config.dtype)
    return None if same else Lossy(config, precision)


class Noisy(Arithmetic):
    """The decoder's arithmetic with each rounding replaced by random noise of its size.

    Storage: ``u |x| xi``, and ``h xi`` of keys and values in a lossy cache, ``h`` the largest error of each
    (``quantisation.py``), ``xi`` uniform in (-1, 1).
    A dot product of ``n`` terms of root-mean-square size ``r = |x| |w| / n`` has partial sums of size ``sqrt(k)
    r``, each rounded by ``a`` times that; their errors add up to ``a n r / sqrt(2) = a |x| |w| / sqrt(2)``, and the
    noise is ``a |x| |w| xi``.
    An angle of rope is a position times a frequency, in float32: a power and a quotient, ``2 a`` of the frequency, the
    same at all positions; and ``a`` of the product. Its error is that much of the angle, in radians, and so grows with
    the position; queries and keys share it.
    The noise is enlarged by ``gain`` so that it exceeds the rounding of the run itself; errors of first order scale
    with it. ``xi`` is read from one fixed pool at random offsets, which takes a third of the time of drawing it.
    """

    def __init__(self, u: float, seed: int, cache: Lossy | None = None) -> None:
        self.gain = max(1.0, 2.0**-13 / max(u, cache.relative if cache else 0.0))
        self._cache = cache
        self._u = np.float32(u * self.gain)
        self._a = np.float32(ACCUMULATION * self.gain)
        self._offsets = np.random.Generator(np.random.Philox(key=seed))
        self._apart: tuple[int, ...] = ()

    def of(self, runs: int) -> Noisy:
        """For so many runs at once on inputs ``(runs, n, rows, s)``: angles differ by run, and not by row or head."""
        self._apart = runs, 1, 1, 1
        return self

    def _xi(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """Noise of this shape, read-only."""
        size, pool = math.prod(shape), _pool()
        if size > pool.size // 2:  # it repeats after a million numbers, which are never compared with one another
            return np.resize(np.roll(pool, int(self._offsets.integers(pool.size))), shape)
        start = int(self._offsets.integers(pool.size - size))
        return pool[start : start + size].reshape(shape)

    def stored(self, x: Array) -> Array:
        noise = self._xi(x.shape) * self._u
        noise *= x
        noise += x
        return noise

    def cached(self, x: Array, part: str) -> Array:
        if self._cache is None:
            return x
        largest = self._cache.error(x, part).astype(np.float32) * np.float32(self.gain)
        return np.asarray(x + largest * self._xi(x.shape))

    def angles(self, positions: Array, frequencies: Array) -> Array:
        same = 2 * self._a * self._xi((*self._apart, 1, len(frequencies)))
        each = self._a * self._xi((*self._apart, len(positions), len(frequencies)))
        return np.asarray(positions[:, None] * (frequencies * (1 + same)) * (1 + each))

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


@dataclass(frozen=True)
class Perturbation:
    """The relative perturbation of a black box's weights: ``storage + accumulation * sqrt(n)`` for a weight that is one
    of ``n`` terms of a sum. ``gain``: its ratio to the rounding that it represents."""

    storage: float
    accumulation: float
    gain: float


def perturbation(config: Config, precision: Precision = Precision()) -> Perturbation:  # noqa: B008 - it is frozen
    """A product computed in floating point is the exact product of perturbed factors (Higham, *Accuracy and Stability
    of Numerical Algorithms*, 2nd ed., section 3.1), by about ``sqrt(n) a`` each where roundings are independent (Higham
    and Mary 2019, doi:10.1137/18M1226312). Randomly perturbed weights therefore show the effect of rounding on what
    follows, in any implementation. It is enlarged as in ``Noisy``, to exceed the rounding of the run itself.

    Keys and values that a lossy cache rounds (``kept``) are products, too."""
    storage = max(STORAGE[config.dtype], kept(config, precision))
    gain = max(1.0, 2.0**-13 / storage)
    return Perturbation(storage * gain, ACCUMULATION * gain, gain)


def kept(config: Config, precision: Precision) -> float:
    """By how much a lossy cache rounds, relative to the size of what it keeps: 0 if it is not lossy.

    A float format rounds each number by its unit roundoff at most. An integer of ``k`` bits rounds by half a step, the
    largest magnitude ``A`` of the ``n`` numbers that share a scale over ``2^(k-1) - 1``; ``A`` is at most ``sqrt(n)``
    times their root mean square, and the deviation of a uniform number in half a step either way is that of
    ``uniform(-1, 1)`` times the half step, as in ``Perturbation``."""
    if precision.kv_bits and precision.quantiser.scheme != "integer":
        return 2.0**-4 if precision.quantiser.scheme == "float8_e4m3" else 2.0**-3
    if precision.kv_bits:
        quantiser = precision.quantiser
        shared = quantiser.group or (config.capacity if quantiser.by_channel else config.head_dim)
        return math.sqrt(shared) / float(2**precision.kv_bits - 2)
    return STORAGE[precision.cache_dtype] if precision.cache_dtype else 0.0


def black_box_bound(deviations: Sequence[Array], runs: int, gain: float) -> Array:
    """As ``decoder_bound``, times ``sqrt(2)``: both the forward that is the reference and the step are rounded."""
    return np.asarray(np.sqrt(2) * decoder_bound(deviations, runs, gain))


def deviation(run: Array, value: Array) -> Array:
    """Mean square over the vocabulary of the deviation of a noisy run ``(..., t, V)`` from the exact logits."""
    error = run - value
    return np.asarray(np.mean(np.square(error, out=error), axis=-1))


def decoder_bound(deviations: Sequence[Array], runs: int, gain: float) -> Array:
    """``C sigma`` for each position, ``(..., t, 1)``, from the deviations of noisy runs. With fewer of them than
    ``runs`` it is a lower bound: the missing ones are assumed to be zero."""
    return np.asarray(C / gain * np.sqrt(sum(deviations) / runs))[..., None]
