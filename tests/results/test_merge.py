"""Parts of a run, from whatever hosts, are joined cell by cell, and nothing of them is lost."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from commands import kvconform
from mismatches import cause
from places import SUPPORT

from kvconform.explain.diagnosis import Diagnosis
from kvconform.judging.verdict import Outcome, Reason, Verdict
from kvconform.results.merge import gather, merged, vectors_of
from kvconform.results.results import Results, read
from kvconform.run.run import Plan, path_of, run_backend
from kvconform.search.effort import Effort
from kvconform.worker.client import WorkerSpec
from kvconform_specs import SUITE_VERSION
from kvconform_specs.errors import SpecError

TINY = Plan(Effort("tiny", 3, 2, 60.0), clauses=("shape", "lifecycle.reset"), explain=True)
CONFIGS = ("attention-gqa", "attention-window")
HOST = {"cpu": "a", "cores": 2, "platform": "Linux-6.1-x86_64", "machine": "x86_64"}


def verdict(clause: str, outcome: Outcome = Outcome.PASS, config: str = "attention-gqa", **more: Any) -> Verdict:
    words = "" if outcome is Outcome.PASS else "it broke"
    fields: dict[str, Any] = {"compared": 10, "sentence": words, **cause(outcome), **more}
    return Verdict(clause=clause, config=config, backend="x", outcome=outcome, **fields)


def part(*verdicts: Verdict, **more: Any) -> Results:
    fields: dict[str, Any] = {
        "suite": SUITE_VERSION,
        "claims": {"abilities": ["reset"]},
        "environment": {"numpy": "2", "platform": HOST["platform"], "machine": HOST},
        "finished": True,
        **more,
    }
    basics: dict[str, Any] = {"backend": "x", "device": "cpu", "dtypes": ["float32"], "effort": "smoke", "seed": 0}
    return Results(started="now", verdicts=list(verdicts), **{**basics, **fields})


def run(plan: Plan, out: Path, backend: str = "numpy") -> Path:
    run_backend("mine", WorkerSpec(backend), plan, out)
    return path_of("mine", plan, out)


def timeless(one: Verdict) -> Verdict:
    return msgspec.structs.replace(one, seconds=0.0)


def test_merged_shards_are_the_whole_run(tmp_path: Path) -> None:
    plan = replace(TINY, configs=CONFIGS)
    whole = read(run(plan, tmp_path))
    shards = [run(replace(plan, shard=(index, 2)), tmp_path) for index in (1, 2)]
    parts = [read(file) for file in reversed(shards)]
    assert [len({verdict.config for verdict in one.verdicts}) for one in parts] == [1, 1]
    found = merged(parts)
    assert [timeless(v) for v in found.verdicts] == [timeless(v) for v in whole.verdicts]
    assert found.same_run(whole)
    assert (found.finished, found.conclusion, found.clauses) == (True, whole.conclusion, whole.clauses)
    assert read(path_of("mine", plan, tmp_path)) == whole  # shards wrote beside it, not over it


@pytest.mark.slow
def test_maps_diagnoses_vectors_and_counterexamples_of_all_parts_are_kept(tmp_path: Path) -> None:
    """Shards of two hosts, each with its own folder; their failures and vectors are of different configs."""
    plan = replace(TINY, clauses=("definition.attention", "shape.output"), configs=CONFIGS)
    backend = f"{SUPPORT / 'subjects.py'}:PrintsAndIsWrong"
    whole = read(run(plan, tmp_path / "whole", backend))
    files = [run(replace(plan, shard=(index, 2)), tmp_path / str(index), backend) for index in (1, 2)]
    done = kvconform("merge", *map(str, files), "-o", str(tmp_path / "both" / "mine.json"), folder=tmp_path)
    assert done.returncode == 1, done.stderr
    found = read(tmp_path / "both" / "mine.json")
    assert found.maps == whole.maps
    assert set(found.maps) == set(CONFIGS)
    assert found.diagnoses.keys() == whole.diagnoses.keys() == set(CONFIGS)
    assert found.runtime_info == whole.runtime_info
    for one in found.failures:
        assert (tmp_path / "both" / "failures" / "mine" / one.counterexample).exists()
    with (
        np.load(vectors_of(tmp_path / "both" / "mine.json")) as mine,
        np.load(vectors_of(tmp_path / "whole" / "mine.json")) as its,
    ):
        assert set(mine.files) == set(its.files) == set(CONFIGS)
        assert all(np.array_equal(mine[name], its[name]) for name in mine.files)


def test_a_counterexample_that_no_part_has_is_named(tmp_path: Path) -> None:
    one = part(verdict("shape.output", Outcome.FAIL, counterexample="shape.output-1.json"))
    one.write(tmp_path / "one" / "x.json")
    files, out = [tmp_path / "one" / "x.json"], tmp_path / "out" / "x.json"
    assert gather(files, one, out) == ["shape.output-1.json"]
    held = tmp_path / "one" / "failures" / "x"
    held.mkdir(parents=True)
    (held / "shape.output-1.json").write_text("{}")
    assert gather(files, one, out) == []
    assert (tmp_path / "out" / "failures" / "x" / "shape.output-1.json").read_text() == "{}"
    assert gather(files, one, tmp_path / "one" / "other.json") == []  # it is there already
    shutil.rmtree(tmp_path / "one")


def test_partial_results_complete_one_another_cell_by_cell() -> None:
    one = part(verdict("shape.output"), verdict("shape.length"), clauses=["shape"])
    two = part(verdict("shape.length"), verdict("lifecycle.reset", config="attention-window"), clauses=["lifecycle"])
    found = merged([two, one])
    assert [v.key for v in found.verdicts] == [
        ("shape.output", "attention-gqa"),
        ("shape.length", "attention-gqa"),
        ("lifecycle.reset", "attention-window"),
    ]
    assert found.partial
    assert found.clauses == ["shape.output", "shape.length", "lifecycle.reset"]
    assert found.configs == list(CONFIGS)
    assert "the selected part passed: 3 cells" in found.summary


def test_an_interrupted_run_is_completed_by_another(tmp_path: Path) -> None:
    plan = replace(TINY, configs=CONFIGS)
    whole = read(run(plan, tmp_path))
    first, rest = (
        msgspec.structs.replace(whole, verdicts=verdicts, finished=False)
        for verdicts in (whole.verdicts[:3], whole.verdicts[3:])
    )
    assert merged([rest, first]).verdicts == whole.verdicts
    assert "did not finish" in merged([rest, first]).summary


@pytest.mark.parametrize(
    ("stands", "falls"),
    [
        ({"outcome": Outcome.FAIL}, {}),
        ({"outcome": Outcome.CRASH}, {"outcome": Outcome.INCONCLUSIVE, "reason": Reason.KILLED}),
        ({"outcome": Outcome.REFUTED}, {}),
        ({"outcome": Outcome.INCONCLUSIVE, "reason": Reason.NOT_CONFIRMED}, {}),
        ({}, {"outcome": Outcome.INCONCLUSIVE, "reason": Reason.KILLED}),
        ({}, {"outcome": Outcome.INCONCLUSIVE, "reason": Reason.OUT_OF_MEMORY}),
        ({}, {"outcome": Outcome.NOT_EXERCISED, "reason": Reason.NOTHING_COMPARED}),
        ({"outcome": Outcome.UNSUPPORTED}, {"outcome": Outcome.INCONCLUSIVE, "reason": Reason.KILLED}),
        ({"compared": 7}, {"compared": 8}),
    ],
)
def test_of_two_verdicts_on_a_cell_one_stands_by_a_rule(stands: dict[str, Any], falls: dict[str, Any]) -> None:
    one, other = (part(verdict("shape.output", **given)) for given in (stands, falls))
    assert merged([one, other]).verdicts == one.verdicts
    if stands.get("outcome", Outcome.PASS) is not falls.get("outcome", Outcome.PASS):
        assert merged([other, one]).verdicts == one.verdicts


def test_maps_and_diagnoses_of_a_config_come_from_the_part_that_has_them() -> None:
    found = Diagnosis(mistake="M1")
    one = part(verdict("shape.output"), maps={"attention-gqa": []})
    two = part(verdict("shape.length"), diagnoses={"attention-gqa": found}, runtime_info={"attention-gqa": {"a": 1}})
    both = merged([one, two])
    assert both.diagnoses == {"attention-gqa": found}
    assert both.runtime_info == {"attention-gqa": {"a": 1}}


def test_hosts_may_differ_in_what_does_not_matter() -> None:
    other = {**HOST, "cpu": "b", "cores": 64, "platform": "Linux-5.15-x86_64"}
    later = {"numpy": "2", "platform": other["platform"], "machine": other, "PyYAML": "6"}
    one, two = part(verdict("shape.output")), part(verdict("shape.length"), environment=later)
    found = merged([one, two, one])
    assert found.environment["machine"] == [HOST, other]
    assert found.environment["platform"] == [HOST["platform"], other["platform"]]
    assert (found.environment["numpy"], found.environment["PyYAML"]) == ("2", "6")
    again = merged([found, msgspec.structs.replace(two, verdicts=[verdict("shape.first-step")])])
    assert again.environment == found.environment
    assert len(again.verdicts) == 3


ONE = part(verdict("shape.output"), verdict("shape.length"), shard="1/2")
TWO = part(verdict("shape.first-step"), shard="2/2")


def changed(**changes: Any) -> Results:
    return msgspec.structs.replace(TWO, **changes)


def elsewhere(**changes: Any) -> Results:
    return changed(environment={**TWO.environment, **changes})


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ([TWO], "merge: shard 1/2 is missing"),
        ([ONE, changed(seed=1)], "merge: seed is 0 in shard 1/2 and 1 in shard 2/2"),
        ([ONE, changed(backend="y")], "merge: backend is x in shard 1/2 and y in shard 2/2"),
        ([ONE, changed(suite="0")], f"merge: suite is {SUITE_VERSION} in shard 1/2 and 0 in shard 2/2"),
        ([ONE, changed(device="cuda")], "merge: device is cpu in shard 1/2 and cuda in shard 2/2"),
        ([ONE, changed(dtypes=["float16"])], "merge: dtypes is ['float32'] in shard 1/2 and ['float16'] in shard 2/2"),
        ([ONE, changed(effort="pr")], "merge: effort is smoke in shard 1/2 and pr in shard 2/2"),
        ([ONE, changed(shard="2/3")], "the shards 1/2, 2/3 belong to different divisions"),
        ([ONE, changed(clauses=["shape"])], "the selections of shard 1/2 and shard 2/2 differ"),
        ([ONE, elsewhere(numpy="1")], "environment.numpy is 2 in shard 1/2 and 1 in shard 2/2"),
        (
            [part(environment={"source": "a"}), part(environment={"source": "b"})],
            "environment.source is a in part 1 and b in part 2",
        ),
        (
            [ONE, elsewhere(machine={**HOST, "machine": "arm64"})],
            "merge: the kind of host is Linux x86_64 in shard 1/2 and Linux arm64 in shard 2/2",
        ),
        ([ONE, changed(claims={})], "claims.abilities is ['reset'] in shard 1/2 and None in shard 2/2"),
        ([ONE, changed(unavailable="no GPU")], "shard 2/2: no GPU"),
        (
            [part(verdict("shape.output", digest="a")), part(verdict("shape.output", digest="b"))],
            "merge: shape.output [attention-gqa] had other programs in part 1 than in part 2: judge it again",
        ),
    ],
)
def test_what_is_not_of_one_run_is_one_sentence(parts: list[Results], words: str) -> None:
    with pytest.raises(SpecError, match=re.escape(words)):
        merged(parts)


def test_merging_keeps_rows_and_stale_sentences() -> None:
    two = changed(stale=["s", "t"], seconds=2.0)
    found = merged([two, msgspec.structs.replace(ONE, stale=["s"], seconds=1.0)])
    assert [v.clause for v in found.verdicts] == ["shape.output", "shape.length", "shape.first-step"]
    assert (found.shard, found.stale, found.seconds) == ("", ["s", "t"], 3.0)
