"""What the documents say is true: names, numbers, links and commands."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from kvconform.cli.main import app
from kvconform.explain import diagnosis
from kvconform.results.results import read
from kvconform.run.run import summary
from kvconform.search.effort import DEFAULT_EFFORT, EFFORTS, REBUILDS
from kvconform_specs.clauses import ALL, CHAPTERS
from kvconform_specs.reference import bounds

ROOT = Path(__file__).parents[2]
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("tests/*.md")]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_links_inside_the_project_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", document.read_text()):
        assert (document.parent / target).exists(), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_commands_of_the_tool_exist(document: Path) -> None:
    known = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    text = document.read_text()
    code = re.findall(r"```.*?```", text, re.DOTALL) + re.findall(r"`[^`\n]+`", text)
    for command in re.findall(r"(?:^|`|run: )kvconform ([a-z]+)\b", "\n".join(code), re.MULTILINE):
        assert command in known, command


def test_the_readme_counts_clauses_as_they_are() -> None:
    found = re.search(r"(\d+) clauses in (\d+) chapters", (ROOT / "README.md").read_text())
    assert found is not None
    assert (int(found[1]), int(found[2])) == (len(ALL), len(CHAPTERS))


@pytest.mark.parametrize("name", ["eager", "compiled", "onnx"])
def test_the_readme_prints_what_the_baseline_holds(name: str) -> None:
    held = read(ROOT / "docs" / "baseline" / f"{name}.json")
    counts = summary(held)
    row = re.search(rf"^{name} +(\d+) +(\d+) +(\d+) +(\d+) ", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert row is not None
    programs = sum(verdict.programs for verdict in held.verdicts)
    assert [int(number) for number in row.groups()] == [
        counts["pass"],
        counts["unsupported"],
        counts["refuted"],
        programs,
    ]


def test_the_readme_names_the_default_effort() -> None:
    readme = (ROOT / "README.md").read_text()
    assert f"`--effort {DEFAULT_EFFORT}` is the default" in readme
    for effort in EFFORTS:
        assert f"`{effort}`" in readme or f"--effort {effort}" in readme


def test_design_states_the_constant_of_the_decoder_bound() -> None:
    text = (ROOT / "DESIGN.md").read_text()
    assert f"C = {bounds.C}," in text
    assert f"with {bounds.RUNS} degrees of freedom" in text


def test_design_states_budgets_and_limits_as_they_are() -> None:
    text = (ROOT / "DESIGN.md").read_text()
    default = EFFORTS[DEFAULT_EFFORT]
    assert f"draws {default.structures} structures with {default.variants} seeds each" in text
    assert f"as long as {REBUILDS} processes or\n{default.rebuild:g} s last" in text
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


def test_nothing_in_the_project_depends_on_where_it_was_written() -> None:
    for file in ROOT.rglob("*"):
        parts = file.relative_to(ROOT).parts
        if file.suffix in {".py", ".md", ".toml", ".txt", ".j2", ".yml"} and not parts[0].startswith((".", "results")):
            text = file.read_text()
            assert "/" + "work/" not in text, file
            assert "../" + "shared" not in text, file


def test_design_states_how_often_the_diagnosis_names_the_right_class() -> None:
    stored = json.loads((Path(diagnosis.__file__).parent / "fingerprints.json").read_text())["evaluation"]
    text = (ROOT / "DESIGN.md").read_text().replace("\n", " ")
    right, wrong, silent = _shares(stored["unseen, with edits"])
    words = (
        f"first in {right} % of pairs of fault and config, a wrong one in {wrong} %, and nothing is said in {silent} %"
    )
    assert words in text
    right, wrong, silent = _shares(stored["known"])
    assert f"With its upstream bug in the catalogue: {right} %, {wrong} %, {silent.removesuffix('.0')} %." in text


def _shares(found: dict[str, int]) -> tuple[str, str, str]:
    silent = found["asked"] - found["right"] - found["wrong"]
    right, wrong, none = (f"{100 * count / found['asked']:.1f}" for count in (found["right"], found["wrong"], silent))
    return right, wrong, none
