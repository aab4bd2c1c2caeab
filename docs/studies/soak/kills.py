"""Runs that are killed at random moments: what the file held stays, and is not judged again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import msgspec

from kvconform.judging.verdict import Outcome, Verdict
from kvconform.results import results

PART = ("--effort", "smoke", "--config", "attention-gqa", "--config", "attention-window")
LATEST = 4.0
"""Seconds after its start within which a run is killed."""
GONE = 10.0
"""Seconds within which the workers of a killed run must have ended."""


class Kills(msgspec.Struct, frozen=True, kw_only=True):
    """What came of runs that were killed."""

    parents: int = 0
    """How many runs were killed alone, their workers left to themselves."""
    groups: int = 0
    """How many runs were killed together with their workers."""
    workers: int = 0
    """How many workers were killed, while their run went on."""
    runs: int = 0
    """How many runs came to their end, after being resumed or without."""
    undecided: int = 0
    """How many cells of these are inconclusive, since their worker was killed: no pass and no failure."""
    lost: int = 0
    """How many verdicts that a file held were not in a later file of the same run."""
    twice: int = 0
    """How many verdicts were another one in a later file of the same run: judged twice."""
    unreadable: int = 0
    """How many files could not be read after a kill."""
    left: int = 0
    """How many processes were still there after a run was killed."""
    convicted: int = 0
    """How many cells failed, of a backend that is right."""


def soak(number: int, folder: Path, seed: int = 0, say: Callable[[str], None] = print) -> Kills:
    """Kills runs and workers ``number`` times. ``folder``: a scratch folder."""
    random, found = Random(seed), dict.fromkeys(Kills.__struct_fields__, 0)
    path, kills = folder / "0" / "numpy.json", 0
    while kills < number:
        command = [sys.executable, "-m", "kvconform", "run", "-b", "numpy", *PART, "--quiet", "--out", str(path.parent)]
        before = _verdicts(path)
        with subprocess.Popen(command, cwd=folder, start_new_session=True, stdout=subprocess.DEVNULL) as run:
            kind = random.choice(("parents", "groups", "workers"))
            kills += _kill(run, kind, random.uniform(0.0, LATEST), found)
            run.wait()
        found["unreadable"] += path.exists() and _unreadable(path)
        after = _verdicts(path)
        found["lost"] += len(before.keys() - after.keys())
        found["twice"] += sum(after[key] != one for key, one in before.items() if key in after)
        found["convicted"] += sum(one.outcome.broken for key, one in after.items() if key not in before)
        if path.exists() and results.read(path).finished:
            found["runs"] += 1
            found["undecided"] += sum(one.outcome is Outcome.INCONCLUSIVE for one in after.values())
            path = folder / str(found["runs"]) / "numpy.json"
        if kills % 20 == 0:
            say(f"{kills} kills: {found}")
    return Kills(**found)


def _kill(run: subprocess.Popen[bytes], kind: str, after: float, found: dict[str, int]) -> int:
    """Kills a run, or one of its workers, if it has not ended before. Returns the number of kills."""
    try:
        run.wait(after)
    except subprocess.TimeoutExpired:
        children = list(_children(run.pid))
        if kind == "workers" and not children:
            return 0
        target = children[-1] if kind == "workers" else run.pid
        os.killpg(run.pid, signal.SIGKILL) if kind == "groups" else os.kill(target, signal.SIGKILL)
        found[kind] += 1
        if kind != "workers":
            run.wait()
            ends = time.monotonic() + GONE
            while any(map(_alive, children)) and time.monotonic() < ends:
                time.sleep(0.05)
            found["left"] += sum(map(_alive, children))
        return 1
    return 0


def _children(process: int) -> Iterator[int]:
    """The processes below one, nearest first."""
    for place in Path("/proc").iterdir():
        if place.name.isdecimal():
            try:
                parent = int((place / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue  # it has ended
            if parent == process:
                yield int(place.name)
                yield from _children(int(place.name))


def _alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _verdicts(path: Path) -> dict[tuple[str, str], Verdict]:
    return {} if not path.exists() else {verdict.key: verdict for verdict in results.read(path).verdicts}


def _unreadable(path: Path) -> bool:
    try:
        results.read(path)
    except ValueError:
        return True
    return False
