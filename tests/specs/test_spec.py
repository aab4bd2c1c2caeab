"""The spec can be read: its page is what the clauses say, its ambiguities are settled, its clauses are explained."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest
from lanes import slow_except
from typer.testing import CliRunner, Result

from kvconform.backend import Backend
from kvconform.cli.main import app, main
from kvconform.search import counterexample
from kvconform.spec_docs.clause import as_file, example, explained, faults, least_claims
from kvconform.spec_docs.page import LAW, documented, page
from kvconform_specs.ambiguities import AMBIGUITIES, Ambiguity
from kvconform_specs.claims import ABILITIES, DERIVED, ENOUGH, Claims
from kvconform_specs.clause import Case, Clause
from kvconform_specs.clauses import ALL, BY_NAME, CHAPTERS
from kvconform_specs.config import Config
from kvconform_specs.configs import CONFIGS
from kvconform_specs.describe import described
from kvconform_specs.program import (
    OPS,
    AliasHandle,
    Append,
    Close,
    Fork,
    Generate,
    Poison,
    Program,
    ReadCache,
    Reject,
    Reorder,
    Reset,
    Step,
    Truncate,
    UncachedForward,
)
from kvconform_specs.serving.clauses import CLAUSES as SERVING

ROOT = Path(__file__).parents[2]
GQA = CONFIGS["attention-gqa"]
CLAUSE = "causality.future-blind"


def spec(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["spec", *arguments])


# --- the page ---
def test_the_page_in_docs_is_what_the_spec_says() -> None:
    words = "docs/spec.md is stale; renew it with: nox -s regenerate"
    assert (ROOT / "docs" / "spec.md").read_text() == page(), words


def test_the_page_has_each_clause_once_with_its_text_and_links() -> None:
    written = page()
    for clause in ALL:
        _before, body = written.split(f"\n### {clause.name}\n\n")
        body = body.partition("\n#")[0]
        assert body.startswith(clause.text)
        assert clause.level.value in body
        assert ("**core**" in body) == clause.core
        assert all(situation.words in body for situation in clause.situations)
        assert all(f"({link})" in body for link in clause.why)
        assert all(f"`{need}`" in body for need in (*clause.needs, *clause.needs_any))


def test_every_link_within_the_page_leads_somewhere() -> None:
    written = page()
    headings = [
        re.sub(r"[^\w -]", "", words.lower()).replace(" ", "-") for words in re.findall(r"^#+ (.*)", written, re.M)
    ]
    anchors = headings + re.findall(r'<a id="([^"]+)">', written)
    assert len(set(anchors)) == len(anchors)
    assert set(re.findall(r"\]\(#([^)]+)\)", written)) <= set(anchors)


def test_the_page_states_the_law_as_the_design_does() -> None:
    assert LAW in (ROOT / "DESIGN.md").read_text().replace("\n> ", " ")


@pytest.mark.parametrize("kind", [Config, Claims], ids=lambda kind: kind.__name__)
def test_the_page_has_each_field_of_configs_and_claims_and_their_defaults(kind: type) -> None:
    cells = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| .* \| \S.* \|$", page(), re.M)
    assert {f.name for f in fields(kind)} <= set(re.findall(r"\w+", " ".join(cells)))


def test_a_docstring_is_cut_where_it_turns_to_a_field() -> None:
    prose, told = documented(Append)
    assert prose.startswith("Appends `counts[r]` new tokens")
    assert "substitutions" not in prose
    assert list(told) == [
        "substitutions",
        "needle",
        "masked",
        "pad",
        "layout",
        "in_place",
        "count_macs",
        "last_only",
        "distribution",
        "nan",
        "reused",
        "context",
    ]
    assert told["count_macs"] == "the multiply-adds of the step are counted."
    assert documented(Claims)[1]["max_chunk"].startswith("the largest batch, the longest append in tokens")


# --- clauses and ambiguities ---
@pytest.mark.parametrize("clause", ALL, ids=lambda clause: clause.name)
def test_a_clause_has_reasons_and_needs_what_can_be_claimed(clause: Clause) -> None:
    assert clause.why
    assert all(link.startswith("https://") for link in clause.why)
    assert {*clause.needs, *clause.needs_any} <= {*ABILITIES, *DERIVED}
    assert any(clause.concerns(config) for config in CONFIGS.values())
    claims = least_claims(clause)
    assert all(claims.can(need) for need in (*clause.needs, *clause.needs_any))


def test_what_is_enough_for_a_derived_need_is_known_for_each() -> None:
    assert list(ENOUGH) == list(DERIVED)
    for need, claimed in ENOUGH.items():
        assert DERIVED[need](Claims(**claimed)), need


def test_all_ambiguities_are_settled() -> None:
    assert [ambiguity.id for ambiguity in AMBIGUITIES] == [f"A{number}" for number in range(1, 40)]


@pytest.mark.parametrize("ambiguity", AMBIGUITIES, ids=lambda ambiguity: ambiguity.id)
def test_an_ambiguity_is_settled_by_what_there_is(ambiguity: Ambiguity) -> None:
    known = {
        *BY_NAME,
        *(f"claims.{f.name}" for f in fields(Claims)),
        *(f"config.{f.name}" for f in fields(Config)),
        *(f"ability.{name}" for name in ABILITIES),
        *(f"program.{op}" for op in OPS),
        *(f"backend.{name}" for name in vars(Backend) if not name.startswith("_")),
    }
    assert set(ambiguity.by) <= known
    assert ambiguity.by
    assert ambiguity.question.endswith("?")
    assert ambiguity.settled.endswith(".")
    claimed = any(name.startswith(("claims.", "ability.")) for name in ambiguity.by)
    assert ambiguity.default or not claimed, "what holds where the claim is silent?"


# --- one clause explained ---
@pytest.mark.parametrize("clause", slow_except(ALL, 5), ids=lambda clause: clause.name)
def test_the_example_of_a_clause_is_for_its_config_and_the_same_each_time(clause: Clause) -> None:
    name, case = example(clause)
    assert clause.concerns(CONFIGS[name])
    assert {program.config for program in case.programs} == {CONFIGS[name]}
    words = explained(clause)  # it draws the example again
    assert all(f"\n    {line}\n" in words for line in described(case.programs[0]))
    assert all(relation.value.replace("`", "") in words for relation in clause.relations)


def test_steps_are_told_described() -> None:
    steps: tuple[tuple[Step, str], ...] = (
        (Append("a", (4,), 17), "append 4 tokens (stream 17) to a, which is empty"),
        (Append("a", (1,), 17), "append 1 token (stream 17) to a, which holds 4"),
        (Append("b", (2, 2), 8), "append 2 tokens (streams 8, 9) to each row of b, which is empty"),
        (
            Append("b", (3, 0), 5, pad=("left", 7), distribution="large_queries"),
            "append 3, 0 tokens (streams 5 (large_queries), 6 (large_queries)) to the rows of b, which hold 2; columns "
            "without a token on the left, filled from stream 7 (large_queries)",
        ),
        (
            Append(
                "b",
                (1, 1),
                8,
                masked=((0, 1), (1, 0), (0, 4), (1, 1), (1, 2)),
                layout="sliced",
                in_place=True,
                count_macs=True,
            ),
            "append 1 token (streams 8, 9) to each row of b, which hold 5, 2; the mask hides positions 1, 4 of row 0; "
            "the mask hides positions 0 to 2 of row 1; inputs sliced; into the memory of the past; "
            "multiply-adds are counted",
        ),
        (
            Append("a", (2,), 17, substitutions=((0, 5, 99), (0, 6, 99)), needle=(17, 3)),
            "append 2 tokens (stream 17) to a, which holds 5; positions 5, 6 of row 0 from stream 99; queries "
            "point at the key at position 3 of stream 17",
        ),
        (UncachedForward("f", (7,), 17), "compute 7 tokens (stream 17) of f without a cache"),
        (Reorder("b", (1, 1)), "reorder b: its rows become the old rows 1, 1"),
        (Truncate("a", 3), "truncate a, which holds 7, to 3"),
        (Fork("a", "c"), "fork a to c"),
        (AliasHandle("a", "d"), "keep the handle of a as d"),
        (ReadCache("a"), "read cache a"),
        (Poison("a", "nan", "junk"), "fill the slots that hold no token: keys with nan, values with junk"),
        (Reject(Truncate("a", 4)), "must be refused: truncate a, which holds 3, to 4"),
        (
            Reject(Append("a", (1,), 17), "rank"),
            "must be refused, with an axis less: append 1 token (stream 17) to a, which holds 3",
        ),
        (Reset("a"), "reset a"),
        (Close("c"), "close c"),
    )
    assert {type(step) for step, _words in steps} == set(OPS.values()) - {Generate}  # only decoders generate
    assert described(Program(GQA, tuple(step for step, _ in steps))) == [words for _, words in steps]


def test_generations_are_told_described() -> None:
    steps = (Generate("g", (4,), 17, new=3), Generate("g", (1, 1), 8, substitutions=((1, 0, 9),), new=1))
    assert described(Program(CONFIGS["decoder-rope"], steps)) == [
        "generate 3 tokens greedily after 4 tokens (stream 17) of g",
        "generate 1 token greedily after 1 token (streams 8, 9) of each row of g; position 0 of row 1 from stream 9",
    ]


def test_what_is_asked_for_its_last_position_alone_is_told_described() -> None:
    steps = (Append("a", (4, 4), 8, last_only=True), UncachedForward("f", (3,), 17, last_only=True))
    assert described(Program(CONFIGS["decoder-rope"], steps)) == [
        "append 4 tokens (streams 8, 9) to each row of a, which is empty; only the last position's output",
        "compute 3 tokens (stream 17) of f without a cache; only the last position's output",
    ]


def test_a_clause_lists_the_planted_faults_that_it_must_detect(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {"no-mask-with-cache"} <= set(faults(BY_NAME[CLAUSE]))
    assert "planted faults that name it: " in explained(BY_NAME[CLAUSE])
    monkeypatch.setattr("kvconform.spec_docs.clause.CATALOGUE", "no_such_module:FAULTS")
    assert faults(BY_NAME[CLAUSE]) == []


# --- the command ---
def test_without_a_name_every_clause_is_listed_by_chapter() -> None:
    listed = spec().output
    assert re.findall(r"^  (\S+) \((?:must|should)", listed, re.M) == [clause.name for clause in (*ALL, *SERVING)]
    assert all(f"\n{chapter}: " in listed for chapter in CHAPTERS)


def test_a_chapter_is_listed_alone() -> None:
    listed = spec("lifecycle").output
    assert CHAPTERS["lifecycle"] in listed
    found = re.findall(r"^  (\S+) \((?:must|should)", listed, re.M)
    assert found == [clause.name for clause in ALL if clause.chapter == "lifecycle"]


def test_a_clause_is_explained_with_a_program_that_tries_it() -> None:
    done = spec(CLAUSE)
    assert done.exit_code == 0
    words = done.output
    assert words.startswith(f"{CLAUSE} (must, core)\n  {BY_NAME[CLAUSE].text}\n")
    for line in (
        "holds if: outputs that have the same history and place in both programs are equal bit for bit (insensitive)",
        "tested on: every attention and decoder config",
        "needs: nothing",
        "real bug: https://github.com/QwenLM/Qwen/issues/979",
        "for example, on attention-gqa:",
        "compared with:",
        f"on a backend: kvconform run -b BACKEND --clause {CLAUSE} --config attention-gqa",
    ):
        assert f"\n  {line}\n" in words
    assert re.search(r"^    append \d+ tokens? \(streams? .*; position \d+ of row \d from stream \d+$", words, re.M)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["causality.future-blnid"], "named 'causality.future-blnid'; did you mean causality.future-blind"),
        (["past-seen"], "no clause or chapter named 'past-seen'; did you mean causality.past-seen?"),
        (["poetry"], f"no clause or chapter named 'poetry'; chapters: {', '.join(CHAPTERS)}"),
        (["lifecycle", "--write", "x.json"], "--write: lifecycle is a chapter; name a clause"),
    ],
)
def test_what_names_no_clause_is_one_sentence(
    arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["kvconform", "spec", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    stderr = capsys.readouterr().err
    assert words in stderr
    assert stderr.count("\n") == 1


def test_the_page_is_written(tmp_path: Path) -> None:
    assert spec("--write", str(tmp_path / "docs" / "spec.md")).exit_code == 0
    assert (tmp_path / "docs" / "spec.md").read_text() == page()


def test_an_example_is_written_as_a_file_that_replay_runs(tmp_path: Path) -> None:
    file = tmp_path / "example.json"
    assert spec(CLAUSE, "--write", str(file)).exit_code == 0
    assert file.read_bytes() == as_file(BY_NAME[CLAUSE])
    assert Case.from_json(counterexample.read(file).case) == example(BY_NAME[CLAUSE])[1]
    done = CliRunner().invoke(app, ["replay", str(file), "-b", "numpy"])
    assert done.exit_code == 0
    assert f"{CLAUSE} on numpy: holds now" in done.output
