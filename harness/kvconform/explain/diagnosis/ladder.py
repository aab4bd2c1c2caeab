"""The weakest precision under whose bounds wrong outputs would be right: a backend that computes so, and claims more.

Nothing is run again: the outputs are there, and only values and bounds of the reference are computed again. A precision
is reported if it explains every output of the programs that are looked at.

Bounds that are measured (decoders, black boxes) are 32 standard deviations wide, so that errors of one precision are
within the bounds of the next coarser ones. There the errors must also be as large on average as those of that
precision: of all that explain them the one is reported whose standard deviation is nearest to their root mean square. A
decoder's dtype is the one with whose weights the reference is nearest to the outputs. Coarse codes of a cache must
give nearly these outputs (``coded_cache``): their bounds hold too much else.

A black box's bounds are measured by perturbing all of its weights. If it is right on an empty cache, only its cache
can be imprecise; since the bounds then include much that is not rounded, its errors are smaller than the standard
deviation, and the finest such cache is reported.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from kvconform.explain.diagnosis.coded_cache import Coded, share
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
OF_FLOATS = float(np.sqrt(3 / (8 * np.log(2))))
"""The root mean square of rounding to a float, as a share of noise that is as large as rounding just above a power
of two: the root of the mean of ``1 / m^2`` over significands ``m`` from 1 to 2, distributed as ``1 / m``."""
TINY = 1e-30
NEARER = 0.9
"""Weights of another dtype are taken for the backend's if they make the sum of squares of the errors smaller than this
share: where a cache causes most of them, the rounding of weights changes it by less, in one direction or the other."""
CACHES = ((0, "integer"), (8, "integer"), (8, "float8_e4m3"), (8, "float8_e5m2"), (4, "integer"))
"""Bits and scheme of a quantised cache (0: it is none), from the finest to the coarsest."""
COARSE = CACHES[2:]
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
    empty = [cell.wrong for one in symptoms for cell in one.cells if cell.facts["past"] == 0]
    ladder = _ladder(config, claims, own, cache_only=bool(empty) and not any(empty))
    if own is None and config.profile == "decoder":
        distances = {dtype: _distance(shortest, dtype, claims) for dtype in _from(config.dtype)}
        dtype = next(dtype for dtype in distances if distances[dtype] * NEARER <= min(distances.values()))
        ladder = [rung for rung in ladder if rung.dtype == dtype]
    sizes = ((rung, _size(rung, shortest, claims, own)) for rung in ladder if own or _nearer(rung, shortest, claims))
    if config.profile == "attention":
        return next((rung for rung, size in sizes if size is not None), None)
    if own is not None:
        most = {rung: 1.0 if rung.cache_dtype or rung.kv_bits else LIKELY for rung in ladder}
        return next((rung for rung, size in sizes if size is not None and size <= most[rung]), None)
    known = [(size / _expected(rung), rung) for rung, size in sizes if size is not None]
    likely = [(share, rung) for share, rung in known if share <= LIKELY]  # smaller where only weights were rounded
    return min(likely, key=lambda pair: abs(np.log(max(pair[0], TINY))))[1] if likely else None


def _ladder(config: Config, claims: Claims, own: ReferenceForward | None, cache_only: bool) -> list[PrecisionMatch]:
    """Precisions below the claimed one, the highest first: by the bits of a quantised cache, then by the coarsest
    rounding that there is, then by how much is rounded so. Bounds of decoders and black boxes know no intermediates.
    cache_only: whether nothing is wrong on an empty cache, which tells what a black box rounds."""
    attention = config.profile == "attention"
    claimed = PrecisionMatch(
        dtype=config.dtype,
        intermediates=claims.intermediates,
        kv_bits=claims.kv_bits,
        cache_dtype="" if claims.cache_dtype == config.dtype else claims.cache_dtype,
        scheme=claims.quantiser.scheme,
    )
    quantised = CACHES if not claims.kv_bits else ((claims.kv_bits, claims.quantiser.scheme),)
    if own is not None and not cache_only:
        quantised = quantised[:1]
    rungs = [
        PrecisionMatch(dtype=dtype, intermediates=intermediates, kv_bits=kv_bits, cache_dtype=cache, scheme=scheme)
        for kv_bits, scheme in quantised
        for dtype in (_from(config.dtype) if own is None or not cache_only else (config.dtype,))
        for cache in ("", *([] if kv_bits or (own is not None and not cache_only) else _from(dtype)[1:]))
        for intermediates in (INTERMEDIATES if attention and dtype != "float32" else (claims.intermediates,))
    ]
    place = rungs.index(claimed) + 1 if claimed in (rungs := sorted(rungs, key=_coarseness)) else 0
    return rungs[place:]


def _expected(rung: PrecisionMatch) -> float:
    """The root mean square of errors in this precision, in standard deviations of the noise that its bounds show."""
    return 1.0 if rung.kv_bits and rung.scheme == "integer" else OF_FLOATS


def _from(dtype: str) -> tuple[str, ...]:
    """The dtype and those that round more, the finest first."""
    return DTYPES[DTYPES.index(dtype) :]


def _coarseness(rung: PrecisionMatch) -> tuple[float, ...]:
    quantised = CACHES.index((rung.kv_bits, rung.scheme)) if (rung.kv_bits, rung.scheme) in CACHES else 0
    cache = STORAGE[rung.cache_dtype or rung.dtype]
    return quantised, cache, STORAGE[rung.dtype], INTERMEDIATES.index(rung.intermediates)


def _distance(symptoms: Sequence[Symptom], dtype: str, claims: Claims) -> float:
    """The sum of squares of what lies between the outputs and the reference in this dtype."""
    pairs = _outputs(symptoms, PrecisionMatch(dtype=dtype, intermediates="single", kv_bits=0), claims, None)
    return sum(float(np.sum((got - want.value[0])[want.real] ** 2)) for got, want in pairs)


def _nearer(rung: PrecisionMatch, symptoms: Sequence[Symptom], claims: Claims) -> bool:
    """Whether the outputs are nearer to those of a cache with this code than to the exact ones; true of fine codes."""
    if (rung.kv_bits, rung.scheme) not in COARSE or claims.kv_bits:
        return True
    plain = PrecisionMatch(dtype=rung.dtype, intermediates="single", kv_bits=0)
    how, coded, exact = Coded(rung.kv_bits, rung.scheme), 0.0, 0.0
    for one in symptoms:
        program = Program(replace(one.probe.program.config, dtype=rung.dtype), one.probe.program.steps)
        if any(isinstance(step, Append) and (step.masked or step.needle) for step in program.steps):
            continue
        found = share(program, how, _outputs([one], plain, claims, None))
        coded, exact = coded + found[0], exact + found[1]
    return exact > 0 and coded <= NEARER * exact


def _size(
    rung: PrecisionMatch, symptoms: Sequence[Symptom], claims: Claims, own: ReferenceForward | None
) -> float | None:
    """The root mean square of the errors of these programs, in standard deviations of this precision where its bounds
    are measured; None where one exceeds its bound."""
    shares: list[Array] = []
    for got, want in _outputs(symptoms, rung, claims, own):
        error, bound = np.abs(got - want.value[0]), np.broadcast_to(want.bound[0], got.shape)
        error, bound = error[want.real], bound[want.real]
        if not bool(np.all(error <= bound)):
            return None
        shares.append(np.divide(error, bound, out=np.zeros(bound.shape), where=bound > 0).ravel())
    return C * float(np.sqrt(np.mean(np.concatenate(shares) ** 2)))


def _outputs(
    symptoms: Sequence[Symptom], rung: PrecisionMatch, claims: Claims, own: ReferenceForward | None
) -> Iterator[tuple[Array, Expected]]:
    """Each output of these programs, with what the reference gives in this precision."""
    precision = replace(
        claims.precision,
        intermediates=rung.intermediates,
        kv_bits=rung.kv_bits,
        cache_dtype=rung.cache_dtype,
        quantiser=replace(claims.quantiser, scheme=rung.scheme),
    )
    for one in symptoms:
        program = Program(replace(one.probe.program.config, dtype=rung.dtype), one.probe.program.steps)
        for step, kept, want in zip(program.steps, one.outputs, expect(program, (0,), precision, own), strict=True):
            if kept is not None:
                assert want is not None
                last = claims.returns == "last" and isinstance(step, Append)
                yield kept[0], want.last() if last else want
