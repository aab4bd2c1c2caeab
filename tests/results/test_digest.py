"""One seed plans one set of programs, wherever the suite runs, whatever the backend does and however long it takes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from places import ROOT, SUPPORT

from kvconform.judging.verdict import Outcome, Verdict
from kvconform.results.results import read
from kvconform.search.cell import Cell, run_cell
from kvconform.search.digest import digest
from kvconform.search.effort import EFFORTS, Effort
from kvconform.worker.client import WorkerClient, WorkerSpec
from kvconform_specs.clauses import BY_NAME
from kvconform_specs.configs import config_named
from kvconform_specs.strategies import drawn

SMOKE = EFFORTS["smoke"]
PACKAGES = ("specs/kvconform_specs", "harness/kvconform", "backends/kvconform_backends", "reports/kvconform_reports")
LITERALS = "LITERALS = " + repr([*range(100_003, 100_103), *(-n * n for n in range(200, 260)), "truncate", 0.125])
"""A module of the user's, whose constants Hypothesis would draw if it looked for them."""


def judged(
    name: str, folder: Path, effort: Effort = SMOKE, seed: int = 0, clause: str = "definition.attention"
) -> Verdict:
    with WorkerClient(WorkerSpec(name)) as client:
        return run_cell(
            Cell(BY_NAME[clause], config_named("attention-gqa"), "attention-gqa"), client, effort, seed, folder
        )


@pytest.mark.slow
def test_the_digest_is_of_the_planned_programs_whatever_becomes_of_them(tmp_path: Path) -> None:
    passed = judged("numpy", tmp_path)
    assert passed.outcome is Outcome.PASS
    assert passed.planned == passed.structures == SMOKE.planned(BY_NAME[passed.clause])
    failed = judged(f"{SUPPORT / 'subjects.py'}:Raises", tmp_path)
    assert failed.outcome is Outcome.FAIL
    assert failed.structures < failed.planned
    cut = judged("numpy", tmp_path, replace(SMOKE, seconds=0.0))
    assert (cut.outcome, cut.cut, cut.structures) == (Outcome.NOT_EXERCISED, True, 1)
    assert not passed.cut
    assert not failed.cut
    assert {(found.digest, found.planned) for found in (failed, cut)} == {(passed.digest, passed.planned)}


@pytest.mark.slow
def test_a_crash_and_a_build_that_fails_have_the_digest_of_a_pass(tmp_path: Path) -> None:
    names = ["numpy", *(f"{SUPPORT / 'subjects.py'}:{name}" for name in ("Segfaults", "CannotBeBuilt"))]
    found = [judged(name, tmp_path) for name in names]
    assert [one.outcome for one in found] == [Outcome.PASS, Outcome.CRASH, Outcome.CRASH]
    assert len({one.digest for one in found}) == 1


@pytest.mark.slow
def test_another_seed_effort_clause_or_claim_plans_other_programs(tmp_path: Path) -> None:
    other = replace(SMOKE, variants=1), replace(SMOKE, structures=8)
    found = [
        judged("numpy", tmp_path),
        judged("numpy", tmp_path, seed=1),
        *(judged("numpy", tmp_path, effort) for effort in other),
        judged("numpy", tmp_path, clause="equivalence.decode"),
        judged(f"{SUPPORT / 'subjects.py'}:ShortChunks", tmp_path),
    ]
    assert len({one.digest for one in found}) == len(found)


def test_what_is_unsupported_has_no_digest(tmp_path: Path) -> None:
    found = judged(f"{SUPPORT / 'subjects.py'}:ClaimsNothing", tmp_path)
    assert (found.outcome, found.digest, found.planned) == (Outcome.UNSUPPORTED, "", 0)


def test_every_field_of_a_program_is_in_the_digest() -> None:
    clause, config = BY_NAME["equivalence.path"], config_named("attention-gqa")
    with WorkerClient(WorkerSpec("numpy")) as client:
        cases = drawn(clause.strategy(config, client.claims), 4)
    last = cases[-1].programs[-1]
    wider = replace(last, config=replace(config, seed=config.seed + 1))
    changed = [*cases[:-1], replace(cases[-1], programs=(*cases[-1].programs[:-1], wider))]
    found = [digest(cases, (0,)), digest(cases, (0, 1)), digest(cases[:-1], (0,)), digest(changed, (0,))]
    assert len(set(found)) == 4
    assert digest(cases, (0,)) == found[0]


# --- the same digests from every entry point ---
CLAUSES = ("causality.past-seen", "equivalence.path")
CONFIG = "attention-window"
SELECTED = [word for clause in CLAUSES for word in ("--clause", clause)] + ["--config", CONFIG]
SCRIPT = f"""
import literals
from kvconform import conformance
conformance("numpy", effort="smoke", clauses={CLAUSES}, configs=["{CONFIG}"], out="results")
"""


def digests(folder: Path, command: Sequence[str], path: Sequence[Path] = ()) -> dict[str, str]:
    """Runs a command that judges the numpy backend in the folder; ``path``: what comes first on the Python path."""
    (folder / "literals.py").write_text(LITERALS)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (*path, folder)))}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {verdict.clause: verdict.digest for verdict in read(folder / "results" / "numpy.json").verdicts}
    assert all(found.values())
    return found


def command_line(folder: Path, path: Sequence[Path] = ()) -> dict[str, str]:
    before = [sys.executable, "-c", "import literals; from kvconform.cli.main import main; main()"]
    return digests(folder, [*before, "run", "-b", "numpy", "--effort", "smoke", *SELECTED], path)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The digests of the command line in the installation that runs the tests, without another module."""
    folder = tmp_path_factory.mktemp("plain")
    return digests(folder, [sys.executable, "-m", "kvconform", "run", "-b", "numpy", "--effort", "smoke", *SELECTED])


@pytest.mark.slow
@pytest.mark.parametrize("entry", ["command line", "pytest", "conformance()"])
def test_every_entry_point_draws_the_same_programs_beside_other_modules(
    entry: str, plain: dict[str, str], tmp_path: Path
) -> None:
    if entry == "command line":
        found = command_line(tmp_path)
    elif entry == "pytest":
        (tmp_path / "conftest.py").write_text("import literals\n")
        options = ["--kv-effort", "smoke", *(word.replace("--", "--kv-") for word in SELECTED)]
        suite = ["--pyargs", "kvconform.pytest_plugin.suite", "--kv-backend", "numpy", *options]
        found = digests(tmp_path, [sys.executable, "-m", "pytest", "-q", "-p", "conftest", *suite])
    else:
        found = digests(tmp_path, [sys.executable, "-c", SCRIPT])
    assert found == plain


@pytest.mark.slow
@pytest.mark.parametrize("name", ["packages", "site-packages"])
def test_a_plain_copy_and_an_installed_one_draw_the_same_programs(
    name: str, plain: dict[str, str], tmp_path: Path
) -> None:
    """Hypothesis takes modules in a folder ``site-packages`` for installed ones, and others for the user's own."""
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / name / Path(package).name)
    (tmp_path / "run").mkdir()
    where = subprocess.run(
        [sys.executable, "-c", "import kvconform; print(kvconform.__file__)"],
        env={**os.environ, "PYTHONPATH": str(tmp_path / name)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert where.stdout.startswith(str(tmp_path / name))
    assert command_line(tmp_path / "run", [tmp_path / name]) == plain
