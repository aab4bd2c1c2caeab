"""The oracle: what each step of a program must give, value and bound, from the tokens alone.

It keeps no cache. It reads each row's history off the program, recomputes it with the definition, and cuts out what
the step asked for. Histories that begin alike are computed once, at their longest: the definition is causal, which
a test of its own shows. A read of a sequence in the attention profile must give its tokens' keys and values; what the
layers of a decoder hold is its own affair.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kvconform_specs.claims import Precision
from kvconform_specs.config import Config
from kvconform_specs.history import Histories, Row, Token, after
from kvconform_specs.program import Append, Generate, Program, ReadCache, Run, UncachedForward
from kvconform_specs.reference import bounds
from kvconform_specs.reference.definition import attention, decoder
from kvconform_specs.tensors import Streams, distribution, weights

Array = NDArray[np.floating]
Ids = NDArray[np.int64]
Numbers = Callable[[str], Array]
"""``value``, ``bound``, ``floor`` or ``likely`` (see ``Expected``), computed when first asked for."""
PLAIN = Precision()
SAMPLE = 32, 8
"""Sequences, and tokens of each, on which a black box's rounding is tried."""
BLOCK = 1 << 22
"""Scores that are computed at once; long contexts are cut into blocks of queries."""


@dataclass(frozen=True)
class Expected:
    """What one step must give, for ``n`` variants: ``value`` and ``bound``, both ``(n, b, t, e)``.

    ``e`` is ``h * d`` (attention), the vocabulary (decoder) or ``2 * g * d`` (a read); the bound may have ``e = 1``.
    ``rows[r]`` is the history behind row ``r``, its last ``counts[r]`` tokens are the step's. ``real`` ``(b, t)``: the
    columns that hold a token; the others are NaN. Numbers are computed when they are first asked for, all steps of the
    program at once: much can be judged without them.
    """

    rows: tuple[Row, ...]
    counts: tuple[int, ...]
    real: NDArray[np.bool_]
    n: int
    numbers: Numbers

    @property
    def value(self) -> Array:
        return self.numbers("value")

    @property
    def bound(self) -> Array:
        return self.numbers("bound")

    @property
    def bound_lower(self) -> Array:
        """Never more than ``bound``, and much cheaper for a decoder: what is within it is within the bound."""
        return self.numbers("floor")

    @property
    def bound_estimate(self) -> Array:
        """The bound where it was computed, else what the floor estimates it to be: for display alone."""
        return self.numbers("likely")

    def variant(self, index: int) -> Expected:
        """One of the ``n`` variants alone."""
        cut = slice(index, index + 1)
        return Expected(self.rows, self.counts, self.real, 1, lambda kind: self.numbers(kind)[cut])

    def last(self) -> Expected:
        """The last output of each row alone; all rows must have one."""
        rows = range(len(self.counts))
        ends = [int(np.flatnonzero(row)[-1]) if row.any() else 0 for row in self.real]
        real = np.array([[count > 0] for count in self.counts])
        ones = tuple(min(count, 1) for count in self.counts)
        return Expected(self.rows, ones, real, self.n, lambda kind: self.numbers(kind)[:, rows, ends][:, :, None])


@dataclass(frozen=True)
class Generation(Expected):
    """What a generation is judged by. What is expected of a token follows from those before it, and these are the
    backend's own choice: one that differs after a tie is judged by what it led to.

    The numbers are those of the prompt. prompts: their token ids ``(n, b, s)``. given: as the function of that name.
    """

    prompts: Callable[[], Ids]
    given: Callable[[Ids, int], Numbers]

    def along(self, ids: Ids) -> Numbers:
        """The logits ``(n, b, new, V)`` that each of the generated tokens ``(n, b, new)`` is to be picked from."""
        prompts = self.prompts()
        return self.given(np.concatenate([prompts, ids[..., :-1]], axis=-1), prompts.shape[-1] - 1)

    def variant(self, index: int) -> Generation:
        one, cut = super().variant(index), slice(index, index + 1)
        prompts = lambda: self.prompts()[cut]  # noqa: E731
        return Generation(one.rows, one.counts, one.real, 1, one.numbers, prompts, self.given)


def columns(step: Run) -> NDArray[np.bool_]:
    """``(b, t)``: which columns of a step's inputs and outputs hold a token; with ragged rows not all do."""
    counts, t = np.array(step.counts)[:, None], max(step.counts)
    left = isinstance(step, Append) and step.pad is not None and step.pad[0] == "left"
    return np.arange(t) >= t - counts if left else np.arange(t) < counts


ReferenceForward = Callable[[Array, float, float, int], Array]
"""A black box's cache-less forward: token ids ``(m, t)`` or hidden states ``(m, t, width)`` to outputs ``(m, t, e)``.

The numbers behind the inputs are the relative noise of storage and of accumulation that its weights are perturbed
by, and the seed of that; zeros: it is not perturbed (``backend.BlackBox.perturbed``).
"""


def given(config: Config, own: ReferenceForward | None, ids: Ids, start: int = 0) -> Numbers:
    """What a decoder must give for token ids ``(n, b, s)``: logits ``(n, b, s - start, V)`` from position ``start`` on.

    own: the truth of a black box, instead of the definition.
    """
    return _model(config, own, lambda: ids, start).numbers


def expect(
    program: Program, indices: Sequence[int] = (0,), precision: Precision = PLAIN, own: ReferenceForward | None = None
) -> tuple[Expected | None, ...]:
    """For each step of the program what it must give, or None where it has no numbers of the definition.

    own: the truth of a black box, instead of the definition.
    """
    histories, solution = Histories(), _Solution(program, indices, precision, own)
    wanted: list[Expected | None] = []
    for number, step in enumerate(program.steps):
        histories.apply(step)
        numbers, n = partial(solution.numbers, number), len(indices)
        if isinstance(step, Append | UncachedForward):
            rows = histories.rows[step.seq] if isinstance(step, Append) else after(((),) * len(step.counts), step)
            solution.want(number, step, rows)
            expected = Expected(rows, step.counts, columns(step), n, numbers)
            if step.last_only:
                expected = expected.last()
            if isinstance(step, Generate):
                prompts = partial(solution.contents, rows)
                along = partial(given, program.config, own)
                expected = Generation(rows, step.counts, columns(step), n, numbers, prompts, along)
            wanted.append(expected)
        elif isinstance(step, ReadCache) and program.config.profile == "attention":
            rows = histories.rows[step.seq]
            lengths = tuple(map(len, rows))
            real = np.arange(max(lengths)) < np.array(lengths)[:, None]
            solution.reads[number] = rows
            wanted.append(Expected(rows, lengths, real, n, numbers))
        else:
            wanted.append(None)
    return tuple(wanted)


def shares_rounding(own: Callable[..., Array], config: Config) -> bool:
    """Whether changing the last token of sequences moves an earlier output of a black box's own forward by a bit.

    own: ``ReferenceForward`` with the config in front of its arguments.
    """
    tokens = min(config.capacity, SAMPLE[1])
    streams = Streams(config, tokens, range(SAMPLE[0]))
    base, changed = streams.tape(11).copy(), streams.tape(11).copy()
    changed[:, -1] = streams.tape(12)[:, -1]
    before, after = (own(config, inputs, 0.0, 0.0, 0)[:, :-1] for inputs in (base, changed))
    return not np.array_equal(before, after, equal_nan=True)


Request = tuple[Row, Token | None, tuple[int, ...]]
"""A history, where a needle aims its queries, and which of its tokens the caller hides."""


class _Solution:
    """The numbers of one program: requests are gathered first, and solved when a number is first asked for."""

    def __init__(
        self, program: Program, indices: Sequence[int], precision: Precision, own: ReferenceForward | None
    ) -> None:
        self.program, self.indices, self.precision, self.own = program, indices, precision, own
        self.reads: dict[int, tuple[Row, ...]] = {}
        self._steps: dict[int, list[Request]] = {}
        self._starts: dict[Request, int] = {}  # first position wanted
        self._placed: dict[Request, tuple[_Group, int, int]] = {}  # group, row in it, first position
        self._streams: Streams | None = None
        self._known: dict[tuple[str, int], Array] = {}

    def want(self, number: int, step: Run, rows: tuple[Row, ...]) -> None:
        aim, hidden = (step.needle, step.masked) if isinstance(step, Append) else (None, ())
        self._steps[number] = []
        for index, (row, count) in enumerate(zip(rows, step.counts, strict=True)):
            target = None if aim is None else (aim[0] + index, aim[1])
            request = row, target, tuple(sorted(position for of, position in hidden if of == index))
            self._steps[number].append(request)
            self._starts[request] = min(self._starts.get(request, len(row)), len(row) - count)

    def numbers(self, number: int, kind: str) -> Array:
        found = self._known.get((kind, number))
        if found is None:
            found = self._read(number, kind) if number in self.reads else self._computed(number, kind)
            if kind != "likely":
                self._known[kind, number] = found
        return found

    @property
    def streams(self) -> Streams:
        if self._streams is None:
            self._streams = Streams(self.program.config, self.program.span, self.indices)
        return self._streams

    def contents(self, rows: Sequence[Row]) -> NDArray[Any]:
        """``(n, rows, s[, width])``: what a model is given for rows of one length."""
        return np.stack([self.streams.row(row) for row in rows], axis=1)

    def _computed(self, number: int, kind: str) -> Array:
        if not self._placed:
            self._placed = dict(self._groups())
        step = self.program.steps[number]
        assert isinstance(step, Append | UncachedForward)
        real, rows = columns(step), []
        for request, count, there in zip(self._steps[number], step.counts, real, strict=True):
            group, row, start = self._placed[request]
            part = group.numbers(kind)[:, row]
            first = len(request[0]) - count - start
            cut = part[:, first : first + count]
            if count < len(there):
                padded = np.full((cut.shape[0], len(there), cut.shape[2]), np.nan)
                padded[:, there] = cut
                cut = padded
            rows.append(cut)
        return np.stack(rows, axis=1)

    def _groups(self) -> Iterator[tuple[Request, tuple[_Group, int, int]]]:
        """Histories that another one begins with are cut from it; those of one length are solved together."""
        shared = self.precision.residual == 0  # else a token's precision depends on how long the row is
        starts: dict[Request, int] = {}
        owner: dict[Request, Request] = {}
        for request in sorted(self._starts, key=lambda r: -len(r[0])):
            row, plain = request[0], request[1:] == (None, ())
            alike = (r for r in starts if plain and shared and r[1:] == (None, ()) and r[0][: len(row)] == row)
            home = owner[request] = next(alike, request)
            starts[home] = min(starts.get(home, len(row)), self._starts[request])
        members: dict[tuple[int, int, bool, bool], list[Request]] = defaultdict(list)
        for request, start in starts.items():
            mute = any(distribution(seed) == "zero_keys" for seed in {seed for seed, _position in request[0]})
            members[len(request[0]), start, request[1] is None, mute].append(request)
        homes: dict[Request, tuple[_Group, int, int]] = {}
        for (_length, start, _aimed, mute), requests in members.items():
            group = self._group(requests, start, mute)
            homes |= {request: (group, index, start) for index, request in enumerate(requests)}
        for request, home in owner.items():
            yield request, homes[home]

    def _group(self, requests: list[Request], start: int, mute: bool) -> _Group:
        config = self.program.config
        if config.profile == "attention":
            return _Attention(config, self.streams, requests, start, mute, self.precision)
        rows = [row for row, _aim, _hidden in requests]
        return _model(config, self.own, partial(self.contents, rows), start)

    def _read(self, number: int, kind: str) -> Array:
        """Keys and values of each row, ``(n, b, s, 2 g d)``, or how far a stored one may be from them."""
        c, rows = self.program.config, self.reads[number]
        made = np.full((len(self.indices), len(rows), max(map(len, rows)), 2 * c.kv_heads * c.head_dim), np.nan)
        for index, row in enumerate(rows):
            if row:
                _query, key, value = self.streams.split(self.streams.row(row))
                parts = [key, value] if kind == "value" else [self._stray(key, len(row)), self._stray(value, len(row))]
                flat = [part.swapaxes(1, 2).reshape(len(self.indices), len(row), -1) for part in parts]
                made[:, index, : len(row)] = np.concatenate(flat, axis=2)
        return made

    def _stray(self, x: Array, length: int) -> Array:
        steps = bounds.quantisation_error(x.astype(np.float64), self.precision, self.program.config.dtype)
        return np.where(np.arange(length)[:, None] < length - self.precision.residual, steps, 0.0) + np.zeros(x.shape)


class _Group(Protocol):
    """Rows of one length, solved together from one position on: ``(n, rows, positions, e)``."""

    def numbers(self, kind: str) -> Array: ...


class _Attention:
    _solved: tuple[Array, Array] | None = None

    def __init__(
        self, config: Config, streams: Streams, requests: list[Request], start: int, mute: bool, precision: Precision
    ) -> None:
        self.config, self.streams, self.requests, self.start = config, streams, requests, start
        self.mute, self.precision = mute, precision

    def numbers(self, kind: str) -> Array:
        if self._solved is None:
            self._solved = self._solve()
        return self._solved[kind != "value"]

    def _solve(self) -> tuple[Array, Array]:
        c, rows = self.config, len(self.requests)
        parts = self.streams.split(np.concatenate([self.streams.row(row) for row, _aim, _hidden in self.requests]))
        query, keys, values = (part.astype(np.float64) for part in parts)  # (rows * n, heads, s, d)
        s = keys.shape[-2]
        query = query[:, :, self.start :]
        if self.requests[0][1] is not None:
            aims = [self.streams.needle(aim) for _row, aim, _hidden in self.requests if aim is not None]
            query = np.broadcast_to(np.concatenate(aims), query.shape).astype(np.float64)
        mask = None
        if any(hidden for _row, _aim, hidden in self.requests):
            mask = np.ones((rows, 1, 1, s), bool)
            for row, (_tokens, _aim, hidden) in enumerate(self.requests):
                mask[row, ..., list(hidden)] = False
            mask = np.repeat(mask, len(keys) // rows, axis=0)
        exact_from = s - self.precision.residual if self.precision.residual else None
        size = max(1, BLOCK // (len(keys) * c.heads * s))
        pieces = []
        for first in range(0, s - self.start, size):
            piece = query[:, :, first : first + size]
            attended = attention(piece, keys, values, c, mask=mask, at=self.start + first)
            bound = bounds.attention_bound(
                piece, keys, values, attended, c, self.precision, biased=self.mute, exact_from=exact_from
            )
            pieces.append((attended.output, bound))
        output, bound = (
            np.concatenate(parts, axis=2) if len(parts) > 1 else parts[0] for parts in zip(*pieces, strict=True)
        )
        return _by_position(output, rows), _by_position(bound, rows)


def _by_position(x: Array, rows: int) -> Array:
    """``(rows * n, h, t, d)`` to ``(n, rows, t, h * d)``."""
    stacked = x.reshape(rows, -1, *x.shape[1:]).transpose(1, 0, 3, 2, 4)
    return np.asarray(stacked.reshape(*stacked.shape[:3], -1))


Contents = Callable[[], NDArray[Any]]
"""What a model is given: token ids ``(n, rows, s)`` or hidden states ``(n, rows, s, width)``."""


def _model(config: Config, own: ReferenceForward | None, contents: Contents, start: int) -> _Group:
    return _Decoder(config, contents, start) if own is None else _BlackBox(config, own, contents, start)


class _Decoder:
    """Noisy runs are made one after another, and only the first unless more are asked for: ``floor`` takes the others
    to have strayed not at all."""

    _value: Array | None = None

    def __init__(self, config: Config, contents: Contents, start: int) -> None:
        self.config, self.contents, self.start = config, contents, start

    def numbers(self, kind: str) -> Array:
        if self._value is None:
            self._tokens = self.contents()
            exact, self._rough = _decoder_weights(self.config)
            self._value = decoder(self._tokens, exact, self.config, self.start)  # (n, rows, t, V)
            self._noise = bounds.Noisy(bounds.STORAGE[self.config.dtype], seed=self._tokens.shape[-1])
            self._strays: list[Array] = []
        if kind == "value":
            return self._value
        runs = bounds.RUNS if kind == "bound" else 1
        while len(self._strays) < runs:
            run = decoder(self._tokens, self._rough, self.config, self.start, self._noise)
            self._strays.append(bounds.stray(run, self._value))
        counted = len(self._strays) if kind == "likely" else bounds.RUNS
        return bounds.decoder_bound(self._strays, counted, self._noise.gain)


class _BlackBox:
    """Judged by itself: the value is what its own forward gives, and the bound is made of what that gives when its
    weights are perturbed by noise of the size of the rounding (``bounds.own_bound``)."""

    def __init__(self, config: Config, own: ReferenceForward, contents: Contents, start: int) -> None:
        self.config, self.contents, self.start = config, contents, start
        self._own, self._strays = own, list[Array]()
        self._value: Array | None = None

    def numbers(self, kind: str) -> Array:
        noise = bounds.disturbance(self.config.dtype)
        if self._value is None:
            self._value = self._run(0.0, 0.0, 0)
        if kind == "value":
            return self._value
        runs = bounds.RUNS if kind == "bound" else 1
        while len(self._strays) < runs:
            run = self._run(noise.storage, noise.accumulation, len(self._strays) + 1)
            self._strays.append(bounds.stray(run, self._value))
        counted = len(self._strays) if kind == "likely" else bounds.RUNS
        return bounds.own_bound(self._strays, counted, noise.gain)

    def _run(self, storage: float, accumulation: float, seed: int) -> Array:
        inputs = self.contents()
        n, m = inputs.shape[:2]
        output = self._own(inputs.reshape(n * m, *inputs.shape[2:]), storage, accumulation, seed)
        return np.asarray(output, np.float64).reshape(n, m, *output.shape[1:])[:, :, self.start :]


@lru_cache(maxsize=8)
def _decoder_weights(config: Config) -> tuple[dict[str, Array], Mapping[str, Array]]:
    exact: dict[str, Array] = {name: value.astype(np.float64) for name, value in weights(config).items()}
    return exact, bounds.single(exact)
