"""The layouts of the numpy caches are what their files say. Their correctness is tested by the clauses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from kvconform.worker.registry import installed, load
from kvconform_specs.config import Config
from kvconform_specs.configs import CONFIGS
from kvconform_specs.tensors import rounded, weights

NAMES = ("numpy", "numpy-static", "numpy-ring", "numpy-paged", "numpy-int8")
GQA, WINDOW, SINK = (CONFIGS[f"attention-{name}"] for name in ("gqa", "window", "sink"))


def built(name: str, config: Config) -> Any:
    return load(name)(config, weights(config), "cpu")


def inputs(config: Config, batch: int, t: int, seed: int = 0) -> tuple[np.ndarray, ...]:
    draw = np.random.default_rng(seed)
    if config.profile == "decoder":
        return (draw.integers(0, config.vocabulary, (batch, t)),)
    heads = (config.heads, config.kv_heads, config.kv_heads)
    return tuple(
        rounded(draw.normal(size=(batch, n, t, config.head_dim)).astype(np.float32), config.dtype) for n in heads
    )


def grown(backend: Any, batch: int, *sizes: int, cache: Any = None) -> Any:
    """A cache after steps of these sizes."""
    cache = backend.start(batch) if cache is None else cache
    for size in sizes:
        _output, cache = backend.step(cache, *inputs(backend.config, batch, size))
    return cache


def same(one: Any, other: Any) -> bool:
    """Whether two answers of ``contents`` are the same, bit for bit."""
    pairs = [(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True)]
    return all(np.array_equal(p, q) for a, b in pairs for p, q in zip(a, b, strict=True))


def test_the_references_have_names() -> None:
    assert set(NAMES) <= set(installed())


@pytest.mark.parametrize("config", [WINDOW, SINK], ids=["window", "sink"])
@pytest.mark.parametrize("name", [name for name in NAMES if name != "numpy-paged"])
def test_a_query_that_sees_nothing_gives_zeros_without_a_warning(name: str, config: Config) -> None:
    backend = built(name, config)
    cache = grown(backend, 2, 3)
    output, _cache = backend.step(cache, *inputs(config, 2, 4), mask=np.zeros((2, 7), bool))
    assert not output.any()


@pytest.mark.parametrize("name", NAMES)
def test_rows_that_do_not_exist_are_refused_and_others_may_come_twice(name: str) -> None:
    backend = built(name, WINDOW)
    cache = grown(backend, 2, 3)
    for rows in ([2], [-1], []):
        with pytest.raises(ValueError, match=r"rows are .*, expected one or more of 0\.\.1"):
            backend.reorder(cache, rows)
    assert backend.length(backend.reorder(cache, [1, 1, 0])) == [3, 3, 3]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["numpy", "numpy-static", "numpy-paged"])
def test_sixteen_bits_take_half_the_bytes_and_lose_nothing(name: str, dtype: str) -> None:
    wide, narrow = built(name, GQA), built(name, replace(GQA, dtype=dtype))
    assert 2 * narrow.bytes(grown(narrow, 2, 5)) == wide.bytes(grown(wide, 2, 5)) > 0
    query, key, value = inputs(narrow.config, 1, 5)
    output, cache = narrow.step(narrow.start(1), query, key, value)
    ((kept,),) = narrow.contents(cache)
    assert np.array_equal(kept[0], key[0])
    assert np.array_equal(kept[1], value[0])
    assert np.array_equal(output, rounded(output, dtype))


def test_a_decoder_in_sixteen_bits_is_refused_with_a_reason() -> None:
    config = replace(CONFIGS["decoder-rope"], dtype="float16")
    assert all("float32" in load(name).refuses(config, "cpu") for name in ("numpy", "numpy-static", "numpy-paged"))


def test_work_is_the_multiply_adds_of_the_last_metered_step() -> None:
    backend, c = built("numpy", GQA), GQA
    _output, cache = backend.step(backend.start(2), *inputs(c, 2, 5), count_macs=True)
    _output, cache = backend.step(cache, *inputs(c, 2, 3), count_macs=True)
    grown(backend, 2, 4, cache=cache)
    assert backend.macs() == 2 * c.heads * 3 * 8 * c.head_dim * 2  # rows, heads, queries, keys, dim; scores and values


# --- static ---
def test_static_writes_into_the_given_buffers_only_where_it_is_told_to() -> None:
    backend = built("numpy-static", GQA)
    past = grown(backend, 2, 5)
    before = backend.contents(past)
    _output, shared = backend.step(past, *inputs(GQA, 2, 1), in_place=True)
    _output, apart = backend.step(past, *inputs(GQA, 2, 1))
    assert np.shares_memory(past.keys[0], shared.keys[0])
    assert not np.shares_memory(past.keys[0], apart.keys[0])
    assert same(backend.contents(shared), backend.contents(apart))
    assert same(backend.contents(past), before)


@pytest.mark.parametrize("name", ["numpy-static", "numpy-paged"])
def test_poison_reaches_dead_slots_and_nothing_else(name: str) -> None:
    backend = built(name, WINDOW)
    cache, other = grown(backend, 2, 7), grown(backend, 3, 2)
    backend.reset(grown(backend, 1, 9))
    clean = backend.step(backend.fork(cache), *inputs(WINDOW, 2, 6))[0]
    before = backend.contents(cache), backend.contents(other)
    backend.poison(cache, float("nan"), float("inf"))
    slots = cache.keys[0].size // (WINDOW.kv_heads * WINDOW.head_dim)
    held = 2 * 7 + 3 * 2 if name == "numpy-paged" else 2 * 7  # pages are shared by all sequences
    assert np.isnan(cache.keys[0]).sum() == np.isinf(cache.values[0]).sum() == (slots - held) * WINDOW.kv_heads * 16
    assert same(backend.contents(cache), before[0])
    assert same(backend.contents(other), before[1])
    assert np.array_equal(backend.step(cache, *inputs(WINDOW, 2, 6))[0], clean)


def test_left_padding_is_not_written() -> None:
    backend = built("numpy-static", GQA)
    x = inputs(GQA, 2, 4)
    _output, cache = backend.step(backend.start(2), *x, counts=np.array([4, 1]), padding="left")
    assert backend.length(cache) == [4, 1]
    assert np.array_equal(backend.contents(cache)[0][1][0], x[1][1, :, 3:])
    assert not cache.keys[0][1, :, 1:].any()


# --- ring ---
def test_a_ring_has_as_many_slots_as_its_window_and_layers_without_one_keep_everything() -> None:
    backend = built("numpy-ring", CONFIGS["decoder-learned"])
    cache = grown(backend, 2, 7, 1, 9, 1)
    assert [k.shape[2] for k in cache.keys] == [5, 18, 5]
    assert [layer[0][0].shape[1] for layer in backend.contents(cache)] == [5, 18, 5]
    assert backend.length(cache) == [18, 18]


def test_a_ring_shows_the_newest_tokens_in_order() -> None:
    backend = built("numpy-ring", WINDOW)
    x = inputs(WINDOW, 1, 12)
    cache = backend.start(1)
    for part in (slice(0, 3), slice(3, 11), slice(11, 12)):
        _output, cache = backend.step(cache, *(y[:, :, part] for y in x))
    ((kept,),) = backend.contents(cache)
    assert np.array_equal(kept[0], x[1][0, :, 7:])
    assert np.array_equal(cache.keys[0][0, :, 11 % 5], x[1][0, :, 11])


def test_without_a_window_there_is_nothing_to_evict() -> None:
    assert load("numpy-ring").refuses(GQA, "cpu") == "the config has no window, so nothing is evicted"
    assert load("numpy-ring").refuses(WINDOW, "cpu") is None


# --- pages ---
def test_a_fork_shares_pages_until_one_that_is_partly_filled_is_written() -> None:
    backend = built("numpy-paged", GQA)
    one = grown(backend, 1, 6)
    other = backend.fork(one)
    assert other.tables == one.tables == [[0, 1]]
    before = backend.contents(one)
    grown(backend, 1, 1, cache=other)
    assert (one.tables, other.tables) == ([[0, 1]], [[0, 2]])
    grown(backend, 1, 1, cache=one)  # page 1 is its own again
    assert one.tables == [[0, 1]]
    assert backend.uses[:3] == [2, 1, 1]
    assert same(backend.contents(backend.truncate(one, 6)), before)


def test_a_shared_page_that_is_full_is_never_copied() -> None:
    backend = built("numpy-paged", GQA)
    one = grown(backend, 1, 4)
    assert grown(backend, 1, 1, cache=backend.fork(one)).tables == [[0, 1]]


def test_the_page_that_was_freed_last_is_taken_first() -> None:
    backend = built("numpy-paged", GQA)
    one, other = grown(backend, 1, 8), grown(backend, 1, 4)
    backend.truncate(one, 4)
    grown(backend, 1, 8, cache=other)
    assert (one.tables, other.tables) == ([[0]], [[2, 1, 3]])


def test_closed_sequences_leave_every_page_unused() -> None:
    backend = built("numpy-paged", GQA)
    cache = grown(backend, 2, 6)
    other = backend.reorder(backend.fork(cache), [1, 1, 0])
    backend.uncached_forward(*inputs(GQA, 2, 9))
    for open_one in (backend.reset(cache), grown(backend, 3, 2, cache=other)):
        backend.close(open_one)
    assert not any(backend.uses)
    assert sorted(backend.unused) == list(range(len(backend.uses)))


def test_a_refused_step_takes_no_page() -> None:
    backend = built("numpy-paged", GQA)
    cache = grown(backend, 2, 4)
    unused = list(backend.unused)
    with pytest.raises(ValueError, match="capacity of 40"):
        backend.step(cache, *inputs(GQA, 2, 37))
    assert (backend.unused, cache.tables) == (unused, [[0], [1]])


def test_a_page_counts_whole() -> None:
    backend = built("numpy-paged", GQA)
    assert backend.bytes(backend.start(2)) == 0
    assert backend.bytes(grown(backend, 2, 5)) == 2 * 2 * 8 * GQA.kv_heads * GQA.head_dim * 4


# --- 8 bits ---
@pytest.mark.parametrize("sizes", [(11,), (1,) * 11, (3, 8)], ids=str)
def test_eight_bits_are_half_a_step_off_and_the_newest_four_tokens_are_exact(sizes: tuple[int, ...]) -> None:
    backend = built("numpy-int8", GQA)
    x, cache, done = inputs(GQA, 2, 11), backend.start(2), 0
    for size in sizes:
        _output, cache = backend.step(cache, *(y[:, :, done : done + size] for y in x))
        done += size
    assert cache.keys[0].codes.dtype == np.int8
    assert (cache.keys[0].codes.shape[2], cache.keys[0].recent.shape[2]) == (7, 4)
    for given, row in ((x[1], 0), (x[2], 1)):
        kept = np.stack([tokens[row] for tokens in backend.contents(cache)[0]])
        step = np.abs(given).max(axis=-1, keepdims=True).astype(np.float64) / 127
        error = np.abs(kept.astype(np.float64) - given)
        # the quotient, at most 127, the step and the product are rounded once each: 3 * 127 * 2^-24 of a step
        assert (error <= step * (0.5 + 3 * 127 * 2.0**-24)).all()
        assert error[:, :, :7].max() > 0
        assert not error[:, :, 7:].any()


def test_zero_keys_are_quantised_without_a_warning() -> None:
    backend = built("numpy-int8", GQA)
    query, key, value = inputs(GQA, 1, 9)
    _output, cache = backend.step(backend.start(1), query, np.zeros_like(key), value)
    assert not backend.contents(cache)[0][0][0].any()
