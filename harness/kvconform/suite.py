"""The suite as pytest items: one for each backend and cell. Only a PASS is green; UNSUPPORTED skips with its reason.

xdist's ``--dist loadgroup`` keeps a backend and config in one process, so that each subject is built once.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvconform.budget import BUDGETS
from kvconform.cell import Cell, run_cell
from kvconform.doors import file_name
from kvconform.run import Plan, cells
from kvconform.subject import Infrastructure, Launch, Subject
from kvconform.verdict import Outcome


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.getoption
    backends: list[str] = option("--kv-backend")
    if not backends:
        raise pytest.UsageError("--kv-backend: name at least one backend to judge")
    budget: str = option("--kv-budget")
    if budget not in BUDGETS:
        raise pytest.UsageError(f"--kv-budget: unknown budget {budget!r}; known: {', '.join(BUDGETS)}")
    plan = Plan(BUDGETS[budget], option("--kv-seed"), tuple(option("--kv-dtype") or ["float32"]))
    params = [
        pytest.param(
            backend, cell, id=f"{cell.clause.name}-{backend}-{cell.config_name}",
            marks=pytest.mark.xdist_group(f"{backend}-{cell.config_name}"),
        )
        for backend in backends for cell in cells(plan)
    ]  # fmt: skip
    metafunc.parametrize(("backend", "cell"), params)


@pytest.fixture(scope="session")
def subjects(request: pytest.FixtureRequest) -> Iterator[dict[str, Subject]]:
    opened: dict[str, Subject] = {}
    yield opened
    for subject in opened.values():
        subject.close()


def test_clause(backend: str, cell: Cell, subjects: dict[str, Subject], request: pytest.FixtureRequest) -> None:
    option = request.config.getoption
    out = Path(option("--kv-out"))
    try:
        if backend not in subjects:
            artefacts = {"KVCONFORM_ARTEFACTS": str((out / "artefacts").resolve())}
            subjects[backend] = Subject(Launch(backend, option("--kv-device"), environment=artefacts))
        folder = out / "failures" / file_name(backend)
        verdict = run_cell(cell, subjects[backend], BUDGETS[option("--kv-budget")], option("--kv-seed"), folder)
    except Infrastructure as sentence:
        pytest.fail(f"{backend}: {sentence}", pytrace=False)
    if verdict.outcome is Outcome.UNSUPPORTED:
        pytest.skip(f"{backend}: {verdict.sentence}")
    if verdict.outcome is not Outcome.PASS:
        lines = [f"{verdict.clause} on {backend} [{verdict.config}]: {verdict.outcome.value}: {verdict.sentence}"]
        if verdict.counterexample:
            lines.append(f"  replay: kvconform replay {folder / verdict.counterexample}")
        pytest.fail("\n".join(lines), pytrace=False)
