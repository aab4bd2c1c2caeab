"""The definition against the textbook, written here once more as loops over single numbers; and its causality."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from kvconform_specs.config import Config
from kvconform_specs.definition import attention, decoder, rms_norm, rope, visible
from kvconform_specs.oracle import expect
from kvconform_specs.points import POINTS
from kvconform_specs.program import Append, Full, Program, Truncate
from kvconform_specs.tensors import Streams, weights

RNG = np.random.default_rng(0)


def textbook(query: np.ndarray, keys: np.ndarray, values: np.ndarray, config: Config) -> np.ndarray:
    """One sequence: ``(h, t, d)`` queries at the end of ``(g, s, d)`` keys, one number at a time."""
    h, t, d = query.shape
    s = keys.shape[1]
    out = np.zeros((h, t, d))
    for head in range(h):
        shared = head // (h // config.kv_heads)
        for row in range(t):
            position = s - t + row
            scores = {}
            for j in range(s):
                if j > position or (config.window is not None and position - j >= config.window):
                    continue
                score = sum(query[head, row, e] * keys[shared, j, e] for e in range(d))
                score *= 1 / math.sqrt(d) if config.scale is None else config.scale
                if config.softcap is not None:
                    score = config.softcap * math.tanh(score / config.softcap)
                scores[j] = score
            total = sum(math.exp(score) for score in scores.values())
            for j, score in scores.items():
                out[head, row] += math.exp(score) / total * values[shared, j]
    return out


@pytest.mark.parametrize("name", [name for name, c in POINTS.items() if c.profile == "attention"])
@pytest.mark.parametrize(("t", "s"), [(1, 1), (1, 9), (4, 4), (5, 12)])
def test_attention_is_the_textbook(name: str, t: int, s: int) -> None:
    c = POINTS[name]
    query, keys, values = (
        RNG.normal(size=(n, m, c.head_dim)) for n, m in ((c.heads, t), (c.kv_heads, s), (c.kv_heads, s))
    )
    got = attention(query, keys, values, c).output
    # both sides are float64: s products and exponentials of one rounding each
    assert np.max(np.abs(got - textbook(query, keys, values, c))) < (s + c.head_dim) * 8 * 2.0**-53 * np.max(
        np.abs(values)
    )


def test_a_window_counts_the_token_itself() -> None:
    assert visible(3, 5, 2).tolist() == [
        [False, True, True, False, False],
        [False, False, True, True, False],
        [False, False, False, True, True],
    ]


def test_rope_turns_the_pair_of_the_two_halves() -> None:
    x = RNG.normal(size=(1, 3, 8))
    got = rope(x, np.array([0, 1, 5]))
    for row, position in enumerate((0, 1, 5)):
        for i in range(4):
            turned = complex(x[0, row, i], x[0, row, i + 4]) * np.exp(1j * position * 10000.0 ** (-2 * i / 8))
            assert got[0, row, i] == pytest.approx(turned.real, abs=1e-15)
            assert got[0, row, i + 4] == pytest.approx(turned.imag, abs=1e-15)


def test_rope_makes_scores_a_function_of_the_distance() -> None:
    q, k = RNG.normal(size=(2, 1, 1, 8))
    near = [float(rope(q, np.array([p + 3]))[0, 0] @ rope(k, np.array([p]))[0, 0]) for p in (0, 1, 30)]
    assert near == pytest.approx([near[0]] * 3, abs=1e-13)


def test_rms_norm_has_the_gain_as_its_root_mean_square() -> None:
    x = RNG.normal(size=(4, 16)) * 100
    assert np.sqrt(np.mean(rms_norm(x, np.full(16, 3.0)) ** 2, axis=-1)) == pytest.approx([3.0] * 4, abs=1e-6)


@pytest.mark.parametrize("name", [name for name, c in POINTS.items() if c.profile == "decoder"])
def test_the_decoder_is_causal_and_prefix_stable(name: str) -> None:
    """The oracle computes histories that begin alike at their longest: this is what allows it."""
    c = POINTS[name]
    w = {k: v.astype(np.float64) for k, v in weights(c).items()}
    tokens = Streams(c, 20, (0,)).tape(3)[0]
    whole = decoder(tokens, w, c)
    for length in range(1, 20):
        assert np.max(np.abs(decoder(tokens[:length], w, c) - whole[:length])) < 1e-12 * np.max(np.abs(whole))
    changed = tokens.copy()
    changed[11] = (changed[11] + 1) % c.vocabulary
    moved = np.max(np.abs(decoder(changed, w, c) - whole), axis=-1)
    assert np.all(moved[:11] == 0)
    assert moved[11] > 0


def test_an_offset_is_a_cut() -> None:
    c = POINTS["decoder-rope"]
    w = {k: v.astype(np.float64) for k, v in weights(c).items()}
    tokens = Streams(c, 9, (0,)).tape(3)[0]
    assert np.allclose(decoder(tokens, w, c, start=6), decoder(tokens, w, c)[6:], rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", POINTS)
def test_the_oracle_gives_each_step_what_the_whole_history_gives(name: str) -> None:
    c = POINTS[name]
    program = Program(c, (Append("a", (5, 5), 1), Append("a", (2, 2), 1), Truncate("a", 3), Append("a", (4, 4), 9)))
    first, second, none, last = expect(program, (0, 1))
    assert none is None
    whole = expect(Program(c, (Full("f", (7, 7), 1),)), (0, 1))[0]
    assert first is not None
    assert second is not None
    assert last is not None
    assert whole is not None
    assert np.allclose(np.concatenate([first.value, second.value], axis=2), whole.value, rtol=0, atol=1e-12)
    assert last.rows[1] == ((2, 0), (2, 1), (2, 2), (10, 3), (10, 4), (10, 5), (10, 6))
    assert not np.allclose(last.value[:, :, 0], second.value[:, :, 0])


def test_ragged_rows_are_each_their_own_history() -> None:
    c = POINTS["attention-gqa"]
    ragged = expect(Program(c, (Append("a", (4, 2), 1), Append("a", (1, 3), 1))))[1]
    alone = expect(Program(c, (Append("a", (2,), 2), Append("a", (3,), 2))))[1]
    assert ragged is not None
    assert alone is not None
    assert np.array_equal(ragged.value[:, 1], alone.value[:, 0])
    assert ragged.real.tolist() == [[True, False, False], [True, True, True]]
    assert np.all(np.isnan(ragged.value[0, 0, 1:]))


def test_no_visible_weight_is_lost() -> None:
    c = replace(POINTS["attention-softcap"], window=3)
    q, k, v = (RNG.normal(size=(n, 9, c.head_dim)) for n in (c.heads, c.kv_heads, c.kv_heads))
    attended = attention(q, k, v, c)
    assert np.sum(attended.weights, axis=-1) == pytest.approx(np.ones((c.heads, 9)), abs=1e-14)
    assert np.all(attended.weights[:, ~attended.visible] == 0)
