"""Bounds of rounding error, derived from the arithmetic; there is no tolerance anywhere else.

**Attention.** Unit roundoffs: ``u`` of storage, ``a`` of accumulation (float32), and ``w`` of the scores: ``w = a``
where they are kept in float32 (intermediates ``single``: FlashAttention, Dao 2023, 2307.08691), ``w = u`` where every
one of them is stored (``storage``: the math path of PyTorch's SDPA, the function body of ONNX ``Attention``).

*Scores.* Key ``j``'s exponent strays by at most ``e_j``, the sum of

- ``a sqrt(d) A_j`` with ``A_j = scale sum|q||k_j|``: a dot product of ``d`` terms with independent rounding errors
  (Higham & Mary 2019, "A new approach to probabilistic rounding error analysis", theorem 2.4);
- ``2 w A_j``: the scale, on the product or its root on both operands; ``w |x_j|``: the product ``x_j``, stored;
- softcap: ``8 a |x_j| + 3 w |x_j|``: a tanh of at most 4 ulp; division, tanh and product, stored. What strayed before
  it does not grow, since the slope of ``c tanh(x / c)`` is 1 at most;
- alibi: ``2 w |b_j| + w |s_j|``: the slope, the bias ``b_j = slope (i - j)``, and the score ``s_j`` it is added to;
- ``2 w (m - s_j)``: the shift by the maximum ``m``, in one base or another; ``8 a + w``: an exp of at most 4 ulp,
  stored.

A sink is one score more, of error ``2 w |s| + 2 w (m - s) + 8 a + w``, without a value.

*Weights.* If every exponent strays by at most its ``e_j``, each weight ``p_j`` is multiplied by at most ``exp(e_j) Z``
and by at least ``1 / (exp(e_j) Z)``, ``Z = sum_k p_k exp(e_k)``, the sink among the ``k``. So ``p_j`` strays by no more
than ``r_j = min(p_j (exp(e_j) Z - 1), 1)``. Weights sum to one: none strays by more than all others together, so that

    r'_j = min(r_j, sum_k r_k - r_j)        strays = min(sum_j r'_j |v_j|, |o| + max|v|)

and the second bound on the strays holds because the output is a mean of values. It speaks where scores of several
hundred are rounded to 16 bits; where some ``e_j`` exceeds ``HOPELESS``, the first is not asked.

*Sums.* Denominator and output are sums over the ``n`` visible keys, of error ``N a`` each. ``N = sqrt(n)``, since the
suite draws K and V independently; ``N = n`` where keys repeat (all zero) and errors may all point one way. Then two
roundings ``a`` of the normalisation, one ``u`` of the weights on their way into the product with V (matrix units take
both operands in storage precision), and one ``u`` of the result:

    mean  = sum_j p_j |v_j| + strays
    core  = strays + mean ((2 N + 2) a + u)
    bound = core + u (|o| + core) + eta (1 + n max|v|)

``eta`` covers weights and results that underflow. A row that sees nothing has value 0, bound 0.

*Quantised cache.* An element ``x`` of a token whose absmax is ``M`` in that head has ``step = M / (2^(bits - 1) - 1)``
and strays by at most ``h = (1 + u) step / 2 + 3 a M + u |x|``: rounding to an integer, with a step that may be stored;
the step, the quotient and the product, in float32; what comes out of it, stored. Scores then stray by
``scale sum|q| h`` of the key more, the output by ``sum_j (p_j + r'_j) h`` of the values. Tokens from ``exact_from`` on
are not quantised.

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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from kvconform_specs.claims import Precision
from kvconform_specs.config import Config
from kvconform_specs.reference.definition import Arithmetic, Attended, expand, sinks

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
ELEMENTARY = 8
"""Error of exp and tanh in units of ``a``: 4 ulp at most."""
HOPELESS = 300.0
"""From this stray of an exponent on nothing is said about the weights of its row, so that nothing overflows."""


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

    biased: keys repeat, so that rounding errors of the sums over keys may all point one way. exact_from: the position
    from which on tokens are not quantised; None: all are.
    """
    a, u = ACCUMULATION, STORAGE[config.dtype]
    w = u if precision.intermediates == "storage" else a
    counted = attended.visible.sum(axis=-1)[..., None]  # (..., t, 1)
    terms = counted if biased else np.sqrt(counted)
    sizes = expand(np.abs(values), config.group)
    errors = _score_errors(query, keys, attended, config, a, w)  # (..., h, t, s)
    if precision.kv_bits:
        key_error, value_error = (
            expand(_quantised(x, config.dtype, precision, exact_from), config.group) for x in (keys, values)
        )
        errors += abs(config.score_scale) * (np.abs(query) @ key_error.swapaxes(-1, -2))
    hopeless = np.max(errors, axis=-1, keepdims=True, initial=0.0, where=attended.visible) > HOPELESS
    stray = _weight_strays(np.minimum(errors, HOPELESS), attended, config, a, w)
    output = np.abs(attended.output)
    highest = sizes.max(axis=-2, keepdims=True, initial=0.0)
    largest = output + highest
    strays = np.where(hopeless, largest, np.minimum(stray @ sizes, largest))
    mean = attended.weights @ sizes + strays
    core = strays + mean * ((2 * terms + 2) * a + u)
    if precision.kv_bits:
        core += np.where(hopeless, value_error.max(axis=-2, keepdims=True), (attended.weights + stray) @ value_error)
    bound = core + u * (output + core) + UNDERFLOW[config.dtype] * (1 + counted * highest)
    return np.asarray(bound * (counted > 0))


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


def _weight_strays(errors: Array, attended: Attended, config: Config, a: float, w: float) -> Array:
    """``r'_j`` of each key, ``(..., h, t, s)``."""
    grown = attended.weights * np.exp(errors)
    z = grown.sum(axis=-1, keepdims=True)
    if config.sink is None:
        stray = np.minimum(grown * z - attended.weights, 1.0)
        return np.asarray(np.minimum(stray, stray.sum(axis=-1, keepdims=True) - stray))
    sink = sinks(config)
    weight = np.exp(sink - attended.top) / attended.total
    heavy = weight * np.exp(2 * w * (np.abs(sink) + attended.top - sink) + ELEMENTARY * a + w)
    z += heavy
    stray = np.minimum(grown * z - attended.weights, 1.0)
    others = stray.sum(axis=-1, keepdims=True) + np.minimum(heavy * z - weight, 1.0) - stray
    return np.asarray(np.minimum(stray, others))


def _quantised(x: Array, dtype: str, precision: Precision, exact_from: int | None) -> Array:
    """``(..., g, s, d)``: how far what is stored for each token may be from ``x``."""
    error = quantisation_error(x, precision, dtype)
    if exact_from is not None:
        error[..., max(exact_from, 0) :, :] = 0.0
    return error


def quantisation_error(x: Array, precision: Precision, dtype: str = "float32") -> Array:
    """``h``: how far each element that a quantised cache gives back may be from ``x`` ``(..., s, d)``; else zeros."""
    sizes, u = np.abs(x), STORAGE[dtype]
    if not precision.kv_bits:
        return np.asarray(sizes * 0.0)
    step = 1 / (2 ** (precision.kv_bits - 1) - 1)
    return np.asarray(sizes.max(axis=-1, keepdims=True) * ((1 + u) * step / 2 + 3 * ACCUMULATION) + u * sizes)


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


@dataclass(frozen=True)
class Disturbance:
    """How far a black box's weights are perturbed, relative to each: ``storage + accumulation * sqrt(n)`` for a weight
    that is one of ``n`` terms of a sum. ``gain``: how much larger that is than the rounding that it stands for."""

    storage: float
    accumulation: float
    gain: float


def disturbance(dtype: str) -> Disturbance:
    """A product computed in floating point is the exact product of perturbed factors (Higham, *Accuracy and Stability
    of Numerical Algorithms*, 2nd ed., section 3.1), by about ``sqrt(n) a`` each where roundings are independent (Higham
    and Mary 2019, doi:10.1137/18M1226312). So weights that are perturbed at random show what rounding does to what
    follows, whoever computes it. Enlarged as in ``Noisy``, so that it stands out of the rounding of the run itself."""
    gain = max(1.0, 2.0**-13 / STORAGE[dtype])
    return Disturbance(STORAGE[dtype] * gain, ACCUMULATION * gain, gain)


def own_bound(strays: Sequence[Array], runs: int, gain: float) -> Array:
    """As ``decoder_bound``, times ``sqrt(2)``: the own forward, to which a cached step is compared, is rounded as
    well as the step."""
    return np.asarray(np.sqrt(2) * decoder_bound(strays, runs, gain))


def stray(run: Array, value: Array) -> Array:
    """Mean square over the vocabulary of how far a noisy run ``(..., t, V)`` strays from the exact logits."""
    error = run - value
    return np.asarray(np.mean(np.square(error, out=error), axis=-1))


def decoder_bound(strays: Sequence[Array], runs: int, gain: float) -> Array:
    """``C sigma`` for each position, ``(..., t, 1)``, from the strays of noisy runs. With fewer of them than ``runs``
    it is a lower bound of what all would give: the others are taken not to have strayed."""
    return np.asarray(C / gain * np.sqrt(sum(strays) / runs))[..., None]
