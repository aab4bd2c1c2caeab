"""One clause explained: what it says in words, and a small program that tries it."""

from __future__ import annotations

from typing import Any

import msgspec
from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from hypothesis import seed as hypothesis_seed

from kvconform.search.counterexample import Counterexample
from kvconform_specs import SUITE_VERSION
from kvconform_specs.ambiguities import AMBIGUITIES
from kvconform_specs.claims import Claims
from kvconform_specs.clause import Case, Clause, Relation
from kvconform_specs.configs import CONFIGS, LONG
from kvconform_specs.describe import described

ENOUGH: dict[str, dict[str, Any]] = {
    "overflow refused": {"overflow": "refused"},
    "poison-safe slots": {"unused_slots": "any"},
    "left padding": {"padding": ("right", "left"), "abilities": ("ragged",)},
    "pages": {"page": 4},
    "quantised cache": {"kv_bits": 8},
    "lossless cache": {"kv_bits": 0},
    "residual window": {"kv_bits": 8, "residual": 3},
    "bound on graphs": {"max_graphs": 8, "abilities": ("graph_count",)},
    "two rows": {"max_batch": None},
    "two sequences": {"max_sequences": None},
}
"""Claims from which each need of ``claims.DERIVED`` follows."""
DRAWS = 20
"""The example of a clause is the median, by size, of so many draws."""
SHOWN = 3
"""So many of its programs are shown."""


def explained(clause: Clause) -> str:
    """One clause in words, a program that tries it, and how to try it on a backend."""
    lines = [f"{clause.name} ({clause.level.value}{', core' if clause.core else ''})", clause.text, ""]
    lines += [f"holds if: {relation.value} ({named(relation)})" for relation in clause.relations]
    lines += [f"asked on: {scope(clause)}", f"needs: {needs(clause) or 'nothing'}"]
    lines += [f"settles {a.id}: {a.question} {a.settled}" for a in AMBIGUITIES if clause.name in a.by]
    lines += [f"stops: {link}" for link in clause.why]
    name, case = example(clause)
    compares = any(relation.compares_two for relation in clause.relations)
    for number, one in enumerate(case.programs[:SHOWN]):
        title = f"for example, on {name}:" if number == 0 else "compared with:" if compares else "and:"
        lines += ["", title, *(f"  {line}" for line in described(one))]
    more = len(case.programs) - SHOWN
    lines += ["", f"and with {more} more programs like the last one"] if more > 0 else []
    lines += ["", f"on a backend: kvconform run -b BACKEND --clause {clause.name} --config {name}"]
    return "\n  ".join(lines).replace("\n  \n", "\n\n").replace("`", "")


def example(clause: Clause) -> tuple[str, Case]:
    """The name of the first config that the clause concerns, and a case for a backend that claims what it needs."""
    name = next(name for name, config in CONFIGS.items() if clause.concerns(config))
    drawn: list[Case] = []

    @hypothesis_seed(0)
    @settings(
        max_examples=DRAWS,
        deadline=None,
        database=None,
        verbosity=Verbosity.quiet,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(clause.strategy(CONFIGS[name], least_claims(clause)))
    def draw(case: Case) -> None:
        drawn.append(case)

    draw()
    # programs that are all alike compare nothing, unless they always are
    telling = [case for case in drawn if len(set(case.programs)) == len(case.programs)] or drawn
    return name, sorted(telling, key=lambda case: case.size)[len(telling) // 2]


def least_claims(clause: Clause) -> Claims:
    """What the clause needs, all of ``needs_any`` included, and nothing else."""
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
        sentence="an example, never a failure",
        outcome="pass",
        before=[],
        case=example(clause)[1].to_json(),
        reduced=False,
    )
    return msgspec.json.format(msgspec.json.encode(found), indent=1)


def named(relation: Relation) -> str:
    return relation.name.lower().replace("_", " ")


def scope(clause: Clause) -> str:
    """Which configs the clause is asked on."""
    asked = [name for name, config in CONFIGS.items() if clause.concerns(config)]
    usual = [n for n, c in CONFIGS.items() if c.profile in clause.profiles and c.capacity < LONG]
    return f"every {' and '.join(clause.profiles)} config" if asked == usual else ", ".join(asked)


def needs(clause: Clause) -> str:
    any_of = f"one of {', '.join(f'`{need}`' for need in clause.needs_any)}" if clause.needs_any else ""
    return ", ".join(filter(None, (*(f"`{need}`" for need in clause.needs), any_of)))
