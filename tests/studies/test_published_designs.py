"""The published designs: conformant as intended, broken as published by one mistake, and a page that shows both."""

from __future__ import annotations

import shlex
from pathlib import Path

import published_designs
import pytest
from mismatches import WRONG
from report_data import HOSTILE, everywhere, other, passed, results

from kvconform.explain.diagnosis import Diagnosis
from kvconform.explain.diagnosis.record import FirstFailure
from kvconform.explain.visibility import Map
from kvconform.judging.verdict import Outcome
from kvconform.results.results import Results, Target
from kvconform.run import check
from kvconform.run.run import Plan, run_backend
from kvconform.search.effort import Effort
from kvconform.worker.client import WorkerSpec
from kvconform.worker.registry import installed
from kvconform_backends.faults import FAULTS
from kvconform_specs.clauses import ALL
from kvconform_specs.config import Config
from kvconform_specs.configs import CONFIGS

pytest.importorskip("torch", reason="the designs are in torch")

ROOT = Path(__file__).parents[2]
BRIEF = Effort("brief", structures=4, variants=2, seconds=60.0, shrink=False)
CATALOGUE = "kvconform_backends.faults.published"
INTENDED = ("module-buffers", "past-tuples", "list-cache")
CORNERS = ("attention-softcap", "decoder-learned")
"""A bias with a softcap, and grouped heads with a window in some layers: what a mask can get wrong."""
CHAPTERS = (
    "shape",
    "causality",
    "equivalence",
    "definition.attention",
    "definition.decoder",
    "lifecycle",
    "contents",
    "capacity",
    "errors",
    "accounting",
)


# --- as intended ---
@pytest.mark.slow
@pytest.mark.parametrize("name", INTENDED)
def test_a_design_as_intended_holds_in_every_corner(name: str, tmp_path: Path) -> None:
    plan = Plan(BRIEF, 3, ("float32",), CHAPTERS, CORNERS)
    found = run_backend(name, WorkerSpec(name), plan, tmp_path)
    bad = [v for v in found.verdicts if v.outcome not in (Outcome.PASS, Outcome.UNSUPPORTED)]
    assert not bad, "\n".join(f"{v.clause} [{v.config}]: {v.sentence}" for v in bad)
    assert {v.config for v in found.verdicts if v.outcome is Outcome.PASS} == set(CORNERS)
    assert found.exit_code == 0, found.summary


@pytest.mark.parametrize(
    ("name", "lacks"),
    [
        # a module that owns its cache has one sequence; a cache written in place cannot continue from an older handle
        ("module-buffers", {"fork", "immutable"}),
        ("past-tuples", set()),
        ("list-cache", {"immutable"}),
    ],
)
def test_a_design_claims_what_it_can_and_no_more(name: str, lacks: set[str]) -> None:
    claims = installed()[name].load().claims
    could = {
        "uncached_forward",
        "length",
        "free_slots",
        "reset",
        "truncate",
        "reorder",
        "fork",
        "immutable",
        "generate",
        "contents",
    }
    assert could - set(claims.abilities) == lacks & could
    assert claims.max_sequences == (1 if name == "module-buffers" else None)


# --- as published ---
MISTAKES = {
    "FirstListing": ("attention-gqa", "equivalence.decode", "of the program it must agree with", "shape.first-step"),
    "SecondListing": ("attention-gqa", "equivalence.chunks", "of the program it must agree with", "equivalence.decode"),
    "PrefillTwice": ("decoder-rope", "equivalence.generation", "got token", "equivalence.chunks"),
    "ChunkOnCache": ("decoder-rope", "shape.output", "RuntimeError", "equivalence.decode"),
    "GlobalList": ("attention-gqa", "lifecycle.independent", "of the program it must agree with", "shape.output"),
}
"""By fault: a config, the clause that detects the mistake, words of its sentence, and a clause that must pass."""


@pytest.mark.slow
@pytest.mark.parametrize("fault", MISTAKES)
def test_a_published_mistake_breaks_its_clause_and_not_another(fault: str, tmp_path: Path) -> None:
    config, breaks, words, passes = MISTAKES[fault]
    effort = Effort("brief", 16, 2, 60.0, shrink=False)
    plan = Plan(effort, 0, clauses=(breaks, passes), configs=(config,))
    found = {v.clause: v for v in run_backend("design", WorkerSpec(f"{CATALOGUE}:{fault}"), plan, tmp_path).verdicts}
    assert found[breaks].outcome is Outcome.FAIL
    assert words in found[breaks].sentence
    assert found[breaks].raised is (fault == "ChunkOnCache")
    assert found[passes].outcome is Outcome.PASS, found[passes].sentence


# --- the same as a person's own files ---
EXAMPLES = {version.name: version for version in published_designs.VERSIONS if ".py:" in version.target}
DETECTED = {
    "past-tuples-first": {"equivalence.decode"},
    "past-tuples-second": {"equivalence.chunks"},
    # these two cannot hold a sequence open during their reference forward, which runs first
    "module-buffers-published": {"equivalence.full-stable", "equivalence.chunks"},
    "list-cache-published": {"equivalence.full-stable", "lifecycle.independent"},
}
"""As published: clauses of which the file breaks one. All other files are as intended."""


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_a_file_in_the_style_of_its_source_is_judged_by_itself(name: str, tmp_path: Path) -> None:
    version = EXAMPLES[name]
    options = {"init": version.init} if version.init else {}
    (address,) = check.addresses(str(ROOT / version.target), options)
    clauses = ("shape.output", "equivalence", "lifecycle.independent", "lifecycle.reset")
    found = run_backend("design", WorkerSpec(address), Plan(BRIEF, 0, clauses=clauses), tmp_path)
    assert not found.unavailable, found.unavailable
    broken = {verdict.clause for verdict in found.verdicts if verdict.outcome.broken}
    if name in DETECTED:
        assert DETECTED[name] & broken
    else:
        assert not broken
        assert {v.outcome for v in found.verdicts} <= {Outcome.PASS, Outcome.UNSUPPORTED}


# --- the page ---
WANTED = ["x.......", "xx......", "xxx.....", "xxxx....", "xxxxx...", "xxxxxx..", "xxxxxxx.", "xxxxxxxx"]
TOP_LEFT = [*WANTED[:3], *("x......." for _ in range(5))]
SEEN = Map(schedule="decode", sizes=[1] * 8, wanted=WANTED, seen=TOP_LEFT)
RIGHT = Map(schedule="chunked", sizes=[3, 2, 1, 2], wanted=WANTED, seen=WANTED)
STOPPED = Map(
    schedule="chunked",
    sizes=[3, 2, 1, 2],
    wanted=WANTED,
    seen=[*WANTED[:3], *(" " * 8 for _ in range(5))],
    stopped="RuntimeError: shapes",
)
OWN = Config("hidden", heads=4, kv_heads=4, head_dim=8, width=32, capacity=40)
BUG = "https://github.com/pytorch/pytorch/issues/108108"


def published(failure: str = "step 1: got -1.9, want -0.03", **more: object) -> Results:
    verdicts = [
        passed("shape.output", "hidden-self"),
        other("equivalence.decode", "hidden-self", Outcome.FAIL, "step 1: got -1.9, want -0.03"),
        other("equivalence.chunks", "hidden-self", Outcome.FAIL, "step 2: got 0.1, want 0.2"),
        other("equivalence.path", "hidden-self", Outcome.FAIL, "step 3: got 0.1, want 0.2"),
        other("lifecycle.reset", "hidden-self", Outcome.FAIL, "step 4: got 0.1, want 0.2"),
    ]
    settings = {
        "target": Target(recognised="a past passed and returned", assumed=[], configs={"hidden-self": OWN.to_json()}),
        "maps": {"hidden-self": [RIGHT, SEEN]},
        "diagnoses": {
            "hidden-self": Diagnosis(
                mistake="M1", bug=BUG, first=FirstFailure(probe="a probe", mismatch=WRONG, sentence=failure)
            )
        },
    }
    return results("FirstListing", **({"verdicts": verdicts} | settings | more))


def section(page: str, name: str) -> str:
    """The part of the page about one version."""
    _, heading, rest = page.partition(f"### {name}: ")
    assert heading, name
    return rest.partition("\n## ")[0].partition("\n### ")[0]


def test_the_page_has_every_version_with_its_command_and_says_which_were_not_run() -> None:
    page = published_designs.render({})
    for version in published_designs.VERSIONS:
        part = section(page, version.name)
        assert f"$ {shlex.join(version.command)}" in part
        assert "It was not run." in part
    assert page.count("| not run |") == len(published_designs.VERSIONS)


def test_a_published_version_shows_its_verdict_its_sentence_and_what_it_sees() -> None:
    part = section(published_designs.render({"past-tuples-first": published()}), "past-tuples-first")
    assert "non-conformant" in part
    assert '> matches "the causal diagonal starts at the top left' in part
    assert "**equivalence.decode** [hidden-self]: step 1: got -1.9" in part
    assert "also broken: equivalence.path" in part  # the fourth broken clause
    assert "Recognised: a past passed and returned." in part
    assert "decode: tokens 3–7 do not see the tokens from 1 to their own, only token 0" in part
    assert "x - - - - - - -  <" in part
    assert "chunked 3+2+1+2" not in part  # right maps are not shown beside wrong ones


def test_a_link_in_a_sentence_is_a_link_once() -> None:
    part = section(published_designs.render({"past-tuples-first": published()}), "past-tuples-first")
    assert f'as if nothing were cached" (M1, [pytorch/pytorch\\#108108]({BUG})): first wrong probe' in part
    assert part.count("108108") == 2


def test_a_version_that_stopped_shows_where() -> None:
    found = {"module-buffers-published": published(maps={"decoder-self": [RIGHT, STOPPED]})}
    part = section(published_designs.render(found), "module-buffers-published")
    assert "stopped at RuntimeError: shapes" in part


def test_an_intended_version_shows_how_its_chunks_see_or_that_there_is_no_map() -> None:
    right = results("past-tuples", everywhere())
    core = [passed(clause.name, "hidden-self") for clause in ALL if clause.concerns(OWN) and not clause.blind]
    whole = Map(schedule="full", sizes=[8], wanted=WANTED, seen=WANTED)
    own = published(verdicts=core, diagnoses={}, maps={"hidden-self": [whole, RIGHT]})
    page = published_designs.render({"past-tuples": right, "past-tuples-module": own})
    assert "✓ conformant" in section(page, "past-tuples")
    assert "No map: only modules, and configs with a broken clause, have maps." in section(page, "past-tuples")
    assert "chunked 3+2+1+2: as expected" in section(page, "past-tuples-module")
    assert "full: as expected" not in section(page, "past-tuples-module")
    assert "No diagnosis" not in page


def test_where_results_hold_no_diagnosis_the_page_says_so() -> None:
    part = section(published_designs.render({"past-tuples-first": published(diagnoses={})}), "past-tuples-first")
    assert "No diagnosis" in part


@pytest.mark.parametrize("words", [*HOSTILE, "```\n# a heading", "[a](javascript:b)"])
def test_hostile_words_of_a_backend_stay_text(words: str) -> None:
    hostile = Map(schedule="chunked", sizes=[8], wanted=WANTED, seen=WANTED, stopped=words)
    found = published(words, maps={"hidden-self": [hostile]})
    part = section(published_designs.render({"past-tuples-first": found}), "past-tuples-first")
    prose, *_ = part.split("````" if "```" in words else "```text\nchunked")
    assert "<img" not in prose
    assert "<script" not in prose
    assert "\n# a heading" not in prose
    assert "[a](" not in prose


def test_results_are_found_by_the_folder_that_their_command_names(tmp_path: Path) -> None:
    for version, command in zip(published_designs.VERSIONS, published_designs.commands(tmp_path), strict=True):
        assert command[: len(version.command)] == version.command
        out = Path(command[-1])
        out.mkdir()
        published().write(out / "AnyName.json")
    assert set(published_designs.gathered(tmp_path)) == {version.name for version in published_designs.VERSIONS}
    assert published_designs.gathered(tmp_path / "elsewhere") == {}


def test_every_target_of_the_page_exists() -> None:
    catalogue = {fault.address for fault in FAULTS}
    for version in published_designs.VERSIONS:
        file, _, name = version.target.rpartition(":")
        if file.endswith(".py"):
            assert f"class {name}(" in (ROOT / file).read_text()
        else:
            assert version.target in {*installed(), *catalogue}
    assert {version.config for version in published_designs.VERSIONS} <= {"", *CONFIGS}
