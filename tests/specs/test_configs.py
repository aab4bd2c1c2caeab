"""The table of configs covers what the suite speaks of."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations, product

import numpy as np
import pytest

from kvconform_specs.clauses import ALL, BY_NAME
from kvconform_specs.config import Config
from kvconform_specs.configs import CONFIGS, LONG

AXES: dict[str, Callable[[Config], object]] = {
    "head dim": lambda c: "no multiple of 8" if c.head_dim % 8 else "below 32" if c.head_dim < 32 else "32 and more",
    "heads": lambda c: "MHA" if c.group == 1 else "MQA" if c.kv_heads == 1 else "GQA",
    "bias": lambda c: c.positions == "alibi",
    **{name: lambda c, name=name: getattr(c, name) is not None for name in ("window", "softcap", "sink", "scale")},  # type: ignore[misc]
}
OPTIONS = [name for name in AXES if name not in ("head dim", "heads")]


def test_the_configs_cover_what_the_suite_speaks_of() -> None:
    """Deeper than one layer, head dims of every kind, and each option on and off."""
    configs = list(CONFIGS.values())
    assert any(c.layers >= 2 for c in configs)
    assert any(c.head_dim % 8 for c in configs)
    assert {c.group == 1 for c in configs} == {True, False}
    assert {c.kv_heads == 1 for c in configs} == {True, False}
    assert {c.positions for c in configs} == {"none", "learned", "rope", "alibi"}
    for option in ("window", "softcap", "sink", "scale"):
        assert {getattr(c, option) is None for c in configs} == {True, False}, option
    assert any(c.window_every > 1 and c.layers > 1 for c in configs)
    plain = [c for c in configs if c.profile == "attention" and not any(AXES[name](c) for name in OPTIONS)]
    assert any(c.head_dim % 8 for c in plain), "a backend that refuses every option meets no odd head dim"
    assert {8, 10, 16, 32, 64, 128} <= {c.head_dim for c in configs if c.capacity < LONG}
    assert any(c.positions == "rope" and c.window and c.head_dim * c.heads == c.width for c in configs)
    assert {c.rotary is None for c in configs if c.positions == "rope"} == {True, False}
    assert {bool(c.changes_at) for c in configs} == {bool(c.kv_source) for c in configs} == {True, False}


@pytest.mark.parametrize(("one", "other"), list(combinations(AXES, 2)))
def test_every_pair_of_sizes_and_options_is_in_one_attention_config(one: str, other: str) -> None:
    configs = [c for c in CONFIGS.values() if c.profile == "attention" and c.capacity < LONG]
    seen = {(AXES[one](c), AXES[other](c)) for c in configs}
    assert seen == set(product({a for a, _ in seen}, {b for _, b in seen}))


@pytest.mark.parametrize("option", OPTIONS)
def test_each_option_is_alone_in_a_config(option: str) -> None:
    configs = [c for c in CONFIGS.values() if c.profile == "attention"]
    assert any([name for name in OPTIONS if AXES[name](c)] == [option] for c in configs)


ATTENTION = [c for c in CONFIGS.values() if c.profile == "attention" and c.capacity < LONG]


def options(config: Config) -> list[str]:
    return [name for name in OPTIONS if AXES[name](config)]


@pytest.mark.parametrize("sign", [-1, 0, 1])
def test_a_given_scale_has_every_sign(sign: int) -> None:
    given = [c for c in ATTENTION if c.scale is not None and np.sign(c.scale) == sign]
    assert given
    if sign <= 0:  # a kernel that refuses the other options meets it
        assert any(options(c) == ["scale"] for c in given)
    if sign:
        assert all(any(other in options(c) for c in given) for other in ("window", "softcap", "sink"))


def test_a_scale_of_0_is_for_the_clauses_about_the_scale() -> None:
    (config,) = (c for c in ATTENTION if c.scale == 0)
    assert [clause.name for clause in ALL if clause.concerns(config)] == ["definition.attention", "definition.scale"]


def test_a_bias_comes_without_a_softcap_and_with_one() -> None:
    assert {c.softcap is None for c in ATTENTION if c.positions == "alibi"} == {True, False}


def test_head_dims_that_kernels_prefer_come_with_a_sink() -> None:
    assert {8, 16} <= {c.head_dim for c in ATTENTION if c.sink is not None}


@pytest.mark.parametrize(
    ("clause", "situation"),
    [
        ("batch.nan-isolated", "a row of NaN"),
        ("batch.nan-isolated", "a sequence of NaN"),
        ("contents.nan-removed", "tokens of NaN"),
        ("shape.empty-append", "an append without a token"),
    ],
)
def test_each_cell_of_a_clause_must_reach(clause: str, situation: str) -> None:
    kind = BY_NAME[clause]
    assert situation in {one.words for one in kind.situations}
    assert all(kind.concerns(c) for c in ATTENTION if c.scale != 0)
