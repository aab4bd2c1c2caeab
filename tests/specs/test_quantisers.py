"""Quantisers: the derived errors hold and are nearly reached, and claims of them survive JSON."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from kvconform_backends.numpy.grouped import CONTROLS, Grouped, Held, claimed, float8
from kvconform_specs.claims import Claims, Precision
from kvconform_specs.configs import CONFIGS
from kvconform_specs.errors import SpecError
from kvconform_specs.quantisers import PLAIN, Quantiser
from kvconform_specs.reference.quantisation import quantisation_error

RNG = np.random.default_rng(0)
SETTINGS: dict[str, dict[str, Any]] = {
    "by token": {},
    "groups of 32": {"group": 32},
    "groups with a rest": {"group": 12},
    "4 bits": {"bits": 4, "group": 8},
    "minimum": {"zero_point": "minimum"},
    "integer zero": {"zero_point": "integer", "bits": 4},
    "channel": {"keys": "channel", "values": "channel", "group": 8},
    "KIVI, 2 bits": {"bits": 2, "keys": "channel", "values": "channel", "group": 8, "zero_point": "minimum"},
    "e4m3": {"scheme": "float8_e4m3"},
    "e5m2": {"scheme": "float8_e5m2", "group": 16},
}
CONTENTS = {
    "normal": RNG.normal(size=(2, 3, 40, 64)),
    "far from zero": RNG.normal(size=(2, 3, 40, 64)) + 20,
    "uneven": RNG.normal(size=(2, 3, 40, 64)) * np.exp(3 * RNG.normal(size=(2, 3, 40, 64))),
    "constant": np.full((2, 3, 40, 64), 0.7),
    "zero": np.zeros((2, 3, 40, 64)),
}


def quantised(x: np.ndarray, claims: Claims) -> np.ndarray:
    """What a cache holds of ``x`` after tokens came one at a time and in chunks."""
    backend = type("Trial", (Grouped,), {"claims": claims})(CONFIGS["attention-gqa"], {})
    empty = x[:, :, :0]
    held, done = Held(empty, empty, empty, empty), 0
    for size in (3, 1, 1, 1, 10, 1, 7, 16):
        held = backend.grown(held, x[:, :, done : done + size], claims.quantiser.values)
        done += size
    return np.asarray(backend.dequantised(held))


@pytest.mark.parametrize("contents", CONTENTS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_no_number_is_further_off_than_derived(setting: str, contents: str) -> None:
    claims, x = claimed(**SETTINGS[setting]), CONTENTS[contents].astype(np.float32)
    bound = quantisation_error(x.astype(np.float64), claims.precision, exact_from=40 - claims.residual)
    error = np.abs(quantised(x, claims).astype(np.float64) - x)
    assert np.all(error <= bound)


@pytest.mark.parametrize("setting", SETTINGS)
def test_some_number_is_nearly_as_far_off(setting: str) -> None:
    claims, x = claimed(**SETTINGS[setting]), CONTENTS["normal"].astype(np.float32)
    bound = quantisation_error(x.astype(np.float64), claims.precision)
    error = np.abs(quantised(x, claims).astype(np.float64) - x)
    ratio = np.max(np.where(bound > 0, error / np.where(bound > 0, bound, 1), 0))
    # an integer that stands for zero may shift the codes by half a step more than this implementation's
    assert ratio > (0.45 if claims.quantiser.zero_point == "integer" else 0.95)


def test_tokens_of_a_group_that_is_not_full_are_exact() -> None:
    x = CONTENTS["normal"][:, :, :21]
    for residual, quantised_tokens in ((0, 16), (3, 16), (6, 8)):
        claims = claimed(residual=residual, keys="channel", group=8)
        bound = quantisation_error(x, claims.precision, part="keys", exact_from=21 - residual)
        assert np.all((bound > 0).all(axis=(0, 1, 3)) == (np.arange(21) < quantised_tokens))
        values = quantisation_error(x, claims.precision, part="values", exact_from=21 - residual)
        assert np.all((values > 0).all(axis=(0, 1, 3)) == (np.arange(21) < 21 - residual))


def test_a_finer_group_has_a_smaller_error() -> None:
    x = CONTENTS["uneven"]
    coarse, fine = (quantisation_error(x, claimed(group=group).precision) for group in (None, 8))
    assert np.all(fine <= coarse)
    assert np.mean(fine) < 0.7 * np.mean(coarse)


@pytest.mark.parametrize(("scheme", "name"), [("float8_e4m3", "float8_e4m3fn"), ("float8_e5m2", "float8_e5m2")])
def test_float8_rounds_like_ml_dtypes(scheme: str, name: str) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    largest = {"float8_e4m3": 448.0, "float8_e5m2": 57344.0}[scheme]
    x = np.concatenate([RNG.normal(size=4000) * 2.0 ** RNG.integers(-20, 8, 4000), [0, largest, -largest, 2.0**-17]])
    x = x[np.abs(x) <= largest].astype(np.float32)
    assert np.array_equal(float8(x, scheme), x.astype(getattr(ml_dtypes, name)).astype(np.float32))


def test_a_claim_of_a_quantiser_survives_its_json() -> None:
    for kind in CONTROLS:
        assert Claims.from_json(kind.claims.to_json()) == kind.claims
    broken = CONTROLS[0].claims.to_json()
    broken["quantiser"]["size"] = 4
    with pytest.raises(SpecError, match=r"claims\.quantiser\.size: unknown field"):
        Claims.from_json(broken)


def test_a_quantiser_that_cannot_be_is_refused() -> None:
    for fields, words in (
        ({"scheme": "int8"}, "unknown value 'int8'"),
        ({"keys": "head"}, "unknown value 'head'"),
        ({"group": 0}, "positive integer"),
        ({"keys": "channel"}, "a scale of a channel"),
        ({"scheme": "float8_e4m3", "zero_point": "minimum"}, "has none"),
    ):
        with pytest.raises(SpecError, match=words):
            Quantiser(**fields)  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="nothing is quantised"):
        Claims(quantiser=Quantiser(group=4))
    with pytest.raises(SpecError, match="has 8 bits, got 4"):
        Claims(kv_bits=4, quantiser=Quantiser(scheme="float8_e4m3"))


def test_numbers_depend_on_the_length_where_newer_tokens_are_exact() -> None:
    channel = Quantiser(keys="channel", group=4)
    for precision, depends in (
        (Precision(), False),
        (Precision(kv_bits=8), False),
        (Precision(kv_bits=8, residual=2), True),
        (Precision(kv_bits=8, quantiser=channel), True),
    ):
        assert precision.by_length is depends
    assert replace(Precision(), kv_bits=8).quantiser is PLAIN
