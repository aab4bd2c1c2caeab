"""The black box of CONTRIBUTING.md, under an interpreter that has numpy and this package, and nothing else."""

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


def text() -> str:
    section = (ROOT / "CONTRIBUTING.md").read_text().partition("## Judge another engine")[2].partition("\n## ")[0]
    (found,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    return str(found)


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


def test_it_has_at_most_40_lines_and_uses_numpy_alone() -> None:
    assert len(text().splitlines()) <= 40
    assert set(re.findall(r"^(?:import|from) (\w+)", text(), re.MULTILINE)) == {"copy", "numpy", "kvconform"}


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


def test_a_module_is_told_that_it_needs_torch(tmp_path: Path, engine: Path) -> None:
    (tmp_path / "mine.py").write_text("def forward(x, past=None):\n    return x, past\n")
    command = [sys.executable, "-m", "kvconform", "check", "mine.py:forward", "--python", str(engine)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert ran.returncode == 3
    assert "a module needs 'torch'; install it with: pip install 'kvconform[py]'" in ran.stdout
