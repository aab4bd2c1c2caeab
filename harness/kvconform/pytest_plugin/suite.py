"""The suite as pytest items, one for each backend and cell, each with the marker ``kvconform``.

PASS passes, and a known failure is ``xfailed``. UNSUPPORTED and REFUTED, which do not speak against conformance, are
skipped with their reason, and so is a backend for which this machine lacks something. Everything else fails, and so
does a stale row of the known failures. The results are written to OUT/<backend>.json.

``--dist loadgroup`` of pytest-xdist keeps a backend and config in one process, so that each backend is built once.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from kvconform.api import file_name
from kvconform.errors import BackendUnavailable, InvalidBackend, KvconformError, Unavailable
from kvconform.judging.verdict import Outcome
from kvconform.pytest_plugin.options import known_failures_of, plan_of, spec_of
from kvconform.pytest_plugin.plugin import DATA
from kvconform.pytest_plugin.record import Judged
from kvconform.results.known_failures import KnownFailures
from kvconform.run.run import cells, describe, empty, unmatched_entries
from kvconform.run.unit import judged
from kvconform.search.cell import Cell
from kvconform.worker.client import WorkerClient

pytestmark = pytest.mark.kvconform
Clients = dict[str, WorkerClient | KvconformError]
"""The live workers, and why a backend has none."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    config = metafunc.config
    backends: list[str] = config.getoption("--kv-backend")
    if not backends:
        raise pytest.UsageError("--kv-backend: name at least one backend to judge")
    try:
        known, plan = known_failures_of(config), plan_of(config)
        for backend in backends:
            spec_of(config, backend)
    except KvconformError as error:
        raise pytest.UsageError(str(error)) from error
    stale = [words for backend in backends for words in unmatched_entries(known, file_name(backend))]
    if stale:
        raise pytest.UsageError("\n".join(stale))
    params = [
        pytest.param(
            backend,
            cell,
            place,
            id=f"{cell.clause.name}-{backend}-{cell.config_name}",
            marks=pytest.mark.xdist_group(f"{backend}-{cell.config_name}"),
        )
        for backend in backends
        for place, cell in enumerate(cells(plan))
    ]
    metafunc.parametrize(("backend", "cell", "place"), params)


@pytest.fixture(scope="session")
def known_failures(pytestconfig: pytest.Config) -> KnownFailures:
    return known_failures_of(pytestconfig)


@pytest.fixture(scope="session")
def clients() -> Iterator[Clients]:
    opened: Clients = {}
    yield opened
    for client in opened.values():
        if isinstance(client, WorkerClient):
            client.close()


def test_clause(
    backend: str,
    cell: Cell,
    place: int,
    clients: Clients,
    known_failures: KnownFailures,
    request: pytest.FixtureRequest,
) -> None:
    out, name = Path(request.config.getoption("--kv-out")), file_name(backend)
    record, folder = Judged(backend=name, place=place), out / "failures" / name
    try:
        client = _client(backend, clients, request.config)
        if client.target is not None and cell.config_name not in client.configs:
            pytest.fail(
                f"{backend} is a black box: judge it with kvconform check, or with conformance()", pytrace=False
            )
        plan, known = plan_of(request.config), known_failures.find(name, cell, client.spec.device)
        verdict, record.stale = judged(cell, client, plan.effort, plan.seed, folder, known)
    except BackendUnavailable as error:
        record.unavailable, record.lacking = str(error), isinstance(error, Unavailable)
        request.node.stash[DATA] = msgspec.json.encode(record).decode()
        if record.lacking:
            pytest.skip(f"{backend}: {error}")
        pytest.fail(f"{backend}: {error}", pytrace=False)
    except InvalidBackend as error:
        pytest.fail(str(error), pytrace=False)
    described = empty(name, client.spec.device, plan)
    describe(described, client)
    record.claims, record.environment, record.target = described.claims, described.environment, described.target
    record.verdict, record.runtime_info = verdict, client.runtime_info(cell.config)
    record.known = known.row if known is not None and verdict.outcome is Outcome.KNOWN_FAILURE else None
    request.node.stash[DATA] = msgspec.json.encode(record).decode()

    words = f"{verdict.outcome.value}: {verdict.sentence}"
    if verdict.outcome is Outcome.KNOWN_FAILURE:
        pytest.xfail(f"{backend}: {words}")
    lines = [record.stale] if record.stale else []
    if verdict.outcome not in (Outcome.PASS, Outcome.UNSUPPORTED, Outcome.REFUTED):
        lines.append(f"{verdict.clause} on {backend} [{verdict.config}]: {words}")
        if verdict.steps:
            lines.append(f"  steps: {verdict.steps}")
        if verdict.counterexample:
            lines.append(f"  replay: kvconform replay {folder / verdict.counterexample}")
    if lines:
        pytest.fail("\n".join(lines), pytrace=False)
    if verdict.outcome is not Outcome.PASS:
        pytest.skip(f"{backend}: {words if verdict.outcome is Outcome.REFUTED else verdict.sentence}")


def _client(backend: str, clients: Clients, config: pytest.Config) -> WorkerClient:
    """The worker of a backend, started once in this process. Raises what starting it raised."""
    if backend not in clients:
        try:
            clients[backend] = WorkerClient(spec_of(config, backend))
        except (BackendUnavailable, InvalidBackend) as error:
            clients[backend] = error
    client = clients[backend]
    if isinstance(client, KvconformError):
        raise client
    return client
