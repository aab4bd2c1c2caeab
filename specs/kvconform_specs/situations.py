"""What a clause is about, as situations that its programs must reach: a cell that missed one has not been exercised.

A situation looks at the steps of a case's programs. ``possible`` says for which configs and claims it can be reached at
all: nothing is demanded of a cell that cannot reach it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kvconform_specs.claims import Claims, changes_at
from kvconform_specs.config import Config
from kvconform_specs.program import (
    Append,
    Fork,
    Lengths,
    Poison,
    Program,
    ReadCache,
    Reject,
    Reorder,
    Reset,
    Step,
    Truncate,
    called,
)


@dataclass(frozen=True, slots=True)
class Visit:
    """One step of a program, with the lengths of its sequence's rows before it and after it. ``earlier``: the steps
    before it."""

    step: Step
    before: tuple[int, ...]
    after: tuple[int, ...]
    earlier: tuple[Step, ...]
    config: Config
    claims: Claims

    @property
    def longest(self) -> int:
        """Tokens of the longest row after the step."""
        return max(self.after, default=0)

    @property
    def past(self) -> int:
        """Tokens of the longest row before the step."""
        return max(self.before, default=0)

    @property
    def new(self) -> int:
        """The largest count of an append, whether legal or refused; 0 for other steps."""
        call = called(self.step)
        return max(call.counts) if isinstance(call, Append) else 0

    @property
    def appends(self) -> bool:
        return isinstance(self.step, Append)


Walk = tuple[Visit, ...]
"""All steps of one program."""
Reached = Callable[[Sequence[Walk]], bool]
"""Whether the programs of a case reach a situation."""
Possible = Callable[[Config, Claims], bool]


def always(config: Config, claims: Claims) -> bool:
    return True


@dataclass(frozen=True)
class Situation:
    """``words`` complete the sentence "no program has …"."""

    words: str
    reached: Reached
    possible: Possible = always


def walk(program: Program, claims: Claims) -> Walk:
    lengths, visits = Lengths(), []
    for number, step in enumerate(program.steps):
        seq = called(step).seq
        before = lengths.of(seq)
        lengths.apply(step)
        visits.append(Visit(step, before, lengths.of(seq), program.steps[:number], program.config, claims))
    return tuple(visits)


# --- ways of writing a situation ---
def step(words: str, that: Callable[[Visit], bool], possible: Possible = always) -> Situation:
    """Some step of some program."""
    return Situation(words, lambda walks: any(that(visit) for one in walks for visit in one), possible)


def append(words: str, that: Callable[[Visit], bool], possible: Possible = always) -> Situation:
    """Some append that is legal."""
    return step(words, lambda visit: visit.appends and that(visit), possible)


def having(words: str, kind: type[Any], that: Callable[[Any], bool] = lambda made: True, *needs: str) -> Situation:
    """A step of a kind, where its ability is claimed."""
    return step(words, lambda visit: isinstance(visit.step, kind) and that(visit.step), claimed(*needs))


def refused(words: str, that: Callable[[Visit], bool], possible: Possible) -> Situation:
    """Some call that must be refused."""
    return step(words, lambda visit: isinstance(visit.step, Reject) and that(visit), possible)


def claimed(*needs: str) -> Possible:
    return lambda config, claims: all(map(claims.can, needs))


def both(*conditions: Possible) -> Possible:
    return lambda config, claims: all(one(config, claims) for one in conditions)


def holds(tokens: int) -> Possible:
    """Whether a row can hold as many tokens."""
    return lambda config, claims: config.capacity >= tokens


def chunks(tokens: int = 2, past: int = 0) -> Possible:
    """Whether an append can have as many tokens behind as many others."""
    return lambda config, claims: claims.longest(config.capacity - past) >= tokens


def windowed(config: Config, claims: Claims) -> bool:
    """Whether a sequence can be longer than the window."""
    return config.window is not None and config.window < config.capacity


# --- situations of several clauses ---
DECODE = append("a decode step on a cache", lambda v: v.new == 1 and v.past > 0, holds(2))
PROMPT = append("a prompt of several tokens", lambda v: v.new > 1 and v.past == 0, chunks())
CHUNK = append("a chunk of several tokens on a cache", lambda v: v.new > 1 and v.past > 0, chunks(past=1))
ROWS = append("several rows", lambda v: len(v.after) > 1, claimed("two rows"))
PAST_WINDOW = append("more tokens than the window", lambda v: v.longest > (v.config.window or 0), windowed)
SWITCH = append(
    "a step on a cache across a length at which outputs change",
    lambda v: any(0 < v.past < at <= v.longest for at in changes_at(v.config, v.claims)),
    lambda config, claims: bool(changes_at(config, claims)),
)
FULL = append("a sequence that reaches the capacity", lambda v: v.longest == v.config.capacity)
RAGGED = append(
    "rows of different lengths", lambda v: len(set(v.after)) > 1, both(claimed("ragged", "two rows"), holds(2))
)
READ = having("a read of the cache", ReadCache, lambda made: True, "contents")
TRUNCATION = step(
    "a truncation that removes tokens",
    lambda v: isinstance(v.step, Truncate) and v.longest < v.past,
    claimed("truncate"),
)
FORK = step("a fork", lambda v: isinstance(v.step, Fork), both(claimed("fork", "two sequences"), holds(2)))
REORDER = step("a reorder", lambda v: isinstance(v.step, Reorder), both(claimed("reorder"), holds(2)))
RESET = having("a reset", Reset, lambda made: True, "reset")
BASIC = (DECODE, CHUNK)
EDITS = (TRUNCATION, FORK, REORDER, RESET)
"""What a history does besides appending, as far as it is claimed."""


def in_turn(walks: Sequence[Walk]) -> bool:
    """Appends to two open sequences alternate."""
    for one in walks:
        names = [visit.step.seq for visit in one if isinstance(visit.step, Append)]
        if any(a == c != b for a, b, c in zip(names, names[1:], names[2:], strict=False)):
            return True
    return False


IN_TURN = Situation("two open sequences that grow in turn", in_turn, both(claimed("two sequences"), holds(2)))


def length(tokens: int) -> Situation:
    return append(f"a sequence of {tokens} tokens", lambda v: v.longest == tokens, holds(tokens))


def lengths_differ(of: Callable[[Visit], int], words: str, possible: Possible) -> Situation:
    """Appends of one case that differ in a number."""

    def reached(walks: Sequence[Walk]) -> bool:
        return len({of(visit) for one in walks for visit in one if visit.appends}) > 1

    return Situation(words, reached, possible)


def after_a(kind: type[Any], words: str, that: Callable[[Visit], bool], possible: Possible) -> Situation:
    """An append behind a step of that kind on the same sequence."""

    def found(visit: Visit) -> bool:
        seq = called(visit.step).seq
        return that(visit) and any(isinstance(made, kind) and _about(made, seq) for made in visit.earlier)

    return append(words, found, possible)


def _about(made: Step, seq: str) -> bool:
    return called(made).seq == seq or getattr(made, "into", None) == seq


def three_rows(config: Config, claims: Claims) -> bool:
    return (claims.max_batch or 3) >= 3


def distributed(name: str) -> Situation:
    """Appends of a distribution of ``program.DISTRIBUTIONS``."""
    words = f"tokens of the distribution {name}"
    return append(words, lambda visit: isinstance(visit.step, Append) and visit.step.distribution == name)


def laid_out(layout: str) -> Situation:
    """Inputs in a layout of ``program.LAYOUTS``."""
    return append(f"{layout} inputs", lambda visit: isinstance(visit.step, Append) and visit.step.layout == layout)


def truncated(words: str, kept: Callable[[int, int], bool], possible: Possible = always) -> Situation:
    """``kept(tokens kept, tokens before)`` of some truncation."""
    return step(
        f"a truncation {words}", lambda v: isinstance(v.step, Truncate) and kept(max(v.after), v.past), possible
    )


def poisoned(part: str) -> Situation:
    """An append behind a poisoning of slots: of the ``keys`` or of the ``values``."""

    def found(visit: Visit) -> bool:
        return any(isinstance(made, Poison) and getattr(made, part) != "none" for made in visit.earlier)

    return append(f"poisoned {part} before an append", found, holds(2))


# --- situations of a token that changes ---
def _changed(walks: Sequence[Walk], that: Callable[[Visit, int], bool]) -> bool:
    """Whether some append of the changed programs has a changed token for which that is true."""
    return any(
        that(visit, position)
        for one in walks[1:]
        for visit in one
        if isinstance(visit.step, Append)
        for row, position, _seed in visit.step.substitutions
    )


def _start(visit: Visit) -> int:
    return visit.longest - visit.new


EARLIER_IN_CHUNK = Situation(
    "a changed token behind another one of its chunk",
    lambda walks: _changed(walks, lambda visit, position: position > _start(visit)),
    chunks(),
)
EARLIER_STEP = Situation(
    "a changed token of a later step than the first",
    lambda walks: _changed(walks, lambda visit, position: _start(visit) > 0),
    holds(2),
)


def _changed_and_cached(walks: Sequence[Walk]) -> bool:
    for one in walks[1:]:
        ends = [visit.longest for visit in one if visit.appends]
        places = [
            place for visit in one if isinstance(visit.step, Append) for _row, place, _seed in visit.step.substitutions
        ]
        if any(place < end for place in places for end in ends[:-1]):
            return True
    return False


CHANGED_IN_CACHE = Situation("a changed token that is cached before the last step", _changed_and_cached, holds(2))
SIZES = (
    lengths_differ(lambda visit: len(visit.after), "appends of different batches", claimed("two rows")),
    lengths_differ(lambda visit: visit.new, "appends of different counts", chunks()),
    lengths_differ(lambda visit: visit.past, "appends on caches of different lengths", holds(2)),
)
