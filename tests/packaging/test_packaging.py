"""Wheel and editable install work from outside the checkout; foreign interpreters and third parties can take part."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

from kvconform.judging.verdict import Outcome
from kvconform.results.results import read

CHECKOUT = Path(__file__).parents[2]
pytestmark = pytest.mark.xdist_group("packaging")  # one wheel and one foreign interpreter


def python_of(place: Path) -> str:
    return str(place / "bin" / "python")


def pip(python: str, *arguments: str) -> None:
    subprocess.run([python, "-m", "pip", "install", "--quiet", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(CHECKOUT)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return next(out.glob("kvconform-*.whl"))


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> str:
    """An interpreter that has numpy and the wheel, and nothing else."""
    place = tmp_path_factory.mktemp("foreign")
    venv.create(place, with_pip=True)
    pip(python_of(place), "numpy")
    pip(python_of(place), "--no-deps", str(wheel))
    return python_of(place)


def test_the_wheel_holds_four_packages_their_data_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"kvconform", "kvconform_specs", "kvconform_backends", "kvconform_reports"}
    assert "kvconform/py.typed" in names
    assert any(name.startswith("kvconform_reports/templates/") for name in names)
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_metadata_is_complete_and_its_links_are_absolute(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    header, _, readme = archive.read(name).decode().partition("\n\n")
    for field in ("Project-URL: Repository, https://", "License-Expression: ", "Classifier: Typing :: Typed"):
        assert field in header
    assert "Description-Content-Type: text/markdown" in header
    targets = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", readme, flags=re.S))
    assert len(targets) > 10
    assert [target for target in targets if not target.startswith(("https://", "#"))] == []


def test_the_citation_names_the_released_version() -> None:
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((CHECKOUT / "CITATION.cff").read_text())
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()


@pytest.mark.slow
def test_the_wheel_and_the_checkout_plan_the_same_programs(wheel: Path, tmp_path: Path) -> None:
    installed = tmp_path / "site-packages"
    zipfile.ZipFile(wheel).extractall(installed)
    code = """if True:
        import kvconform
        part = dict(clauses=["equivalence.path"], configs=["attention-window"])
        (verdict,) = kvconform.conformance("numpy", effort="smoke", **part).verdicts
        print(kvconform.__file__, verdict.digest)
    """
    printed = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=True,
            cwd=tmp_path,
        ).stdout.split()
        for path in (str(installed), "")
    ]
    assert printed[0][0].startswith(str(installed))
    assert not printed[1][0].startswith(str(installed))
    assert printed[0][1] == printed[1][1] != ""


@pytest.mark.slow
def test_a_worker_runs_under_an_interpreter_that_has_numpy_and_the_package_alone(foreign: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "kvconform", "run", "-b", "numpy", "--python", foreign, "--effort", "smoke"]
    done = subprocess.run(
        [*command, "--config", "attention-gqa"], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    absent = subprocess.run([foreign, "-c", "import hypothesis"], capture_output=True, text=True, check=False)
    assert "ModuleNotFoundError" in absent.stderr


@pytest.mark.slow
def test_the_backend_of_contributing_runs_from_another_distribution_exactly_as_printed(
    foreign: str, tmp_path: Path
) -> None:
    document = (CHECKOUT / "CONTRIBUTING.md").read_text()
    code = re.search(r'```python\n(""".*?)```', document, re.DOTALL)
    announced = re.search(r'(\[project\.entry-points\."kvconform\.backends"\]\n.*?)```', document, re.DOTALL)
    assert code is not None
    assert announced is not None
    assert len(code[1].splitlines()) <= 60
    project = tmp_path / "theirs"
    project.mkdir()
    (project / "paged_cache.py").write_text(code[1])
    (project / "pyproject.toml").write_text(
        '[project]\nname = "theirs"\nversion = "1"\n'
        '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
        '[tool.setuptools]\npy-modules = ["paged_cache"]\n' + announced[1]
    )
    pip(foreign, "--no-deps", str(project))
    command = [sys.executable, "-m", "kvconform", "run", "-b", "paged", "--python", foreign, "--effort", "smoke"]
    done = subprocess.run(
        [*command, "--config", "attention"], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    outcomes = [verdict.outcome for verdict in read(tmp_path / "results" / "paged.json").verdicts]
    assert outcomes.count(Outcome.PASS) > 30
    assert set(outcomes) <= {
        Outcome.PASS,
        Outcome.UNSUPPORTED,
        Outcome.REFUTED,
    }  # guarantees are measured, not required


@pytest.mark.slow
def test_an_editable_install_works_from_outside_the_checkout(tmp_path: Path) -> None:
    place = tmp_path / "editable"
    venv.create(place, with_pip=True)
    pip(python_of(place), "numpy")
    pip(python_of(place), "--no-deps", "--editable", str(CHECKOUT))
    code = (
        "import kvconform.worker.server, kvconform_specs.reference.oracle, kvconform_reports; print(kvconform.__file__)"
    )
    done = subprocess.run([python_of(place), "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert Path(done.stdout.strip()).is_relative_to(CHECKOUT)
