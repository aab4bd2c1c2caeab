"""Explanation by history: bad outputs that are what the truth gives on other tokens than those that count.

An *edit* is a mistake in what is remembered (a reset that is ignored) or in what is seen of it (the newest cached
token is not). Each is followed through a probe's program, and the truth is asked on the history that results: the
definition with the sight that results, or a black box's own forward on the tokens that are left. Where one edit gives
every bad output within the bounds, the tokens are what is wrong, and it is known which.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvconform.explain.diagnosis.cache_edits import MEMORIES, Memory, MemoryEdit, Token, remembered
from kvconform.explain.diagnosis.mask_edits import SIGHTS, Flags, SightEdit
from kvconform.explain.diagnosis.probes import SEEN, changes
from kvconform.explain.diagnosis.symptoms import Cell, Symptom
from kvconform.judging.observed import Array
from kvconform_specs.claims import Claims
from kvconform_specs.config import Config
from kvconform_specs.program import Append
from kvconform_specs.reference import bounds
from kvconform_specs.reference.definition import Attended, attention, decoder
from kvconform_specs.reference.oracle import ReferenceForward, given
from kvconform_specs.tensors import Streams, weights

Edit = MemoryEdit | SightEdit
EDITS: tuple[Edit, ...] = (*SIGHTS, *MEMORIES)
MIN_SHARE = 0.5
"""Explanations of at least this share of the bad outputs name a class."""
LEAST = 2
"""So many different bad outputs must be explained, at least."""
NEAR = 100.0
"""The bound of an edited output is computed where it is no farther than so many bounds of the right one: it is of that
size, and takes long."""


@dataclass(frozen=True)
class Explanation:
    """``edit`` gives ``outputs`` of the ``off`` bad outputs: all of those in the probes that it can change. first: only
    the first bad outputs of each sequence are counted. right: the good outputs of these probes are what it gives, too.
    """

    edit: Edit
    outputs: int
    off: int
    first: bool
    right: bool

    @property
    def share(self) -> float:
        return self.outputs / self.off

    @property
    def words(self) -> str:
        if self.share == 1:
            return f"every {'first ' * self.first}bad output is what the truth gives {self.edit.words}"
        which = f"{self.outputs} of {self.off}{' first' * self.first} bad outputs"
        return f"{which} are what the truth gives {self.edit.words}, all that this can change"


def explanations(
    symptoms: Sequence[Symptom], config: Config, claims: Claims, own: ReferenceForward | None
) -> list[Explanation]:
    """Those that hold, the widest first. Raises WorkerDied where a black box's own forward does."""
    asked = [one for one in symptoms if _plain(one)]
    if not any(True for one in asked for _ in _cells(one, "bad")):
        return []
    truth = _Truth(config, claims, own, max(one.probe.program.span for one in asked) + 1)
    found = [made for edit in EDITS if (made := _explained(edit, asked, truth)) is not None]
    return sorted(found, key=lambda one: (-one.share, not one.right))


def kinds(found: Sequence[Explanation]) -> frozenset[str]:
    """The classes of mistakes that all of the best explanations may stand for."""
    best = [
        one for one in found if one.share >= MIN_SHARE and (one.share, one.right) == (found[0].share, found[0].right)
    ]
    return frozenset.intersection(*(frozenset(one.edit.classes) for one in best)) if best else frozenset()


def _plain(one: Symptom) -> bool:
    """Whether no caller's mask and no needle are in a program: edits do not know them."""
    return not any(isinstance(step, Append) and (step.masked or step.needle) for step in one.probe.program.steps)


def _cells(one: Symptom, status: str, first: bool = False) -> list[Cell]:
    """The outputs of that status that are numbers, the latest first: other histories are the beginnings of theirs."""
    return [
        cell
        for cell in reversed(one.cells)
        if cell.status == status and one.outputs[cell.step] is not None and (cell.first or not first)
    ]


def _explained(edit: Edit, symptoms: Sequence[Symptom], truth: _Truth) -> Explanation | None:
    """None where a bad output is another one than the edit gives."""
    first = truth.alone and isinstance(edit, SightEdit)  # what a black box has cached since is not known
    reached: list[_Followed] = []
    outputs, off, distinct = 0, 0, set[bytes]()
    lasting = edit.memory() if isinstance(edit, MemoryEdit) and edit.lasting else None
    for one in symptoms:
        followed = _Followed(edit, one, truth, lasting)
        if lasting is not None and one.probe.name == SEEN:  # as ``examination.examine`` has run them
            for program in (*(program for _position, program in changes(one.probe)), one.probe.program):
                remembered(program, lasting)
        bad = [cell for cell in _cells(one, "bad", first) if followed.within(cell)]
        off += len(bad)
        if not any(map(followed.differs, bad)):
            continue
        if not all(map(followed.gives, bad)):
            return None
        reached.append(followed)
        outputs += len(bad)
        distinct |= {followed.output(cell)[0].tobytes() for cell in bad}
    if len(distinct) < LEAST:
        return None
    right = all(one.gives(cell) for one in reached for cell in _cells(one.symptom, "ok", first) if one.within(cell))
    return Explanation(edit, outputs, off, first, right)


class _Followed:
    """One edit on one probe."""

    def __init__(self, edit: Edit, symptom: Symptom, truth: _Truth, lasting: Memory | None) -> None:
        self.edit, self.symptom, self.truth = edit, symptom, truth
        self.rights = self.views = remembered(symptom.probe.program, Memory())
        if isinstance(edit, MemoryEdit):
            self.views = remembered(symptom.probe.program, lasting or edit.memory())

    def output(self, cell: Cell) -> tuple[Array, Array]:
        """What the backend gave, and its bound."""
        kept = self.symptom.outputs[cell.step]
        assert kept is not None
        return kept[0][cell.row, cell.column], kept[1][cell.row, cell.column]

    def within(self, cell: Cell) -> bool:
        """Whether the history is no longer than a model may allow."""
        view = self.views[cell.step]
        config = self.truth.config
        return config.profile == "attention" or view is None or len(view[cell.row]) <= config.capacity

    def differs(self, cell: Cell) -> bool:
        """Whether the output sees other tokens under the edit."""
        view, right = self.views[cell.step], self.rights[cell.step]
        if view is None or right is None:
            return False
        if isinstance(self.edit, MemoryEdit):
            return [token for token, *_ in view[cell.row]] != [token for token, *_ in right[cell.row]]
        place, row, config = cell.facts["position"], right[cell.row], self.truth.config
        windows = {config.window_of(layer) for layer in range(max(config.layers, 1))}
        return any(
            bool((self.edit.seen(row, window) != self.edit.right(row, window))[: place + 1].any()) for window in windows
        )

    def gives(self, cell: Cell) -> bool:
        """Whether the edit gives this output, within the bounds."""
        view, right = self.views[cell.step], self.rights[cell.step]
        if view is None or right is None:
            return False
        row = view[cell.row]
        place = len(row) - (len(right[cell.row]) - cell.facts["position"])
        if place < 0:
            return False
        sight = self.edit if isinstance(self.edit, SightEdit) else None
        if self.truth.alone and sight is not None:
            seen = np.flatnonzero(sight.seen(row, self.truth.config.window)[place])
            if not len(seen) or seen[-1] != place:
                return False  # its own forward sees the token itself, and none after it
            sight, row, place = None, tuple(row[j] for j in seen), len(seen) - 1
        (got, bound), edited = self.output(cell), self.truth.of(sight, row)
        error = np.abs(got - edited.value[place])
        near = bool(np.all(error <= NEAR * np.max(bound)))
        return near and bool(np.all(error <= edited.bound()[place]))


@dataclass(frozen=True)
class _Numbers:
    """Of each token of a history, ``(s, e)``."""

    value: Array
    bound: Callable[[], Array]


class _Truth:
    """What the truth gives on edited histories."""

    def __init__(self, config: Config, claims: Claims, own: ReferenceForward | None, span: int) -> None:
        self.config, self.claims, self.own = config, claims, own
        self.alone = own is not None  # it cannot be told what to see
        self.streams = Streams(config, span, (0,))
        self._given: dict[SightEdit | None, dict[tuple[Token, ...], _Numbers]] = defaultdict(dict)

    def of(self, edit: SightEdit | None, row: tuple[Token, ...]) -> _Numbers:
        """Of a row that is seen as the edit says, or as it must be."""
        known, alike = self._given[edit], self.claims.precision.residual == 0
        found = known.get(row)
        if found is None and alike:
            found = next((its for longer, its in known.items() if longer[: len(row)] == row), None)
        if found is None:
            seen = None if edit is None else edit.seen
            contents = self.streams.row([token for token, _past, _count in row])  # (1, s, ...)
            made: tuple[Array, Callable[[], Array]]
            if self.alone:
                inputs: Any = contents[:, None]
                numbers = given(self.config, self.own, inputs)
                made = numbers("value")[0, 0], lambda: np.asarray(numbers("bound")[0, 0])
            elif self.config.profile == "attention":
                made = self._attended(contents, row, seen)
            else:
                made = self._decoded(contents, row, seen)
            found = known[row] = _Numbers(made[0], cache(made[1]))
        return found

    def _attended(
        self, contents: NDArray[np.generic], row: tuple[Token, ...], seen: Callable[..., Flags] | None
    ) -> tuple[Array, Callable[[], Array]]:
        query, keys, values = (part[0].astype(np.float64) for part in self.streams.split(contents))
        attended, config = _attend(row, seen, query, keys, values, self.config)
        precision = self.claims.precision
        exact = len(row) - precision.residual if precision.residual else None
        bound = bounds.attention_bound(query, keys, values, attended, config, precision, biased=True, exact_from=exact)
        return _flat(attended.output), lambda: _flat(bound)

    def _decoded(
        self, contents: NDArray[np.generic], row: tuple[Token, ...], seen: Callable[..., Flags] | None
    ) -> tuple[Array, Callable[[], Array]]:
        ids, attend = np.asarray(contents[0], np.int64), lambda *inputs, **how: _attend(row, seen, *inputs, **how)[0]
        exact = {name: value.astype(np.float64) for name, value in weights(self.config).items()}
        run = partial(decoder, ids, config=self.config, attend=attend)
        value = run(weights=exact)

        def bound() -> Array:
            noise = bounds.Noisy(bounds.STORAGE[self.config.dtype], seed=len(ids))
            rough = bounds.single(exact)
            strays = [bounds.stray(run(weights=rough, how=noise), value) for _ in range(bounds.RUNS)]
            return bounds.decoder_bound(strays, bounds.RUNS, noise.gain)

        return value, bound


def _attend(
    row: tuple[Token, ...],
    seen: Callable[..., Flags] | None,
    query: Array,
    keys: Array,
    values: Array,
    config: Config,
    *,
    layer: int = 0,
    **how: object,
) -> tuple[Attended, Config]:
    """The definition's attention, where each query sees what the edit says."""
    if seen is None:
        return attention(query, keys, values, config, layer=layer, **how), config  # type: ignore[arg-type]
    wide = replace(config, window=None, window_every=1)
    mask = seen(row, config.window_of(layer))
    # queries beyond the last token see all that the mask shows; a bias by distance is off by the same for every key
    return attention(query, keys, values, wide, layer=layer, at=len(row), mask=mask, **how), wide  # type: ignore[arg-type]


def _flat(x: Array) -> Array:
    """``(h, s, d)`` to ``(s, h * d)``."""
    return np.asarray(x.swapaxes(0, 1).reshape(x.shape[1], -1))
