"""Contents come from seeds: cut, derived and rounded as the spec says."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvconform.search.counterexample import frozen
from kvconform.worker.execute import feeds_of
from kvconform_specs.config import Config
from kvconform_specs.configs import CONFIGS, config_named
from kvconform_specs.errors import SpecError
from kvconform_specs.program import LAYOUTS, MALFORMED, Append, Program
from kvconform_specs.tensors import NEEDLE_SCORE, Streams, laid, malformed, rounded, weights


def inputs_of(program: Program, indices: tuple[int, ...]) -> list[tuple[np.ndarray, ...]]:
    return [inputs for inputs, _keywords in feeds_of(program, indices)]


@pytest.mark.parametrize("name", CONFIGS)
def test_the_same_tokens_come_however_they_are_cut(name: str) -> None:
    config = CONFIGS[name]
    axis = 3 if config.profile == "attention" else 2
    whole = inputs_of(Program(config, (Append("a", (9, 9), 5),)), (0, 1))[0]
    parts = inputs_of(Program(config, (Append("a", (4, 4), 5), Append("a", (5, 5), 5))), (0, 1))
    for index, want in enumerate(whole):
        assert np.array_equal(np.concatenate([part[index] for part in parts], axis=axis), want)


def test_row_r_alone_is_the_stream_of_seed_plus_r() -> None:
    config = CONFIGS["attention-gqa"]
    both = inputs_of(Program(config, (Append("a", (4, 4), 5),)), (0, 3))[0]
    alone = inputs_of(Program(config, (Append("a", (4,), 6),)), (0, 3))[0]
    assert all(np.array_equal(b[:, 1:2], a) for b, a in zip(both, alone, strict=True))


@given(st.integers(0, 40))
def test_a_frozen_variant_is_the_variant(variant: int) -> None:
    config = CONFIGS["attention-window"]
    program = Program(
        config, (Append("a", (3, 3), 5, substitutions=((1, 2, 99),), needle=(5, 1)), Append("a", (2, 2), 8))
    )
    for a, b in zip(inputs_of(program, (variant,)), inputs_of(frozen(program, variant), (0,)), strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_needle_gives_its_key_the_stated_score() -> None:
    config = CONFIGS["attention-gqa"]
    program = Program(config, (Append("a", (6,), 5), Append("a", (1,), 5, needle=(5, 2))))
    (_q, key, _v), (query, _k, _w) = inputs_of(program, (0,))
    scores = np.einsum("bhd,bhd->bh", query[0, :, :, 0], np.repeat(key[0, :, :, 2], config.group, axis=1))
    assert np.allclose(
        scores * config.score_scale, NEEDLE_SCORE, rtol=8 * 2.0**-24, atol=0
    )  # d products, one rounding each


def test_contents_are_the_same_on_every_machine() -> None:
    """A raw word becomes a number by integer arithmetic and one rounding; these bytes must never move."""
    stream = Streams(CONFIGS["attention-gqa"], 7, (0, 1)).tape(3)
    tokens = Streams(CONFIGS["decoder-rope"], 7, (0, 1)).tape(3)
    drawn = [hashlib.sha256(np.ascontiguousarray(a).tobytes()).hexdigest()[:16] for a in (stream, tokens)]
    held = weights(CONFIGS["decoder-rope"])
    contexts = held.pop("context")
    drawn.append(hashlib.sha256(b"".join(w.tobytes() for w in held.values())).hexdigest()[:16])
    assert not contexts[0].any()
    assert contexts[1:].all()
    assert drawn == ["089ee9a9cd787737", "e145c567c27c2143", "e9309e4ac40c1e02"]


@pytest.mark.parametrize(("dtype", "bits"), [("float32", 24), ("bfloat16", 8), ("float16", 11)])
def test_rounding_keeps_the_bits_of_the_dtype_and_rounds_to_nearest_even(dtype: str, bits: int) -> None:
    x = np.linspace(1, 2, 4097, dtype=np.float32)[:-1] + np.float32(2.0**-20)
    got = rounded(x, dtype)
    ulp = 2.0 ** (1 - bits)
    assert np.all(np.abs(got - x) <= ulp / 2)
    assert np.array_equal(got, np.rint(got.astype(np.float64) / ulp) * ulp)
    tie = np.array([1 + ulp / 2, 1 + 3 * ulp / 2])
    if dtype != "float32":
        assert rounded(tie, dtype).tolist() == [1.0, 1 + 2 * ulp]


def test_contents_are_exact_in_the_config_dtype() -> None:
    for dtype in ("bfloat16", "float16"):
        config = config_named("attention-gqa", dtype)
        for part in inputs_of(Program(config, (Append("a", (5,), 1, needle=(1, 0)),)), (0,))[0]:
            assert np.array_equal(rounded(part, dtype), part)
        assert all(np.array_equal(rounded(w, dtype), w) for w in weights(config_named("decoder-rope", dtype)).values())


@pytest.mark.parametrize(
    ("number", "distribution", "factors"),
    [
        (0, "normal", (1, 1, 1)),
        (1, "large_queries", (64, 1, 1)),
        (2, "zero_keys", (1, 0, 1)),
        (3, "small_keys_large_values", (1, 0.25, 16)),
    ],
)
def test_a_distribution_multiplies_queries_keys_and_values_and_changes_nothing_else(
    number: int, distribution: str, factors: tuple[float, float, float]
) -> None:
    """Each distribution has numbers of its own: those of the generator's key with its number in the bits from 48 on."""
    config = CONFIGS["attention-gqa"]
    streams = Streams(config, 5, (0, 1))
    given = inputs_of(Program(config, (Append("a", (5,), 3, distribution=distribution),)), (0, 1))[0]
    plain = streams.split(streams.tape(3 + (number << 48)))
    for part, unscaled, factor in zip(given, plain, factors, strict=True):
        assert np.array_equal(part[:, 0], unscaled * np.float32(factor))
    assert all(bool(part.any()) == bool(factor) for part, factor in zip(given, factors, strict=True))


def test_all_streams_that_a_step_names_have_its_distribution() -> None:
    config = CONFIGS["attention-gqa"]
    step = Append("a", (3, 2), 5, ((0, 1, 70),), pad=("right", 9), distribution="zero_keys")
    _query, key, value = (part[0] for part in inputs_of(Program(config, (step,)), (0,))[0])
    assert not key.any()
    streams = Streams(config, 3, (0,))
    substituted, pad = (streams.split(streams.tape(seed, "zero_keys"))[2][0] for seed in (70, 10))
    assert np.array_equal(value[0, :, 1], substituted[:, 1])
    assert np.array_equal(value[1, :, 2], pad[:, 0])


def test_columns_without_a_token_are_filled_from_the_stream_and_on_the_side_that_the_step_names() -> None:
    config = CONFIGS["decoder-rope"]
    for side, column in (("right", 2), ("left", 0)):
        filled = inputs_of(Program(config, (Append("a", (3, 2), 5, pad=(side, 9)),)), (0,))[0][0][0]
        whole = inputs_of(Program(config, (Append("a", (3, 3), 5),)), (0,))[0][0][0]
        pads = inputs_of(Program(config, (Append("a", (1, 1), 9),)), (0,))[0][0][0]
        assert np.array_equal(filled[0], whole[0])
        assert filled[1, column] == pads[1, 0]
        assert np.array_equal(np.delete(filled[1], column), whole[1, :2])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_moves_memory_and_no_number(layout: str) -> None:
    x = np.broadcast_to(np.arange(24, dtype=np.float32).reshape(1, 2, 3, 4), (3, 2, 3, 4)).copy()
    got = laid(x, layout)
    assert np.array_equal(got, x)
    assert got.flags.c_contiguous == (layout == "contiguous")
    if layout == "expanded":
        assert got.strides[0] == 0
        with pytest.raises(SpecError, match="need rows with equal tokens"):
            laid(np.arange(6.0).reshape(2, 3), layout)


HIDDEN = Config("hidden", heads=4, kv_heads=4, head_dim=8, width=32)
EVERY = {"dtype": "dtype", "rank": "rank", "batch": "axis 0", "fewer rows": "axis 0"}  # of each input
DIFFERENCES: dict[str, tuple[Config, dict[str, tuple[str, ...]]]] = {
    "attention": (
        CONFIGS["attention-gqa"],
        {
            **{wrong: (word,) * 3 for wrong, word in EVERY.items()},
            "heads": ("", "axis 1", "axis 1"),
            "head dim": ("", "axis 3", ""),
            "lengths": ("", "", "axis 2"),
        },
    ),
    "decoder": (
        CONFIGS["decoder-rope"],
        {**{wrong: (word,) for wrong, word in EVERY.items()}, "vocabulary": ("values",)},
    ),
    "hidden": (HIDDEN, {**{wrong: (word,) for wrong, word in EVERY.items()}, "width": ("axis 2",)}),
}
"""What is different about each of the malformed inputs, if anything."""


def differences(good: np.ndarray, bad: np.ndarray) -> list[str]:
    """Each thing in which two inputs differ; of the values where both have one."""
    if good.ndim != bad.ndim:
        return ["rank", *differences(good[0], bad)]
    common = tuple(slice(min(sizes)) for sizes in zip(good.shape, bad.shape, strict=True))
    found = ["dtype"] if good.dtype.kind != bad.dtype.kind else []
    found += [f"axis {n}" for n, (a, b) in enumerate(zip(good.shape, bad.shape, strict=True)) if a != b]
    equal = np.array_equal(good[common].astype(bad.dtype), bad[common])
    return found if equal else [*found, "values"]


@pytest.mark.parametrize(("profile", "wrong"), [(name, wrong) for name in MALFORMED for wrong in MALFORMED[name]])
def test_malformed_inputs_are_wrong_in_one_thing(profile: str, wrong: str) -> None:
    config, words = DIFFERENCES[profile]
    good = tuple(x[0] for x in inputs_of(Program(config, (Append("a", (3, 3), 5),)), (0,))[0])
    bad = malformed(good, wrong, config)
    assert [differences(x, y) for x, y in zip(good, bad, strict=True)] == [
        [word] if word else [] for word in words[wrong]
    ]
    if wrong == "vocabulary":
        assert np.array_equal(bad[0][:, :-1], good[0][:, :-1])
        assert (bad[0][:, -1] == config.vocabulary).all()
