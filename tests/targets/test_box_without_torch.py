"""The black boxes of CONTRIBUTING.md, under interpreters without torch: one in numpy, under an interpreter that has
numpy and this package and nothing else; one in JAX."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import distribution
from importlib.util import find_spec
from pathlib import Path

import pytest
from places import SUPPORT

ROOT = SUPPORT.parents[1]


def text(number: int = 0) -> str:
    section = (ROOT / "CONTRIBUTING.md").read_text().partition("## Judge another engine")[2].partition("\n## ")[0]
    numpy, jax = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    return str((numpy, jax)[number])


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter with links to numpy and to this package's folders and entry points."""
    place = tmp_path_factory.mktemp("engine")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(place)], check=True)
    (packages,) = place.glob("**/site-packages")
    found = find_spec("numpy")
    assert found is not None
    assert found.origin is not None
    numpy = Path(found.origin).parent
    for source in (numpy, numpy.parent / "numpy.libs"):
        if source.exists():
            (packages / source.name).symlink_to(source)
    for name in ("kvconform", "kvconform_specs", "kvconform_backends"):
        spec = find_spec(name)
        assert spec is not None
        assert spec.origin is not None
        (packages / name).symlink_to(Path(spec.origin).parent)
    metadata = packages / "kvconform-0.dist-info"
    metadata.mkdir()
    for name in ("METADATA", "entry_points.txt"):
        metadata.joinpath(name).write_text(distribution("kvconform").read_text(name) or "")
    return place / "bin" / "python"


@pytest.mark.parametrize(("number", "needs"), [(0, {"copy"}), (1, {"jax"})], ids=["numpy", "jax"])
def test_it_has_at_most_40_lines_and_no_torch(number: int, needs: set[str]) -> None:
    assert len(text(number).splitlines()) <= 40
    imported = set(re.findall(r"^(?:import|from) (\w+)", text(number), re.MULTILINE))
    assert imported == {"numpy", "kvconform", *needs}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new", "code"),
    [
        ("", "", 0),
        ("swapaxes(1, 2) / 16", "swapaxes(1, 2) / 8", 1),  # a scale that the engine alone has
        ("past.shape[2] - t, dtype=bool)", "0, dtype=bool)", 1),  # the mask begins at the top left
    ],
    ids=["right", "lost scale", "top left"],
)
def test_it_is_judged_under_an_interpreter_without_torch(
    tmp_path: Path, engine: Path, old: str, new: str, code: int
) -> None:
    assert old in text()
    (tmp_path / "box.py").write_text(text().replace(old, new) if old else text())
    command = [sys.executable, "-m", "kvconform", "check", "box.py:Box", "--python", str(engine)]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert ran.returncode == code, ran.stdout + ran.stderr


@pytest.fixture(scope="module")
def jax_engine() -> Path:
    """An interpreter with JAX: that of ``nox -s "conformance(jax)"``, or the one that ``KVCONFORM_JAX`` names."""
    python = Path(os.environ.get("KVCONFORM_JAX") or ROOT / ".nox" / "conformance-jax" / "bin" / "python")
    if not python.exists():
        pytest.skip('there is no interpreter with JAX: nox --install-only -s "conformance(jax)"')
    return python


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new", "code"),
    [
        ("", "", 0),
        ("swapaxes(1, 2) / 4", "swapaxes(1, 2) / 5", 1),  # the engine computes with another scale than the reference
        ("past + np.arange(x.shape[1])", "np.arange(x.shape[1])", 1),  # the mask begins at the top left
    ],
    ids=["right", "another scale", "top left"],
)
def test_an_engine_that_compiles_is_judged_with_few_shapes(
    tmp_path: Path, jax_engine: Path, old: str, new: str, code: int
) -> None:
    assert old in text(1)
    (tmp_path / "box.py").write_text(text(1).replace(old, new) if old else text(1))
    command = [sys.executable, "-m", "kvconform", "check", "box.py:Box", "--python", str(jax_engine)]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert ran.returncode == code, ran.stdout + ran.stderr


def test_a_module_is_told_that_it_needs_torch(tmp_path: Path, engine: Path) -> None:
    (tmp_path / "mine.py").write_text("def forward(x, past=None):\n    return x, past\n")
    command = [sys.executable, "-m", "kvconform", "check", "mine.py:forward", "--python", str(engine)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert ran.returncode == 3
    assert "a module needs 'torch'; install it with: pip install 'kvconform[py]'" in ran.stdout
