"""The weakest precision under whose bounds wrong outputs would be right: a backend that computes so, and claims more.

Nothing is run again: the outputs are there, and only values and bounds of the reference are computed again. A precision
is reported if it explains every output of the programs that are looked at.

Bounds that are measured (decoders, black boxes) are 32 standard deviations wide, so that errors of one dtype are within
the bounds of the next finer one. There the errors must also be as small on average as that precision's are, and a
decoder's dtype is the one with whose weights the reference is nearest to the outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from kvconform.explain.diagnosis.record import PrecisionMatch
from kvconform.explain.diagnosis.symptoms import Symptom
from kvconform.judging.observed import Array
from kvconform_specs.claims import Claims
from kvconform_specs.config import Config
from kvconform_specs.program import Append, Program
from kvconform_specs.reference.bounds import STORAGE, C
from kvconform_specs.reference.oracle import Expected, ReferenceForward, expect

PROGRAMS = 4
"""On how many wrong programs a precision is tried, the shortest first."""
MOST = 0.8
"""The least share of wrong outputs among those of cached steps."""
DTYPES = ("float32", "float16", "bfloat16")
LIKELY = float(np.sqrt(STORAGE["bfloat16"] / STORAGE["float16"]))
"""The largest root mean square of errors, in standard deviations of the precision that they may come from: half way to
those of the next dtype."""
KV_BITS = (0, 8, 4)
INTERMEDIATES = ("single", "storage")
"""The precisions that are distinguished, from the finest to the coarsest."""


def weakest(
    symptoms: Sequence[Symptom], config: Config, claims: Claims, own: ReferenceForward | None
) -> PrecisionMatch | None:
    """None where outputs are missing, where many outputs of cached steps are right, since rounding spares few, or where
    the outputs are farther off than any precision allows. Raises WorkerDied where a black box's own forward ends its
    process."""
    wrong = [one for one in symptoms if any(cell.wrong for cell in one.cells)]
    if any(cell.wrong and one.outputs[cell.step] is None for one in wrong for cell in one.cells):
        return None
    cached = [cell.wrong for one in symptoms for cell in one.cells if cell.facts["past"] > 0]
    if not cached or sum(cached) < MOST * len(cached):
        return None
    shortest = sorted(wrong, key=lambda one: one.probe.program.span)[:PROGRAMS]
    ladder = _ladder(config, claims, own)
    if own is None and config.profile == "decoder":
        dtype = min(_from(config.dtype), key=lambda dtype: _distance(shortest, dtype, claims))
        ladder = [rung for rung in ladder if rung.dtype == dtype]
    return next((rung for rung in ladder if _explains(rung, shortest, claims, own)), None)


def _ladder(config: Config, claims: Claims, own: ReferenceForward | None) -> list[PrecisionMatch]:
    """Precisions below the claimed one, the highest first: by the bits of a quantised cache, then by the coarsest
    rounding that there is, then by how much is rounded so. The bounds of a black box know dtypes only, those of
    decoders no bits and no intermediates."""
    attention = own is None and config.profile == "attention"
    claimed = PrecisionMatch(
        dtype=config.dtype,
        intermediates=claims.intermediates,
        kv_bits=claims.kv_bits,
        cache_dtype="" if claims.cache_dtype == config.dtype else claims.cache_dtype,
    )
    rungs = [
        PrecisionMatch(dtype=dtype, intermediates=intermediates, kv_bits=kv_bits, cache_dtype=cache)
        for kv_bits in (KV_BITS if attention and not claims.kv_bits else (claims.kv_bits,))
        for dtype in _from(config.dtype)
        for cache in ("", *([] if own is not None or kv_bits else _from(dtype)[1:]))
        for intermediates in (INTERMEDIATES if attention and dtype != "float32" else (claims.intermediates,))
    ]
    place = rungs.index(claimed) + 1 if claimed in (rungs := sorted(rungs, key=_coarseness)) else 0
    return rungs[place:]


def _from(dtype: str) -> tuple[str, ...]:
    """The dtype and those that round more, the finest first."""
    return DTYPES[DTYPES.index(dtype) :]


def _coarseness(rung: PrecisionMatch) -> tuple[float, ...]:
    cache = STORAGE[rung.cache_dtype or rung.dtype]
    return KV_BITS.index(rung.kv_bits), cache, STORAGE[rung.dtype], INTERMEDIATES.index(rung.intermediates)


def _distance(symptoms: Sequence[Symptom], dtype: str, claims: Claims) -> float:
    """The sum of squares of what lies between the outputs and the reference in this dtype."""
    pairs = _outputs(symptoms, PrecisionMatch(dtype=dtype, intermediates="single", kv_bits=0), claims, None)
    return sum(float(np.sum((got - want.value[0])[want.real] ** 2)) for got, want in pairs)


def _explains(rung: PrecisionMatch, symptoms: Sequence[Symptom], claims: Claims, own: ReferenceForward | None) -> bool:
    """Whether every output of these programs is within the bounds of this precision, and likely for it."""
    shares: list[Array] = []
    for got, want in _outputs(symptoms, rung, claims, own):
        error, bound = np.abs(got - want.value[0]), np.broadcast_to(want.bound[0], got.shape)
        error, bound = error[want.real], bound[want.real]
        if not bool(np.all(error <= bound)):
            return False
        shares.append(np.divide(error, bound, out=np.zeros(bound.shape), where=bound > 0).ravel())
    if symptoms[0].probe.program.config.profile == "attention":
        return True
    return C * float(np.sqrt(np.mean(np.concatenate(shares) ** 2))) <= LIKELY


def _outputs(
    symptoms: Sequence[Symptom], rung: PrecisionMatch, claims: Claims, own: ReferenceForward | None
) -> Iterator[tuple[Array, Expected]]:
    """Each output of these programs, with what the reference gives in this precision."""
    precision = replace(
        claims.precision, intermediates=rung.intermediates, kv_bits=rung.kv_bits, cache_dtype=rung.cache_dtype
    )
    for one in symptoms:
        program = Program(replace(one.probe.program.config, dtype=rung.dtype), one.probe.program.steps)
        for step, kept, want in zip(program.steps, one.outputs, expect(program, (0,), precision, own), strict=True):
            if kept is not None:
                assert want is not None
                last = claims.returns == "last" and isinstance(step, Append)
                yield kept[0], want.last() if last else want
