"""The cache-less definition, in float64: what attention and the decoder *are*.

It has no cache and no state: every call gets all tokens and recomputes everything. Causality is by position: the token
at position ``j`` is visible to the token at position ``i`` iff ``j <= i``, and with a window of ``W`` iff also
``j > i - W``, so ``W`` counts the token itself. The output of a token that sees no key is exactly 0. Leading axes
``...`` are any batch.

Sources: scaled dot-product attention, Vaswani et al. 2017 (1706.03762, eq. 1); grouped KV heads, Ainslie et al. 2023
(2305.13245); sliding window, Beltagy et al. 2020 (2004.05150, section 3.1); softcap before the mask, Gemma 2
(2408.00118, section 2); linear biases, Press et al. 2022 (2108.12409, section 3); attention sinks, Xiao et al. 2023
(2309.17453, section 3), as a score for each head that only the denominator has, gpt-oss (2508.10925);
rotary positions, Su et al. 2021 (2104.09864, eq. 34) with GPT-NeoX's pairing of the two halves, and scaled as in
``rotary.py``; layers that read another one's keys and values, Brandon et al. 2024 (2405.12981), Sun et al. 2024
(2405.05254), Gemma 3n; latent attention, DeepSeek-V2 (2405.04434, section 2.1, eq. 9 to 19, without a latent of the
queries); RMSNorm, Zhang & Sennrich 2019 (1910.07467, eq. 4); gated MLP, Shazeer 2020 (2002.05202,
SwiGLU, eq. 6).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvconform_specs.config import Config
from kvconform_specs.rotary import Rotary, attention_factor, frequencies

Array = NDArray[np.floating]
NORM_EPS = 1e-6
LOWEST = float(np.finfo(np.float32).min)


class Arithmetic:
    """Exact arithmetic. ``bounds.Noisy`` replaces it to measure the effect of rounding."""

    def stored(self, x: Array) -> Array:
        """A value that an implementation stores in the config's dtype."""
        return x

    def cached(self, x: Array, part: str) -> Array:
        """``keys`` or ``values`` ``(..., g, s, d)`` as a lossy cache gives them back."""
        return x

    def product(self, x: Array, w: Array) -> Array:
        """``x @ w``, a dot product of ``x.shape[-1]`` terms, stored."""
        return np.asarray(x @ w)

    def angles(self, positions: Array, frequencies: Array) -> Array:
        """``positions (s,)`` times ``frequencies (d/2,)``, each of them rounded to float32."""
        return positions[:, None] * frequencies


EXACT = Arithmetic()


class Attended(NamedTuple):
    """Attention's result, and the quantities that its error bound depends on (``bounds.py``)."""

    output: Array  # (..., h, t, d)
    scores: Array  # (..., h, t, s) after scale, softcap and bias, before the mask
    weights: Array  # (..., h, t, s); with a sink they sum to less than 1
    visible: NDArray[np.bool_]  # broadcasts to (..., h, t, s)
    top: Array  # (..., h, t, 1) the largest visible score, or the sink where that is larger
    total: Array  # (..., h, t, 1) the sum of exp(score - top) over what is visible and the sink
    bias: Array | None  # (h, t, s) what alibi added to the scores


def visible(t: int, s: int, window: int | None, at: int | None = None) -> NDArray[np.bool_]:
    """``(t, s)``: which of ``s`` tokens each of the last ``t`` sees, or each of the ``t`` from position ``at`` on."""
    i, j = _positions(t, s, at)
    seen = j <= i
    return seen if window is None else seen & (j > i - window)


def alibi(heads: int, t: int, s: int, at: int | None = None) -> Array:
    """``(h, t, s)``: ``-slope (i - j)``, the slope of query head ``n`` being ``2^(-8 (n + 1) / h)``."""
    i, j = _positions(t, s, at)
    return slopes(heads)[:, None, None] * (j - i)


def slopes(heads: int) -> Array:
    return np.asarray(2.0 ** (-8.0 * np.arange(1, heads + 1) / heads))


def sinks(config: Config) -> Array:
    """``(h, 1, 1)``: each query head's sink."""
    return np.asarray((config.sink or 0.0) * np.arange(1, config.heads + 1)[:, None, None] / config.heads)


def expand(heads: Array, group: int) -> Array:
    """KV heads ``(..., g, s, d)`` as seen by each query head ``(..., h, s, d)``: head ``i`` reads ``i // group``."""
    return heads if group == 1 else np.repeat(heads, group, axis=-3)


def attention(
    query: Array,
    keys: Array,
    values: Array,
    config: Config,
    *,
    layer: int = 0,
    at: int | None = None,
    mask: NDArray[np.bool_] | None = None,
    how: Arithmetic = EXACT,
) -> Attended:
    """Queries ``(..., h, t, d)`` on all ``s`` tokens' keys and values ``(..., g, s, d)``.

    The queries are those of the last ``t`` tokens, or of the ``t`` tokens from position ``at`` on: a long context is
    computed in blocks of rows. ``mask`` is the caller's, True where a query may attend; it broadcasts to
    ``(..., h, t, s)`` and is combined with causality and window.
    """
    keys, values = expand(keys, config.group), expand(values, config.group)
    t, s = query.shape[-2], keys.shape[-2]
    scores = how.product(query, keys.swapaxes(-1, -2)) * config.score_scale  # (..., h, t, s)
    if config.softcap is not None:
        scores = how.stored(config.softcap * np.tanh(scores / config.softcap))
    bias = None
    if config.positions == "alibi":
        bias = alibi(config.heads, t, s, at).astype(scores.dtype)
        scores = how.stored(scores + how.stored(bias))
    seen = visible(t, s, config.window_of(layer), at)
    if mask is not None:
        seen = seen & mask
    masked = np.where(seen, scores, -np.inf)
    top = masked.max(axis=-1, keepdims=True, initial=LOWEST)  # finite also where nothing is visible
    if config.sink is not None:
        sink = sinks(config).astype(scores.dtype)
        top = np.maximum(top, sink)
    powers = how.stored(np.exp(masked - top))
    total = powers.sum(axis=-1, keepdims=True)
    if config.sink is not None:
        total = total + how.stored(np.exp(sink - top))
    total = np.maximum(total, 0.5)  # it is 0 where nothing is visible, else at least 1: the largest score's power
    weights = powers / total
    return Attended(how.product(weights, values), scores, weights, seen, top, total, bias)


def _positions(t: int, s: int, at: int | None) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions of the queries ``(t, 1)`` and of the keys ``(1, s)``."""
    first = s - t if at is None else at
    return np.arange(first, first + t)[:, None], np.arange(s)[None, :]


def turns(
    positions: NDArray[np.int64], d: int, length: int, rotary: Rotary | None = None, how: Arithmetic = EXACT
) -> tuple[Array, Array]:
    """Cosines and sines ``(s, d/2)`` by which rope turns heads at these positions in a context of ``length`` tokens."""
    angle = how.angles(positions.astype(np.float64), frequencies(rotary, d, length))
    factor = attention_factor(rotary)
    return np.cos(angle) * factor, np.sin(angle) * factor


def rope(heads: Array, turn: tuple[Array, Array]) -> Array:
    """Rotates ``(..., s, d)``: the pair ``(x_i, x_(i + d/2))`` by the angle whose cosine and sine are given."""
    half = heads.shape[-1] // 2
    cos, sin = (part.astype(heads.dtype) for part in turn)
    x, y = heads[..., :half], heads[..., half:]
    return np.concatenate([x * cos - y * sin, x * sin + y * cos], axis=-1)


def rms_norm(x: Array, gain: Array) -> Array:
    return np.asarray(x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + NORM_EPS) * gain)


def decoder(
    tokens: NDArray[np.int64],
    weights: Mapping[str, Array],
    config: Config,
    start: int = 0,
    how: Arithmetic = EXACT,
    attend: Callable[..., Attended] = attention,
    context: int | Array = 0,
) -> Array:
    """Logits ``(..., s - start, V)`` of the positions from ``start`` on, for token ids ``(..., s)``.

    Pre-norm blocks: ``x += attention(norm(x))``, then ``x += mlp(norm(x))``; a final norm; an untied LM head.
    ``weights`` are float64, named as in ``tensors.weight_shapes``. ``attend`` is called as ``attention``. ``context``:
    that of all sequences, or ``(...)`` of each.
    """
    positions = np.arange(tokens.shape[-1])
    x = weights["embed"][tokens]  # (..., s, width)
    if np.any(context):
        x = how.stored(x + weights["context"][context][..., None, :])
    turn = None
    if config.positions == "rope":
        turned = config.rotary_dim or config.head_dim
        turn = turns(positions, turned, len(positions), config.rotary, how)
    held: dict[int, tuple[Array, Array]] = {}  # keys and values by layer
    if config.positions == "learned":
        x = how.stored(x + weights["position"][positions])
    for layer in range(config.layers):
        at = f"layers.{layer}."
        normed = how.stored(rms_norm(x, weights[at + "norm_attention"]))
        query = _heads(how.product(normed, weights[at + "query"]), config.heads)
        source = config.source_of(layer)
        if config.latent:
            assert turn is not None
            query, held[layer] = _latent(query, normed, turn, layer, weights, config, how)
        else:
            if turn is not None:
                query = how.stored(rope(query, turn))
            if source == layer:
                keys = _heads(how.product(normed, weights[at + "key"]), config.kv_heads)
                values = _heads(how.product(normed, weights[at + "value"]), config.kv_heads)
                keys = keys if turn is None else how.stored(rope(keys, turn))
                held[layer] = how.cached(keys, "keys"), how.cached(values, "values")
        keys, values = held[source]
        mixed = _merged(attend(query, keys, values, config, layer=layer, how=how).output)
        x = how.stored(x + how.product(mixed, weights[at + "output"]))
        if config.mlp:
            normed = how.stored(rms_norm(x, weights[at + "norm_mlp"]))
            gate = how.product(normed, weights[at + "gate"])
            hidden = how.stored(how.stored(gate / (1 + np.exp(-gate))) * how.product(normed, weights[at + "up"]))
            x = how.stored(x + how.product(hidden, weights[at + "down"]))
    last = how.stored(rms_norm(x[..., start:, :], weights["norm_final"]))
    return how.product(last, weights["lm_head"])


def _latent(
    query: Array,
    normed: Array,
    turn: tuple[Array, Array],
    layer: int,
    weights: Mapping[str, Array],
    config: Config,
    how: Arithmetic,
) -> tuple[Array, tuple[Array, Array]]:
    """Latent attention: turned queries, and keys ``(..., h, s, d + rotary_dim)`` and values ``(..., h, s, d)``.

    The latent, normalised, is expanded to keys and values of every head; rope turns the last dims of the queries and
    the one rotary key that all heads share.
    """
    at, d = f"layers.{layer}.", config.head_dim
    query = np.concatenate([query[..., :d], how.stored(rope(query[..., d:], turn))], axis=-1)
    down = how.product(normed, weights[at + "down"])  # (..., s, latent + rotary_dim)
    latent = how.stored(rms_norm(down[..., : config.latent], weights[at + "norm_latent"]))
    expanded = _heads(how.product(latent, weights[at + "up"]), config.heads)  # (..., h, s, 2 d)
    rotary = how.stored(rope(down[..., None, :, config.latent :], turn))  # (..., 1, s, rotary_dim)
    rotary = np.broadcast_to(rotary, (*expanded.shape[:-1], config.rotary_dim))
    return query, (np.concatenate([expanded[..., :d], rotary], axis=-1), expanded[..., d:])


def _heads(x: Array, heads: int) -> Array:
    """``(..., s, heads * d)`` to ``(..., heads, s, d)``."""
    return x.reshape(*x.shape[:-1], heads, -1).swapaxes(-2, -3)


def _merged(x: Array) -> Array:
    """``(..., h, s, d)`` to ``(..., s, h * d)``."""
    return x.swapaxes(-2, -3).reshape(*x.shape[:-3], x.shape[-2], -1)
