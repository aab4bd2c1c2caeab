"""What a fast decode step leaves out: copies of the cache, masks, repeated keys, and logits that were not requested."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the decoders are torch's")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from kvconform_backends.published.list_cache import ListCache  # noqa: E402
from kvconform_backends.published.module_buffers import ModuleBuffers  # noqa: E402
from kvconform_backends.published.past_tuples import PastTuples  # noqa: E402
from kvconform_backends.torch.decoder import Decoder, LayerMasks, attend_to, attention, laid_out, masks  # noqa: E402
from kvconform_backends.torch.eager import Eager, EagerStatic, Torch  # noqa: E402
from kvconform_specs.config import Config  # noqa: E402
from kvconform_specs.tensors import weights  # noqa: E402

DESIGNS = (Eager, EagerStatic, PastTuples, ModuleBuffers, ListCache)
ROPE = Config("decoder", 4, 2, 6, layers=2, width=10, mlp=14, vocabulary=37, positions="rope", capacity=24)
LAYER = Config("attention", 4, 2, 6, capacity=24)
FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


class Calls(TorchDispatchMode):
    """Every operator that torch runs, with its arguments and what it gave."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        self.made.append((function, args, kwargs or {}, output))
        return output


@contextmanager
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    """Of the backend, with its operators visible: inference mode hides what they are made of."""
    monkeypatch.setattr(Torch, "run", Torch.run.__wrapped__)
    with torch.no_grad(), Calls() as made:
        yield made


def ids(config: Config, batch: int, t: int) -> np.ndarray:
    return np.random.default_rng(t).integers(0, config.vocabulary, (batch, t))


def heads(config: Config, batch: int, t: int, s: int) -> list[torch.Tensor]:
    made = torch.Generator().manual_seed(s)
    sizes = ((config.heads, t), (config.kv_heads, s), (config.kv_heads, s))
    return [torch.randn(batch, count, length, config.head_dim, generator=made) for count, length in sizes]


@pytest.mark.parametrize("design", DESIGNS)
def test_a_decode_step_attends_to_the_filled_slots_alone_without_a_mask_and_reads_each_key_once(
    design: type[Torch], monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = design(ROPE, weights(ROPE))
    _, cache = backend.step(backend.start(2), ids(ROPE, 2, 5))
    with calls(monkeypatch) as made:
        backend.step(cache, ids(ROPE, 2, 1))
    attended = [(args, kwargs) for function, args, kwargs, _ in made.made if function is FLASH]
    assert len(attended) == ROPE.layers
    for (query, keys, values, *_), kwargs in attended:
        assert query.shape == (2, ROPE.kv_heads, ROPE.group, ROPE.head_dim)
        assert keys.shape == values.shape == (2, ROPE.kv_heads, 6, ROPE.head_dim)
        assert kwargs.get("attn_mask") is None


def test_a_decode_step_of_the_static_cache_makes_nothing_as_large_as_its_cache_and_writes_it_in_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = replace(ROPE, capacity=4096)
    backend = EagerStatic(config, weights(config))
    _, cache = backend.step(backend.start(1), ids(config, 1, 2000))
    held = [x.data_ptr() for x in (*cache.keys, *cache.values)]
    known = {x.untyped_storage().data_ptr() for x in (*cache.keys, *cache.values, *backend.decoder.buffers())}
    with calls(monkeypatch) as made:
        _, cache = backend.step(cache, ids(config, 1, 1))
    outputs = [out for *_, out in made.made if isinstance(out, torch.Tensor)]
    fresh = [out for out in outputs if out.untyped_storage().data_ptr() not in known]
    assert fresh
    assert max(out.untyped_storage().nbytes() for out in fresh) < 2000 * config.head_dim * 4  # one head of the past
    assert [x.data_ptr() for x in (*cache.keys, *cache.values)] == held


@pytest.mark.parametrize("design", DESIGNS)
def test_the_last_position_alone_is_projected_and_is_what_it_is_among_all(
    design: type[Torch], monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = design(ROPE, weights(ROPE))
    prompt, chunk = ids(ROPE, 2, 5), ids(ROPE, 2, 3)
    whole = backend.uncached_forward(np.concatenate((prompt, chunk), axis=1))
    last = backend.uncached_forward(np.concatenate((prompt, chunk), axis=1), last_only=True)
    assert last.shape == (2, 1, ROPE.vocabulary)
    _, cache = backend.step(backend.start(2), prompt, last_only=True)
    with calls(monkeypatch) as made:
        given, cache = backend.step(cache, chunk, last_only=True)
    rows = [out.numel() // ROPE.vocabulary for *_, out in made.made if getattr(out, "shape", (0,))[-1:] == (37,)]
    assert set(rows) == {2}  # of two rows one position each
    # the products of one row and of many are summed in other orders: a few eps of float32 of the largest logit
    slack = 64 * np.finfo(np.float32).eps * np.abs(whole).max()
    assert np.abs(last - whole[:, -1:]).max() <= slack
    assert np.abs(given - whole[:, -1:]).max() <= slack
    assert list(backend.length(cache)) == [8, 8]


VARIANTS = {
    "plain": {},
    "window": {"window": 4},
    "alibi": {"positions": "alibi"},
    "alibi and window": {"positions": "alibi", "window": 4},
    "softcap": {"softcap": 2.0, "window": 4},
    "sink": {"sink": 0.5},
    "one KV head": {"kv_heads": 1},
    "no groups": {"kv_heads": 4},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_what_is_chosen_to_be_seen_is_what_the_mask_of_all_positions_says(name: str) -> None:
    config = replace(LAYER, **VARIANTS[name])
    layer_masks, every = LayerMasks(config, "cpu"), torch.arange(config.capacity)
    hidden = torch.ones(2, config.capacity, dtype=torch.bool)
    hidden[0, 1] = hidden[1, 5] = False
    for past, t in ((0, 1), (0, 3), (0, 9), (3, 1), (4, 1), (7, 1), (7, 3), (2, 6), (config.capacity - 1, 1)):
        s = past + t
        query, keys, values = heads(config, 2, t, s)
        for seen in (None, hidden[:, :s]):
            (layer_mask,) = layer_masks.of(slice(past, s), s, seen)
            (mask,) = masks(config, every[past:s], every[:s], seen)
            exact = [x.double() for x in (query, keys, values)]
            want = attention(config, *exact, mask if mask.dtype == torch.bool else mask.double())
            got = attend_to(config, layer_mask, query, keys, values)
            # scores below 8 and at most 24 keys: the class of a sum of 24 terms, with room for the exponential
            assert (got - want).abs().max() <= 24 * 16 * torch.finfo(torch.float32).eps * values.abs().max(), (past, t)
            if config.window is not None and seen is None:
                assert s - layer_mask.first == min(s, t + config.window - 1)  # no hidden key is read


def test_a_prompt_into_an_empty_cache_needs_no_mask_unless_a_window_cuts_it() -> None:
    layer_masks = LayerMasks(replace(LAYER, window=4), "cpu")
    assert layer_masks.of_layer(0, slice(0, 4), 4).causal
    assert not layer_masks.of_layer(0, slice(0, 5), 5).causal
    assert not layer_masks.of_layer(0, slice(1, 3), 3).causal  # torch would align it top-left
    assert not LayerMasks(replace(LAYER, sink=0.5), "cpu").of_layer(0, slice(0, 4), 4).causal


def test_nothing_in_a_slot_that_holds_no_token_reaches_a_step_of_rows_of_one_length() -> None:
    backend = EagerStatic(ROPE, weights(ROPE))
    _, cache = backend.step(backend.start(2), ids(ROPE, 2, 5))
    clean, _ = backend.step(backend.fork(cache), ids(ROPE, 2, 1))
    backend.poison(cache, float("nan"), float("nan"))
    poisoned, _ = backend.step(cache, ids(ROPE, 2, 1))
    assert (poisoned == clean).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_order_of_memory_changes_no_number(dtype: torch.dtype) -> None:
    for shape in ((3, 7), (7, 3)):
        matrix = torch.arange(21.0).reshape(shape).to(dtype)
        made = laid_out(matrix)
        assert torch.equal(made, matrix)
        along = 1 if dtype == torch.float32 and shape == (3, 7) else 0
        assert made.stride(along) == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor's imports use what torch has deprecated
def test_large_matrices_are_read_by_loops_where_one_token_meets_them_and_give_the_same_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from kvconform_backends.torch import compiled

    config = replace(ROPE, width=48, vocabulary=1031)
    small = compiled.Looped(config, weights(config))
    assert not small.looped  # a library reads what lies in a cache faster
    monkeypatch.setattr(compiled.Looped, "large", sum(matrix.nbytes for matrix in matrices(small)))
    large = compiled.Looped(config, weights(config))
    for matrix, as_before in zip(matrices(large), matrices(small), strict=True):
        assert torch.equal(matrix, as_before)
        multiply = torch.compile(lambda x, matrix=matrix: large.multiply(x, matrix), dynamic=True, fullgraph=True)
        for rows, t in ((1, 1), (1, 3), (2, 1)):
            x = torch.randn(rows, t, len(matrix), generator=torch.Generator().manual_seed(t))
            with torch.no_grad(), Calls() as made:
                large.multiply(x, matrix)
            assert ("aten.mm.default" in {str(function) for function, *_ in made.made}) == (rows * t > 1)
            exact = x.double() @ matrix.double()
            # a sum of n products in any order: n roundings at most each (Higham 2002, section 3.1)
            bound = len(matrix) * torch.finfo(torch.float32).eps * (x.abs().double() @ matrix.abs().double())
            for got in (large.multiply(x, matrix), multiply(x)):
                assert got.shape == (rows, t, matrix.shape[1])
                assert ((got - exact).abs() <= bound).all()


def matrices(decoder: Decoder) -> list[torch.Tensor]:
    """All but the embeddings, of each layer and then the LM head."""
    names = ("query_key_value", "output", "gate_up", "down")
    return [*(getattr(block, name) for block in decoder.blocks for name in names), decoder.lm_head]
