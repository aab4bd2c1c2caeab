"""What a decoder's step must compute and keep: multiply-adds of its matrix products, and bytes of its cache.

The judged counts of the chapter ``accounting``, the counters and the roofline of the bench all take them from here.
Backends do not: they count what they run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from kvconform_specs.claims import Claims
from kvconform_specs.config import ITEMSIZE, Config
from kvconform_specs.tensors import weight_shapes

GATHERED = ("embed", "position")
"""Weights of which a step reads one row a token: they are part of no product."""


def multiply_adds(
    config: Config, past: int, new: int, batch: int = 1, *, keys: int | None = None, last_only: bool = False
) -> int:
    """Multiply-adds of all matrix products, for ``batch`` rows of ``new`` tokens after ``past`` cached ones.

    keys: the number of keys that each new token meets in every layer, if that is more than it sees: ``past + new``
    with a dense mask, the capacity if all slots are read; None: the keys that it sees. last_only: only the last
    position is projected to logits. Latent attention is counted in its absorbed form, which multiplies the latent of
    each key and never expands it.
    """
    c, shapes = config, weight_shapes(config)
    layers = sum(math.prod(shape) for name, shape in shapes.items() if len(shape) == 2 and "." in name)
    met = c.layers * new * keys if keys is not None else sum(seen(c, layer, past, new) for layer in range(c.layers))
    head = (1 if last_only else new) * math.prod(shapes.get("lm_head", (0,)))
    one_key = c.heads * (2 * c.latent + c.rotary_dim if c.latent else 2 * c.head_dim)
    return batch * (new * layers + head + one_key * met)


def seen(config: Config, layer: int, past: int, new: int) -> int:
    """The number of keys that the new tokens see in a layer: the sum over the tokens, each including itself."""
    window = config.window_of(layer) or past + new
    return sum(min(position + 1, window) for position in range(past, past + new))


def cache_bytes(config: Config, slots: int) -> int:
    """Bytes of what so many slots of every layer keep: keys and values, or latents and rotary keys."""
    return config.kept * slots * ITEMSIZE[config.dtype]


def slots(claims: Claims, config: Config, length: int) -> int:
    """The slots that a row of that length takes, as claimed, where nothing is evicted."""
    if claims.memory == "capacity":
        return config.capacity
    return _whole_pages(claims, length) if claims.memory == "pages" else length


def retained(claims: Claims, config: Config, layer: int, length: int, longest: int) -> tuple[int, int]:
    """The fewest and the most tokens that a layer holds of a row of that length. ``longest``: tokens of the longest
    append so far, which may attend before anything is evicted."""
    window = config.window_of(layer)
    if claims.retention == "all" or window is None:
        return length, length
    page = (claims.page or 1) - 1  # a page goes when none of its tokens is needed
    return min(length, window - 1), min(length, 2 * window + longest + (claims.rollback or 0) + page)


def held_bytes(claims: Claims, config: Config, lengths: Sequence[int], longest: int) -> tuple[int, int]:
    """The fewest and the most bytes of the keys and values of rows of these lengths, as claimed.

    A quantised token takes ``kv_bits`` a number, and one scale of up to four bytes for each head.
    """
    least = most = 0
    for layer in config.caching:
        for length in lengths:
            low, high = retained(claims, config, layer, length, longest)
            if claims.memory == "capacity":
                evicts = claims.retention == "window" and config.window_of(layer) is not None
                everything = retained(claims, config, layer, config.capacity, longest) if evicts else None
                low, high = everything or (config.capacity, config.capacity)
            elif claims.memory == "pages":
                low, high = low if low < high else _whole_pages(claims, low), _whole_pages(claims, high)
            for part in ("keys", "values"):
                exact = _exact(claims, part, length) if claims.kv_bits else high
                least += _bytes(claims, config, part, low, min(exact, low), scale=0)
                most += _bytes(claims, config, part, high, exact, scale=4)
    return least, most


def _exact(claims: Claims, part: str, length: int) -> int:
    """Tokens of a row that are not quantised: the residual window, and a group of tokens that is not full."""
    quantised = max(length - claims.residual, 0)
    if getattr(claims.quantiser, part) == "channel":
        quantised -= quantised % (claims.quantiser.group or 1)
    return length - quantised


def _bytes(claims: Claims, config: Config, part: str, slots: int, exact: int, scale: int) -> int:
    """Bytes of so many slots of a layer's keys or values, of which some hold tokens in the storage dtype; ``scale``:
    of each scale, and of each zero point."""
    c, q = config, claims.quantiser
    if c.latent:  # one latent and one rotary key of a token, for all heads; not quantised
        return slots * (c.latent if part == "keys" else c.rotary_dim) * ITEMSIZE[claims.cache_dtype or c.dtype]
    quantised = slots - exact
    groups = -(-quantised // (q.group or 1)) * c.head_dim if getattr(q, part) == "channel" else quantised
    groups *= 1 if getattr(q, part) == "channel" else -(-c.head_dim // (q.group or c.head_dim))
    codes = quantised * -(-c.head_dim * claims.kv_bits // 8) + groups * scale * (1 if q.zero_point == "none" else 2)
    return c.kv_heads * (codes + exact * c.head_dim * ITEMSIZE[claims.cache_dtype or c.dtype])


def _whole_pages(claims: Claims, length: int) -> int:
    return -(-length // (claims.page or 1)) * (claims.page or 1)
