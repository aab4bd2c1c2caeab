"""Visibility maps and known mistakes: the mask edits that predict every difference of the maps and no other, and tokens
of other rows or sequences that the maps show."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from kvconform.explain.diagnosis.edits import common
from kvconform.explain.diagnosis.mask_edits import MASK_EDITS, MaskEdit
from kvconform.explain.diagnosis.record import Leak, MapMatch
from kvconform.explain.visibility import BLIND, FORBIDDEN, SEES, Map
from kvconform_specs.claims import Claims
from kvconform_specs.config import Config

DEPTHS = (1, 2, 8)
"""Numbers of layers that are tried for a black box; in eight, masks compose to all that they ever reach."""
MIN_CELLS = 2
"""The least number of differences that a match must predict."""

Windows = Sequence[int | None]
"""The window of each layer, the first layer first."""


def matches(maps: Sequence[Map], config: Config, claims: Claims) -> list[MapMatch]:
    """The mask edits under which attention sees exactly what the maps of cached steps show."""
    cached = [one for one in maps if one.schedule != "full"]
    wrong = [one for one in cached if one.differences]
    if sum(len(one.differences) for one in wrong) < MIN_CELLS or any(_crossings(wrong)):
        return []
    layers = _layers(cached, config, claims)
    schedules = [one.schedule for one in wrong]
    return [
        MapMatch(
            words=edit.words,
            mistakes=[*edit.classes, *(edit.softcapped if config.softcap is not None else ())],
            schedules=schedules,
        )
        for edit in MASK_EDITS
        if any(all(_predicts(edit, one, windows, config) for one in cached) for windows in layers)
    ]


def named(found: Sequence[MapMatch]) -> frozenset[str]:
    """The mistakes that all matches may stand for."""
    return common(found) if found else frozenset()


def leak(maps: Sequence[Map]) -> Leak | None:
    """The rows or sequences that see each other's tokens, None where none do or no map shows it."""
    crossings = list(_crossings(one for one in maps if one.schedule == "sequences"))
    if any(query < key for query, key in crossings):
        return Leak(between="open sequences", mistakes=["C7"])
    if crossings:
        return Leak(between="earlier sequences", mistakes=["C6", "M6"])  # or unused slots that still hold their tokens
    if any(_crossings(maps)):
        return Leak(between="rows", mistakes=["H2", "H4"])  # rows and tokens are swapped, or an index is too large
    return None


def sees_later(maps: Sequence[Map]) -> bool:
    """Whether the backend's own uncached forward sees later tokens."""
    return any(
        kind == FORBIDDEN and key > query
        for one in maps
        if one.schedule == "full"
        for query, key, kind in one.differences
    )


def _crossings(maps: Iterable[Map]) -> Iterable[tuple[int, int]]:
    """The rows or sequences of an output and of a token that it sees, where these are two."""
    for one in maps:
        for query, key, kind in one.differences:
            mine, other = one.place(query)[0], one.place(key)[0]
            if kind == FORBIDDEN and mine != other:
                yield mine, other


def _layers(maps: Sequence[Map], config: Config, claims: Claims) -> list[Windows]:
    """The windows of the layers, as far as they are known: a black box has the window that its own forward shows."""
    if claims.reference == "definition":
        return [[config.window_of(layer) for layer in range(config.layers)]]
    reach, length = 1, 1
    for one in maps:
        each = len(one.wanted) // one.rows
        length = max(length, each)
        cells = (divmod(place, len(one.wanted)) for place, cell in enumerate("".join(one.wanted)) if cell == SEES)
        reach = max([reach, *(query - key + 1 for query, key in cells)])
    window = reach if reach < length else None
    return [(window,) * depth for depth in DEPTHS]


def _predicts(edit: MaskEdit, one: Map, windows: Windows, config: Config) -> bool:
    """Whether the map shows what attention with the edited mask in every layer sees."""
    size = sum(one.sizes)
    past = np.repeat([0, *accumulate(one.sizes)][:-1], one.sizes)
    count = np.repeat(one.sizes, one.sizes)
    sees: NDArray[np.bool_] = np.eye(size, dtype=bool)
    residual = np.eye(size, dtype=bool) & (config.profile != "attention")
    for window in windows:
        sees = (edit.mask(past, count, window) | residual) @ sees
    for query, (wanted, seen) in enumerate(zip(one.wanted, one.seen, strict=True)):
        row, position = one.place(query)
        for other in range(size):
            key = row * size + other
            if other == position and config.profile != "attention":
                continue  # a token's own query moves its output, whether it sees its own key or not
            known = wanted[key] in (SEES, BLIND) and seen[key] in (SEES, BLIND)
            if known and sees[position, other] != (seen[key] == SEES):
                return False
    return True
