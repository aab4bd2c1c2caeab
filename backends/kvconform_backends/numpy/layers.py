"""Attention and decoder in numpy and float32, shared by the ``numpy-*`` backends."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvconform_backends.rotary import attention_factor, inverse_frequencies
from kvconform_specs.config import Config

Array = NDArray[Any]
MINUS_INFINITY = np.float32(-np.inf)


class NumpyLayers:
    """The arithmetic. A cache provides ``attend``, and overrides ``behind`` and ``positions`` if its rows differ in
    length."""

    layer = 0  # the attending layer
    allowed: Array | None = None  # the caller's mask (b, s) of this step
    products = 0  # multiply-adds of this step so far
    last_only = False  # whether this step returns only its last logits
    context = 0  # that of this step's sequence
    places_now: Array  # the positions of this step's tokens, (t,) or (b, t)
    totals: Any = 1  # the tokens of each row with those of this step: a number, or (b,) if rows differ

    def __init__(self, config: Config, weights: Mapping[str, Array], device: str = "cpu") -> None:
        self.config, self.weights = config, weights

    def attend(self, cache: Any, layer: int, query: Array, key: Array, value: Array) -> Array:
        """Appends key and value ``(b, g, t, d)`` to the layer and attends with query ``(b, h, t, d)``."""
        raise NotImplementedError

    # --- attention ---
    def attention(self, query: Array, keys: Array, values: Array) -> Array:
        """``(b, h, t, d)``: queries ``(b, h, t, d)`` on keys and values ``(b, g, s, d)``."""
        weights = self.softmax(self.scores(query, keys[:, self.kv_head()]))
        return self.product(weights, values[:, self.kv_head()])

    def kv_head(self) -> Array:
        """The KV head of each query head."""
        return np.arange(self.config.heads) // self.config.group

    def scores(self, query: Array, keys: Array) -> Array:
        """``(b, h, t, s)``: scaled, capped, biased, then masked."""
        c, t, s = self.config, query.shape[2], keys.shape[2]
        scores = self.product(query, keys.swapaxes(-1, -2)) * np.float32(c.score_scale)
        if c.softcap is not None:
            scores = np.float32(c.softcap) * np.tanh(scores / np.float32(c.softcap))
        if c.positions == "alibi":
            scores = scores + self.bias(t, s)
        return np.where(self.visible(t, s), scores, MINUS_INFINITY)

    def behind(self, t: int, s: int) -> Array:
        """``(t, s)``: the distance from each of the ``t`` newest tokens back to each of ``s`` tokens."""
        return np.arange(s - t, s)[:, None] - np.arange(s)

    def bias(self, t: int, s: int) -> Array:
        """``(h, t, s)``: ALiBi (Press et al. 2022, 2108.12409), with the slopes ``2^(-8 (i + 1) / h)``."""
        h = self.config.heads
        slopes = (2.0 ** (-8 * np.arange(1, h + 1) / h)).astype(np.float32)
        return np.asarray(-slopes[:, None, None] * self.behind(t, s).astype(np.float32))

    def mask(self, t: int, s: int) -> Array:
        """``(t, s)``: which of ``s`` tokens each of the ``t`` newest sees, by causality and the layer's window."""
        behind, window = self.behind(t, s), self.config.window_of(self.layer)
        return behind >= 0 if window is None else (behind >= 0) & (behind < window)

    def visible(self, t: int, s: int) -> Array:
        """The mask combined with the caller's mask."""
        seen = self.mask(t, s)
        return seen if self.allowed is None else seen & self.allowed[:, None, None]

    def sink(self) -> Array:
        """``(h, 1, 1)``: the score of each head's sink; minus infinity without sinks."""
        h, sink = self.config.heads, self.config.sink
        shares = np.arange(1, h + 1, dtype=np.float32) / np.float32(h)
        return np.full((h, 1, 1), MINUS_INFINITY) if sink is None else (np.float32(sink) * shares)[:, None, None]

    def softmax(self, scores: Array) -> Array:
        """Attention weights, excluding that of the sink. For a query that sees nothing they are 0."""
        sink = self.sink()
        top = np.maximum(scores.max(axis=-1, keepdims=True), sink)
        top = np.where(top == MINUS_INFINITY, np.float32(0), top)
        powers = np.exp(scores - top)
        total = powers.sum(axis=-1, keepdims=True) + np.exp(sink - top)
        return np.asarray(powers / np.where(total == 0, np.float32(1), total))

    def product(self, x: Array, w: Array) -> Array:
        """``x @ w``, counting multiply-adds."""
        result = x @ w
        self.products += result.size * x.shape[-1]
        return np.asarray(result)

    # --- decoder ---
    def decode(self, cache: Any, tokens: Array) -> Array:
        c, w = self.config, self.weights
        positions = self.places_now = self.positions(cache, tokens.shape[1])
        self.totals = positions.max(axis=-1, initial=-1) + 1  # of this call, also if it has no tokens
        x = w["embed"][tokens]  # (b, t, width)
        if self.context:
            x = x + w["context"][self.context]
        if c.positions == "learned":
            x = x + w["position"][positions]
        for layer in range(c.layers):
            at = f"layers.{layer}."
            y = self.norm(x, w[at + "norm_attention"])
            mixed = (
                self.attention_of(cache, layer, y, positions).swapaxes(1, 2).reshape(*x.shape[:2], c.heads * c.head_dim)
            )
            x = x + self.product(mixed, w[at + "output"])
            if c.mlp:
                y = self.norm(x, w[at + "norm_mlp"])
                gate = self.product(y, w[at + "gate"])
                hidden = gate / (1 + np.exp(-gate)) * self.product(y, w[at + "up"])
                x = x + self.product(hidden, w[at + "down"])
        return self.product(self.norm(x[:, -1:] if self.last_only else x, w["norm_final"]), w["lm_head"])

    def attention_of(self, cache: Any, layer: int, y: Array, positions: Array) -> Array:
        """A layer's attention ``(b, h, t, d)`` for its normed input ``(b, t, width)``."""
        c, turned_first = self.config, self.config.positions == "rope" and not self.config.changes_at
        own = c.source_of(layer) == layer
        if c.latent:
            return self.attend(cache, layer, *self.latent(layer, y, positions))
        names = ("query", "key", "value") if own else ("query",)
        q, *kv = (self.split(self.product(y, self.weights[f"layers.{layer}.{name}"])) for name in names)
        if turned_first:
            q = self.rotate(q, positions)
        if not own:
            return self.attend_shared(cache, layer, q)
        k, v = kv
        return self.attend(cache, layer, q, self.rotate(k, positions) if turned_first else k, v)

    def latent(self, layer: int, y: Array, positions: Array) -> tuple[Array, Array, Array]:
        """Queries ``(b, h, t, d + rotary_dim)``, the latent ``(b, 1, t, latent)`` and the rotary key ``(b, 1, t,
        rotary_dim)``; the last two are what is cached."""
        c, at = self.config, f"layers.{layer}."
        query = (
            self.product(y, self.weights[at + "query"])
            .reshape(*y.shape[:2], c.heads, c.head_dim + c.rotary_dim)
            .swapaxes(1, 2)
        )
        down = self.product(y, self.weights[at + "down"])[:, None]
        still, turning = np.split(query, [c.head_dim], axis=-1)
        query = np.concatenate([still, self.rotate(turning, positions)], axis=-1)
        latent = self.norm(down[..., : c.latent], self.weights[at + "norm_latent"])
        return query, latent, self.rotate(down[..., c.latent :], positions)

    def absorbed(self, query: Array, latents: Array, rotary: Array) -> Array:
        """Latent attention on latents and rotary keys ``(b, 1, s, ...)``, which are not expanded: the projections to
        keys and values are part of the query and of the result."""
        c = self.config
        up = self.weights[f"layers.{self.layer}.up"].reshape(c.latent, c.heads, 2 * c.head_dim).swapaxes(0, 1)
        to_keys, to_values = np.split(up, 2, axis=-1)  # (h, latent, d) each
        still, turned = np.split(query, [c.head_dim], axis=-1)
        query = np.concatenate([self.product(still, to_keys.swapaxes(-1, -2)), turned], axis=-1)
        weights = self.softmax(self.scores(query, np.concatenate([latents, rotary], axis=-1)))
        return self.product(self.product(weights, latents), to_values)

    def attend_shared(self, cache: Any, layer: int, query: Array) -> Array:
        """Attends with query ``(b, h, t, d)`` to the keys and values of the layer's source, which are complete."""
        raise NotImplementedError

    def positions(self, cache: Any, t: int) -> Array:
        """The logical positions of the new tokens: ``(t,)``, or ``(b, t)`` if rows differ."""
        return np.arange(cache.length, cache.length + t)

    def split(self, x: Array) -> Array:
        """``(b, t, heads * d)`` to ``(b, heads, t, d)``."""
        d = self.config.head_dim
        return x.reshape(*x.shape[:2], x.shape[2] // d, d).swapaxes(1, 2)

    def rotate(self, x: Array, positions: Array) -> Array:
        d, totals = x.shape[-1], self.totals
        if self.config.changes_at and np.ndim(totals):
            by_row = np.stack([inverse_frequencies(self.config, d, int(total)) for total in totals])[:, None, None]
        else:
            by_row = inverse_frequencies(self.config, d, int(np.max(totals)))
        angle, factor = positions[..., None, :, None] * by_row, attention_factor(self.config)
        return turned(x, (np.cos(angle) * factor).astype(np.float32), (np.sin(angle) * factor).astype(np.float32))

    def norm(self, x: Array, gain: Array) -> Array:
        return np.asarray(x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(1e-6)) * gain)


def rotated(x: Array, angle: Array) -> Array:
    """Rotates the pairs ``(x_i, x_(i + d/2))`` by ``angle``, ``(..., t, d / 2)``."""
    return turned(x, np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32))


def turned(x: Array, cos: Array, sin: Array) -> Array:
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
