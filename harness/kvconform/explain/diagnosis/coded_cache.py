"""What the definition gives from a cache that codes keys and values, one scale for each token and head.

The bounds of coarse codes hold outputs that other mistakes give, too. A backend whose cache has such a code is much
nearer to these outputs than to the exact ones, whether a step sees its own tokens coded or not.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from kvconform.judging.observed import Array
from kvconform_specs.config import Config
from kvconform_specs.history import Row, context_of
from kvconform_specs.program import Program
from kvconform_specs.reference.definition import Arithmetic, attention, decoder
from kvconform_specs.reference.oracle import Expected
from kvconform_specs.reference.quantisation import FLOAT8
from kvconform_specs.tensors import Streams, weights


class Coded(Arithmetic):
    """Exact arithmetic on a cache of ``bits``-bit integers, or of 8-bit floats (``scheme``)."""

    def __init__(self, bits: int, scheme: str) -> None:
        self.bits, self.scheme = bits, scheme

    def cached(self, x: Array, part: str) -> Array:
        largest = np.abs(x).max(axis=-1, keepdims=True)
        largest = np.where(largest == 0, 1.0, largest)
        if self.scheme == "integer":
            step = largest / (2 ** (self.bits - 1) - 1)
            return np.asarray(np.rint(x / step) * step)
        significand, lowest, top = FLOAT8[self.scheme]
        scaled = x / largest * top
        _, exponent = np.frexp(scaled)
        unit = np.ldexp(1.0, np.maximum(exponent - 1, lowest) - significand + 1)
        return np.asarray(np.rint(scaled / unit) * unit * largest / top)


def share(program: Program, how: Coded, outputs: Iterable[tuple[Array, Expected]]) -> tuple[float, float]:
    """The sum of squares of what lies between these outputs ``(b, t, e)`` and those from such a cache, and between them
    and the exact ones."""
    streams = Streams(program.config, program.span, (0,))
    coded = exact = 0.0
    for got, want in outputs:
        exact += float(np.sum((got - want.value[0])[want.real] ** 2))
        for row, count, there, given in zip(want.rows, want.counts, want.real, got, strict=True):
            if count:
                coded += float(np.sum((given[there] - _given(program.config, streams, row, how)[-count:]) ** 2))
    return coded, exact


def _given(config: Config, streams: Streams, row: Row, how: Coded) -> Array:
    """``(s, e)``: the outputs of all tokens of a row."""
    contents = streams.row(row)
    if config.profile == "attention":
        query, keys, values = (part[0].astype(np.float64) for part in streams.split(contents))
        output = attention(query, how.cached(keys, "keys"), how.cached(values, "values"), config).output
        return np.asarray(output.swapaxes(0, 1).reshape(len(row), -1))
    exact = {name: value.astype(np.float64) for name, value in weights(config).items()}
    return decoder(np.asarray(contents[0], np.int64), exact, config, how=how, context=context_of(row))
