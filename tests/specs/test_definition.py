"""The definition against the textbook, written here once more as loops over single numbers; and its causality."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from kvconform_specs.config import Config
from kvconform_specs.configs import CONFIGS
from kvconform_specs.program import Append, Program, Truncate, UncachedForward
from kvconform_specs.reference.bounds import Noisy, single
from kvconform_specs.reference.definition import attention, decoder, rms_norm, rope, turns, visible
from kvconform_specs.reference.oracle import expect
from kvconform_specs.tensors import Streams, weights

RNG = np.random.default_rng(0)


def textbook(
    query: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    config: Config,
    layer: int = 0,
    mask: np.ndarray | None = None,
) -> np.ndarray:
    """One sequence: ``(h, t, d)`` queries at the end of ``(g, s, d)`` keys, one number at a time."""
    h, t, d = query.shape
    s = keys.shape[1]
    out = np.zeros((h, t, d))
    windowed = config.window is not None and layer % config.window_every == 0
    for head in range(h):
        shared = head // (h // config.kv_heads)
        for row in range(t):
            position = s - t + row
            scores = {}
            for j in range(s):
                if j > position or (windowed and position - j >= config.window):
                    continue
                if mask is not None and not mask[row, j]:
                    continue
                score = sum(query[head, row, e] * keys[shared, j, e] for e in range(d))
                score *= 1 / math.sqrt(d) if config.scale is None else config.scale
                if config.softcap is not None:
                    score = config.softcap * math.tanh(score / config.softcap)
                if config.positions == "alibi":
                    score -= 2 ** (-8 * (head + 1) / h) * (position - j)
                scores[j] = score
            total = sum(math.exp(score) for score in scores.values())
            if config.sink is not None:
                total += math.exp(config.sink * (head + 1) / h)
            for j, score in scores.items():
                out[head, row] += math.exp(score) / total * values[shared, j]
    return out


def drawn(c: Config, t: int, s: int, *batch: int) -> list[np.ndarray]:
    return [RNG.normal(size=(*batch, n, m, c.head_dim)) for n, m in ((c.heads, t), (c.kv_heads, s), (c.kv_heads, s))]


def close(got: np.ndarray, want: np.ndarray, s: int, c: Config, values: np.ndarray) -> bool:
    """Both sides are float64: s products and exponentials of one rounding each."""
    return bool(np.max(np.abs(got - want)) < (s + c.head_dim) * 8 * 2.0**-53 * np.max(np.abs(values)))


ALL = Config(
    "attention", heads=6, kv_heads=2, head_dim=5, window=3, softcap=2.0, sink=-0.7, scale=0.6, positions="alibi"
)
SEMANTICS = {
    **{name: c for name, c in CONFIGS.items() if c.profile == "attention"},
    "alibi": Config("attention", heads=4, kv_heads=2, head_dim=6, positions="alibi"),
    "sink of zero": Config("attention", heads=3, kv_heads=3, head_dim=4, sink=0.0),
    "hybrid": replace(ALL, window_every=2),
    "all": ALL,
}


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("name", SEMANTICS)
@pytest.mark.parametrize(("t", "s"), [(1, 1), (1, 9), (4, 4), (5, 12)])
def test_attention_is_the_textbook(name: str, t: int, s: int, layer: int) -> None:
    c = SEMANTICS[name]
    parts = drawn(c, t, s)
    assert close(attention(*parts, c, layer=layer).output, textbook(*parts, c, layer), s, c, parts[2])


@pytest.mark.parametrize("term", ["window", "softcap", "sink", "scale", "positions"])
def test_each_term_of_the_config_is_in_the_result(term: str) -> None:
    none = {"window": None, "softcap": None, "sink": None, "scale": None, "positions": "none"}
    parts = drawn(ALL, 4, 9)
    without = attention(*parts, replace(ALL, **{term: none[term]})).output
    assert np.max(np.abs(without - attention(*parts, ALL).output)) > 1e-3


@pytest.mark.parametrize("name", SEMANTICS)
def test_a_mask_joins_causality_and_window(name: str) -> None:
    c = SEMANTICS[name]
    query, keys, values = drawn(c, 5, 9, 3)
    mask = RNG.random((3, 1, 5, 9)) < 0.6
    mask[1, :, 2] = False
    got = attention(query, keys, values, c, mask=mask)
    for n in range(3):
        assert close(got.output[n], textbook(query[n], keys[n], values[n], c, mask=mask[n, 0]), 9, c, values)
    assert np.all(got.output[1, :, 2] == 0)
    shown = np.broadcast_to(got.visible, got.weights.shape)
    assert np.all(got.weights[~shown] == 0)
    assert np.all(got.weights[shown] > 0)
    by_key = attention(query, keys, values, c, mask=mask[0, 0, 0])
    assert np.array_equal(by_key.output, attention(query, keys, values, c, mask=mask[:1, :, :1]).output)


@pytest.mark.parametrize("sink", [None, 1.0, -500.0])
def test_a_query_that_sees_nothing_gives_exactly_zero(sink: float | None) -> None:
    """Warnings are errors in these tests: there is none, either."""
    c = replace(CONFIGS["attention-gqa"], sink=sink)
    parts = drawn(c, 2, 7)
    assert np.all(attention(*parts, c, mask=np.zeros((2, 7), bool)).output == 0)
    assert np.all(attention(*parts, replace(c, window=2), at=20).output == 0)


@pytest.mark.parametrize("name", SEMANTICS)
def test_blocks_of_queries_are_the_whole(name: str) -> None:
    c = SEMANTICS[name]
    query, keys, values = drawn(c, 13, 13, 2)
    mask = RNG.random((2, 1, 13, 13)) < 0.8
    whole = attention(query, keys, values, c, mask=mask).output
    for at, stop in ((0, 1), (0, 5), (5, 12), (12, 13)):
        part = attention(query[:, :, at:stop], keys, values, c, at=at, mask=mask[:, :, at:stop]).output
        assert close(part, whole[:, :, at:stop], 13, c, values)


@pytest.mark.parametrize("name", SEMANTICS)
def test_attention_is_causal(name: str) -> None:
    c = SEMANTICS[name]
    query, keys, values = drawn(c, 9, 9)
    whole = attention(query, keys, values, c).output
    keys[:, 6], values[:, 6] = RNG.normal(size=(2, c.kv_heads, c.head_dim))
    moved = np.max(np.abs(attention(query, keys, values, c).output - whole), axis=(0, 2))
    assert np.all(moved[:6] == 0)
    assert np.all(moved[6 : 6 + (c.window or 3)] > 0)


def test_a_window_counts_the_token_itself() -> None:
    assert visible(3, 5, 2).tolist() == [
        [False, True, True, False, False],
        [False, False, True, True, False],
        [False, False, False, True, True],
    ]


def test_rope_turns_the_pair_of_the_two_halves() -> None:
    x = RNG.normal(size=(1, 3, 8))
    got = rope(x, turns(np.array([0, 1, 5]), 8, 6))
    for row, position in enumerate((0, 1, 5)):
        for i in range(4):
            turned = complex(x[0, row, i], x[0, row, i + 4]) * np.exp(1j * position * 10000.0 ** (-2 * i / 8))
            assert got[0, row, i] == pytest.approx(turned.real, abs=1e-15)
            assert got[0, row, i + 4] == pytest.approx(turned.imag, abs=1e-15)


def at(x: np.ndarray, position: int) -> np.ndarray:
    return rope(x, turns(np.array([position]), 8, 40))


def test_rope_makes_scores_a_function_of_the_distance() -> None:
    q, k = RNG.normal(size=(2, 1, 1, 8))
    near = [float(at(q, p + 3)[0, 0] @ at(k, p)[0, 0]) for p in (0, 1, 30)]
    assert near == pytest.approx([near[0]] * 3, abs=1e-13)


def test_rms_norm_has_the_gain_as_its_root_mean_square() -> None:
    x = RNG.normal(size=(4, 16)) * 100
    assert np.sqrt(np.mean(rms_norm(x, np.full(16, 3.0)) ** 2, axis=-1)) == pytest.approx([3.0] * 4, abs=1e-6)


@pytest.mark.parametrize("name", [name for name, c in CONFIGS.items() if c.profile == "decoder"])
def test_the_decoder_is_causal_and_prefix_stable(name: str) -> None:
    """The oracle computes histories that begin alike at their longest, within an epoch: this is what allows it."""
    c = CONFIGS[name]
    w = {k: v.astype(np.float64) for k, v in weights(c).items()}
    tokens = Streams(c, 20, (0,)).tape(3)[0]
    whole = decoder(tokens, w, c)
    for length in range(max(c.changes_at, default=1), 20):
        assert np.max(np.abs(decoder(tokens[:length], w, c) - whole[:length])) < 1e-12 * np.max(np.abs(whole))
    changed = tokens.copy()
    changed[11] = (changed[11] + 1) % c.vocabulary
    moved = np.max(np.abs(decoder(changed, w, c) - whole), axis=-1)
    assert np.all(moved[:11] == 0)
    assert moved[11] > 0


def test_layers_of_a_hybrid_decoder_have_their_own_window() -> None:
    """Layers 0 and 2 of three see 5 tokens, layer 1 sees all: how far a change is felt tells which layer sees it."""
    c = CONFIGS["decoder-learned"]
    assert [c.window_of(layer) for layer in range(3)] == [5, None, 5]
    assert _reach(c) == 20
    assert _reach(replace(c, window_every=1)) == 3 * 4 + 1
    assert _reach(replace(c, window_every=3)) == 20
    assert _reach(replace(c, layers=1)) == 5


def _reach(c: Config) -> int:
    """How many positions, its own included, a change of token 0 moves."""
    w = {k: v.astype(np.float64) for k, v in weights(c).items()}
    tokens = Streams(c, 20, (0,)).tape(3)[0]
    changed = tokens.copy()
    changed[0] = (changed[0] + 1) % c.vocabulary
    return int(np.count_nonzero(np.max(np.abs(decoder(changed, w, c) - decoder(tokens, w, c)), axis=-1) > 0))


@pytest.mark.parametrize("changes", [{"sink": 1.0}, {"positions": "alibi"}, {"softcap": 1.0}])
def test_the_decoder_uses_what_attention_does(changes: dict[str, object]) -> None:
    c = replace(CONFIGS["decoder-rope"], positions="none")
    w = {k: v.astype(np.float64) for k, v in weights(c).items()}
    tokens = Streams(c, 12, (0,)).tape(3)[0]
    moved = np.max(np.abs(decoder(tokens, w, replace(c, **changes)) - decoder(tokens, w, c)), axis=-1)
    assert np.all(moved[1:] > 1e-3)


@pytest.mark.parametrize("name", ["decoder-rope", "decoder-learned", "decoder-softcap"])
def test_noisy_arithmetic_strays_and_no_more(name: str) -> None:
    c = replace(CONFIGS[name], sink=0.5)
    w = {k: v.astype(np.float64) for k, v in weights(c).items()}
    tokens = Streams(c, 12, (0,)).tape(3)[0]
    exact = decoder(tokens, w, c)
    noisy = decoder(tokens, single(w), c, how=Noisy(2.0**-13, seed=1))
    assert noisy.dtype == np.float32
    assert 1e-5 < np.sqrt(np.mean(np.square(noisy - exact))) / np.sqrt(np.mean(np.square(exact))) < 1e-2


def test_an_offset_is_a_cut() -> None:
    c = CONFIGS["decoder-rope"]
    w = {k: v.astype(np.float64) for k, v in weights(c).items()}
    tokens = Streams(c, 9, (0,)).tape(3)[0]
    assert np.allclose(decoder(tokens, w, c, start=6), decoder(tokens, w, c)[6:], rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_oracle_gives_each_step_what_the_whole_history_gives(name: str) -> None:
    c = CONFIGS[name]
    program = Program(c, (Append("a", (5, 5), 1), Append("a", (2, 2), 1), Truncate("a", 3), Append("a", (4, 4), 9)))
    first, second, none, last = expect(program, (0, 1))
    assert none is None
    whole = expect(Program(c, (UncachedForward("f", (7, 7), 1),)), (0, 1))[0]
    assert first is not None
    assert second is not None
    assert last is not None
    assert whole is not None
    assert np.allclose(np.concatenate([first.value, second.value], axis=2), whole.value, rtol=0, atol=1e-12)
    tokens = [(stream.seed, position) for stream, position in last.rows[1]]
    assert tokens == [(2, 0), (2, 1), (2, 2), (10, 3), (10, 4), (10, 5), (10, 6)]
    assert not np.allclose(last.value[:, :, 0], second.value[:, :, 0])


def test_ragged_rows_are_each_their_own_history() -> None:
    c = CONFIGS["attention-gqa"]
    ragged = expect(Program(c, (Append("a", (4, 2), 1), Append("a", (1, 3), 1))))[1]
    alone = expect(Program(c, (Append("a", (2,), 2), Append("a", (3,), 2))))[1]
    assert ragged is not None
    assert alone is not None
    assert np.array_equal(ragged.value[:, 1], alone.value[:, 0])
    assert ragged.real.tolist() == [[True, False, False], [True, True, True]]
    assert np.all(np.isnan(ragged.value[0, 0, 1:]))


def test_no_visible_weight_is_lost() -> None:
    c = replace(CONFIGS["attention-softcap"], window=3)
    q, k, v = (RNG.normal(size=(n, 9, c.head_dim)) for n in (c.heads, c.kv_heads, c.kv_heads))
    attended = attention(q, k, v, c)
    assert np.sum(attended.weights, axis=-1) == pytest.approx(np.ones((c.heads, 9)), abs=1e-14)
    assert np.all(attended.weights[:, ~attended.visible] == 0)
