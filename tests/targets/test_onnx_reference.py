"""``--reference``: an exported decoder is judged by the model that it was exported from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

pytest.importorskip("onnxruntime", reason="the targets run on it")
pytest.importorskip("transformers", reason="the reference is a model of it")

import onnx
from decoder_graphs import Style, decoder, saved
from exported_gemma import LOSSES, OPTIMUM, TRANSFORMERS, WIDTH, WINDOW, Gemma, saved_model
from onnx import numpy_helper

from kvconform.cli.main import app
from kvconform.errors import BackendUnavailable, BadArgument
from kvconform.explain.diagnosis import text
from kvconform.explain.diagnosis.disagreements import agrees, disagreement
from kvconform.explain.diagnosis.record import Diagnosis
from kvconform.judging.verdict import Outcome, Reason
from kvconform.results.results import Results
from kvconform.run.check import addresses
from kvconform.run.run import Plan, run_backend
from kvconform.search.effort import Effort
from kvconform.worker.client import WorkerClient, WorkerSpec

ENVIRONMENT = {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("original")
    return folder, saved_model(folder)


def exported(model: Any, folder: Path, loss: str = "", names: Any = OPTIMUM) -> Path:
    path = folder / "model.onnx"
    onnx.save(Gemma(model, loss, names).build(), path)
    return path


@contextmanager
def opened(target: Path, reference: str, **options: Any) -> Iterator[WorkerClient]:
    (address,) = addresses(str(target), options, reference)
    with WorkerClient(WorkerSpec(address, environment=ENVIRONMENT)) as client:
        yield client


def judged(target: Path, reference: str, folder: Path, *clauses: str, **options: Any) -> Results:
    (address,) = addresses(str(target), options, reference)
    plan = Plan(Effort("tiny", 4, 2, 60.0, shrink=False), clauses=clauses)
    return run_backend("model", WorkerSpec(address, environment=ENVIRONMENT), plan, folder)


def outcomes(results: Results) -> dict[str, Outcome]:
    return {v.clause: v.outcome for v in results.verdicts if v.outcome is not Outcome.UNSUPPORTED}


# --- right exports ---
@pytest.mark.slow
@pytest.mark.parametrize("names", [OPTIMUM, TRANSFORMERS], ids=["optimum", "transformers"])
def test_a_right_export_is_judged_by_its_original(names: Any, original: tuple[Path, Any], tmp_path: Path) -> None:
    folder, model = original
    path = exported(model, tmp_path, names=names)
    results = judged(path, f"hf:{folder}", tmp_path, "definition.decoder", "equivalence", "window", "shape.length")
    found = outcomes(results)
    assert {*found.values()} == {Outcome.PASS}
    assert {"definition.decoder", "equivalence.decode", "window.width", "shape.length"} <= {*found}
    assert results.target is not None
    assert results.target.reference.startswith(f"hf:{folder}")
    assert results.target.configs["decoder-self"]["window"] == WINDOW  # of the reference: programs reach beyond it


@pytest.mark.slow
def test_an_export_is_compared_in_the_dtype_that_rounds_more(original: tuple[Path, Any], tmp_path: Path) -> None:
    folder, model = original
    path = exported(model, tmp_path)
    (address,) = addresses(str(path), {}, f'hf:{folder}?{{"dtype": "bfloat16"}}')
    with WorkerClient(WorkerSpec(address, environment=ENVIRONMENT)) as client:
        (config,) = client.configs.values()
        assert config.dtype == "bfloat16"
        assert "bfloat16" in client.claims.dtypes
        assert agrees(client, config)


# --- what exports lose ---
@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
def test_what_an_export_has_lost_is_named(loss: str, original: tuple[Path, Any], tmp_path: Path) -> None:
    folder, model = original
    with opened(exported(model, tmp_path, loss), f"hf:{folder}") as client:
        (config,) = client.configs.values()
        assert not agrees(client, config)
        found = disagreement(client, config, [])
    assert found is not None
    assert found.variants == [LOSSES[loss]]
    assert found.first_token == {"window": WINDOW, "scale": 1, "soft cap": 1}.get(loss, 0)
    assert found.window == (WINDOW if loss == "window" else None)
    sentence = text.sentence(Diagnosis(disagreement=found))
    assert "this is no mistake of the cache" in sentence
    assert f"Its outputs are what the reference gives {LOSSES[loss]}" in sentence


@pytest.mark.slow
def test_an_export_that_has_lost_something_breaks_one_clause_and_its_cache_is_not_judged(
    original: tuple[Path, Any], tmp_path: Path
) -> None:
    folder, model = original
    path = exported(model, tmp_path, "window")
    results = judged(path, f"hf:{folder}", tmp_path, "definition.decoder", "equivalence", "window")
    assert [v.clause for v in results.failures] == ["definition.decoder"]
    left = [v for v in results.verdicts if v.clause.startswith(("window", "equivalence.decode"))]
    assert {v.reason for v in left} == {Reason.REFERENCE_DISAGREES}
    assert results.exit_code == 1


@pytest.mark.slow
def test_positions_that_are_shifted_after_the_prompt_are_a_mistake_of_the_cache(
    original: tuple[Path, Any], tmp_path: Path
) -> None:
    folder, model = original
    path = exported(model, tmp_path, "positions")
    results = judged(path, f"hf:{folder}", tmp_path, "definition.decoder", "equivalence.decode")
    assert {v.clause for v in results.failures} == {"definition.decoder", "equivalence.decode"}
    with opened(path, f"hf:{folder}") as client:
        (config,) = client.configs.values()
        assert agrees(client, config)


@pytest.mark.slow
def test_a_cache_of_another_dtype_is_right_if_it_is_claimed(original: tuple[Path, Any], tmp_path: Path) -> None:
    folder, model = original
    path = exported(model, tmp_path, "float16 cache")
    with opened(path, f"hf:{folder}") as client:
        (config,) = client.configs.values()
        found = disagreement(client, config, [])
    assert found is not None
    assert (found.variants, found.cache_dtype) == ([], "float16")
    assert "Its cache is float16, and its outputs are within" in text.sentence(Diagnosis(disagreement=found))
    with opened(path, f"hf:{folder}", claims={"cache_dtype": "float16"}) as client:
        (config,) = client.configs.values()
        assert config.dtype == "float32"
        assert agrees(client, config)
    with WorkerClient(WorkerSpec(f"onnx:{path}", environment=ENVIRONMENT)) as client:
        assert client.claims.cache_dtype == "float16"  # without a reference it is what the file says


# --- wrong pairs ---
@pytest.mark.slow
def test_other_weights_are_no_mistake_of_the_cache(original: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _model = original
    path = exported(saved_model(tmp_path / "another", seed=1), tmp_path)
    with opened(path, f"hf:{folder}") as client:
        (config,) = client.configs.values()
        found = disagreement(client, config, [])
    assert found is not None
    assert (found.first_token, found.variants) == (0, [])
    assert abs(found.correlation) < 0.5
    sentence = text.sentence(Diagnosis(disagreement=found))
    assert "disagrees with the reference at the first token already, without a cache" in sentence
    assert "Other weights do this" in sentence


@pytest.mark.slow
def test_a_constant_that_is_rounded_is_no_case_of_other_weights(original: tuple[Path, Any], tmp_path: Path) -> None:
    """The builder of onnxruntime-genai 0.18.0 rounds the scale of Gemma's embeddings to two decimals."""
    folder, model = original
    path = exported(model, tmp_path)
    graph = onnx.load(path)
    (scale,) = (x for x in graph.graph.initializer if numpy_helper.to_array(x).ravel()[:1] == np.float32(WIDTH**0.5))
    scale.CopyFrom(numpy_helper.from_array(np.array(round(WIDTH**0.5, 2), np.float32), scale.name))
    onnx.save(graph, path)
    with opened(path, f"hf:{folder}") as client:
        (config,) = client.configs.values()
        found = disagreement(client, config, [])
    assert found is not None
    assert (found.first_token, found.variants) == (0, [])
    assert 1e-5 < found.size < 0.05
    assert "the weights are the same, and a constant, an activation" in text.sentence(Diagnosis(disagreement=found))


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (Style(), "is not the same model: it gives 17 numbers for each token, the target 40"),
        (Style(hidden=True), "is not the same model: its profile is hidden, the target's decoder"),
    ],
    ids=["vocabulary", "states"],
)
def test_another_model_is_refused_as_the_reference(
    other: Style, words: str, original: tuple[Path, Any], tmp_path: Path
) -> None:
    reference = saved(decoder(other), tmp_path)
    with pytest.raises(BackendUnavailable) as caught, opened(exported(original[1], tmp_path), str(reference)):
        pass
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_an_onnx_file_can_be_the_reference(tmp_path: Path) -> None:
    reference = saved(decoder(Style(past="past_{n}", present="present_{n}")), tmp_path, "other.onnx")
    for mistake, same in (("", True), ("positions restart", True), ("off by one", False)):
        with opened(saved(decoder(Style(mistake=mistake)), tmp_path), str(reference)) as client:
            (config,) = client.configs.values()
            assert agrees(client, config) is same


# --- the command ---
@pytest.mark.parametrize(
    ("target", "reference", "words"),
    [
        ("{0}/decoder.onnx", "{0}/none.onnx", "reference: no file {0}/none.onnx"),
        ("{0}/decoder.onnx", "llama", "unrecognised reference 'llama'"),
        ("eager", "{0}/decoder.onnx", "reference: the installed backend 'eager' takes none"),
    ],
)
def test_a_reference_that_is_none_is_an_error_of_one_sentence(
    target: str, reference: str, words: str, tmp_path: Path
) -> None:
    saved(decoder(Style()), tmp_path)
    with pytest.raises(BadArgument) as caught:
        addresses(target.format(tmp_path), {}, reference.format(tmp_path))
    assert words.format(tmp_path) in str(caught.value)


def test_a_reference_without_weights_of_its_own_is_refused(tmp_path: Path) -> None:
    path = saved(decoder(Style()), tmp_path)
    with (
        pytest.raises(BackendUnavailable, match="the reference numpy has no weights of its own"),
        opened(path, "numpy"),
    ):
        pass


@pytest.mark.slow
def test_check_tells_what_the_reference_is_and_what_is_lost(original: tuple[Path, Any], tmp_path: Path) -> None:
    folder, model = original
    path = exported(model, tmp_path, "window")
    found = CliRunner().invoke(
        app, ["check", str(path), "--reference", f"hf:{folder}", "--out", str(tmp_path / "out")], env=ENVIRONMENT
    )
    assert found.exit_code == 1, found.output
    assert f"reference: the forward without a cache of hf:{folder}" in found.output
    assert "Its outputs are what the reference gives without its window" in found.output
    results = json.loads((tmp_path / "out" / "model.json").read_text())
    assert results["diagnoses"]["decoder-self"]["disagreement"]["window"] == WINDOW
