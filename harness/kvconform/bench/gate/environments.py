"""Two environments to compare: an interpreter as it is, or one made from a git ref of the current repository.

A ref becomes a virtual environment with the ref's own distribution, and behind it on the path everything that the
running interpreter imports and that is not of this repository: torch is shared, the code under test is not. ``.`` is
the working tree as it is, made in the same way, so that both sides differ in their code alone.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from kvconform.worker.client import WorkerSpec
from kvconform.worker.registry import openers
from kvconform_specs.errors import SpecError

WORKING_TREE = "."
FOLDER = "working-tree"
"""As long as the twelve digits of a commit by which other folders are called: how long its paths and its environment
are can move a program's times (Mytkowicz et al. 2009, "Producing wrong data without doing anything obviously
wrong!")."""
SITES = ("site-packages", "dist-packages")


@dataclass(frozen=True)
class Environment:
    """An interpreter, and what it stands for. ``name``: as it was given. ``commit``: empty for an interpreter, with a
    ``+`` for a working tree that was changed. ``variables``: of its workers' environment. ``root`` and ``tree``: the
    repository, and its files as of the ref."""

    python: str
    name: str
    commit: str = ""
    variables: dict[str, str] = field(default_factory=dict)
    root: Path | None = None
    tree: Path | None = None

    def spec(self, address: str, device: str = "cpu") -> WorkerSpec:
        """How to start workers of a backend here. For a file in the repository, the ref's version of it is used."""
        return WorkerSpec(self._address(address), device, self.python, environment=dict(self.variables))

    def _address(self, address: str) -> str:
        kind, colon, rest = address.partition(":")
        kind, rest = (kind + colon, rest) if colon and kind in openers() else ("", address)
        target, question, options = rest.partition("?")
        file = re.match(r"(.*\.(?:py|onnx))(:[^:]*)?$", target)
        if self.root is None or self.tree is None or file is None:
            return address
        path = Path(file[1]).resolve()
        if not path.is_relative_to(self.root):
            return address
        return f"{kind}{self.tree / path.relative_to(self.root)}{file[2] or ''}{question}{options}"


def environment(
    ref_or_python: str, folder: Path, say: Callable[[str], None] = lambda line: None, repository: Path | None = None
) -> Environment:
    """The environment behind the path of an interpreter, ``.``, or a git ref; the latter two are made in ``folder``.

    ``repository``: a path in it; None is the current folder. ``say`` is called with one line for each installation.
    Raises SpecError with one sentence if it is none of them, or cannot be installed.
    """
    if ref_or_python != WORKING_TREE and Path(ref_or_python).is_file():
        return Environment(os.path.abspath(ref_or_python), ref_or_python)  # a virtual environment's link is kept
    root = _root(ref_or_python, repository or Path())
    commit = _commit(ref_or_python, root)
    place = folder.resolve() / (FOLDER if ref_or_python == WORKING_TREE else commit[: len(FOLDER)])
    if ref_or_python == WORKING_TREE or not (place / "done").exists():
        say(f"{ref_or_python}: installing {commit[: len(FOLDER)]}{commit[40:]} of {root}")
        shutil.rmtree(place, ignore_errors=True)
        _tree(ref_or_python, root, commit, place / "tree")
        _install(ref_or_python, root, place)
        (place / "done").touch()
    python = Path(_path("scripts", place / "venv")) / ("python.exe" if os.name == "nt" else "python")
    # neither PYTHONPATH nor the current folder, which may hold the same packages, comes before the ref's own
    variables = {"PYTHONPATH": "", "PYTHONSAFEPATH": "1"}
    return Environment(str(python), ref_or_python, commit, variables, root, place / "tree")


def _root(name: str, repository: Path) -> Path:
    done = _run("git", "-C", str(repository), "rev-parse", "--show-toplevel")
    if done.returncode:
        raise SpecError(f"environment {name!r}", f"no interpreter, and {repository.resolve()} is in no git repository")
    return Path(done.stdout.strip()).resolve()


def _commit(name: str, root: Path) -> str:
    ref = "HEAD" if name == WORKING_TREE else name
    done = _run("git", "-C", str(root), "rev-parse", "--verify", "--quiet", "--end-of-options", ref + "^{commit}")
    if done.returncode:
        listed = ("--count=12", "--sort=-committerdate", "--format=%(refname:short)", "refs/heads", "refs/tags")
        names = _run("git", "-C", str(root), "for-each-ref", *listed).stdout.split()
        raise SpecError(
            f"environment {name!r}",
            f"no interpreter and no git ref of {root}; known: {', '.join(names) or 'none'}, any commit, "
            f"and {WORKING_TREE} for the working tree",
        )
    commit = done.stdout.strip()
    changed = name == WORKING_TREE and _run("git", "-C", str(root), "status", "--porcelain").stdout.strip()
    return f"{commit}+" if changed else commit


def _tree(name: str, root: Path, commit: str, tree: Path) -> None:
    """A clone that shares the repository's objects and leaves it as it is; a build may ask it for its version."""
    _must(name, "git", "clone", "--quiet", "--shared", "--no-checkout", str(root), str(tree))
    if name != WORKING_TREE:
        _must(name, "git", "-C", str(tree), "checkout", "--quiet", "--detach", commit)
        return
    listed = _must(name, "git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    for file in filter(None, listed.split("\0")):
        if (root / file).is_file():  # neither a deleted file nor a submodule
            (tree / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / file, tree / file)


def _install(name: str, root: Path, place: Path) -> None:
    """The tree's distribution into a virtual environment of its own; what it depends on is shared."""
    venv.create(place / "venv", symlinks=os.name != "nt")
    site = Path(_path("purelib", place / "venv"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-input"]
    pip += ["--no-build-isolation"] if _builds(place / "tree") else []
    _must(name, *pip, "--disable-pip-version-check", "--target", str(site), str(place / "tree"))
    (site / "shared.pth").write_text("".join(f"{path}\n" for path in _shared(root)))


def _shared(root: Path) -> list[str]:
    """What the running interpreter imports from, without the standard library and the repository's own code."""
    standard = {Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib")}
    found = []
    for entry in filter(None, sys.path):
        path = Path(entry).resolve()
        own = path.is_relative_to(root) and path.name not in SITES  # a virtual environment may lie in the repository
        ours = path.name not in SITES and any(path.is_relative_to(one) for one in standard)
        if path.is_dir() and not own and not ours and str(path) not in found:
            found.append(str(path))
    return found


def _builds(tree: Path) -> bool:
    """Whether all that the tree's build asks for is installed here: then nothing is downloaded for it."""
    wanted = ["setuptools"]
    with suppress(OSError, tomllib.TOMLDecodeError, KeyError):
        wanted = tomllib.loads((tree / "pyproject.toml").read_text())["build-system"]["requires"]
    try:
        for requirement in wanted:
            importlib.metadata.version(re.split(r"[^\w.-]", requirement.strip(), maxsplit=1)[0])
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _path(kind: str, place: Path) -> str:
    return sysconfig.get_path(kind, "venv", {"base": str(place), "platbase": str(place)})


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _must(name: str, *command: str) -> str:
    """Its output. Raises SpecError with the last line that it wrote and that names an error."""
    done = _run(*command)
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()] or ["no words"]
        raised = [line for line in lines if re.match(r"(\w+Error|fatal): ", line)]  # pip goes on to comment on it
        raise SpecError(f"environment {name!r}", f"{' '.join(command[:4])} failed: {(raised or lines)[-1]}")
    return done.stdout
