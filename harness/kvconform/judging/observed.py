"""What the relations look at: a program with what was done and what had to be, and how they name a place in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvconform.judging.mismatch import Kind, Mismatch
from kvconform.worker.execute import Trace
from kvconform_specs.claims import Claims, changes_at
from kvconform_specs.describe import describe
from kvconform_specs.history import Request, epoch_of, requests
from kvconform_specs.program import Append, Program, ReadCache
from kvconform_specs.reference.oracle import Expected

Array = NDArray[Any]


@dataclass(frozen=True)
class Checked:
    """What one relation found: the first mismatch or None, how many numbers were compared, and the largest error as a
    fraction of its bound, where the relation has bounds."""

    mismatch: Mismatch | None
    compared: int
    worst: float | None = None


@dataclass(frozen=True)
class Observed:
    """One program of a case: what was done and what had to be, all variants stacked.

    ``outputs[i]`` is ``(n, b, t, e)`` as in ``oracle.Expected``, None where step ``i`` computes nothing. index: of the
    program in its case.
    """

    program: Program
    trace: Trace
    expected: Sequence[Expected | None]
    outputs: Sequence[Array | None]
    claims: Claims
    index: int = 0

    def want(self, number: int) -> Expected:
        expected = self.expected[number]
        assert expected is not None
        return expected

    def got(self, number: int) -> Array:
        output = self.outputs[number]
        assert output is not None
        return output

    def computed(self) -> list[int]:
        """The steps that have outputs."""
        return [number for number, output in enumerate(self.outputs) if output is not None]

    def reads(self) -> list[int]:
        """The steps that read the cache and whose contents are known: those of the attention profile."""
        steps = enumerate(self.program.steps)
        return [number for number, step in steps if isinstance(step, ReadCache) and self.expected[number] is not None]

    # --- mismatches ---
    def place(self, step: int, row: int | None = None, column: int | None = None) -> dict[str, Any]:
        """The fields of a ``Place``: a step, a row, and a token among the step's outputs."""
        found = {"program": self.index, "step": step, "call": describe(self.program, step), "row": row}
        if row is not None and column is not None:
            want = self.want(step)
            later = int(np.count_nonzero(want.real[row, column:]))  # tokens of the step from this column on
            found |= {"column": column, "position": len(want.rows[row]) - later}
        return found

    def at_step(self, kind: Kind, step: int, **facts: Any) -> Mismatch:
        return Mismatch(kind=kind, **{**self.place(step), **facts})

    def at_output(self, kind: Kind, place: tuple[int, int, int], element: int, **facts: Any) -> Mismatch:
        """``place``: step, row and column; ``element``: among all numbers of that output."""
        c = self.program.config
        if c.profile == "attention":
            part: dict[str, Any] = {"part": "head", "head": element // c.head_dim, "element": element % c.head_dim}
        else:
            part = {"part": "logit" if c.profile == "decoder" else "channel", "element": element}
        return Mismatch(kind=kind, **self.place(*place), **part, **facts)

    def at_read(self, kind: Kind, place: tuple[int, int, int], element: int, **facts: Any) -> Mismatch:
        """``place``: step, row and position; ``element``: among all numbers that a read shows of a token."""
        c, (step, row, position) = self.program.config, place
        number, within = divmod(element, c.kept // len(c.caching))
        first = c.latent or c.kv_heads * c.head_dim  # of keys, or of the latent
        size = c.head_dim if not c.latent else c.latent if within < first else c.rotary_dim
        head, index = divmod(within if within < first else within - first, size)
        part = {"layer": c.caching[number], "part": ("key", "value")[within >= first], "head": head, "element": index}
        return self.at_step(kind, step, row=row, position=position, **part, **facts)


# --- where outputs are ---
Key = Request
"""What an output is a function of: a request whose row ends with its token."""


def cells(one: Observed, number: int) -> list[tuple[int, int, Key]]:
    """Row, column within the step's outputs, and key of each output of a step."""
    want, step = one.want(number), one.program.steps[number]
    found: list[tuple[int, int, Key]] = []
    changes = changes_at(one.program.config, one.claims)
    for row, (tokens, needle, masked, _epoch) in enumerate(requests(step, want.rows)):
        start, epoch = len(tokens) - want.counts[row], epoch_of(len(tokens), changes)
        columns = np.flatnonzero(want.real[row]).tolist()
        found += [(row, c, Request(tokens[: start + p + 1], needle, masked, epoch)) for p, c in enumerate(columns)]
    return found


def located(one: Observed) -> dict[Key, tuple[int, int, int]]:
    """Step, row and column of each output, by its key."""
    return {key: (number, row, column) for number in one.computed() for row, column, key in cells(one, number)}


def pairs(observed: Sequence[Observed]) -> list[tuple[Observed, Observed, int, int, int, bool]]:
    """Each output of the base and the one at the same place of each other program; ``same``: their history is."""
    base, c = observed[0], observed[0].program.config
    # how far a black box's layers see is its own affair
    known = c.window is not None and observed[0].claims.reference == "definition"
    windowed = known and all(c.window_of(layer) is not None for layer in range(c.layers))
    reach = c.layers * ((c.window or 0) - 1) + 1 if windowed else None
    found = []
    for other in observed[1:]:
        for number in base.computed():
            for (row, column, key), (_r, _c, its) in zip(cells(base, number), cells(other, number), strict=True):
                found.append((base, other, number, row, column, _felt(key, reach) == _felt(its, reach)))
    return found


def _felt(key: Key, reach: int | None) -> Key:
    """The part of a history that an output can depend on: each layer reaches ``window - 1`` tokens further back."""
    return key if reach is None else key._replace(row=key.row[-reach:])


def ratio(error: Array, bound: Array) -> float:
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.nanmax(np.where(error == 0, 0.0, error / bound), initial=0.0))


def changed(base: Observed, other: Observed) -> dict[str, Any]:
    """The fields of a ``Mismatch`` about what differs between two programs."""
    for mine, its in zip(base.program.steps, other.program.steps, strict=True):
        if isinstance(its, Append) and isinstance(mine, Append):
            if its.substitutions != mine.substitutions:
                row, position, _seed = its.substitutions[-1]
                return {"change": "token", "changed_row": row, "changed_position": position}
            if its.pad != mine.pad:
                return {"change": "padding"}
            if (its.nan, its.distribution) != (mine.nan, mine.distribution):
                return {"change": "nan"}
            if its.reused != mine.reused:
                return {"change": "reused"}
    return {"change": "other"}
