"""What a program's sequences logically hold after each step: the tokens, and nothing else."""

from __future__ import annotations

from kvconform_specs.program import (
    AliasHandle,
    Append,
    Close,
    Fork,
    Program,
    Reorder,
    Reset,
    Run,
    Step,
    Truncate,
    UncachedForward,
)

Token = tuple[int, int]
"""``(seed, position)``: the token at that position of that stream."""

Row = tuple[Token, ...]


class Histories:
    """The logical tokens of every open sequence. ``truncate`` means to forget, and that is all it means."""

    def __init__(self) -> None:
        self.rows: dict[str, tuple[Row, ...]] = {}

    def apply(self, step: Step) -> None:
        if isinstance(step, Append):
            self.rows[step.seq] = after(self.rows.get(step.seq, ((),) * len(step.counts)), step)
        elif isinstance(step, Truncate):
            self.rows[step.seq] = tuple(row[: step.length] for row in self.rows[step.seq])
        elif isinstance(step, Fork | AliasHandle):
            self.rows[step.into] = self.rows[step.seq]
        elif isinstance(step, Reorder):
            self.rows[step.seq] = tuple(self.rows[step.seq][row] for row in step.rows)
        elif isinstance(step, Reset):
            self.rows[step.seq] = ((),) * len(self.rows[step.seq])
        elif isinstance(step, Close):
            del self.rows[step.seq]


def after(rows: tuple[Row, ...], step: Run) -> tuple[Row, ...]:
    """The rows with the new tokens of ``step`` behind them."""
    swapped = {(row, position): seed for row, position, seed in step.substitutions}
    grown = []
    for index, (row, count) in enumerate(zip(rows, step.counts, strict=True)):
        new = range(len(row), len(row) + count)
        grown.append(row + tuple((swapped.get((index, p), step.seed + index), p) for p in new))
    return tuple(grown)


def seen_by(program: Program) -> list[tuple[Row, ...] | None]:
    """For each step that computes, the history of each row that its outputs belong to, new tokens included."""
    histories = Histories()
    seen: list[tuple[Row, ...] | None] = []
    for step in program.steps:
        histories.apply(step)
        if isinstance(step, Append):
            seen.append(histories.rows[step.seq])
        elif isinstance(step, UncachedForward):
            seen.append(after(((),) * len(step.counts), step))
        else:
            seen.append(None)
    return seen
