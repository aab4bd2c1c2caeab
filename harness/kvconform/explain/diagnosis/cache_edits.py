"""Edits of what is remembered: mistakes in the memory of rows, followed through a program."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvconform_specs.history import Token as Streamed
from kvconform_specs.history import new_tokens
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

Token = tuple[Streamed, int, int]
"""A token, and the past and the count of the step that it came with."""
Rows = tuple[tuple[Token, ...], ...]


class Memory:
    """What the rows of each sequence hold: rightly. A mistake overrides one of the methods."""

    broken = False

    def __init__(self) -> None:
        self.rows: dict[str, Rows] = {}

    def append(self, seq: str, new: Rows) -> Rows:
        """What the step's outputs see, new tokens last."""
        self.rows[seq] = _joined(self.rows.get(seq, ((),) * len(new)), new)
        return self.rows[seq]

    def truncate(self, seq: str, length: int) -> None:
        self.rows[seq] = tuple(row[:length] for row in self.rows[seq])

    def fork(self, seq: str, into: str) -> None:
        self.rows[into] = self.rows[seq]

    def keep(self, seq: str, into: str) -> None:
        self.rows[into] = self.rows[seq]

    def reorder(self, seq: str, rows: Sequence[int]) -> None:
        self.rows[seq] = tuple(self.rows[seq][row] for row in rows)

    def reset(self, seq: str) -> None:
        self.rows[seq] = ((),) * len(self.rows[seq])

    def close(self, seq: str) -> None:
        del self.rows[seq]

    def refused(self, call: object, new: Rows) -> None:
        """A call that must change nothing; ``new``: the tokens of an append."""


def _joined(past: Rows, new: Rows) -> Rows:
    return tuple((*old, *row) for old, row in zip(past, new, strict=True))


@dataclass(frozen=True)
class MemoryEdit:
    """words: ``with what a reset must drop``. classes: the mistakes that it stands for, by the catalogue's ids."""

    words: str
    classes: tuple[str, ...]
    memory: Callable[[], Memory]
    lasting: bool = False
    """Whether it outlives a program: what the process has run before is remembered, too."""


def remembered(program: Program, memory: Memory) -> list[Rows | None]:
    """For each step that computes, what its outputs see in this memory, new tokens last; None for other steps, and from
    where on the mistake makes no sense."""
    right = Memory()
    views: list[Rows | None] = []
    for step in program.steps:
        view: Rows | None = None
        if isinstance(step, Append | UncachedForward):
            if not isinstance(step, Append):
                views.append(None if isinstance(step, Generate) else _new(step, ((),) * len(step.counts)))
                continue
            new = _new(step, right.rows.get(step.seq, ((),) * len(step.counts)))
            right.append(step.seq, new)
        else:
            new = ()
            if isinstance(step, Reject):
                if isinstance(step.step, Append):
                    new = _new(step.step, right.rows.get(step.step.seq, ((),) * len(step.step.counts)))
            else:
                _apply(right, step)
        try:
            if isinstance(step, Append):
                view = memory.append(step.seq, new)
            elif isinstance(step, Reject):
                memory.refused(step.step, new)
            else:
                _apply(memory, step)
        except (KeyError, ValueError, IndexError):  # a memory of other rows
            memory.broken = True
        views.append(None if memory.broken else view)
    return views


def _new(step: Run, rows: Rows) -> Rows:
    """The step's tokens, behind the rows that are there."""
    new = new_tokens(step, map(len, rows))
    return tuple(tuple((token, len(row), len(its)) for token in its) for row, its in zip(rows, new, strict=True))


def _apply(memory: Memory, step: object) -> None:
    if isinstance(step, Truncate):
        memory.truncate(step.seq, step.length)
    elif isinstance(step, Fork):
        memory.fork(step.seq, step.into)
    elif isinstance(step, AliasHandle):
        memory.keep(step.seq, step.into)
    elif isinstance(step, Reorder):
        memory.reorder(step.seq, step.rows)
    elif isinstance(step, Reset):
        memory.reset(step.seq)
    elif isinstance(step, Close):
        memory.close(step.seq)


# --- mistakes ---
class _ResetIgnored(Memory):
    def reset(self, seq: str) -> None:
        pass


class _GoesOn(Memory):
    """A new sequence begins with what one that ended has left."""

    def __init__(self) -> None:
        super().__init__()
        self.left: list[Rows] = []

    def append(self, seq: str, new: Rows) -> Rows:
        if seq not in self.rows:
            self.rows[seq] = next((rows for rows in self.left[::-1] if len(rows) == len(new)), ((),) * len(new))
        return super().append(seq, new)

    def close(self, seq: str) -> None:
        self.left.append(self.rows.pop(seq))


class _OneForAll(Memory):
    """All sequences are one."""

    def append(self, seq: str, new: Rows) -> Rows:
        return super().append("", new)

    def truncate(self, seq: str, length: int) -> None:
        super().truncate("", length)

    def reorder(self, seq: str, rows: Sequence[int]) -> None:
        super().reorder("", rows)

    def reset(self, seq: str) -> None:
        super().reset("")

    def fork(self, seq: str, into: str) -> None:
        pass

    def keep(self, seq: str, into: str) -> None:
        pass

    def close(self, seq: str) -> None:
        pass


class _Linked(Memory):
    """A copy and its original grow together."""

    forks, keeps = True, False

    def __init__(self) -> None:
        super().__init__()
        self.names: dict[str, str] = {}

    def append(self, seq: str, new: Rows) -> Rows:
        return super().append(self.names.get(seq, seq), new)

    def fork(self, seq: str, into: str) -> None:
        if self.forks:
            self.names[into] = self.names.get(seq, seq)
        else:
            super().fork(seq, into)

    def keep(self, seq: str, into: str) -> None:
        if self.keeps:
            self.names[into] = self.names.get(seq, seq)
        else:
            super().keep(seq, into)

    def close(self, seq: str) -> None:
        if seq in self.rows and seq not in self.names.values():
            super().close(seq)


class _LinkedHandles(_Linked):
    forks, keeps = False, True


class _EmptyCopy(Memory):
    def fork(self, seq: str, into: str) -> None:
        self.rows[into] = ((),) * len(self.rows[seq])


class _TruncateIgnored(Memory):
    def truncate(self, seq: str, length: int) -> None:
        pass


class _TruncateMore(Memory):
    by = 1

    def truncate(self, seq: str, length: int) -> None:
        super().truncate(seq, max(length + self.by, 0))


class _TruncateLess(_TruncateMore):
    by = -1


class _TruncateEmpties(Memory):
    def truncate(self, seq: str, length: int) -> None:
        super().truncate(seq, 0)


class _TruncateDrops(Memory):
    """It forgets so many, instead of all but so many."""

    def truncate(self, seq: str, length: int) -> None:
        self.rows[seq] = tuple(row[: max(len(row) - length, 0)] for row in self.rows[seq])


class _TruncateKeepsNewest(Memory):
    def truncate(self, seq: str, length: int) -> None:
        self.rows[seq] = tuple(row[len(row) - length :] for row in self.rows[seq])


class _ReorderIgnored(Memory):
    def reorder(self, seq: str, rows: Sequence[int]) -> None:
        if len(rows) > len(self.rows[seq]):
            raise ValueError
        self.rows[seq] = self.rows[seq][: len(rows)]


class _ReorderTwice(Memory):
    def reorder(self, seq: str, rows: Sequence[int]) -> None:
        super().reorder(seq, rows)
        super().reorder(seq, rows)


class _ReorderInverse(Memory):
    def reorder(self, seq: str, rows: Sequence[int]) -> None:
        super().reorder(seq, [list(rows).index(row) for row in range(len(rows))])


class _Refused(Memory):
    """A call that is refused takes effect."""

    def refused(self, call: object, new: Rows) -> None:
        if isinstance(call, Append):
            self.rows[call.seq] = _joined(self.rows.get(call.seq, ((),) * len(new)), new)


class _Stored(Memory):
    """Of each step only part is kept for later ones."""

    def stored(self, past: tuple[Token, ...], new: tuple[Token, ...]) -> tuple[Token, ...]:
        raise NotImplementedError

    def append(self, seq: str, new: Rows) -> Rows:
        past = self.rows.get(seq, ((),) * len(new))
        self.rows[seq] = tuple(self.stored(old, row) for old, row in zip(past, new, strict=True))
        return _joined(past, new)


class _Dropped(_Stored):
    def stored(self, past: tuple[Token, ...], new: tuple[Token, ...]) -> tuple[Token, ...]:
        return (*past, *new[:-1])


class _FirstDropped(_Stored):
    def stored(self, past: tuple[Token, ...], new: tuple[Token, ...]) -> tuple[Token, ...]:
        return (*past, *new[1:])


class _PromptAlone(_Stored):
    def stored(self, past: tuple[Token, ...], new: tuple[Token, ...]) -> tuple[Token, ...]:
        return past or new


class _LastStep(_Stored):
    def stored(self, past: tuple[Token, ...], new: tuple[Token, ...]) -> tuple[Token, ...]:
        return new or past


class _Twice(_Stored):
    def stored(self, past: tuple[Token, ...], new: tuple[Token, ...]) -> tuple[Token, ...]:
        return (*past, *new, *new[-1:])


class _StepTwice(_Stored):
    def stored(self, past: tuple[Token, ...], new: tuple[Token, ...]) -> tuple[Token, ...]:
        return (*past, *new, *new)


class _LastAlone(_Stored):
    def stored(self, past: tuple[Token, ...], new: tuple[Token, ...]) -> tuple[Token, ...]:
        return (*past, *new[-1:])


class _FirstAlone(_Stored):
    def stored(self, past: tuple[Token, ...], new: tuple[Token, ...]) -> tuple[Token, ...]:
        return (*past, *new[:1])


class _Overwritten(Memory):
    """Each step writes over the newest token."""

    def append(self, seq: str, new: Rows) -> Rows:
        past = self.rows.get(seq, ((),) * len(new))
        self.rows[seq] = tuple((*(old[:-1] if row else old), *row) for old, row in zip(past, new, strict=True))
        return self.rows[seq]


class _OtherRow(Memory):
    """Rows read what another one has cached."""

    def other(self, row: int, rows: int) -> int:
        return 0

    def append(self, seq: str, new: Rows) -> Rows:
        past = self.rows.get(seq, ((),) * len(new))
        super().append(seq, new)
        return _joined(tuple(past[self.other(row, len(past))] for row in range(len(past))), new)


class _NextRow(_OtherRow):
    def other(self, row: int, rows: int) -> int:
        return (row + 1) % rows


class _LastRow(_OtherRow):
    def other(self, row: int, rows: int) -> int:
        return rows - 1


MEMORIES: tuple[MemoryEdit, ...] = (
    MemoryEdit("with what a reset must drop in front", ("C6",), _ResetIgnored),
    MemoryEdit("with the tokens of a sequence that has ended in front", ("C6",), _GoesOn),
    MemoryEdit("with the tokens of other sequences among its own", ("C7",), _OneForAll),
    MemoryEdit("with the tokens of all that ran before in front", ("C6",), _OneForAll, lasting=True),
    MemoryEdit("where a fork's copy and its original grow together", ("C11",), _Linked),
    MemoryEdit("where an older handle grows with the newer one", ("C4",), _LinkedHandles),
    MemoryEdit("where a fork's copy is empty", ("C11",), _EmptyCopy),
    MemoryEdit("with what a truncation must drop", ("C8",), _TruncateIgnored),
    MemoryEdit("with one token more than a truncation must keep", (), _TruncateMore),
    MemoryEdit("with one token less than a truncation must keep", ("C8",), _TruncateLess),
    MemoryEdit("without what a truncation must keep", ("C8",), _TruncateEmpties),
    MemoryEdit("where a truncation drops as many as it must keep", ("C8",), _TruncateDrops),
    MemoryEdit("where a truncation keeps the newest tokens", ("C8",), _TruncateKeepsNewest),
    MemoryEdit("with rows that are not reordered", ("C10",), _ReorderIgnored),
    MemoryEdit("with rows that are reordered twice", ("C10",), _ReorderTwice),
    MemoryEdit("with rows that are reordered the other way round", ("C10",), _ReorderInverse),
    MemoryEdit("with the tokens of a refused call", ("C12",), _Refused),
    MemoryEdit("where the last token of each step is not cached", ("C1",), _Dropped),
    MemoryEdit("where the first token of each step is not cached", ("C1",), _FirstDropped),
    MemoryEdit("where nothing is cached after the first step", ("C1",), _PromptAlone),
    MemoryEdit("where each step replaces what is cached", ("C1",), _LastStep),
    MemoryEdit("where the last token of each step is cached twice", ("C1",), _Twice),
    MemoryEdit("where each step is cached twice", ("C1",), _StepTwice),
    MemoryEdit("where the last token alone of each step is cached", ("C1",), _LastAlone),
    MemoryEdit("where the first token alone of each step is cached", ("C1",), _FirstAlone),
    MemoryEdit("where each step writes over the newest cached token", ("C1",), _Overwritten),
    MemoryEdit("with what row 0 has cached", (), _OtherRow),
    MemoryEdit("with what the next row has cached", (), _NextRow),
    MemoryEdit("with what the last row has cached", (), _LastRow),
)
