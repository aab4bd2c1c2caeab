"""Collects what the items of the suite found, in whatever process they ran, and writes a results file per backend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvconform.judging.verdict import Verdict
from kvconform.pytest_plugin.options import plan_of
from kvconform.results.guarantees import measured
from kvconform.results.known_failures import Row
from kvconform.results.results import Results, Target
from kvconform.run.run import cells, empty


class Judged(msgspec.Struct, kw_only=True):
    """What one item found: a verdict, or why the backend is not available; and what its worker knows of the backend."""

    backend: str
    place: int
    unavailable: str = ""
    lacking: bool = False
    claims: dict[str, Any] = {}
    environment: dict[str, Any] = {}
    target: Target | None = None
    verdict: Verdict | None = None
    runtime_info: dict[str, Any] = {}
    known: Row | None = None
    stale: str = ""


class Recorder:
    """A pytest plugin of the process that runs the session (under pytest-xdist, the controller)."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.found: dict[str, list[Judged]] = {}
        self.lost = False  # whether a process of pytest-xdist died, and an item with it

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.lost |= report.when not in ("setup", "call", "teardown")
        data: str = getattr(report, "kvconform", "")
        if data:
            judged = msgspec.json.decode(data, type=Judged)
            self.found.setdefault(judged.backend, []).append(judged)

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        ended = exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
        finished = ended and not (session.shouldstop or session.shouldfail or self.lost)
        for name, items in self.found.items():
            results(name, items, self.config, finished).write(Path(self.config.getoption("--kv-out")) / f"{name}.json")

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for name, items in self.found.items():
            terminalreporter.write_line(f"kvconform: {name}: {results(name, items, self.config, True).summary}")


def results(name: str, items: list[Judged], config: pytest.Config, finished: bool) -> Results:
    """The results of one backend, its cells in the order of the suite."""
    items = sorted(items, key=lambda item: item.place)
    plan = plan_of(config)
    found = empty(name, config.getoption("--kv-device"), plan)
    for item in items:
        if item.unavailable:
            found.unavailable, found.lacking = item.unavailable, item.lacking
            continue
        assert item.verdict is not None
        found.claims, found.environment, found.target = item.claims, item.environment, item.target
        found.verdicts.append(item.verdict)
        if item.runtime_info:
            found.runtime_info[item.verdict.config] = item.runtime_info
        if item.known is not None:
            found.known_failures.append(item.known)
        if item.stale:
            found.stale.append(item.stale)
    found.seconds = round(sum(verdict.seconds for verdict in found.verdicts), 3)
    found.guarantees = measured(found.verdicts)
    found.finished = finished
    judged = {verdict.key for verdict in found.verdicts}
    if finished and found.verdicts and any((c.clause.name, c.config_name) not in judged for c in cells(plan)):
        # pytest selected some of them, by -k or node ids
        found.clauses = list(dict.fromkeys(verdict.clause for verdict in found.verdicts))
        found.configs = list(dict.fromkeys(verdict.config for verdict in found.verdicts))
    return found
