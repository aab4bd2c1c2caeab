"""Results: one versioned JSON file for each backend or shard, rewritten whole and atomically after every cell."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from kvconform.explain.diagnosis import Diagnosis
from kvconform.explain.visibility import Map
from kvconform.files import read_versioned, write_versioned
from kvconform.judging.order import by_use
from kvconform.judging.verdict import Outcome, Verdict
from kvconform.results.guarantees import Guarantee
from kvconform.results.known_failures import Row
from kvconform.results.serving import Served
from kvconform_specs import SUITE_VERSION
from kvconform_specs.clauses import ALL, BY_NAME
from kvconform_specs.config import Config
from kvconform_specs.configs import CONFIGS, config_named, label
from kvconform_specs.serving import clauses as serving

SCHEMA = "kvconform-results/5"
SAME_RUN = ("schema", "suite", "backend", "device", "dtypes", "effort", "seed", "claims", "reference")
"""What the parts of one run have in common, beside their environment: everything that could change a verdict."""
EXIT_CODES = {
    0: "conformant, or nothing failed in the selected part or shard",
    1: "non-conformant, or a stale known failure",
    2: "bad argument, malformed file or invalid backend",
    3: "backend absent or broken, or the machine lacks what it needs",
    4: "regression against a baseline",
    5: "undecided: inconclusive cells, or a core clause without a pass",
}
"""The exit codes of the command line; ``Results.exit_code`` is 0, 1, 3 or 5."""


class Held(msgspec.Struct, frozen=True, kw_only=True):
    """How much of a long sequence a black box keeps, measured."""

    tokens: int
    """The tokens of the sequence."""
    held: int
    """How many of them its cache holds."""
    seen: int
    """How many of them, the newest ones, its last output depends on."""

    @property
    def sentence(self) -> str:
        """That the cache holds more than outputs see, or nothing. It may do so: a mask hides the others."""
        if self.held <= self.seen:
            return ""
        grows = ": nothing is evicted, and memory grows with every token" if self.held >= self.tokens else ""
        held = f"after {self.tokens} tokens the cache holds {self.held}"
        return f"{held}, of which an output sees the last {self.seen}{grows}"


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """A black box, which is judged by a forward without a cache, its own or that of another artefact."""

    recognised: str
    """How it is called, in words."""
    assumed: list[str]
    """What was assumed about it, one sentence each."""
    not_tried: list[str] = []
    """What it has and no clause tries, in a few words each."""
    configs: dict[str, Any]
    """Its own configs, by name."""
    held: Held | None = None
    """How much of a long sequence it keeps; null where that is not known, or where outputs depend on all of it."""
    reference: str = ""
    """The address of the artefact whose forward without a cache is the reference; empty: its own forward is."""
    noise: dict[str, float] = {}
    """For each config, how far rounding can move an output, relative to the size of the outputs."""


class Results(msgspec.Struct, kw_only=True):
    """The results of one run of one backend."""

    schema: str = SCHEMA
    """The name and version of this schema."""
    suite: str
    """The version of the clauses."""
    backend: str
    """The name of the backend."""
    device: str
    """The requested device, ``cpu`` or ``cuda``."""
    dtypes: list[str]
    """The dtypes of the configs."""
    effort: str
    """How much was tried for each cell: ``smoke``, ``pr``, ``nightly``, or ``check``."""
    seed: int
    """The seed of the run."""
    started: str
    """When the run started, in UTC."""
    environment: dict[str, Any] = {}
    """Versions of software, and the machine."""
    workers: str = ""
    """How the worker processes were started: ``fork``, or ``spawn`` with the reason; no verdict depends on it."""
    claims: dict[str, Any] = {}
    """What the backend claims."""
    unavailable: str = ""
    """Why the backend could not run here; empty if it could."""
    lacking: bool = False
    """Whether it is unavailable because this machine lacks something, and not because it is unknown or broken."""
    verdicts: list[Verdict] = []
    """One for each judged cell."""
    runtime_info: dict[str, Any] = {}
    """What ran, by config."""
    shard: str = ""
    """``i/n`` for shard ``i`` of ``n``; empty for a run that was not divided."""
    clauses: list[str] = []
    """With what the names of the judged clauses begin; empty for all clauses."""
    configs: list[str] = []
    """With what the names of the judged configs begin; empty for all configs."""
    known_failures: list[Row] = []
    """The rows of known failures that still fail."""
    stale: list[str] = []
    """One sentence for each row of the known failures that no longer holds."""
    guarantees: dict[str, Guarantee] = {}
    """The measured guarantees, by config."""
    target: Target | None = None
    """The black box that was judged by its own forward; null if outputs were compared with the definition."""
    served: Served | None = None
    """The serving engine that was judged by its answers without the prefix cache; null if this is no engine."""
    maps: dict[str, list[Map]] = {}
    """For each config with a broken clause (for each config of a black box), which tokens the outputs depend on."""
    diagnoses: dict[str, Diagnosis] = {}
    """For each config with a broken clause, the known mistake that the backend behaves like."""
    seconds: float = 0.0
    """Seconds of judging, interruptions excluded."""
    finished: bool = False
    """Whether all cells were judged; a run that was interrupted has false and is resumed."""

    def __post_init__(self) -> None:
        if self.shard and not re.fullmatch(r"[1-9]\d{0,5}/[1-9]\d{0,5}", self.shard):
            raise ValueError(f"shard: want i/n, got {self.shard!r}")

    def write(self, path: Path) -> None:
        write_versioned(path, self)

    def same_run(self, other: Results) -> bool:
        """Whether ``other`` is an earlier part of this run: nothing that could change a verdict differs. Environments
        are compared where both name something: a run names what was imported late at its end."""
        both = self.environment.keys() & other.environment.keys()
        return all(getattr(self, name) == getattr(other, name) for name in (*SAME_RUN, "shard")) and all(
            self.environment[name] == other.environment[name] for name in both
        )

    @property
    def reference(self) -> str:
        """The address of the artefact that a black box was judged by; empty where there is none."""
        return "" if self.target is None else self.target.reference

    @property
    def failures(self) -> tuple[Verdict, ...]:
        """The verdicts of the cells in which the backend broke a clause, the most useful to a reader first."""
        return by_use(self.verdicts)

    @property
    def ok(self) -> bool:
        """Whether the exit code is 0."""
        return self.exit_code == 0

    @property
    def exit_code(self) -> int:
        """The exit code of ``kvconform run`` (``EXIT_CODES``)."""
        return _conclusion(self).code

    @property
    def summary(self) -> str:
        """What the run amounts to, in one sentence."""
        _code, word, why, by = self.conclusion
        return ": ".join(filter(None, (word, ", ".join(filter(None, (why, by))))))

    @property
    def conclusion(self) -> Conclusion:
        """What the run amounts to, in parts."""
        return _conclusion(self)

    @property
    def counts(self) -> dict[str, int]:
        """How many cells had each outcome."""
        found = Counter(verdict.outcome for verdict in self.verdicts)
        return {outcome.value: found[outcome] for outcome in Outcome}

    @property
    def selection(self) -> str:
        """Which part of the suite was asked for, in words; empty for all of it."""
        named = (("clauses", self.clauses), ("configs", self.configs), ("shard", [self.shard] if self.shard else []))
        return ", ".join(f"{what} {', '.join(names)}" for what, names in named if names)

    @property
    def partial(self) -> bool:
        """Whether cells of the suite are missing: a shard, a selection of clauses or configs, or an interrupted run.

        Of another version of the suite it is not known which cells there are.
        """
        if self.shard:
            return True
        if self.suite != SUITE_VERSION:
            return bool(self.selection)
        if self.served is not None:
            return not {(clause.name, serving.CONFIG) for clause in serving.CLAUSES} <= {v.key for v in self.verdicts}
        if self.target is not None:
            asked = configs_of(self)
        else:
            asked = {label(name, dtype): config_named(name, dtype) for dtype in self.dtypes for name in CONFIGS}
        cells = {(clause.name, name) for name, config in asked.items() for clause in ALL if clause.concerns(config)}
        return not cells <= {verdict.key for verdict in self.verdicts}


def read(path: Path) -> Results:
    """Raises SpecError with one sentence if the file holds no results."""
    return read_versioned(path, Results, SCHEMA, "results")


def configs_of(results: Results) -> Mapping[str, Config]:
    """The configs that a backend is judged under: the suite's, or a black box's own; a serving engine has none."""
    if results.served is not None:
        return {}
    if results.target is None:
        return CONFIGS
    return {name: Config.from_json(config) for name, config in results.target.configs.items()}


GENERATION = "equivalence.generation"
"""The core clause of what only generates."""


def missing_core(results: Results, profile: str) -> list[str]:
    """The core clauses of a profile without a PASS under any of its configs; all of them for a shard."""
    passed = {
        verdict.clause
        for verdict in results.verdicts
        if verdict.outcome is Outcome.PASS and verdict.config.startswith(profile) and not results.shard
    }
    if results.served is not None:
        return sorted({clause.name for clause in serving.CLAUSES if clause.core} - passed)
    concerned = {
        name
        for name, clause in BY_NAME.items()
        if (name == GENERATION if results.claims.get("interface") == "generation" else clause.core)
        and any(clause.concerns(c) for c in configs_of(results).values() if c.profile == profile)
        and not (results.target is not None and clause.blind and not results.target.reference)
    }
    return sorted(concerned - passed)


class Conclusion(NamedTuple):
    """What a run amounts to: its exit code, in a word where there is one for it, and why."""

    code: int
    word: str
    why: str
    by: str = ""
    """What it was judged by, where that is not the definition."""


def _conclusion(results: Results) -> Conclusion:
    """The exit code, and why it is that one.

    A stale known failure gives 1. A shard or a selected part does not decide conformance: it gives 0 if nothing in it
    speaks against conformance, that is, if at least one cell passed and so did each selected core clause.
    """
    verdicts = results.verdicts
    judged = sum(verdict.outcome is not Outcome.UNSUPPORTED for verdict in verdicts)
    if results.failures:
        skipped = f"; {len(verdicts) - judged} not applicable" if judged < len(verdicts) else ""
        why = f"{len(results.failures)} of {counted(judged, 'judged cell')} failed{skipped}"
        return Conclusion(1, "non-conformant", why)
    if results.stale:
        return Conclusion(1, "stale known failures", f"{counted(len(results.stale), 'row')} to correct or to remove")
    if results.unavailable:
        return Conclusion(3, "", results.unavailable)
    if not results.finished:
        return Conclusion(5, "", f"the run did not finish: {counted(len(verdicts), 'cell')} judged")
    undecided = sum(verdict.outcome in (Outcome.INCONCLUSIVE, Outcome.NOT_EXERCISED) for verdict in verdicts)
    if undecided:
        why = f"{undecided} of {counted(judged, 'judged cell')} inconclusive or not exercised"
        return Conclusion(5, "undecided", why)
    known = sum(verdict.outcome is Outcome.KNOWN_FAILURE for verdict in verdicts)
    more = f", with {counted(known, 'known failure')}" if known else ""
    cells = counted(judged, "cell")
    if results.shard:
        return Conclusion(0, "", f"shard {results.shard}: {cells}, nothing failed{more}; merge the shards to conclude")
    partial = results.partial
    missing = _missing(results, partial)
    good = [profile for profile, clauses in missing.items() if not clauses]
    if not good:
        profile = min(missing, key=lambda p: len(missing[p]), default="")
        if not profile:
            return Conclusion(5, "undecided", "no cell was judged")
        why = f"no PASS on the core clauses {', '.join(missing[profile])} ({profile} profile)"
        return Conclusion(5, "undecided" if partial else "not conformant", why)
    if not partial:
        by = [] if results.target is None else [f"judged by {results.target.reference or 'its own forward'}"]
        by += ["judged by its answers without the prefix cache"] if results.served is not None else []
        by += ["judged by its generations alone"] if results.claims.get("interface") == "generation" else []
        return Conclusion(0, "conformant", f"{' and '.join(good)} profile{more}", ", ".join(by))
    if not any(verdict.outcome is Outcome.PASS for verdict in verdicts):
        outcomes = ", ".join(f"{count} {outcome}" for outcome, count in results.counts.items() if count)
        why = f"no cell of the selected part passed ({counted(len(verdicts), 'cell')}: {outcomes})"
        return Conclusion(5, "undecided", why)
    return Conclusion(0, "", f"the selected part passed: {cells}{more}; conformance needs the whole suite")


def _missing(results: Results, partial: bool) -> dict[str, list[str]]:
    """By profile, the core clauses without a PASS; in a part of the suite only those that were selected."""
    found = {}
    profiles = (
        {config.profile for config in configs_of(results).values()} if results.served is None else {serving.CONFIG}
    )
    for profile in sorted(profiles):
        selected = {verdict.clause for verdict in results.verdicts if verdict.config.startswith(profile)}
        only_generates = results.claims.get("interface") == "generation"
        if (selected or not partial) and (profile == "decoder" or not only_generates):
            found[profile] = [c for c in missing_core(results, profile) if c in selected or not partial]
    return found


def counted(number: int, noun: str) -> str:
    """``1 cell``, ``2 cells``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
