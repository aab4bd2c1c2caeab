"""Correct arithmetic stays inside the bounds; wrong arithmetic does not."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest
from lanes import slow_except

from kvconform_specs.claims import Precision
from kvconform_specs.config import Config
from kvconform_specs.configs import CONFIGS, config_named
from kvconform_specs.program import Append, Program
from kvconform_specs.quantisers import Quantiser
from kvconform_specs.reference import bounds
from kvconform_specs.reference.definition import attention, decoder, expand, sinks, slopes
from kvconform_specs.reference.oracle import expect
from kvconform_specs.reference.quantisation import quantisation_error
from kvconform_specs.tensors import NEEDLE_SCORE, Streams, rounded, weights

Array = np.ndarray
VARIANTS = tuple(range(40))
DRAWS, CASES = 50, 200
"""So many draws of sizes and semantics with so many cases each: 10 000 for each arithmetic."""


@dataclass(frozen=True)
class Problem:
    """``n`` cases of one size: queries ``(n, h, t, d)`` at the end of ``(n, g, s, d)`` keys and values, as float32."""

    config: Config
    query: Array
    keys: Array
    values: Array
    mute: bool = False

    def ratio(self, got: Array, precision: Precision = Precision(), exact_from: int | None = None) -> Array:  # noqa: B008
        """Largest error over bound of each case; NaN where ``got`` is."""
        exact = [x.astype(np.float64) for x in (self.query, self.keys, self.values)]
        attended = attention(*exact, self.config)
        bound = bounds.attention_bound(
            *exact, attended, self.config, precision, biased=self.mute, exact_from=exact_from
        )
        return np.max(np.abs(got - attended.output) / bound, axis=(1, 2, 3))


def problem(rng: np.random.Generator, config: Config, n: int, t: int, s: int, distribution: str = "normal") -> Problem:
    sizes = ((config.heads, t), (config.kv_heads, s), (config.kv_heads, s))
    query, keys, values = (rng.standard_normal((n, heads, m, config.head_dim)) for heads, m in sizes)
    if distribution == "large_queries":
        query *= 64
    elif distribution == "zero_keys":
        keys *= 0
    elif distribution == "small_keys_large_values":
        keys, values = keys / 4, values * 16
    return Problem(config, *(rounded(x, config.dtype) for x in (query, keys, values)), distribution == "zero_keys")


def problems(dtype: str, seed: int) -> Iterator[Problem]:
    """``DRAWS`` problems of drawn sizes, semantics and distribution."""
    rng = np.random.default_rng(seed)
    for _ in range(DRAWS):
        kv_heads, group = rng.integers(1, 3, 2)
        config = Config(
            "attention",
            heads=int(kv_heads * group),
            kv_heads=int(kv_heads),
            capacity=400,
            head_dim=int(rng.choice((1, 2, 4, 7, 8, 16, 33, 64))),
            dtype=dtype,
            window=[None, 1, 5, 64][rng.integers(4)],
            softcap=[None, None, 1.5, 30.0][rng.integers(4)],
            sink=[None, None, 1.0, -3.0][rng.integers(4)],
            scale=[None, None, 0.37, 1.0][rng.integers(4)],
            positions=["none", "none", "alibi"][rng.integers(3)],
        )
        s = int(rng.choice((1, 2, 3, 9, 30, 100, 300)))
        distribution = ("normal", "normal", "large_queries", "zero_keys", "small_keys_large_values")[rng.integers(5)]
        yield problem(rng, config, CASES, min(s, int(rng.integers(1, 3))), s, distribution)


def computed(
    p: Problem, scores_in: str = "float32", weights_in: str | None = None, operands: bool = False, ordered: bool = False
) -> Array:
    """Attention in float32 whose intermediates are rounded to a dtype, as an implementation does it.

    operands: the scale is on query and key, its root on each. ordered: sums over keys one term after another, the
    order with the largest error.
    """
    c, f = p.config, np.float32
    keys, values = expand(p.keys, c.group), expand(p.values, c.group)
    (t, s), query = (p.query.shape[-2], keys.shape[-2]), p.query

    def stored(x: Array) -> Array:
        return rounded(x, scores_in)

    if operands:
        root = f(math.sqrt(c.score_scale))
        scores = stored(stored(query * root) @ stored(keys * root).swapaxes(-1, -2))
    else:
        scores = stored(stored(query @ keys.swapaxes(-1, -2)) * f(c.score_scale))
    if c.softcap is not None:
        scores = stored(f(c.softcap) * stored(np.tanh(stored(scores / f(c.softcap)))))
    i, j = np.arange(s - t, s)[:, None], np.arange(s)
    if c.positions == "alibi":
        scores = stored(scores + stored(stored(slopes(c.heads).astype(f))[:, None, None] * (j - i).astype(f)))
    scores = np.where((j <= i) & (i - j < (c.window or s + 1)), scores, f(-np.inf))
    top = scores.max(axis=-1, keepdims=True)
    sink = stored(sinks(c).astype(f))
    if c.sink is not None:
        top = np.maximum(top, sink)
    powers = stored(np.exp(stored(scores - top)))
    total = np.cumsum(powers, axis=-1)[..., -1:] if ordered else powers.sum(axis=-1, keepdims=True)
    if c.sink is not None:
        total = total + stored(np.exp(stored(sink - top)))
    probabilities = rounded(powers / total, weights_in or c.dtype)
    if not ordered:
        return rounded(probabilities @ values, c.dtype)
    made = np.zeros(p.query.shape, f)
    for k in range(s):
        made += probabilities[..., k : k + 1] * values[..., k : k + 1, :]
    return rounded(made, c.dtype)


def quantised(x: Array, bits: int, dtype: str, factor: float = 1.0) -> Array:
    """What is read back of ``x`` from integers with one absmax scale a token and head."""
    most = np.float32(2 ** (bits - 1) - 1)
    step = np.abs(x).max(axis=-1, keepdims=True) / most * np.float32(factor)
    step = np.where(step == 0, np.float32(1), step)
    return rounded(np.clip(np.rint(x / step), -most, most) * step, dtype)


@pytest.mark.parametrize(
    ("dtype", "ordered"),
    slow_except([("bfloat16", False), ("float32", False), ("float32", True), ("float16", False)], 4),
)
def test_scores_and_weights_in_float32_stay_inside(dtype: str, ordered: bool) -> None:
    for p in problems(dtype, seed=1):
        assert np.all(p.ratio(computed(p, ordered=ordered)) <= 1)


@pytest.mark.parametrize("operands", [False, True])
@pytest.mark.parametrize("dtype", slow_except(["bfloat16", "float16"], 2))
def test_intermediates_in_storage_stay_inside_their_claim(dtype: str, operands: bool) -> None:
    for p in problems(dtype, seed=2):
        assert np.all(p.ratio(computed(p, scores_in=dtype, operands=operands), Precision("storage")) <= 1)


@pytest.mark.parametrize("dtype", slow_except(["float32", "bfloat16", "float16"], 3))
@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_cache_stays_inside_its_claim(bits: int, dtype: str) -> None:
    rng = np.random.default_rng(3)
    for p in problems(dtype, seed=3):
        exact_from = int(rng.integers(-1, p.keys.shape[-2] + 1))
        exact = np.arange(p.keys.shape[-2])[:, None] >= exact_from
        keys, values = (np.where(exact, x, quantised(x, bits, dtype)) for x in (p.keys, p.values))
        stored = replace(p, keys=keys, values=values)
        assert np.all(p.ratio(computed(stored), Precision(kv_bits=bits), exact_from) <= 1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_torch_stays_inside(dtype: str) -> None:
    """PyTorch's own kernels: the fused one keeps its scores in float32, the math path may store them."""
    torch = pytest.importorskip("torch")
    from torch.nn.attention import SDPBackend, sdpa_kernel

    rng = np.random.default_rng(4)
    for distribution in ("normal", "large_queries", "zero_keys", "small_keys_large_values"):
        p = problem(rng, config_named("attention-gqa", dtype), CASES, 30, 30, distribution)
        arrays = (p.query, expand(p.keys, 2), expand(p.values, 2))
        parts = [torch.from_numpy(np.array(x)).to(getattr(torch, dtype)) for x in arrays]
        for kernel, claim in ((SDPBackend.FLASH_ATTENTION, Precision()), (SDPBackend.MATH, Precision("storage"))):
            with sdpa_kernel(kernel):
                got = torch.nn.functional.scaled_dot_product_attention(*parts, is_causal=True)
            assert np.all(p.ratio(got.to(torch.float32).numpy(), claim) <= 1)


def growing(dtype: str, distribution: str = "normal", seed: int = 5) -> Problem:
    """``CASES`` cases of 30 tokens each, the queries of all of them."""
    return problem(np.random.default_rng(seed), config_named("attention-gqa", dtype), CASES, 30, 30, distribution)


@pytest.mark.parametrize("distribution", ["normal", "large_queries"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_scale_that_is_one_percent_off_is_outside(dtype: str, distribution: str) -> None:
    p = growing(dtype, distribution)
    wrong = replace(p, config=replace(p.config, scale=p.config.score_scale * 1.01))
    assert np.mean(p.ratio(computed(wrong)) > 1) >= 0.99


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_one_dropped_token_of_4096_is_outside(dtype: str) -> None:
    """A needle points at it: every query's score with its key is ``NEEDLE_SCORE``."""
    config = replace(config_named("attention-long", dtype), head_dim=32)  # in few dimensions other keys score as high
    p = problem(np.random.default_rng(6), config, 20, 1, 4096)
    place = 1234
    key = p.keys[:, :, place : place + 1]
    needle = key * np.float32(NEEDLE_SCORE / config.score_scale) / np.sum(key * key, axis=-1, keepdims=True)
    aimed = replace(p, query=rounded(np.broadcast_to(needle, p.query.shape), dtype))
    dropped = replace(aimed, keys=np.delete(p.keys, place, axis=2), values=np.delete(p.values, place, axis=2))
    assert np.all(aimed.ratio(computed(aimed)) <= 1)
    assert np.mean(aimed.ratio(computed(dropped)) > 1) >= 0.99


@pytest.mark.parametrize("distribution", ["normal", "large_queries"])
def test_keys_kept_in_bfloat16_are_outside_a_float32_claim(distribution: str) -> None:
    p = growing("float32", distribution)
    assert np.mean(p.ratio(computed(replace(p, keys=rounded(p.keys, "bfloat16")))) > 1) >= 0.99


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_softmax_in_bfloat16_is_outside_where_intermediates_are_claimed_single(dtype: str) -> None:
    p = growing(dtype, "large_queries")
    rough = computed(p, scores_in="bfloat16", weights_in="bfloat16")
    assert np.mean(p.ratio(rough) > 1) >= 0.99
    if dtype == "bfloat16":
        assert np.all(p.ratio(rough, Precision("storage")) <= 1)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("distribution", ["normal", "large_queries"])
def test_a_quantisation_step_twice_too_large_is_outside(bits: int, distribution: str) -> None:
    p = growing("float32", distribution)
    coarse = replace(p, keys=quantised(p.keys, bits, "float32", 2.0), values=quantised(p.values, bits, "float32", 2.0))
    assert np.mean(p.ratio(computed(coarse), Precision(kv_bits=bits)) > 1) >= 0.99


@pytest.mark.parametrize("exact_from", [20, None])
def test_a_residual_window_is_exact(exact_from: int | None) -> None:
    """Quantising every token is outside where the newest are claimed exact, and inside where they are not."""
    p = replace(growing("float32"), query=growing("float32").query[:, :, -1:])
    rough = computed(replace(p, keys=quantised(p.keys, 4, "float32"), values=quantised(p.values, 4, "float32")))
    inside = p.ratio(rough, Precision(kv_bits=4), exact_from) <= 1
    assert np.all(inside) if exact_from is None else p.ratio(rough, Precision(kv_bits=4), 0).min() > 1


def test_nan_is_outside() -> None:
    p = growing("float32")
    got = computed(p)
    got[:, 0, 3, 0] = np.nan
    assert not np.any(p.ratio(got) <= 1)


def test_a_row_that_sees_nothing_has_no_tolerance() -> None:
    config = replace(CONFIGS["attention-sink"], positions="alibi")
    p = problem(np.random.default_rng(7), config, 3, 4, 9)
    exact = [x.astype(np.float64) for x in (p.query, p.keys, p.values)]
    mask = np.ones((3, 1, 4, 9), bool)
    mask[1, :, 2] = False
    attended = attention(*exact, config, mask=mask)
    for precision in (Precision(), Precision("storage", kv_bits=4)):
        bound = bounds.attention_bound(*exact, attended, config, precision)
        assert np.all(bound[1, :, 2] == 0)
        assert np.count_nonzero(bound == 0) == config.heads * config.head_dim


def test_weights_that_cannot_stray_do_not() -> None:
    """The first token sees itself alone: however rough its score, its weight is 1."""
    p = growing("float32", "large_queries")
    exact = [x.astype(np.float64) for x in (p.query, p.keys, p.values)]
    bound = bounds.attention_bound(*exact, attention(*exact, p.config), p.config, Precision("storage", kv_bits=4))
    values = expand(np.abs(exact[2]), p.config.group)[:, :, 0]
    assert np.all(bound[:, :, 0] < values.max(axis=-1, keepdims=True) / 7 / 2 + 20 * 2.0**-24 * values.max())


def test_a_hopeless_row_may_be_any_mean_of_values_and_no_more() -> None:
    p = growing("float32", "large_queries")
    p = replace(p, query=p.query * 64)
    exact = [x.astype(np.float64) for x in (p.query, p.keys, p.values)]
    attended = attention(*exact, p.config)
    bound = bounds.attention_bound(*exact, attended, p.config, Precision(kv_bits=2))
    values = expand(np.abs(exact[2]), p.config.group)
    most = np.abs(attended.output) + values.max(axis=-2, keepdims=True) * 3
    assert np.all(bound <= most)
    assert np.all(np.isfinite(bound))


def test_blocks_of_rows_have_the_bounds_of_the_whole() -> None:
    p = growing("float32")
    exact = [x.astype(np.float64) for x in (p.query, p.keys, p.values)]
    whole = bounds.attention_bound(*exact, attention(*exact, p.config), p.config)
    for at in (0, 7, 20):
        part = exact[0][:, :, at : at + 10]
        block = bounds.attention_bound(part, *exact[1:], attention(part, *exact[1:], p.config, at=at), p.config)
        assert np.allclose(block, whole[:, :, at : at + 10], rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", [name for name, c in CONFIGS.items() if c.profile == "decoder"])
def test_the_decoder_with_its_noise_stays_inside_and_a_dropped_token_does_not(name: str, dtype: str) -> None:
    """Noise of other seeds than the bound's own plays the correct implementation."""
    config = config_named(name, dtype)
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


@pytest.mark.parametrize("name", ["decoder-rope", "decoder-learned", "decoder-latent"])
def test_noisy_runs_at_once_are_as_independent_as_one_after_another(name: str) -> None:
    config, runs = CONFIGS[name], 6
    tokens = Streams(config, 20, VARIANTS).tape(4)[:, None]  # (n, rows, s)
    exact = {key: value.astype(np.float64) for key, value in weights(config).items()}
    value, rough = decoder(tokens, exact, config), bounds.single(exact)
    noise = bounds.Noisy(bounds.STORAGE["float32"], seed=8)
    alone = np.stack([decoder(tokens, rough, config, how=noise) for _ in range(runs)]) - value
    at_once = decoder(np.broadcast_to(tokens, (runs, *tokens.shape)), rough, config, how=noise.of(runs)) - value
    assert np.std(at_once) == pytest.approx(np.std(alone), rel=0.1)
    for strays in (alone, at_once):
        alike = np.corrcoef(strays.reshape(runs, -1))[np.triu_indices(runs, 1)]
        assert abs(np.mean(alike)) < 0.1


def test_angles_of_noisy_runs_differ_by_run_alone() -> None:
    angles = bounds.Noisy(2.0**-13, seed=1).of(3).angles(np.arange(1, 6), np.array([1.0, 0.1]))
    assert angles.shape == (3, 1, 1, 1, 5, 2)
    assert all(np.all(one != other) for one, other in ((angles[0], angles[1]), (angles[1], angles[2])))


@pytest.mark.parametrize(
    "precision",
    [
        Precision(kv_bits=8),
        Precision(kv_bits=8, residual=3),
        Precision(kv_bits=4, quantiser=Quantiser(keys="channel", group=4, zero_point="minimum")),
        Precision(kv_bits=8, quantiser=Quantiser("float8_e4m3")),
        Precision(cache_dtype="bfloat16"),
    ],
    ids=str,
)
def test_the_noise_of_a_lossy_cache_is_as_large_as_the_error_of_each_number(precision: Precision) -> None:
    x = np.random.default_rng(0).normal(size=(64, 2, 10, 8)).astype(np.float32)
    exact_from = 10 - precision.residual if precision.residual else None
    for part in ("keys", "values"):
        noise = bounds.Noisy(2.0**-24, seed=1, cache=bounds.lossy(CONFIGS["decoder-rope"], precision))
        off = np.abs(noise.cached(x, part).astype(np.float64) - x) / noise.gain
        largest = quantisation_error(x.astype(np.float64), precision, part=part, exact_from=exact_from)
        assert np.all(off <= largest * 1.001 + 1e-7)
        assert np.all(off[largest == 0] == 0)
        lossy = largest > 0
        assert np.mean((off[lossy] / largest[lossy]) ** 2) == pytest.approx(1 / 3, rel=0.1)


def test_a_cache_that_keeps_what_it_is_given_has_no_noise() -> None:
    config = CONFIGS["decoder-rope"]
    assert bounds.lossy(config, Precision()) is bounds.lossy(config, Precision(cache_dtype="float32")) is None
    x = np.ones((1, 2, 3, 4), np.float32)
    assert bounds.Noisy(2.0**-24, seed=1).cached(x, "keys") is x


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


@pytest.mark.parametrize("name", [name for name, c in CONFIGS.items() if c.profile == "decoder"])
def test_no_logit_strays_much_more_than_its_position(name: str) -> None:
    """What the pooled sigma takes for granted, measured with many more runs than the bound has."""
    config = CONFIGS[name]
    tokens = Streams(config, 12, (0,)).tape(4)
    exact = {key: value.astype(np.float64) for key, value in weights(config).items()}
    noisy = bounds.Noisy(bounds.STORAGE["float32"], seed=5)
    runs = np.stack([decoder(tokens, bounds.single(exact), config, how=noisy) for _ in range(400)])
    each = np.mean(np.square(runs - decoder(tokens, exact, config)), axis=0)  # (1, t, V)
    spread = np.sqrt(each.max(axis=-1) / each.mean(axis=-1)).max()
    assert 1 < spread < bounds.SPREAD


def test_what_is_left_for_a_logit_of_the_largest_spread_is_as_stated() -> None:
    assert 1 - _inside(bounds.C / bounds.SPREAD) == pytest.approx(5e-6, rel=0.5)
    assert "5e-6" in (bounds.__doc__ or "")
