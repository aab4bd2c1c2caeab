"""Correct arithmetic stays inside the bounds; wrong arithmetic does not."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from kvconform_backends.numpy_cache import NumpyCache
from kvconform_specs import bounds
from kvconform_specs.config import Config
from kvconform_specs.definition import attention, decoder
from kvconform_specs.oracle import expect
from kvconform_specs.points import POINTS, point
from kvconform_specs.program import Append, Program
from kvconform_specs.tensors import Streams, rounded, weights

VARIANTS = tuple(range(40))


def outputs(config: Config, count: int, scale_error: float = 0.0, drop: int | None = None) -> np.ndarray:
    """Float32 attention over ``count`` tokens, inputs and result in the config's dtype: ``(n, 1, t, h * d)``."""
    query, keys, values = Streams(config, count, VARIANTS).split(Streams(config, count, VARIANTS).tape(4))
    subject = NumpyCache(replace(config, scale=config.score_scale * (1 + scale_error), dtype="float32"), {})
    if drop is not None:
        keys = keys.copy()
        keys[:, :, drop] = keys[:, :, drop - 1]
    made, _ = subject.step(subject.start(len(VARIANTS)), query, keys, values)
    return rounded(made, config.dtype).swapaxes(1, 2).reshape(len(VARIANTS), 1, count, -1)


def ratio(config: Config, count: int, got: np.ndarray) -> np.ndarray:
    """Largest error over bound of each variant."""
    want = expect(Program(config, (Append("a", (count,), 4),)), VARIANTS)[0]
    assert want is not None
    return np.max(np.abs(got - want.value) / want.bound, axis=(1, 2, 3))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", [name for name, c in POINTS.items() if c.profile == "attention"])
def test_correct_attention_stays_inside(name: str, dtype: str) -> None:
    config = point(name, dtype)
    assert np.all(ratio(config, 30, outputs(config, 30)) < 1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("fault", "value"), [("scale_error", 0.01), ("drop", 20)])
def test_a_scale_that_is_one_percent_off_and_a_stale_key_are_outside(dtype: str, fault: str, value: float) -> None:
    config = point("attention-gqa", dtype)
    caught = ratio(config, 30, outputs(config, 30, **{fault: value})) > 1  # type: ignore[arg-type]
    assert np.mean(caught) > 0.95


def test_keys_kept_in_bfloat16_are_outside_a_float32_claim() -> None:
    config = POINTS["attention-gqa"]
    rough = outputs(point("attention-gqa", "bfloat16"), 30)
    assert np.all(ratio(config, 30, rough) > 1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", [name for name, c in POINTS.items() if c.profile == "decoder"])
def test_the_decoder_with_its_noise_stays_inside_and_a_dropped_token_does_not(name: str, dtype: str) -> None:
    """Noise of other seeds than the bound's own plays the correct implementation."""
    config = point(name, dtype)
    tokens = Streams(config, 12, VARIANTS).tape(4)
    exact = {key: value.astype(np.float64) for key, value in weights(config).items()}
    want = expect(Program(config, (Append("a", (12,), 4),)), VARIANTS)[0]
    assert want is not None
    value, bound = want.value[:, 0], want.bound[:, 0]
    noisy = bounds.Noisy(bounds.STORAGE[dtype], seed=999)
    stray = (decoder(tokens, bounds.single(exact), config, how=noisy) - value) / noisy.gain
    assert np.all(np.abs(stray) <= bound)
    dropped = decoder(np.delete(tokens, -2, axis=1), exact, config)[:, -1:]
    caught = np.max(np.abs(dropped - value[:, -1:]) / bound[:, -1:], axis=(1, 2)) > 1
    assert np.mean(caught) > (0.95 if dtype == "float32" else 0.5)


def test_a_softmax_weight_of_one_percent_wrong_is_outside_in_every_position() -> None:
    config = POINTS["attention-gqa"]
    query, keys, values = (np.float64(p) for p in Streams(config, 20, (0,)).split(Streams(config, 20, (0,)).tape(4)))
    attended = attention(query, keys, values, config)
    bound = bounds.attention_bound(query, keys, values, attended, config)
    assert np.all(np.max(np.abs(0.01 * attended.output) / bound, axis=-1) > 1)


def _inside(c: float) -> float:
    """P(|t_8| < c)."""
    theta = math.atan(c / math.sqrt(bounds.RUNS))
    cos2 = math.cos(theta) ** 2
    return math.sin(theta) * (1 + cos2 / 2 + 3 * cos2**2 / 8 + 15 * cos2**3 / 48)


def test_c_is_the_stated_quantile_of_student_t() -> None:
    """P(|t_8| > C) for 8 degrees of freedom, in closed form (Abramowitz & Stegun 26.7.4)."""
    inside = _inside(bounds.C)
    assert bounds.RUNS == 8
    assert 1 - inside == pytest.approx(bounds.FALSE_ALARM, rel=0.05)


@pytest.mark.parametrize("name", [name for name, c in POINTS.items() if c.profile == "decoder"])
def test_no_logit_strays_much_more_than_its_position(name: str) -> None:
    """What the pooled sigma takes for granted, measured with many more runs than the bound has."""
    config = POINTS[name]
    tokens = Streams(config, 12, (0,)).tape(4)
    exact = {key: value.astype(np.float64) for key, value in weights(config).items()}
    noisy = bounds.Noisy(bounds.STORAGE["float32"], seed=5)
    runs = np.stack([decoder(tokens, bounds.single(exact), config, how=noisy) for _ in range(400)])
    each = np.mean(np.square(runs - decoder(tokens, exact, config)), axis=0)  # (1, t, V)
    spread = np.sqrt(each.max(axis=-1) / each.mean(axis=-1)).max()
    assert 1 < spread < bounds.SPREAD


def test_what_is_left_for_a_logit_of_the_largest_spread_is_as_stated() -> None:
    assert 1 - _inside(bounds.C / bounds.SPREAD) == pytest.approx(2e-6, rel=0.5)
    assert "2e-6" in (bounds.__doc__ or "")
