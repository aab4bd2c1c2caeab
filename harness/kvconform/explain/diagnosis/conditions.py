"""Conditions: what separates the wrong outputs of the probes from the right ones, in as few predicates as possible."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from kvconform.explain.diagnosis.record import Condition
from kvconform.explain.diagnosis.symptoms import EARLIER_PROGRAM, Facts, OutputCell
from kvconform_specs.config import Config

Flags = NDArray[np.bool_]
NEAR = 0.8
"""The least share of a condition that does not separate exactly: outputs that are wrong and meet it, of all that are
wrong or meet it. Below ``NEARLY_ALL``, no more than the rest of the right outputs may meet it."""
NEARLY_ALL = 0.9
"""From this share of wrong outputs on, no condition is looked for."""
WORTH = 0.03
"""How much larger the share of two predicates must be than that of one, where neither separates exactly."""
HISTORY = (
    "after a reset",
    "after a truncation",
    "after a fork",
    "copy of a fork",
    "after an older handle",
    "copy of an older handle",
    "after a reorder",
    "after another sequence",
    "after a refused call",
    "after poison",
    EARLIER_PROGRAM,
)
"""What a sequence may have gone through: names of facts, and predicates."""
FLAGS = {
    "different counts": "with rows that grow by different counts",
    "different lengths": "with rows of different lengths",
    "left padding": "with padding on the left",
    "full": "at the capacity",
    "mask": "with a caller's mask",
    "layout": "with inputs that are not contiguous",
    "large_queries": "with large scores",
    "zero_keys": "with keys that are zero",
    "small_keys_large_values": "with small keys and large values",
    "in place": "with a present that shares the memory of the past",
    "last only": "where only the last position is returned",
    "first token of the step": "at the first token of the step",
    "last token of the step": "at the last token of the step",
}
"""Other facts, and their predicates."""
ABSENT = {
    "longest": "in rows that are not the longest",
    "first token of the step": "after the first token of the step",
    "last token of the step": "before the last token of the step",
}
"""Facts whose absence is a predicate."""


def condition(cells: Sequence[OutputCell], config: Config, left_out: frozenset[str] = frozenset()) -> Condition | None:
    """The smallest one, of one predicate or two, none of them ``left_out``; None where none comes near."""
    wrong = sum(cell.wrong for cell in cells)
    if not wrong:
        return None
    found = _separating(cells, config, left_out, False)
    if found.exact:
        return found
    if NEARLY_ALL <= wrong / len(cells) < 1:
        right = len(cells) - wrong
        return Condition(predicates=[], wrong=wrong, right=right, wrong_met=wrong, right_met=right)
    first = _separating([cell for cell in cells if not cell.wrong or cell.first], config, left_out, True)
    if first.exact:
        return first
    near = max(found, first, key=_share)
    share = _share(near)
    separates = share >= NEARLY_ALL or (share >= NEAR and near.right_met <= (1 - NEAR) * near.right)
    return near if near.predicates and separates else None


def _separating(cells: Sequence[OutputCell], config: Config, left_out: frozenset[str], first_only: bool) -> Condition:
    """The best of one predicate or two."""
    wrong = np.array([cell.wrong for cell in cells])

    def made(predicates: Sequence[str], met: Flags) -> Condition:
        return Condition(
            predicates=list(predicates),
            wrong=int(wrong.sum()),
            right=int((~wrong).sum()),
            wrong_met=int((met & wrong).sum()),
            right_met=int((met & ~wrong).sum()),
            first_only=first_only,
        )

    best = made((), np.ones(len(cells), bool))
    if best.exact:
        return best
    flags = [
        (words, np.array([holds(cell.facts) for cell in cells], bool))
        for words, holds in _predicates(config)
        if words not in left_out
    ] + list(_thresholds(cells, wrong))
    best = made((), np.zeros(len(cells), bool))
    for words, met in flags:
        best = max(best, made((words,), met), key=_share)
        if best.exact:
            return best
    least = _share(best) + WORTH
    for (one, met), (other, also) in combinations(flags, 2):
        pair = made((one, other), met & also)
        if pair.exact:
            return pair
        if _share(pair) > max(_share(best), least):
            best = pair
    return best


def _share(found: Condition) -> float:
    return found.wrong_met / (found.wrong + found.right_met)


def _predicates(config: Config) -> Iterator[tuple[str, Callable[[Facts], bool]]]:
    """What may hold of an output, the plainest first."""

    def has(name: str) -> Callable[[Facts], bool]:
        return lambda facts: bool(facts.get(name))

    def lacks(name: str) -> Callable[[Facts], bool]:
        return lambda facts: not facts.get(name)

    yield "in the uncached forward", has("uncached forward")
    yield "in decode steps (q = 1 with past > 0)", lambda f: f["q"] == 1 and f["past"] > 0
    yield "with q > 1", lambda f: f["q"] > 1
    yield "with past > 0", lambda f: f["past"] > 0
    yield "with q = 1", lambda f: f["q"] == 1
    yield "on an empty cache", lambda f: f["past"] == 0
    yield "from the second decode step on", lambda f: f.get("decodes", 0) > 1 and f["q"] == 1
    yield "with batch > 1", lambda f: f["batch"] > 1
    yield "with row ≠ 0", lambda f: f["row"] > 0
    yield "in the last row of several", lambda f: bool(f["batch"] > 1 and f["last row"])
    yield "in row 0", lambda f: f["row"] == 0
    if config.window is not None:
        window = config.window
        yield "once length > window", lambda f: f["position"] >= window
        yield "once length ≥ window", lambda f: f["position"] >= window - 1
        yield "where length = window", lambda f: f["position"] == window - 1
        yield "where the step is larger than the window", lambda f: f["q"] > window
        yield "with past ≥ window", lambda f: f["past"] >= window
    yield from ((name, has(name)) for name in HISTORY)
    yield from ((words, has(name)) for name, words in FLAGS.items())
    yield from ((words, lacks(name)) for name, words in ABSENT.items())


def _thresholds(cells: Sequence[OutputCell], wrong: Flags) -> Iterator[tuple[str, Flags]]:
    """``with length ≥ 9``: the largest number that no wrong output is below."""
    for name, words in (("position", "length"), ("past", "past"), ("q", "q"), ("length", "length after the step")):
        numbers = np.array([cell.facts[name] + (name == "position") for cell in cells])
        least = int(numbers[wrong].min())
        if least > 2:
            yield f"with {words} ≥ {least}", numbers >= least
