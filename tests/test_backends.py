"""The shipped backends are conformant, and what they witness is true."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvconform.budget import BUDGETS
from kvconform.pairwise import pairs
from kvconform.results import Results, exit_code
from kvconform.run import Plan, named_configs, run_backend
from kvconform.subject import Launch
from kvconform.verdict import Outcome

pytest.importorskip("torch", reason="the backends of the suite need torch")

EVERY, TWO = ("attention", "decoder"), ("attention-gqa", "decoder-rope")
CLEAN = {
    "numpy": (("float32",), EVERY),
    "eager": (("float32",), EVERY),
    "eager-static": (("float32",), TWO),
    "onnx": (("float32",), TWO),  # an export takes seconds a config, a compilation takes more
    "compiled": (("float32",), TWO),
}
UNCLAIMED = {"compiled": {"equivalence.full-stable"}}
"""Clauses that a backend's claims leave out: a cache-less forward would double the graphs to compile."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("backends")


def judged(name: str, dtypes: tuple[str, ...], configs: tuple[str, ...], folder: Path) -> Results:
    plan = Plan(BUDGETS["smoke"], seed=7, dtypes=dtypes, configs=configs)
    return run_backend(name, Launch(name), plan, folder)


def assert_clean(results: Results) -> None:
    left_out = UNCLAIMED.get(results.backend, set())
    bad = [v for v in results.verdicts if v.outcome is not Outcome.PASS and v.clause not in left_out]
    assert not bad, "\n".join(f"{v.clause} [{v.config}]: {v.outcome.value}: {v.sentence}" for v in bad)
    assert {v.clause for v in results.verdicts if v.outcome is Outcome.UNSUPPORTED} == left_out
    assert exit_code(results)[0] == 0, results.unavailable


@pytest.mark.parametrize("name", CLEAN)
def test_a_clean_backend_is_conformant_with_every_cell_passed(name: str, folder: Path) -> None:
    results = judged(name, *CLEAN[name], folder)
    assert_clean(results)
    for witness in results.witnesses.values():
        assert not witness.get("fallback"), witness
        if name == "compiled":
            assert 1 <= witness["graphs"] <= 4
            assert witness["graph_runs"] == witness["calls"]
        if name == "onnx":
            assert witness["providers"] == ["CPUExecutionProvider"]
            assert witness["device"] == "cpu"
            assert all((folder / "artefacts" / file).is_file() for file in witness["files"])


def test_torch_compile_that_runs_eagerly_was_not_tested(folder: Path) -> None:
    plan = Plan(BUDGETS["smoke"], clauses=("shape.output",), configs=("attention-gqa",))
    launch = Launch("compiled", environment={"TORCHDYNAMO_DISABLE": "1"})
    (verdict,) = run_backend("compiled", launch, plan, folder / "disabled").verdicts
    assert verdict.outcome is Outcome.NOT_EXERCISED
    assert verdict.sentence == "not tested: a step ran eagerly: no compiled graph was executed"


def test_without_a_compiler_the_compiled_backend_is_one_sentence(folder: Path) -> None:
    nowhere = {"PATH": str(folder / "nowhere"), "CXX": ""}
    plan = Plan(BUDGETS["smoke"], configs=("attention-gqa",))
    results = run_backend("compiled", Launch("compiled", environment=nowhere), plan, folder / "bare")
    code, sentence = exit_code(results)
    assert code == 3
    assert "needs a C++ compiler" in sentence
    assert "apt-get install g++" in sentence


@pytest.mark.parametrize(
    ("name", "dtype", "configs"),
    [("eager", "bfloat16", TWO), ("eager", "float16", TWO[1:]), ("onnx", "float16", TWO[1:])],
)
def test_a_clean_backend_is_conformant_in_sixteen_bits(
    name: str, dtype: str, configs: tuple[str, ...], folder: Path
) -> None:
    assert_clean(judged(name, (dtype,), configs, folder / dtype))


def test_backends_with_the_same_weights_agree_with_one_another(folder: Path) -> None:
    plan = Plan(BUDGETS["smoke"], clauses=("shape.output",), configs=("decoder-rope",))
    both = [run_backend(name, Launch(name), plan, folder / "pair") for name in ("numpy", "eager")]
    (pair,) = pairs(folder / "pair" / "vectors", ["numpy", "eager"], named_configs(both))
    assert (pair.one, pair.other, pair.config) == ("eager", "numpy", "decoder-rope")
    assert 0 < pair.ratio < 1
    assert pair.compared == 2 * 14 * 53  # rows, tokens, vocabulary
