"""What a step of a decoder costs, exactly, from its config: multiply-adds and bytes.

What is counted is what no implementation can leave out: every weight that the step needs is read once (of the
embedding and of learned positions one row a token), keys and values of the cached tokens that a new token sees are
read once for each KV head and layer, and those of the new tokens are written. Activations, logits and masks may stay
in registers and count nothing. Multiply-adds are those of the matrix products alone, as the clauses of the chapter
``accounting`` count them, and each is two FLOPs.
"""

from __future__ import annotations

from typing import NamedTuple

from kvconform_specs.config import ITEMSIZE, Config
from kvconform_specs.tensors import weight_shapes

DESIGNS = {
    "in-place": "writes new tokens into a buffer and reads the visible ones",
    "capacity": "writes new tokens into a buffer and reads all of its slots",
    "concatenation": "copies the past and the new tokens into new memory, then reads the visible ones there",
}
"""How a cache takes and gives its tokens: what a backend may runtime_info as its ``cache_design``."""


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
            raise ValueError(f"no step is known of the phase {phase!r}")
    return Cost(
        bytes_min(config, past, new, batch, cached=cached), 2 * multiply_adds(config, past, new, batch, last_only=last)
    )


def multiply_adds(
    config: Config, past: int, new: int, batch: int = 1, *, keys: int | None = None, last_only: bool = False
) -> int:
    """Of all matrix products, for ``batch`` rows of ``new`` tokens behind ``past`` cached ones.

    keys: how many keys meet each new token in every layer, where that is more than it sees: ``past + new`` under a
    dense mask, the capacity where all slots are read; None: those that it sees. last: the logits of the last position
    alone.
    """
    c, shapes = config, weight_shapes(config)
    layers = sum(_size(shape) for name, shape in shapes.items() if len(shape) == 2 and "." in name)
    met = c.layers * new * keys if keys is not None else sum(_seen(c, layer, past, new) for layer in range(c.layers))
    head = (1 if last_only else new) * _size(shapes["lm_head"])
    return batch * (new * layers + head + 2 * c.heads * c.head_dim * met)


def bytes_min(config: Config, past: int, new: int, batch: int = 1, *, cached: bool = True) -> int:
    """What ``batch`` rows of ``new`` tokens must move; without a cache neither keys nor values leave the processor."""
    c = config
    tokens = 0
    if cached:
        tokens = sum(min(past, (c.window_of(layer) or past + 1) - 1) + new for layer in range(c.layers))
    return weights_read(c, new, batch) + batch * tokens * _token(c)


def bytes_expected(config: Config, depth: int, batch: int, design: str | None) -> int | None:
    """What a decode step at a depth moves by the design of its cache (``DESIGNS``); None where nobody knows.

    Concatenation reads ``n`` tokens and writes ``n + 1``, of which attention reads those that are seen: ``3 n + 2``
    without a window, where ``n + 1`` would do. A window saves nothing of the copy.
    """
    c, n = config, depth
    if design == "in-place":
        return bytes_min(c, n, 1, batch)
    if design == "capacity":
        slots = c.layers * (c.capacity + 1)
    elif design == "concatenation":
        slots = sum(n + (n + 1) + _seen(c, layer, n, 1) for layer in range(c.layers))
    else:
        return None
    return weights_read(c, 1, batch) + batch * slots * _token(c)


def weights_read(config: Config, new: int, batch: int) -> int:
    """Bytes of the weights that a step reads, each once: the LM head whole, the embedding and positions by rows."""
    rows = {"embed": min(batch * new, config.vocabulary), "position": new}
    numbers = sum(
        rows[name] * shape[1] if name in rows else _size(shape) for name, shape in weight_shapes(config).items()
    )
    return numbers * ITEMSIZE[config.dtype]


def _token(config: Config) -> int:
    """Bytes of one token's keys and values in one layer."""
    return 2 * config.kv_heads * config.head_dim * ITEMSIZE[config.dtype]


def _seen(config: Config, layer: int, past: int, new: int) -> int:
    """How many keys the new tokens see in a layer, all together and themselves included."""
    window = config.window_of(layer) or past + new
    return sum(min(position + 1, window) for position in range(past, past + new))


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for axis in shape:
        size *= axis
    return size
