"""The tokens that a program's sequences hold after each step, and what a step's outputs are a function of."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from kvconform_specs.program import Append, Program, Run, Sequences, Step


class Stream(NamedTuple):
    """The seed of a stream, the distribution of its numbers (``program.DISTRIBUTIONS``), and the context of the
    sequence that reads it: the same numbers in another context are other tokens."""

    seed: int
    distribution: str = "normal"
    context: int = 0


Token = tuple[Stream, int]
"""The token at that position of that stream."""
Row = tuple[Token, ...]


class Histories(Sequences[Row]):
    """A row is its tokens. ``truncate`` removes tokens, and that is all it means."""

    empty = ()

    def grown(self, rows: tuple[Row, ...], step: Run) -> tuple[Row, ...]:
        return tuple(row + new for row, new in zip(rows, new_tokens(step, map(len, rows)), strict=True))

    def cut(self, row: Row, length: int) -> Row:
        return row[:length]


def new_tokens(step: Run, lengths: Iterable[int]) -> list[Row]:
    """The tokens that the step appends to rows of these lengths."""
    other = {(row, at): Stream(seed, step.distribution, step.context) for row, at, seed in step.substitutions}
    made = []
    for index, (length, count) in enumerate(zip(lengths, step.counts, strict=True)):
        nan = isinstance(step, Append) and index in step.nan
        own = Stream(step.seed + index, "nan" if nan else step.distribution, step.context)
        made.append(tuple((other.get((index, at), own), at) for at in range(length, length + count)))
    return made


def seen_by(program: Program) -> list[tuple[Row, ...] | None]:
    """For each step that computes, the rows that its outputs belong to, new tokens included; None for other steps."""
    histories = Histories()
    return [histories.apply(step) for step in program.steps]


def context_of(row: Row) -> int:
    """The context of the sequence that a row belongs to; 0 for a row without a token."""
    return row[0][0].context if row else 0


def holds_nan(program: Program) -> bool:
    """Whether some token holds NaN, so that not every output has a value."""
    return any(stream.distribution == "nan" for rows in seen_by(program) for row in rows or () for stream, _at in row)


class Request(NamedTuple):
    """What the outputs of one row of a step are a function of: its tokens, the token whose key its queries have the
    direction of, the positions that the caller's mask hides, and the epoch of the number of tokens at the end of the
    step."""

    row: Row
    needle: Token | None = None
    masked: tuple[int, ...] = ()
    epoch: int = 0

    @property
    def plain(self) -> bool:
        """Whether the outputs depend on the tokens alone."""
        return self.needle is None and not self.masked


def requests(step: Step, rows: Sequence[Row]) -> list[Request]:
    """One for each row of the step; ``rows`` hold its new tokens, too."""
    if not isinstance(step, Append):
        return [Request(row) for row in rows]
    found = []
    for index, row in enumerate(rows):
        needle = step.needle and (Stream(step.needle[0] + index, step.distribution), step.needle[1])
        found.append(Request(row, needle, tuple(sorted(at for of, at in step.masked if of == index))))
    return found


def epoch_of(length: int, changes_at: Sequence[int]) -> int:
    """How many of the lengths at which outputs change (``Claims.changes_at``) are at most ``length``. Outputs with the
    same tokens before them are equal if the steps that gave them ended in the same epoch."""
    return bisect_right(changes_at, length)


def prefixed(asked: Iterable[Request], changes_at: Sequence[int] = ()) -> dict[Request, Request]:
    """For each request the longest one that computes its outputs, too: one of the same epoch whose row begins with the
    same tokens.

    This holds because the definition is causal (a test of the definition shows it). The longest come first.
    """
    owners: dict[Request, Request] = {}
    longest: dict[int, list[Request]] = defaultdict(list)
    for request in sorted(asked, key=lambda r: -len(r.row)):
        row, owner = request.row, request
        if request.plain:
            known = longest[epoch_of(len(row), changes_at)]
            owner = next((other for other in known if other.row[: len(row)] == row), request)
            known += [request] if owner is request else []
        owners[request] = owner
    return owners
