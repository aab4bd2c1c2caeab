"""The README's commands on the examples find what the README says, and print what it shows."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from difflib import get_close_matches
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


COMMANDS = [
    line.partition("  #")[0].strip()
    for block in re.findall(r"^```sh\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    for line in block.splitlines()
    if line.startswith(("kvconform check ", "python examples/")) and "http://" not in line  # no server is running
]
SHOWN = re.findall(r"^```text\n(\$ kvconform .*?)^```", README, re.DOTALL | re.MULTILINE)
pytestmark = pytest.mark.xdist_group("examples")


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that contains only the examples."""
    folder = tmp_path_factory.mktemp("clone")
    (folder / "examples").symlink_to(ROOT / "examples")
    return folder


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    words = shlex.split(command)
    start = [sys.executable, "-m", "kvconform"] if words[0] == "kvconform" else [sys.executable]
    return subprocess.run([*start, *words[1:]], capture_output=True, text=True, check=False, cwd=folder)


def test_the_readme_names_a_command_for_each_kind_of_target() -> None:
    assert len(COMMANDS) == 6
    assert len(SHOWN) == 2
    for target in ("attention.py:", "buffers.py:", "hybrid.py:", "check decoder.onnx", "check hf:"):
        assert any(target in command for command in COMMANDS), target


@pytest.mark.slow
def test_the_commands_of_the_readme_in_their_order_find_the_examples_conformant(clone: Path) -> None:
    for command in COMMANDS:
        done = run(command, clone)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        if command.startswith("kvconform check"):
            assert ": conformant: " in done.stdout, command
            assert " noise floor [" in done.stdout, command


@pytest.mark.slow
@pytest.mark.parametrize("shown", SHOWN, ids=lambda shown: shown.split()[2])
def test_what_the_readme_shows_is_what_is_printed(shown: str, clone: Path) -> None:
    prompt, *lines = shown.rstrip("\n").splitlines()
    assert prompt.startswith("$ ")
    done = run(prompt.removeprefix("$ "), clone)
    assert done.returncode == 1, done.stdout + done.stderr
    printed = done.stdout.splitlines()
    for line in lines:
        assert line == "..." or line in printed, f"README.md shows {line!r}, printed is {close(line, printed)!r}"


def close(line: str, printed: list[str]) -> str:
    """The printed line that is most like it."""
    return next(iter(get_close_matches(line, printed, 1, 0.0)), "")
