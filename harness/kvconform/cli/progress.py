"""What ``run`` and ``check`` print while they judge: each failure at once, and how far they are."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from kvconform.cli.options import duration, progress_bar, say
from kvconform.judging.verdict import Outcome, Verdict
from kvconform.results.results import Results
from kvconform.run import check as checks
from kvconform.run.run import Key
from kvconform.worker.start import frameworks as imported_for

UNDECIDED = (Outcome.INCONCLUSIVE, Outcome.NOT_EXERCISED)
EVERY = 30.0
"""Seconds between two lines that say how far a run is, where no bar shows it."""


class Pace:
    """How many cells are judged, and how long the others take: each as long as cells of its clause took under other
    configs; where none is judged yet, as long as a cell takes on average."""

    def __init__(self) -> None:
        self.cells, self.judged = 0, 0
        self._left: Counter[str] = Counter()
        self._times: dict[str, list[float]] = {}

    def begin(self, cells: Sequence[Key]) -> None:
        self.cells, self._left = len(cells), Counter(clause for clause, _config in cells)

    def tell(self, clause: str, seconds: float) -> None:
        self.judged += 1
        self._left[clause] -= 1
        self._times.setdefault(clause, []).append(seconds)

    @property
    def seconds_left(self) -> float | None:
        """None as long as no cell is judged."""
        if not self.judged:
            return None
        mean = sum(map(sum, self._times.values())) / self.judged
        found = 0.0
        for clause, count in self._left.items():
            times = self._times.get(clause)
            found += max(count, 0) * (sum(times) / len(times) if times else mean)
        return found


class Progress:
    """Prints verdicts as they come, for readers and for logs: nothing waits for the end of a run that may be killed.

    Failures are printed at once, and why there is no verdict, each reason once. Other outcomes are counted: a line for
    each config. Of a target (``chapters``) its header comes first, and there is a line for each chapter. On a terminal
    a bar shows what is left; elsewhere a line does so, every ``EVERY`` seconds.
    """

    def __init__(self, name: str, folder: Path, *, quiet: bool, chapters: bool = False) -> None:
        self.name, self.folder, self.quiet, self.chapters = name, folder, quiet, chapters
        self._bar = progress_bar(quiet)
        self._task = self._bar.add_task(name, total=None, left="", running="loading")
        self.told: list[str] = []  # the header of a target
        self._group = ""
        self._counts: Counter[str] = Counter()
        self._reasons: set[str] = set()
        self._errors: dict[tuple[str, ...], str] = {}  # exceptions that were told, with the clause
        self._pace, self._running, self._began = Pace(), "loading", time.monotonic()
        self._ended = threading.Event()
        self._lines = threading.Thread(target=self._say_how_far, daemon=True)

    def __enter__(self) -> Progress:
        self._bar.start()
        if not self.quiet and not self._bar.console.is_terminal:
            self._lines.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, traceback: TracebackType | None) -> None:
        self._ended.set()
        if self._lines.is_alive():
            self._lines.join()
        self._count()
        self._bar.stop()

    def start(self, address: str, method: str, effort: str) -> None:
        """The first line, before a worker imports anything: what is judged, and how."""
        if self.chapters:
            frameworks = {name.partition(".")[0]: None for name in imported_for(address)}
            importing = f"; importing {', '.join(frameworks)}" if frameworks else ""
            self._say(f"judging {address} (effort {effort}; start method {method}){importing}")

    def begin(self, results: Results, cells: Sequence[Key]) -> None:
        if self.chapters and results.workers.startswith("spawn: "):
            self._say(f"  workers are new processes ({results.workers.removeprefix('spawn: ')})")
        if self.chapters:
            self.told = list(checks.header(results))
            for line in self.told:
                self._say(line)
        self._pace.begin(cells)
        self._bar.update(self._task, total=len(cells))

    def running(self, cell: Key) -> None:
        """The cell that is judged next."""
        self._show("{} [{}]".format(*cell))

    def tell(self, verdict: Verdict) -> None:
        self._pace.tell(verdict.clause, verdict.seconds)
        self._bar.advance(self._task)
        self._show("explaining failures" if self._pace.judged >= self._pace.cells else self._running)
        group = f"[{verdict.config}]" + (f" {verdict.clause.partition('.')[0]}" if self.chapters else "")
        if group != self._group:
            self._count()
            self._group = group
        self._counts[verdict.outcome.value] += 1
        self._counts["cut by the time limit"] += verdict.cut
        cell = f"{verdict.clause} on {self.name} [{verdict.config}]"
        if verdict.outcome.broken and verdict.error_pattern and verdict.error_pattern in self._errors:
            self._say(f"{cell}: the error of {self._errors[verdict.error_pattern]}", "red")
        elif verdict.outcome.broken:
            self._errors[verdict.error_pattern] = verdict.clause
            self._say(f"{cell}: {verdict.sentence}", "red")
            file = self.folder / "failures" / self.name / verdict.counterexample
            if verdict.counterexample and not self.chapters:
                for line in (*checks.steps(verdict), f"  replay: kvconform replay {file}"):
                    self._say(line)
        elif verdict.outcome in UNDECIDED and verdict.sentence not in self._reasons:
            self._reasons.add(verdict.sentence)
            self._say(f"{verdict.outcome.value}: {cell}: {verdict.sentence}", "yellow")

    def _show(self, running: str) -> None:
        """On the bar, what is running and how long the rest takes."""
        self._running = running
        left = self._pace.seconds_left
        self._bar.update(self._task, running=running, left="" if left is None else f"about {duration(left)} left")

    def _say_how_far(self) -> None:
        while not self._ended.wait(EVERY):
            self._say(self._how_far())

    def _how_far(self) -> str:
        taken, pace = duration(time.monotonic() - self._began), self._pace
        if not pace.cells:
            return f"{self.name}: {self._running} for {taken}"
        left = pace.seconds_left
        rest = f"; about {duration(left)} left" if left is not None and pace.judged < pace.cells else ""
        return f"{self.name}: {pace.judged} of {pace.cells} cells in {taken}{rest}; now {self._running}"

    def _count(self) -> None:
        if self._group:
            self._say(f"{self.name} {self._group}: {checks.counted(self._counts)}")
        self._counts.clear()

    def _say(self, line: str, style: str = "") -> None:
        if not self.quiet:
            say(line, self._bar.console, style)
