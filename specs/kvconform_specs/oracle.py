"""The oracle: what each step of a program must give, value and bound, from the tokens alone.

It keeps no cache. It reads each row's history off the program, recomputes it with the definition, and cuts out what
the step asked for. Histories that begin alike are computed once, at their longest: the definition is causal, which
a test of its own shows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from kvconform_specs import bounds
from kvconform_specs.config import Config
from kvconform_specs.definition import attention, decoder
from kvconform_specs.history import Row, Token, seen_by
from kvconform_specs.program import Append, Full, Program
from kvconform_specs.tensors import Streams, weights

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Expected:
    """What one step must give, for ``n`` variants: value and bound ``(n, b, t, e)``, bound maybe with ``e = 1``.

    ``e`` is ``h * d`` (attention) or the vocabulary (decoder). ``rows[r]`` is the history behind row ``r``, its last
    ``counts[r]`` tokens are the step's; padding of ragged rows is NaN.
    """

    value: Array
    bound: Array
    rows: tuple[Row, ...]
    counts: tuple[int, ...]


def expect(program: Program, indices: Sequence[int] = (0,)) -> tuple[Expected | None, ...]:
    """For each step of the program what it must give, or None where it computes nothing."""
    streams = Streams(program.config, program.span, indices)
    seen = seen_by(program)
    requests: dict[tuple[Row, Token | None], int] = {}  # history and aim -> first position wanted
    keys: list[list[tuple[Row, Token | None]]] = []
    for step, rows in zip(program.steps, seen, strict=True):
        keys.append([])
        if rows is None or not isinstance(step, Append | Full):
            continue
        aim = step.aim if isinstance(step, Append) else None
        for index, (row, count) in enumerate(zip(rows, step.counts, strict=True)):
            key = (row, None if aim is None else (aim[0] + index, aim[1]))
            keys[-1].append(key)
            requests[key] = min(requests.get(key, len(row)), len(row) - count)
    results = _solve(program.config, streams, requests)
    expected: list[Expected | None] = []
    for step, rows, wanted in zip(program.steps, seen, keys, strict=True):
        if rows is None or not isinstance(step, Append | Full):
            expected.append(None)
            continue
        value, bound = (
            np.stack([_cut(part, count, max(step.counts)) for part, count in zip(parts, step.counts, strict=True)], 1)
            for parts in zip(*(results[key] for key in wanted), strict=True)
        )
        expected.append(Expected(value, bound, rows, step.counts))
    return tuple(expected)


def _cut(part: Array, count: int, t: int) -> Array:
    """The last ``count`` positions of ``(n, positions, e)``, padded with NaN up to ``t``."""
    cut = part[:, part.shape[1] - count :]
    if count == t:
        return cut
    return np.concatenate([cut, np.full((cut.shape[0], t - count, cut.shape[2]), np.nan)], axis=1)


Solved = dict[tuple[Row, Token | None], tuple[Array, Array]]


def _solve(config: Config, streams: Streams, requests: dict[tuple[Row, Token | None], int]) -> Solved:
    """Value and bound ``(n, wanted positions, e)`` of each request."""
    lineages: dict[tuple[Row, Token | None], int] = {}
    owner: dict[tuple[Row, Token | None], tuple[Row, Token | None]] = {}
    for key in sorted(requests, key=lambda k: -len(k[0])):
        row, aim = key
        home = next((k for k in lineages if aim is None and k[1] is None and k[0][: len(row)] == row), None)
        owner[key] = home = home or key
        lineages[home] = min(lineages.get(home, len(row)), requests[key])
    grouped: dict[tuple[int, int, bool], list[tuple[Row, Token | None]]] = defaultdict(list)
    for key, start in lineages.items():
        grouped[len(key[0]), start, key[1] is None].append(key)
    solved: Solved = {}
    run = _attention if config.profile == "attention" else _decoder
    for (_length, start, _aimed), group in grouped.items():
        value, bound = run(config, streams, group, start)  # (n, rows, positions, e)
        for index, key in enumerate(group):
            solved[key] = value[:, index], bound[:, index]
    return {
        key: tuple(  # type: ignore[misc]
            part[:, requests[key] - lineages[home] : len(key[0]) - lineages[home]] for part in solved[home]
        )
        for key, home in owner.items()
    }


def _attention(
    config: Config, streams: Streams, group: list[tuple[Row, Token | None]], start: int
) -> tuple[Array, Array]:
    query, keys, values = streams.split(np.concatenate([streams.row(row) for row, _aim in group]))
    query, keys, values = (part.astype(np.float64) for part in (query[:, :, start:], keys, values))
    if group[0][1] is not None:
        needles = np.concatenate([streams.needle(aim) for _row, aim in group if aim is not None])
        query = np.broadcast_to(needles, query.shape).astype(np.float64)
    attended = attention(query, keys, values, config)
    bound = bounds.attention_bound(query, keys, values, attended, config)
    return _by_position(attended.output, len(group)), _by_position(bound, len(group))


def _by_position(x: Array, rows: int) -> Array:
    """``(rows * n, h, t, d)`` to ``(n, rows, t, h * d)``."""
    stacked = x.reshape(rows, -1, *x.shape[1:]).transpose(1, 0, 3, 2, 4)
    return np.asarray(stacked.reshape(*stacked.shape[:3], -1))


def _decoder(
    config: Config, streams: Streams, group: list[tuple[Row, Token | None]], start: int
) -> tuple[Array, Array]:
    tokens = np.stack([streams.row(row) for row, _aim in group], axis=1)  # (n, rows, s)
    exact, rough = _decoder_weights(config)
    value = decoder(tokens, exact, config, start)
    noise = bounds.Noisy(bounds.STORAGE[config.dtype], seed=tokens.shape[-1])
    runs = decoder(np.broadcast_to(tokens, (bounds.RUNS, *tokens.shape)), rough, config, start, noise)
    return value, bounds.decoder_bound(runs, noise.gain)


@lru_cache(maxsize=8)
def _decoder_weights(config: Config) -> tuple[dict[str, Array], dict[str, NDArray[np.float32]]]:
    exact = {name: value.astype(np.float64) for name, value in weights(config).items()}
    return exact, bounds.single(exact)
