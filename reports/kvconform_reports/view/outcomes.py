"""The appearance of outcomes: a symbol and a word for each, worst first."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from shlex import quote

from kvconform.judging.render import render
from kvconform.judging.verdict import Outcome, Verdict
from kvconform.results.results import Results

WORST_FIRST: tuple[Outcome, ...] = (
    Outcome.FAIL,
    Outcome.CRASH,
    Outcome.TIMEOUT,
    Outcome.INCONCLUSIVE,
    Outcome.KNOWN_FAILURE,
    Outcome.REFUTED,
    Outcome.NOT_EXERCISED,
    Outcome.UNSUPPORTED,
    Outcome.PASS,
)
SYMBOLS = {
    Outcome.PASS: "✓",
    Outcome.FAIL: "✗",
    Outcome.CRASH: "▲",
    Outcome.TIMEOUT: "◷",
    Outcome.REFUTED: "≠",
    Outcome.KNOWN_FAILURE: "!",
    Outcome.INCONCLUSIVE: "?",
    Outcome.UNSUPPORTED: "–",
    Outcome.NOT_EXERCISED: "○",
}
# One-letter CSS classes, because 20 000 cells have one.
TONES = {
    Outcome.PASS: "p",
    Outcome.FAIL: "f",
    Outcome.CRASH: "f",
    Outcome.TIMEOUT: "f",
    Outcome.REFUTED: "m",
    Outcome.KNOWN_FAILURE: "w",
    Outcome.INCONCLUSIVE: "w",
    Outcome.UNSUPPORTED: "n",
    Outcome.NOT_EXERCISED: "n",
}
MEANINGS = {
    Outcome.PASS: "it held in every program tried",
    Outcome.FAIL: "an output or reported value was wrong, or a legal step raised an exception",
    Outcome.CRASH: "the worker process died",
    Outcome.TIMEOUT: "the worker did not answer in time",
    Outcome.REFUTED: "a measured guarantee does not hold; guarantees are not required",
    Outcome.KNOWN_FAILURE: "it fails for a documented reason (see known failures); not a pass",
    Outcome.INCONCLUSIVE: "no verdict could be reached",
    Outcome.UNSUPPORTED: "the backend does not claim a required ability",
    Outcome.NOT_EXERCISED: "no program exercised it",
}
STANDINGS = {
    0: ("conformant", Outcome.PASS),
    1: ("non-conformant", Outcome.FAIL),
    3: ("unavailable", Outcome.UNSUPPORTED),
    5: ("undecided", Outcome.INCONCLUSIVE),
}


@dataclass(frozen=True)
class Chip:
    """The number of cells with one outcome. ``tone``: the CSS class of its colour."""

    symbol: str
    word: str
    tone: str
    count: int


def chip(outcome: Outcome, count: int) -> Chip:
    return Chip(SYMBOLS[outcome], outcome.value, TONES[outcome], count)


def chips(outcomes: Iterable[Outcome]) -> tuple[Chip, ...]:
    """The number of cells for each outcome that occurs, worst first."""
    counts = Counter(outcomes)
    return tuple(chip(outcome, counts[outcome]) for outcome in WORST_FIRST if counts[outcome])


@dataclass(frozen=True)
class Standing:
    """The overall result of one backend's run: word, symbol and sentence of its exit code. ``notes``: caveats.
    ``stale``: invalid rows of the known failures, each an error."""

    code: int
    word: str
    symbol: str
    tone: str
    sentence: str
    notes: tuple[str, ...]
    stale: tuple[str, ...]


def standing(results: Results) -> Standing:
    code, said, sentence, _by = results.conclusion
    word, like = ("part of a run", Outcome.NOT_EXERCISED) if results.partial and code == 0 else STANDINGS[code]
    sentence = f"{said}: {sentence}" if said not in ("", word) else sentence  # the word is shown above it
    notes = []
    if not results.finished:
        notes.append(f"This run did not finish: only the {len(results.verdicts)} cells below were judged.")
    if results.unavailable and results.verdicts:
        notes.append(f"It stopped after {len(results.verdicts)} cells, which are shown below.")
    cut = sum(verdict.cut for verdict in results.verdicts)
    if cut:
        notes.append(f"In {counted(cut, 'cell')} the time limit ended before all planned programs were judged.")
    return Standing(code, word, SYMBOLS[like], TONES[like], sentence, tuple(notes), tuple(results.stale))


def labels(results: Sequence[Results]) -> list[str]:
    """The name of each column: the backend, with its device, dtypes or index if names repeat."""
    names = [result.backend for result in results]
    for tell in ([result.device for result in results], [", ".join(result.dtypes) for result in results]):
        seen = Counter(names)
        names = [f"{name} ({more})" if seen[name] > 1 else name for name, more in zip(names, tell, strict=True)]
    seen = Counter(names)
    return [f"{name} #{i + 1}" if seen[name] > 1 else name for i, name in enumerate(names)]


def replay_line(backend: str, counterexample: str, folder: str) -> str:
    """The command that replays a counterexample; empty without a file."""
    if not counterexample:
        return ""
    return f"kvconform replay {quote(str(PurePosixPath(folder, 'failures', backend, counterexample)))}"


def given_now(verdict: Verdict) -> str:
    """What a known failure gives now, without what its row says; the report shows both."""
    return "" if verdict.mismatch is None else render(verdict.mismatch)


def short(link: str) -> str:
    """``pytorch/executorch#2010`` for an address on GitHub; other addresses unchanged."""
    found = re.fullmatch(r"https://github\.com/([^/]+/[^/]+)/(?:issues|pull|discussions)/(\d+)", link)
    return f"{found[1]}#{found[2]}" if found else link.removeprefix("https://")


def address(bug: str) -> str:
    """The address of a bug given as ``owner/repository/issues/1``; empty if it is only text."""
    if re.fullmatch(r"[\w.-]+/[\w.-]+/(issues|pull)/\d+", bug):
        return f"https://github.com/{bug}"
    return bug if re.fullmatch(r"https?://\S+", bug) else ""


def percent(part: int, whole: int) -> str:
    """A share that is 0 % or 100 % only if it is none or all."""
    return f"{round(100 * part / whole) if part in (0, whole) else min(max(round(100 * part / whole), 1), 99)} %"


def counted(number: int, noun: str) -> str:
    """``1 cell``, ``12 640 cells``: groups of three, separated by narrow no-break spaces."""
    grouped = f"{number:,}".replace(",", "\u202f")
    return f"{grouped} {noun}" if number == 1 else f"{grouped} {noun}s"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def when(started: str) -> str:
    """An ISO time in readable form."""
    return started.replace("T", " ").replace("+00:00", " UTC")
