"""Chooses the cases of a set: few, small ones, which together reach every situation of their clause, and then those
with the most kinds of steps that the others lack.

A cell has cases of two kinds: those drawn for an implementation that can do no more than the clause needs, and those
for one that can do everything that vectors test.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any

from kvconform.search.cell import Cell
from kvconform.search.situations import Situations
from kvconform.vectors.features import FEATURES
from kvconform_specs.claims import ABILITIES, ENOUGH, Claims
from kvconform_specs.clause import Case, Clause
from kvconform_specs.config import Config
from kvconform_specs.configs import share
from kvconform_specs.program import Append, Generate, Marks, UncachedForward, called
from kvconform_specs.strategies import drawn

CANDIDATES = 60
"""How many cases are drawn of a cell for each of its claims."""
BUDGET = 8_000
"""Bytes of a case. Cases that take less are no better than those that take as much."""
FEW = 10
"""How many cases that are small together a cell has at most, for each of its claims."""
WIDE = Claims(
    profiles=("attention", "decoder"),
    abilities=tuple(name for name in ABILITIES if name in FEATURES or name == "refusal"),
    overflow="refused",
    unused_slots="any",
    padding=("right", "left"),
)
"""What answers are judged under, less what a runner does not support."""


def claims_of(clause: Clause) -> Iterator[Claims]:
    """The claims that cases of a clause are drawn for: the least that it needs, then all."""
    for one in clause.needs_any or ("",):
        yield _least((*clause.needs, *filter(None, [one])))
    wide = {name: value for need in clause.needs for name, value in ENOUGH.get(need, {}).items() if name == "page"}
    yield Claims(**{f.name: getattr(WIDE, f.name) for f in fields(WIDE)} | wide)


def _least(needs: Sequence[str]) -> Claims:
    made: dict[str, Any] = {"profiles": WIDE.profiles}
    abilities = [need for need in needs if need in ABILITIES]
    for need in needs:
        enough = dict(ENOUGH.get(need, {}))
        abilities += enough.pop("abilities", ())
        made |= enough
    return Claims(**made, abilities=tuple(dict.fromkeys(abilities)))


def cases(cell: Cell, number: int, seed: int) -> list[Case]:
    """The cases of a cell: ``number`` for each of its claims, or as many as its situations need. For configs that have
    a smaller share of an effort it has fewer, and only those for the least claims."""
    part, every = share(cell.config_name), list(claims_of(cell.clause))
    wanted = max(1, round(number * part))
    found: dict[str, Case] = {}
    for claims in every if part == 1 else every[:-1]:
        for case in _chosen(cell, claims, wanted, seed):
            found.setdefault(str(case), case)
    return list(found.values())


def _chosen(cell: Cell, claims: Claims, number: int, seed: int) -> list[Case]:
    strategy = cell.clause.strategy(cell.config, claims)
    found = {str(case): case for case in drawn(strategy, CANDIDATES, seed)}
    situations = Situations(cell.clause, cell.config, claims)
    reached = {key: set(situations.reached(case, situations.all)) for key, case in found.items()}
    lacking = Situations(cell.clause, cell.config, claims)
    for words in set().union(*reached.values()):
        lacking.counts[words] += 1
    for case in lacking.further(strategy, seed + 1):
        found[str(case)] = case
        reached[str(case)] = set(situations.reached(case, situations.all))
    sizes = {key: size(case) for key, case in found.items()}
    shapes = {key: set(_shapes(case)) for key, case in found.items()}
    seen: set[Any] = set()
    chosen: list[str] = []
    missing = set(situations.all)
    while left := [key for key in found if key not in chosen]:
        new = {key: len(reached[key] & missing) for key in left}
        if any(new.values()):
            best = max(left, key=lambda key: (new[key] / max(sizes[key], BUDGET), sizes[key]))
        elif len(chosen) < number or (len(chosen) < FEW and sum(sizes[key] for key in chosen) < BUDGET):
            best = max(left, key=lambda key: (len(shapes[key] - seen) / max(sizes[key], BUDGET), sizes[key]))
        else:
            break
        missing -= reached[best]
        seen |= shapes[best]
        chosen.append(best)
    return [found[key] for key in chosen]


def _shapes(case: Case) -> Iterator[Any]:
    """What kinds of steps a case has, after which others, on how many tokens."""
    for program in case.programs:
        state, before = Marks(), ""
        for step in program.steps:
            call, kind = called(step), type(step).__name__
            if isinstance(call, Append):
                held = state.of(call.seq)
                past, most = max((n for n, _ in held), default=0), max((m for _, m in held), default=0)
                chunk, ragged = max(call.counts), len(set(call.counts)) > 1
                yield kind, before, min(past // 4, 5), min(chunk.bit_length(), 4), ragged, most > past, len(state.rows)
            else:
                yield kind, before, len(state.rows)
            before = kind
            state.apply(step)


def size(case: Case) -> int:
    """About how many bytes the tensors of a case take."""
    return 1 + sum(_outputs(program.steps) * _bytes(program.config) for program in case.programs)


def _outputs(steps: Sequence[Any]) -> int:
    """The tokens whose outputs are stored; those of a generation are not, as they depend on what it chose."""
    runs = [call for call in map(called, steps) if isinstance(call, Append | UncachedForward)]
    stored = [call for call in runs if not isinstance(call, Generate)]
    return sum(len(call.counts) * (1 if call.last_only else max(call.counts)) for call in stored)


def _bytes(config: Config) -> int:
    given = 4 * (config.heads + 2 * config.kv_heads) * config.head_dim if config.profile == "attention" else 8
    return given + 8 * config.outputs + 4 * (config.outputs if config.profile == "attention" else 1)
