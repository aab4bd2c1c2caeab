"""Steps in words: one step in a few, or a whole program with what its sequences hold."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from typing import TypeVar

from kvconform_specs.program import (
    NAMES,
    AliasHandle,
    Append,
    Fork,
    Generate,
    Lengths,
    Poison,
    Program,
    Reject,
    Reorder,
    Run,
    Step,
    Truncate,
    UncachedForward,
    called,
)

Key = TypeVar("Key")
WRONG = {
    "dtype": "with inputs of another dtype",
    "rank": "with an axis less",
    "heads": "with a KV head too many",
    "head dim": "with a head dim that is one too small",
    "batch": "with a row too many",
    "fewer rows": "with one row alone",
    "lengths": "with fewer values than keys",
    "vocabulary": "with an unknown token id",
    "width": "with a channel less",
    "depth": "deeper than the claimed rollback",
}
"""What is wrong with a call that must be refused (``Reject.wrong``), in words."""


def describe(program: Program, step: int) -> str:
    """Step number ``step`` of the program: ``append 3 to a of 2 rows``, ``reject truncate a to 9``,
    ``reject append 1 to a of 2 rows, with one row alone``."""
    return _short(program.steps[step])


def outline(program: Program, steps: int | None = None) -> str:
    """The first ``steps`` steps in one line, equal ones together, and the sizes that they meet:
    ``append 17 to a, append 1 to a (3 times), truncate a to 5 (window 6)``."""
    parts, lengths, full = [], Lengths(), False
    for words, run in groupby(program.steps[:steps], _short):
        several = list(run)
        parts.append(f"{words} ({len(several)} times)" if len(several) > 1 else words)
        for step in several:
            full |= program.config.capacity in (lengths.apply(step) or ()) or isinstance(step, Reject)
    window, capacity = program.config.window, program.config.capacity
    sizes = [f"window {window}"] * (window is not None) + [f"capacity {capacity}"] * full
    return ", ".join(parts) + (f" ({', '.join(sizes)})" if sizes else "")


def _short(step: Step) -> str:
    call = called(step)
    words = NAMES[type(call)]
    match call:
        case Generate(seq, counts, new=new):
            words += f" {new} after {counts[0]} to {seq}"
        case Append(seq, counts) | UncachedForward(seq, counts):
            words += f" {counts[0] if len(set(counts)) == 1 else list(counts)} to {seq}"
        case Truncate(seq, length):
            words += f" {seq} to {length if isinstance(length, int) else list(length)}"
        case _:
            words += f" {call.seq}"
    if isinstance(call, Append | UncachedForward) and len(call.counts) > 1:
        words += f" of {len(call.counts)} rows"
    if isinstance(call, Append | UncachedForward) and call.context:
        words += f" in context {call.context}"
    if isinstance(step, Reject):
        return f"reject {words}" + (f", {WRONG[step.wrong]}" if step.wrong else "")
    return words


def described(program: Program) -> list[str]:
    """One line for each step of the program, with what its sequence holds before it and every option."""
    lengths, lines = Lengths(), []
    for step in program.steps:
        lines.append(_line(step, lengths.of(called(step).seq)))
        lengths.apply(step)
    return lines


def _line(step: Step, held: tuple[int, ...]) -> str:
    match step:
        case Reject(call, wrong):
            return f"must be refused{f', {WRONG[wrong]}' if wrong else ''}: {_line(call, held)}"
        case Append():
            holds = f"hold{'' if len(held) > 1 else 's'} {_equal(held)}" if any(held) else "is empty"
            return f"append {_tokens(step, 'to')}, which {holds}{_options(step)}"
        case Generate(new=new):
            tokens = f"{new} token{'s' if new > 1 else ''}"
            return f"generate {tokens} greedily after {_tokens(step, 'of')}{_options(step)}"
        case UncachedForward():
            return f"compute {_tokens(step, 'of')} without a cache{_options(step)}"
        case Truncate(seq):
            return f"truncate {seq}, which holds {_equal(held)}, to {_equal(step.lengths(len(held)))}"
        case Fork(seq, into):
            return f"fork {seq} to {into}"
        case AliasHandle(seq, into):
            return f"keep the handle of {seq} as {into}"
        case Reorder(seq, rows):
            return f"reorder {seq}: its rows become the old rows {_all(rows)}"
        case Poison(_, keys, values):
            return f"fill the slots that hold no token: keys with {keys}, values with {values}"
    return f"{NAMES[type(step)].replace('_', ' ')} {step.seq}"


def _tokens(step: Run, word: str) -> str:
    """``4 tokens of stream 17 to a``, ``1 token of streams 17, 18 to each row of a``."""
    equal = len(set(step.counts)) == 1
    rows = "" if len(step.counts) == 1 else "each row of " if equal else "the rows of "
    streams = [_stream(step, step.seed + row) for row in range(len(step.counts))]
    plural = "" if set(step.counts) == {1} else "s"
    content = f"(stream{'s' if rows else ''} {', '.join(streams)})"
    return f"{_equal(step.counts)} token{plural} {content} {word} {rows}{step.seq}"


def _options(step: Run) -> str:
    words = []
    for (row, seed), places in _groups(((row, seed), position) for row, position, seed in step.substitutions):
        words.append(f"; {_positions(places)} of row {row} from stream {_stream(step, seed)}")
    if isinstance(step, Append):
        if step.needle:
            seed, position = step.needle
            words.append(f"; queries point at the key at position {position} of stream {_stream(step, seed)}")
        for row, places in _groups(step.masked):
            words.append(f"; the mask hides {_positions(places)} of row {row}")
        if step.pad:
            side, seed = step.pad
            words.append(f"; columns without a token on the {side}, filled from stream {_stream(step, seed)}")
        words += [f"; inputs {step.layout}"] if step.layout != "contiguous" else []
        words += [f"; row {_all(step.nan)} holds NaN"] if step.nan else []
        words += ["; the caller then overwrites the inputs"] if step.reused else []
        words += ["; into the memory of the past"] if step.in_place else []
        words += ["; multiply-adds are counted"] if step.count_macs else []
    words += ["; only the last position's output"] if step.last_only else []
    words += [f"; in context {step.context}"] if step.context else []
    return "".join(words)


def _groups(pairs: Iterable[tuple[Key, int]]) -> Iterable[tuple[Key, list[int]]]:
    """Each key with its numbers."""
    found: dict[Key, list[int]] = {}
    for key, number in pairs:
        found.setdefault(key, []).append(number)
    return found.items()


def _positions(places: list[int]) -> str:
    consecutive = len(places) > 2 and places == list(range(places[0], places[-1] + 1))
    return f"position{'s' if len(places) > 1 else ''} {f'{places[0]} to {places[-1]}' if consecutive else _all(places)}"


def _stream(step: Run, seed: int) -> str:
    return f"{seed}{'' if step.distribution == 'normal' else f' ({step.distribution})'}"


def _equal(numbers: Iterable[int]) -> str:
    """One number where all are equal, otherwise all of them."""
    numbers = tuple(numbers)
    return str(numbers[0]) if len(set(numbers)) == 1 else _all(numbers)


def _all(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))
