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
from kvconform.search.cell import Key
from kvconform.worker.start import frameworks as imported_for

UNDECIDED = (Outcome.INCONCLUSIVE, Outcome.NOT_EXERCISED)


EVERY = 30.0
"""Seconds between two lines that say how far a run is, where no bar shows it."""


class Pace:
    """How many cells are judged, and how long the others take: each as long as cells of its clause took under other
    configs; where none is judged yet, as long as a cell takes on average."""

    def __init__(self) -> None:
        self.cells, self.judged = 0, 0
        self.running: dict[Key, None] = {}
        self._left: Counter[str] = Counter()
        self._times: dict[str, list[float]] = {}

    def begin(self, keys: Sequence[Key]) -> None:
        self.cells, self._left = len(keys), Counter(clause for clause, _config in keys)

    def tell(self, key: Key, seconds: float) -> None:
        self.judged += 1
        self._left[key[0]] -= 1
        self._times.setdefault(key[0], []).append(seconds)
        self.running.pop(key, None)

    @property
    def now(self) -> str:
        """What is running, in words."""
        if not self.cells:
            return "loading"
        if self.judged >= self.cells:
            return "explaining failures"
        names = [f"{clause} [{config}]" for clause, config in tuple(self.running)]
        return f"{names[0]}{f' and {len(names) - 1} more' * (len(names) > 1)}" if names else ""

    @property
    def left(self) -> str:
        """How long the other cells take, in words; empty as long as no cell is judged."""
        seconds = self.seconds_left
        return "" if seconds is None or self.judged >= self.cells else f"about {duration(seconds)} left"

    @property
    def seconds_left(self) -> float | None:
        """None as long as no cell is judged. As many cells are judged at once as are running."""
        if not self.judged:
            return None
        mean = sum(map(sum, self._times.values())) / self.judged
        found = 0.0
        for clause, count in self._left.items():
            times = self._times.get(clause)
            found += max(count, 0) * (sum(times) / len(times) if times else mean)
        return found / max(len(self.running), 1)


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
        self._cells: Counter[str] = Counter()  # by group, how many are to come
        self._counts: dict[str, Counter[str]] = {}  # by group, the outcomes; several configs may be under way
        self._reasons: set[str] = set()
        self._errors: dict[tuple[str, ...], str] = {}  # exceptions that were told, with the clause
        self._pace, self._how_far, self._began = Pace(), "loading", time.monotonic()
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
        self._pace.begin(keys)
        self._bar.update(self._task, total=len(keys))

    def running(self, key: Key) -> None:
        """A cell that is judged from now on."""
        self._pace.running[key] = None
        self._show()

    def tell(self, verdict: Verdict) -> None:
        self._pace.tell(verdict.key, verdict.seconds)
        self._bar.advance(self._task)
        self._show()
        group = self._group(*verdict.key)
        counts = self._counts.setdefault(group, Counter())
        counts[verdict.outcome.value] += 1
        counts["cut by the time limit"] += verdict.cut
        self._cells[group] -= 1
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
        if not self._cells[group]:
            self._count(group)

    def _group(self, clause: str, config: str) -> str:
        return f"[{config}]" + (f" {clause.partition('.')[0]}" if self.chapters else "")

    def _count(self, group: str) -> None:
        self._say(f"{self.name} {group}: {checks.counted(self._counts.pop(group))}")

    def _show(self) -> None:
        pace = self._pace
        self._bar.update(self._task, left=pace.left, running=pace.now)
        self._how_far = "; ".join(filter(None, (f"{pace.judged} of {pace.cells} cells", pace.left, pace.now)))

    def _say_how_far(self) -> None:
        """In a thread of its own: it only reads a string."""
        while not self._ended.wait(EVERY):
            self._say(f"{self.name}: after {duration(time.monotonic() - self._began)}: {self._how_far}")

    def _say(self, line: str, style: str = "") -> None:
        if not self.quiet:
            say(line, self._bar.console, style)
