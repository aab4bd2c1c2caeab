"""Conditions: what separates the wrong outputs of the probes from the right ones, in as few predicates as possible."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from kvconform.explain.diagnosis.record import Condition
from kvconform.explain.diagnosis.symptoms import BEFORE_A_CHANGE, EARLIER_PROGRAM, Facts, OutputCell
from kvconform_specs.config import Config

Flags = NDArray[np.bool_]
NEAR = 0.8
"""The least share of wrong outputs among those that meet a condition. No more than the rest of the right outputs may
meet it."""
NEARLY_EXACT = 0.97
"""That share for a condition with a number: the number is only as good as the outputs that it comes from."""
NEARLY_ALL = 0.9
"""From this share of wrong outputs on, that is said where no condition separates them."""
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
    BEFORE_A_CHANGE: "with tokens cached before the length at which outputs of earlier tokens change",
    "context": "in a context other than 0",
    "prompt first in another context": "with a prompt that was first run in another context",
    "prompt in another context": "after a prompt in another context",
    "after another context": "right after a call in another context",
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


NUMBERS = {
    "position": "length",
    "past": "past",
    "q": "q",
    "length": "length after the step",
    "batch": "batch",
    "reached": "a largest length so far",
}
"""Facts that are numbers, as predicates call them."""


def condition(cells: Sequence[OutputCell], config: Config, left_out: frozenset[str] = frozenset()) -> Condition | None:
    """The smallest one that all wrong outputs meet, of one predicate or two, none of them ``left_out``; None where too
    many right outputs meet it."""
    wrong = sum(cell.wrong for cell in cells)
    if not wrong:
        return None
    found = _separating(cells, config, left_out, False)
    if found.exact:
        return found
    first = _separating(considered(cells, True), config, left_out, True)
    if first.exact:
        return first
    near = max(found, first, key=_share)
    separates = _share(near) >= NEAR and near.right_met <= (1 - NEAR) * near.right
    if near.predicates and separates:
        return near
    everywhere = Condition(predicates=[], wrong=0, right=0, wrong_met=0, right_met=0)
    return counted(everywhere, cells, config) if wrong >= NEARLY_ALL * len(cells) else None


def of_stale_factors(found: Condition | None, cells: Sequence[OutputCell], changes: Sequence[int]) -> bool:
    """Whether the outputs are wrong exactly where tokens were cached with other rotary factors than hold now, and right
    where all have those that hold, so many tokens as there may be."""
    if found is None or not found.exact or found.predicates != [FLAGS[BEFORE_A_CHANGE]]:
        return False
    return any(
        not cell.wrong
        and cell.facts["past"] > 0
        and cell.facts["length"] >= changes[0]
        and not cell.facts[BEFORE_A_CHANGE]
        for cell in cells
    )


def considered(cells: Sequence[OutputCell], first_only: bool) -> list[OutputCell]:
    """Without the wrong outputs that an earlier one of their sequence may have caused, if ``first_only``."""
    return [cell for cell in cells if not cell.wrong or cell.first or not first_only]


def counted(found: Condition, cells: Sequence[OutputCell], config: Config) -> Condition:
    """The condition with the counts of these outputs."""
    holds = [predicates(config)[words] for words in found.predicates]
    cells = considered(cells, found.first_only)
    wrong = np.array([cell.wrong for cell in cells], bool)
    met = np.array([all(one(cell.facts) for one in holds) for cell in cells], bool)
    return _made(found.predicates, wrong, met, found.first_only)


def _made(words: Sequence[str], wrong: Flags, met: Flags, first_only: bool) -> Condition:
    return Condition(
        predicates=list(words),
        wrong=int(wrong.sum()),
        right=int((~wrong).sum()),
        wrong_met=int((met & wrong).sum()),
        right_met=int((met & ~wrong).sum()),
        first_only=first_only,
    )


def _separating(cells: Sequence[OutputCell], config: Config, left_out: frozenset[str], first_only: bool) -> Condition:
    """The best of one predicate or two, of those that hold of every wrong output."""
    wrong = np.array([cell.wrong for cell in cells], bool)
    best = _made((), wrong, np.ones(len(cells), bool), first_only)
    if best.exact:
        return best
    flags = [
        (words, met)
        for words, holds in (*_predicates(config), *_thresholds(cells))
        if words not in left_out
        and all(holds(cell.facts) for cell in cells if cell.wrong)
        and not (met := np.array([holds(cell.facts) for cell in cells], bool)).all()
    ]
    measured = {words for words, _holds in _thresholds(cells)}
    best = _made((), wrong, np.zeros(len(cells), bool), first_only)
    for words, met in flags:
        one = _made((words,), wrong, met, first_only)
        if one.exact:
            return one
        if words not in measured or _share(one) >= NEARLY_EXACT:
            best = max(best, one, key=_share)
    least = _share(best) + WORTH
    for (first, met), (second, also) in combinations(flags, 2):
        pair = _made((first, second), wrong, met & also, first_only)
        if pair.exact:
            return pair
        trusted = not measured & {first, second} or _share(pair) >= NEARLY_EXACT
        if trusted and _share(pair) > max(_share(best), least):
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


def _thresholds(cells: Sequence[OutputCell]) -> Iterator[tuple[str, Callable[[Facts], bool]]]:
    """``with length ≥ 9``: the largest number that no wrong output is below; ``with q = 3``: the one that all have."""
    for name in NUMBERS:
        numbers = [_number(cell.facts, name) for cell in cells if cell.wrong]
        if min(numbers) > 2:
            yield _at_least(name, min(numbers))
        if min(numbers) == max(numbers) > 1:
            yield _equal(name, min(numbers))


def _equal(name: str, number: int) -> tuple[str, Callable[[Facts], bool]]:
    return f"with {NUMBERS[name]} = {number}", lambda facts: _number(facts, name) == number


def _at_least(name: str, least: int) -> tuple[str, Callable[[Facts], bool]]:
    return f"with {NUMBERS[name]} ≥ {least}", lambda facts: _number(facts, name) >= least


def _number(facts: Facts, name: str) -> int:
    return facts[name] + (name == "position")


def predicates(config: Config) -> dict[str, Callable[[Facts], bool]]:
    """Every predicate of a condition, by its words."""
    kinds = (_at_least, _equal)
    bounds = (kind(name, number) for kind in kinds for name in NUMBERS for number in range(2, config.capacity + 1))
    return dict((*_predicates(config), *bounds))
