"""The largest error ``h`` of each number of a quantised cache, derived from its quantiser.

``u`` is the unit roundoff of what is stored beside the codes (scales, minima, results), ``a`` that of float32. In a
group of numbers that share a scale, ``M`` is the largest magnitude and ``R`` the range, largest minus smallest number.

*Symmetric integers* of ``b`` bits: ``step = M / (2^(b - 1) - 1)``, and ``h = (1 + u) step / 2 + 3 a M + u |x|``:
rounding to an integer, with a step that may be stored; the step, the quotient and the product, in float32; the result,
stored.

*Integers with a zero point*: ``step = R / (2^b - 1)``. A code counts steps from the stored minimum ``m``: rounding to
an integer ``(1 + u) step / 2``; a stored step is off by ``u step`` for each of up to ``2^b - 1`` codes, ``u R``; the
stored minimum, ``u |m|``; difference, quotient, product and sum in float32, ``4 a (R + |m|)``; the result, ``u |x|``.
Where the zero point is an integer ``z`` instead, it is off by up to half a step, and codes at one end are clipped by as
much: another ``step / 2``. If a group lies on one side of zero, implementations extend it to zero, so that ``z`` is a
code: its range then is ``max(R, M)``.

*8-bit floats* with ``p`` bits of significand, smallest normal number ``2^e`` and largest number ``F``: the scale is ``M
/ F``, and rounding is off by ``|x| / (2^p + 1)``, or half a subnormal ``2^(e - p) M / F`` where that is more; then as
for symmetric integers, ``3 a M + u (M + |x|)``, the stored scale included.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvconform_specs.claims import Precision
from kvconform_specs.quantisers import Quantiser

Array = NDArray[np.floating]
STORAGE = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}
"""Unit roundoff ``u`` of each dtype: 2^-p for a significand of p bits."""
UNDERFLOW = {"float32": 2.0**-126, "bfloat16": 2.0**-126, "float16": 2.0**-25}
ACCUMULATION = 2.0**-24
"""Unit roundoff ``a``: dot products and softmax accumulate in float32 for every dtype."""
FLOAT8 = {"float8_e4m3": (4, -6, 448.0), "float8_e5m2": (3, -14, 57344.0)}
"""``p``, ``e`` and ``F`` of each 8-bit float."""


def quantisation_error(
    x: Array, precision: Precision, dtype: str = "float32", *, part: str = "values", exact_from: int | None = None
) -> Array:
    """``h`` of each element of the keys or values ``(..., s, d)`` of a whole row; zeros where they are exact.

    part: ``keys`` or ``values``. exact_from: the first position whose tokens are not quantised; None: all are.
    """
    cache = precision.cache_dtype or dtype
    if not precision.kv_bits and cache != dtype:  # rounded once
        return np.abs(x) * STORAGE[cache] + UNDERFLOW[cache]
    error = np.zeros(x.shape)
    quantiser = precision.quantiser
    stop = x.shape[-2] if exact_from is None else max(exact_from, 0)
    by_channel = getattr(quantiser, part) == "channel"
    if by_channel:
        stop -= stop % (quantiser.group or 1)
    if precision.kv_bits and stop:
        for cut in _groups(quantiser, by_channel, stop, x.shape[-1]):
            error[cut] = _of_group(x[cut], -2 if by_channel else -1, precision, STORAGE[dtype])
    return error


def grid_error(largest: int, dtype: str) -> float:
    """How far a dequantised number may be from an integer multiple of its group's step, in steps.

    The step is the largest magnitude that was read, over ``largest``. Both that and the number are an integer times a
    step, rounded twice at most (the product, and the result as it is stored), each by ``u``: the quotient of the two is
    off by a factor of ``(1 + u)^2 / (1 - u)^2``, and no integer exceeds ``largest``.
    """
    u = STORAGE[dtype]
    return largest * (((1 + u) / (1 - u)) ** 2 - 1)


def _groups(quantiser: Quantiser, by_channel: bool, tokens: int, d: int) -> Iterator[Any]:
    """The parts of ``(..., s, d)`` in which each row, or each column, has one scale."""
    length = tokens if by_channel else d
    size = quantiser.group or length
    for first in range(0, length, size):
        piece = slice(first, min(first + size, length))
        yield (..., piece, slice(None)) if by_channel else (..., slice(tokens), piece)


def _of_group(x: Array, axis: int, precision: Precision, u: float) -> Array:
    sizes, a, bits, quantiser = np.abs(x), ACCUMULATION, precision.kv_bits, precision.quantiser
    largest = sizes.max(axis=axis, keepdims=True)
    if quantiser.scheme in FLOAT8:
        p, e, top = FLOAT8[quantiser.scheme]
        rounding = np.maximum(sizes / (2.0**p + 1), 2.0 ** (e - p) / top * largest)
        return np.asarray((1 + u) * rounding + 3 * a * largest + u * (largest + sizes))
    if quantiser.zero_point == "none":
        step = largest / (2 ** (bits - 1) - 1)
        return np.asarray((1 + u) * step / 2 + 3 * a * largest + u * sizes)
    smallest = x.min(axis=axis, keepdims=True)
    span, halves = x.max(axis=axis, keepdims=True) - smallest, 1
    if quantiser.zero_point == "integer":
        span, halves = np.maximum(span, largest), 2
    step = span / (2**bits - 1)
    base = np.abs(smallest)
    return np.asarray(halves * (1 + u) * step / 2 + u * (span + base + sizes) + 4 * a * (span + base))
