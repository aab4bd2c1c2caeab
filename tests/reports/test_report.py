"""The report as text: everything given is in it, nothing given is more than text in it."""

from __future__ import annotations

import base64
import hashlib
import html
import re
import xml.etree.ElementTree as ET
from itertools import pairwise
from typing import Any

import msgspec
import pytest
import report_data as given
from report_data import HOSTILE
from report_page import Page, page, section, shape
from speed_data import latency

from kvconform.bench.record import Excluded
from kvconform.errors import Exit, Raised
from kvconform.judging.mismatch import Kind, Mismatch
from kvconform.judging.render import render as sentence_of
from kvconform.judging.verdict import Outcome
from kvconform.mutation.record import AuditRecord
from kvconform.results.guarantees import LEVELS, Guarantee, measured
from kvconform.results.results import Results
from kvconform.run.cross_backend import Pair
from kvconform_reports import junit, markdown, terminal
from kvconform_reports.html import render
from kvconform_reports.view import embedding, maps, null_models
from kvconform_reports.view.outcomes import MEANINGS, STANDINGS, SYMBOLS, TONES, WORST_FIRST, percent
from kvconform_specs import SUITE_VERSION
from kvconform_specs.clauses import ALL, BY_NAME, CHAPTERS
from kvconform_specs.configs import CONFIGS


def hostile(name: str) -> list[Results]:
    """Results in which every text that a stranger may choose is ``name``."""
    raised = Mismatch(kind=Kind.RAISED, program=0, step=1, call=name, error=Raised(name, name))
    died = Mismatch(kind=Kind.DIED, step=1, call=name, ended=Exit(7, stderr=name))
    fail = given.other(
        "definition.attention", name, Outcome.FAIL, name, counterexample=name, mismatch=raised, steps=name
    )
    crash = given.other("shape.first-step", name, Outcome.CRASH, name, mismatch=died)
    skip = given.other(name, name, Outcome.UNSUPPORTED, name)
    good = given.passed("definition.attention", "attention-gqa")
    tree = {name: {name: [name, name]}}
    held = given.other("errors.unchanged", name, Outcome.KNOWN_FAILURE, name, counterexample=name, steps=name)
    weak = given.other("determinism.repeatable", name, Outcome.REFUTED, name, counterexample=name)
    row = given.row(name, clause="errors.unchanged", config=name, versions={name: "1.0"}, counterexample=name)
    one = given.results(
        name,
        [fail, crash, skip, good, held, weak],
        device=name,
        effort=name,
        started=name,
        runtime_info={name: tree},
        environment=tree,
        claims=tree,
        known_failures=[row],
        stale=[name],
        guarantees={name: Guarantee(level=name, refuted=name, sentence=name, counterexample=name)},
    )
    return [one, given.results(name, [], device="cuda", unavailable=name)]


def audited(name: str) -> AuditRecord:
    """An audit in which every text that a stranger may choose is ``name``."""
    record = given.audit(name)
    record.faults, record.started, record.names = name, name, [name]
    for one in (*record.audited, *record.controls):
        one.sentence, one.bug, one.classes = name, name, (name,)
        one.trials = [msgspec.structs.replace(trial, sentence=name, config=name) for trial in one.trials]
    return record


def rendered(results: list[Results]) -> str:
    return render(results, given.pairs(), latency(), audit=given.audit())


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_comes_out_as_text(name: str) -> None:
    pairs = [Pair(name, name, name, 0.5, 1e-7, 3)]
    speed = latency((name,))
    speed.protocol, speed.machine, speed.device = {name: name}, {name: name}, name
    speed.excluded = [Excluded(name, name, name)]
    pair = Pair("tame", "tame", "tame", 0.5, 1e-7, 3)
    tame = render(hostile("tame"), [pair], latency(("tame",)), audit=audited("tame"))
    parsed = page(render(hostile(name), pairs, speed, audit=audited(name)))
    assert parsed.text.count(name) >= 30
    assert [tag for tag, _ in parsed.tags].count("script") == 2
    assert {tag for tag, _ in parsed.tags} == {tag for tag, _ in page(tame).tags}
    assert not [a for _, attributes in parsed.tags for a in attributes if a.startswith("on")]
    assert len(parsed.raw["script"]) == 2


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_changes_no_element_of_the_report(name: str) -> None:
    tame = render(hostile("tame"), [], None, audit=audited("tame"))
    assert shape(page(render(hostile(name), [], None, audit=audited(name)))) == shape(page(tame))


@pytest.mark.parametrize("name", [*HOSTILE, "a|b\n# title", "![x](http://e.example/x.png)", "@someone", "`x`"])
def test_a_hostile_name_is_text_in_the_job_summary(name: str) -> None:
    pair = Pair(name, name, name, 0.5, 1e-7, 3)
    text = markdown.render(hostile(name), [pair], latency((name,)), audit=audited(name))
    assert not re.search(r"<(?!/?code>|br>)", text)
    assert not re.search(r"(?<!\\)!\[|(?<!\\)`|://|@", text)
    bars = 0
    for line in text.splitlines():
        found = len(re.findall(r"(?<!\\)\|", line))
        bars = bars or found if line.startswith("|") else 0
        assert found == bars, "a row has as many cells as its table's head"
    assert "\n# title" not in text
    decoded = html.unescape(re.sub(r"\\([\\`*_{}\[\]|~#!])", r"\1", text))
    assert terminal.printable(name) in decoded


@pytest.mark.parametrize("name", [*HOSTILE, "\x1b[31mred\x1b[0m", "\0", "\ud800"])
def test_a_hostile_name_is_text_in_the_terminal_and_in_xml(name: str) -> None:
    table = terminal.table(hostile(name))
    assert all(c.isprintable() or c == "\n" for c in table)
    assert len(table.splitlines()) == 3
    root = ET.fromstring(junit.render(hostile(name)))
    assert {element.tag for element in root.iter()} <= {
        "testsuites",
        "testsuite",
        "properties",
        "property",
        "testcase",
        "failure",
        "error",
        "skipped",
    }


@pytest.mark.parametrize("name", HOSTILE)
def test_the_embedded_data_are_the_results_that_were_given(name: str) -> None:
    results, pairs, speed, audit = [*hostile(name), *given.four()], given.pairs(), latency(), audited(name)
    data = embedding.extract(render(results, pairs, speed, audit=audit))
    assert msgspec.convert(data["results"], list[Results]) == results
    assert msgspec.convert(data["pairs"], list[Pair]) == pairs
    assert data["latency"]["summaries"] == msgspec.to_builtins(speed.summaries)
    assert data["latency"]["rounds_left_out"] == len(speed.rounds) > 0
    assert data["latency"]["tokens_left_out"] == len(speed.tokens) > 0
    assert data["latency"]["rounds"] == data["latency"]["tokens"] == []
    assert msgspec.convert(data["audit"], AuditRecord) == audit


def crowd() -> list[Results]:
    """20 000 cells of 50 backends; each supports one clause not at all and breaks one cell in two hundred."""
    found, configs = [], [f"decoder-learned-{i:03}" for i in range(-(-20_000 // (50 * len(ALL))))]
    for place in range(50):
        verdicts = [given.passed(clause.name, config, place) for clause in ALL for config in configs][-400:]
        for i, verdict in enumerate(verdicts):
            if verdict.clause == ALL[place % len(ALL)].name:
                verdicts[i] = given.other(*verdict.key, Outcome.UNSUPPORTED, "claims no full")
        for i in range(place, len(verdicts), 200):
            sentence = f"step {i} out[0] at row 1: got -0.4482, want -0.4266 ± 7.4e-07 ({i}x the bound)"
            verdicts[i] = given.other(*verdicts[i].key, Outcome.FAIL, sentence, counterexample=f"{i:08x}.json")
        verdicts = given.refuted(verdicts) if place % 2 else verdicts
        found.append(given.results(f"backend-{place}", verdicts, guarantees=measured(verdicts)))
    return found


def crowded() -> AuditRecord:
    """An audit of 260 faults, each tried by the four clauses that it names."""
    record = given.audit()
    record.efforts = ["smoke"]
    one = record.audited[1]
    record.audited = [
        msgspec.structs.replace(
            one,
            name=f"fault-{i}",
            sentence=f"It is wrong in the way {i}.",
            clauses=tuple(names),
            trials=[msgspec.structs.replace(one.trials[0], clause=name, programs=i) for name in names],
        )
        for i in range(260)
        if (names := [ALL[(i + 3 * k) % len(ALL)].name for k in range(4)])
    ]
    return record


@pytest.mark.slow
def test_twenty_thousand_cells_stay_under_a_megabyte_and_decode_to_themselves() -> None:
    results = crowd()
    source = render(results, [], None)
    assert sum(len(result.verdicts) for result in results) == 20_000
    assert len(source.encode()) < 1_000_000
    assert msgspec.convert(embedding.extract(source)["results"], list[Results]) == results


def test_an_audit_of_hundreds_of_faults_adds_less_than_half_a_megabyte() -> None:
    with_it, without = (len(render([], [], None, audit=audit).encode()) for audit in (crowded(), None))
    assert with_it - without < 500_000


def test_a_file_without_data_is_refused_with_a_sentence() -> None:
    with pytest.raises(ValueError, match="holds no kvconform report data"):
        embedding.extract("<html></html>")


def test_every_sentence_appears_and_every_failure_says_how_to_replay_it() -> None:
    results = given.four()
    text, short = page(rendered(results)).text, markdown.render(results, [], None)
    broken = 0
    for result in results:
        for verdict in result.verdicts:
            said = verdict.sentence
            if verdict.outcome is Outcome.KNOWN_FAILURE:  # its row says the rest
                assert verdict.mismatch is not None
                said = sentence_of(verdict.mismatch)
            assert said in text
            if verdict.outcome.broken:
                broken += 1
                line = f"kvconform replay results/failures/{result.backend}/{verdict.counterexample}"
                assert line in text
                assert line in short
    assert broken == 4


def test_the_steps_of_every_failure_are_in_the_report_the_summary_and_junit() -> None:
    results = [*given.four(), given.results("known", **given.known("known", given.everywhere()))]
    text, short = page(rendered(results)).text, markdown.render(results, [], None)
    failed = [element.text for element in ET.fromstring(junit.render(results)).iter("failure")]
    found = [one for result in results for one in result.verdicts if one.steps]
    assert len(found) == 6
    for one in found:
        assert f"Steps: {one.steps}" in text
        assert f"steps: {one.steps}" in short
        assert one.outcome is Outcome.KNOWN_FAILURE or f"{one.sentence}\nsteps: {one.steps}" in failed


def test_a_failure_without_a_program_has_no_steps() -> None:
    results = [given.results("eager", [given.other("shape.output", "attention-gqa", Outcome.FAIL, "wrong")])]
    for text in (
        section(render(results, [], None), "failures"),
        markdown.render(results, [], None),
        junit.render(results),
    ):
        assert "teps:" not in text


def test_every_broken_cell_links_to_its_failure() -> None:
    whole = rendered([*given.four(), given.results("again", given.broken(given.everywhere(9)))])
    causes = whole.partition('<table id="causes">')[2].partition("</table>")[0]
    parsed = page(whole.replace(causes, ""))
    targets = [a["href"] for tag, a in parsed.tags if tag == "a" and (a.get("href") or "").startswith("#failure-")]
    ids = [f"#{a['id']}" for tag, a in parsed.tags if tag == "article" and (a.get("id") or "").startswith("failure-")]
    assert len(ids) == 8
    assert sorted(filter(None, targets)) == sorted(ids)


def test_a_path_that_a_shell_would_read_otherwise_is_quoted() -> None:
    fail = given.other("shape.output", "attention-gqa", Outcome.FAIL, "wrong", counterexample="x.json")
    text = page(render([given.results("a b; rm -rf", [fail])], [], None, folder="my results")).text
    assert "kvconform replay 'my results/failures/a b; rm -rf/x.json'" in text


def test_each_backend_has_its_standing_and_its_sentence() -> None:
    results = given.four()
    text, table = page(rendered(results)).text, terminal.table(results).splitlines()
    for result, line in zip(results, table[1:], strict=True):
        code, sentence = (result.exit_code, result.summary)
        word = STANDINGS[code][0]
        assert sentence.removeprefix(f"{word}: ") in text
        assert line.startswith(result.backend)
        assert f"{word}: {sentence.removeprefix(f'{word}: ')}" in line
    assert "Of 4 backends 1 is conformant, 1 is non-conformant, 1 is unavailable, 1 is undecided" in text


def test_every_outcome_and_every_exit_code_has_a_symbol_and_a_word() -> None:
    assert set(SYMBOLS) == set(TONES) == set(MEANINGS) == set(WORST_FIRST) == set(Outcome)
    assert len(set(SYMBOLS.values())) == len(Outcome)
    assert set(STANDINGS) == {0, 1, 3, 5}


def test_a_run_that_did_not_finish_says_so() -> None:
    unfinished = given.results("eager", given.everywhere(), finished=False)
    assert "did not finish" in page(render([unfinished], [], None)).text
    assert "did not finish" in markdown.render([unfinished], [], None)
    assert "did not finish" in terminal.table([unfinished])


def test_a_run_that_time_cut_says_in_how_many_cells() -> None:
    first, *others = given.everywhere()
    cut = given.results("eager", [msgspec.structs.replace(first, cut=True), *others])
    words = "In 1 cell the time limit ended before all planned programs were judged."
    for text in (page(render([cut], [], None)).text, markdown.render([cut], [], None), terminal.table([cut])):
        assert words in text
    whole = given.results("eager", [first, *others])
    assert "time limit" not in terminal.table([whole])


def test_refuted_beside_conformant_is_explained() -> None:
    verdicts = given.everywhere()
    assert terminal.legend([given.results("eager", given.refuted(verdicts))]) == (
        "refuted: a measured guarantee does not hold; guarantees are not required"
    )
    assert terminal.legend([given.results("eager", verdicts)]) == ""


def test_the_matrix_has_a_row_for_every_clause_of_the_spec_and_for_those_it_does_not_know() -> None:
    strange = given.other("paging.permuted", "attention-gqa", Outcome.INCONCLUSIVE, "cannot tell")
    text = page(render([given.results("eager", [strange])], [], None)).text
    for clause in ALL:
        assert clause.name in text
        assert clause.text in text
    assert "paging.permuted" in text
    assert text.count("· not run") == len(ALL) + len(CHAPTERS) - 1  # of which each has a total, paging one with a cell


def test_every_config_of_a_cell_can_be_read() -> None:
    source = render([given.results("eager", given.broken(given.everywhere()))], [], None)
    row = source[source.index("<code>equivalence.chunks</code>") :]
    row = row[: row.index("</tr>")]
    concerned = [name for name, config in CONFIGS.items() if BY_NAME["equivalence.chunks"].concerns(config)]
    for config in concerned:
        mixed = config in ("attention-window", "decoder-learned")
        assert row.count(config) == 1 + mixed  # in the clause's list, and where it broke
    assert "<b>pass</b> all others" in row
    assert row.index("✗</i> fail 2") < row.index(f"✓</i> pass {len(concerned) - 2}")


def matrix_row(source: str, clause: str) -> str:
    """What the matrix says of a clause, as text."""
    start = source.index(f"<code>{clause}</code>")
    found = Page()
    found.feed(source[start : source.index("</tr>", start)].partition("</th>")[2])
    return " ".join(" ".join(found.words).split())


def cells(clause: str) -> list[str]:
    """The configs that a clause concerns."""
    return [verdict.config for verdict in given.everywhere() if verdict.clause == clause]


def test_an_unsupported_cell_says_why_where_it_stands() -> None:
    lacking = given.lacking(given.everywhere())
    source = render([given.results("onnx", lacking)], [], None)
    row, decoders = matrix_row(source, "equivalence.full-stable"), cells("definition.decoder")
    assert row.startswith(f"– unsupported {len(cells('equivalence.full-stable'))} 2 reasons")
    assert f"unsupported {', '.join(decoders)}: claims no decoder profile" in row
    assert matrix_row(source, "definition.decoder") == f"– unsupported {len(decoders)} claims no decoder profile"
    concerned = sum(v.clause == "definition.attention" for v in lacking)
    assert matrix_row(source, "definition.attention") == f"✓ pass {concerned}"


def test_a_long_reason_is_cut_in_the_cell_and_whole_when_it_is_opened() -> None:
    why = "it has no kernel for heads of this size on this machine, and none that could take its place"
    verdicts = [given.other(v.clause, v.config, Outcome.UNSUPPORTED, why) for v in given.everywhere()]
    row = matrix_row(render([given.results("onnx", verdicts)], [], None), "definition.decoder")
    assert row == f"– unsupported {len(cells('definition.decoder'))} {why[:60]}… unsupported all: {why}"


def test_a_refuted_guarantee_is_told_apart_from_a_failure() -> None:
    verdicts = given.refuted(given.everywhere())
    result = given.results("eager", verdicts, guarantees=measured(verdicts))
    source = render([result], [], None)
    row = matrix_row(source, "determinism.chunk-invariant")
    assert row.startswith(f"≠ refuted {len(cells('determinism.chunk-invariant'))} measured, not required")
    assert "a measured guarantee does not hold; guarantees are not required" in section(source, "matrix")
    assert "No cell is broken" in section(source, "failures")
    assert "Every cell has a verdict" in section(source, "unjudged")
    assert "eager is conformant" in page(source).text


def test_a_guarantee_has_its_level_and_what_refutes_the_next_with_its_replay_line() -> None:
    first = given.refuted(given.everywhere())
    second = given.refuted(given.everywhere(), "determinism.repeatable")
    results = [given.results(n, v, guarantees=measured(v)) for n, v in (("eager", first), ("onnx", second))]
    results.append(given.results("whole", given.everywhere(), guarantees=measured(given.everywhere())))
    source, short = render(results, [], None), markdown.render(results, [], None)
    text = section(source, "guarantees")
    for name in LEVELS:
        assert name in text
    for result in results[:2]:
        for config, held in result.guarantees.items():
            replay = f"kvconform replay results/failures/{result.backend}/{held.counterexample}"
            assert f"{held.level} ≠ {held.refuted}: refuted {held.sentence} {replay}" in text
            assert f"| {config} | batch-invariant<br>≠ chunk-invariant: refuted | within bound<br>≠ " in short
    assert "chunk-invariant the strongest" in text
    properties = {p.get("name"): p.get("value") for p in ET.fromstring(junit.render(results)).iter("property")}
    assert properties["guarantee.attention-gqa"] == "chunk-invariant"  # of the last


def test_a_guarantee_on_which_nothing_decided_says_why() -> None:
    held = Guarantee(level="within bound", sentence="claims one row only")
    source = render([given.results("eager", given.everywhere(), guarantees={"attention-gqa": held})], [], None)
    assert "within bound the next is not decided claims one row only" in section(source, "guarantees")
    assert "No guarantee was measured" in section(render([], [], None), "guarantees")


def test_a_known_failure_shows_reason_link_versions_last_day_and_replay_line() -> None:
    result = given.results("eager", **given.known("eager", given.everywhere()))
    source, short = render([result], [], None), markdown.render([result], [], None)
    text, row = section(source, "known"), result.known_failures[0]
    replay = "kvconform replay results/failures/eager/numerics.zero-keys-1a2b3c4d.json"
    now = "got -0.4482, want -0.4266"
    for words in (row.reason, "pytorch/pytorch#103082", "torch 2.11.*", "2027-03-31", now, replay):
        assert words in text
    for words in (row.reason, "pytorch/pytorch\\#103082", "2027-03-31", "got -0.4482, want -0.4266"):
        assert words in short
    assert f'<a href="{row.link}">' in source
    assert matrix_row(source, "numerics.zero-keys").startswith("! known failure 1 until 2027-03-31 ✓ pass")
    assert "pytorch/pytorch#103082" in matrix_row(source, "numerics.zero-keys")
    skipped = ET.fromstring(junit.render([result])).find(".//skipped")
    assert skipped is not None
    assert skipped.get("message", "").startswith("known failure: bug in a library, known until 2027-03-31, https://")


def test_a_stale_row_is_an_error_before_everything_else() -> None:
    words = "numerics.zero-keys on eager [attention-gqa]: the known failure no longer fails: remove the row"
    result = given.results("eager", given.everywhere(), stale=[words])
    source, short = render([result], [], None), markdown.render([result], [], None)
    assert source.index("✗</i> stale known failure") < source.index(words) < source.index('class="backends"')
    assert words in page(source).text
    assert short.index("stale known failure") < short.index("| chapter |")
    assert words in terminal.table([result])
    error = ET.fromstring(junit.render([result])).find(".//error")
    assert error is not None
    assert error.get("message") == words


@pytest.fixture
def shipped(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[dict[str, Any]]]:
    """Null-model power tables in the place of those in the package, by dtype."""
    tables: dict[str, list[dict[str, Any]]] = {}
    monkeypatch.setattr(null_models, "stored", lambda dtype: tables.get(dtype, []))
    return tables


def current(*dtypes: str, **more: Any) -> list[Results]:
    """Results of this version of the suite."""
    return [given.results("eager", [], suite=SUITE_VERSION, dtypes=list(dtypes), **more)]


def test_the_power_table_says_share_blind_untried_and_no_numbers_in_words(
    shipped: dict[str, list[dict[str, Any]]],
) -> None:
    shipped["float32"] = given.power()
    results = current("float32")
    source = render(results, [], None)
    first, blind, weak, full = (clause.name for clause in ALL[:4])
    text = section(source, "power")
    assert f"{first} judges no numbers {blind} blind 0/8 blind 0/8 – blind 0/8 " in text
    assert f"{weak} 38 % 3/8 100 % 8/8 – 100 % 8/8 " in text
    assert f"{full} 100 % 8/8 100 % 8/8 – 100 % 8/8 " in text
    assert "errors.malformed 100 % 8/8 100 % 8/8 – in bound " in text
    assert f"The weakest that are not blind: {weak} on “zeros” 3/8." in text
    assert f"Blind to every model tried: {blind}." in text
    assert "Every model is rejected by some clause." in text
    assert f"{weak} on “zeros” 3/8" in markdown.render(results, [], None)


def test_dtypes_share_a_cell_of_the_power_table_and_are_named_where_they_differ(
    shipped: dict[str, list[dict[str, Any]]],
) -> None:
    def row(model: str, rejected: int) -> dict[str, object]:
        return {"clause": "batch.ragged", "model": model, "cases": 4, "tried": 4, "rejected": rejected, "note": ""}

    single, half = [row("zeros", 4), row("stale", 4)], [row("zeros", 4), row("stale", 2)]
    shipped |= {"float32": single, "bfloat16": half, "float16": single}
    text = section(render(current("float32", "bfloat16", "float16"), [], None), "power")
    assert "batch.ragged 100 % 4/4 100 % 4/4 float32, float16 50 % 2/4 bfloat16" in text


def test_a_model_that_no_clause_rejects_and_a_clause_blind_to_one_model_are_named(
    shipped: dict[str, list[dict[str, Any]]],
) -> None:
    def row(clause: str, model: str, rejected: int) -> dict[str, object]:
        return {"clause": clause, "model": model, "cases": 4, "tried": 4, "rejected": rejected, "note": ""}

    rows = [row("batch.ragged", "zeros", 4), row("batch.ragged", "mean", 0), row("batch.ragged", "stale", 4)]
    rows += [row("batch.padding", "zeros", 0), row("batch.padding", "mean", 0), row("batch.padding", "stale", 4)]
    shipped["float32"] = rows
    text = section(render(current("float32"), [], None), "power")
    assert "No clause rejects “mean”." in text
    assert "Blind to some models: batch.ragged to “mean”; batch.padding to all but “stale”." in text
    assert "weakest" not in text


@pytest.mark.parametrize(
    "results",
    [current("float32"), [given.results("old", [])], [given.black_box("own")]],
    ids=["not shipped", "another suite", "black box"],
)
def test_results_without_a_power_table_say_so(results: list[Results], shipped: dict[str, list[dict[str, Any]]]) -> None:
    if results[0].suite != SUITE_VERSION or results[0].target is not None:
        shipped["float32"] = given.power()
    assert "There is no null-model power table for these results" in section(render(results, [], None), "power")
    assert "Power of the clauses" not in markdown.render(results, [], None)


@pytest.mark.parametrize(
    ("part", "whole", "words"), [(0, 9, "0 %"), (1, 400, "1 %"), (399, 400, "99 %"), (7, 7, "100 %")]
)
def test_a_share_is_nothing_or_all_only_where_it_is(part: int, whole: int, words: str) -> None:
    assert percent(part, whole) == words


def test_the_audit_shows_scores_survivors_alarms_and_what_did_not_run() -> None:
    source, short = (
        render(given.four(), [], None, audit=given.audit()),
        markdown.render([], [], None, audit=given.audit()),
    )
    text = section(source, "mutation")
    assert "smoke unconditional 1 of 1 100 %" in text
    assert "smoke conditional 1 of 2 50 %" in text
    assert "pr conditional 2 of 2 100 %" in text
    assert "conditional-mask conditional, M1 · a report · survives smoke" in text
    assert "causality.past-seen pass under attention-gqa" in text
    assert "gpu-only : it needs a GPU" in text
    assert "2 correct backends judged by every clause: ✗ 1 false alarm" in text
    assert "right-too unconditional, M1 · pytorch/pytorch#108108" in text
    for words in ("smoke, conditional: 1 of 2 killed", "survives smoke: conditional-mask", "false alarm: right-too"):
        assert words in short
    assert "No audit was given" in section(render([], [], None), "mutation")


def test_the_kill_matrix_has_a_mark_for_each_trial() -> None:
    source = render([], [], None, audit=given.audit())
    marks = {
        name: [path.count("M") for path in re.findall(rf'<path class="{name}" d="([^"]*)"', source)]
        for name in ("killed", "also", "missed-mark")
    }
    # Under smoke top-left is killed by both, tail-attended by one and by one that it does not name.
    assert marks == {"killed": [3, 4], "also": [1, 1], "missed-mark": [2, 1]}
    text = section(source, "mutation")
    assert "top-left unconditional, M1 · pytorch/pytorch#108108 The mask of top-left" in text
    assert "causality.past-seen attention-gqa, 12 programs, smoke" in text


def test_an_audit_that_is_only_a_part_or_of_another_suite_says_so() -> None:
    record = given.audit()
    record.finished, record.shard, record.names, record.suite = False, "1/4", ["window"], "0.0.9"
    text = section(render(given.four(), [], None, audit=record), "mutation")
    assert "did not finish" in text
    assert "shard 1/4" in text
    assert "Only faults whose name starts with window were audited" in text
    assert "The audit is for suite 0.0.9, the results are for suite 0.1.0." in text


def test_every_clause_of_the_spec_can_be_linked_to() -> None:
    parsed = page(rendered(given.four()))
    ids = {a["id"] for _, a in parsed.tags if "id" in a}
    assert {clause.name for clause in ALL} <= ids
    linked = {(a.get("href") or "")[1:] for tag, a in parsed.tags if tag == "a"}
    assert {"equivalence.chunks", "determinism.repeatable", "numerics.zero-keys"} <= linked


def test_a_fraction_that_is_not_a_number_is_over_the_bound() -> None:
    pairs = [Pair("attention-gqa", "a", "b", value, 1.0, 9) for value in (float("inf"),)]
    text = page(render([], pairs, None)).text
    assert "not finite" in text
    assert "over the bound" in text
    assert "over the bound" not in page(render([], [Pair("attention-gqa", "a", "b", 0.99, 1.0, 9)], None)).text


def test_junit_parses_and_its_counts_agree_with_the_verdicts() -> None:
    results = given.four()
    root = ET.fromstring(junit.render(results))
    for suite, result in zip(root.iter("testsuite"), results, strict=True):
        outcomes = [verdict.outcome for verdict in result.verdicts]
        stopped = bool(result.unavailable)
        want = {
            "tests": len(outcomes) + stopped,
            "failures": sum(outcome.broken for outcome in outcomes),
            "errors": outcomes.count(Outcome.INCONCLUSIVE) + stopped,
            "skipped": sum(
                outcome in (Outcome.UNSUPPORTED, Outcome.NOT_EXERCISED, Outcome.REFUTED, Outcome.KNOWN_FAILURE)
                for outcome in outcomes
            ),
        }
        tags = {"tests": "testcase", "failures": "failure", "errors": "error", "skipped": "skipped"}
        assert {name: int(suite.get(name, "")) for name in want} == want
        assert {name: len(list(suite.iter(tag))) for name, tag in tags.items()} == want
    assert int(root.get("failures", "")) == 4
    assert int(root.get("tests", "")) == 3 * len(given.everywhere()) + 1
    messages = {element.get("message", "").partition(": ")[2] for element in root.iter("skipped")}
    assert messages == {
        v.sentence
        for result in results
        for v in result.verdicts
        if not v.outcome.broken and v.outcome not in (Outcome.PASS, Outcome.INCONCLUSIVE)
    }
    sentences = {element.get("message") for element in root.iter("failure")}
    assert sentences == {v.sentence for r in results for v in r.verdicts if v.outcome.broken}


def test_a_failure_says_where_it_is_as_data() -> None:
    """The fields of its mismatch, in the report and as properties of the test case."""
    fail = given.other("equivalence.decode", "attention-gqa", Outcome.FAIL, "wrong")
    leaked = given.other(
        "shape.length",
        "attention-gqa",
        Outcome.FAIL,
        "wrong",
        mismatch=Mismatch(kind=Kind.LENGTHS, step=2, call="append 1 to a", got=(4, 5), want=(4, 4), earlier_programs=2),
    )
    result = given.results("eager", [fail, leaked, given.passed("shape.output", "attention-gqa")])
    text = section(render([result], [], None), "failures")
    assert "kind parity" in text
    assert "row 1 position 7" in text
    assert "got -0.4482 want -0.4266 bound 7.4e-7" in text
    assert "got 4, 5 want 4, 4 earlier_programs 2" in text
    cases = list(ET.fromstring(junit.render([result])).iter("testcase"))
    first, second, passed = ({p.get("name"): p.get("value") for p in case.iter("property")} for case in cases)
    assert first == {
        "clause": "equivalence.decode",
        "config": "attention-gqa",
        "kind": "parity",
        "program": "1",
        "step": "2",
        "call": "append 1 to a of 2 rows",
        "row": "1",
        "position": "7",
        "column": "0",
        "part": "head",
        "head": "3",
        "element": "5",
        "got": "-0.4482",
        "want": "-0.4266",
        "bound": "7.4e-7",
    }
    assert (second["step"], second["got"], second["want"], second["earlier_programs"]) == ("2", "4, 5", "4, 4", "2")
    assert passed == {}


def test_the_policy_allows_this_style_and_this_script_and_nothing_else() -> None:
    parsed = page(rendered(given.four()))
    policy = next(a["content"] or "" for tag, a in parsed.tags if a.get("http-equiv") == "Content-Security-Policy")
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))

    def digest(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    assert rules["default-src"] == "'none'"
    assert rules["style-src"] == digest(parsed.raw["style"][0])
    assert rules["script-src"] == digest(parsed.raw["script"][1])
    assert rules["img-src"] == "data:"
    assert not [a for _, attributes in parsed.tags for a in attributes if a == "style" or a.startswith("on")]
    assert len(parsed.raw["script"][1].encode()) <= 3072


def test_the_report_refers_to_nothing_outside_but_by_links() -> None:
    parsed = page(rendered(given.four()))
    assert not [tag for tag, a in parsed.tags if "src" in a or "srcset" in a]
    assert {a["href"] for tag, a in parsed.tags if tag == "link"} == {"data:,"}
    assert "url(" not in parsed.raw["style"][0]
    assert "@import" not in parsed.raw["style"][0]
    assert {a["content"] for _, a in parsed.tags if a.get("name") == "referrer"} == {"no-referrer"}


def test_ids_are_unique_and_every_reference_to_one_holds() -> None:
    parsed = page(rendered(given.four()))
    ids = [a["id"] for _, a in parsed.tags if "id" in a]
    assert len(ids) == len(set(ids))
    for _, attributes in parsed.tags:
        for reference in (attributes.get("aria-labelledby") or "").split():
            assert reference in ids
        target = attributes.get("href") or ""
        if target.startswith("#"):
            assert target[1:] in ids


def test_headings_come_in_order_and_table_headers_have_a_scope() -> None:
    parsed = page(rendered(given.four()))
    levels = [int(tag[1]) for tag, _ in parsed.tags if re.fullmatch("h[1-6]", tag)]
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    headers = [a for tag, a in parsed.tags if tag == "th"]
    assert len(headers) > len(ALL)
    assert all(a.get("scope") in ("col", "row", "rowgroup") for a in headers)


def test_a_report_of_nothing_says_that_nothing_was_given() -> None:
    assert "No results were given" in page(render([], [], None)).text
    assert "No results were given" in markdown.render([], [], None)
    assert terminal.table([]) == "no results"
    assert ET.fromstring(junit.render([])).get("tests") == "0"


def test_two_runs_of_one_backend_keep_apart() -> None:
    same = [given.results("eager", given.everywhere(), device=d) for d in ("cpu", "cuda", "cuda")]
    text = terminal.table(same)
    assert [line.split("  ")[0] for line in text.splitlines()[1:]] == [
        "eager (cpu)",
        "eager (cuda) (float32) #2",
        "eager (cuda) (float32) #3",
    ]


# --- what sees what ---
def test_what_is_broken_is_named_mapped_and_told_in_words() -> None:
    parsed = page(render([given.black_box("mine")], [], None))
    assert 'matches "the causal diagonal starts at the top left' in parsed.text
    assert "pytorch/pytorch#108108" in parsed.text
    pictures = [attributes for tag, attributes in parsed.tags if tag == "svg" and attributes.get("class") == "map"]
    assert len(pictures) == 2  # the legend, and the one that differs
    assert all(attributes["role"] == "img" for attributes in pictures)
    assert f"chunked {'+'.join(map(str, given.AS_EXPECTED.sizes))}: as expected" in parsed.text
    words = maps.words(given.TOP_LEFT)
    assert "token 0" in words
    assert parsed.text.count(words) == 2  # under the picture, and as its description


def test_a_black_box_is_told_apart_from_what_the_definition_judged() -> None:
    parsed = page(render([given.black_box("mine"), given.four()[0]], [], None))
    assert parsed.text.count("judged by its own uncached forward") >= 1
    assert parsed.text.count("judged by the definition") == 1
    assert "own reference" in parsed.text
    assert "noise floor, hidden-self" in parsed.text


def test_a_diagnosis_is_in_the_job_summary() -> None:
    assert "begins at the top left" in markdown.render([given.black_box("mine")], [], None)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_words_of_a_target_come_out_as_text(name: str) -> None:
    tame, wild = (page(render([given.black_box(words, words)], [], None)) for words in ("tame", name))
    assert wild.text.count(name) >= 6
    assert shape(wild) == shape(tame)
