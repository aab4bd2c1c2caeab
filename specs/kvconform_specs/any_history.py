"""Any legal program within a backend's claims: raw numbers are drawn, of which a model of the lengths makes steps."""

from __future__ import annotations

from collections.abc import Iterable

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from kvconform_specs.claims import Claims, edges
from kvconform_specs.clause import Case
from kvconform_specs.clip import clipped
from kvconform_specs.config import Config
from kvconform_specs.program import (
    MALFORMED,
    AliasHandle,
    Append,
    Close,
    Fork,
    Marks,
    Program,
    Reject,
    Reorder,
    Reset,
    Step,
    Truncate,
)
from kvconform_specs.strategies import LARGEST_BATCH, LONGEST_CHUNK, Draw, appends, at_once, batches, seeds

VERBS = (
    "nothing",
    *("append",) * 7,
    "truncate",
    "truncate",
    "truncate twice",
    "fork",
    "reorder",
    "reorder",
    "reset",
    "close",
    "immutable",
    "refuse",
    "empty append",
)
"""The verbs of raw triples, with their frequencies; ``nothing`` is first, so that lists shrink."""
ABILITY = {"truncate twice": "truncate", "empty append": "empty_append"}
"""What a verb needs, where that has another name."""


@st.composite
def histories(draw: Draw, config: Config, claims: Claims) -> Program:
    """Any legal program over up to three open sequences, within the backend's claims.

    A list of raw triples is drawn, which a model of the lengths turns into legal steps; a triple for which no step is
    legal is dropped.
    """
    triples = st.tuples(st.integers(0, len(VERBS) - 1), st.integers(0, 5), st.integers(0, 63))
    drawn = draw(st.lists(triples, min_size=8, max_size=20))
    interpreter = _Interpreter(config, claims, draw(seeds))
    prompt = draw(st.integers(0, 2))  # one in three begins with a long one
    begun = interpreter.prompt(-(-config.capacity // 2), draw(batches(claims))) if prompt == 2 else ()
    return clipped(config, (*begun, *interpreter.steps(drawn)))


def any_history(config: Config, claims: Claims) -> SearchStrategy[Case]:
    return histories(config, claims).map(lambda program: Case((program,)))


class _Interpreter:
    """Turns raw triples ``(kind, sequence, number)`` into legal steps."""

    def __init__(self, config: Config, claims: Claims, seed: int) -> None:
        self.config, self.claims, self.seed = config, claims, seed
        self.state = Marks()

    def prompt(self, size: int, batch: int) -> tuple[Step, ...]:
        return self.applied(appends("a", at_once(size, self.claims), batch, self.seed))

    def steps(self, drawn: Iterable[tuple[int, int, int]]) -> Iterable[Step]:
        made: list[Step] = []
        for kind, which, number in drawn:
            made += self.applied(self.step(kind, "aaaabc"[which], number))
        return made or ([] if self.state.rows else [self.append("a", 0)])

    def applied(self, steps: tuple[Step, ...]) -> tuple[Step, ...]:
        for step in steps:
            self.state.apply(step)
        return steps

    def step(self, kind: int, seq: str, number: int) -> tuple[Step, ...]:
        """The steps of a triple; an append if its verb is not claimed; none if no step is legal."""
        verb, names = VERBS[kind], self.state.rows
        if verb == "nothing":
            return ()
        if seq not in names and len(names) >= (self.claims.max_sequences or 3):
            seq = next(iter(names))
        rows = self.state.lengths(seq)
        if verb == "refuse" and rows:
            refused = refusals(self.config, self.claims, seq, rows, self.seed, self.state.marks(seq))
            return (refused[number % len(refused)],) if refused else ()
        if not rows or verb == "append" or (verb != "close" and not self.claims.can(ABILITY.get(verb, verb))):
            return (self.append(seq, number),) if not rows or max(rows) < self.config.capacity else ()
        if verb == "truncate":
            return self.truncate(seq, number)
        if verb == "truncate twice":
            return self.truncate_twice(seq, number)
        if verb == "empty append":
            return (Append(seq, (0,) * len(rows), self.seed),) if any(rows) and self.claims.returns == "all" else ()
        if verb in ("fork", "immutable"):
            free = [name for name in "abc" if name not in names]
            if not free or len(names) >= (self.claims.max_sequences or 3):
                return ()
            return (Fork(seq, free[0]) if verb == "fork" else AliasHandle(seq, free[0]),)
        if verb == "reorder":
            kept = len(rows) if number % 4 else 1 + number // 4 % min(self.claims.max_batch or 3, 3)
            picked = tuple((number // 4**i) % len(rows) for i in range(kept))
            if number % 5 < 3:
                picked = tuple((row + 1) % len(rows) for row in range(len(rows)))
            return (Reorder(seq, picked),)
        return (Reset(seq) if verb == "reset" else Close(seq),)

    def truncate(self, seq: str, number: int) -> tuple[Step, ...]:
        """To any length within the rollback; or to another one for each row, where that is claimed."""
        rows = self.state.of(seq)
        ranges = [(self.claims.keeps(mark), length) for length, mark in rows]
        if self.claims.can("truncate_rows") and number >= 32:
            kept = [low + (number // (row + 1)) % (high - low + 1) for row, (low, high) in enumerate(ranges)]
            return (Truncate(seq, tuple(kept)),)
        if not self.claims.levels([length for length, _mark in rows]):
            return ()
        low, high = max(low for low, _high in ranges), min(high for _low, high in ranges)
        return (Truncate(seq, low + number % (high - low + 1)),) if low <= high else ()

    def truncate_twice(self, seq: str, number: int) -> tuple[Step, ...]:
        """By a few tokens, and at once by more, as far as the rollback goes."""
        if not self.claims.levels(self.state.lengths(seq)):
            return ()
        low, high = max(map(self.claims.keeps, self.state.marks(seq))), min(self.state.lengths(seq))
        first = high - 1 - number % 3
        second = first - 1 - number // 3 % LONGEST_CHUNK
        return tuple(Truncate(seq, length) for length in (first, max(second, low)) if low <= length <= high)

    def append(self, seq: str, number: int) -> Append:
        claims = self.claims
        largest = min(claims.max_batch or LARGEST_BATCH, LARGEST_BATCH)
        rows = self.state.lengths(seq) or (0,) * (1 + number // 16 % largest)
        longest = min(claims.max_chunk or LONGEST_CHUNK, LONGEST_CHUNK, self.config.capacity - max(rows))
        end = next(edge for edge in edges(self.config, self.claims) if edge > max(rows)) - max(rows) - (number % 8 == 7)
        chunk = 1 + number // 4 % longest
        count = (chunk, 1, chunk, end if 0 < end <= longest else 1)[number % 4]
        grown, pad = [count] * len(rows), None
        self.seed += 17  # another stream for each step: tokens that were truncated do not come back
        first = not self.state.begun(seq)
        if claims.can("ragged") and number >= 32 and (claims.ragged_appends == "any" or first):
            grown = [(number // (row + 1)) % (longest + 1) for row in range(len(rows))]
            grown[number % len(rows)] = max(grown[number % len(rows)], 1)
            if claims.ragged_appends == "first":  # no prompt is empty
                grown = [max(count, 1) for count in grown]
            pad = claims.padding[number % len(claims.padding)], self.seed + 7
        return Append(seq, tuple(grown), self.seed, pad=pad if len(set(grown)) > 1 else None)


def refusals(
    config: Config, claims: Claims, seq: str, rows: tuple[int, ...], seed: int, marks: tuple[int, ...] = ()
) -> list[Reject]:
    """Calls on a sequence with rows of these lengths that must be refused by a backend with these claims. marks: the
    largest length that each row has had; none: what it has now."""
    found: list[Reject] = []
    beyond = config.capacity - max(rows) + 1
    if claims.can("overflow refused") and beyond <= (claims.max_chunk or beyond):
        found.append(Reject(Append(seq, (beyond,) * len(rows), seed)))
    if claims.can("truncate"):
        found += [Reject(Truncate(seq, length)) for length in (min(rows) + 1, -1)]
        too_deep = min(max(claims.refuses(mark, config.capacity, config.window) for mark in marks or rows), min(rows))
        if too_deep > 0:
            found.append(Reject(Truncate(seq, too_deep), "depth"))
    if claims.can("truncate_rows"):
        found.append(Reject(Truncate(seq, (*rows[:-1], rows[-1] + 1))))
    if claims.can("reorder"):
        found.append(Reject(Reorder(seq, (len(rows),) * len(rows))))
    if claims.can("refusal") and max(rows) < config.capacity:
        found += [Reject(Append(seq, (1,) * len(rows), seed), wrong) for wrong in malformations(config, len(rows))]
    return found


def malformations(config: Config, batch: int) -> list[str]:
    """How an append to so many rows can be malformed."""
    return [wrong for wrong in MALFORMED[config.profile] if wrong != "fewer rows" or batch > 1]
