"""A clause: one normative sentence, the programs that test it, and the relations that must hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from hypothesis.strategies import SearchStrategy

from kvconform_specs.claims import Claims
from kvconform_specs.config import Config
from kvconform_specs.configs import LONG
from kvconform_specs.errors import SpecError
from kvconform_specs.program import Program
from kvconform_specs.situations import Situation


class Level(Enum):
    """``must``: a backend that violates it is not conformant. ``should``: a guarantee that is measured and reported."""

    MUST = "must"
    SHOULD = "should"


class Relation(Enum):
    """The closed list of what a clause can require of a case's traces. In addition every legal step must run, and every
    reject step must be refused."""

    PARITY = "each output is within its bound of the definition's value"
    AGREEMENT = "outputs that have the same history in both programs differ by no more than the sum of their bounds"
    INSENSITIVE = "outputs that have the same history and place in both programs are equal bit for bit"
    SENSITIVE = "outputs whose history differs change, wherever the definition's value changes by more than both bounds"
    SHAPE = "outputs have the shape and dtype that the config and the step require"
    LENGTHS = "after each step the backend reports the number of tokens that each row holds"
    FREE_SLOTS = (
        "after each step the backend reports how many more tokens each row takes: the capacity minus its length"
    )
    CONTENTS = "a read gives each row's keys and values as they were appended, within half a step of quantisation"
    QUANTISED = (
        "of each token beyond the residual window a read gives integers times one step for each head, the largest of "
        "which is the largest that the claimed bits hold"
    )
    STABLE_CONTENTS = "two reads give the same keys and values of a token, bit for bit"
    RETAINED_COUNT = (
        "a read gives each row's newest tokens: at least those that later queries may see, no more than are retained"
    )
    FINITE = "every output is a finite number"
    BITWISE = "outputs that have the same history in both programs are equal bit for bit, whatever their places"
    SAME_TOKEN = "the token with the largest logit is the definition's, wherever its lead exceeds the two bounds"
    GENERATED = (
        "no logit exceeds a generated token's by more than the two bounds, on the prompt and the tokens before it"
    )
    INPUTS = "after each step its inputs are bit for bit what they were, and so is the memory around them"
    OUTPUTS = "at the end of the program each output is bit for bit what it was when it was returned"
    GRAPH_COUNT = "the backend has compiled no more graphs than it claims"
    BYTES = (
        "the cache takes 2 l g s d b numbers of the storage dtype, s as claimed: length, capacity or whole pages; with "
        "a window no more than are retained, and of quantised numbers their bits and the scales"
    )
    POSITIONS = "a step multiplies weights for its new tokens only"
    LINEAR_COST = "the multiply-adds of equal steps grow linearly with the depth, by no more than attention's"

    @property
    def compares_two(self) -> bool:
        """Whether it compares the first program of a case with each of the others."""
        return self in (Relation.AGREEMENT, Relation.INSENSITIVE, Relation.SENSITIVE, Relation.BITWISE)

    @property
    def judges_outputs(self) -> bool:
        """Whether it is about the numbers, or tokens, that steps give; the others are about the cache, or shapes."""
        alone = (Relation.PARITY, Relation.FINITE, Relation.SAME_TOKEN, Relation.GENERATED)
        return self.compares_two or self in alone

    @property
    def judges_numbers(self) -> bool:
        """Whether it is about outputs, or about cached keys and values."""
        return self.judges_outputs or self in (Relation.CONTENTS, Relation.QUANTISED, Relation.STABLE_CONTENTS)

    @property
    def needs_reference(self) -> bool:
        """Whether no program passes it without the definition's numbers; agreement to the bit needs none."""
        return self in (Relation.PARITY, Relation.SENSITIVE, Relation.SAME_TOKEN)

    @property
    def picks_token(self) -> bool:
        """Whether it is about the token that is chosen from the logits."""
        return self in (Relation.SAME_TOKEN, Relation.GENERATED)


@dataclass(frozen=True, slots=True)
class Case:
    """The programs of one trial. The first is the base; some relations compare it with each of the others."""

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


def short(config: Config) -> bool:
    """Whether the config is not one for long contexts."""
    return config.capacity < LONG


def ordinary(config: Config) -> bool:
    """Whether the config is neither for long contexts nor for a scale of 0, with which no key matters."""
    return short(config) and config.score_scale != 0


def floats(config: Config) -> bool:
    """Whether, in an ordinary config, a token can hold NaN: an id cannot."""
    return ordinary(config) and config.profile != "decoder"


def long(config: Config) -> bool:
    return not short(config)


@dataclass(frozen=True)
class Clause:
    """One clause of the spec.

    name: stable, ``chapter.words``. text: the normative sentence. why: links to real bugs that it would have caught.
    needs: what a backend must claim (``claims.ABILITIES``, ``claims.DERIVED``); otherwise the clause is *unsupported*.
    needs_any: at least one of these must be claimed. applies: whether the clause concerns a config. core: without a
    PASS on it no profile of a backend is conformant. strategy: the programs, drawn for a config within a backend's
    claims. share: the number of structures that are drawn, as a fraction of the effort's. variants: the most seeds of
    each structure that are run; fewer where programs are long, or where few shapes matter. situations: what the
    programs of each cell must reach, as far as its config and claims allow; a cell that misses one is *not exercised*.
    """

    name: str
    text: str
    why: tuple[str, ...]
    strategy: Callable[[Config, Claims], SearchStrategy[Case]]
    relations: tuple[Relation, ...]
    level: Level = Level.MUST
    profiles: tuple[str, ...] = ("attention", "decoder")
    needs: tuple[str, ...] = ()
    needs_any: tuple[str, ...] = ()
    applies: Callable[[Config], bool] = ordinary
    core: bool = False
    share: float = 1.0
    variants: int = 20
    situations: tuple[Situation, ...] = ()

    @property
    def chapter(self) -> str:
        return self.name.partition(".")[0]

    @property
    def needs_numbers(self) -> bool:
        """Whether no program passes it without the definition's numbers."""
        return any(relation.needs_reference for relation in self.relations)

    def concerns(self, config: Config) -> bool:
        """Whether the clause is tested on a config."""
        if config.profile == "hidden":  # a decoder's programs will do, but no token is chosen from its outputs
            picks = any(relation.picks_token for relation in self.relations)
            return not {"decoder", "hidden"}.isdisjoint(self.profiles) and not picks and self.applies(config)
        return config.profile in self.profiles and self.applies(config)

    @property
    def blind(self) -> bool:
        """Whether it does not apply to a black box: it concerns the very forward that the black box is judged by."""
        return self.chapter == "definition"
