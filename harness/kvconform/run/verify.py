"""Runs a sample of the cells of a results file again: whether a stranger finds what the file says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path
from random import Random

import msgspec

from kvconform.errors import BadArgument
from kvconform.judging.verdict import Outcome, Verdict
from kvconform.results.diff import Kind, diff, words
from kvconform.results.results import Results
from kvconform.run.run import Plan, cells, describe, empty
from kvconform.search import counterexample
from kvconform.search.cell import Cell, Key, run_cell
from kvconform.search.effort import CHECK, EFFORTS
from kvconform.worker.client import WorkerClient
from kvconform_specs import SUITE_VERSION
from kvconform_specs.clause import Case
from kvconform_specs.program import Program

DECIDED = (Outcome.PASS, Outcome.FAIL, Outcome.CRASH, Outcome.TIMEOUT, Outcome.REFUTED)
"""The outcomes that say something about the backend, and that can be found again."""
NOTED = (Kind.SOFTWARE, Kind.NARROWED_CLAIM, Kind.CHANGED_CLAIM)
"""What may differ between here and there without a cell being wrong."""


class Agreement(Enum):
    """What running a cell again says about what the file says."""

    AGREES = "agrees"
    DIFFERS = "differs"
    OTHER_PROGRAMS = "other programs"
    UNDECIDED = "undecided"


class Rechecked(msgspec.Struct, frozen=True, kw_only=True):
    """One cell, as the file has it and as it is now."""

    clause: str
    """Name of the clause."""
    config: str
    """Name of the config."""
    was: Outcome
    """The outcome in the file."""
    now: Outcome
    """The outcome of running the cell again."""
    agreement: Agreement
    """What that says about the file."""
    sentence: str = ""
    """Why they do not agree, in words."""


class Verified(msgspec.Struct, frozen=True, kw_only=True):
    """What running a sample of the cells again found."""

    backend: str
    """Name of the backend."""
    seed: int
    """The seed that the sample was drawn with."""
    of: int
    """How many decided cells the file has."""
    cells: list[Rechecked]
    """The cells of the sample."""
    notes: list[str] = []
    """What differs between here and there beside the cells: versions and claims, one sentence each."""

    def count(self, agreement: Agreement) -> int:
        return sum(one.agreement is agreement for one in self.cells)

    @property
    def exit_code(self) -> int:
        """1 if a cell differs, 0 if the others agree, 5 if none could be compared."""
        if self.count(Agreement.DIFFERS):
            return 1
        return 0 if self.count(Agreement.AGREES) else 5


def sample(results: Results, number: int, seed: int) -> list[Key]:
    """Cells with a decided outcome: half of them out of the failures, as far as there are, the others out of the rest.

    Raises BadArgument if the file is of another suite, where cells are others, or has no such cell.
    """
    if results.suite != SUITE_VERSION:
        words = f"the file is of suite {results.suite}, this is suite {SUITE_VERSION}: their cells cannot be compared"
        raise BadArgument("suite", results.suite, (SUITE_VERSION,), words)
    decided = [verdict for verdict in results.verdicts if verdict.outcome in DECIDED]
    if not decided:
        raise BadArgument("results", results.backend, (), f"{results.backend}: the file has no decided cell")
    random = Random(seed)
    broken = [verdict.key for verdict in decided if verdict.outcome.broken]
    first = random.sample(broken, min(len(broken), number // 2))
    others = [verdict.key for verdict in decided if verdict.key not in first]
    return first + random.sample(others, min(len(others), number - len(first)))


def verify(
    results: Results,
    keys: Sequence[Key],
    seed: int,
    client: WorkerClient,
    failures: Path,
    out: Path,
    tell: Callable[[Rechecked], None] = lambda one: None,
) -> Verified:
    """Judges cells again with the effort and the seed of the file.

    failures: the folder with the counterexamples of the file. out: the folder for those that are found now. Raises
    BackendUnavailable, BadArgument for an unknown effort.
    """
    efforts = {**EFFORTS, CHECK.name: CHECK}
    if results.effort not in efforts:
        raise BadArgument("effort", results.effort, efforts)
    effort = efforts[results.effort]
    plan = Plan(effort, results.seed, tuple(results.dtypes))
    there = {verdict.key: verdict for verdict in results.verdicts}
    here = {cell.key: cell for cell in cells(plan, client.configs)}
    again, found = empty(results.backend, results.device, plan), []
    describe(again, client)
    places = {key: place for place, key in enumerate(here)}
    for key in sorted(keys, key=lambda key: places.get(key, -1)):  # a backend is built once for each config
        if key not in here:
            was = there[key].outcome
            one = _rechecked(there[key], was, Agreement.DIFFERS, "the backend has no such config here")
        else:
            now = run_cell(here[key], client, effort, results.seed, out)
            again.verdicts.append(now)
            one = compared(there[key], now, here[key], client, failures)
        tell(one)
        found.append(one)
    sampled = msgspec.structs.replace(results, verdicts=[there[key] for key in keys])
    notes = [words(one) for one in diff(sampled, again) if one.kind in NOTED]
    decided = sum(verdict.outcome in DECIDED for verdict in results.verdicts)
    return Verified(backend=results.backend, seed=seed, of=decided, cells=found, notes=notes)


def _rechecked(was: Verdict, now: Outcome, agreement: Agreement, sentence: str = "") -> Rechecked:
    return Rechecked(
        clause=was.clause, config=was.config, was=was.outcome, now=now, agreement=agreement, sentence=sentence
    )


def compared(was: Verdict, now: Verdict, cell: Cell, client: WorkerClient, failures: Path) -> Rechecked:
    """What a cell's verdict of now says about the one in the file.

    A failure that a search does not find again, since an earlier cell of the whole run prepared it, agrees if its
    counterexample still fails.
    """
    if was.digest and now.digest and was.digest != now.digest:
        return _rechecked(was, now.outcome, Agreement.OTHER_PROGRAMS, "other programs are drawn here")
    if now.outcome is was.outcome:
        if now.compared < was.compared and now.outcome is Outcome.PASS and not now.cut:
            words = f"the file says that {was.compared} values were compared; there are {now.compared}"
            return _rechecked(was, now.outcome, Agreement.DIFFERS, words)
        return _rechecked(was, now.outcome, Agreement.AGREES)
    if was.outcome.broken and not now.outcome.broken and _still_fails(was, cell, client, failures):
        return _rechecked(was, now.outcome, Agreement.AGREES, "its counterexample still fails")
    if now.outcome not in DECIDED or (now.outcome is Outcome.PASS and now.cut):
        return _rechecked(was, now.outcome, Agreement.UNDECIDED, now.sentence or "the time limit ended it")
    return _rechecked(was, now.outcome, Agreement.DIFFERS, now.sentence or f"the file says: {was.sentence}")


def _still_fails(was: Verdict, cell: Cell, client: WorkerClient, failures: Path) -> bool:
    file = failures / was.counterexample
    if not was.counterexample or not file.is_file():
        return False
    stored = counterexample.read(file)
    before = [Program.from_json(program, f"before[{i}]") for i, program in enumerate(stored.before)]
    case = Case.from_json(stored.case, "case")
    alike = stored.clause == was.clause and all(program.config == cell.config for program in case.programs)
    return alike and counterexample.replayed(cell.clause, client, before, case) is not None
