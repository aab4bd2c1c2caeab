"""Results are whole or not there, and the gate moves when they do, both ways."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest
from mismatches import cause
from places import SUPPORT

from kvconform.cli.schemas import json_schema
from kvconform.errors import BadArgument
from kvconform.files import write_atomically
from kvconform.judging.verdict import Outcome, Verdict
from kvconform.results import gate
from kvconform.results.claims_diff import WIDEST_FIRST, moved_claims
from kvconform.results.diff import words as said
from kvconform.results.results import Results, missing_core, read
from kvconform.run.run import Plan, cells, parse_shard, plan_for, run_backend
from kvconform.search.cell import Cell, run_cell
from kvconform.search.counterexample import read as read_counterexample
from kvconform.search.effort import EFFORTS, GUARANTEE_SECONDS, GUARANTEE_TRIALS, SHRINK_SECONDS, SHRINK_TRIALS
from kvconform.worker.client import WorkerClient, WorkerSpec
from kvconform_specs import SUITE_VERSION
from kvconform_specs.claims import Claims
from kvconform_specs.clause import Level
from kvconform_specs.clauses import BY_NAME
from kvconform_specs.config import DTYPES
from kvconform_specs.configs import config_named
from kvconform_specs.errors import SpecError


def verdict(clause: str = "shape.output", outcome: Outcome = Outcome.PASS, **more: Any) -> Verdict:
    words = "" if outcome is Outcome.PASS else "it broke"
    fields: dict[str, Any] = {"compared": 10, "sentence": words, **cause(outcome), **more}
    return Verdict(clause=clause, config="attention-gqa", backend="x", outcome=outcome, **fields)


CLAIMS: dict[str, Any] = {"abilities": ["uncached_forward", "reset"], "max_batch": None, "overflow": "refused"}


def results(*verdicts: Verdict, **more: Any) -> Results:
    fields: dict[str, Any] = {
        "claims": {"abilities": ["uncached_forward", "reset"], "max_batch": None, "overflow": "refused"},
        **more,
    }
    return Results(
        suite="0",
        backend="x",
        device="cpu",
        dtypes=["float32"],
        effort="smoke",
        seed=0,
        started="now",
        finished=True,
        verdicts=list(verdicts),
        **fields,
    )


@pytest.mark.parametrize(
    ("now", "code", "words"),
    [
        (results(verdict()), 0, ""),
        (results(verdict(compared=11)), 0, ""),
        (results(verdict(outcome=Outcome.FAIL)), 4, "shape.output [attention-gqa]: pass -> fail: it broke"),
        (results(verdict(outcome=Outcome.CRASH)), 4, "shape.output [attention-gqa]: pass -> crash: it broke"),
        (results(verdict(outcome=Outcome.TIMEOUT)), 4, "shape.output [attention-gqa]: pass -> timeout: it broke"),
        (results(verdict(), verdict("shape.length", Outcome.CRASH)), 1, "shape.length [attention-gqa]: absent -> cr"),
        (results(verdict(outcome=Outcome.UNSUPPORTED)), 4, "pass -> unsupported: it broke"),
        (results(verdict(outcome=Outcome.INCONCLUSIVE)), 5, "pass -> inconclusive"),
        (results(verdict(outcome=Outcome.NOT_EXERCISED)), 4, "pass -> not exercised"),
        (results(verdict(compared=9)), 4, "compared 9 values, was 10"),
        (results(), 4, "shape.output [attention-gqa]: was pass, is gone"),
        (
            results(verdict(), claims={**CLAIMS, "abilities": ["uncached_forward"]}),
            4,
            "no longer claims abilities: reset",
        ),
        (results(verdict(), claims={**CLAIMS, "max_batch": 2}), 4, "narrowed max_batch from unlimited to 2"),
        (results(verdict(), claims={**CLAIMS, "overflow": "undefined"}), 4, "narrowed overflow from refused"),
        (results(verdict(outcome=Outcome.REFUTED)), 4, "pass -> refuted: it broke"),
        (results(verdict(outcome=Outcome.KNOWN_FAILURE)), 4, "pass -> known failure: it broke"),
        (results(verdict(), stale=["a row no longer holds"]), 1, "stale known failure: a row no longer holds"),
        (results(shard="1/2"), 5, "1 cell of the baseline not judged: only shard 1/2"),
        (results(clauses=["lifecycle"], configs=["attention"]), 5, "only clauses lifecycle, configs attention"),
        (results(verdict(), shard="1/2"), 0, ""),
        (results(unavailable="it cannot be imported"), 4, "no longer available: it cannot be imported"),
        (results(unavailable="no compiler", lacking=True), 5, "no longer available: no compiler"),
        (results(verdict(), verdict("shape.length")), 0, "absent -> pass"),
    ],
)
def test_the_gate_moves_with_the_results(now: Results, code: int, words: str) -> None:
    differences = gate.compare(now, results(verdict()))
    assert gate.exit_code(differences) == code
    assert (words in "\n".join(said(d) for d in differences)) if words else not differences


@pytest.mark.parametrize(
    ("claim", "much", "less"),
    [
        ("padding", ["right", "left"], ["right"]),
        ("max_chunk", None, 4),
        ("static_shapes", [], [1, 4]),
        ("static_shapes", [1, 4], [1]),
        ("max_sequences", 3, 2),
        ("returns", "all", "last"),
        ("overflow", "refused", "undefined"),
        ("retention", "all", "window"),
        ("unused_slots", "any", "finite"),
        ("memory", "length", "pages"),
        ("memory", "pages", "capacity"),
        ("max_graphs", 2, 3),
        ("max_graphs", 2, None),
        ("intermediates", "single", "storage"),
        ("kv_bits", 0, 8),
        ("kv_bits", 8, 4),
        ("inputs", "copied", "kept"),
        ("too_deep", "refused", "undefined"),
        ("ragged_appends", "any", "first"),
        ("interface", "steps", "generation"),
        ("rollback", 4, 2),
        ("rollback", None, 4),
        ("sees_nothing", "zeros", "finite"),
    ],
)
def test_a_claim_that_promises_less_is_a_regression_and_one_that_promises_more_is_none(
    claim: str, much: Any, less: Any
) -> None:
    wide, narrow = (results(verdict(), claims={claim: value}) for value in (much, less))
    narrowed = gate.compare(narrow, wide)
    assert gate.exit_code(narrowed) == 4
    assert claim in said(narrowed[0])
    assert gate.exit_code(gate.compare(wide, narrow)) == 0
    assert gate.compare(narrow, narrow) == []


def test_a_residual_window_promises_something_only_of_a_quantised_cache() -> None:
    def quantised(bits: int, residual: int) -> Results:
        return results(verdict(), claims={"kv_bits": bits, "residual": residual})

    assert gate.exit_code(gate.compare(quantised(8, 2), quantised(8, 4))) == 4
    assert gate.exit_code(gate.compare(quantised(8, 4), quantised(8, 2))) == 0
    assert gate.exit_code(gate.compare(quantised(0, 0), quantised(8, 4))) == 0


def test_lengths_at_which_a_forward_changes_are_told_and_block_nothing() -> None:
    for now, was in (([12], []), ([], [12])):
        told = gate.compare(
            results(verdict(), claims={"changes_at": now}), results(verdict(), claims={"changes_at": was})
        )
        assert [(gate.RULE[d.kind], said(d)) for d in told] == [(0, f"x changed changes_at from {was} to {now}")]


def test_another_page_size_is_told_and_blocks_nothing() -> None:
    told = gate.compare(results(verdict(), claims={"page": 8}), results(verdict(), claims={"page": 4}))
    assert [(gate.RULE[d.kind], said(d)) for d in told] == [(0, "x changed page from 4 to 8")]


def test_the_gate_knows_every_claim_of_one_value() -> None:
    """A claim that is added must say what narrows it."""
    values = {name for name, value in Claims().to_json().items() if not isinstance(value, list)}
    numbers = {"max_batch", "max_chunk", "max_sequences", "max_graphs", "kv_bits", "residual", "page", "rollback"}
    assert values == {*WIDEST_FIRST, *numbers, "cache_dtype", "quantiser"}
    for name, order in WIDEST_FIRST.items():
        for value in order:
            Claims(**{name: value})


@pytest.mark.parametrize(
    ("now", "code", "words"),
    [
        (results(verdict(digest="b", compared=3)), 0, ""),
        (results(verdict(digest="b", outcome=Outcome.FAIL)), 1, "pass -> fail under other programs: it broke"),
        (results(verdict(digest="b", outcome=Outcome.CRASH)), 1, "pass -> crash under other programs: it broke"),
        (results(verdict(digest="b", outcome=Outcome.REFUTED)), 0, "pass -> refuted under other programs: it broke"),
        (results(verdict(digest="b", outcome=Outcome.NOT_EXERCISED)), 5, "pass -> not exercised under other programs"),
        (results(verdict(digest="b", outcome=Outcome.INCONCLUSIVE)), 5, "pass -> inconclusive: it broke"),
    ],
)
def test_other_programs_are_no_regression_and_a_failure_is_a_new_one(now: Results, code: int, words: str) -> None:
    differences = gate.compare(msgspec.structs.replace(now, seed=7), results(verdict(digest="a")))
    assert gate.exit_code(differences) == code
    told = [said(difference) for difference in differences]
    assert "1 of 1 cell had other programs: seed is 7, in the baseline 0" in told
    assert words in "\n".join(told)


def test_a_gate_between_two_efforts_is_one_line() -> None:
    cells = list(BY_NAME)[:75]
    smoke = results(*(verdict(name, digest="a", compared=5) for name in cells), environment={"hypothesis": "6.170.15"})
    pr = msgspec.structs.replace(
        results(*(verdict(name, digest="b", compared=50) for name in cells), environment={"hypothesis": "6.100.0"}),
        effort="pr",
        claims={**CLAIMS, "max_batch": 2},
    )
    words = (
        f"{len(cells)} of {len(cells)} cells had other programs: effort is smoke, in the baseline pr; "
        "hypothesis is 6.170.15, in the baseline 6.100.0; the claims differ"
    )
    changed = "x changed max_batch from 2 to unlimited"
    assert [(gate.RULE[d.kind], said(d)) for d in gate.compare(smoke, pr)] == [(0, changed), (0, words)]


def test_a_cell_that_time_cut_is_no_regression() -> None:
    whole, cut = results(verdict(digest="a", planned=9)), results(verdict(digest="a", planned=9, compared=1, cut=True))
    (note,) = gate.compare(cut, whole)
    assert gate.RULE[note.kind] == 0
    assert said(note) == "1 of 1 cell cut: the time limit ended before all planned programs were judged"
    assert gate.compare(whole, cut) == []


def test_a_failure_that_the_baseline_had_no_time_to_find_is_a_new_one() -> None:
    baseline = results(verdict(digest="a", cut=True, programs=12))
    early, late = (results(verdict(digest="a", outcome=Outcome.FAIL, found_after=after)) for after in (12, 13))
    assert gate.exit_code(gate.compare(early, baseline)) == 4
    (new,) = gate.compare(late, baseline)
    assert (gate.RULE[new.kind], "under programs that the baseline had no time for" in said(new)) == (1, True)


def test_passes_on_another_device_or_by_another_suite_are_not_compared() -> None:
    for change, code in (({"device": "cuda"}, 5), ({"suite": "1"}, 0)):
        (name,) = change
        fewer, broken = results(verdict(compared=3)), results(verdict(outcome=Outcome.FAIL))
        (told,) = gate.compare(msgspec.structs.replace(fewer, **change), results(verdict()))
        assert (gate.RULE[told.kind], "passes are not compared" in said(told)) == (code, True)
        differences = gate.compare(msgspec.structs.replace(broken, **change), results(verdict()))
        assert gate.exit_code(differences) == 1
        assert f"pass -> fail under another {name}: it broke" in said(differences[-1])
    gone = gate.compare(msgspec.structs.replace(results(), suite="1"), results(verdict()))
    assert gate.exit_code(gone) == 0
    assert said(gone[-1]) == "1 cell of the baseline not judged: the suites differ"


def test_cells_of_another_dtype_are_counted_and_not_called_gone() -> None:
    both = msgspec.structs.replace(
        results(verdict(), replaced(verdict(), "attention-gqa-float16")), dtypes=["float32", "float16"]
    )
    (told,) = gate.compare(results(verdict()), both)
    assert (gate.RULE[told.kind], said(told)) == (5, "1 cell of the baseline not judged: only dtypes float32")


def test_a_failure_that_the_baseline_knows_is_not_new() -> None:
    broken = results(verdict(outcome=Outcome.FAIL))
    assert gate.exit_code(gate.compare(broken, broken)) == 0
    fixed = gate.compare(results(verdict()), broken)
    assert gate.exit_code(fixed) == 0
    assert "fail -> pass" in said(fixed[0])


def concluded(found: Results) -> tuple[int, str]:
    return found.exit_code, found.summary


def test_only_conformance_exits_with_zero() -> None:
    """Of the whole suite; ``results`` are of a version whose cells are not known."""
    assert (
        msgspec.structs.replace(results(verdict()), finished=False).summary == "the run did not finish: 1 cell judged"
    )
    assert concluded(results(unavailable="no GPU")) == (3, "no GPU")
    assert results(verdict(outcome=Outcome.FAIL)).exit_code == 1
    assert results(verdict(outcome=Outcome.FAIL), unavailable="no GPU").exit_code == 1
    assert results(verdict(outcome=Outcome.INCONCLUSIVE)).exit_code == 5
    assert "not exercised" in results(verdict(outcome=Outcome.NOT_EXERCISED)).summary
    code, sentence = concluded(results(verdict()))
    assert code == 5
    assert "no PASS on the core clauses" in sentence
    assert "lifecycle.reset" in sentence
    assert results().exit_code == 5


def test_failures_are_counted_among_the_cells_that_were_judged() -> None:
    bad, skipped = verdict(outcome=Outcome.CRASH), verdict("shape.length", Outcome.UNSUPPORTED)
    found = results(verdict("shape.first-step"), bad, skipped)
    assert found.failures == (bad,)
    assert not found.ok
    assert found.summary == "non-conformant: 1 of 2 judged cells failed; 1 not applicable"
    assert results(bad).summary == "non-conformant: 1 of 1 judged cell failed"
    assert found.counts == dict.fromkeys((o.value for o in Outcome), 0) | {"pass": 1, "crash": 1, "unsupported": 1}


CORE = [verdict(name) for name, clause in BY_NAME.items() if clause.core and "attention" in clause.profiles]


def test_a_refuted_guarantee_and_a_known_failure_are_no_failure_and_no_pass() -> None:
    more = [verdict("definition.scale", outcome) for outcome in (Outcome.REFUTED, Outcome.KNOWN_FAILURE)]
    assert concluded(results(*CORE)) == (0, "conformant: attention profile")
    assert concluded(results(*CORE, *more)) == (0, "conformant: attention profile, with 1 known failure")
    for one in more:
        assert not one.outcome.broken
        code, sentence = concluded(results(*CORE[1:], verdict(CORE[0].clause, one.outcome)))
        assert code == 5
        assert CORE[0].clause in sentence


def test_stale_known_failures_are_not_conformant() -> None:
    found = results(*CORE, stale=["one", "two"])
    assert concluded(found) == (1, "stale known failures: 2 rows to correct or to remove")


def test_a_shard_concludes_nothing() -> None:
    part = results(*CORE, shard="1/3")
    assert concluded(part) == (0, f"shard 1/3: {len(CORE)} cells, nothing failed; merge the shards to conclude")
    assert part.partial
    assert missing_core(part, "attention") == sorted(v.clause for v in CORE)
    assert results(*CORE, verdict(outcome=Outcome.FAIL), shard="1/3").exit_code == 1
    assert results(*CORE, verdict(outcome=Outcome.NOT_EXERCISED), shard="1/3").exit_code == 5
    assert results(*CORE, shard="1/3", stale=["one"]).exit_code == 1


def part(*verdicts: Verdict, **more: Any) -> Results:
    return msgspec.structs.replace(results(*verdicts, **more), suite=SUITE_VERSION)


@pytest.mark.parametrize(
    ("found", "code", "words"),
    [
        (part(verdict()), 0, "the selected part passed: 1 cell; conformance needs the whole suite"),
        (part(*CORE), 0, f"the selected part passed: {len(CORE)} cells; conformance needs the whole suite"),
        (part(verdict("capacity.full"), verdict("shape.output", Outcome.UNSUPPORTED)), 5, "no PASS on the core claus"),
        (part(verdict("lifecycle.fork"), verdict("lifecycle.reset", Outcome.KNOWN_FAILURE)), 5, "lifecycle.reset (att"),
        (part(verdict("lifecycle.fork"), verdict("lifecycle.reorder", Outcome.KNOWN_FAILURE)), 0, ", with 1 known fai"),
        (
            part(verdict("lifecycle.fork", Outcome.UNSUPPORTED)),
            5,
            "undecided: no cell of the selected part passed (1 c",
        ),
        (part(verdict(), verdict("shape.length", Outcome.INCONCLUSIVE)), 5, "undecided: 1 of 2 judged cells inconclus"),
        (part(verdict(), verdict("shape.length", Outcome.FAIL)), 1, "non-conformant: 1 of 2 judged cells failed"),
        (part(verdict(), stale=["a row"]), 1, "stale known failures: 1 row to correct or to remove"),
        (part(), 5, "undecided: no cell was judged"),
    ],
)
def test_a_part_of_the_suite_passes_and_is_not_called_conformant(found: Results, code: int, words: str) -> None:
    assert found.partial
    assert found.exit_code == code
    assert words in found.summary
    assert not found.summary.startswith("conformant:")


def test_every_cell_of_the_suite_makes_it_whole() -> None:
    plan = Plan(EFFORTS["smoke"], dtypes=("float32", "bfloat16"))
    verdicts = [replaced(verdict(cell.clause.name), cell.config_name) for cell in cells(plan)]
    whole = msgspec.structs.replace(part(*verdicts), dtypes=list(plan.dtypes))
    assert concluded(whole) == (0, "conformant: attention and decoder profile")
    assert msgspec.structs.replace(whole, verdicts=verdicts[1:]).partial
    assert not msgspec.structs.replace(whole, dtypes=["float32"]).partial
    assert msgspec.structs.replace(whole, dtypes=list(DTYPES)).partial


def replaced(one: Verdict, config: str) -> Verdict:
    return msgspec.structs.replace(one, config=config)


def test_a_results_file_fits_its_own_json_schema(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    results(verdict(), verdict("shape.length", Outcome.FAIL)).write(path)
    jsonschema.validate(json.loads(path.read_text()), json_schema("results"))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**json.loads(path.read_text()), "verdicts": [{"clause": 3}]}, json_schema("results"))


def test_what_is_no_results_file_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    with pytest.raises(SpecError, match="cannot be read: No such file"):
        read(path)
    path.write_text("{")
    with pytest.raises(SpecError, match="holds no results"):
        read(path)
    data = msgspec.to_builtins(results(verdict()))
    path.write_text(json.dumps({**data, "schema": "kvconform-results/99"}))
    with pytest.raises(SpecError, match="unknown schema 'kvconform-results/99'; known: kvconform-results/5"):
        read(path)


def test_a_file_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    write_atomically(path, b"first")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk gone")))
    with pytest.raises(OSError, match="disk gone"):
        write_atomically(path, b"second")
    assert path.read_bytes() == b"first"
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.slow
def test_a_run_goes_on_where_an_unfinished_one_stopped_and_only_there(tmp_path: Path) -> None:
    plan = Plan(EFFORTS["smoke"], clauses=("shape.output", "shape.length"), configs=("attention-gqa",))
    whole = run_backend("numpy", WorkerSpec("numpy"), plan, tmp_path)
    assert [v.outcome for v in whole.verdicts] == [Outcome.PASS, Outcome.PASS]
    marked = msgspec.structs.replace(whole.verdicts[0], compared=123456)
    msgspec.structs.replace(whole, verdicts=[marked], finished=False).write(tmp_path / "numpy.json")
    resumed = run_backend("numpy", WorkerSpec("numpy"), plan, tmp_path)
    assert [v.compared for v in resumed.verdicts] == [123456, whole.verdicts[1].compared]
    again = run_backend("numpy", WorkerSpec("numpy"), plan, tmp_path)  # it was finished: starts again
    assert [v.compared for v in again.verdicts] == [v.compared for v in whole.verdicts]
    msgspec.structs.replace(again, verdicts=[marked], finished=False, seed=1).write(tmp_path / "numpy.json")
    other = run_backend("numpy", WorkerSpec("numpy"), plan, tmp_path)  # another run's: not taken over
    assert [v.compared for v in other.verdicts] == [v.compared for v in whole.verdicts]


def test_a_run_is_not_resumed_once_the_backend_has_changed(tmp_path: Path) -> None:
    source = "from kvconform_backends.numpy.cache import NumpyCache\n\n\nclass Mine(NumpyCache):\n    pass\n"
    file = tmp_path / "mine.py"
    file.write_text(source)
    plan = Plan(EFFORTS["smoke"], clauses=("shape.output",), configs=("attention-gqa",))
    first = run_backend("mine", WorkerSpec(f"{file}:Mine"), plan, tmp_path)
    marked = msgspec.structs.replace(first.verdicts[0], compared=123456)
    msgspec.structs.replace(first, verdicts=[marked], finished=False).write(tmp_path / "mine.json")
    file.write_text(source + "# mended\n")
    assert (
        run_backend("mine", WorkerSpec(f"{file}:Mine"), plan, tmp_path).verdicts[0].compared
        == first.verdicts[0].compared
    )


@pytest.mark.parametrize("count", [1, 2, 3, 8, 13, 40, 200])
def test_shards_part_the_cells_and_build_each_config_once_where_they_can(count: int) -> None:
    plan = Plan(EFFORTS["smoke"], dtypes=DTYPES)
    whole = list(cells(plan))
    shards = [list(cells(replace(plan, shard=(index, count)))) for index in range(1, count + 1)]
    assert sorted((c.config_name, c.clause.name) for shard in shards for c in shard) == sorted(
        (c.config_name, c.clause.name) for c in whole
    )
    order = {(cell.config_name, cell.clause.name): at for at, cell in enumerate(whole)}
    for shard in shards:
        places = [order[cell.config_name, cell.clause.name] for cell in shard]
        assert places == sorted(places)
    configs = {cell.config_name for cell in whole}
    built = [len({cell.config_name for cell in shard}) for shard in shards]
    assert sum(built) == len(configs) if count <= len(configs) else max(built) == 1
    largest = max(sum(cell.config_name == name for cell in whole) for name in configs)
    assert max(map(len, shards)) - min(map(len, shards)) <= largest


@pytest.mark.parametrize("text", ["", "2", "0/2", "3/2", "-1/2", "a/b", "1/2/3", "1/"])
def test_what_is_no_shard_is_one_sentence(text: str) -> None:
    assert parse_shard("2/3") == (2, 3)
    with pytest.raises(BadArgument, match="shard: want i/n with i from 1 to n, such as 2/5"):
        parse_shard(text)


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "outcome"), [("PrintsAndIsWrong", Outcome.REFUTED), ("Segfaults", Outcome.CRASH)])
def test_a_broken_guarantee_is_refuted_unless_the_process_dies(backend: str, outcome: Outcome, tmp_path: Path) -> None:
    must = BY_NAME["definition.attention"]
    address = f"{(SUPPORT / 'subjects.py')}:{backend}"
    cell = Cell(replace(must, level=Level.SHOULD), config_named("attention-gqa"), "attention-gqa")
    with WorkerClient(WorkerSpec(address)) as client:
        found = run_cell(cell, client, EFFORTS["smoke"], 0, tmp_path)
    assert found.outcome is outcome
    assert found.sentence
    assert read_counterexample(tmp_path / found.counterexample).outcome is outcome


def test_a_guarantee_is_given_less_shrinking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    must = BY_NAME["definition.attention"]
    monkeypatch.setattr("kvconform.search.cell.GUARANTEE_TRIALS", 1)
    reduced = {}
    with WorkerClient(WorkerSpec(f"{(SUPPORT / 'subjects.py')}:PrintsAndIsWrong")) as client:
        for level in Level:
            cell = Cell(replace(must, level=level), config_named("attention-gqa"), "attention-gqa")
            found = run_cell(cell, client, EFFORTS["smoke"], 0, tmp_path)
            reduced[level] = read_counterexample(tmp_path / found.counterexample).reduced
    assert reduced == {Level.MUST: True, Level.SHOULD: False}
    assert (GUARANTEE_TRIALS, GUARANTEE_SECONDS) < (SHRINK_TRIALS, SHRINK_SECONDS)


def test_an_interrupted_run_stays_where_its_backend_cannot_start_again(tmp_path: Path) -> None:
    plan, path = plan_for("smoke", clauses=("shape.output",), configs=("attention-gqa",)), tmp_path / "mine.json"
    whole = run_backend("mine", WorkerSpec("numpy"), plan, tmp_path)
    msgspec.structs.replace(whole, finished=False).write(path)
    held = path.read_bytes()
    absent = run_backend("mine", WorkerSpec("nowhere:Cache"), plan, tmp_path)
    assert (absent.exit_code, absent.verdicts) == (3, [])
    assert path.read_bytes() == held
    other = msgspec.structs.replace(whole, finished=False, seed=1)
    for replaced in (whole, other):  # a run that came to its end, and one of other programs
        replaced.write(path)
        run_backend("mine", WorkerSpec("nowhere:Cache"), plan, tmp_path)
        assert read(path).unavailable


@pytest.mark.parametrize(
    ("claims", "moved"),
    [({"abilities": 3}, True), ({"overflow": "perhaps"}, False), ({"max_batch": "many"}, False), ({"x": [1]}, False)],
)
def test_claims_of_another_suite_are_compared_without_knowing_their_values(claims: dict[str, Any], moved: bool) -> None:
    """A list that is none has lost what it had; of other values it is not known whether they promise less."""
    known = {"abilities": ["fork"], "overflow": "refused", "max_batch": 2}
    found = moved_claims({**known, **claims}, known)
    assert any(one.narrowed for one in found) is moved
    list(moved_claims(known, {**known, **claims}))  # nor the other way round does it raise


@pytest.mark.parametrize("shard", ["x", "1", "0/2", "1/", "1/-2"])
def test_results_of_a_malformed_shard_are_refused(shard: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps({**msgspec.to_builtins(results()), "shard": shard}))
    with pytest.raises(SpecError, match="shard: want i/n, got"):
        read(path)
