"""Input validation shared by the backends; it runs before any write."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvconform_specs.config import Config

Array = NDArray[Any]


def check_inputs(config: Config, batch: int | None, inputs: tuple[Array, ...]) -> int:
    """The number of tokens that a step appends to each row of a cache of ``batch`` rows (None: no cache).

    Raises TypeError for a wrong dtype or number of arrays, ValueError for a wrong shape or an unknown token id.
    """
    wanted = 1 if config.profile == "decoder" else 3
    if len(inputs) != wanted:
        raise TypeError(f"a step of the {config.profile} profile takes {wanted} arrays, got {len(inputs)}")
    return _tokens(config, batch, *inputs) if wanted == 1 else _heads(config, batch, *inputs)


def _heads(config: Config, batch: int | None, query: Array, key: Array, value: Array) -> int:
    c = config
    for name, x, heads in (("query", query, c.heads), ("key", key, c.kv_heads), ("value", value, c.kv_heads)):
        if x.dtype != np.float32:
            raise TypeError(f"{name} is {x.dtype}, expected float32")
        if x.ndim != 4:
            raise ValueError(f"{name} has {x.ndim} axes, expected 4: batch, heads, tokens, head dim")
        if x.shape[1] != heads:
            raise ValueError(f"{name} has {x.shape[1]} heads, expected {heads}")
        if x.shape[3] != c.head_dim:
            raise ValueError(f"{name} has head dim {x.shape[3]}, expected {c.head_dim}")
        _rows(name, x.shape[0], query.shape[0] if batch is None else batch)
        if x.shape[2] != query.shape[2]:
            raise ValueError(f"{name} has {x.shape[2]} tokens, but query has {query.shape[2]}")
    return int(query.shape[2])


def _tokens(config: Config, batch: int | None, ids: Array) -> int:
    if ids.dtype.kind not in "iu":
        raise TypeError(f"token ids are {ids.dtype}, expected integers")
    if ids.ndim != 2:
        raise ValueError(f"token ids have {ids.ndim} axes, expected 2: batch, tokens")
    _rows("token ids", ids.shape[0], ids.shape[0] if batch is None else batch)
    if ids.size and (ids.min() < 0 or ids.max() >= config.vocabulary):
        raise ValueError(f"token ids are in {ids.min()}..{ids.max()}, expected 0..{config.vocabulary - 1}")
    return int(ids.shape[1])


def _rows(name: str, rows: int, batch: int) -> None:
    if rows != batch:
        raise ValueError(f"{name}: {rows} rows, expected {batch}")


def check_counts(counts: Array, batch: int, t: int) -> list[int]:
    """The number of tokens per row among ``t`` columns. Raises TypeError or ValueError if ``counts`` is invalid."""
    if counts.dtype.kind not in "iu":
        raise TypeError(f"counts are {counts.dtype}, expected integers")
    if counts.shape != (batch,):
        raise ValueError(f"counts have shape {counts.shape}, expected ({batch},)")
    listed = [int(count) for count in counts]
    if min(listed) < 0 or max(listed) > t:
        raise ValueError(f"counts are {listed}, expected 0..{t}")
    return listed


def check_rows(rows: list[int], batch: int) -> None:
    """Raises ValueError unless ``rows`` are valid rows of a cache of ``batch`` rows."""
    if not rows or min(rows) < 0 or max(rows) >= batch:
        raise ValueError(f"rows are {list(rows)}, expected one or more of 0..{batch - 1}")


def check_lengths(length: int | list[int], held: Array) -> Array:
    """``(b,)``: the length that each row of so many tokens is truncated to. Raises ValueError unless it can be."""
    lengths = np.array([length] * len(held) if isinstance(length, int) else length)
    if lengths.shape != held.shape:
        raise ValueError(f"{len(lengths)} lengths for {len(held)} rows")
    if (lengths < 0).any() or (lengths > held).any():
        raise ValueError(f"cannot truncate {held.tolist()} tokens to {length}")
    return lengths


def check_length(length: int, held: int) -> None:
    """Raises ValueError unless a sequence of ``held`` tokens can be truncated to ``length``."""
    if not 0 <= length <= held:
        raise ValueError(f"cannot truncate {held} tokens to {length}")
