"""The steps of a program, and the rows that they leave."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, TypeVar, assert_never


@dataclass(frozen=True, slots=True)
class Append:
    """Appends ``counts[r]`` new tokens to row ``r``. Prefill, chunk and decode are the same step with other counts.

    The first append to a name opens the sequence with ``len(counts)`` rows. Unequal counts are *ragged* rows. An append
    to an open sequence may have no token at all: it is *empty*, and changes nothing.
    substitutions: ``(row, position, seed)``: the token at that logical position of that row comes from another stream.
    needle: ``(seed, position)``: every query of the step has the direction of that token's key, so that it attends to
    that token almost alone (attention profile). masked: ``(row, position)``: tokens that the caller's mask hides from
    every query (attention profile). pad: ``(side, seed)``: the side, ``right`` or ``left``, of the columns of ragged
    rows that hold no token, and the stream that fills them; None: right, zeros. layout: the memory layout of the inputs
    (``LAYOUTS``). in_place: the present is written into the memory of the past. count_macs: the multiply-adds of the
    step are counted. last_only: only the output of each row's last new token is requested; all counts are equal
    (decoder profile). distribution: the distribution of the streams that the step names (``DISTRIBUTIONS``). nan: rows
    whose streams have the distribution ``nan`` instead. reused: the inputs lie in memory that the caller overwrites
    after the step, and uses again for the next such step. context: the number of the sequence's context
    (``Config.contexts``), the same for all appends until it is reset or closed.
    """

    seq: str
    counts: tuple[int, ...]
    seed: int
    substitutions: tuple[tuple[int, int, int], ...] = ()
    needle: tuple[int, int] | None = None
    masked: tuple[tuple[int, int], ...] = ()
    pad: tuple[str, int] | None = None
    layout: str = "contiguous"
    in_place: bool = False
    count_macs: bool = False
    last_only: bool = False
    distribution: str = "normal"
    nan: tuple[int, ...] = ()
    reused: bool = False
    context: int = 0


@dataclass(frozen=True, slots=True)
class UncachedForward:
    """Runs the backend's own cache-less forward on the first ``counts[r]`` tokens of each row's stream.

    It changes no sequence; ``seq`` names the outputs, so that they can be compared with those of a cached sequence.
    last_only: only the output of each row's last token is requested; all counts are equal (decoder profile).
    distribution, context: as for ``append``.
    """

    seq: str
    counts: tuple[int, ...]
    seed: int
    substitutions: tuple[tuple[int, int, int], ...] = ()
    last_only: bool = False
    distribution: str = "normal"
    context: int = 0


@dataclass(frozen=True, slots=True)
class Generate(UncachedForward):
    """The backend generates ``new`` tokens greedily after the first ``counts[r]`` tokens of each row's stream.

    Like ``uncached_forward`` it changes no sequence. All prompts have the same length (decoder profile).
    """

    new: int = 1


@dataclass(frozen=True, slots=True)
class Truncate:
    """Removes all but the first ``length`` tokens of every row.

    length: one number for all rows, or one for each row.
    """

    seq: str
    length: int | tuple[int, ...]

    def lengths(self, rows: int) -> tuple[int, ...]:
        """How many tokens each of so many rows keeps."""
        return (self.length,) * rows if isinstance(self.length, int) else self.length


@dataclass(frozen=True, slots=True)
class Fork:
    """Copies ``seq`` to the new name ``into``; both continue independently."""

    seq: str
    into: str


@dataclass(frozen=True, slots=True)
class Reorder:
    """Row ``i`` becomes the old row ``rows[i]``. Duplicates are legal, and independent afterwards."""

    seq: str
    rows: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Reset:
    """Empties the sequence and keeps its handle."""

    seq: str


@dataclass(frozen=True, slots=True)
class Close:
    """Ends the sequence; its name may be opened again."""

    seq: str


@dataclass(frozen=True, slots=True)
class AliasHandle:
    """Gives the handle of ``seq`` a second name, ``into``, without a call; both continue from it, independently."""

    seq: str
    into: str


@dataclass(frozen=True, slots=True)
class ReadCache:
    """Requests the keys and values that the sequence holds."""

    seq: str


@dataclass(frozen=True, slots=True)
class Poison:
    """Fills the slots that hold no token of any sequence; keys and values separately, with a value of ``POISONS``."""

    seq: str
    keys: str = "none"
    values: str = "none"


@dataclass(frozen=True, slots=True)
class Reject:
    """A call that the backend must refuse with an exception, and that must change nothing.

    wrong: how the inputs of an otherwise legal append are malformed (``MALFORMED``), or ``depth``: an otherwise legal
    truncation removes more than the backend claims to undo (``Claims.rollback``); empty: the call is not legal.
    """

    step: Append | Truncate | Reorder
    wrong: str = ""


Call = Append | UncachedForward | Truncate | Fork | Reorder | Reset | Close | AliasHandle | ReadCache | Poison
Step = Call | Reject
Run = Append | UncachedForward
OPS: dict[str, type[Any]] = {
    "append": Append,
    "uncached_forward": UncachedForward,
    "generate": Generate,
    "truncate": Truncate,
    "fork": Fork,
    "reorder": Reorder,
    "reset": Reset,
    "close": Close,
    "alias_handle": AliasHandle,
    "read_cache": ReadCache,
    "poison": Poison,
    "reject": Reject,
}
MAX_SEED = (1 << 48) - 1
DISTRIBUTIONS = ("normal", "large_queries", "zero_keys", "small_keys_large_values", "nan")
"""The distributions of a stream's numbers: independent normals; queries 64 times as large; all keys zero; values 16
times as large and keys a quarter; NaN. The factors apply in the attention profile. Token ids cannot be NaN."""
LAYOUTS = ("contiguous", "transposed", "sliced", "expanded")
"""Memory layouts of inputs: dense; token axis before head axis; every other element of a larger array; one row that
all rows share with a stride of 0 (their tokens must be equal)."""
POISONS = {"none": None, "junk": 3.0e4, "nan": float("nan"), "inf": float("inf")}
"""What slots without a token are filled with; junk is finite in float16, too."""
MALFORMED = {
    "attention": ("dtype", "rank", "heads", "head dim", "batch", "fewer rows", "lengths"),
    "decoder": ("dtype", "rank", "batch", "fewer rows", "vocabulary"),
    "hidden": ("dtype", "rank", "batch", "fewer rows", "width"),
}
"""What can be wrong with the inputs of an append: integers for floats, or floats for token ids; a missing axis; a KV
head too many; a head dim one too small; a row too many; one row where the cache has several; fewer values than keys; an
unknown token id; a channel less."""
NAMES = {kind: op for op, kind in OPS.items()}
R = TypeVar("R")


def called(step: Step) -> Call:
    """The call that the step makes, whether it must succeed or be refused."""
    return step.step if isinstance(step, Reject) else step


class Sequences(Generic[R]):
    """The rows of every open sequence. A subclass says what a row is, and how steps make it longer or shorter.

    contexts: the context of each sequence that has had an append since it was opened or reset.
    """

    empty: R

    def __init__(self) -> None:
        self.rows: dict[str, tuple[R, ...]] = {}
        self.contexts: dict[str, int] = {}

    def grown(self, rows: tuple[R, ...], step: Run) -> tuple[R, ...]:
        raise NotImplementedError

    def cut(self, row: R, length: int) -> R:
        raise NotImplementedError

    def of(self, name: str) -> tuple[R, ...]:
        """The rows of a sequence; none where it is not open."""
        return self.rows.get(name, ())

    def after(self, step: Run) -> tuple[R, ...]:
        """The rows that the outputs of ``step`` belong to, its new tokens included."""
        past = self.of(step.seq) if isinstance(step, Append) else ()
        return self.grown(past or (self.empty,) * len(step.counts), step)

    def apply(self, step: Step) -> tuple[R, ...] | None:
        """Changes the rows as a legal step does, and returns those that its outputs belong to, if it has any."""
        match step:
            case Append(seq):
                self.rows[seq] = rows = self.after(step)
                self.contexts[seq] = step.context
                return rows
            case UncachedForward():
                return self.after(step)
            case Truncate(seq):
                rows = self.rows[seq]
                self.rows[seq] = tuple(map(self.cut, rows, step.lengths(len(rows))))
            case Fork(seq, into) | AliasHandle(seq, into):
                self.rows[into] = self.rows[seq]
                self.contexts |= {into: self.contexts[seq]} if seq in self.contexts else {}
            case Reorder(seq, order):
                self.rows[seq] = tuple(self.rows[seq][row] for row in order)
            case Reset(seq):
                self.rows[seq] = (self.empty,) * len(self.rows[seq])
                self.contexts.pop(seq, None)
            case Close(seq):
                del self.rows[seq]
                self.contexts.pop(seq, None)
            case ReadCache() | Poison() | Reject():
                pass
            case _:
                assert_never(step)
        return None


class Lengths(Sequences[int]):
    """A row is its number of tokens."""

    empty = 0

    def grown(self, rows: tuple[int, ...], step: Run) -> tuple[int, ...]:
        return tuple(length + count for length, count in zip(rows, step.counts, strict=True))

    def cut(self, row: int, length: int) -> int:
        return length


class Marks(Sequences[tuple[int, int]]):
    """A row is its number of tokens, and the largest that it has had since the sequence was opened or reset."""

    empty = (0, 0)

    def grown(self, rows: tuple[tuple[int, int], ...], step: Run) -> tuple[tuple[int, int], ...]:
        lengths = [length + count for (length, _mark), count in zip(rows, step.counts, strict=True)]
        return tuple((length, max(length, mark)) for length, (_length, mark) in zip(lengths, rows, strict=True))

    def cut(self, row: tuple[int, int], length: int) -> tuple[int, int]:
        return length, row[1]

    def lengths(self, name: str) -> tuple[int, ...]:
        return tuple(length for length, _mark in self.of(name))

    def marks(self, name: str) -> tuple[int, ...]:
        return tuple(mark for _length, mark in self.of(name))

    def begun(self, name: str) -> bool:
        """Whether tokens were appended to the sequence since it was opened or reset."""
        return any(self.marks(name))
