"""Backends for what the language of programs and claims can say: per-row rollback, windows, padding, generation."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvconform import Claims
from kvconform_backends.numpy.cache import NumpyCache
from kvconform_specs.config import Config

Array = NDArray[Any]


# --- plain attention, with a cache that each class keeps in its own way ---
class Plain:
    """Causal attention with a window, row by row."""

    def __init__(self, config: Config, weights: object, device: str) -> None:
        self.config = config

    @classmethod
    def refuses(cls, config: Config, device: str) -> str | None:
        return "plain attention only" if config.positions == "alibi" or config.sink or config.softcap else None

    def attended(self, query: Array, keys: Array, values: Array) -> Array:
        """``(..., h, t, d)``: the newest ``t`` tokens on keys and values ``(..., g, s, d)``."""
        c, t, s = self.config, query.shape[-2], keys.shape[-2]
        keys, values = (np.repeat(x, c.heads // c.kv_heads, axis=-3) for x in (keys, values))
        scores = query @ keys.swapaxes(-1, -2) * np.float32(c.score_scale)
        i, j = np.arange(s - t, s)[:, None], np.arange(s)
        scores = np.where((j <= i) & (i - j < (c.window or s + 1)), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        return np.asarray(weights / weights.sum(-1, keepdims=True) @ values)


class Speculative(Plain):
    """A static cache for batched speculative decoding: rows roll back by different numbers of rejected drafts."""

    claims = Claims(
        profiles=("attention",),
        abilities=("length", "truncate", "truncate_rows", "ragged", "reset"),
        overflow="refused",
    )

    def start(self, batch: int) -> dict[str, Array]:
        c = self.config
        return {"kv": np.zeros((2, batch, c.kv_heads, c.capacity, c.head_dim), np.float32), "n": np.zeros(batch, int)}

    def length(self, cache: dict[str, Array]) -> list[int]:
        return [int(n) for n in cache["n"]]

    def reset(self, cache: dict[str, Array]) -> dict[str, Array]:
        return self.start(len(cache["n"]))

    def truncate(self, cache: dict[str, Array], length: Any) -> dict[str, Array]:
        kept = np.broadcast_to(length, cache["n"].shape)
        if (kept < 0).any() or (kept > cache["n"]).any():
            raise ValueError(length)
        cache["n"] = self.rolled_back(cache["n"], kept)
        return cache

    def rolled_back(self, was: Array, kept: Array) -> Array:
        return kept.copy()

    def step(
        self, cache: dict[str, Array], query: Array, key: Array, value: Array, counts: Array | None = None
    ) -> tuple[Array, dict[str, Array]]:
        counts = np.full(len(query), query.shape[2]) if counts is None else counts
        if (cache["n"] + counts).max() > self.config.capacity:
            raise ValueError("full")
        out = np.zeros_like(query)
        for row, (n, m) in enumerate(zip(cache["n"], counts, strict=True)):
            cache["kv"][:, row, :, n : n + m] = key[row, :, :m], value[row, :, :m]
            if m:
                out[row, :, :m] = self.attended(query[row, :, :m], *cache["kv"][:, row, :, : n + m])
        return out, {**cache, "n": cache["n"] + counts}


class SpeculativeAlike(Speculative):
    """The length goes back by the row that accepted most: the others keep rejected drafts."""

    def rolled_back(self, was: Array, kept: Array) -> Array:
        return np.minimum(was, kept.max())


class LeftPaddedRing(Plain):
    """A ring of the window's size in which a prompt's columns of padding, on the left, are stored as well; a slot
    counts as padding by the column that lies in it now. Only the prompt is ragged."""

    claims = Claims(
        profiles=("attention",),
        abilities=("length", "ragged", "reset"),
        padding=("left",),
        ragged_appends="first",
        overflow="refused",
        retention="window",
    )

    def start(self, batch: int) -> dict[str, Any]:
        size = self.config.window or self.config.capacity
        shape = (2, batch, self.config.kv_heads, size, self.config.head_dim)
        return {"kv": np.zeros(shape, np.float32), "n": 0, "pad": None, "batch": batch}

    def length(self, cache: dict[str, Any]) -> list[int]:
        pad = np.zeros(cache["batch"], int) if cache["pad"] is None else cache["pad"]
        return [int(cache["n"] - p) for p in pad]

    def reset(self, cache: dict[str, Any]) -> dict[str, Any]:
        return self.start(cache["batch"])

    def step(
        self,
        cache: dict[str, Any],
        query: Array,
        key: Array,
        value: Array,
        counts: Array | None = None,
        padding: str = "right",
    ) -> tuple[Array, dict[str, Any]]:
        t = query.shape[2]
        counts = np.full(len(query), t) if counts is None else counts
        if cache["pad"] is None:
            if (counts != t).any() and padding != "left":
                raise ValueError("padding comes first")
            cache["pad"] = t - counts
        elif (counts != t).any():
            raise ValueError("only the prompt is ragged")
        if cache["n"] - cache["pad"].min() + t > self.config.capacity:
            raise ValueError("full")
        out = np.zeros_like(query)
        for column in range(t):
            at, size = cache["n"], cache["kv"].shape[3]
            cache["kv"][:, :, :, at % size] = key[:, :, column], value[:, :, column]
            cache["n"] = at + 1
            columns = np.arange(max(at - size + 1, 0), at + 1)
            for row in range(len(query)):
                mine = columns[self.real(columns, size, int(cache["pad"][row]))]
                if len(mine):
                    held = cache["kv"][:, row][:, :, mine % size]
                    out[row, :, column] = self.attended(query[row, :, column : column + 1], *held)[:, 0]
        return out, cache

    def real(self, columns: Array, size: int, pad: int) -> Array:
        return columns >= pad


class LeftPaddedRingBySlot(LeftPaddedRing):
    """A slot counts as padding by its own number, also when the ring has gone round."""

    def real(self, columns: Array, size: int, pad: int) -> Array:
        return columns % size >= pad


class OnlyGenerates:
    """An engine that generates and does nothing else."""

    claims = Claims(profiles=("decoder",), abilities=("generate",), interface="generation")

    def __init__(self, config: Config, weights: dict[str, Array], device: str) -> None:
        self.cache = NumpyCache(config, weights, device)

    def generate(self, tokens: Array, new: int) -> Array:
        return self.cache.generate(tokens, new)


class GeneratesLastTokenTwice(OnlyGenerates):
    """The last token of the prompt is fed twice."""

    def generate(self, tokens: Array, new: int) -> Array:
        if tokens.shape[1] + new >= self.cache.config.capacity:
            return super().generate(tokens, new)
        return super().generate(np.concatenate([tokens, tokens[:, -1:]], axis=1), new)


class NoReset(Plain):
    """Sequences are made new, and never reset."""

    claims = Claims(profiles=("attention",))

    def start(self, batch: int) -> tuple[Array, Array]:
        empty = np.zeros((batch, self.config.kv_heads, 0, self.config.head_dim), np.float32)
        return empty, empty

    def step(
        self, cache: tuple[Array, Array], query: Array, key: Array, value: Array
    ) -> tuple[Array, tuple[Array, Array]]:
        keys, values = (np.concatenate(pair, axis=2) for pair in zip(cache, (key, value), strict=True))
        return self.attended(query, keys, values).astype(np.float32), (keys, values)
