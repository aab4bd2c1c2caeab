"""The spec, chapter by chapter; each clause carries its text, its reasons, its programs and its relation."""

from __future__ import annotations

from kvconform_specs.clause import Clause
from kvconform_specs.clauses import causality, definition, equivalence, lifecycle, shape

ALL: tuple[Clause, ...] = (
    *shape.CLAUSES, *causality.CLAUSES, *equivalence.CLAUSES, *definition.CLAUSES, *lifecycle.CLAUSES,
)  # fmt: skip
BY_NAME = {clause.name: clause for clause in ALL}
CHAPTERS = {
    module.__name__.rpartition(".")[2]: (module.__doc__ or "").strip()
    for module in (shape, causality, equivalence, definition, lifecycle)
}
