"""What programs give a backend, as Python source: arrays as literals, the same tokens written once."""

from __future__ import annotations

import base64
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvconform.worker.execute import Feed, feeds_of
from kvconform_specs.program import Append, Call, Program, Reject, called
from kvconform_specs.tensors import malformed

Array = NDArray[Any]
WIDTH = 118
WRITTEN_OUT = 128
"""Arrays of more numbers are written as base64 of their bytes."""
REGENERATED = 20_000
"""Programs with more numbers than that are generated from their seeds, by the package that the target needs anyway."""
CHANGED = 2
"""An array that differs from another in no more tokens is written as a change of it."""
LETTERS = {"x": "tokens", "q": "queries", "k": "keys", "v": "values"}
"""What the inputs are called, and what they are cut from."""
LAYOUTS = {
    "transposed": ("return np.ascontiguousarray(x.swapaxes(-3, -2)).swapaxes(-3, -2) if x.ndim > 2 else x.T.copy().T",),
    "sliced": (
        "wide = np.full((*x.shape[:-1], 2 * x.shape[-1] + 1), 7, x.dtype)",
        "wide[..., 1::2] = x",
        "return wide[..., 1::2]",
    ),
    "expanded": ("return np.broadcast_to(x[:1], x.shape)",),
}
"""The layouts that are not dense (``program.LAYOUTS``): what a function of an array ``x`` does."""


@dataclass(frozen=True)
class Run:
    """A program in the file. ``tag`` tells the names of its arrays from those of other programs: ``x<tag><step>``.

    watched: the step whose inputs lie between guard bands; None: none does.
    """

    program: Program
    tag: str = ""
    watched: int | None = None

    def name(self, letter: str, step: int) -> str:
        return f"{letter}{self.tag}{step}"


# --- literals ---
def literal(x: Array) -> str:
    """An expression that gives the array back to the last bit."""
    dtype = f"np.{'bool_' if x.dtype == bool else x.dtype.name}"
    if x.size > WRITTEN_OUT:
        return f'raw("{base64.b64encode(np.ascontiguousarray(x).tobytes()).decode()}", {dtype}, {x.shape})'
    numbers = ", ".join(map(_number, x.ravel()))
    shape = f".reshape({', '.join(map(str, x.shape)) or '()'})" if x.ndim != 1 else ""
    line = f"np.array([{numbers}], {dtype}){shape}"
    return line if len(line) <= WIDTH - 20 else f"np.array([\n{filled(numbers)}\n], {dtype}){shape}"


def _number(n: Any) -> str:
    if isinstance(n, np.bool_ | np.integer):
        return str(n)
    if not np.isfinite(n):
        return "np.nan" if np.isnan(n) else f"{'-' if n < 0 else ''}np.inf"
    # a decimal that is nearly halfway between two float32 could be rounded twice on its way there
    return str(n) if n.dtype.type(float(str(n))) == n else repr(float(n))


def filled(text: str) -> str:
    """Indented lines of the file's width."""
    return textwrap.fill(
        text, WIDTH, initial_indent="    ", subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
    )


# --- inputs ---
def inputs(runs: Sequence[Run], seeded: bool) -> list[str]:
    """The lines that define what all steps are given. ``seeded``: large ones may be generated from their seeds."""
    fed = [_fed(run.program) for run in runs]
    if seeded and sum(x.size for feeds in fed for given, _keywords in feeds for x in given) > REGENERATED:
        return [line for run, feeds in zip(runs, fed, strict=True) for line in _regenerated(run, feeds)]
    given, joined = list(_given(runs, fed)), list(_joined(runs, fed))
    lines: list[str] = []
    sources: list[tuple[str, Array]] = []
    for letter, word in LETTERS.items():
        mine = [x for _name, its, x in given if its == letter]
        word = "states" if letter == "x" and mine and mine[0].dtype.kind == "f" else word
        whole = _wholes(mine, [x for its, x in joined if its == letter])
        named = [(f"{word}{number + 1 if number else ''}", x) for number, x in enumerate(whole)]
        for number, (name, x) in enumerate(named):
            lines += _changed(name, x, named[:number]) or [f"{name} = {literal(x)}"]
        sources += named
    return lines + list(_cut(given, sources))


def _cut(given: Sequence[tuple[str, str, Array]], sources: Sequence[tuple[str, Array]]) -> Iterator[str]:
    """Each input out of what it is cut from; query, key and value of one step on a line."""
    together: list[tuple[str, str, str]] = []
    written: list[tuple[str, Array]] = []
    for name, letter, x in given:
        places = ((source, _place(x, whole)) for source, whole in sources)
        source, place = next((found for found in places if letter in LETTERS and found[1] is not None), ("", None))
        if place is None:
            yield from _changed(name, x, written) or [f"{name} = {literal(x)}"]
            written.append((name, x))
            continue
        together.append((name, source, place))
        if letter in "xv":
            names, wholes, cuts = zip(*together, strict=True)
            if len(names) == 3 and len(set(cuts)) == 1:
                yield f"{', '.join(names)} = (x{place}.copy() for x in ({', '.join(wholes)}))"
            else:
                yield from (f"{name} = {source}{place}.copy()" for name, source, place in together)
            together = []
    yield from (f"{name} = {source}{place}.copy()" for name, source, place in together)


def _given(runs: Sequence[Run], fed: Sequence[list[Feed]]) -> Iterator[tuple[str, str, Array]]:
    """Name, letter and array of everything that steps are given, counts (``n``) and masks (``m``) included."""
    for run, feeds in zip(runs, fed, strict=True):
        for number, (arrays, keywords) in enumerate(feeds):
            for letter, x in zip(_letters(arrays), arrays, strict=True):
                yield run.name(letter, number), letter, x
            for letter, word in (("n", "counts"), ("m", "mask")):
                if word in keywords:
                    yield run.name(letter, number), letter, keywords[word]


def _joined(runs: Sequence[Run], fed: Sequence[list[Feed]]) -> Iterator[tuple[str, Array]]:
    """What each sequence is given in all, one append behind the other, where these have one shape."""
    for run, feeds in zip(runs, fed, strict=True):
        pieces: dict[tuple[str, str], list[Array]] = {}
        for step, (arrays, _keywords) in zip(run.program.steps, feeds, strict=True):
            if isinstance(step, Append):
                for letter, x in zip(_letters(arrays), arrays, strict=True):
                    pieces.setdefault((step.seq, letter), []).append(x)
        for (_seq, letter), parts in pieces.items():
            axis = _axis(parts[0])
            if len({x.shape[:axis] + x.shape[axis + 1 :] for x in parts}) == 1:
                yield letter, np.concatenate(parts, axis=axis)


def _changed(name: str, x: Array, known: Sequence[tuple[str, Array]]) -> list[str]:
    """The array as a copy of another one with a token or two that differ; nothing where there is none like it."""
    for other, y in known:
        if x.shape != y.shape or x.dtype != y.dtype or x.ndim < 2:
            continue
        axis = _axis(x)
        cells = np.moveaxis(x != y, axis, 1).reshape(x.shape[0], x.shape[axis], -1).any(axis=-1)
        places = np.argwhere(cells)
        if 0 < len(places) <= CHANGED and len(places) < cells.size:
            lines = [f"{name} = {other}.copy()"]
            for row, token in places:
                at = f"{row}, :, {token}" if axis == 2 else f"{row}, {token}"
                new = x[row, :, token] if axis == 2 else x[row, token]
                lines.append(f"{name}[{at}] = {literal(new) if new.ndim else _number(new)}  # another token")
            return lines
    return []


def _wholes(given: Sequence[Array], joined: Sequence[Array]) -> list[Array]:
    """The fewest arrays, largest first, that what is given is cut from, without those that are given once and whole."""
    kept: list[Array] = []
    for x in sorted((*joined, *given), key=lambda x: -x.size):
        if all(_place(x, y) is None for y in kept):
            kept.append(x)
    uses = [[place for y in given if (place := _place(y, x)) is not None] for x in kept]
    return [x for x, places in zip(kept, uses, strict=True) if places and places != [""]]


def _place(x: Array, whole: Array) -> str | None:
    """The index that cuts ``x`` out of an array, along its rows and its tokens; empty for all of it."""
    axis = _axis(x)
    if x.dtype != whole.dtype or x.ndim != whole.ndim or x.ndim < 2:
        return None
    b, t = x.shape[0], x.shape[axis]
    for row in range(whole.shape[0] - b + 1):
        for token in range(whole.shape[axis] - t + 1):
            cut = [slice(None)] * x.ndim
            cut[0], cut[axis] = slice(row, row + b), slice(token, token + t)
            if np.array_equal(whole[tuple(cut)], x):
                rows = ":" if b == whole.shape[0] else f"{row}:{row + b}"
                tokens = ":" if t == whole.shape[axis] else f"{token}:{token + t}"
                words = [rows, *[":"] * (axis - 1), tokens]
                return "" if set(words) == {":"} else f"[{', '.join(words)}]"
    return None


def _axis(x: Array) -> int:
    """That of the tokens: ``(b, h, t, d)`` or ``(b, t, ...)``."""
    return 2 if x.ndim == 4 else 1


def _regenerated(run: Run, feeds: Sequence[Feed]) -> Iterator[str]:
    """Where the numbers are too many to write out."""
    yield "from kvconform.worker.execute import feeds_of"
    yield "from kvconform_specs.program import Program"
    yield ""
    yield f"made = feeds_of(Program.from_json({run.program.to_json()!r}), (0,))"
    for number, (given, keywords) in enumerate(feeds):
        names = [run.name(letter, number) for letter in _letters(given)]
        if names:
            yield f"{', '.join(names)}{',' if len(names) == 1 else ''} = (x[0] for x in made[{number}][0])"
        for letter, word in (("n", "counts"), ("m", "mask")):
            if word in keywords:
                yield f'{run.name(letter, number)} = made[{number}][1]["{word}"]'


def _fed(program: Program) -> list[Feed]:
    """What each step hands over, of variant 0, malformed where it must be refused for that."""
    fed: list[Feed] = []
    for step, (given, keywords) in zip(program.steps, feeds_of(program, (0,)), strict=True):
        one = tuple(x[0] for x in given)
        wrong = step.wrong if isinstance(step, Reject) and isinstance(step.step, Append) else ""
        fed.append((malformed(one, wrong, program.config) if wrong else one, keywords))
    return fed


def _letters(given: Sequence[Any]) -> str:
    return {0: "", 1: "x", 3: "qkv"}[len(given)]


def layouts(runs: Sequence[Run]) -> list[list[str]]:
    """Functions that lay inputs out in memory, as far as the programs ask for it."""
    asked = {layout_of(called(step)) for run in runs for step in run.program.steps} - {"contiguous"}
    return [[f"def {layout}(x):", *(f"    {line}" for line in LAYOUTS[layout])] for layout in sorted(asked)]


def layout_of(step: Call) -> str:
    return step.layout if isinstance(step, Append) else "contiguous"
