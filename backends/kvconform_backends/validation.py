"""What every backend here refuses before it writes anything: inputs that are not what the protocol says."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvconform_specs.config import Config

Array = NDArray[Any]


def check_inputs(config: Config, batch: int | None, inputs: tuple[Array, ...]) -> int:
    """How many tokens the inputs of a step bring to each row of a cache of ``batch`` rows (None: there is no cache).

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
            raise TypeError(f"{name} is {x.dtype}, want float32")
        if x.ndim != 4:
            raise ValueError(f"{name} has {x.ndim} axes, want 4: batch, heads, tokens, head dim")
        if x.shape[1] != heads:
            raise ValueError(f"{name} has {x.shape[1]} heads, want {heads}")
        if x.shape[3] != c.head_dim:
            raise ValueError(f"{name} has a head dim of {x.shape[3]}, want {c.head_dim}")
        _rows(name, x.shape[0], query.shape[0] if batch is None else batch)
        if x.shape[2] != query.shape[2]:
            raise ValueError(f"{name} has {x.shape[2]} tokens and query {query.shape[2]}, want as many")
    return int(query.shape[2])


def _tokens(config: Config, batch: int | None, ids: Array) -> int:
    if ids.dtype.kind not in "iu":
        raise TypeError(f"token ids are {ids.dtype}, want integers")
    if ids.ndim != 2:
        raise ValueError(f"token ids have {ids.ndim} axes, want 2: batch, tokens")
    _rows("token ids", ids.shape[0], ids.shape[0] if batch is None else batch)
    if ids.size and (ids.min() < 0 or ids.max() >= config.vocabulary):
        raise ValueError(f"token ids lie in {ids.min()}..{ids.max()}, want 0..{config.vocabulary - 1}")
    return int(ids.shape[1])


def _rows(name: str, rows: int, batch: int) -> None:
    if rows != batch:
        raise ValueError(f"{rows} rows of {name}, want {batch}")


def check_counts(counts: Array, batch: int, t: int) -> list[int]:
    """How many of its ``t`` columns hold a token in each row. Raises TypeError or ValueError where it cannot be."""
    if counts.dtype.kind not in "iu":
        raise TypeError(f"counts are {counts.dtype}, want integers")
    if counts.shape != (batch,):
        raise ValueError(f"counts have the shape {counts.shape}, want one for each of {batch} rows")
    listed = [int(count) for count in counts]
    if min(listed) < 0 or max(listed) > t:
        raise ValueError(f"counts are {listed}, want 0..{t}")
    return listed


def check_rows(rows: list[int], batch: int) -> None:
    """Raises ValueError where ``rows`` cannot be the rows of a reordered cache of ``batch`` rows."""
    if not rows or min(rows) < 0 or max(rows) >= batch:
        raise ValueError(f"rows are {list(rows)}, want at least one, of 0..{batch - 1}")
