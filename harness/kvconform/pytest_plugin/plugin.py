"""The pytest options of the suite (``--kv-backend`` and others). The suite itself is ``kvconform.pytest_plugin.suite``.

pytest loads this module in every session where kvconform is installed: it imports nothing else of kvconform until a
backend is named.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest

DATA = pytest.StashKey[str]()
"""What an item of the suite found, as JSON (``record.Judged``); its report carries it to the process that writes."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("kvconform", "conformance of KV caches")
    add = group.addoption
    add("--kv-backend", action="append", default=[], help="the backend; may be repeated")
    add("--kv-effort", default=None, help="how much to try for each cell: smoke, pr (default) or nightly")
    add("--kv-seed", type=int, default=0, help="the seed of the run")
    add("--kv-device", default="cpu", help="cpu or cuda")
    add("--kv-dtype", action="append", default=[], help="float32 (default), bfloat16 or float16; may be repeated")
    add("--kv-clause", action="append", default=[], help="only clauses whose name starts with this; may be repeated")
    add("--kv-config", action="append", default=[], help="only configs whose name starts with this; may be repeated")
    add("--kv-python", default=None, help="the interpreter of the workers")
    add("--kv-step-timeout", type=float, default=None, help="seconds without progress after which a worker is killed")
    add("--kv-start-method", default="fork", help="how workers are started: fork, where that is possible, or spawn")
    add("--kv-known-failures", default="", help="a TOML file of known failures")
    add("--kv-out", default="results", help="the folder for results and counterexamples")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "kvconform: a cell of the conformance suite: one clause under one config")
    if config.getoption("--kv-backend") and not hasattr(config, "workerinput"):  # not in a worker of pytest-xdist
        from kvconform.pytest_plugin.record import Recorder

        config.pluginmanager.register(Recorder(config))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[Any]) -> Generator[None, Any, Any]:
    report = yield
    if call.when == "call" and DATA in item.stash:
        report.kvconform = item.stash[DATA]
    return report
