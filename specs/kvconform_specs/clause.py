"""What a clause is: one normative sentence, the programs that try it, and the relation that must hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from hypothesis.strategies import SearchStrategy

from kvconform_specs.claims import Claims
from kvconform_specs.config import Config
from kvconform_specs.errors import SpecError
from kvconform_specs.program import Program


class Level(Enum):
    MUST = "must"
    SHOULD = "should"


class Relation(Enum):
    """The closed list of what can be asked of a case's traces. Every legal step must also run, every reject refuse."""

    PARITY = "each output is within its bound of the definition's value"
    AGREEMENT = "outputs that have the same history in both programs differ by no more than the sum of their bounds"
    UNAFFECTED = "outputs that have the same history in both programs are the same, bit for bit"
    AFFECTED = "outputs whose history was changed move, wherever the definition moves more than both bounds"
    SHAPES = "outputs have the shape and dtype that the config and the step demand"
    LENGTHS = "after each step the subject tells the number of tokens that each row holds"


@dataclass(frozen=True, slots=True)
class Case:
    """The programs of one trial. The first is the base; relations of two compare it with each of the others."""

    programs: tuple[Program, ...]

    @property
    def size(self) -> tuple[int, int]:
        """Steps and tokens in all: a counterexample is small by it."""
        steps, tokens = zip(*(program.size for program in self.programs), strict=True)
        return sum(steps), sum(tokens)

    def to_json(self) -> list[Any]:
        return [program.to_json() for program in self.programs]

    @classmethod
    def from_json(cls, data: object, at: str = "case") -> Case:
        if not isinstance(data, list) or not data:
            raise SpecError(at, "want a list of at least one program")
        return cls(tuple(Program.from_json(item, f"{at}[{i}]") for i, item in enumerate(data)))


def everywhere(config: Config) -> bool:
    return True


@dataclass(frozen=True)
class Clause:
    """One clause of the spec.

    name: stable, ``chapter.words``. text: the normative sentence. why: real bugs that it stops, as links.
    needs: abilities that a backend must claim, else the clause is *unsupported* there; needs_any: at least one of
    these. applies: whether it says anything about a config. core: without a PASS here no profile
    of a backend is conformant. family: the programs, drawn for a config within a backend's claims.
    """

    name: str
    text: str
    why: tuple[str, ...]
    family: Callable[[Config, Claims], SearchStrategy[Case]]
    relations: tuple[Relation, ...]
    level: Level = Level.MUST
    profiles: tuple[str, ...] = ("attention", "decoder")
    needs: tuple[str, ...] = ()
    needs_any: tuple[str, ...] = ()
    applies: Callable[[Config], bool] = everywhere
    core: bool = False

    @property
    def chapter(self) -> str:
        return self.name.partition(".")[0]

    @property
    def needs_numbers(self) -> bool:
        """Whether a pass always needs the definition's numbers; agreement to the bit does not."""
        return bool({Relation.PARITY, Relation.AFFECTED} & set(self.relations))

    def concerns(self, config: Config) -> bool:
        return config.profile in self.profiles and self.applies(config)
