"""Targets ``onnx:``: every naming convention is recognised and judged; other graphs are errors of one sentence."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from lanes import slow_except
from places import ROOT

pytest.importorskip("onnxruntime", reason="targets of ONNX run on it")

import onnx
from decoder_graphs import CONVENTIONS, HEAD_DIM, HEADS, LAYERS, VOCABULARY, WIDTH, Style, decoder, merged, saved
from onnx import TensorProto, helper, numpy_helper

from kvconform.errors import BackendUnavailable
from kvconform.judging.verdict import Outcome
from kvconform.results.results import Results
from kvconform.run.run import Plan, run_backend
from kvconform.search.effort import Effort
from kvconform.worker.client import WorkerSpec
from kvconform.worker.registry import load
from kvconform_backends.targets.onnx.signature import PASTS, PRESENTS, slot

CORE = ("shape", "causality", "equivalence", "lifecycle", "batch.row-solo", "capacity")


def judged(target: Path, folder: Path, clauses: tuple[str, ...] = CORE, **options: Any) -> Results:
    spec = WorkerSpec(f"onnx:{target}?{json.dumps(options)}", environment={"OMP_NUM_THREADS": "1"})
    plan = Plan(Effort("tiny", 3, 2, 60.0, shrink=False), clauses=clauses)
    results = run_backend("decoder", spec, plan, folder)
    assert not results.unavailable
    return results


def broken(results: Results) -> dict[str, str]:
    return {v.clause: v.sentence for v in results.verdicts if v.outcome.broken}


def opened(style: Style, folder: Path, **options: Any) -> Any:
    return load(f"onnx:{saved(decoder(style), folder)}?{json.dumps(options)}")


# --- conventions ---
@pytest.mark.slow
@pytest.mark.parametrize("name", CONVENTIONS)
def test_a_correct_decoder_breaks_no_clause_in_any_naming_convention(name: str, tmp_path: Path) -> None:
    results = judged(saved(decoder(CONVENTIONS[name]), tmp_path), tmp_path)
    assert broken(results) == {}
    passed = {v.clause for v in results.verdicts if v.outcome is Outcome.PASS}
    assert {"shape.length", "equivalence.decode", "equivalence.chunks", "lifecycle.reset", "batch.row-solo"} <= passed


@pytest.mark.slow
def test_every_clause_of_a_plain_decoder_holds_or_is_unsupported(tmp_path: Path) -> None:
    results = judged(saved(decoder(Style()), tmp_path), tmp_path, clauses=())
    assert {v.outcome for v in results.verdicts} <= {Outcome.PASS, Outcome.UNSUPPORTED, Outcome.REFUTED}
    assert results.claims["abilities"] == ["uncached_forward", "length", "reset"]


@pytest.mark.slow
@pytest.mark.parametrize(("needs_past", "dummy"), [(False, 0), (True, 1)])
def test_a_merged_graph_takes_its_first_step_without_the_cache_branch(
    needs_past: bool, dummy: int, tmp_path: Path
) -> None:
    path = saved(merged(Style(mask=True, needs_past=needs_past)), tmp_path, "decoder_model_merged.onnx")
    results = judged(path, tmp_path, ("equivalence", "lifecycle.reset", "shape.length"))
    assert broken(results) == {}
    assert results.target is not None
    assert (
        f"use_cache_branch is false for an empty cache, whose past has a length of {dummy}" in results.target.assumed[1]
    )


@pytest.mark.slow
def test_with_two_files_the_one_without_a_past_takes_the_first_step(tmp_path: Path) -> None:
    later = saved(decoder(Style(needs_past=True)), tmp_path, "decoder_with_past_model.onnx")
    first = saved(decoder(Style(cached=False)), tmp_path, "decoder_model.onnx")
    for path in (later, first):
        target = load(f"onnx:{path}")
        assert target.graphs.first.path == first
        assert target.assumed[0] == "decoder_model.onnx beside it is the same decoder without a past"
    results = judged(later, tmp_path, ("equivalence", "lifecycle.reset", "shape.length"))
    assert broken(results) == {}
    wrong = saved(decoder(Style(needs_past=True, mistake="positions restart")), tmp_path, later.name)
    assert "equivalence.decode" in broken(judged(wrong, tmp_path / "again", ("equivalence",)))


def test_a_graph_without_a_cache_can_be_the_reference(tmp_path: Path) -> None:
    saved(decoder(Style(cached=False, presents=False)), tmp_path, "plain.onnx")
    path = saved(decoder(Style()), tmp_path)
    results = judged(path, tmp_path, ("equivalence",), uncached="plain.onnx")
    assert broken(results) == {}
    target = load(f'onnx:{path}?{{"uncached": "plain.onnx"}}')
    assert (target.graphs.uncached.path.name, target.graphs.first.path.name) == ("plain.onnx", "decoder.onnx")


def test_dims_heads_and_dtypes_are_read_from_the_graph(tmp_path: Path) -> None:
    target = opened(Style(past="past_{n}", present="present_{n}", dtype="float16", tokens_first=True), tmp_path)
    config = target.configs["decoder-self"]
    assert (config.layers, config.kv_heads, config.head_dim, config.width) == (LAYERS, HEADS, HEAD_DIM, WIDTH)
    assert (config.vocabulary, config.dtype, config.capacity) == (VOCABULARY, "float16", 40)
    assert f"past_0 (2, batch, past, {HEADS}, {HEAD_DIM}) float16" in target.recognised
    hidden = opened(Style(hidden=True), tmp_path).configs["hidden-self"]
    assert (hidden.profile, hidden.width, hidden.vocabulary) == ("hidden", WIDTH, VOCABULARY)


def test_the_size_of_a_position_table_is_the_capacity(tmp_path: Path) -> None:
    target = opened(Style(table=23), tmp_path)
    assert target.configs["decoder-self"].capacity == 23
    assert target.assumed == ("a sequence has at most 23 tokens: its uncached forward raises on 24",)
    assert opened(Style(table=23), tmp_path, capacity=9).configs["decoder-self"].capacity == 9


def test_token_ids_missing_from_the_embedding_are_reserved(tmp_path: Path) -> None:
    model = decoder(Style())
    (table,) = (x for x in model.graph.initializer if x.name == "embed")
    table.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(table)[:-2], "embed"))
    target = load(f'onnx:{saved(model, tmp_path)}?{{"reserved": [0]}}')
    assert target.configs["decoder-self"].reserved == (0, VOCABULARY - 2, VOCABULARY - 1)


@pytest.mark.parametrize(
    ("name", "roots", "want"),
    [
        ("past_key_values.3.key", PASTS, ((3,), "key")),
        ("past_key_values_3_1", PASTS, ((3, 1), "")),
        ("past_key_values_value_cache_7", PASTS, ((7,), "value")),
        ("past_key_values.0.decoder.value", PASTS, ((0,), "value")),
        ("past_key_11", PASTS, ((11,), "key")),
        ("past_v0", PASTS, ((0,), "value")),
        ("past", PASTS, ((), "")),
        ("present_5", PRESENTS, ((5,), "")),
        ("cache_position", PASTS, None),
        ("past_sequence_length", PASTS, None),
        ("past_key_values.0.encoder.key", PASTS, None),
        ("presentation.0.key", PRESENTS, None),
    ],
)
def test_a_name_tells_the_layer_and_the_part(name: str, roots: tuple[str, ...], want: object) -> None:
    assert slot(name, roots) == want


def test_presents_without_names_follow_the_order_of_the_pasts(tmp_path: Path) -> None:
    target = opened(Style(past="past_key_values_{n}_{part}", present="cat_{n}_{part}"), tmp_path)
    assert target.assumed == ("the outputs after the first are the presents, in the order of the pasts",)
    assert target.cached.signature.present(((1,), "value")) == "cat_1_value"


# --- mistakes ---
@pytest.mark.parametrize(
    ("model", "clause"),
    slow_except(
        [
            (decoder(Style(mistake="positions restart")), "equivalence.decode"),
            (decoder(Style(mistake="top-left mask", mask=True)), "equivalence.decode"),
            (decoder(Style(mistake="drops the newest")), "shape.length"),
            (merged(Style(mistake="drops the newest", position_ids=True)), "equivalence.decode"),
            (merged(Style(mistake="off by one")), "equivalence.chunks"),
            (decoder(Style(mistake="off by one")), "equivalence.full-stable"),
        ],
        5,
    ),
    ids=["positions", "top-left", "drops", "merged drops", "merged chunk sees its future", "bad truth"],
)
def test_a_mistake_is_convicted(model: onnx.ModelProto, clause: str, tmp_path: Path) -> None:
    assert clause in broken(judged(saved(model, tmp_path), tmp_path, (clause,)))


def test_a_step_that_raises_is_a_finding(tmp_path: Path) -> None:
    path = saved(merged(Style(mistake="mask of the chunk")), tmp_path)
    found = broken(judged(path, tmp_path, ("equivalence.decode", "equivalence.chunks")))
    assert list(found) == ["equivalence.chunks"]  # one token's mask is broadcast
    assert "raised RuntimeError" in found["equivalence.chunks"]


@pytest.mark.slow
@pytest.mark.parametrize("broken_on_purpose", [False, True])
def test_the_example_is_conformant_unless_exported_broken(broken_on_purpose: bool, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="torch.onnx exports with it")
    example = ROOT / "examples" / "export_decoder.py"
    path = tmp_path / "decoder.onnx"
    asked = ["--broken"] if broken_on_purpose else []
    subprocess.run([sys.executable, example, path, *asked], check=True, timeout=300, capture_output=True)
    found = broken(judged(path, tmp_path, ("equivalence", "causality")))
    assert set(found) == (
        {"equivalence.decode", "equivalence.chunks", "equivalence.path", "causality.past-seen", "causality.visibility"}
        if broken_on_purpose
        else set()
    )


# --- errors ---
def axes(model: onnx.ModelProto, name: str, *sizes: Any) -> onnx.ModelProto:
    """The model with other axes declared for an input or output."""
    (value,) = (value for value in (*model.graph.input, *model.graph.output) if value.name == name)
    kind = value.type.tensor_type
    value.CopyFrom(helper.make_tensor_value_info(name, kind.elem_type, sizes))
    return model


def extra(model: onnx.ModelProto, name: str) -> onnx.ModelProto:
    model.graph.input.append(helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "new"]))
    return model


PAST = "past_key_values.0.key"
UNKNOWN = {
    "no input is a past key or value": decoder(Style(cached=False)),
    "unknown input encoder_hidden_states": extra(decoder(Style()), "encoder_hidden_states"),
    "no axis of past_key_values.0.key grows": axes(decoder(Style()), PAST, "batch", HEADS, 8, HEAD_DIM),
    "do not distinguish heads, tokens and head dim": axes(
        axes(decoder(Style()), PAST, "batch", "a", "b", HEAD_DIM), "present.0.key", "batch", "a", "c", HEAD_DIM
    ),
    "it takes exactly 2 rows": axes(decoder(Style()), "input_ids", 2, "new"),
    "it takes exactly 5 tokens at a time": axes(decoder(Style()), "input_ids", "batch", 5),
    "give a graph without a past by option uncached": axes(decoder(Style()), "input_ids", "batch", 1),
    "attention_mask has 4 axes": axes(decoder(Style(mask=True)), "attention_mask", "batch", 1, "new", "total"),
    "position_ids has 3 axes": axes(decoder(Style(position_ids=True)), "position_ids", 3, "batch", "new"),
    "no output is the present of past_key_values.0.key": decoder(Style(presents=False)),
}


@pytest.mark.parametrize("words", UNKNOWN)
def test_an_unrecognised_graph_is_an_error_that_lists_its_inputs_and_outputs(words: str, tmp_path: Path) -> None:
    path = tmp_path / "decoder.onnx"
    onnx.save(UNKNOWN[words], path)
    with pytest.raises(BackendUnavailable) as caught:
        load(f"onnx:{path}")
    sentence = str(caught.value)
    assert words in sentence
    assert "\n" not in sentence
    assert "inputs: input_ids int64 (" in sentence
    assert "outputs: logits float32 (batch, new, 17)" in sentence
    assert "known names: input_ids or inputs_embeds; attention_mask," in sentence


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("{0}/none.onnx", "no file {0}/none.onnx"),
        ("{0}/text.onnx", "{0}/text.onnx is not an ONNX model: "),
        (
            '{0}/decoder.onnx?{{"capacty": 3}}',
            "unknown option 'capacty'; known: uncached, capacity, vocabulary, width, head",
        ),
        ('{0}/decoder.onnx?{{"capacity": true}}', "option 'capacity' is True, expected a positive integer"),
        ('{0}/decoder.onnx?{{"capacity": 0}}', "option 'capacity' is 0, expected a positive integer"),
        ('{0}/decoder.onnx?{{"uncached": "decoder.onnx"}}', "expected a graph without a past"),
        ('{0}/decoder.onnx?{{"reserved": [-1]}}', "option 'reserved' is [-1], expected a list of token ids"),
        ('{0}/needs.onnx?{{"uncached": "bare.onnx"}}', "and bare.onnx returns no cache to start with: RuntimeError: "),
        ("{0}/needs.onnx", "cannot run on an empty past (of length 0), which the reference needs: RuntimeError: "),
    ],
)
def test_a_target_that_cannot_be_opened_is_an_error_of_one_sentence(target: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("this is no model")
    saved(decoder(Style()), tmp_path)
    saved(decoder(Style(needs_past=True)), tmp_path, "needs.onnx")
    saved(decoder(Style(cached=False, presents=False)), tmp_path, "bare.onnx")
    with pytest.raises(BackendUnavailable) as caught:
        load("onnx:" + target.format(tmp_path))
    assert words.format(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
