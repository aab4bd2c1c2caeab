"""What a decode step costs at least, the machine's ceilings, and how near an arm comes to them."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np
import pytest

from kvconform.bench.analysis.intervals import times
from kvconform.bench.analysis.ratios import MAX_RATIO_HALF_WIDTH
from kvconform.bench.analysis.roofline import MAX_ROOFLINE_FRACTION, roofs
from kvconform.bench.costs import DESIGNS, bytes_expected, bytes_min, cost, weights_read
from kvconform.bench.record import MACHINE, Arm, Case, Record, Roof, Round
from kvconform.bench.worker import ceilings
from kvconform.bench.worker.ceilings import COLUMNS, PIECE, SIDE, WAYS, Ceiling, excess, fastest, floats, products
from kvconform_backends.numpy.cache import NumpyCache
from kvconform_backends.numpy.static import NumpyStatic
from kvconform_specs.config import Config
from kvconform_specs.costs import multiply_adds
from kvconform_specs.tensors import Streams, weights

GROUPED = Config(
    "decoder", heads=4, kv_heads=2, head_dim=6, layers=3, width=10, mlp=14, vocabulary=17, positions="rope", capacity=40
)
ONE_LAYER = Config("decoder", heads=5, kv_heads=5, head_dim=4, width=8, vocabulary=23, positions="learned", capacity=32)
WINDOWED = replace(GROUPED, window=7, window_every=2)  # layers 0 and 2
CONFIGS = pytest.mark.parametrize("config", [GROUPED, ONE_LAYER, WINDOWED], ids=["grouped", "one-layer", "windowed"])
STEPS = [(0, 1), (0, 9), (5, 1), (5, 3), (20, 1)]
"""Cached and new tokens."""


def count_macs(backend: Any, config: Config, past: int, new: int, batch: int, **options: Any) -> int:
    """The multiply-adds that a backend counts in a step."""
    ids = np.repeat(np.array(Streams(config, config.capacity, (0,)).tape(1), np.int64), batch, axis=0)
    cache = backend.start(batch)
    if past:
        _, cache = backend.step(cache, ids[:, :past].copy())
    backend.step(cache, ids[:, past : past + new].copy(), count_macs=True, **options)
    return int(backend.macs())


# --- multiply-adds ---
@CONFIGS
@pytest.mark.parametrize("batch", [1, 3])
def test_multiply_adds_under_a_dense_mask_are_those_that_numpy_counts(config: Config, batch: int) -> None:
    backend = NumpyCache(config, weights(config))
    for past, new in STEPS:
        assert multiply_adds(config, past, new, batch, keys=past + new) == count_macs(backend, config, past, new, batch)


@CONFIGS
def test_multiply_adds_with_the_last_logits_alone_are_those_that_numpy_counts(config: Config) -> None:
    backend = NumpyCache(config, weights(config))
    for past, new in STEPS:
        counted = count_macs(backend, config, past, new, 2, last_only=True)
        assert multiply_adds(config, past, new, 2, keys=past + new, last_only=True) == counted


@CONFIGS
def test_multiply_adds_over_all_slots_are_those_that_numpy_counts(config: Config) -> None:
    backend = NumpyStatic(config, weights(config))
    _, cache = backend.step(backend.start(2), np.zeros((2, 5), np.int64))
    backend.step(cache, np.zeros((2, 3), np.int64))
    assert multiply_adds(config, 5, 3, 2, keys=config.capacity) == backend.products


@CONFIGS
@pytest.mark.parametrize("name", ["Eager", "EagerStatic"])
def test_the_decode_steps_of_torch_multiply_what_is_seen_and_nothing_else(config: Config, name: str) -> None:
    pytest.importorskip("torch", reason="its meter is what is compared with")
    from kvconform_backends.torch import eager

    backend = getattr(eager, name)(config, weights(config))
    for past, new in STEPS:
        if new == 1:
            assert multiply_adds(config, past, new, 2) == count_macs(backend, config, past, new, 2)


def test_without_a_window_a_token_sees_as_many_keys_as_a_dense_mask_has() -> None:
    for n in (0, 3, 11):
        assert multiply_adds(GROUPED, n, 1) == multiply_adds(GROUPED, n, 1, keys=n + 1)


def test_a_window_and_causality_bound_what_is_seen() -> None:
    c = WINDOWED
    key = 2 * c.heads * c.head_dim  # multiply-adds of one query with one key and its value
    nothing = multiply_adds(c, 0, 3, keys=0)
    assert multiply_adds(c, 0, 3) - nothing == key * c.layers * (1 + 2 + 3)  # a triangle, not a square
    assert multiply_adds(c, 20, 1) - multiply_adds(c, 20, 1, keys=0) == key * (7 + 21 + 7)


def test_the_cost_of_a_cached_step_is_affine_in_the_depth() -> None:
    for batch in (1, 4):
        steps = [cost(GROUPED, "decode", n, batch) for n in range(1, 39)]
        for counts in ([step.flops for step in steps], [step.bytes for step in steps]):
            growth = {b - a for a, b in pairwise(counts)}
            assert len(growth) == 1
            assert growth.pop() > 0


def test_a_cached_generation_computes_one_query_position_for_each_new_token() -> None:
    class Counted(NumpyCache):
        """Notes how many positions ask in each layer of each step."""

        def attend(self, cache: Any, layer: int, query: Any, key: Any, value: Any) -> Any:
            asked.append(query.shape[2])
            return super().attend(cache, layer, query, key, value)

    asked: list[int] = []
    backend = Counted(GROUPED, weights(GROUPED))
    backend.generate(np.array([[3, 1, 4, 1, 5]]), 6)
    assert asked == [5] * GROUPED.layers + [1] * GROUPED.layers * 5
    # and the meter sees no other product: a step's work is that of one position
    assert count_macs(backend, GROUPED, 8, 1, 1) == cost(GROUPED, "decode", 8).flops // 2


def test_phases_cost_what_their_steps_cost() -> None:
    c, n = GROUPED, 12
    head = c.width * c.vocabulary
    assert cost(c, "prefill", n) == (bytes_min(c, 0, n), 2 * multiply_adds(c, 0, n))
    assert cost(c, "recompute", n).flops == 2 * multiply_adds(c, 0, n + 1)
    assert cost(c, "recompute", n).flops - cost(c, "recompute-last", n).flops == 2 * n * head
    assert cost(c, "recompute", n).bytes == weights_read(c, n + 1, 1)  # keys and values are kept nowhere
    with pytest.raises(ValueError, match="the phase 'generate' is not made of equal steps"):
        cost(c, "generate", n)


# --- bytes ---
@pytest.mark.parametrize("config", [GROUPED, ONE_LAYER], ids=["grouped", "one-layer"])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_decode_step_moves_at_least_the_weights_and_the_cache_that_it_leaves(config: Config, batch: int) -> None:
    held, n = weights(config), 9
    backend = NumpyCache(config, held)
    _, cache = backend.step(backend.start(batch), np.zeros((batch, n), np.int64))
    _, cache = backend.step(cache, np.zeros((batch, 1), np.int64))
    rows = held["embed"][:batch].nbytes + (held["position"][:1].nbytes if "position" in held else 0)
    whole = sum(weight.nbytes for name, weight in held.items() if name not in ("embed", "position"))
    assert cost(config, "decode", n, batch).bytes == whole + rows + backend.bytes(cache)


def test_a_window_bounds_the_cache_that_is_read() -> None:
    c = WINDOWED
    token = 2 * c.kv_heads * c.head_dim * 4
    assert bytes_min(c, 20, 1) - weights_read(c, 1, 1) == token * (7 + 21 + 7)  # 6 cached ones and the new one
    assert bytes_min(c, 4, 1) - weights_read(c, 1, 1) == token * 5 * 3


def test_bytes_are_those_of_the_stored_dtype() -> None:
    assert 2 * bytes_min(replace(GROUPED, dtype="bfloat16"), 9, 1) == bytes_min(GROUPED, 9, 1)


@CONFIGS
def test_concatenation_moves_what_a_concatenating_cache_is_seen_to_move(config: Config) -> None:
    class Watched(NumpyCache):
        """Adds up what each append reads and writes, and what attention then reads that leaves out what is masked."""

        moved = 0

        def append(self, cache: Any, layer: int, key: Any, value: Any) -> tuple[Any, Any]:
            self.moved += cache.keys[layer].nbytes + cache.values[layer].nbytes
            given = super().append(cache, layer, key, value)
            self.moved += cache.keys[layer].nbytes + cache.values[layer].nbytes
            window = self.config.window_of(layer) or self.config.capacity
            self.moved += sum(x[:, :, -window:].nbytes for x in given)
            return given

    backend = Watched(config, weights(config))
    for batch, n in ((1, 4), (3, 20)):
        _, cache = backend.step(backend.start(batch), np.zeros((batch, n), np.int64))
        backend.moved = 0
        backend.step(cache, np.zeros((batch, 1), np.int64))
        assert bytes_expected(config, n, batch, "concatenation") == weights_read(config, 1, batch) + backend.moved


def test_designs_move_what_they_must_and_more() -> None:
    c, n = GROUPED, 30
    token = c.layers * 2 * c.kv_heads * c.head_dim * 4  # bytes, all layers
    least = bytes_min(c, n, 1)
    moved = {design: bytes_expected(c, n, 1, design) for design in DESIGNS}
    assert moved == {
        "in-place": least,
        "capacity": least + (c.capacity - n) * token,
        "concatenation": least + (2 * n + 1) * token,
    }
    assert bytes_expected(c, n, 1, None) is None
    assert bytes_expected(c, n, 1, "of its own") is None


# --- the machine's ceilings ---
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("sizes", [[2], [COLUMNS], [PIECE, 2 * COLUMNS + 6], [COLUMNS - 2]])
def test_each_way_reads_every_number_once(way: str, sizes: list[int]) -> None:
    whole = np.arange(sum(sizes), dtype=np.float32)  # exact: fewer than 2^24
    pieces, start = [], 0
    for size in sizes:
        pieces.append(whole[start : start + size])
        start += size
    read = []
    for left, right in WAYS[way](pieces):
        assert np.isfinite(left @ right).all()
        ours = [x for x in (left, right) if np.shares_memory(x, whole)]
        read += [x.ravel() for x in (ours[:1] if left is right else ours)]
    assert np.array_equal(np.sort(np.concatenate(read)), whole)


def test_ceilings_do_at_least_what_was_asked_and_say_how_much_more() -> None:
    assert [floats(n) for n in (1, 8, 9, 4096)] == [2, 2, 4, 1024]
    assert [products(n) for n in (1, 2 * SIDE**3, 2 * SIDE**3 + 1)] == [1, 1, 2]
    for bytes_, flops in ((1000, 12), (10_000_001, 10**9 + 1)):
        assert excess("read", bytes_, flops) * bytes_ == pytest.approx(4 * floats(bytes_), rel=1e-15)
        assert excess("multiply", bytes_, flops) * flops == pytest.approx(2 * SIDE**3 * products(flops), rel=1e-15)
        assert min(excess("read", bytes_, flops), excess("multiply", bytes_, flops)) >= 1


def test_the_way_of_reading_is_the_fastest_by_its_median() -> None:
    slept = iter([0.03, 0.08, *[0.0] * 99])  # the mean of the passes would say: slow

    def erratic() -> None:
        time.sleep(next(slept))

    assert (
        fastest({"slow": lambda: time.sleep(0.01), "erratic": erratic, "slower": lambda: time.sleep(0.02)}) == "erratic"
    )


def test_a_ceiling_reads_and_multiplies_as_much_as_its_step(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[int] = []
    real = np.matmul
    monkeypatch.setattr(ceilings.np, "matmul", lambda *args, **more: called.append(1) or real(*args, **more))
    for made, wanted in ((Ceiling.of(GROUPED, 9, 2), 1), (Ceiling(100, 5 * SIDE**3), 3)):
        called.clear()
        assert made.way in WAYS
        made.prepare("read")
        made.call("read")
        assert called == []
        made.call("multiply")
        assert len(called) == wanted


def test_reading_more_takes_longer() -> None:
    """64 times the bytes: at the same bandwidth 64 times as long, and a larger size is never read faster for long."""

    def best(bytes_: int) -> int:
        made, taken = Ceiling(bytes_, 1), []
        for _ in range(9):
            began = time.perf_counter_ns()
            made.call("read")
            taken.append(time.perf_counter_ns() - began)
        return min(taken)

    assert best(64 << 20) > 16 * best(1 << 20)


# --- fractions ---
DEPTH, BATCH = 20, 2
LEAST = cost(GROUPED, "decode", DEPTH, BATCH)
ARMS = [Arm("static", "decode"), Arm("grows", "decode"), Arm(MACHINE, "read"), Arm(MACHINE, "multiply")]


SOFTWARE = {
    "static": {"device": "cpu", "runtime_info": {"p": {"cache_design": "in-place"}}},
    "grows": {"device": "cpu"},
}


def timed(ns: dict[int, float], restarts: int = 3, rounds: int = 9, config: Config = GROUPED, **more: Any) -> Record:
    """``ns`` by arm; each round, and each restart more so, is slowed by a factor that all its arms share."""
    noise = np.random.default_rng(5)
    taken = []
    for restart in range(restarts):
        machine = math.exp(noise.normal(0, 0.4))
        for number in range(rounds):
            slowed = machine * math.exp(noise.normal(0, 0.3))
            taken += [
                Round(0, restart, number, place, arm, round(4e3 * value * slowed), 0, 0)
                for place, (arm, value) in enumerate(ns.items())
            ]
    software = more.pop("software", SOFTWARE)
    return Record(
        suite="1",
        started="",
        device="cpu",
        machine={"cores": 2},
        software=software,
        protocol={},
        load=[0.0],
        presets={"p": {"config": config.to_json()}},
        cases=[Case("p", DEPTH, BATCH, ARMS, 4)],
        rounds=taken,
        **more,
    )


def times_of(fraction: float, read: float = 1e6, multiply: float = 1e5) -> dict[int, float]:
    """Nanoseconds a step, by arm: the first arm at this fraction of the floor, the second at half of it."""
    shares = [1 / excess(phase, *LEAST) for phase in ("read", "multiply")]
    floor = max(read * shares[0], multiply * shares[1])
    return {0: floor / fraction, 1: 2 * floor / fraction, 2: read, 3: multiply}


def roofs_of(record: Record) -> list[Roof]:
    """As a summary has them."""
    taken = [times(case, (r for r in record.rounds if r.case == number)) for number, case in enumerate(record.cases)]
    return roofs(record, taken)


def first(record: Record) -> Roof:
    return roofs_of(record)[0]


@pytest.mark.parametrize("fraction", [0.07, 0.7, 1.0])
def test_the_fraction_is_the_floor_over_the_time_whatever_slows_both(fraction: float) -> None:
    static, grows = roofs_of(timed(times_of(fraction)))
    assert (static.case, static.arm, grows.arm) == (0, 0, 1)
    # nanoseconds are whole: a part in 10^5 of the shortest block here
    assert static.fraction == pytest.approx(fraction, rel=1e-5)
    assert grows.fraction == pytest.approx(fraction / 2, rel=1e-5)
    assert static.low is not None
    assert static.high is not None
    assert static.low <= static.fraction <= static.high
    assert math.log(static.high / static.low) < 1e-4  # what slows all arms of a round alike cancels
    assert static.flag == ""


def test_a_roof_tells_what_the_step_needs_and_what_its_design_moves() -> None:
    static, grows = roofs_of(timed(times_of(0.5)))
    for roof in (static, grows):
        assert (roof.bytes_min, roof.flops) == LEAST
    assert static.bytes_expected == bytes_expected(GROUPED, DEPTH, BATCH, "in-place") == LEAST.bytes
    assert grows.bytes_expected is None


def test_the_ceiling_that_takes_longer_is_the_floor() -> None:
    wanted = {"read": 1e6 / excess("read", *LEAST), "multiply": 1e10 / excess("multiply", *LEAST)}
    assert wanted["multiply"] > wanted["read"]
    slow_products = timed(times_of(0.5, multiply=1e10), restarts=2)
    assert first(slow_products).fraction == pytest.approx(0.5, rel=1e-5)
    slow, plain = first(slow_products).floor, first(timed(times_of(0.5), restarts=2)).floor
    assert slow is not None
    assert plain is not None
    ratio = slow / plain
    assert ratio == pytest.approx(wanted["multiply"] / wanted["read"], rel=1e-5)


def test_a_fraction_over_the_ceiling_is_flagged_and_no_number() -> None:
    for fraction, over in ((MAX_ROOFLINE_FRACTION - 0.01, False), (MAX_ROOFLINE_FRACTION + 0.01, True), (1.46, True)):
        roof = first(timed(times_of(fraction)))
        assert (roof.fraction is None) == (roof.low is None) == (roof.high is None) == over
        assert roof.flag.startswith("over the measured ceiling") == over
        assert f"{fraction - 1:.0%}" not in roof.flag


def test_a_fraction_that_is_no_valid_ratio_says_why_instead() -> None:
    def flag(record: Record) -> str:
        roof = first(record)
        assert roof.fraction is None
        return roof.flag

    assert "one start of the workers" in flag(timed(times_of(0.5), restarts=1))
    loaded = timed(times_of(0.5))
    loaded.load.append(9.0)
    assert "the load average was 9.0 on 2 cores" in flag(loaded)
    wavering = timed(times_of(0.5))
    wavering.rounds = [  # in one restart the decode steps are half as slow again, and the machine is not
        msgspec.structs.replace(one, ns=one.ns * 3 // 2) if (one.restart, one.arm) == (1, 0) else one
        for one in wavering.rounds
    ]
    assert f"over {MAX_RATIO_HALF_WIDTH:.0%}" in flag(wavering)
    apart = timed(times_of(0.5))
    apart.rounds = [one for one in apart.rounds if (one.round < 4) == (one.arm == 0)]
    assert flag(apart) == "no round has both the step and its ceiling"


def test_a_ceiling_of_the_processor_in_float32_is_none_of_another_device_or_dtype() -> None:
    on_gpu = {"static": {"device": "cuda"}, "grows": {"device": "cpu"}}
    static, grows = roofs_of(timed(times_of(0.5), software=on_gpu))
    assert (static.fraction, static.floor, grows.flag) == (None, None, "")
    assert grows.floor is not None
    assert "it ran on cuda" in static.flag
    half = replace(GROUPED, dtype="bfloat16")
    assert "not of bfloat16" in first(timed(times_of(0.5, multiply=1e10), config=half)).flag
    assert first(timed(times_of(0.5), config=half)).flag == ""  # reading binds, and a byte is a byte


def test_without_both_ceilings_there_is_no_roof() -> None:
    for missing in (2, 3):
        some = {arm: ns for arm, ns in times_of(0.5).items() if arm != missing}
        assert roofs_of(timed(some)) == []
