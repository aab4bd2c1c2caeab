"""The second reference of an engine: the model that it serves, without an engine."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import kvconform_here

from kvconform.errors import BackendUnavailable, WorkerDied
from kvconform.judging.verdict import Outcome, Reason, Verdict
from kvconform.results import results as records
from kvconform.search.effort import EFFORTS
from kvconform.serving.engine import Description, Engine
from kvconform.serving.model import Model, Rows
from kvconform.serving.noise import calibrate
from kvconform.serving.registry import addressed, referenced
from kvconform.serving.run import run_engine
from kvconform.serving.session import Limits, Session
from kvconform.serving.verdict import Trial
from kvconform_backends.servers.toy import VOCABULARY, ToyEngine
from kvconform_backends.servers.toy_forward import ADDRESS, ToyForward
from kvconform_specs.serving.clauses import BY_NAME
from kvconform_specs.serving.requests import Request

CLAUSE = BY_NAME["serving.model"]
SMOKE = replace(EFFORTS["smoke"], shrink=False)


class InBfloat16(ToyEngine):
    """Says that it computes in bfloat16, where one wrong token moves too little."""

    def describe(self) -> Description:
        return replace(super().describe(), dtype="bfloat16")


class Untold(ToyEngine):
    def describe(self) -> Description:
        return replace(super().describe(), dtype=None)


def verdict(engine: Engine, folder: Path, model: str = ADDRESS) -> Verdict:
    with closing(Session(engine, Limits(), 0, model)) as session:
        return Trial(session, calibrate(session), "toy", folder, SMOKE, 0, []).judge(CLAUSE)


def test_the_model_gives_what_the_engine_answers_within_its_bound() -> None:
    engine = ToyEngine()
    prompt = tuple((7 * i + 3) % VOCABULARY for i in range(30))
    (answer,) = engine.answer([Request(prompt, 4)])
    with closing(Model(ADDRESS, engine.describe(), 32)) as model:
        rows = model.rows(prompt + answer.completions[0].ids[:-1], len(prompt) - 1)
    assert rows.value.shape == (4, VOCABULARY)
    assert np.allclose(np.exp(rows.value).sum(axis=-1), 1)
    for row, right, bound in zip(answer.completions[0].logprobs, rows.value, rows.bound, strict=True):
        assert max(abs(value - right[token]) for token, value in row.items()) < bound / 3
    assert model.power.effect > 1000 * model.power.bound


def test_a_clean_engine_passes_and_what_was_compared_is_counted(tmp_path: Path) -> None:
    found = verdict(ToyEngine(), tmp_path)
    assert found.outcome is Outcome.PASS, found.sentence
    assert found.compared > 500
    assert found.worst is not None
    assert found.worst < 0.5, "the bound is 2 sqrt(2) 32 standard deviations: half of it would be 45 of them"


def test_without_a_model_the_clause_is_unsupported_and_says_what_to_give(tmp_path: Path) -> None:
    found = verdict(ToyEngine(), tmp_path, "")
    assert (found.outcome, found.reason) == (Outcome.UNSUPPORTED, Reason.ABILITY)
    assert "--model DIRECTORY" in found.sentence


@pytest.mark.parametrize("engine", [InBfloat16, Untold])
def test_where_the_bound_exceeds_the_effect_of_a_token_there_is_no_verdict(
    engine: type[Engine], tmp_path: Path
) -> None:
    """A dtype that is not told counts as the coarsest."""
    found = verdict(engine(), tmp_path)
    assert (found.outcome, found.reason) == (Outcome.INCONCLUSIVE, Reason.BLIND)
    assert "of 8 changed tokens move them by more than 3 times that: what helps: float32" in found.sentence


@pytest.mark.parametrize(
    ("address", "facts", "words"),
    [
        (ADDRESS, {"vocabulary": 4096}, "is not the one that is served: it has 48 tokens, the engine 4096"),
        ("numpy", {}, "is no decoder with weights of its own"),
        ("hf:nowhere", {}, "neither a local directory with a config.json nor"),
    ],
)
def test_a_model_that_cannot_be_the_one_served_is_refused(address: str, facts: dict[str, int], words: str) -> None:
    with pytest.raises(BackendUnavailable, match=words):
        Model(address, replace(ToyEngine().describe(), **facts), 32)  # type: ignore[arg-type]


def test_a_model_that_nothing_is_compared_with_is_not_opened(tmp_path: Path) -> None:
    words = ("run", "-b", "toy-engine", "--effort", "smoke", "--clause", "serving.rescore", "--model", "hf:nowhere")
    assert kvconform_here(*words, folder=tmp_path).returncode == 0
    asked = kvconform_here(*words[:-3], "serving.model", *words[-2:], folder=tmp_path)
    assert asked.returncode == 3
    assert "neither a local directory with a config.json nor" in asked.stdout


def test_a_model_that_is_neither_directory_nor_address_is_one_sentence(tmp_path: Path) -> None:
    done = kvconform_here("run", "-b", "toy-engine", "--model", "no/such", folder=tmp_path)
    assert done.returncode == 2
    assert "--model: no directory no/such; want one of transformers, or the address of a target" in done.stderr


def test_a_model_that_dies_is_no_verdict_on_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rows(self: Model, ids: tuple[int, ...], start: int) -> Rows:
        raise WorkerDied("reference")

    opened = Model.__init__

    def opened_and_dead(self: Model, *given: Any) -> None:
        opened(self, *given)
        monkeypatch.setattr(Model, "rows", rows)

    monkeypatch.setattr(Model, "__init__", opened_and_dead)
    clauses = ("serving.model", "serving.rescore")
    found = run_engine("toy", addressed("toy-engine", {"reference": ADDRESS}), SMOKE, 0, tmp_path, Limits(), clauses)
    outcomes = {one.clause: (one.outcome, one.reason) for one in found.verdicts}
    assert outcomes["serving.model"] == (Outcome.INCONCLUSIVE, Reason.NO_REFERENCE)
    assert outcomes["serving.rescore"] == (Outcome.PASS, None)


def test_the_reference_is_part_of_the_address_and_not_an_option_of_the_engine() -> None:
    address = addressed("http://localhost:1/v1", {"dtype": "float32", "reference": "hf:models/tiny"})
    assert referenced(address) == ('http://localhost:1/v1?{"dtype": "float32"}', "hf:models/tiny")
    assert referenced("toy-engine") == ("toy-engine", "")
    of_engine = addressed('vllm?{"dtype": "bfloat16"}', {"reference": "hf:models/tiny"})
    assert referenced(of_engine) == ('vllm?{"dtype": "bfloat16"}', "hf:models/tiny")


def test_results_name_the_reference_and_its_bound_and_a_failure_is_replayed(tmp_path: Path) -> None:
    address = "engine:kvconform_backends.servers.toy_faults:WindowInvented"
    words = ("--model", ADDRESS, "--clause", "serving.model", "--effort", "smoke", "--out", str(tmp_path))
    done = kvconform_here("run", "-b", address, *words, folder=tmp_path)
    assert done.returncode == 1
    printed = done.stdout
    assert f"references: its own answers without the prefix cache; {ADDRESS}, where a difference above" in printed
    assert "by the model without an engine" in printed
    found = records.read(tmp_path / "WindowInvented.json")
    assert found.served is not None
    assert found.served.reference == ADDRESS
    assert found.served.reference_bound is not None
    assert found.served.reference_effect is not None
    assert found.served.reference_bound < found.served.reference_effect
    (file,) = map(str, tmp_path.glob("failures/WindowInvented/serving.model-*.json"))
    again = kvconform_here("replay", file, "--script", "bug.py", folder=tmp_path)
    assert again.returncode == 1
    assert "by the model without an engine" in again.stdout
    assert f"none: a script compares with a directory of transformers, not with {ADDRESS}" in again.stdout
    assert kvconform_here("replay", file, "-b", "toy-engine", folder=tmp_path).returncode == 0


def test_the_forward_of_the_toy_engine_is_a_backend_that_conforms() -> None:
    from kvconform import conformance

    found = conformance(ToyForward, effort="smoke", clauses=["equivalence.decode", "equivalence.full-stable"])
    assert {one.outcome for one in found.verdicts} == {Outcome.PASS}
