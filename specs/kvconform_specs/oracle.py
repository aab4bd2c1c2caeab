"""The oracle: what each step of a program must give, value and bound, from the tokens alone.

It keeps no cache. It reads each row's history off the program, recomputes it with the definition, and cuts out what
the step asked for. Histories that begin alike are computed once, at their longest: the definition is causal, which
a test of its own shows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
from numpy.typing import NDArray

from kvconform_specs import bounds
from kvconform_specs.config import Config
from kvconform_specs.definition import attention, decoder
from kvconform_specs.history import Row, Token, seen_by
from kvconform_specs.program import Append, Full, Program
from kvconform_specs.tensors import Streams, weights

Array = NDArray[np.floating]


@dataclass(frozen=True)
class Expected:
    """What one step must give, for ``n`` variants: ``value`` and ``bound``, both ``(n, b, t, e)``.

    ``e`` is ``h * d`` (attention) or the vocabulary (decoder); the bound may have ``e = 1``. ``rows[r]`` is the
    history behind row ``r``, its last ``counts[r]`` tokens are the step's; padding of ragged rows is NaN. Numbers are
    computed when they are first asked for, all steps of the program at once: much can be judged without them.
    """

    rows: tuple[Row, ...]
    counts: tuple[int, ...]
    n: int
    numbers: Callable[[], tuple[Array, Array]]

    @property
    def value(self) -> Array:
        return self.numbers()[0]

    @property
    def bound(self) -> Array:
        return self.numbers()[1]

    @property
    def real(self) -> NDArray[np.bool_]:
        """``(b, t)``: which outputs belong to a token, and which are padding of ragged rows."""
        return np.arange(max(self.counts)) < np.array(self.counts)[:, None]

    def variant(self, index: int) -> Expected:
        """One of the ``n`` variants alone."""
        cut = slice(index, index + 1)
        return Expected(self.rows, self.counts, 1, lambda: (self.value[cut], self.bound[cut]))

    def last(self) -> Expected:
        """The last output of each row alone."""
        rows, ends = range(len(self.counts)), [count - 1 for count in self.counts]

        def numbers() -> tuple[Array, Array]:
            return self.value[:, rows, ends][:, :, None], self.bound[:, rows, ends][:, :, None]

        return Expected(self.rows, (1,) * len(ends), self.n, numbers)


def expect(program: Program, indices: Sequence[int] = (0,)) -> tuple[Expected | None, ...]:
    """For each step of the program what it must give, or None where it computes nothing."""
    seen = seen_by(program)
    solved: list[dict[int, tuple[Array, Array]]] = []

    def numbers(step: int) -> tuple[Array, Array]:
        if not solved:
            solved.append(_numbers(program, seen, indices))
        return solved[0][step]

    return tuple(
        Expected(rows, step.counts, len(indices), partial(numbers, number))
        if rows is not None and isinstance(step, Append | Full)
        else None
        for number, (step, rows) in enumerate(zip(program.steps, seen, strict=True))
    )


def _numbers(
    program: Program, seen: Sequence[tuple[Row, ...] | None], indices: Sequence[int]
) -> dict[int, tuple[Array, Array]]:
    """Value and bound of each step that computes."""
    requests: dict[Request, int] = {}  # first position wanted
    wanted: dict[int, list[Request]] = {}
    for number, (step, rows) in enumerate(zip(program.steps, seen, strict=True)):
        if rows is None or not isinstance(step, Append | Full):
            continue
        aim = step.aim if isinstance(step, Append) else None
        wanted[number] = []
        for index, (row, count) in enumerate(zip(rows, step.counts, strict=True)):
            request = (row, None if aim is None else (aim[0] + index, aim[1]))
            wanted[number].append(request)
            requests[request] = min(requests.get(request, len(row)), len(row) - count)
    results = _solve(program.config, Streams(program.config, program.span, indices), requests)
    numbers = {}
    for number, these in wanted.items():
        step = program.steps[number]
        assert isinstance(step, Append | Full)
        value, bound = (
            np.stack([_cut(part, count, max(step.counts)) for part, count in zip(parts, step.counts, strict=True)], 1)
            for parts in zip(*(results[request] for request in these), strict=True)
        )
        numbers[number] = value, bound
    return numbers


def _cut(part: Array, count: int, t: int) -> Array:
    """The last ``count`` positions of ``(n, positions, e)``, padded with NaN up to ``t``."""
    cut = part[:, part.shape[1] - count :]
    if count == t:
        return cut
    return np.concatenate([cut, np.full((cut.shape[0], t - count, cut.shape[2]), np.nan)], axis=1)


Request = tuple[Row, Token | None]
"""A history, and where a needle aims its queries, if one does."""


def _solve(config: Config, streams: Streams, requests: dict[Request, int]) -> dict[Request, tuple[Array, Array]]:
    """Value and bound ``(n, wanted positions, e)`` of each request."""
    starts: dict[Request, int] = {}  # the longest histories, each computed from this position on
    owner: dict[Request, Request] = {}
    for request in sorted(requests, key=lambda r: -len(r[0])):
        row, aim = request
        alike = (r for r in starts if aim is None and r[1] is None and r[0][: len(row)] == row)
        home = owner[request] = next(alike, request)
        starts[home] = min(starts.get(home, len(row)), requests[request])
    groups: dict[tuple[int, int, bool], list[Request]] = defaultdict(list)
    for request, start in starts.items():
        groups[len(request[0]), start, request[1] is None].append(request)
    run = _attention if config.profile == "attention" else _decoder
    solved = {}
    for (_length, start, _unaimed), group in groups.items():
        value, bound = run(config, streams, group, start)  # (n, rows, positions, e)
        for index, request in enumerate(group):
            solved[request] = value[:, index], bound[:, index]
    cut = {}
    for request, home in owner.items():
        part = slice(requests[request] - starts[home], len(request[0]) - starts[home])
        value, bound = solved[home]
        cut[request] = value[:, part], bound[:, part]
    return cut


def _attention(config: Config, streams: Streams, group: list[Request], start: int) -> tuple[Array, Array]:
    parts = streams.split(np.concatenate([streams.row(row) for row, _aim in group]))
    query, keys, values = (part.astype(np.float64) for part in parts)
    query = query[:, :, start:]
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


def _decoder(config: Config, streams: Streams, group: list[Request], start: int) -> tuple[Array, Array]:
    tokens = np.stack([streams.row(row) for row, _aim in group], axis=1)  # (n, rows, s)
    exact, rough = _decoder_weights(config)
    value = decoder(tokens, exact, config, start)
    noise = bounds.Noisy(bounds.STORAGE[config.dtype], seed=tokens.shape[-1])
    # one run after another: arrays of all eight would not fit the caches
    runs = np.stack([decoder(tokens, rough, config, start, noise) for _ in range(bounds.RUNS)])
    return value, bounds.decoder_bound(runs, value, noise.gain)


@lru_cache(maxsize=8)
def _decoder_weights(config: Config) -> tuple[dict[str, Array], Mapping[str, Array]]:
    exact: dict[str, Array] = {name: value.astype(np.float64) for name, value in weights(config).items()}
    return exact, bounds.single(exact)
