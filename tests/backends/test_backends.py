"""The shipped backends are conformant, and their runtime_info is correct."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvconform.judging.verdict import Outcome
from kvconform.results.results import Results
from kvconform.run.cross_backend import pairs
from kvconform.run.run import Plan, named_configs, run_backend
from kvconform.search.effort import EFFORTS, Effort
from kvconform.worker.client import WorkerSpec
from kvconform_specs.clause import Level
from kvconform_specs.clauses import ALL, BY_NAME, CHAPTERS

torch = pytest.importorskip("torch", reason="the backends of the suite need torch")

BRIEF = Effort("brief", structures=6, variants=3, seconds=60.0)
"""Less than any effort that a run is offered: every cell is tried here, and the CI's own runs try harder."""
TWO = ("attention-gqa", "decoder-rope")
CLEAN = {
    # the main job of CI tries eager, compiled and onnx on every config
    "eager": (*TWO, "attention-odd", "decoder-longrope", "decoder-shared"),
    "eager-static": TWO,
    "onnx-shared": TWO,
    "onnx": TWO,  # an export takes seconds a config, a compilation takes more
    "compiled": ("attention-gqa", "decoder-softcap"),
    "numpy": (*TWO, "attention-odd", "decoder-longrope", "decoder-latent"),  # the base of all faults
}
RAGGED = "ragged, ragged at any time, left padding"
LACKS = {
    "eager": f"empty append, {RAGGED}, poison, poison-safe slots, in_place, bound on graphs",
    "eager-static": "contexts, empty append, immutable, poison-safe slots, in_place, bound on graphs",
    "onnx": f"contexts, empty append, generate, {RAGGED}, macs, poison, poison-safe slots, in_place, bound on graphs",
    "onnx-shared": f"contexts, empty append, generate, immutable, {RAGGED}, mask, bytes, macs, in_place, "
    "bound on graphs",
    "compiled": f"contexts, empty append, uncached_forward, immutable, {RAGGED}, mask, macs, "
    "poison-safe slots, in_place",
    "numpy": f"{RAGGED}, poison, poison-safe slots, in_place, bound on graphs",
}
NOBODY = {"pages", "quantised cache", "residual window", "multiples of scales", "limited rollback", "truncate_rows"}
"""What a backend does not claim, out of what clauses need; none of them claims what NOBODY lists."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("backends")


def judged(name: str, dtypes: tuple[str, ...], configs: tuple[str, ...], folder: Path) -> Results:
    # a refuted guarantee is confirmed by a new process, which compiles all over again
    chapters = tuple(chapter for chapter in CHAPTERS if name != "compiled" or chapter != "determinism")
    return run_backend(name, WorkerSpec(name), Plan(BRIEF, 7, dtypes, chapters, configs), folder)


def assert_clean(results: Results) -> None:
    """Every cell passed but those that its claims leave out; a guarantee that is only measured may be refuted."""
    lacks = {*LACKS[results.backend].split(", "), *NOBODY}
    left_out = {clause.name for clause in ALL if lacks & {*clause.needs}}
    bad = [
        v
        for v in results.verdicts
        if v.outcome is not (Outcome.UNSUPPORTED if v.clause in left_out else Outcome.PASS)
        and not (v.outcome is Outcome.REFUTED and BY_NAME[v.clause].level is Level.SHOULD)
    ]
    assert not bad, "\n".join(f"{v.clause} [{v.config}]: {v.outcome.value}: {v.sentence}" for v in bad)
    assert results.ok, results.summary


@pytest.mark.slow
@pytest.mark.parametrize("name", CLEAN)
def test_a_clean_backend_is_conformant_with_every_cell_passed(name: str, folder: Path) -> None:
    results = judged(name, ("float32",), CLEAN[name], folder)
    assert_clean(results)
    for runtime_info in results.runtime_info.values():
        assert not runtime_info.get("fallback"), runtime_info
        if name == "compiled":
            assert 1 <= runtime_info["graphs"] <= 6
            assert runtime_info["graph_runs"] == runtime_info["calls"]
        if name.startswith("onnx"):
            assert runtime_info["providers"] == ["CPUExecutionProvider"]
            assert runtime_info["device"] == "cpu"
            assert all((folder / "artefacts" / file).is_file() for file in runtime_info["files"])


@pytest.mark.slow
def test_a_clean_backend_is_conformant_on_one_config(folder: Path) -> None:
    """The fast lane's part of the test above."""
    assert_clean(judged("eager", ("float32",), ("attention-gqa",), folder / "one"))


@pytest.mark.slow
def test_the_loops_over_large_matrices_are_conformant(folder: Path) -> None:
    looped = folder / "looped.py"
    looped.write_text(
        "from kvconform_backends.torch.compiled import Compiled, Looped\n"
        "class Always(Looped):\n    large = 0\n"
        "class Loops(Compiled):\n    family = Always\n"
        "    def runtime_info(self): return {**super().runtime_info(), 'looped': self.decoder.looped}\n"
    )
    clauses = ("equivalence.decode", "equivalence.last-position")
    plan = Plan(BRIEF, clauses=clauses, configs=("decoder-rope",))
    results = run_backend(f"{looped}:Loops", WorkerSpec(f"{looped}:Loops"), plan, folder / "looped")
    assert [verdict.outcome for verdict in results.verdicts] == [Outcome.PASS] * 2
    assert {runtime_info["looped"] for runtime_info in results.runtime_info.values()} == {True}


@pytest.mark.slow
def test_torch_compile_that_runs_eagerly_was_not_tested(folder: Path) -> None:
    plan = Plan(EFFORTS["smoke"], clauses=("shape.output",), configs=("attention-gqa",))
    spec = WorkerSpec("compiled", environment={"TORCHDYNAMO_DISABLE": "1"})
    (verdict,) = run_backend("compiled", spec, plan, folder / "disabled").verdicts
    assert verdict.outcome is Outcome.NOT_EXERCISED
    assert verdict.sentence == "not tested: a step ran eagerly: no compiled graph was executed"


@pytest.mark.slow
def test_without_a_compiler_the_compiled_backend_is_one_sentence(folder: Path) -> None:
    nowhere = {"PATH": str(folder / "nowhere"), "CXX": ""}
    plan = Plan(EFFORTS["smoke"], configs=("attention-gqa",))
    results = run_backend("compiled", WorkerSpec("compiled", environment=nowhere), plan, folder / "bare")
    code, sentence = results.exit_code, results.summary
    assert code == 3
    assert "needs a C++ compiler" in sentence
    assert "apt-get install g++" in sentence


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype", "configs"),
    [
        ("eager", "bfloat16", TWO),
        ("eager", "float16", TWO[1:]),
        ("onnx", "float16", TWO[1:]),
        ("onnx-shared", "float16", TWO),
    ],
)
def test_a_clean_backend_is_conformant_in_sixteen_bits(
    name: str, dtype: str, configs: tuple[str, ...], folder: Path
) -> None:
    assert_clean(judged(name, (dtype,), configs, folder / dtype))


@pytest.mark.slow
def test_backends_with_the_same_weights_agree_with_one_another(folder: Path) -> None:
    plan = Plan(EFFORTS["smoke"], clauses=("shape.output",), configs=("decoder-rope",))
    both = [run_backend(name, WorkerSpec(name), plan, folder / "pair") for name in ("numpy", "eager")]
    (pair,) = pairs(folder / "pair" / "vectors", ["numpy", "eager"], named_configs(both))
    assert (pair.one, pair.other, pair.config) == ("eager", "numpy", "decoder-rope")
    assert 0 < pair.ratio < 1
    assert pair.compared == 2 * 14 * 53  # rows, tokens, vocabulary


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_a_clean_backend_is_conformant_on_a_gpu_and_reports_it(folder: Path) -> None:
    plan = Plan(BRIEF, configs=TWO)
    results = run_backend("eager-static", WorkerSpec("eager-static", device="cuda"), plan, folder / "cuda")
    assert_clean(results)
    assert all(str(runtime_info["device"]).startswith("cuda") for runtime_info in results.runtime_info.values())
