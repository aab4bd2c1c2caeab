"""Latent attention: the definition against a loop, its two forms, costs and what a config may say."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from kvconform.judging.mismatch import Kind
from kvconform.judging.observed import Observed
from kvconform.worker.execute import execute
from kvconform_backends.faults.controls import LatentExpanded
from kvconform_backends.numpy.cache import NumpyCache
from kvconform_backends.numpy.static import NumpyStatic
from kvconform_specs.config import Config
from kvconform_specs.configs import CONFIGS
from kvconform_specs.costs import cache_bytes, multiply_adds
from kvconform_specs.errors import SpecError
from kvconform_specs.program import Append, Program, ReadCache, Truncate
from kvconform_specs.reference.definition import attention, decoder
from kvconform_specs.reference.oracle import expect
from kvconform_specs.tensors import Streams, weights

LATENT = CONFIGS["decoder-latent"]


def textbook(config: Config, held: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """The attention of layer 0 for its normed input ``(s, width)``, head by head and token by token: ``(s, h * d)``."""
    d, r, e, s = config.head_dim, config.latent, config.rotary_dim, len(x)
    query = (x @ held["layers.0.query"]).reshape(s, config.heads, d + e)
    down = x @ held["layers.0.down"]
    latent = down[:, :r] / np.sqrt(np.mean(down[:, :r] ** 2, axis=1, keepdims=True) + 1e-6)
    latent = latent * held["layers.0.norm_latent"]
    up = (latent @ held["layers.0.up"]).reshape(s, config.heads, 2 * d)

    def turned(pairs: np.ndarray, position: int) -> np.ndarray:
        halves = pairs[: e // 2] + 1j * pairs[e // 2 :]
        halves = halves * np.exp(1j * position * 10000.0 ** (-2 * np.arange(e // 2) / e))
        return np.concatenate([halves.real, halves.imag])

    out = np.zeros((s, config.heads, d))
    for i in range(s):
        for head in range(config.heads):
            scores = [
                query[i, head, :d] @ up[j, head, :d] + turned(query[i, head, d:], i) @ turned(down[j, r:], j)
                for j in range(i + 1)
            ]
            powers = np.exp(np.array(scores) / math.sqrt(d + e))
            out[i, head] = powers @ up[: i + 1, head, d:] / powers.sum()
    return out.reshape(s, -1)


def test_the_definition_is_the_textbooks() -> None:
    held = {name: value.astype(np.float64) for name, value in weights(LATENT).items()}
    tokens = Streams(LATENT, 7, (0,)).tape(3)[0]
    x = held["embed"][tokens]
    normed = x / np.sqrt(np.mean(x * x, axis=1, keepdims=True) + 1e-6) * held["layers.0.norm_attention"]
    x = x + textbook(LATENT, held, normed) @ held["layers.0.output"]
    last = x / np.sqrt(np.mean(x * x, axis=1, keepdims=True) + 1e-6) * held["norm_final"]
    assert decoder(tokens, held, LATENT) == pytest.approx(last @ held["lm_head"], rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("form", [NumpyCache, LatentExpanded])
def test_both_forms_are_within_a_tenth_of_the_bounds(form: type[NumpyCache]) -> None:
    """Their products differ, and each has its own rounding."""
    program = Program(
        LATENT, (*(Append("a", (n, n), 5) for n in (9, 1, 4, 1)), Truncate("a", 6), Append("a", (3, 3), 8))
    )
    (trace,) = execute(form(LATENT, weights(LATENT), "cpu"), program, (0,))
    worst = 0.0
    for want, done in zip(expect(program), trace, strict=True):
        if want is not None:
            assert done.output is not None
            worst = max(worst, float(np.max(np.abs(done.output[None] - want.value) / want.bound)))
    assert 0 < worst < 0.2


def test_the_forms_are_not_the_same_program() -> None:
    program = Program(LATENT, (Append("a", (9,), 5),))
    absorbed, expanded = (
        execute(form(LATENT, weights(LATENT), "cpu"), program, (0,))[0][0].output
        for form in (NumpyCache, LatentExpanded)
    )
    assert not np.array_equal(absorbed, expanded)


def test_a_token_keeps_its_latent_and_one_rotary_key() -> None:
    assert LATENT.kept == LATENT.latent + LATENT.rotary_dim == 13
    assert cache_bytes(LATENT, 10) == 10 * 13 * 4
    program = Program(LATENT, (Append("a", (4, 4), 5), ReadCache("a")))
    backend = NumpyCache(LATENT, weights(LATENT), "cpu")
    (trace,) = execute(backend, program, (0,))
    assert trace[1].output is not None
    assert trace[1].output.shape == (2, 4, 13)
    assert trace[0].output is not None
    one = Observed(program, trace, expect(program), [trace[0].output[None], None], NumpyCache.claims)
    latent, rotary = (one.at_read(Kind.STABLE_CONTENTS, (1, 0, 2), element) for element in (8, 11))
    assert (latent.part, latent.head, latent.element) == ("key", 0, 8)
    assert (rotary.part, rotary.head, rotary.element) == ("value", 0, 2)


def test_the_absorbed_form_multiplies_no_latent_of_a_cached_token_by_a_weight() -> None:
    c = LATENT
    deeper = multiply_adds(c, 6, 1) - multiply_adds(c, 5, 1)
    assert deeper == c.heads * (2 * c.latent + c.rotary_dim)
    program = Program(c, (Append("a", (5,), 5), Append("a", (1,), 5, count_macs=True)))
    (trace,) = execute(NumpyCache(c, weights(c), "cpu"), program, (0,))
    assert trace[1].reported["macs"] == (multiply_adds(c, 5, 1),)


def test_scores_are_divided_by_the_root_of_all_dims() -> None:
    assert LATENT.score_scale == 1 / math.sqrt(10)
    query = np.ones((5, 1, 10))
    assert attention(query, query, query[..., :6], LATENT).scores == pytest.approx(10 / math.sqrt(10))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rotary_dim": 3}, "even number of dims"),
        ({"rotary_dim": 0}, "even number of dims"),
        ({"kv_heads": 1}, "as many KV heads"),
        ({"positions": "none"}, "decoder with rope"),
        ({"latent": 0}, "only latent attention"),
        ({"kv_source": (0,)}, "not combined"),
    ],
)
def test_what_latent_attention_is_not_is_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        replace(LATENT, **changes)


def test_a_cache_of_keys_and_values_refuses_a_latent() -> None:
    assert NumpyStatic.refuses(LATENT, "cpu") == "its layers keep keys and values, and not a latent"
