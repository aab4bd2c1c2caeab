"""The ONNX backend whose past and present are one buffer: what it shares, pads, and feeds token by token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the ONNX backends export a torch decoder")
pytest.importorskip("onnxscript", reason="torch.onnx exports with it")
pytest.importorskip("onnxruntime", reason="the ONNX backends run on it")

import onnx  # noqa: E402

from kvconform_backends.onnx import graphs as onnx_graphs  # noqa: E402
from kvconform_backends.onnx import shared_graphs  # noqa: E402
from kvconform_backends.onnx.shared import OnnxShared, SharedBuffers  # noqa: E402
from kvconform_backends.torch.decoder import Decoder  # noqa: E402
from kvconform_backends.torch.eager import EagerStatic  # noqa: E402
from kvconform_specs.config import Config  # noqa: E402
from kvconform_specs.tensors import weights  # noqa: E402

ROPE = Config("decoder", 4, 2, 8, layers=2, width=10, mlp=14, vocabulary=37, positions="rope", capacity=24)
LAYER = Config("attention", 4, 2, 8, capacity=24)


@pytest.fixture(scope="module")
def rope(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OnnxShared]:
    """Its files are kept, so that each graph is exported once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVCONFORM_ARTEFACTS", str(tmp_path_factory.mktemp("artefacts")))
        yield OnnxShared(ROPE, weights(ROPE))


def ids(batch: int, t: int) -> np.ndarray:
    return np.random.default_rng(t).integers(0, ROPE.vocabulary, (batch, t))


def heads(config: Config, batch: int, t: int) -> list[np.ndarray]:
    made = np.random.default_rng(t)
    counts = (config.heads, config.kv_heads, config.kv_heads)
    return [made.standard_normal((batch, count, t, config.head_dim)).astype(np.float32) for count in counts]


def slack(exact: np.ndarray) -> float:
    """Two orders of the same float32 sums: a few eps of the largest number."""
    return float(64 * np.finfo(np.float32).eps * np.abs(exact).max())


def addresses(cache: SharedBuffers) -> list[int]:
    return [buffer.data_ptr() for buffer in cache.buffers]


# --- one buffer ---
@pytest.mark.slow
def test_a_step_writes_its_own_slots_of_the_buffers_and_leaves_all_others_and_the_memory_as_they_were(
    rope: OnnxShared,
) -> None:
    _, cache = rope.step(rope.start(2), ids(2, 5))
    rope.poison(cache, -7.0, 7.0)
    where, before = addresses(cache), [x.numpy().copy() for x in cache.buffers]
    _, after = rope.step(cache, ids(2, 1))
    assert after is cache
    assert addresses(cache) == where
    for old, buffer in zip(before, cache.buffers, strict=True):
        changed = (old != buffer.numpy()).any(axis=(0, 1, 3))
        assert np.flatnonzero(changed).tolist() == [5]
    presents = cache.bound.binding.get_outputs()[1:]
    assert [present.data_ptr() for present in presents] == where


def test_a_fork_shares_no_memory_and_goes_its_own_way(rope: OnnxShared) -> None:
    _, cache = rope.step(rope.start(1), ids(1, 4))
    other = rope.fork(cache)
    assert not set(addresses(cache)) & set(addresses(other))
    held = [x.numpy().copy() for x in cache.buffers]
    rope.step(other, ids(1, 3))
    assert all((old == x.numpy()).all() for old, x in zip(held, cache.buffers, strict=True))
    assert (rope.length(cache), rope.length(other)) == ([4], [7])


def test_a_decode_loop_binds_its_inputs_once(rope: OnnxShared) -> None:
    cache = rope.start(1)
    rope.step(cache, ids(1, 1))
    bound, held = cache.bound, {name: value for name, (_, value) in cache.bound.values.items()}
    for _ in range(3):
        rope.step(cache, ids(1, 1))
    assert cache.bound is bound
    assert {name: value for name, (_, value) in bound.values.items()} == held


# --- what the operator cannot do ---
def test_several_tokens_of_several_rows_behind_others_are_those_of_each_row_alone(rope: OnnxShared) -> None:
    prompt, chunk = ids(3, 4), ids(3, 5)
    _, cache = rope.step(rope.start(3), prompt)
    every, cache = rope.step(cache, chunk)
    assert rope.length(cache) == [9, 9, 9]
    for row in range(3):
        _, alone = rope.step(rope.start(1), prompt[row : row + 1])
        want, _ = rope.step(alone, chunk[row : row + 1])
        assert np.abs(every[row] - want[0]).max() <= slack(want)


def test_no_tokens_and_no_rows_are_an_empty_output(rope: OnnxShared) -> None:
    output, cache = rope.step(rope.start(2), ids(2, 0))
    assert (output.shape, rope.length(cache)) == ((2, 0, ROPE.vocabulary), [0, 0])
    layer = OnnxShared(LAYER, {})
    assert layer.step(layer.start(0), *heads(LAYER, 0, 3))[0].shape == (0, LAYER.heads, 3, LAYER.head_dim)


VARIANTS: dict[str, dict[str, Any]] = {
    "head dim padded": {"head_dim": 5},
    "window": {"window": 4},
    "alibi, softcap and window": {"positions": "alibi", "softcap": 1.5, "window": 4},
    "sink and scale, padded": {"sink": 1.0, "scale": 0.4, "head_dim": 12},
    "one KV head": {"kv_heads": 1},
    "no groups": {"kv_heads": 4},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_prompt_chunk_and_decode_attend_as_scaled_dot_product_attention_does(name: str) -> None:
    config = replace(LAYER, **VARIANTS[name])
    shared, eager = OnnxShared(config, {}), EagerStatic(config, {})
    for batch in (1, 2):
        mine, theirs = shared.start(batch), eager.start(batch)
        for t in (6, 1, 3, 1):
            new = heads(config, batch, t)
            got, mine = shared.step(mine, *new)
            want, theirs = eager.step(theirs, *new)
            assert got.shape == want.shape
            assert np.abs(got - want).max() <= slack(want), (batch, t)


# --- the last position ---
@pytest.mark.slow
def test_the_last_positions_logits_are_those_among_all(rope: OnnxShared) -> None:
    prompt, chunk = ids(2, 4), ids(2, 3)
    whole = rope.uncached_forward(np.concatenate((prompt, chunk), axis=1))
    first, cache = rope.step(rope.start(2), prompt, last_only=True)
    then, _ = rope.step(cache, chunk, last_only=True)
    assert first.shape == then.shape == (2, 1, ROPE.vocabulary)
    assert np.abs(first - whole[:, 3:4]).max() <= slack(whole)
    assert np.abs(then - whole[:, -1:]).max() <= slack(whole)


# --- the graph ---
def test_a_layer_is_one_attention_node_without_transposes_or_copies_of_the_past(rope: OnnxShared) -> None:
    kinds = [node.op_type for node in onnx.load(rope.artefact(cached=True)).graph.node]
    assert kinds.count("GroupQueryAttention") == kinds.count("RotaryEmbedding") == ROPE.layers
    assert not {"Transpose", "Attention", "Softmax"} & set(kinds)


def test_the_buffers_are_not_counted_as_allocated_by_a_step(rope: OnnxShared) -> None:
    cache = rope.start(1)
    counted = rope.count(lambda: rope.step(cache, ids(1, 1)))
    assert counted["operators"]["GroupQueryAttention"] == ROPE.layers
    assert counted["allocated"]["GroupQueryAttention"] == ROPE.layers * ROPE.heads * ROPE.head_dim * 4


def test_an_export_is_compared_with_the_decoder_that_attends_by_itself(rope: OnnxShared) -> None:
    made = rope.artefact(cached=True).read_bytes()
    for other in (replace(ROPE, window=4), replace(ROPE, scale=0.5), replace(ROPE, softcap=1.0)):
        with pytest.raises(RuntimeError, match=r"the exported graph's .* differs from torch for \(b, t, p\)"):
            shared_graphs._check_values(made, onnx_graphs.Exportable(Decoder(other, weights(ROPE))))
