"""Every clause by its name, of backends and of serving engines, and every chapter: what results may name."""

from __future__ import annotations

from kvconform_specs import clauses
from kvconform_specs.clause import Clause
from kvconform_specs.serving import clauses as serving
from kvconform_specs.serving.clauses import ServingClause

ENGINES = serving.BY_NAME
"""The clauses of serving engines."""
BY_NAME: dict[str, Clause | ServingClause] = {**clauses.BY_NAME, **ENGINES}
CHAPTERS = {**clauses.CHAPTERS, serving.CHAPTER: " ".join((serving.__doc__ or "").split())}
