"""Sets of vectors hold what the definition gives, and answers to them are judged as a backend would be."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import kvconform

from kvconform.cli.schemas import json_schema
from kvconform.errors import BadArgument
from kvconform.judging.verdict import Outcome, Reason, Verdict
from kvconform.results.results import Results
from kvconform.run.run import plan_for
from kvconform.vectors import record
from kvconform.vectors.answer import answered
from kvconform.vectors.choose import claims_of
from kvconform.vectors.features import features, left_out, unsupported
from kvconform.vectors.judge import flat, judged
from kvconform.vectors.write import write
from kvconform.worker.client import WorkerClient, WorkerSpec
from kvconform.worker.execute import feeds_of
from kvconform_specs.claims import ENOUGH
from kvconform_specs.clauses import ALL
from kvconform_specs.configs import CONFIGS
from kvconform_specs.errors import SpecError
from kvconform_specs.reference.oracle import Generation, expect
from kvconform_specs.strategies import drawn

CLAUSES = (
    "equivalence.decode",
    "equivalence.generation",
    "lifecycle.truncate",
    "batch.ragged",
    "shape.empty-append",
    "errors.malformed",
)
PLAN = plan_for("smoke", clauses=CLAUSES, configs=("attention-window", "decoder-rope"))


def answers_of(folder: Path, out: Path, backend: str = "numpy") -> Path:
    with WorkerClient(WorkerSpec(backend)) as client:
        answered(folder, client, "mine", out)
    return out


def verdicts(results: Results) -> dict[tuple[str, str], Verdict]:
    return {verdict.key: verdict for verdict in results.verdicts}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("vectors") / "set"
    write(made, PLAN)
    return made


@pytest.fixture
def answers(folder: Path, tmp_path: Path) -> Path:
    return answers_of(folder, tmp_path / "answers")


@pytest.fixture
def judge(folder: Path, answers: Path, tmp_path: Path) -> Callable[[], Results]:
    return lambda: judged(folder, answers, tmp_path / "failures")


def changed(answers: Path, name: str, change: Callable[[record.Tensors], Any]) -> None:
    """Changes the answers to one vector."""
    path = record.file_of(answers, name)
    tensors = {key: x.copy() for key, x in record.unpacked(path).items()}
    change(tensors)
    path.write_bytes(record.packed(tensors))


def told(answers: Path, **fields: Any) -> None:
    """Changes what the runner says."""
    path = answers / record.ANSWERS
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


DECODE = "attention-window/equivalence.decode-0"


# --- what a set holds ---
@pytest.mark.slow
def test_equal_options_give_equal_bytes(folder: Path, tmp_path: Path) -> None:
    write(tmp_path / "again", PLAN)
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert len(files) > len(CLAUSES)
    assert [f for f in files if (folder / f).read_bytes() != (tmp_path / "again" / f).read_bytes()] == []


def test_another_seed_gives_another_set(folder: Path, tmp_path: Path) -> None:
    plan = plan_for("smoke", 1, clauses=("equivalence.decode",), configs=("attention-window",))
    assert write(tmp_path / "other", plan).digest != record.read(folder).digest


def test_a_set_holds_the_inputs_of_a_worker_and_the_numbers_of_the_definition(folder: Path) -> None:
    manifest = record.read(folder)
    steps = 0
    for vector in manifest.vectors:
        tensors = record.unpacked(record.file_of(folder, vector.name), vector.sha256)
        for program, written in zip(record.case_of(manifest, vector).programs, vector.programs, strict=True):
            for (inputs, _), want, step in zip(feeds_of(program, (0,)), expect(program, (0,)), written, strict=True):
                if not step.call.get("wrong"):
                    given = [
                        tensors[n] for role, n in step.tensors.items() if role not in ("expected", "bound", "mask")
                    ]
                    assert [x.tolist() for x in given] == [x[0].tolist() for x in inputs]
                if want is not None and not isinstance(want, Generation):
                    value, bound = (flat(program.config, tensors[step.tensors[n]]) for n in ("expected", "bound"))
                    np.testing.assert_array_equal(value, np.where(want.real[..., None], want.value[0], np.nan))
                    exact = np.broadcast_to(want.bound[0], bound.shape)[want.real]
                    assert np.all(bound[want.real] >= exact)
                    assert np.all(bound[want.real] <= exact * (1 + 2.0**-22))
                    steps += 1
    assert steps > 50


def test_a_manifest_fits_its_schema(folder: Path, answers: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    for kind, path in (("vectors", folder / record.MANIFEST), ("answers", answers / record.ANSWERS)):
        jsonschema.validate(json.loads(path.read_text()), json_schema(kind))


def test_a_manifest_names_only_files_that_exist_and_features_that_it_explains(folder: Path) -> None:
    manifest = record.read(folder)
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*.safetensors")}
    weights = {one.weights for one in manifest.configs.values() if one.weights}
    assert files == weights | {f"{vector.name}.safetensors" for vector in manifest.vectors}
    assert {need for vector in manifest.vectors for need in vector.needs} <= manifest.features.keys()
    assert {clause.name for clause in ALL} == manifest.clauses.keys() | manifest.left_out.keys()


@pytest.mark.parametrize("clause", [clause for clause in ALL if not left_out(clause)], ids=lambda clause: clause.name)
def test_each_clause_has_cases_that_need_no_more_than_it_does(clause: Any) -> None:
    """So that an implementation that can do little is judged by all clauses that concern it."""
    config = next(config for config in CONFIGS.values() if clause.concerns(config))
    for claims in claims_of(clause):
        programs = [p for case in drawn(clause.strategy(config, claims), 5) for p in case.programs]
        assert set().union(*map(features, programs)).isdisjoint(unsupported(claims))
    least = next(claims_of(clause))
    enough = {name for need in clause.needs for name in ENOUGH.get(need, {}).get("abilities", ())}
    assert set(least.abilities) <= {*clause.needs, *clause.needs_any, *enough}


def test_a_set_is_written_to_a_new_folder(folder: Path) -> None:
    with pytest.raises(BadArgument, match="exists and is not empty"):
        write(folder, PLAN)


def test_a_selection_without_vectors_says_why(tmp_path: Path) -> None:
    plan = plan_for("smoke", clauses=("accounting.bytes",))
    with pytest.raises(BadArgument, match=r"accounting\.bytes: it is about the cache, memory or reported numbers"):
        write(tmp_path / "none", plan)


# --- right and wrong runners ---
def test_a_right_runner_passes_every_cell_that_it_supports(judge: Callable[[], Results]) -> None:
    results = judge()
    assert (results.exit_code, results.backend) == (0, "mine")
    outcomes = {key: verdict.outcome for key, verdict in verdicts(results).items()}
    assert outcomes[("batch.ragged", "decoder-rope")] is Outcome.UNSUPPORTED  # the backend claims no ragged rows
    assert {o for key, o in outcomes.items() if key[0] != "batch.ragged"} == {Outcome.PASS}
    assert ("equivalence.generation", "decoder-rope") in outcomes


def test_a_wrong_runner_fails_with_a_sentence_and_a_counterexample(folder: Path, tmp_path: Path) -> None:
    wrong = answers_of(folder, tmp_path / "wrong", "kvconform_backends.faults.causality:DecodeSeesOneLess")
    results = judged(folder, wrong, tmp_path / "failures")
    verdict = verdicts(results)["equivalence.decode", "attention-window"]
    assert (results.exit_code, verdict.outcome) == (1, Outcome.FAIL)
    assert "of the program it must agree with" in verdict.sentence
    assert (tmp_path / "failures" / "mine" / verdict.counterexample).exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: x.update({"1.1": x["1.1"] + 1}), "of the program it must agree with"),
        (lambda x: x.update({"1.1": np.full_like(x["1.1"], np.nan)}), "got nan"),
        (lambda x: x.pop("1.1"), "raised NoAnswer: the answers hold no tensor '1.1'"),
        (lambda x: x.update({"1.1": x["1.1"][:, :1]}), "the shape"),
        (lambda x: x.update({"1.1": x["1.1"].astype(np.float64)}), "the dtype float64, want float32"),
    ],
)
def test_a_wrong_or_missing_tensor_is_a_failure(
    answers: Path, judge: Callable[[], Results], change: Callable[[record.Tensors], Any], words: str
) -> None:
    name = next(
        name
        for name in (f"attention-window/equivalence.decode-{i}" for i in range(4))
        if "1.1" in record.unpacked(record.file_of(answers, name))
    )
    changed(answers, name, change)
    verdict = verdicts(judge())["equivalence.decode", "attention-window"]
    assert verdict.outcome is Outcome.FAIL
    assert words in verdict.sentence


def test_a_call_that_was_not_refused_is_a_failure(answers: Path, judge: Callable[[], Results]) -> None:
    def accept(tensors: record.Tensors) -> None:
        tensors |= {name: x * 0 for name, x in tensors.items() if x.dtype == np.uint8}

    changed(answers, "attention-window/errors.malformed-0", accept)
    verdict = verdicts(judge())["errors.malformed", "attention-window"]
    assert "was accepted, but must be refused" in verdict.sentence


def test_a_failed_step_is_a_failure(answers: Path, judge: Callable[[], Results]) -> None:
    told(answers, failures={DECODE: {"program": 0, "step": 0, "message": "no memory"}})
    verdict = verdicts(judge())["equivalence.decode", "attention-window"]
    assert (verdict.outcome, verdict.raised) == (Outcome.FAIL, True)
    assert "no memory" in verdict.sentence


# --- what was skipped is no pass ---
def test_what_was_skipped_is_unsupported(answers: Path, judge: Callable[[], Results]) -> None:
    for path in answers.glob("*/lifecycle.truncate*"):
        path.unlink()
    told(answers, unsupported=record.read_answers(answers).unsupported | {"truncate": "not there"})
    verdict = verdicts(judge())["lifecycle.truncate", "attention-window"]
    assert (verdict.outcome, verdict.reason) == (Outcome.UNSUPPORTED, Reason.ABILITY)
    assert "truncate: not there" in verdict.sentence


def test_unsupported_claims_are_the_runner_s_and_a_gate_sees_them(answers: Path, judge: Callable[[], Results]) -> None:
    assert "truncate" in judge().claims["abilities"]
    told(answers, unsupported=record.read_answers(answers).unsupported | {"truncate": "not there"})
    assert "truncate" not in judge().claims["abilities"]


def test_an_answer_that_is_missing_is_no_pass(answers: Path, judge: Callable[[], Results]) -> None:
    record.file_of(answers, DECODE).unlink()
    results = judge()
    verdict = verdicts(results)["equivalence.decode", "attention-window"]
    assert (verdict.outcome, results.exit_code) == (Outcome.NOT_EXERCISED, 5)
    assert verdict.sentence == f"no answer to vector {DECODE}, which needs nothing that is unsupported"


def test_answers_that_skip_everything_conclude_nothing(folder: Path, tmp_path: Path) -> None:
    skipped = {"attention": "no", "decoder": "no"}
    told_all = record.Answers(runner="lazy", digest=record.read(folder).digest, unsupported=skipped)
    told_all.write(tmp_path)
    assert judged(folder, tmp_path, tmp_path / "failures").exit_code == 5


# --- malformed answers ---
@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda a: told(a, digest="another"), "answers another set: got 'another', want"),
        (lambda a: told(a, unsupported={"trunkate": "?"}), "unknown feature, config or profile 'trunkate'; known: "),
        (lambda a: told(a, runner="../x"), "want a name that can be a file's"),
        (lambda a: told(a, failures={"x": {"program": 0, "step": 0, "message": ""}}), "the set has no vector 'x'"),
        (lambda a: told(a, schema="kvconform-answers/0"), "unknown schema"),
        (lambda a: (a / record.ANSWERS).unlink(), "cannot be read"),
        (lambda a: record.file_of(a, DECODE).write_bytes(b"123"), "is no safetensors file"),
        (lambda a: record.file_of(a, "x").write_bytes(b"123"), "is an answer to no vector of the set"),
    ],
)
def test_malformed_answers_are_one_sentence(
    answers: Path, judge: Callable[[], Results], spoil: Callable[[Path], Any], words: str
) -> None:
    spoil(answers)
    with pytest.raises(SpecError, match=words.replace("?", r"\?")):
        judge()


def test_a_changed_set_is_refused(folder: Path, answers: Path, tmp_path: Path) -> None:
    copied = tmp_path / "set"
    for path in folder.rglob("*"):
        if path.is_file():
            (copied / path.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
            (copied / path.relative_to(folder)).write_bytes(path.read_bytes())
    file = record.file_of(copied, DECODE)
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    with pytest.raises(SpecError, match="its digest differs"):
        judged(copied, answers, tmp_path / "failures")


def test_a_backend_whose_numbers_a_set_does_not_hold_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BadArgument, match="the set is for caches in the config's dtype; this one keeps 8 bits"):
        answers_of(folder, tmp_path / "int8", "numpy-int8")


# --- the command line ---
@pytest.mark.slow
def test_the_commands_write_answer_and_judge(tmp_path: Path) -> None:
    chosen = ("--clause", "lifecycle.reset", "--config", "attention-gqa")
    assert kvconform("vectors", "write", "set", *chosen, folder=tmp_path).returncode == 0
    assert kvconform("vectors", "answer", "set", "given", "-b", "numpy", folder=tmp_path).returncode == 0
    done = kvconform("vectors", "judge", "set", "given", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "numpy: the selected part passed: 1 cell" in done.stdout
    assert kvconform("report", "results/numpy.json", "-o", "report.html", folder=tmp_path).returncode == 0
    assert kvconform("gate", "results/numpy.json", "--baseline", "results", folder=tmp_path).returncode == 0
    (tmp_path / "given" / "answers.json").unlink()
    done = kvconform("vectors", "judge", "set", "given", folder=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
