"""Cache edits: mistakes in what the cache holds for each row, followed through a program."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from kvconform_specs.history import Token, new_tokens
from kvconform_specs.program import (
    AliasHandle,
    Append,
    Close,
    Fork,
    Generate,
    Program,
    Reject,
    Reorder,
    Reset,
    Run,
    Truncate,
    UncachedForward,
)

CachedToken = tuple[Token, int, int]
"""A token, and the past and the count of the step that appended it."""
CachedRow = tuple[CachedToken, ...]
CachedRows = tuple[CachedRow, ...]


class CacheModel:
    """The tokens that a cache holds for each row of each sequence. A mistake overrides one of the methods."""

    broken = False

    def __init__(self) -> None:
        self.rows: dict[str, CachedRows] = {}

    def past(self, seq: str, count: int) -> CachedRows:
        return self.rows.get(seq, ((),) * count)

    def append(self, seq: str, new: CachedRows) -> CachedRows:
        """Caches the new tokens and returns what the outputs of the step see, new tokens last."""
        self.rows[seq] = _joined(self.past(seq, len(new)), new)
        return self.rows[seq]

    def truncate(self, seq: str, step: Truncate) -> None:
        rows = self.rows[seq]
        self.rows[seq] = tuple(map(self.cut, rows, step.lengths(len(rows))))

    def cut(self, row: CachedRow, length: int) -> CachedRow:
        return row[:length]

    def fork(self, seq: str, into: str) -> None:
        self.rows[into] = self.rows[seq]

    def alias(self, seq: str, into: str) -> None:
        self.rows[into] = self.rows[seq]

    def reorder(self, seq: str, rows: Sequence[int]) -> None:
        self.rows[seq] = tuple(self.rows[seq][row] for row in rows)

    def reset(self, seq: str) -> None:
        self.rows[seq] = ((),) * len(self.rows[seq])

    def close(self, seq: str) -> None:
        del self.rows[seq]

    def refused(self, call: object, new: CachedRows) -> None:
        """Applies a call that must change nothing; ``new``: the tokens of an append."""


def _joined(past: CachedRows, new: CachedRows) -> CachedRows:
    return tuple((*old, *row) for old, row in zip(past, new, strict=True))


@dataclass(frozen=True)
class CacheEdit:
    """A wrong cache.

    words: completes "what the reference gives ...". classes: the ids of the mistakes that it may stand for; none where
    several different mistakes look like it. across_programs:
    whether the model keeps its rows from one program of a process to the next.
    """

    words: str
    classes: tuple[str, ...]
    model: Callable[[], CacheModel]
    across_programs: bool = False


def views(program: Program, model: CacheModel) -> list[CachedRows | None]:
    """What the outputs of each step see if the cache behaves as the model, new tokens last. None for steps without
    outputs, and for all steps after one that the model cannot follow."""
    right = CacheModel()
    found: list[CachedRows | None] = []
    for step in program.steps:
        if isinstance(step, UncachedForward):
            found.append(None if isinstance(step, Generate) else _new(step, ((),) * len(step.counts)))
            continue
        call = step.step if isinstance(step, Reject) else step
        new = _new(call, right.past(call.seq, len(call.counts))) if isinstance(call, Append) else ()
        if not isinstance(step, Reject):
            _apply(right, step, new)
        view = None
        try:
            if isinstance(step, Reject):
                model.refused(step.step, new)
            else:
                view = _apply(model, step, new)
        except (KeyError, ValueError, IndexError):  # the model holds other rows than the call names
            model.broken = True
        found.append(None if model.broken else view)
    return found


def _new(step: Run, past: CachedRows) -> CachedRows:
    """The tokens of a step, numbered from the end of each row; none where the step has another number of rows."""
    if len(step.counts) != len(past):
        return ()
    new = new_tokens(step, map(len, past))
    return tuple(tuple((token, len(row), len(its)) for token in its) for row, its in zip(past, new, strict=True))


def _apply(model: CacheModel, step: object, new: CachedRows) -> CachedRows | None:
    match step:
        case Append():
            return model.append(step.seq, new)
        case Truncate():
            model.truncate(step.seq, step)
        case Fork():
            model.fork(step.seq, step.into)
        case AliasHandle():
            model.alias(step.seq, step.into)
        case Reorder():
            model.reorder(step.seq, step.rows)
        case Reset():
            model.reset(step.seq)
        case Close():
            model.close(step.seq)
    return None


# --- mistakes ---
class _ResetIgnored(CacheModel):
    def reset(self, seq: str) -> None:
        pass


class _ClosedRowsReused(CacheModel):
    """A new sequence starts with the rows of a closed one."""

    def __init__(self) -> None:
        super().__init__()
        self.closed: list[CachedRows] = []

    def append(self, seq: str, new: CachedRows) -> CachedRows:
        if seq not in self.rows:
            self.rows[seq] = next((rows for rows in self.closed[::-1] if len(rows) == len(new)), ((),) * len(new))
        return super().append(seq, new)

    def close(self, seq: str) -> None:
        self.closed.append(self.rows.pop(seq))


class _OneForAll(CacheModel):
    """All sequences share one cache."""

    def append(self, seq: str, new: CachedRows) -> CachedRows:
        return super().append("", new)

    def truncate(self, seq: str, step: Truncate) -> None:
        super().truncate("", step)

    def reorder(self, seq: str, rows: Sequence[int]) -> None:
        super().reorder("", rows)

    def reset(self, seq: str) -> None:
        super().reset("")

    def fork(self, seq: str, into: str) -> None:
        pass

    def alias(self, seq: str, into: str) -> None:
        pass

    def close(self, seq: str) -> None:
        pass


class _SharedCopies(CacheModel):
    """A copy and its original share their rows: copies by forks, or handles to older states (``aliases``)."""

    def __init__(self, aliases: bool) -> None:
        super().__init__()
        self.aliases = aliases
        self.names: dict[str, str] = {}

    def append(self, seq: str, new: CachedRows) -> CachedRows:
        return super().append(self.names.get(seq, seq), new)

    def fork(self, seq: str, into: str) -> None:
        super().fork(seq, into) if self.aliases else self._share(seq, into)

    def alias(self, seq: str, into: str) -> None:
        self._share(seq, into) if self.aliases else super().alias(seq, into)

    def _share(self, seq: str, into: str) -> None:
        self.names[into] = self.names.get(seq, seq)

    def close(self, seq: str) -> None:
        if seq in self.rows and seq not in self.names.values():
            super().close(seq)


class _EmptyCopy(CacheModel):
    def fork(self, seq: str, into: str) -> None:
        self.rows[into] = ((),) * len(self.rows[seq])


class _Truncated(CacheModel):
    """``kept`` takes a row and the length that must remain, and returns the tokens that do remain."""

    def __init__(self, kept: Callable[[CachedRow, int], CachedRow]) -> None:
        super().__init__()
        self.kept = kept

    def cut(self, row: CachedRow, length: int) -> CachedRow:
        return self.kept(row, length)


class _TruncatedAlike(CacheModel):
    """Every row keeps as many tokens as the row that keeps most, as far as it has them."""

    def truncate(self, seq: str, step: Truncate) -> None:
        longest = max(step.lengths(len(self.rows[seq])))
        self.rows[seq] = tuple(row[:longest] for row in self.rows[seq])


class _ReorderIgnored(CacheModel):
    def reorder(self, seq: str, rows: Sequence[int]) -> None:
        if len(rows) > len(self.rows[seq]):
            raise ValueError
        self.rows[seq] = self.rows[seq][: len(rows)]


class _ReorderTwice(CacheModel):
    def reorder(self, seq: str, rows: Sequence[int]) -> None:
        super().reorder(seq, rows)
        super().reorder(seq, rows)


class _ReorderInverse(CacheModel):
    def reorder(self, seq: str, rows: Sequence[int]) -> None:
        super().reorder(seq, [list(rows).index(row) for row in range(len(rows))])


class _RefusedAppends(CacheModel):
    """A refused append takes effect."""

    def refused(self, call: object, new: CachedRows) -> None:
        if isinstance(call, Append):
            self.rows[call.seq] = _joined(self.past(call.seq, len(new)), new)


class _Cached(CacheModel):
    """``cached`` takes a row and the new tokens of a step, and returns the row that later steps find."""

    def __init__(self, cached: Callable[[CachedRow, CachedRow], CachedRow]) -> None:
        super().__init__()
        self.cached = cached

    def append(self, seq: str, new: CachedRows) -> CachedRows:
        past = self.past(seq, len(new))
        self.rows[seq] = tuple(self.cached(old, row) for old, row in zip(past, new, strict=True))
        return _joined(past, new)


class _NewestOverwritten(CacheModel):
    """Each step writes over the newest cached token."""

    def append(self, seq: str, new: CachedRows) -> CachedRows:
        past = self.past(seq, len(new))
        self.rows[seq] = tuple((*(old[:-1] if row else old), *row) for old, row in zip(past, new, strict=True))
        return self.rows[seq]


class _OtherRow(CacheModel):
    """Rows see the cached tokens of another row; ``other`` takes a row and the number of rows."""

    def __init__(self, other: Callable[[int, int], int]) -> None:
        super().__init__()
        self.other = other

    def append(self, seq: str, new: CachedRows) -> CachedRows:
        past = self.past(seq, len(new))
        super().append(seq, new)
        return _joined(tuple(past[self.other(row, len(past))] for row in range(len(past))), new)


def _truncated(words: str, classes: tuple[str, ...], kept: Callable[[CachedRow, int], CachedRow]) -> CacheEdit:
    return CacheEdit(words, classes, partial(_Truncated, kept))


def _cached(words: str, cached: Callable[[CachedRow, CachedRow], CachedRow]) -> CacheEdit:
    return CacheEdit(words, ("C1",), partial(_Cached, cached))


def _row(words: str, other: Callable[[int, int], int]) -> CacheEdit:
    return CacheEdit(words, ("H4",), partial(_OtherRow, other))


CACHE_EDITS: tuple[CacheEdit, ...] = (
    CacheEdit("if a reset is ignored", ("C6",), _ResetIgnored),
    CacheEdit("with the tokens of a closed sequence in front", ("C6",), _ClosedRowsReused),
    CacheEdit("if all sequences share one cache", ("C7",), _OneForAll),
    CacheEdit("with the tokens of all earlier programs in front", ("C6",), _OneForAll, across_programs=True),
    CacheEdit("if the two sides of a fork share their cache", ("C11",), partial(_SharedCopies, False)),
    CacheEdit("if an older handle shares its cache with the newer one", ("C4",), partial(_SharedCopies, True)),
    CacheEdit("if the copy of a fork is empty", ("C11",), _EmptyCopy),
    _truncated("if a truncation is ignored", ("C8",), lambda row, n: row),
    _truncated("if a truncation keeps one token too many", (), lambda row, n: row[: n + 1]),
    _truncated("if a truncation keeps one token too few", ("C8",), lambda row, n: row[: max(n - 1, 0)]),
    _truncated("if a truncation empties the cache", ("C8",), lambda row, n: ()),
    _truncated(
        "if a truncation drops the number of tokens that it must keep",
        ("C8",),
        lambda row, n: row[: max(len(row) - n, 0)],
    ),
    _truncated("if a truncation keeps the newest tokens", ("C8",), lambda row, n: row[len(row) - n :]),
    CacheEdit("if a truncation keeps as many tokens of every row as of the longest", ("M7",), _TruncatedAlike),
    CacheEdit("if a reorder is ignored", ("C10",), _ReorderIgnored),
    CacheEdit("if a reorder is applied twice", ("C10",), _ReorderTwice),
    CacheEdit("if a reorder applies the inverse permutation", ("C10",), _ReorderInverse),
    CacheEdit("with the tokens of a refused call", ("C12",), _RefusedAppends),
    _cached("if the last token of each step is not cached", lambda past, new: (*past, *new[:-1])),
    _cached("if the first token of each step is not cached", lambda past, new: (*past, *new[1:])),
    _cached("if only the first step is cached", lambda past, new: past or new),
    _cached("if each step replaces the cached tokens", lambda past, new: new or past),
    _cached("if the last token of each step is cached twice", lambda past, new: (*past, *new, *new[-1:])),
    _cached("if each step is cached twice", lambda past, new: (*past, *new, *new)),
    _cached("if only the last token of each step is cached", lambda past, new: (*past, *new[-1:])),
    _cached("if only the first token of each step is cached", lambda past, new: (*past, *new[:1])),
    CacheEdit("if each step overwrites the newest cached token", ("C1",), _NewestOverwritten),
    _row("with the cached tokens of row 0", lambda row, rows: 0),
    _row("with the cached tokens of the next row", lambda row, rows: (row + 1) % rows),
    _row("with the cached tokens of the last row", lambda row, rows: rows - 1),
)
