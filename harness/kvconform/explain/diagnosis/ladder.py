"""The weakest precision under whose bounds wrong outputs would be right: a backend that computes so, and claims more.

Nothing is run again: the outputs are there, and only values and bounds of the reference are computed again. A precision
is reported if it explains every output of the programs that are looked at.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from kvconform.explain.diagnosis.record import PrecisionMatch
from kvconform.explain.diagnosis.symptoms import Symptom
from kvconform_specs.claims import Claims
from kvconform_specs.config import Config
from kvconform_specs.program import Append, Program
from kvconform_specs.reference.bounds import STORAGE
from kvconform_specs.reference.oracle import ReferenceForward, expect

PROGRAMS = 4
"""On how many wrong programs a precision is tried, the shortest first."""
MOST = 0.8
"""The least share of wrong outputs among those of cached steps."""
DTYPES = ("float32", "float16", "bfloat16")
KV_BITS = (0, 8, 4)


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
    tried = _ladder(config, claims, own)
    return next((rung for rung in tried if all(_within(one, rung, claims, own) for one in shortest)), None)


def _ladder(config: Config, claims: Claims, own: ReferenceForward | None) -> Iterator[PrecisionMatch]:
    """Precisions below the claimed one, the highest first. The bounds of a black box, and of decoders, know no bits."""
    lower = [dtype for dtype in DTYPES if STORAGE[dtype] >= STORAGE[config.dtype]]
    bits = KV_BITS if own is None and config.profile == "attention" and not claims.kv_bits else (claims.kv_bits,)
    for kv_bits in bits:
        for dtype in lower:
            for intermediates in ("single", "storage"):
                rung = PrecisionMatch(dtype=dtype, intermediates=intermediates, kv_bits=kv_bits)
                if rung != PrecisionMatch(
                    dtype=config.dtype, intermediates=claims.intermediates, kv_bits=claims.kv_bits
                ):
                    yield rung


def _within(one: Symptom, rung: PrecisionMatch, claims: Claims, own: ReferenceForward | None) -> bool:
    """Whether every output of the program is within the bounds of this precision."""
    program = Program(replace(one.probe.program.config, dtype=rung.dtype), one.probe.program.steps)
    precision = replace(claims.precision, intermediates=rung.intermediates, kv_bits=rung.kv_bits)
    for step, kept, want in zip(program.steps, one.outputs, expect(program, (0,), precision, own), strict=True):
        if kept is None:
            continue
        assert want is not None
        want = want.last() if claims.returns == "last" and isinstance(step, Append) else want
        with np.errstate(invalid="ignore"):
            within = np.abs(kept[0] - want.value[0]) <= want.bound[0]
        if not bool(np.all(within | ~want.real[..., None])):
            return False
    return True
