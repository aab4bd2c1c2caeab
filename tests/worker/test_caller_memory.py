"""What a step is given lies in the caller's memory: each byte that it changes there, or around it, is found."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from kvconform.worker.caller_memory import ALIGNED, CallerMemory, Overwritten, room
from kvconform.worker.execute import StepResult, execute
from kvconform.worker.protocol import pack, unpack
from kvconform_backends.numpy.cache import Cache, NumpyCache
from kvconform_backends.numpy.static import NumpyStatic
from kvconform_specs.configs import CONFIGS
from kvconform_specs.program import LAYOUTS, Append, Program, Reject, UncachedForward
from kvconform_specs.tensors import weights

Array = NDArray[Any]
GQA, ROPE = CONFIGS["attention-gqa"], CONFIGS["decoder-rope"]
QUERY = np.arange(48, dtype=np.float32).reshape(2, 3, 2, 4)
KEY = np.tile(QUERY[:1], (2, 1, 1, 1))
IDS = np.arange(10).reshape(2, 5)


def handed(*arrays: tuple[str, Array, str]) -> tuple[CallerMemory, list[Array]]:
    memory = CallerMemory(room(arrays))
    return memory, memory.hand_over(arrays)


# --- the memory ---
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("x", [KEY, np.tile(IDS[:1], (2, 1))], ids=["floats", "ids"])
def test_what_is_handed_over_is_writable_and_holds_the_numbers(x: Array, layout: str) -> None:
    memory, (view,) = handed(("key", x, layout))
    assert np.array_equal(view, x)
    assert view.dtype == x.dtype
    assert view.flags.writeable
    assert not np.shares_memory(view, x)
    assert memory.overwritten() is None


def test_dense_arrays_are_aligned_as_fresh_ones_are() -> None:
    _memory, views = handed(("query", QUERY, "contiguous"), ("key", KEY, "contiguous"), ("counts", IDS, "contiguous"))
    starts = [view.__array_interface__["data"][0] for view in views]
    assert all((start - starts[0]) % ALIGNED == 0 and start % 16 == 0 for start in starts)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_number_that_changes_is_found_in_every_layout(layout: str) -> None:
    memory, (_query, key) = handed(("query", QUERY, "contiguous"), ("key", KEY, layout))
    key[0, 1, 1, 2] = -1
    assert memory.overwritten() == Overwritten("key", "inside", (0, 1, 1, 2), was=float(KEY[0, 1, 1, 2]), now=-1.0)


def test_a_bit_that_equality_does_not_see_is_found() -> None:
    memory, (x,) = handed(("query", np.zeros((1, 3), np.float32), "contiguous"))
    x[0, 1] = -0.0
    found = memory.overwritten()
    assert found is not None
    assert (found.where, found.index) == ("inside", (0, 1))


def test_nan_that_stays_nan_is_not_a_change() -> None:
    memory, _views = handed(("query", np.full((1, 3), np.nan, np.float32), "contiguous"))
    assert memory.overwritten() is None


@pytest.mark.parametrize("distance", [1, 2, 40])
def test_what_is_written_outside_is_found_and_where(distance: int) -> None:
    arrays = ("query", QUERY, "contiguous"), ("key", KEY, "contiguous")
    memory, (query, _key) = handed(*arrays)
    as_strided(query, (query.size + distance,), (query.itemsize,))[-1] = 0
    assert memory.overwritten() == Overwritten("query", "behind", distance=distance)
    memory, (query, key) = handed(*arrays)
    as_strided(key[::-1, ::-1, ::-1, ::-1], (key.size + distance,), (-key.itemsize,))[-1] = 0
    assert memory.overwritten() == Overwritten("key", "before", distance=distance)


def test_what_is_written_into_the_gaps_of_a_view_is_found() -> None:
    memory, (query,) = handed(("query", QUERY, "sliced"))
    as_strided(query, (2,), (query.itemsize,))[1] = 0
    assert memory.overwritten() == Overwritten("query", "between")


def test_the_memory_is_used_again_at_the_same_place() -> None:
    memory = CallerMemory(room([("query", QUERY, "contiguous")]))
    (first,) = memory.hand_over([("query", QUERY, "contiguous")])
    memory.overwrite()
    assert np.isnan(first).all()
    (second,) = memory.hand_over([("query", QUERY[:, :, :1] + 1, "contiguous")])
    assert second.__array_interface__["data"][0] == first.__array_interface__["data"][0]
    assert np.array_equal(second, QUERY[:, :, :1] + 1)


# --- steps ---
class Zeroes(NumpyCache):
    """Its inputs hold zeros after every call, also one that it refuses."""

    def step(self, cache: Cache, *inputs: Array, **options: Any) -> tuple[Array, Cache]:
        try:
            return super().step(cache, *inputs, **options)
        finally:
            for x in (*inputs, *(value for value in options.values() if isinstance(value, np.ndarray))):
                x[...] = 0


class ZeroesCounts(NumpyStatic):
    def step(self, cache: Any, *inputs: Array, counts: Array | None = None, **options: Any) -> tuple[Array, Any]:  # type: ignore[override]
        output, cache = super().step(cache, *inputs, counts=counts, **options)
        if counts is not None:
            counts[...] = 0
        return output, cache


class OneOutput(NumpyCache):
    """Every output of one shape is the same array."""

    def step(self, cache: Cache, *inputs: Array, **options: Any) -> tuple[Array, Cache]:
        output, cache = super().step(cache, *inputs, **options)
        kept: Array = vars(self).setdefault(f"output{output.shape}", output)
        kept[...] = output
        return kept, cache


def traced(kind: type[NumpyCache], *steps: Any, config: Any = GQA) -> tuple[StepResult, ...]:
    program = Program(config, steps)
    traces = unpack(*pack(execute(kind(config, weights(config)), program, (0, 1))))
    return traces.apart()[1]


def test_a_right_backend_changes_nothing() -> None:
    steps = Append("a", (3, 3), 0, layout="sliced"), Append("a", (1, 1), 0, masked=((0, 1),), reused=True)
    trace = traced(NumpyCache, *steps, UncachedForward("x", (2,), 5))
    assert [(done.input_changed, done.output_changed) for done in trace] == [(None, None)] * 3


@pytest.mark.parametrize("config", [GQA, ROPE], ids=["attention", "decoder"])
def test_inputs_that_a_step_overwrites_are_recorded_and_corrupt_no_other_step_or_variant(config: Any) -> None:
    steps = Append("a", (3,), 0), Append("a", (1,), 0), UncachedForward("x", (4,), 0)
    wrong, right = (traced(kind, *steps, config=config) for kind in (Zeroes, NumpyCache))
    assert [done.input_changed is not None for done in wrong[:2]] == [True, True]
    assert wrong[0].input_changed is not None
    assert wrong[0].input_changed.array == ("query" if config is GQA else "token ids")
    for mine, its in zip(wrong, right, strict=True):
        assert mine.output is not None
        assert its.output is not None
        assert np.array_equal(mine.output, its.output)


def test_a_refused_call_only_reads_its_inputs_as_well() -> None:
    trace = traced(Zeroes, Append("a", (2,), 0), Reject(Append("a", (GQA.capacity,), 0)))
    assert trace[1].refused is not None
    assert trace[1].input_changed is not None


class HalvesEarlierInputs(NumpyCache):
    """A step writes into the first input of the step before."""

    def step(self, cache: Cache, *inputs: Array, **options: Any) -> tuple[Array, Cache]:
        earlier = vars(self).pop("earlier", None)
        if earlier is not None:
            earlier /= 2
        vars(self)["earlier"] = inputs[0]
        return super().step(cache, *inputs, **options)


def test_inputs_that_a_later_step_overwrites_are_recorded_with_the_step_that_was_given_them() -> None:
    first, last = traced(HalvesEarlierInputs, Append("a", (2,), 0), Append("a", (1,), 0))
    assert first.input_changed is not None
    assert (first.input_changed.later, first.input_changed.array) == (True, "query")
    assert last.input_changed is None


def test_counts_and_masks_are_inputs() -> None:
    (done,) = traced(ZeroesCounts, Append("a", (3, 1), 0))
    assert done.input_changed == Overwritten("counts", "inside", (0,), was=3.0, now=0.0)
    masked = traced(Zeroes, Append("a", (2,), 0), Append("a", (1,), 0, masked=((0, 1),)))
    assert masked[1].input_changed is not None


def test_an_output_is_what_it_was_when_it_was_returned_and_what_became_of_it_is_recorded() -> None:
    steps = Append("a", (1,), 0), Append("a", (1,), 0), Append("a", (2,), 0)
    wrong, right = traced(OneOutput, *steps), traced(NumpyCache, *steps)
    for mine, its in zip(wrong, right, strict=True):
        assert mine.output is not None
        assert its.output is not None
        assert np.array_equal(mine.output, its.output)
    assert [done.output_changed is not None for done in wrong] == [True, False, False]
