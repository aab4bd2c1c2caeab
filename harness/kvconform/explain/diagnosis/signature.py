"""The signature of a mistake: the smallest condition that separates outputs that are off from those that are right."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from kvconform.explain.diagnosis.probe_run import FORBIDDEN, SOURCES, Examination
from kvconform.explain.diagnosis.probes import GENERATIONS
from kvconform.explain.diagnosis.symptoms import BLANK, Cell, Facts
from kvconform_specs.config import Config
from kvconform_specs.program import Generate

Flags = NDArray[np.bool_]
NEAR = 0.8
"""A condition that separates not exactly is told from this share on: outputs that are off and meet it, of all that are
off or meet it."""
NEARLY = 0.9
"""From this share of all outputs on no condition is looked for."""
WORTH = 0.03
"""So much more must two predicates tell than one, where neither separates exactly."""
PAST = (
    "after a reset",
    "after a truncation",
    "after a fork",
    "copy of a fork",
    "after a keep",
    "copy of a keep",
    "after a reorder",
    "after another sequence",
    "after a refused call",
    "after poison",
    "after another sequence in the process",
)
"""What a sequence may have gone through; the names are the words."""


@dataclass(frozen=True)
class Condition:
    """words: ``only with q > 1 and past > 0``. share: 1 where it separates exactly (``NEAR``). first: it separates what
    is off first in its sequence; what comes after that may be off as well. off: how many of the outputs are."""

    words: str
    share: float
    first: bool
    off: int
    outputs: int


def condition(cells: Sequence[Cell], config: Config) -> Condition | None:
    """The smallest that separates bad cells from good ones, of one predicate or two; None where none comes near."""
    off = sum(cell.status != "ok" for cell in cells)
    if not off:
        return None
    exact = _separating(cells, config, False)
    if exact is not None and exact.share == 1:
        return exact
    if NEARLY <= off / len(cells) < 1:
        return Condition("in nearly every output", off / len(cells), False, off, len(cells))
    first = _separating([cell for cell in cells if cell.status == "ok" or cell.first], config, True)
    if first is not None and first.share == 1:
        return first
    near = max((one for one in (exact, first) if one is not None), key=lambda one: one.share, default=None)
    return near if near is not None and near.share >= NEAR else None


def _separating(cells: Sequence[Cell], config: Config, first: bool) -> Condition | None:
    off = np.array([cell.status != "ok" for cell in cells])
    if not off.any():
        return None
    total = int(off.sum())
    if off.all():
        return Condition("in every output", 1.0, first, total, len(cells))
    found = [(words, np.array([holds(cell.facts) for cell in cells], bool)) for words, holds in predicates(config)]
    found += list(_thresholds(cells, off))
    best: tuple[float, str] = (0.0, "")
    for words, met in found:
        best = max(best, (_share(met, off), words), key=lambda one: one[0])
        if best[0] == 1:
            return Condition(f"only {best[1]}", 1.0, first, total, len(cells))
    single = best[0]
    for (mine, met), (its, also) in combinations(found, 2):
        share = _share(met & also, off)
        if share > max(best[0], single + WORTH) or share == 1:
            best = share, f"{mine} and {its}"
        if share == 1:
            break
    return Condition(f"only {_joined(best[1])}", best[0], first, total, len(cells)) if best[0] else None


def _joined(words: str) -> str:
    """``with q > 1 and with past > 0`` to ``with q > 1 and past > 0``."""
    first, _and, second = words.partition(" and with ")
    return f"{first} and {second}" if second and first.startswith("with ") else words


def _share(met: Flags, off: Flags) -> float:
    either = int((met | off).sum())
    return int((met & off).sum()) / either if either else 0.0


def predicates(config: Config) -> Iterator[tuple[str, Callable[[Facts], bool]]]:
    """What may hold of an output, plainest first."""

    def has(name: str) -> Callable[[Facts], bool]:
        return lambda facts: bool(facts.get(name))

    def lacks(name: str) -> Callable[[Facts], bool]:
        return lambda facts: not facts.get(name)

    yield "in the cache-less forward", has("whole")
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
    for name in PAST:
        yield name, has(name)
    yield "with rows of different counts", has("ragged")
    yield "with rows of different lengths", has("uneven")
    yield "in rows that are not the longest", lacks("longest")
    yield "with padding on the left", has("left padding")
    yield "at the capacity", has("full")
    yield "with a caller's mask", has("hidden")
    yield "with inputs that are not contiguous", has("layout")
    yield "with large scores", has("large_queries")
    yield "with keys that are zero", has("zero_keys")
    yield "with small keys and large values", has("small_keys_large_values")
    yield "with the present in the memory of the past", has("shared")
    yield "where the last position is asked for alone", has("alone")
    for name in ("first", "last"):
        yield f"at the {name} token of the step", has(f"{name} token of the step")
        yield (
            f"before the {name} token of the step" if name == "last" else "behind the first token of the step",
            lacks(f"{name} token of the step"),
        )


def _thresholds(cells: Sequence[Cell], off: Flags) -> Iterator[tuple[str, Flags]]:
    """``with length > 9``: the largest number that all outputs that are off exceed."""
    for name, words in (("position", "length"), ("past", "past"), ("q", "q"), ("length", "length after the step")):
        numbers = np.array([cell.facts[name] + (name == "position") for cell in cells])
        least = int(numbers[off].min())
        if least > 2:
            yield f"with {words} ≥ {least}", numbers >= least


# --- words ---
def told(found: Condition | None) -> str:
    """The condition in words, or nothing."""
    if found is None:
        return ""
    words = found.words
    if found.share < 1:
        nearly = "nearly always and " if words.startswith("only") else ""
        words = f"{nearly}{words} ({min(found.share, 0.99):.0%})"
    elif found.first:
        words += ", and what follows in the sequence"
    return words


def first(examination: Examination) -> str:
    """The first probe that is off, outputs before anything else, and where: the plainest are at the front."""
    off = [one for one in examination.symptoms if one.off and one.words]
    begins = [next((cell.status for cell in one.cells if cell.status != "ok"), "") for one in off]
    numbers, raised = (
        [one for one, begin in zip(off, begins, strict=True) if begin == status] for status in ("bad", "raised")
    )
    return next((f"first in {one.probe.words}: {one.words}" for one in numbers or raised or off), "")


def generating(examination: Examination) -> str:
    """``only in greedy generation`` where nothing else is off, neither outputs nor what is told or raised."""
    off = [one for one in examination.symptoms if one.off]
    alone = off and all(isinstance(step, Generate) for one in off for step in one.probe.program.steps)
    return "only in greedy generation" if alone else ""


def loop(examination: Examination) -> str:
    """``L1`` where the backend generates other tokens though its steps are right, and does so from a probe's first
    generation on; else empty: what an earlier one left behind is no matter of the loop."""
    if not generating(examination):
        return ""
    firsts = [examination.pattern.get(name, "")[:1] for name in GENERATIONS]
    return "L1" if set("".join(firsts)) - BLANK else ""


KINDS = ("prompts", "chunks", "decode steps")


def sighted(letters: str) -> str:
    """What prompt, chunk and decode steps feel that they must not, and do not feel that they must, in words."""
    width = len(SOURCES)
    steps = [letters[at : at + width] for at in range(0, len(letters), width)]
    if len(steps) < len(KINDS):
        return ""
    merged = [steps[0], steps[1], "".join(_merged(column) for column in zip(*steps[2:], strict=True))]
    said: dict[str, list[str]] = {}
    for kind, step in zip(KINDS, merged, strict=True):
        wrong = {source for source, letter in zip(SOURCES, step, strict=True) if letter in "xm"}
        asked = {source for source, letter in zip(SOURCES, step, strict=True) if letter != "-"}
        if wrong:
            steady = any(letter == "x" for letter in step)
            words = _felt(wrong, asked) + (", at times" if not steady else "")
            said.setdefault(words, []).append(kind)
    return "; ".join(f"{' and '.join(kinds)} {words}" for words, kinds in said.items())


def _merged(column: Sequence[str]) -> str:
    judged = {letter for letter in column if letter != "-"}
    return "-" if not judged else judged.pop() if len(judged) == 1 else "m"


def _felt(wrong: set[str], asked: set[str]) -> str:
    said = []
    if wrong & {"next", "future"}:
        said.append("see " + ("the next token" if "future" in asked and "future" not in wrong else "their future"))
    if wrong & {"just outside", "outside"}:
        only = "outside" in asked and "outside" not in wrong
        said.append("see " + ("one token more than the window" if only else "tokens outside the window"))
    unfelt = wrong - FORBIDDEN
    cached = {"first", "last cached", "cached", "window's edge"} & asked
    if cached and cached <= unfelt:
        said.append("do not see what is cached")
    elif "first" in asked and cached - {"first"} and cached - {"first"} <= unfelt:
        said.append("see only token 0 of what is cached")
    elif {"first", "cached"} <= unfelt and "last cached" in asked - unfelt:
        said.append("see only the newest token of what is cached")
    else:
        names = {
            "itself": "their own token",
            "its chunk": "the earlier tokens of their step",
            "first": "token 0",
            "last cached": "the newest cached token",
            "cached": "the cached tokens between",
            "window's edge": "the oldest token of the window",
        }
        missing = [names[source] for source in SOURCES if source in unfelt]
        said += [f"do not see {', '.join(missing)}"] if missing else []
    return " and ".join(said)
