"""One clause explained: what it says in words, and a small program that tries it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import msgspec
from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from hypothesis import seed as hypothesis_seed

from kvconform.judging.verdict import Outcome
from kvconform.search.counterexample import Counterexample
from kvconform_specs import SUITE_VERSION
from kvconform_specs.ambiguities import AMBIGUITIES
from kvconform_specs.claims import Claims
from kvconform_specs.clause import Case, Clause, Relation
from kvconform_specs.configs import CONFIGS, LONG
from kvconform_specs.history import Histories
from kvconform_specs.program import (
    DISTRIBUTION_BIT,
    NAMES,
    AliasHandle,
    Append,
    Fork,
    Generate,
    Poison,
    Program,
    Reject,
    Reorder,
    Step,
    Truncate,
    UncachedForward,
    called,
)
from kvconform_specs.tensors import distribution

Key = TypeVar("Key")
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
COMPARING = {Relation.AGREEMENT, Relation.INSENSITIVE, Relation.SENSITIVE, Relation.BITWISE}
"""The relations that compare the first program of a case with each of the others."""
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
    compares = COMPARING & set(clause.relations)
    for number, one in enumerate(case.programs[:SHOWN]):
        title = f"for example, on {name}:" if number == 0 else "compared with:" if compares else "and:"
        lines += ["", title, *(f"  {line}" for line in in_words(one))]
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
        outcome=Outcome.PASS,
        before=[],
        case=example(clause)[1].to_json(),
        reduced=False,
    )
    return msgspec.json.format(msgspec.json.encode(found), indent=1)


def in_words(one: Program) -> list[str]:
    """Each step on a line, with what its sequence holds before it."""
    histories, lines = Histories(), []
    for step in one.steps:
        lines.append(_said(step, [len(row) for row in histories.rows.get(called(step).seq, ())]))
        histories.apply(step)
    return lines


def _said(step: Step, held: list[int]) -> str:
    match step:
        case Reject():
            wrong = f", with a wrong {step.wrong}" if step.wrong else ""
            return f"must be refused{wrong}: {_said(step.step, held)}"
        case Append():
            holds = f"hold{'' if len(held) > 1 else 's'} {_alike(held)}" if any(held) else "is empty"
            return f"append {_tokens(step, 'to')}, which {holds}{_options(step)}"
        case Generate():
            more = f"{step.new} token{'s' if step.new > 1 else ''}"
            return f"generate {more} greedily after {_tokens(step, 'of')}{_options(step)}"
        case UncachedForward():
            return f"compute {_tokens(step, 'of')} without a cache{_options(step)}"
        case Truncate():
            return f"truncate {step.seq}, which holds {_alike(held)}, to {step.length}"
        case Fork():
            return f"fork {step.seq} to {step.into}"
        case AliasHandle():
            return f"keep the handle of {step.seq} as {step.into}"
        case Reorder():
            return f"reorder {step.seq}: its rows become the old rows {_all(step.rows)}"
        case Poison():
            return f"fill the slots that hold no token: keys with {step.keys}, values with {step.values}"
    return f"{NAMES[type(step)]} {step.seq}"


def _tokens(step: Append | UncachedForward, word: str) -> str:
    """``4 tokens of stream 17 to a``, ``1 token of streams 17, 18 to each row of a``."""
    alike = len(set(step.counts)) == 1
    rows = "" if len(step.counts) == 1 else "each row of " if alike else "the rows of "
    streams = [_stream(step.seed + row) for row in range(len(step.counts))]
    plural = "" if set(step.counts) == {1} else "s"
    content = f"(stream{'s' if rows else ''} {', '.join(streams)})"
    return f"{_alike(step.counts)} token{plural} {content} {word} {rows}{step.seq}"


def _options(step: Append | UncachedForward) -> str:
    said = []
    for (row, seed), places in _groups(((row, seed), position) for row, position, seed in step.substitutions):
        said.append(f"; {_positions(places)} of row {row} from stream {_stream(seed)}")
    if isinstance(step, Append):
        if step.needle:
            said.append(f"; queries point at the key at position {step.needle[1]} of stream {_stream(step.needle[0])}")
        for row, places in _groups(step.masked):
            said.append(f"; the mask hides {_positions(places)} of row {row}")
        if step.pad:
            said.append(f"; columns without a token on the {step.pad[0]}, filled from stream {_stream(step.pad[1])}")
        said += [f"; inputs {step.layout}"] if step.layout != "contiguous" else []
        said += ["; into the memory of the past"] if step.in_place else []
        said += ["; its work is counted"] if step.count_macs else []
    said += ["; the last position alone"] if step.last_only else []
    return "".join(said)


def _groups(pairs: Iterable[tuple[Key, int]]) -> Iterable[tuple[Key, list[int]]]:
    """Each key with its numbers."""
    found: dict[Key, list[int]] = {}
    for key, number in pairs:
        found.setdefault(key, []).append(number)
    return found.items()


def _positions(places: list[int]) -> str:
    row = len(places) > 2 and places == list(range(places[0], places[-1] + 1))
    return f"position{'s' if len(places) > 1 else ''} {f'{places[0]} to {places[-1]}' if row else _all(places)}"


def _stream(seed: int) -> str:
    plain = str(seed & ((1 << DISTRIBUTION_BIT) - 1))
    return plain if distribution(seed) == "normal" else f"{plain} ({distribution(seed)})"


def _alike(numbers: Iterable[int]) -> str:
    """One number where all are the same, else all of them."""
    numbers = tuple(numbers)
    return str(numbers[0]) if len(set(numbers)) == 1 else _all(numbers)


def _all(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))


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
