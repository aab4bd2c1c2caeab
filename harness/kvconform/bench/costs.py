"""The least that a step of a decoder costs, from its config: multiply-adds (``kvconform_specs.costs``) and bytes.

What is counted is what no implementation can leave out: every weight that the step needs is read once (of the
embedding and of learned positions one row a token), keys and values of the cached tokens that a new token sees are
read once for each KV head and layer, and those of the new tokens are written. Activations, logits and masks may stay
in registers and count nothing. Multiply-adds are those of the matrix products alone, as the clauses of the chapter
``accounting`` count them, and each is two FLOPs.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from kvconform_specs.config import ITEMSIZE, Config
from kvconform_specs.costs import GATHERED, cache_bytes, multiply_adds, seen
from kvconform_specs.tensors import weight_shapes

DESIGNS = {
    "in-place": "writes new tokens into a buffer and reads the visible ones",
    "capacity": "writes new tokens into a buffer and reads all of its slots",
    "concatenation": "copies the past and the new tokens into new memory, then reads the visible ones there",
}
"""How a cache takes and gives its tokens: the values that a backend's ``cache_design`` may have."""


class Cost(NamedTuple):
    """Bytes that must be moved, and FLOPs, of one timed step."""

    bytes: int
    flops: int


def cost(config: Config, phase: str, depth: int, batch: int = 1) -> Cost:
    """The least that one step of a phase costs at a depth (``record.PHASES``); generations and ceilings have none."""
    last = phase.endswith("-last")
    match phase:
        case "decode":
            past, new, cached = depth, 1, True
        case "prefill":
            past, new, cached = 0, depth, True
        case "recompute" | "recompute-last":
            past, new, cached = 0, depth + 1, False
        case _:
            raise ValueError(f"the phase {phase!r} is not made of equal steps")
    flops = 2 * multiply_adds(config, past, new, batch, last_only=last)
    return Cost(bytes_min(config, past, new, batch, cached=cached), flops)


def bytes_min(config: Config, past: int, new: int, batch: int = 1, *, cached: bool = True) -> int:
    """Bytes that ``batch`` rows of ``new`` tokens must move; without a cache no keys or values leave the processor."""
    c, slots = config, 0
    if cached:
        slots = sum(min(past, (c.window_of(layer) or past + 1) - 1) + new for layer in c.caching)
    return weights_read(c, new, batch) + batch * _slots(c, slots)


def bytes_expected(config: Config, depth: int, batch: int, design: str | None) -> int | None:
    """Bytes that a decode step at a depth moves by the design of its cache (``DESIGNS``); None for an unknown design.

    Concatenation reads ``n`` tokens and writes ``n + 1``, of which attention reads those that are seen: ``3 n + 2``
    without a window, where ``n + 1`` would do. A window saves nothing of the copy.
    """
    c, n = config, depth
    if design == "in-place":
        return bytes_min(c, n, 1, batch)
    if design == "capacity":
        slots = len(c.caching) * (c.capacity + 1)
    elif design == "concatenation":
        slots = sum(n + (n + 1) + seen(c, layer, n, 1) for layer in c.caching)
    else:
        return None
    return weights_read(c, 1, batch) + batch * _slots(c, slots)


def weights_read(config: Config, new: int, batch: int) -> int:
    """Bytes of the weights that a step reads, each once: the LM head whole, the embedding and positions by rows.

    Benchmarks have one context."""
    rows = dict(zip(GATHERED, (min(batch * new, config.vocabulary), new), strict=True))
    shapes = [(name, shape) for name, shape in weight_shapes(config).items() if name != "context"]
    numbers = sum(rows[name] * shape[1] if name in rows else math.prod(shape) for name, shape in shapes)
    return numbers * ITEMSIZE[config.dtype]


def _slots(config: Config, slots: int) -> int:
    """Bytes of so many slots, counted over all layers."""
    return cache_bytes(config, slots) // len(config.caching)
