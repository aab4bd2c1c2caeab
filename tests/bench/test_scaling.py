"""Exponents: slopes over the last octaves, and what the formulas expect there."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import msgspec
import numpy as np
import pytest

from kvconform.bench.analysis.intervals import student
from kvconform.bench.analysis.scaling import expected, last_octaves, slope
from kvconform.bench.analysis.summarize import summarise
from kvconform.bench.costs import cost
from kvconform.bench.record import MACHINE, Arm, Case, Exponent, Record, Round
from kvconform.bench.worker.ceilings import excess
from kvconform_specs.config import Config
from kvconform_specs.costs import multiply_adds

SHAPE = Config(
    "decoder",
    heads=4,
    kv_heads=2,
    head_dim=32,
    layers=2,
    width=64,
    mlp=128,
    vocabulary=256,
    positions="rope",
    capacity=4104,
)
DEPTHS = (64, 128, 256, 512)
BYTES_ALONE = (1.0, 0.0)

Times = dict[Arm, Callable[[int], float]]
"""Nanoseconds of an arm at a depth."""


def timed(arms: Times, depths: Sequence[int] = DEPTHS, restarts: int = 3, batch: int = 1) -> Record:
    """One case for each depth. What slows a round slows its arms alike, and half the rounds are slowed, half hastened
    by as much, so that medians stay."""
    record = Record(
        suite="1",
        started="",
        device="cpu",
        machine={"cores": 2},
        software={},
        protocol={},
        load=[0.0],
        presets={"p": {"config": SHAPE.to_json()}},
    )
    for number, depth in enumerate(depths):
        record.cases.append(Case("p", depth, batch, list(arms), 1))
        for restart in range(restarts):
            for shift in (-3, -2, -1, 0, 1, 2, 3):
                for index, ns in enumerate(arms.values()):
                    value = round(1e3 * ns(depth) * math.exp(0.1 * shift))
                    record.rounds.append(Round(number, restart, shift + 3, index, index, value, 0, 0))
    return record


def append(record: Record, more: Record) -> None:
    """Its cases and rounds, behind those that are there."""
    begins = len(record.cases)
    record.cases += more.cases
    record.rounds += [msgspec.structs.replace(one, case=one.case + begins) for one in more.rounds]


def found(record: Record) -> dict[tuple[str, str], Exponent]:
    summarise(record)
    return {(one.backend, one.phase): one for one in record.exponents}


def power(exponent: float, factor: float = 1e5) -> Callable[[int], float]:
    return lambda n: factor * n**exponent


# --- slopes ---
def test_the_slope_of_a_power_law_is_its_exponent() -> None:
    for exponent in (-0.5, 0.0, 0.77, 2.0):
        assert slope(DEPTHS, [3.0 * n**exponent for n in DEPTHS]) == pytest.approx(exponent, abs=1e-12)


def test_the_slope_is_that_of_least_squares() -> None:
    x, y = np.log(DEPTHS), [1.0, 5.0, 2.0, 9.0]
    assert slope(DEPTHS, y) == pytest.approx(float(np.polyfit(x, np.log(y), 1)[0]), rel=1e-12)


def test_the_last_two_octaves_reach_from_the_greatest_depth_to_a_fourth_of_it() -> None:
    assert last_octaves([512, 64, 128, 256]) == [128, 256, 512]
    assert last_octaves([128, 192, 255]) == [128, 192, 255]
    assert last_octaves([63, 64, 127, 256]) == [64, 127, 256]


def test_fewer_than_three_depths_in_them_have_no_exponent() -> None:
    assert last_octaves([128, 192]) == []
    assert last_octaves([4, 8, 200, 400]) == []
    assert found(timed({Arm("a", "decode"): power(1)}, depths=(256, 512))) == {}


# --- exponents of a record ---
def test_planted_exponents_come_back_and_the_ratio_has_their_difference() -> None:
    decode, recompute, last = Arm("a", "decode"), Arm("a", "recompute"), Arm("a", "recompute-last")
    seen = found(timed({decode: power(0.77), recompute: power(1.85), last: power(1.8), Arm("b", "decode"): power(1)}))
    # nanoseconds are whole: less than a part in 10^6 of these times
    wanted = {
        ("a", "decode"): 0.77,
        ("a", "recompute"): 1.85,
        ("a", "recompute-last"): 1.8,
        ("b", "decode"): 1.0,
        ("a", "ratio"): 1.85 - 0.77,
        ("a", "ratio-last"): 1.8 - 0.77,
    }
    assert {key: one.exponent for key, one in seen.items()} == pytest.approx(wanted, abs=1e-6)
    assert all(one.depths == [128, 256, 512] for one in seen.values())
    for ratio, over in (("ratio", "recompute"), ("ratio-last", "recompute-last")):
        wanted_of_ratio = seen["a", over].expected - seen["a", "decode"].expected
        assert seen["a", ratio].expected == pytest.approx(wanted_of_ratio, abs=1e-12)


def test_a_depth_that_two_cases_time_is_taken_from_the_one_with_more_blocks() -> None:
    record = timed({Arm("a", "decode"): power(0.5)})
    short = timed({Arm("a", "decode"): power(2.0), Arm("b", "decode"): power(1.0)}, restarts=2)
    append(record, short)
    seen = found(record)
    assert seen["a", "decode"].exponent == pytest.approx(0.5, abs=1e-6)
    assert seen["b", "decode"].exponent == pytest.approx(1.0, abs=1e-6)


def test_batches_have_exponents_of_their_own_and_the_machine_has_none() -> None:
    record = timed({Arm("a", "decode"): power(0.5), Arm(MACHINE, "read"): power(1), Arm(MACHINE, "multiply"): power(0)})
    wide = timed({Arm("a", "decode"): power(0.9)}, batch=4)
    append(record, wide)
    summarise(record)
    assert [(one.backend, one.batch, round(one.exponent, 6)) for one in record.exponents] == [
        ("a", 1, 0.5),
        ("a", 4, 0.9),
    ]


def test_the_interval_of_an_exponent_is_that_of_the_slopes_of_its_restarts() -> None:
    slopes = (0.5, 0.6, 0.9)
    record = timed({Arm("a", "decode"): power(0.5), Arm("a", "recompute"): power(1.5)}, restarts=1)
    for number, exponent in enumerate(slopes[1:], start=1):
        more = timed({Arm("a", "decode"): power(exponent), Arm("a", "recompute"): power(1.5)}, restarts=1)
        record.rounds += [msgspec.structs.replace(one, restart=number) for one in more.rounds]
    seen = found(record)
    for phase, values in (("decode", slopes), ("ratio", [1.5 - one for one in slopes])):
        one = seen["a", phase]
        assert (one.exponent, one.low, one.high) == pytest.approx(student(values), abs=1e-5)


def test_one_restart_has_an_exponent_without_an_interval() -> None:
    one = found(timed({Arm("a", "decode"): power(0.5)}, restarts=1))["a", "decode"]
    assert one.exponent == pytest.approx(0.5, abs=1e-6)
    assert one.low is None is one.high


def test_a_restart_that_lacks_a_depth_has_no_slope() -> None:
    record = timed({Arm("a", "decode"): power(0.5)}, restarts=2)
    record.rounds = [one for one in record.rounds if (one.case, one.restart) != (3, 1)]
    one = found(record)["a", "decode"]
    assert (one.exponent, one.low) == (pytest.approx(0.5, abs=1e-6), None)


# --- what is expected ---
def test_a_recompute_is_expected_between_linear_and_quadratic_and_grows_quadratic() -> None:
    slopes = [expected(SHAPE, "recompute", [n, 2 * n, 4 * n], 1, BYTES_ALONE) for n in (16, 256, 4096, 2**20)]
    assert slopes == sorted(slopes)
    # at 16 tokens n + 1 on n costs 1 / 33 of the slope, more than attention adds
    assert all(0.95 < one < 2 for one in slopes)
    assert slopes[-1] == pytest.approx(2, abs=0.01)


def test_a_decode_is_expected_between_constant_and_linear_and_grows_linear() -> None:
    for rates in (BYTES_ALONE, (0.0, 1.0)):
        slopes = [expected(SHAPE, "decode", [n, 2 * n, 4 * n], 1, rates) for n in (16, 256, 4096, 2**20)]
        assert slopes == sorted(slopes)
        assert all(0 < one < 1 for one in slopes)
        assert slopes[-1] == pytest.approx(1, abs=0.01)


def test_with_a_window_a_decode_deeper_than_it_is_expected_to_cost_the_same() -> None:
    assert expected(replace(SHAPE, window=32), "decode", (64, 128, 256), 1, BYTES_ALONE) == pytest.approx(0, abs=1e-12)


def test_a_step_that_takes_what_its_formula_says_has_the_expected_exponent() -> None:
    """Reading binds in one record and multiplying in the other; the machine's arms do more by ``excess``."""
    for byte, flop in ((1.0, 0.2), (1e-3, 1.0)):  # 0.2: what is done in excess would bind if it counted

        def floor(n: int, byte: float = byte, flop: float = flop) -> float:
            step = cost(SHAPE, "decode", n)
            return max(step.bytes * byte, step.flops * flop)

        def machine(phase: str, byte: float = byte, flop: float = flop) -> Callable[[int], float]:
            def ns(n: int) -> float:
                step = cost(SHAPE, "decode", n)
                amount = step.bytes * byte if phase == "read" else step.flops * flop
                return amount * excess(phase, *step)

            return ns

        seen = found(
            timed(
                {
                    Arm("a", "decode"): floor,
                    Arm("a", "recompute"): lambda n: float(multiply_adds(SHAPE, 0, n + 1, keys=n + 1)),
                    Arm(MACHINE, "read"): machine("read"),
                    Arm(MACHINE, "multiply"): machine("multiply"),
                }
            )
        )
        for one in seen.values():
            assert one.exponent == pytest.approx(one.expected, abs=1e-6)


def test_ceilings_of_the_processor_expect_nothing_of_another_device() -> None:
    record = timed(
        {Arm("a", "decode"): power(0.5), Arm(MACHINE, "read"): power(0.0), Arm(MACHINE, "multiply"): power(0.0, 1e9)}
    )
    on_cpu = found(record)["a", "decode"].expected
    record.device = "cuda"
    on_gpu = found(record)["a", "decode"]
    assert on_gpu.expected == pytest.approx(expected(SHAPE, "decode", on_gpu.depths, 1, BYTES_ALONE))
    assert on_cpu != pytest.approx(on_gpu.expected)


def test_bandwidth_and_peak_are_those_of_the_batch_and_the_means_of_its_depths() -> None:
    """Bytes bind at the mean bandwidth and not at that of the first depth, nor among another batch's ceilings."""

    def machine(phase: str, rates: dict[int, float], batch: int) -> Callable[[int], float]:
        def ns(n: int) -> float:
            step = cost(SHAPE, "decode", n, batch)
            return (step.bytes if phase == "read" else step.flops) * rates[n] * excess(phase, *step)

        return ns

    growing = {128: 1.0, 256: 4.0, 512: 16.0}
    flat, slow = dict.fromkeys(growing, 4.0), dict.fromkeys(growing, 4000.0)
    record = timed(
        {
            Arm("a", "decode"): power(0.5),
            Arm(MACHINE, "read"): machine("read", growing, 1),
            Arm(MACHINE, "multiply"): machine("multiply", flat, 1),
        },
        depths=tuple(growing),
    )
    append(
        record,
        timed(
            {Arm(MACHINE, "read"): machine("read", flat, 4), Arm(MACHINE, "multiply"): machine("multiply", slow, 4)},
            depths=tuple(growing),
            batch=4,
        ),
    )
    of_bytes = expected(SHAPE, "decode", (128, 256, 512), 1, BYTES_ALONE)
    assert found(record)["a", "decode"].expected == pytest.approx(of_bytes, abs=1e-12)


def test_the_expected_decode_is_of_the_ceiling_that_binds_and_of_bytes_where_none_was_measured() -> None:
    decode = Arm("a", "decode")
    slow_reads = {Arm(MACHINE, "read"): power(0, 1e6), Arm(MACHINE, "multiply"): power(0, 1e0)}
    slow_products = {Arm(MACHINE, "read"): power(0, 1e0), Arm(MACHINE, "multiply"): power(0, 1e6)}
    kept = [128, 256, 512]
    of_bytes, of_flops = (expected(SHAPE, "decode", kept, 1, rates) for rates in (BYTES_ALONE, (0.0, 1.0)))
    assert of_flops - of_bytes > 0.1  # grouped heads: two query heads multiply with one KV head that is read
    for ceilings, wanted in (({}, of_bytes), (slow_reads, of_bytes), (slow_products, of_flops)):
        seen = found(timed({decode: power(0.5), **ceilings}))
        assert seen["a", "decode"].expected == pytest.approx(wanted, abs=1e-12)
