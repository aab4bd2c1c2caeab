"""One clause explained: its text, its relations and a small program that tests it."""

from __future__ import annotations

from typing import Any

import msgspec

from kvconform.judging.verdict import Outcome
from kvconform.mutation.fault import load_faults
from kvconform.search.counterexample import Counterexample
from kvconform_specs import SUITE_VERSION
from kvconform_specs.ambiguities import AMBIGUITIES
from kvconform_specs.claims import ENOUGH, Claims
from kvconform_specs.clause import Case, Clause, Relation, ordinary
from kvconform_specs.configs import CONFIGS
from kvconform_specs.describe import described
from kvconform_specs.errors import SpecError
from kvconform_specs.strategies import drawn

CATALOGUE = "kvconform_backends.faults:FAULTS"
"""The planted faults of the ``kvconform-backends`` package, loaded by address: the harness imports no backend."""
DRAWS = 20
"""Number of draws; the example of a clause is their median by size."""
SHOWN = 3
"""The most programs of an example that are printed."""


def explained(clause: Clause) -> str:
    """The text of ``kvconform spec CLAUSE``."""
    lines = [f"{clause.name} ({clause.level.value}{', core' if clause.core else ''})", clause.text, ""]
    lines += [f"holds if: {relation.value} ({named(relation)})" for relation in clause.relations]
    lines += [f"tested on: {scope(clause)}", f"needs: {needs(clause) or 'nothing'}"]
    lines += [f"settles {a.id}: {a.question} {a.settled}" for a in AMBIGUITIES if clause.name in a.by]
    lines += [f"real bug: {link}" for link in clause.why]
    if names := faults(clause):
        lines.append(f"planted faults that name it: {', '.join(names)}")
    name, case = example(clause)
    compares = any(relation.compares_two for relation in clause.relations)
    for number, one in enumerate(case.programs[:SHOWN]):
        title = f"for example, on {name}:" if number == 0 else "compared with:" if compares else "and:"
        lines += ["", title, *(f"  {line}" for line in described(one))]
    more = len(case.programs) - SHOWN
    lines += ["", f"and with {more} more programs like the last one"] if more > 0 else []
    lines += ["", f"on a backend: kvconform run -b BACKEND --clause {clause.name} --config {name}"]
    return "\n  ".join(lines).replace("\n  \n", "\n\n").replace("`", "")


def faults(clause: Clause) -> list[str]:
    """The names of the planted faults that the clause must detect; none if no catalogue is installed."""
    try:
        return [fault.name for fault in load_faults(CATALOGUE) if clause.name in fault.clauses]
    except SpecError:
        return []


def example(clause: Clause) -> tuple[str, Case]:
    """The name of the first config that the clause concerns, and a case for a backend that claims what it needs."""
    name = next(name for name, config in CONFIGS.items() if clause.concerns(config))
    cases = drawn(clause.strategy(CONFIGS[name], least_claims(clause)), DRAWS)
    # equal programs compare nothing, unless the clause draws no others
    differing = [case for case in cases if len(set(case.programs)) == len(case.programs)] or cases
    return name, sorted(differing, key=lambda case: case.size)[len(differing) // 2]


def least_claims(clause: Clause) -> Claims:
    """The claims that the clause needs, all of ``needs_any`` included, and nothing else."""
    claimed: dict[str, Any] = {"profiles": clause.profiles}
    abilities: list[str] = []
    for need in (*clause.needs, *clause.needs_any):
        enough = ENOUGH.get(need, {"abilities": (need,)})
        abilities += enough.get("abilities", ())
        claimed |= enough
    return Claims(**claimed | {"abilities": tuple(dict.fromkeys(abilities))})


def as_file(clause: Clause) -> bytes:
    """The example in the form that ``kvconform replay`` runs."""
    found = Counterexample(
        suite=SUITE_VERSION,
        clause=clause.name,
        backend="numpy",
        device="cpu",
        sentence="an example, not a failure",
        outcome=Outcome.PASS,
        before=[],
        case=example(clause)[1].to_json(),
        reduced=False,
    )
    return msgspec.json.format(msgspec.json.encode(found), indent=1)


def named(relation: Relation) -> str:
    return relation.name.lower().replace("_", " ")


def scope(clause: Clause) -> str:
    """The configs that the clause is tested on."""
    asked = [name for name, config in CONFIGS.items() if clause.concerns(config)]
    usual = [n for n, c in CONFIGS.items() if c.profile in clause.profiles and ordinary(c)]
    if not set(usual) <= set(asked):
        return ", ".join(asked)
    return ", ".join([f"every {' and '.join(clause.profiles)} config", *(name for name in asked if name not in usual)])


def needs(clause: Clause) -> str:
    any_of = f"one of {', '.join(f'`{need}`' for need in clause.needs_any)}" if clause.needs_any else ""
    return ", ".join(filter(None, (*(f"`{need}`" for need in clause.needs), any_of)))
