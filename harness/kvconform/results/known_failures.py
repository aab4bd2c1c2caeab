"""Known failures: a TOML file, written by hand, of cells that fail for a known reason.

    schema = "kvconform-known-failures/1"

    [[known]]
    backend = "eager"                                   # the name of its results
    device = "cuda"                                     # optional: the row holds on this device only
    clause = "numerics.zero-keys"
    config = "attention-gqa"                            # one cell; there are no wildcards
    reason = "bug in a library"                         # one of REASONS
    link = "https://github.com/pytorch/pytorch/issues/103082"
    versions = { torch = "2.11.*" }                     # the versions that have the bug, of any distributions
    expires = 2027-03-31                                # the last day, at most a year ahead
    counterexample = "known/numerics.zero-keys-1a2b3c4d.json"   # relative to this file

A cell with a row is replayed, not searched: its outcome is KNOWN_FAILURE if its counterexample still fails. A row is
*stale* if it has expired, if the versions differ, if the counterexample no longer fails, or if there is no such cell.
A cell with a stale row is searched like any other, and the run ends with exit code 1.
"""

from __future__ import annotations

import re
import time
import tomllib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import msgspec

from kvconform.errors import StaleEntry, WorkerDied
from kvconform.judging.render import render
from kvconform.judging.verdict import Outcome, Reason, Verdict
from kvconform.search.blame import doubtful, suspicion
from kvconform.search.cell import OUTCOMES, Cell, unsupported
from kvconform.search.counterexample import Counterexample, replayed, steps
from kvconform.search.counterexample import read as read_counterexample
from kvconform.worker.client import DEVICES, WorkerClient
from kvconform_specs.clause import Case
from kvconform_specs.errors import SpecError
from kvconform_specs.program import Program

SCHEMA = "kvconform-known-failures/1"
REASONS = (
    "bug in the backend",
    "bug in a library",
    "bug in a compiler",
    "bug in a driver",
    "limit of the hardware",
    "cause not yet known",
)
LONGEST = timedelta(days=366)
"""How far ahead a row may expire: each known failure must be reviewed once a year."""
VERSION = re.compile(r"[\w.!+-]*\w(\.\*)?")


class Row(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One known failure."""

    backend: str
    """The name of the backend's results."""
    clause: str
    """The clause of the cell."""
    config: str
    """The config of the cell."""
    reason: str
    """One of ``REASONS``."""
    link: str
    """The address of an issue."""
    versions: dict[str, str]
    """By the name of a distribution, or a name in the ``environment`` of results, such as ``python``, ``gpu`` or
    ``driver``; exact, or a prefix that ends in ``.*``."""
    expires: date
    """The last day on which the row holds."""
    counterexample: str
    """A file, relative to the file of known failures."""
    device: str = ""
    """The device on which the row holds; empty for every device."""

    def __post_init__(self) -> None:
        if self.reason not in REASONS:
            raise ValueError(f"unknown reason {self.reason!r}; known: {', '.join(REASONS)}")
        if self.device and self.device not in DEVICES:
            raise ValueError(f"unknown device {self.device!r}; known: {', '.join(DEVICES)}")
        if not re.fullmatch(r"https?://\S+", self.link):
            raise ValueError(f"link: want the address of an issue, got {self.link!r}")
        if not self.versions:
            raise ValueError("versions: want at least one, such as { torch = '2.11.*' }")
        for name, version in self.versions.items():
            if not VERSION.fullmatch(version):
                raise ValueError(f"versions.{name}: want a version such as 2.11.0 or 2.11.*, got {version!r}")

    @property
    def place(self) -> str:
        return f"{self.clause} on {self.backend} [{self.config}]" + (f" on {self.device}" if self.device else "")

    def outdated(self, environment: Mapping[str, object], today: date) -> str:
        """Why the row does not hold on this day and with these versions, or nothing."""
        if self.expires < today:
            return f"expired on {self.expires}: fix the failure, or review it and set a later day"
        for name, version in self.versions.items():
            if name not in environment:
                return f"is known with {name} {version}, and {name} is not installed here"
            if not _is_version(str(environment[name]), version):
                return f"is known with {name} {version}, and this is {environment[name]}: check whether it still fails"
        return ""


def _is_version(installed: str, wanted: str) -> bool:
    """Whether a version is the wanted one; a local part (``+cpu``) counts only where it is wanted."""
    installed = installed if "+" in wanted else installed.partition("+")[0]
    return installed == wanted or (wanted.endswith(".*") and f"{installed}.".startswith(wanted[:-1]))


class KnownFailuresFile(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A file of known failures."""

    schema: str
    """Name and version of this schema."""
    known: list[Row] = []
    """The known failures."""


@dataclass(frozen=True)
class KnownFailure:
    """A row and what its counterexample holds. ``today``: the day that its last one is compared with."""

    row: Row
    stored: Counterexample
    before: list[Program]
    case: Case
    today: date

    def replay(self, cell: Cell, client: WorkerClient, folder: Path) -> Verdict:
        """Replays the counterexample on a fresh worker, and keeps a copy of it in ``folder``.

        Raises StaleEntry if the row does not hold here, BackendUnavailable if the backend cannot run here at all.
        """
        began = time.perf_counter()
        self._check(cell, client)
        tried = replayed(cell.clause, client, self.before, self.case)
        fallback = client.runtime_info(cell.config).get("fallback")
        if fallback:
            words = f"not tested: {fallback}"
            return self._verdict(client, began, Outcome.NOT_EXERCISED, words, reason=Reason.FALLBACK)
        if tried is None:
            raise StaleEntry(f"{self.row.place}: the known failure no longer fails: remove the row")
        stored = self.stored.mismatch
        if doubtful(tried) and (stored is None or not doubtful(stored)):
            words, reason = f"the known failure could not be replayed: {render(tried)}", suspicion(tried)
            return self._verdict(client, began, Outcome.INCONCLUSIVE, words, reason=reason, mismatch=tried)
        now = OUTCOMES[tried.ending]
        was = Outcome.FAIL if self.stored.outcome is Outcome.REFUTED else self.stored.outcome
        if now is not was:
            words = f"the known {was.value} is a {now.value} now: {render(tried)}"
            raise StaleEntry(f"{self.row.place}: {words}")
        words = f"{self.row.reason}, known until {self.row.expires}, {self.row.link}: {render(tried)}"
        counterexample = self.stored.write(folder).name
        more = {"mismatch": tried, "steps": steps(self.case, tried), "counterexample": counterexample}
        return self._verdict(client, began, Outcome.KNOWN_FAILURE, words, **more)

    def _check(self, cell: Cell, client: WorkerClient) -> None:
        """Raises StaleEntry if the row has expired, or its versions or its cell differ from those judged here."""
        named = {**client.versions(self.row.versions), **client.environment}
        words = self.row.outdated(named, self.today)
        if not words and any(program.config != cell.config for program in self.case.programs):
            words = f"has a counterexample of a config other than {cell.config_name}: replace it"
        if not words:
            why = unsupported(cell, client)
            reason = "" if why is None else why[1]
            if not reason:
                with suppress(WorkerDied):  # that it cannot be built may be what is known
                    reason = client.build(cell.config) or ""
            words = f"is about a cell that is unsupported ({reason}): remove the row" if reason else ""
        if words:
            raise StaleEntry(f"{self.row.place}: the known failure {words}")

    def _verdict(self, client: WorkerClient, began: float, outcome: Outcome, words: str, **more: Any) -> Verdict:
        return Verdict(
            clause=self.row.clause,
            config=self.row.config,
            backend=client.spec.address,
            outcome=outcome,
            sentence=words,
            programs=len(self.before) + len(self.case.programs),
            structures=1,
            seconds=round(time.perf_counter() - began, 3),
            **more,
        )


@dataclass(frozen=True)
class KnownFailures:
    """Known failures by backend, clause, config and device."""

    known: Mapping[tuple[str, str, str, str], KnownFailure]

    def find(self, backend: str, cell: Cell, device: str) -> KnownFailure | None:
        """The row of a cell on a device; one that names the device goes before one for every device."""
        place = backend, cell.clause.name, cell.config_name
        return self.known.get((*place, device)) or self.known.get((*place, ""))

    def unmatched_entries(self, backend: str, cells: Iterable[Cell]) -> list[str]:
        """One sentence for each row of a backend that matches none of these cells."""
        found = {(backend, cell.clause.name, cell.config_name) for cell in cells}
        return [
            f"{known.row.place}: the suite has no such cell: remove the row, or correct its names"
            for key, known in self.known.items()
            if key[0] == backend and key[:3] not in found
        ]


EMPTY = KnownFailures({})


def read(path: Path, today: date | None = None) -> KnownFailures:
    """The known failures in a file, with their counterexamples. Raises SpecError if the file is malformed."""
    today = today or date.today()
    try:
        file = msgspec.convert(tomllib.loads(path.read_text(encoding="utf-8")), KnownFailuresFile)
    except OSError as error:
        raise SpecError(str(path), f"cannot be read: {error.strerror}") from error
    except ValueError as error:  # of TOML, of msgspec, of a row
        raise SpecError(str(path), f"holds no known failures: {error}") from error
    if file.schema != SCHEMA:
        raise SpecError(f"{path}.schema", f"unknown schema {file.schema!r}; known: {SCHEMA}")
    known: dict[tuple[str, str, str, str], KnownFailure] = {}
    for number, row in enumerate(file.known):
        at, key = f"{path}.known[{number}]", (row.backend, row.clause, row.config, row.device)
        if key in known:
            raise SpecError(at, f"a second row of {row.place}")
        if row.expires > today + LONGEST:
            raise SpecError(f"{at}.expires", f"{row.expires} is more than a year ahead")
        stored = read_counterexample(path.parent / row.counterexample)
        if stored.clause != row.clause:
            raise SpecError(f"{at}.counterexample", f"is about {stored.clause}, not about {row.clause}")
        before = [Program.from_json(program, f"{at}.before[{i}]") for i, program in enumerate(stored.before)]
        known[key] = KnownFailure(row, stored, before, Case.from_json(stored.case, f"{at}.case"), today)
    return KnownFailures(known)
