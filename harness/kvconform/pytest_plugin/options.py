"""The options of the suite as a plan, the known failures, and how to start a backend."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from kvconform.results.known_failures import EMPTY, KnownFailures
from kvconform.results.known_failures import read as read_known_failures
from kvconform.run.run import Plan, artefacts, plan_for
from kvconform.search.effort import DEFAULT_EFFORT
from kvconform.worker.client import STEP_TIMEOUT, WorkerSpec


def plan_of(config: pytest.Config) -> Plan:
    """Raises BadArgument."""
    option = config.getoption
    return plan_for(
        option("--kv-effort") or DEFAULT_EFFORT,
        option("--kv-seed"),
        option("--kv-dtype") or ("float32",),
        option("--kv-clause"),
        option("--kv-config"),
    )


def known_failures_of(config: pytest.Config) -> KnownFailures:
    """Raises SpecError if the file is malformed."""
    file: str = config.getoption("--kv-known-failures")
    return read_known_failures(Path(file)) if file else EMPTY


def spec_of(config: pytest.Config, backend: str) -> WorkerSpec:
    """Raises BadArgument for an unknown device."""
    option = config.getoption
    return WorkerSpec(
        backend,
        option("--kv-device"),
        option("--kv-python") or sys.executable,
        option("--kv-step-timeout") or STEP_TIMEOUT,
        {"KVCONFORM_ARTEFACTS": artefacts(Path(option("--kv-out")))},
        start_method=option("--kv-start-method"),
    )
