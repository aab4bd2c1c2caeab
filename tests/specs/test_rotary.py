"""Scaled rotary factors: against transformers, against the backends' own formulas, and in whole decoders."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from kvconform.worker.execute import execute
from kvconform_backends import rotary as backends
from kvconform_backends.numpy.cache import NumpyCache
from kvconform_backends.numpy.static import NumpyStatic
from kvconform_specs.config import Config
from kvconform_specs.configs import CONFIGS
from kvconform_specs.errors import SpecError
from kvconform_specs.program import Append, Program, Truncate, UncachedForward
from kvconform_specs.reference.definition import decoder
from kvconform_specs.reference.oracle import expect
from kvconform_specs.rotary import KINDS, Rotary, frequencies
from kvconform_specs.tensors import Streams, weights

SCALINGS = {
    "linear": Rotary("linear", 3.0, 12),
    "ntk": Rotary("ntk", 3.0, 12),
    "dynamic": Rotary("dynamic", 3.0, 12),
    "yarn": Rotary("yarn", 4.0, 4096),
    "longrope": Rotary("longrope", 3.0, 12, short=(1.0, 1.1, 1.2, 1.5), long=(1.5, 2.5, 3.5, 5.0)),
}
LONGROPE = CONFIGS["decoder-longrope"]


def scaled(kind: str) -> Config:
    return replace(LONGROPE, rotary=SCALINGS[kind])


def test_every_kind_is_tested() -> None:
    assert set(SCALINGS) == set(KINDS)


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"ntk"}))
def test_frequencies_and_attention_factors_are_those_of_transformers(kind: str) -> None:
    pytest.importorskip("transformers")
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = SCALINGS[kind]
    fields: dict[str, Any] = {"rope_type": kind, "rope_theta": 10000.0, "factor": scaling.factor}
    fields |= {"original_max_position_embeddings": scaling.original}
    if scaling.short:
        fields |= {"short_factor": list(scaling.short), "long_factor": list(scaling.long)}
    config = LlamaConfig(
        hidden_size=24, num_attention_heads=3, max_position_embeddings=scaling.original, rope_parameters=fields
    )
    for length in (1, 12, 13, 40, 5000):
        wanted, factor = ROPE_INIT_FUNCTIONS[kind](config, "cpu", length)
        assert frequencies(scaling, 8, length) == pytest.approx(wanted.numpy(), rel=1e-6)
        assert scaling.attention_factor == pytest.approx(factor, rel=1e-12)


def test_ntk_interpolates_the_slowest_pair_and_leaves_the_fastest() -> None:
    ratio = frequencies(None, 8, 1) / frequencies(SCALINGS["ntk"], 8, 1)
    assert ratio[0] == 1
    assert ratio[-1] == pytest.approx(3.0)


def test_yarn_leaves_fast_pairs_and_interpolates_slow_ones() -> None:
    ratio = frequencies(None, 64, 1) / frequencies(SCALINGS["yarn"], 64, 1)
    assert ratio[0] == 1
    assert ratio[-1] == pytest.approx(4.0)
    assert np.all(np.diff(ratio) >= 0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_backends_formulas_give_the_same(kind: str) -> None:
    config = scaled(kind)
    for length in (1, 12, 13, 14, 40):
        assert backends.inverse_frequencies(config, 8, length) == pytest.approx(
            frequencies(config.rotary, 8, length), rel=1e-13
        )
    assert config.rotary is not None
    assert backends.attention_factor(config) == pytest.approx(config.rotary.attention_factor, rel=1e-15)


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_change_exactly_at_the_lengths_that_the_config_names(kind: str) -> None:
    config = scaled(kind)
    exact = {name: value.astype(np.float64) for name, value in weights(config).items()}
    tokens = Streams(config, 20, (0,)).tape(3)[0]
    runs = [decoder(tokens[:length], exact, config) for length in range(2, 21)]
    changed = [length for length, (one, two) in enumerate(pairwise(runs), 3) if np.max(np.abs(one - two[:-1])) > 1e-9]
    assert changed == [length for length in config.changes_at if length <= 20]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", [NumpyCache, NumpyStatic])
def test_a_cache_of_unrotated_keys_gives_the_definition_on_the_tokens_so_far(backend: type, kind: str) -> None:
    config = scaled(kind)
    steps = [Append("a", (size, size), 5) for size in (7, 1, 3, 1, 1, 1, 4, 1)]
    program = Program(config, (*steps, Truncate("a", 11), Append("a", (1, 1), 9), UncachedForward("f", (15,), 5)))
    assert backend.refuses(config, "cpu") is None
    (trace,) = execute(backend(config, weights(config), "cpu"), program, (0,))
    compared = 0
    for want, done in zip(expect(program), trace, strict=True):
        if want is not None:
            assert done.output is not None
            assert np.all(np.abs(done.output[None] - want.value) <= want.bound)
            compared += 1
    assert compared == 10


def test_rows_of_different_lengths_turn_by_their_own_factors() -> None:
    config = LONGROPE
    program = Program(config, (Append("a", (10, 4), 5), Append("a", (4, 4), 5), Append("a", (0, 1), 5)))
    (trace,) = execute(NumpyStatic(config, weights(config), "cpu"), program, (0,))
    for want, done in zip(expect(program), trace, strict=True):
        assert want is not None
        assert done.output is not None
        error = np.abs(done.output[None] - want.value)
        assert np.all((error <= want.bound) | ~want.real[None, :, :, None])


@pytest.mark.parametrize("backend", [NumpyCache, NumpyStatic])
def test_an_append_without_tokens_ignores_the_rows_of_other_sequences(backend: type) -> None:
    steps = (Append("b", (4, 4), 1), Append("a", (5, 5, 5), 2), Append("b", (0, 0), 3), Append("b", (1, 1), 1))
    program = Program(LONGROPE, steps)
    (trace,) = execute(backend(LONGROPE, weights(LONGROPE), "cpu"), program, (0,))
    assert [done.error for done in trace] == [None] * 4
    last, want = trace[3].output, expect(program)[3]
    assert last is not None
    assert want is not None
    assert np.all(np.abs(last[None] - want.value) <= want.bound)


def test_a_scaling_that_fits_no_config_is_refused() -> None:
    for changes, words in (
        ({"positions": "none"}, "scales rope"),
        ({"rotary": replace(SCALINGS["longrope"], short=(1.0,), long=(2.0,))}, "1 divisors for 4 pairs"),
    ):
        with pytest.raises(SpecError, match=words):
            replace(LONGROPE, **changes)
    for fields, words in (
        (("dynamc", 2.0, 12), "unknown value 'dynamc'"),
        (("yarn", 0.5, 12), "at least 1"),
        (("yarn", math.nan, 12), "at least 1"),
        (("yarn", 2.0, 1), "at least 2"),
        (("longrope", 2.0, 12), "0 long and 0 short"),
    ):
        with pytest.raises(SpecError, match=words):
            Rotary(*fields)


@pytest.mark.parametrize("name", ["decoder-longrope", "decoder-shared"])
def test_a_config_with_scaled_factors_survives_its_json(name: str) -> None:
    assert Config.from_json(CONFIGS[name].to_json()) == CONFIGS[name]
    broken = CONFIGS[name].to_json()
    broken["rotary"]["factors"] = 1
    with pytest.raises(SpecError, match=r"config\.rotary\.factors: unknown field"):
        Config.from_json(broken)
