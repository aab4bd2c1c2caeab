"""The spec, one module for each chapter. A clause holds its text, its reasons, its programs and its relations."""

from __future__ import annotations

from dataclasses import replace

from kvconform_specs.clause import Clause
from kvconform_specs.clauses import (
    accounting,
    batch,
    capacity,
    capture,
    causality,
    contents,
    context,
    definition,
    determinism,
    equivalence,
    errors,
    layout,
    lifecycle,
    memory,
    numerics,
    paging,
    quantised,
    shape,
    window,
)
from kvconform_specs.static_shapes import with_static_shapes

_CHAPTERS = (
    shape,
    causality,
    equivalence,
    definition,
    contents,
    lifecycle,
    context,
    batch,
    window,
    capacity,
    errors,
    numerics,
    layout,
    memory,
    paging,
    quantised,
    capture,
    determinism,
    accounting,
)
ALL: tuple[Clause, ...] = tuple(
    replace(clause, strategy=with_static_shapes(clause.strategy)) for chapter in _CHAPTERS for clause in chapter.CLAUSES
)
BY_NAME = {clause.name: clause for clause in ALL}
CHAPTERS = {chapter.__name__.rpartition(".")[2]: " ".join((chapter.__doc__ or "").split()) for chapter in _CHAPTERS}
