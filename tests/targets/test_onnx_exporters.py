"""Files and folders as exporters write them are recognised, right ones are conformant and wrong ones are not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime", reason="targets of ONNX run on it")

import onnx
from decoder_graphs import HEAD_DIM, HEADS, LAYERS, Style, decoder, merged, saved
from genai_decoders import HEAD_DIM as GENAI_HEAD_DIM
from genai_decoders import genai_folder
from onnx import ModelProto, TensorProto, helper

from kvconform.errors import BackendUnavailable
from kvconform.judging.verdict import Outcome
from kvconform.results.results import Results
from kvconform.run.check import addresses
from kvconform.run.run import Plan, run_backend
from kvconform.search.effort import Effort
from kvconform.worker.client import WorkerSpec
from kvconform.worker.registry import load
from kvconform_specs.program import Append, Program

WINDOW = 5
TRANSFORMERS = Style(
    past="input.past_key_values.layers.{n}.{part}s", present="output.past_key_values.layers.{n}.{part}s"
)


def judged(target: Path, folder: Path, *clauses: str) -> Results:
    (address,) = addresses(str(target), {})
    plan = Plan(Effort("tiny", 3, 2, 60.0, shrink=False), clauses=clauses)
    results = run_backend("decoder", WorkerSpec(address, environment={"OMP_NUM_THREADS": "1"}), plan, folder / "out")
    assert not results.unavailable
    return results


def outcomes(results: Results) -> dict[str, Outcome]:
    return {v.clause: v.outcome for v in results.verdicts if v.outcome is not Outcome.UNSUPPORTED}


def renamed_axes(model: ModelProto) -> ModelProto:
    """Fixed sizes of the past as names, such as ``"6"``, as transformers' exporter declares them."""
    for value in model.graph.input:
        for axis in value.type.tensor_type.shape.dim:
            if axis.HasField("dim_value"):
                axis.dim_param = str(axis.dim_value)
    return model


def windowed(model: ModelProto, tensors: int = LAYERS) -> ModelProto:
    """With a window's size as an input of each layer, which comes back as it is."""
    for n in range(tensors):
        names = [f"{end}.past_key_values.layers.{n}._sliding_window_tensor" for end in ("input", "output")]
        model.graph.node.append(helper.make_node("Identity", names[:1], names[1:]))
        for name, values in zip(names, (model.graph.input, model.graph.output), strict=True):
            values.append(helper.make_tensor_value_info(name, TensorProto.INT64, []))
    return model


# --- ONNX Runtime GenAI's builder ---
@pytest.mark.slow
@pytest.mark.parametrize("window", [0, WINDOW])
def test_a_folder_of_genais_builder_is_conformant(window: int, tmp_path: Path) -> None:
    folder = genai_folder(tmp_path / "genai", window)
    results = judged(folder, tmp_path, "equivalence", "shape.length", "batch.row-solo", "lifecycle.reset", "window")
    found = outcomes(results)
    assert {*found.values()} == {Outcome.PASS}
    assert {"equivalence.decode", "equivalence.chunks", "shape.length", "batch.row-solo"} <= {*found}
    assert ("window.width" in found) == bool(window)


@pytest.mark.slow
def test_a_graph_of_genais_builder_that_sees_a_token_too_few_is_convicted(tmp_path: Path) -> None:
    folder = genai_folder(tmp_path / "genai", fewer=1)
    assert outcomes(judged(folder, tmp_path, "equivalence.decode"))["equivalence.decode"] is Outcome.FAIL


def test_what_genais_graph_does_not_tell_is_read_from_its_configuration(tmp_path: Path) -> None:
    target = load(f"onnx:{genai_folder(tmp_path / 'genai', WINDOW)}")
    config = target.configs["decoder-self"]
    assert (config.head_dim, config.window, config.window_every) == (GENAI_HEAD_DIM, WINDOW, 2)
    assert target.assumed == (
        "the head dim is 16, from genai_config.json",
        "attention_mask is 1 for all cached and new tokens",
        "with a past, several rows take their tokens one by one: GroupQueryAttention refuses more",
        "a past of 5 tokens is a ring, which begins with zeros",
    )
    (tmp_path / "genai" / "genai_config.json").unlink()
    with pytest.raises(BackendUnavailable, match=r"the size of kv_cache_dim, an axis of .*; give it by option head_d"):
        load(f"onnx:{tmp_path / 'genai'}")
    given = load(f'onnx:{tmp_path / "genai"}?{{"head_dim": 16}}')
    assert given.assumed[0] == "the head dim is 16, from an option"


def test_a_script_of_several_rows_takes_their_tokens_one_by_one(tmp_path: Path) -> None:
    target = load(f"onnx:{genai_folder(tmp_path / 'genai', WINDOW)}")
    config = target.configs["decoder-self"]
    backend = target(config, {})
    program = Program(config, (Append("a", (2, 2), 0), Append("a", (3, 3), 0)))
    x0, x1 = np.arange(4).reshape(2, 2), np.arange(4, 10).reshape(2, 3)
    names: dict[str, Any] = {"np": np, "x0": x0, "x1": x1}
    exec(backend.script_setup() + backend.script(program, ""), names)  # it is ours
    want, cache = backend.step(backend.start(2), x0)
    assert np.array_equal(names["y0"], want)
    assert np.array_equal(names["y1"], backend.step(cache, x1)[0])


# --- transformers' exporter ---
@pytest.mark.slow
@pytest.mark.parametrize("mistake", ["", "positions restart"])
def test_a_file_of_transformers_exporter_is_recognised(mistake: str, tmp_path: Path) -> None:
    style = Style(past=TRANSFORMERS.past, present=TRANSFORMERS.present, mask=True, mistake=mistake)
    saved(windowed(renamed_axes(decoder(style))), tmp_path, "model.onnx")
    (tmp_path / "config.json").write_text(json.dumps({"sliding_window": WINDOW}))
    components = {"model": {"file": "model.onnx"}}
    (tmp_path / "export.json").write_text(json.dumps({"export_format": "onnx", "components": components}))
    results = judged(tmp_path, tmp_path, "equivalence.decode", "equivalence.chunks", "shape.length")
    want = Outcome.FAIL if mistake else Outcome.PASS
    assert outcomes(results) == {"equivalence.decode": want, "equivalence.chunks": want, "shape.length": Outcome.PASS}
    assert results.target is not None
    assert results.target.assumed[0] == (
        "input.past_key_values.layers.0._sliding_window_tensor and its like are 5, from config.json"
    )
    config = results.target.configs["decoder-self"]
    assert (config["kv_heads"], config["head_dim"], config["window"]) == (HEADS, HEAD_DIM, WINDOW)


def test_a_window_that_is_an_input_must_be_known(tmp_path: Path) -> None:
    path = saved(windowed(decoder(TRANSFORMERS), 1), tmp_path)
    with pytest.raises(BackendUnavailable, match="_sliding_window_tensor is not known; give it by option window"):
        load(f"onnx:{path}")
    config = load(f'onnx:{path}?{{"window": 7}}').configs["decoder-self"]
    assert (config.window, config.window_every) == (7, 2)  # of one layer of two


def test_names_of_layers_without_the_argument_are_recognised(tmp_path: Path) -> None:
    style = Style(past="input.cache.layers.{n}.{part}s", present="output.cache.layers.{n}.{part}s")
    target = load(f"onnx:{saved(decoder(style), tmp_path)}")
    assert target.cached.signature.present(((1,), "value")) == "output.cache.layers.1.values"


# --- folders ---
def test_a_folder_is_its_decoder(tmp_path: Path) -> None:
    inner = tmp_path / "onnx"
    inner.mkdir()
    saved(decoder(Style(cached=False)), inner, "decoder_model.onnx")
    saved(decoder(Style(needs_past=True)), inner, "decoder_with_past_model.onnx")
    assert load(f"onnx:{tmp_path}").graphs.first.path.name == "decoder_model.onnx"
    saved(merged(Style(mask=True)), inner, "decoder_model_merged.onnx")
    assert load(f"onnx:{tmp_path}").cached.path.name == "decoder_model_merged.onnx"


def test_a_folder_without_a_known_decoder_is_an_error_of_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(BackendUnavailable, match="it is not known which file is the decoder; name it; files: none"):
        load(f"onnx:{tmp_path}")
    for name in ("one.onnx", "two.onnx"):
        saved(decoder(Style()), tmp_path, name)
    with pytest.raises(BackendUnavailable, match=r"name it; files: one\.onnx, two\.onnx; known names: decoder_model_"):
        load(f"onnx:{tmp_path}")


def test_a_directory_of_transformers_is_no_folder_with_a_decoder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BackendUnavailable, match="holds no ONNX file; a directory of transformers is hf:"):
        load(f"onnx:{tmp_path}")


def test_a_cache_in_float16_beside_weights_in_float32_is_claimed(tmp_path: Path) -> None:
    model = decoder(Style())
    for value in (*model.graph.input, *model.graph.output):
        if "past" in value.name or "present" in value.name:
            value.type.tensor_type.elem_type = TensorProto.FLOAT16
    for node in model.graph.node:
        node.input[:] = [f"{name}_wide" if name.startswith("past") else name for name in node.input]
    pasts = [value.name for value in model.graph.input if value.name.startswith("past")]
    casts = [helper.make_node("Cast", [name], [f"{name}_wide"], to=TensorProto.FLOAT) for name in pasts]
    ends = [node for node in model.graph.node if node.output[0].startswith("present")]
    for node in ends:
        node.CopyFrom(helper.make_node("Cast", [*node.input], [*node.output], to=TensorProto.FLOAT16))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.checker.check_model(model)
    target = load(f"onnx:{saved(model, tmp_path)}")
    assert (target.claims.cache_dtype, target.configs["decoder-self"].dtype) == ("float16", "float32")
    assert "its cache is in float16, and the rest is not; errors of that size are allowed" in target.assumed
