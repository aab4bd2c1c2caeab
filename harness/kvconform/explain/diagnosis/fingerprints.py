"""The catalogue: what each planted fault shows on the probes, so that a broken backend can be compared with all.

``python -m kvconform.explain.diagnosis.fingerprints --write`` computes it anew, ``--evaluate`` says how often it names
the right class. It holds patterns of letters (``symptoms``), which depend on no sizes; it names faults by their
addresses, and imports them only to compute it.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from kvconform.explain.diagnosis.edits import explanations, kinds
from kvconform.explain.diagnosis.probe_run import SIGHT, Examination, examine
from kvconform.explain.diagnosis.signature import loop
from kvconform.explain.diagnosis.symptoms import BLANK, FINE, MISSING, UNTOLD, Truth, alike
from kvconform.files import write_atomically
from kvconform.mutation.fault import Fault, load_faults
from kvconform.worker.execute import Trace, execute
from kvconform.worker.protocol import pack, unpack
from kvconform.worker.registry import load, module_of
from kvconform_specs import SUITE_VERSION
from kvconform_specs.config import Config
from kvconform_specs.configs import CONFIGS, LONG
from kvconform_specs.program import Program
from kvconform_specs.tensors import weights

SCHEMA = "kvconform-fingerprints/1"
CATALOGUE = "kvconform_backends.faults:FAULTS"
CLASSES = "kvconform_backends.faults.classes"
"""The module whose ``CLASSES`` say what each class of mistakes is."""
FILE = "fingerprints.json"
SHORT_CONFIGS = tuple(name for name, config in CONFIGS.items() if config.capacity < LONG)
"""The configs that the faults were examined under."""
EVALUATED = ("attention-gqa", "attention-window", "decoder-rope")
"""Those under which faults are named by their outputs in an evaluation: it takes as long as examining them."""
LIKENESS = 0.95
"""A pattern must be at least so much like that of a fault for its class to be named,"""
MARGIN = 0.05
"""by so much more than like that of any fault of other classes, and a second fault of the class must be more like it
than those are, too. This was chosen on the catalogue, each fault named by the others alone (``evaluated``)."""
SHORTLIST = 12
"""So many faults are run beside a backend at most,"""
LEAST = 0.7
"""none that is less like it."""
WEIGHTS: Mapping[str, float] = {SIGHT: 10.0}
"""Probes that count for more than one: which tokens are felt is the clearest trait."""

Pattern = Mapping[str, str]
Places = NDArray[np.uint8]


class Evaluation(msgspec.Struct, frozen=True, kw_only=True):
    """How many of ``asked`` pairs of fault and config got a class of theirs, another one, or none."""

    asked: int
    right: int
    wrong: int

    @property
    def words(self) -> str:
        unnamed = self.asked - self.right - self.wrong
        shares = ", ".join(
            f"{count / self.asked:.1%} {words}"
            for count, words in ((self.right, "right"), (self.wrong, "wrong"), (unnamed, "not named"))
        )
        return f"{shares}, of {self.asked}"


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One planted fault. ``shown``: by the name of a config, the number of its pattern; only where something is off.
    ``asked``: by the same, the number of the list of probes that its claims allow."""

    name: str
    address: str
    classes: tuple[str, ...]
    bug: str
    sentence: str
    shown: dict[str, int] = {}
    asked: dict[str, int] = {}


class Catalogue(msgspec.Struct, frozen=True, kw_only=True):
    """All faults. ``classes``: id to name and mistake. ``letters``: what any fault shows on each probe; in this order
    the letters of all probes are numbered. ``patterns``: the numbers of the probes that are off. ``lists``: names of
    probes."""

    schema: str = SCHEMA
    suite: str
    classes: dict[str, str]
    entries: list[Entry]
    letters: dict[str, list[str]]
    patterns: list[list[int]]
    lists: list[list[str]]
    evaluation: dict[str, Evaluation] = {}

    def prints(self, configs: Sequence[str] = SHORT_CONFIGS) -> Iterator[Print]:
        numbered = [(name, letters) for name, all_letters in self.letters.items() for letters in all_letters]
        patterns = [dict(numbered[number] for number in pattern) for pattern in self.patterns]
        for entry in self.entries:
            for config in configs:
                if config in entry.shown:
                    asked = frozenset(self.lists[entry.asked[config]])
                    yield Print(entry, config, patterns[entry.shown[config]], asked)


@dataclass(frozen=True)
class Print:
    """A fault's pattern under one config."""

    entry: Entry
    config: str
    pattern: Pattern
    asked: frozenset[str]


@cache
def catalogue() -> Catalogue:
    """The shipped one."""
    return msgspec.json.decode(files("kvconform.explain.diagnosis").joinpath(FILE).read_bytes(), type=Catalogue)


# --- likeness ---
class Prints:
    """Patterns side by side: ``(prints, places)`` letters, as bytes. A probe takes as many places as the longest of its
    patterns; those that were not asked are missing."""

    def __init__(self, all_of_them: Sequence[Print]) -> None:
        self.all = list(all_of_them)
        sizes: dict[str, int] = {}
        for its in self.all:
            for name in its.asked:
                sizes[name] = max(sizes.get(name, 1), len(its.pattern.get(name, "")))
        self.sizes = dict(sorted(sizes.items()))
        self.starts = np.cumsum([0, *self.sizes.values()])[:-1]
        self.weights = np.array([WEIGHTS.get(name, 1.0) for name in self.sizes])
        self.places = np.stack([self.row({**dict.fromkeys(its.asked, ""), **its.pattern}) for its in self.all])

    def row(self, pattern: Pattern) -> Places:
        """One pattern, of all probes that were asked, as its places; what it is short of is fine."""
        return np.concatenate([self._padded(pattern.get(name), size) for name, size in self.sizes.items()])

    def _padded(self, letters: str | None, size: int) -> Places:
        text = MISSING * size if letters is None else letters[:size].replace(UNTOLD, MISSING).ljust(size, FINE)
        return np.frombuffer(text.encode(), np.uint8)

    def likeness(self, mine: Pattern) -> NDArray[np.float64]:
        """``(prints,)``, 0 to 1: how alike the patterns are, of the probes on which either shows anything. Two letters
        that show different mistakes are alike by half."""
        row, fine, missing = self.row(mine), ord(FINE), ord(MISSING)
        judged = (self.places != missing) & (row != missing) & ((self.places != fine) | (row != fine))
        same = np.where(self.places == row, 1.0, np.where((self.places != fine) & (row != fine), 0.5, 0.0)) * judged
        either = np.add.reduceat(judged, self.starts, axis=1, dtype=float)
        alike = np.add.reduceat(same, self.starts, axis=1) / np.maximum(either, 1)
        weighed = (either > 0) * self.weights
        return np.asarray((alike * weighed).sum(axis=1) / np.maximum(weighed.sum(axis=1), 1e-9))


@dataclass(frozen=True)
class Match:
    """A fault that the pattern is like, and by how much."""

    likeness: float
    found: Print


def nearest(mine: Pattern, prints: Prints, without: Callable[[Print], bool] = lambda its: False) -> list[Match]:
    """All of them but those left out, the most alike first."""
    found = [
        Match(float(likeness), its)
        for likeness, its in zip(prints.likeness(mine), prints.all, strict=True)
        if not without(its)
    ]
    return sorted(found, key=lambda match: -match.likeness)


def named(matches: Sequence[Match]) -> tuple[str, Match] | None:
    """The class that stands out and the fault that shows it, or None: naming nothing is better than a wrong name."""
    if not matches or matches[0].likeness < LIKENESS:
        return None
    best = matches[0]
    kinds = set(best.found.entry.classes)
    other = next((match.likeness for match in matches if not kinds & set(match.found.entry.classes)), 0.0)
    if best.likeness - other < MARGIN:
        return None
    for kind in best.found.entry.classes:
        faults = {
            match.found.entry.name for match in matches if match.likeness > other and kind in match.found.entry.classes
        }
        if len(faults) > 1:
            return kind, best
    return None


def exactly(matches: Sequence[Match], same: Callable[[Match], bool]) -> Match | None:
    """The fault most alike whose outputs are the ``same``, of the ``SHORTLIST``; None where there is none, or where
    faults of classes that have nothing in common have the same outputs."""
    shortlist: dict[str, Match] = {}  # by address: a fault may be alike under several configs
    for match in matches:
        if match.likeness > LEAST:
            shortlist.setdefault(match.found.entry.address, match)
    found: list[Match] = []
    for match in list(shortlist.values())[:SHORTLIST]:
        known = any(set(match.found.entry.classes) & set(one.found.entry.classes) for one in found)
        if not known and same(match):  # another one of the same class would say the same
            found.append(match)
    return found[0] if len(found) == 1 else None


def decided(likened: str, exact: bool, by_tokens: frozenset[str]) -> str:
    """The class that is named, empty for none: the tokens that outputs see, where they speak for one class, weigh more
    than likeness, and less than equal outputs."""
    if likened and (exact or len(by_tokens) != 1 or likened in by_tokens):
        return likened
    return next(iter(by_tokens)) if len(by_tokens) == 1 else ""


# --- computing it ---
def examined(backend: Any, config: Config, truths: dict[Any, Truth]) -> Examination | None:
    """What a backend in this process shows on the probes; None where it refuses the config."""
    refuses = getattr(backend, "refuses", None)
    if config.profile not in backend.claims.profiles or (refuses is not None and refuses(config, "cpu") is not None):
        return None
    backend = backend(config, weights(config), "cpu")

    def run(program: Program) -> Trace:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the NaN that some faults make
            return unpack(*pack(execute(backend, program, (0,)))).apart()[0]

    precision = backend.claims.precision
    truth = truths.setdefault((config, precision), Truth(precision))
    return examine(run, config, backend.claims, truth)


def computed(faults: Sequence[Fault], configs: Sequence[str] = SHORT_CONFIGS) -> Catalogue:
    """The catalogue of these faults."""
    patterns: dict[tuple[tuple[str, str], ...], int] = {}
    lists: dict[tuple[str, ...], int] = {}
    shown: dict[str, dict[str, int]] = {fault.name: {} for fault in faults}
    asked: dict[str, dict[str, int]] = {fault.name: {} for fault in faults}
    for config in configs:
        truths: dict[Any, Truth] = {}
        for fault in faults:
            if fault.configs and config not in fault.configs:
                continue
            found = examined(load(fault.address), CONFIGS[config], truths)
            if found is not None and found.off:
                off = tuple((name, letters) for name, letters in found.pattern.items() if set(letters) - BLANK)
                shown[fault.name][config] = patterns.setdefault(off, len(patterns))
                asked[fault.name][config] = lists.setdefault(tuple(found.pattern), len(lists))
    entries = [
        Entry(
            name=fault.name,
            address=fault.address,
            classes=fault.classes,
            bug=fault.bug,
            sentence=fault.sentence,
            shown=shown[fault.name],
            asked=asked[fault.name],
        )
        for fault in faults
    ]
    letters: dict[str, list[str]] = {}
    for name, one in sorted({one for pattern in patterns for one in pattern}):
        letters.setdefault(name, []).append(one)
    numbers = {one: number for number, one in enumerate((n, x) for n, found in letters.items() for x in found)}
    return Catalogue(
        suite=SUITE_VERSION,
        classes=dict(module_of(CLASSES).CLASSES),
        entries=entries,
        letters=letters,
        patterns=[[numbers[one] for one in pattern] for pattern in patterns],
        lists=[list(names) for names in lists],
    )


# --- how good it is ---
def evaluated(found: Catalogue) -> dict[str, Evaluation]:
    """By patterns alone. ``unseen``: each fault is named by the other faults, under the same config; ``elsewhere``: by
    all faults, its own entry too, under other configs."""
    everything = Prints(list(found.prints()))
    names: dict[str, list[bool | None]] = {"unseen": [], "elsewhere": []}
    for its in everything.all:
        for kind, without in (("unseen", _unseen(its)), ("elsewhere", _here(its))):
            matches = nearest(full(its), everything, without)
            if kind == "unseen" or any(match.found.entry.name == its.entry.name for match in matches):
                name = named(matches)
                names[kind].append(None if name is None else name[0] in its.entry.classes)
    return {kind: _counted(got) for kind, got in names.items()}


def evaluated_by_outputs(
    found: Catalogue, faults: Sequence[Fault], configs: Sequence[str] = EVALUATED
) -> dict[str, Evaluation]:
    """By outputs first, and then by patterns. ``known``: each fault is one of the catalogue; ``unseen by outputs``: its
    own entry is left out. ``by edits``: by the tokens that it sees alone. ``unseen, with edits``: by all three, as a
    diagnosis does it."""
    names: dict[str, list[bool | None]] = {
        kind: [] for kind in ("known", "unseen by outputs", "by edits", "unseen, with edits")
    }
    for config in configs:
        everything, truths = Prints(list(found.prints((config,)))), dict[Any, Truth]()
        shown = {its.entry.name for its in everything.all}
        examinations = {
            fault.name: examined(load(fault.address), CONFIGS[config], truths)
            for fault in faults
            if fault.name in shown
        }
        for its in everything.all:
            mine = examinations[its.entry.name]
            assert mine is not None
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the NaN that some faults make
                found_tokens = explanations(mine.symptoms, CONFIGS[config], load(its.entry.address).claims, None)
            by_tokens = kinds(found_tokens) or frozenset(filter(None, [loop(mine)]))
            said = {"by edits": decided("", False, by_tokens)}
            for kind, without in (("known", lambda one: False), ("unseen by outputs", _unseen(its))):
                matches = nearest(full(its), everything, without)
                match = exactly(matches, lambda one: _same(mine, examinations[one.found.entry.name]))  # noqa: B023
                name = (match.found.entry.classes[0],) if match is not None else named(matches)
                said[kind] = "" if name is None else name[0]
                said["unseen, with edits"] = decided(said[kind], match is not None, by_tokens)
            for kind, which in said.items():
                names[kind].append(which in its.entry.classes if which else None)
    return {kind: _counted(got) for kind, got in names.items()}


def _same(mine: Examination, its: Examination | None) -> bool:
    theirs = {} if its is None else {one.probe.name: one for one in its.symptoms}
    return all(alike(one, theirs[one.probe.name]) if one.probe.name in theirs else not one.off for one in mine.symptoms)


def _unseen(its: Print) -> Callable[[Print], bool]:
    return lambda one: one.entry.name == its.entry.name or one.config != its.config


def _here(its: Print) -> Callable[[Print], bool]:
    return lambda one: one.config == its.config


def _counted(got: Sequence[bool | None]) -> Evaluation:
    return Evaluation(asked=len(got), right=got.count(True), wrong=got.count(False))


def full(its: Print) -> dict[str, str]:
    """Its pattern as a backend's: with the probes on which nothing was off."""
    return {name: its.pattern.get(name, "") for name in sorted(its.asked)}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m kvconform.explain.diagnosis.fingerprints", description=__doc__)
    parser.add_argument("--write", action="store_true", help="compute the catalogue anew and write it")
    parser.add_argument("--evaluate", action="store_true", help="say how often patterns name the right class")
    parser.add_argument("--faults", default=CATALOGUE, help="module:LIST of the planted faults")
    parser.add_argument(
        "--out", type=Path, default=Path(str(files("kvconform.explain.diagnosis"))) / FILE, help="where it is written"
    )
    asked = parser.parse_args(arguments)
    faults = load_faults(asked.faults)
    found = computed(faults) if asked.write else catalogue()
    if asked.write or asked.evaluate:
        evaluation = evaluated(found) | evaluated_by_outputs(found, faults)
        for kind, one in evaluation.items():
            print(f"{kind}: {one.words}")
    if asked.write:
        found = msgspec.structs.replace(found, evaluation=evaluation)
        write_atomically(asked.out, msgspec.json.encode(found))
        print(f"{len(found.entries)} faults, {len(found.patterns)} patterns: {asked.out}")


if __name__ == "__main__":
    main()
