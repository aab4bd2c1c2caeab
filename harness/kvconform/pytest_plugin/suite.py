"""The suite as pytest items: one for each backend and cell.

A PASS is green, and so is a known failure by its row of the known failures (``xfailed``). UNSUPPORTED and REFUTED, which say
nothing against conformance, skip with their reason; everything else fails, and so does a stale row.

xdist's ``--dist loadgroup`` keeps a backend and config in one process, so that each backend is built once.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvconform.api import file_name
from kvconform.errors import BackendUnavailable
from kvconform.judging.verdict import Outcome
from kvconform.results.known_failures import EMPTY, KnownFailures
from kvconform.results.known_failures import read as read_known_failures
from kvconform.run.run import Plan, cells, judged, unmatched_entries
from kvconform.search.cell import Cell
from kvconform.search.effort import EFFORTS
from kvconform.worker.client import WorkerClient, WorkerSpec
from kvconform_specs.errors import SpecError


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.getoption
    backends: list[str] = option("--kv-backend")
    if not backends:
        raise pytest.UsageError("--kv-backend: name at least one backend to judge")
    effort: str = option("--kv-effort")
    if effort not in EFFORTS:
        raise pytest.UsageError(f"--kv-effort: unknown effort {effort!r}; known: {', '.join(EFFORTS)}")
    known = ledger_of(metafunc.config)
    stale = [words for backend in backends for words in unmatched_entries(known, file_name(backend))]
    if stale:
        raise pytest.UsageError("\n".join(stale))
    params = [
        pytest.param(
            backend,
            cell,
            id=f"{cell.clause.name}-{backend}-{cell.config_name}",
            marks=pytest.mark.xdist_group(f"{backend}-{cell.config_name}"),
        )
        for backend in backends
        for cell in cells(plan_of(metafunc.config))
    ]
    metafunc.parametrize(("backend", "cell"), params)


def plan_of(config: pytest.Config) -> Plan:
    option = config.getoption
    return Plan(EFFORTS[option("--kv-effort")], option("--kv-seed"), tuple(option("--kv-dtype") or ["float32"]))


def ledger_of(config: pytest.Config) -> KnownFailures:
    file: str = config.getoption("--kv-known-failures")
    try:
        return read_known_failures(Path(file)) if file else EMPTY
    except SpecError as sentence:
        raise pytest.UsageError(f"--kv-known-failures: {sentence}") from sentence


@pytest.fixture(scope="session")
def known_failures(pytestconfig: pytest.Config) -> KnownFailures:
    return ledger_of(pytestconfig)


@pytest.fixture(scope="session")
def clients(request: pytest.FixtureRequest) -> Iterator[dict[str, WorkerClient]]:
    opened: dict[str, WorkerClient] = {}
    yield opened
    for client in opened.values():
        client.close()


def test_clause(
    backend: str,
    cell: Cell,
    clients: dict[str, WorkerClient],
    known_failures: KnownFailures,
    request: pytest.FixtureRequest,
) -> None:
    option = request.config.getoption
    out, name = Path(option("--kv-out")), file_name(backend)
    folder = out / "failures" / name
    try:
        if backend not in clients:
            artefacts = {"KVCONFORM_ARTEFACTS": str((out / "artefacts").resolve())}
            clients[backend] = WorkerClient(WorkerSpec(backend, option("--kv-device"), environment=artefacts))
        plan = plan_of(request.config)
        verdict, stale = judged(cell, clients[backend], plan, folder, known_failures.find(name, cell))
    except BackendUnavailable as sentence:
        pytest.fail(f"{backend}: {sentence}", pytrace=False)
    words = f"{verdict.outcome.value}: {verdict.sentence}"
    if verdict.outcome is Outcome.KNOWN_FAILURE:
        pytest.xfail(f"{backend}: {words}")
    lines = [stale] if stale else []
    if verdict.outcome not in (Outcome.PASS, Outcome.UNSUPPORTED, Outcome.REFUTED):
        lines.append(f"{verdict.clause} on {backend} [{verdict.config}]: {words}")
        if verdict.counterexample:
            lines.append(f"  replay: kvconform replay {folder / verdict.counterexample}")
    if lines:
        pytest.fail("\n".join(lines), pytrace=False)
    if verdict.outcome is not Outcome.PASS:
        pytest.skip(f"{backend}: {words if verdict.outcome is Outcome.REFUTED else verdict.sentence}")
