"""What ``run`` and ``check`` print while they judge: each failure at once, and how far they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from kvconform.cli.options import progress_bar, say
from kvconform.judging.verdict import Outcome, Verdict
from kvconform.results.results import Results
from kvconform.run import check as checks
from kvconform.search.cell import Key
from kvconform.worker.start import frameworks as imported_for

UNDECIDED = (Outcome.INCONCLUSIVE, Outcome.NOT_EXERCISED)


class Progress:
    """Prints verdicts as they come, for readers and for logs: nothing waits for the end of a run that may be killed.

    Failures are printed at once, and why there is no verdict, each reason once. Other outcomes are counted: a line for
    each config. Of a target (``chapters``) its header comes first, and there is a line for each chapter. On a terminal
    a bar shows what is left.
    """

    def __init__(self, name: str, folder: Path, *, quiet: bool, chapters: bool = False) -> None:
        self.name, self.folder, self.quiet, self.chapters = name, folder, quiet, chapters
        self._bar = progress_bar(quiet)
        self._task = self._bar.add_task(name, total=None)
        self.told: list[str] = []  # the header of a target
        self._cells: Counter[str] = Counter()  # by group, how many are to come
        self._counts: dict[str, Counter[str]] = {}  # by group, the outcomes; several configs may be under way
        self._reasons: set[str] = set()
        self._errors: dict[tuple[str, ...], str] = {}  # exceptions that were told, with the clause

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, traceback: TracebackType | None) -> None:
        for group in tuple(self._counts):
            self._count(group)
        self._bar.stop()

    def start(self, address: str, method: str, effort: str) -> None:
        """The first line, before a worker imports anything: what is judged, and how."""
        if self.chapters:
            frameworks = {name.partition(".")[0]: None for name in imported_for(address)}
            importing = f"; importing {', '.join(frameworks)}" if frameworks else ""
            self._say(f"judging {address} (effort {effort}; start method {method}){importing}")

    def begin(self, results: Results, keys: Sequence[Key]) -> None:
        self._cells = Counter(self._group(*key) for key in keys)
        if self.chapters and results.workers.startswith("spawn: "):
            self._say(f"  workers are new processes ({results.workers.removeprefix('spawn: ')})")
        if self.chapters or results.served is not None:
            self.told = list(checks.header(results))
            for line in self.told:
                self._say(line)
        self._bar.update(self._task, total=len(keys))

    def tell(self, verdict: Verdict) -> None:
        self._bar.advance(self._task)
        group = self._group(*verdict.key)
        counts = self._counts.setdefault(group, Counter())
        counts[verdict.outcome.value] += 1
        counts["cut by the time limit"] += verdict.cut
        self._cells[group] -= 1
        cell = f"{verdict.clause} on {self.name} [{verdict.config}]"
        if verdict.outcome.broken and verdict.error_pattern and verdict.error_pattern in self._errors:
            self._say(f"{cell}: the error of {self._errors[verdict.error_pattern]}")
        elif verdict.outcome.broken:
            self._errors[verdict.error_pattern] = verdict.clause
            self._say(f"{cell}: {verdict.sentence}")
            file = self.folder / "failures" / self.name / verdict.counterexample
            if verdict.counterexample and not self.chapters:
                for line in (*checks.steps(verdict), f"  replay: kvconform replay {file}"):
                    self._say(line)
        elif verdict.outcome in UNDECIDED and verdict.sentence not in self._reasons:
            self._reasons.add(verdict.sentence)
            self._say(f"{verdict.outcome.value}: {cell}: {verdict.sentence}")
        if not self._cells[group]:
            self._count(group)

    def _group(self, clause: str, config: str) -> str:
        return f"[{config}]" + (f" {clause.partition('.')[0]}" if self.chapters else "")

    def _count(self, group: str) -> None:
        self._say(f"{self.name} {group}: {checks.counted(self._counts.pop(group))}")

    def _say(self, line: str) -> None:
        if not self.quiet:
            say(line, self._bar.console)
