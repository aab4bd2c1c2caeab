"""What a decoder's step must compute and keep: multiply-adds of its matrix products, and bytes of its cache.

The judged counts of the chapter ``accounting``, the counters and the roofline of the bench all take them from here.
Backends do not: they count what they run.
"""

from __future__ import annotations

import math

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
    """The slots that a row of that length takes, as claimed."""
    if claims.memory == "capacity":
        return config.capacity
    if claims.memory == "pages":
        return -(-length // (claims.page or 1)) * (claims.page or 1)
    return length
