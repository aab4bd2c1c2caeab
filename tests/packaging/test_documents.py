"""What the documents say is true: names, numbers, links and commands."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from places import ROOT

from kvconform.cli.main import app
from kvconform.search.effort import DEFAULT_EFFORT, EFFORTS, REBUILDS
from kvconform_specs.clauses import ALL
from kvconform_specs.reference import bounds

DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("tests/*.md")]


TEXT = {".py", ".md", ".toml", ".txt", ".yml", ".json", ".html", ".css", ".js", ".svg"}


def words(document: str) -> str:
    """A document with every run of whitespace as one space: where its lines break is of no account."""
    return " ".join((ROOT / document).read_text().split())


def code(document: Path) -> Iterator[str]:
    """The lines of blocks of code, continued lines as one, and what stands between backquotes."""
    text = document.read_text()
    for block in re.findall(r"```.*?```", text, re.DOTALL):
        yield from block.replace("\\\n", " ").splitlines()
    yield from re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_links_inside_the_project_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", document.read_text()):
        file = (document.parent / target).resolve()
        assert file.is_relative_to(ROOT), target
        assert file.exists(), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_commands_of_the_tool_exist_and_take_the_options_that_are_shown(document: Path) -> None:
    for line in code(document):
        shown = re.match(r"(?:\$ |- run: )?kvconform ([^#|;]*)", line)
        if shown is None:
            continue
        command: Any = typer.main.get_command(app)
        rest = iter(shown[1].split())
        for word in rest:
            option, _, value = word.partition("=")
            known = {name: one for one in command.params for name in (*one.opts, *one.secondary_opts)}
            if option.startswith("-"):
                assert option in {*known, "--help"}, line
                if option in known and not known[option].is_flag and not value:
                    next(rest, None)
            elif word in getattr(command, "commands", ()):
                command = command.commands[word]
            elif hasattr(command, "commands") and re.fullmatch("[a-z]+", word):
                pytest.fail(f"no command {word!r}: {line}")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_sessions_of_nox_exist(document: Path) -> None:
    sessions = set(re.findall(r"^def (\w+)\(session", (ROOT / "noxfile.py").read_text(), re.MULTILINE))
    for line in code(document):
        assert set(re.findall(r"nox -s (\w+)", line)) <= sessions, line


def test_the_readme_names_the_default_effort() -> None:
    readme = (ROOT / "README.md").read_text()
    assert f"`--effort {DEFAULT_EFFORT}` is the default" in readme
    for effort in EFFORTS:
        assert f"`{effort}`" in readme or f"--effort {effort}" in readme


def test_design_states_the_constant_of_the_decoder_bound() -> None:
    text = words("DESIGN.md")
    assert f"C = {bounds.C}," in text
    assert f"with {bounds.RUNS} degrees of freedom" in text


def test_design_states_efforts_and_limits_as_they_are() -> None:
    text = words("DESIGN.md")
    default = EFFORTS[DEFAULT_EFFORT]
    assert f"draws {default.structures} structures with {default.variants} variants each" in text
    assert f"for at most {REBUILDS} processes or {default.rebuild:g} s." in text
    assert f"{bounds.SPREAD} times the pooled sigma" in text


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_no_placeholder_is_left(document: Path) -> None:
    assert "@" + "@" not in document.read_text()


def test_every_clause_has_text_reasons_and_a_stable_name() -> None:
    assert len({clause.name for clause in ALL}) == len(ALL)
    for clause in ALL:
        assert re.fullmatch(r"[a-z]+\.[a-z]+(-[a-z]+)*", clause.name)
        assert clause.text.endswith(".")
        assert clause.why
        assert all(re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+/(issues|pull)/\d+", link) for link in clause.why)


def test_no_file_names_a_place_on_the_machine_of_its_author() -> None:
    """The checkout itself, the folder around it, and home folders."""
    places = {ROOT, ROOT.parent, Path.home()} - {Path("/"), Path(tempfile.gettempdir())}
    place = re.compile(
        r"(?<![\w.])(?:" + "|".join(re.escape(str(path)) for path in places) + r"|/(?:home|Users)/\w+)(?:/|\b)"
    )
    folders = [folder for folder in ROOT.iterdir() if not re.match(r"\.|results|build$|dist$", folder.name)]
    files = [file for folder in folders for file in (folder, *folder.rglob("*")) if file.suffix in TEXT]
    assert len(files) > 250
    for file in files:
        found = place.search(file.read_text())
        assert found is None, (file, found)


def test_the_tree_in_design_is_the_tree_of_the_checkout() -> None:
    """Every folder of the four packages that holds code or templates is named in DESIGN's tree, and no other."""
    text = (ROOT / "DESIGN.md").read_text()
    tree = re.findall(r"^(\S.*?/|  \S.*?/) {2,}", text.partition("```\nspecs/kvconform_specs/")[2], re.MULTILINE)
    named = {word.strip("/") for line in tree for word in line.split()} | {"kvconform_specs"}
    packages = [path for root in ("specs", "harness", "backends", "reports") for path in (ROOT / root).glob("*/")]
    folders = {path.name for package in packages for path in package.glob("*/") if path.name != "__pycache__"}
    assert folders <= named
    assert {word for word in named if "/" not in word} - {
        "docs",
        "studies",
        "examples",
        "tests",
        "kvconform_specs",
    } == (folders)
