"""Explanation by edits: wrong outputs that equal what the reference gives on other tokens than it should see.

An edit is a mistake in what the cache holds (a reset that is ignored) or in what the mask shows of it (the newest
cached token is hidden). Each is followed through the program of a probe, and the reference is computed on the tokens
that result: the definition with the resulting mask, or a black box's own forward on the tokens that remain. An edit
matches if it gives every wrong output of the probes that it changes, within the bounds.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvconform.explain.diagnosis.cache_edits import CACHE_EDITS, CachedRow, CacheEdit, CacheModel, views
from kvconform.explain.diagnosis.mask_edits import MASK_EDITS, Flags, MaskEdit
from kvconform.explain.diagnosis.record import EditMatch, MapMatch
from kvconform.explain.diagnosis.symptoms import OutputCell, Symptom
from kvconform.judging.observed import Array
from kvconform_specs.claims import Claims, changes_at
from kvconform_specs.config import Config
from kvconform_specs.history import context_of, epoch_of
from kvconform_specs.program import Append
from kvconform_specs.reference import bounds
from kvconform_specs.reference.definition import Attended, attention, decoder
from kvconform_specs.reference.oracle import ReferenceForward, given
from kvconform_specs.tensors import Streams, weights

Edit = CacheEdit | MaskEdit
EDITS: tuple[Edit, ...] = (*MASK_EDITS, *CACHE_EDITS)
MIN_SHARE = 0.5
"""The least share of the wrong outputs that a match must give to name a mistake."""
MIN_OUTPUTS = 2
"""The least number of different wrong outputs that a match must give."""
NEAR = 100.0
"""An edited output that is farther than so many bounds of the right one is no match; nearer, its own bound is computed,
which takes long."""


def matches(
    symptoms: Sequence[Symptom], config: Config, claims: Claims, own: ReferenceForward | None
) -> list[EditMatch]:
    """The edits that match, the largest share first. Raises WorkerDied where a black box's own forward ends its
    process."""
    known = [one for one in symptoms if _known(one)]
    if not any(True for one in known for _ in _cells(one, wrong=True)):
        return []
    reference = _EditedReference(config, claims, own, max(one.probe.program.span for one in known) + 1)
    found = [match for edit in EDITS if (match := _match(edit, known, reference)) is not None]
    return sorted(found, key=lambda one: (-one.share, not one.right_too))


def named(found: Sequence[EditMatch]) -> frozenset[str]:
    """The mistakes that all of the best matches may stand for."""
    best = [one for one in found if (one.share, one.right_too) == (found[0].share, found[0].right_too)]
    return common(best) if best and best[0].share >= MIN_SHARE else frozenset()


def common(found: Iterable[EditMatch | MapMatch]) -> frozenset[str]:
    """The mistakes that all of the matches may stand for."""
    return frozenset.intersection(*(frozenset(one.mistakes) for one in found))


def _known(one: Symptom) -> bool:
    """Whether a program has no caller's mask and no needle, which edits do not know."""
    return not any(isinstance(step, Append) and (step.masked or step.needle) for step in one.probe.program.steps)


def _cells(one: Symptom, wrong: bool, first: bool = False) -> list[OutputCell]:
    """The outputs that are numbers, the latest first: histories of the earlier ones are prefixes of theirs."""
    return [
        cell
        for cell in reversed(one.cells)
        if cell.wrong == wrong and one.outputs[cell.step] is not None and (cell.first or not first)
    ]


def _match(edit: Edit, symptoms: Sequence[Symptom], reference: _EditedReference) -> EditMatch | None:
    """None where the edit gives another output than a wrong one that it changes."""
    first = reference.own is not None and isinstance(edit, MaskEdit)  # the later contents of its cache are not known
    reached: list[_Followed] = []
    outputs, wrong, distinct = 0, 0, set[bytes]()
    lasting = edit.model() if isinstance(edit, CacheEdit) and edit.across_programs else None
    for one in symptoms:
        followed = _Followed(edit, one, reference, lasting)
        cells = [cell for cell in _cells(one, True, first) if followed.within(cell)]
        wrong += len(cells)
        if not any(map(followed.differs, cells)):
            continue
        if not all(map(followed.gives, cells)):
            return None
        reached.append(followed)
        outputs += len(cells)
        distinct |= {followed.output(cell)[0].tobytes() for cell in cells}
    if len(distinct) < MIN_OUTPUTS:
        return None
    right = all(one.gives(cell) for one in reached for cell in _cells(one.symptom, False, first) if one.within(cell))
    return EditMatch(
        words=edit.words,
        mistakes=_mistakes(edit, reference.config, reference.claims),
        matched=outputs,
        wrong=wrong,
        first_only=first,
        right_too=right,
    )


def _mistakes(edit: Edit, config: Config, claims: Claims) -> list[str]:
    """A wrong truncation (C8) may also be one of evicted tokens (C9) or of pages (G1)."""
    others = {"C9": config.window is not None, "G1": claims.can("pages")}
    return [*edit.classes, *(name for name, possible in others.items() if possible and "C8" in edit.classes)]


class _Followed:
    """One edit on one probe."""

    def __init__(self, edit: Edit, symptom: Symptom, reference: _EditedReference, lasting: CacheModel | None) -> None:
        self.edit, self.symptom, self.reference = edit, symptom, reference
        self.rights = self.views = views(symptom.probe.program, CacheModel())
        if isinstance(edit, CacheEdit):
            self.views = views(symptom.probe.program, lasting or edit.model())

    def output(self, cell: OutputCell) -> tuple[Array, Array]:
        """What the backend gave, and its bound."""
        kept = self.symptom.outputs[cell.step]
        assert kept is not None
        return kept[0][cell.row, cell.column], kept[1][cell.row, cell.column]

    def within(self, cell: OutputCell) -> bool:
        """Whether the history is no longer than a model may allow."""
        view = self.views[cell.step]
        config = self.reference.config
        return config.profile == "attention" or view is None or len(view[cell.row]) <= config.capacity

    def differs(self, cell: OutputCell) -> bool:
        """Whether the output sees other tokens under the edit."""
        view, right = self.views[cell.step], self.rights[cell.step]
        if view is None or right is None:
            return False
        if isinstance(self.edit, CacheEdit):
            return [token for token, *_ in view[cell.row]] != [token for token, *_ in right[cell.row]]
        place, row, config = cell.facts["position"], right[cell.row], self.reference.config
        windows = {config.window_of(layer) for layer in range(max(config.layers, 1))}
        return any(bool(self.edit.changed(row, window)[: place + 1].any()) for window in windows)

    def gives(self, cell: OutputCell) -> bool:
        """Whether the edit gives this output, within the bounds."""
        view, right = self.views[cell.step], self.rights[cell.step]
        if view is None or right is None:
            return False
        row = view[cell.row]
        place = len(row) - (len(right[cell.row]) - cell.facts["position"])
        if place < 0:
            return False
        mask = self.edit if isinstance(self.edit, MaskEdit) else None
        if self.reference.own is not None and mask is not None:
            seen = np.flatnonzero(mask.seen(row, self.reference.config.window)[place])
            if not len(seen) or seen[-1] != place:
                return False  # an uncached forward cannot hide the token itself, or show later ones
            mask, row, place = None, tuple(row[j] for j in seen), len(seen) - 1
        (got, bound), edited = self.output(cell), self.reference.of(mask, row)
        error = np.abs(got - edited.value[place])
        near = bool(np.all(error <= NEAR * np.max(bound)))
        return near and bool(np.all(error <= edited.bound()[place]))


@dataclass(frozen=True)
class _Outputs:
    """The outputs and bounds of a row's tokens, ``(s, e)``."""

    value: Array
    bound: Callable[[], Array]


class _EditedReference:
    """What the reference gives on edited rows."""

    def __init__(self, config: Config, claims: Claims, own: ReferenceForward | None, span: int) -> None:
        self.config, self.claims, self.own = config, claims, own
        self.streams = Streams(config, span, (0,))
        self._given: dict[MaskEdit | None, dict[CachedRow, _Outputs]] = defaultdict(dict)

    def of(self, edit: MaskEdit | None, row: CachedRow) -> _Outputs:
        """The outputs of a row under an edited mask, or under the right one. A longer row serves its prefixes, too,
        unless the newest tokens of a row have another precision."""
        known = self._given[edit]
        found = known.get(row)
        if found is None and not self.claims.precision.by_length:
            changes = changes_at(self.config, self.claims)
            epoch = epoch_of(len(row), changes)
            same = [longer for longer in known if epoch_of(len(longer), changes) == epoch]
            found = next((known[longer] for longer in same if longer[: len(row)] == row), None)
        if found is None:
            seen = None if edit is None else edit.seen
            contents = self.streams.row([token for token, _past, _count in row])  # (1, s, ...)
            context = context_of(tuple(token for token, _past, _count in row))
            made: tuple[Array, Callable[[], Array]]
            if self.own is not None:
                inputs: Any = contents[:, None]
                numbers = given(self.config, self.own, inputs, context=context)
                made = numbers("value")[0, 0], lambda: np.asarray(numbers("bound")[0, 0])
            elif self.config.profile == "attention":
                made = self._attended(contents, row, seen)
            else:
                made = self._decoded(contents, row, seen, context)
            found = known[row] = _Outputs(made[0], cache(made[1]))
        return found

    def _attended(
        self, contents: NDArray[np.generic], row: CachedRow, seen: Callable[..., Flags] | None
    ) -> tuple[Array, Callable[[], Array]]:
        query, keys, values = (part[0].astype(np.float64) for part in self.streams.split(contents))
        attended, config = _attend(row, seen, query, keys, values, self.config)
        precision = self.claims.precision
        exact = len(row) - precision.residual if precision.residual else None
        bound = bounds.attention_bound(query, keys, values, attended, config, precision, biased=True, exact_from=exact)
        return _flat(attended.output), lambda: _flat(bound)

    def _decoded(
        self, contents: NDArray[np.generic], row: CachedRow, seen: Callable[..., Flags] | None, context: int
    ) -> tuple[Array, Callable[[], Array]]:
        ids, attend = np.asarray(contents[0], np.int64), lambda *inputs, **how: _attend(row, seen, *inputs, **how)[0]
        exact = {name: value.astype(np.float64) for name, value in weights(self.config).items()}
        run = partial(decoder, ids, config=self.config, attend=attend, context=context)
        value = run(weights=exact)

        def bound() -> Array:
            noise = bounds.Noisy(bounds.STORAGE[self.config.dtype], seed=len(ids))
            rough = bounds.single(exact)
            strays = [bounds.deviation(run(weights=rough, how=noise), value) for _ in range(bounds.RUNS)]
            return bounds.decoder_bound(strays, bounds.RUNS, noise.gain)

        return value, bound


def _attend(
    row: CachedRow,
    seen: Callable[..., Flags] | None,
    query: Array,
    keys: Array,
    values: Array,
    config: Config,
    *,
    layer: int = 0,
    **how: object,
) -> tuple[Attended, Config]:
    """The definition's attention under the edited mask."""
    if seen is None:
        return attention(query, keys, values, config, layer=layer, **how), config  # type: ignore[arg-type]
    wide = replace(config, window=None, window_every=1)
    mask = seen(row, config.window_of(layer))
    # at=len(row): the definition's own causal mask hides nothing; a bias by distance moves equally for every key
    return attention(query, keys, values, wide, layer=layer, at=len(row), mask=mask, **how), wide  # type: ignore[arg-type]


def _flat(x: Array) -> Array:
    """``(h, s, d)`` to ``(s, h * d)``."""
    return np.asarray(x.swapaxes(0, 1).reshape(x.shape[1], -1))
