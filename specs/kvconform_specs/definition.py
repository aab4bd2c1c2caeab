"""The cache-less definition, in float64: what attention and the decoder *are*.

There is no cache here and no state: every call gets all tokens and recomputes everything. Causality is by position:
the token at position ``j`` is visible to the token at position ``i`` iff ``j <= i``, and with a window of ``W`` iff
also ``j > i - W``, so ``W`` counts the token itself. Leading axes ``...`` are any batch.

Sources: scaled dot-product attention, Vaswani et al. 2017 (1706.03762, eq. 1); grouped KV heads, Ainslie et al. 2023
(2305.13245); sliding window, Beltagy et al. 2020 (2004.05150, section 3.1); softcap before the mask, Gemma 2
(2408.00118, section 2); rotary positions, Su et al. 2021 (2104.09864, eq. 34) with GPT-NeoX's pairing of the two
halves; RMSNorm, Zhang & Sennrich 2019 (1910.07467, eq. 4); gated MLP, Shazeer 2020 (2002.05202, SwiGLU, eq. 6).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvconform_specs.config import Config

Array = NDArray[np.floating]
ROPE_BASE = 10000.0
NORM_EPS = 1e-6


class Attended(NamedTuple):
    """Attention's result and the quantities that its error bound is made of (``bounds.py``)."""

    output: Array  # (..., h, t, d)
    scores: Array  # (..., h, t, s) after scale and softcap, before the mask
    weights: Array  # (..., h, t, s)
    visible: NDArray[np.bool_]  # (t, s)


def visible(t: int, s: int, window: int | None) -> NDArray[np.bool_]:
    """``(t, s)``: which of ``s`` tokens each of the last ``t`` sees."""
    i = np.arange(s - t, s)[:, None]
    j = np.arange(s)[None, :]
    seen = j <= i
    return seen if window is None else seen & (j > i - window)


def expand(heads: Array, group: int) -> Array:
    """KV heads ``(..., g, s, d)`` as seen by each query head ``(..., h, s, d)``: head ``i`` reads ``i // group``."""
    return np.repeat(heads, group, axis=-3)


def attention(query: Array, keys: Array, values: Array, config: Config) -> Attended:
    """The last ``t`` tokens' queries ``(..., h, t, d)`` on all ``s`` tokens' keys and values ``(..., g, s, d)``."""
    keys, values = expand(keys, config.group), expand(values, config.group)
    scores = query @ keys.swapaxes(-1, -2) * config.score_scale  # (..., h, t, s)
    if config.softcap is not None:
        scores = config.softcap * np.tanh(scores / config.softcap)
    seen = visible(query.shape[-2], keys.shape[-2], config.window)
    masked = np.where(seen, scores, -np.inf)
    powers = np.exp(masked - masked.max(axis=-1, keepdims=True))
    weights = powers / powers.sum(axis=-1, keepdims=True)
    return Attended(weights @ values, scores, weights, seen)


def rope(heads: Array, positions: NDArray[np.int64]) -> Array:
    """Rotates ``(..., s, d)``: the pair ``(x_i, x_(i + d/2))`` by the angle ``position * base^(-2 i / d)``."""
    half = heads.shape[-1] // 2
    angle = positions[:, None] * ROPE_BASE ** (-np.arange(half) / half)  # (s, d/2)
    cos, sin = np.cos(angle).astype(heads.dtype), np.sin(angle).astype(heads.dtype)
    x, y = heads[..., :half], heads[..., half:]
    return np.concatenate([x * cos - y * sin, x * sin + y * cos], axis=-1)


def rms_norm(x: Array, gain: Array) -> Array:
    return np.asarray(x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + NORM_EPS) * gain)


class Arithmetic:
    """How the decoder's definition computes: exactly. ``bounds.Noisy`` replaces it to measure what rounding does."""

    def stored(self, x: Array) -> Array:
        """A value that an implementation writes in storage precision."""
        return x

    def product(self, x: Array, w: Array) -> Array:
        """``x @ w``, a dot product of ``x.shape[-1]`` terms, stored."""
        return np.asarray(x @ w)


EXACT = Arithmetic()


def decoder(
    tokens: NDArray[np.int64], weights: Mapping[str, Array], config: Config, start: int = 0, how: Arithmetic = EXACT
) -> Array:
    """Logits ``(..., s - start, V)`` of the positions from ``start`` on, for token ids ``(..., s)``.

    Pre-norm blocks: ``x += attention(norm(x))``, then ``x += mlp(norm(x))``; a final norm; an untied LM head.
    ``weights`` are float64, named as in ``tensors.weight_shapes``.
    """
    positions = np.arange(tokens.shape[-1])
    x = weights["embed"][tokens]  # (..., s, width)
    if config.positions == "learned":
        x = how.stored(x + weights["position"][positions])
    for layer in range(config.layers):
        at = f"layers.{layer}."
        normed = how.stored(rms_norm(x, weights[at + "norm_attention"]))
        query = _heads(how.product(normed, weights[at + "query"]), config.heads)
        keys = _heads(how.product(normed, weights[at + "key"]), config.kv_heads)
        values = _heads(how.product(normed, weights[at + "value"]), config.kv_heads)
        if config.positions == "rope":
            query, keys = how.stored(rope(query, positions)), how.stored(rope(keys, positions))
        mixed = _merged(_attend(query, keys, values, config, how))
        x = how.stored(x + how.product(mixed, weights[at + "output"]))
        if config.mlp:
            normed = how.stored(rms_norm(x, weights[at + "norm_mlp"]))
            gate = how.product(normed, weights[at + "gate"])
            hidden = how.stored(how.stored(gate / (1 + np.exp(-gate))) * how.product(normed, weights[at + "up"]))
            x = how.stored(x + how.product(hidden, weights[at + "down"]))
    last = how.stored(rms_norm(x[..., start:, :], weights["norm_final"]))
    return how.product(last, weights["lm_head"])


def _attend(query: Array, keys: Array, values: Array, config: Config, how: Arithmetic) -> Array:
    if how is EXACT:
        return attention(query, keys, values, config).output
    keys, values = expand(keys, config.group), expand(values, config.group)
    scores = how.product(query, keys.swapaxes(-1, -2)) * config.score_scale
    if config.softcap is not None:
        scores = how.stored(config.softcap * np.tanh(scores / config.softcap))
    scores = np.where(visible(query.shape[-2], keys.shape[-2], config.window), scores, -np.inf)
    powers = how.stored(np.exp(scores - scores.max(axis=-1, keepdims=True)))
    return how.product(powers / powers.sum(axis=-1, keepdims=True), values)


def _heads(x: Array, heads: int) -> Array:
    """``(..., s, heads * d)`` to ``(..., heads, s, d)``."""
    return x.reshape(*x.shape[:-1], heads, -1).swapaxes(-2, -3)


def _merged(x: Array) -> Array:
    """``(..., h, s, d)`` to ``(..., s, h * d)``."""
    return x.swapaxes(-2, -3).reshape(*x.shape[:-3], x.shape[-2], -1)
