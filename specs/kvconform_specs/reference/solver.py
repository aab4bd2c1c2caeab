"""The numbers of one program: what its steps request is gathered first, and computed when a number is first needed.

Rows that begin with the same tokens are computed once, at their longest (``history.prefixed``), and rows of one length
are computed together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kvconform_specs.claims import Precision, changes_at
from kvconform_specs.config import Config
from kvconform_specs.history import Request, Row, context_of, prefixed, requests
from kvconform_specs.program import Append, Program, Run, UncachedForward
from kvconform_specs.reference import bounds
from kvconform_specs.reference.definition import attention, decoder
from kvconform_specs.reference.quantisation import quantisation_error
from kvconform_specs.tensors import Streams, weights

Array = NDArray[np.floating]
Ids = NDArray[np.int64]
Numbers = Callable[[str], Array]
"""``value``, ``bound``, ``bound_lower`` or ``bound_estimate`` (see ``oracle.Expected``), computed when first needed."""
Contents = Callable[[], NDArray[Any]]
"""What a model is given: token ids ``(n, rows, s)`` or hidden states ``(n, rows, s, width)``."""
STACKED = 1 << 19
"""Numbers of the largest array of noisy runs that are made at once, which ``bounds.Noisy`` has without a repetition."""
BLOCK = 1 << 22
"""Scores that are computed at once; long contexts are computed in blocks of queries."""
ReferenceForward = Callable[..., Array]
"""A black box's cache-less forward: token ids ``(m, t)`` or hidden states ``(m, t, width)`` to outputs ``(m, t, e)``.

The other arguments are the relative noise of storage and of accumulation by which its weights are perturbed, and the
seed of that noise; with zeros they are not perturbed (``backend.BlackBox.perturbed``). The keyword ``context`` is the
context of all sequences; it is left out where that is 0.
"""


def columns(step: Run) -> NDArray[np.bool_]:
    """``(b, t)``: the columns of a step's inputs and outputs that hold a token; with ragged rows some do not."""
    counts, t = np.array(step.counts)[:, None], max(step.counts)
    left = isinstance(step, Append) and step.pad is not None and step.pad[0] == "left"
    return np.arange(t) >= t - counts if left else np.arange(t) < counts


class Solution:
    """The numbers of one program's steps. ``reads``: the rows that each read of a sequence must give."""

    def __init__(
        self, program: Program, indices: Sequence[int], precision: Precision, reference: ReferenceForward | None
    ) -> None:
        self.program, self.indices, self.precision, self.reference = program, indices, precision, reference
        self.reads: dict[int, tuple[Row, ...]] = {}
        self._steps: dict[int, list[Request]] = {}
        self._starts: dict[Request, int] = {}  # first position wanted
        self._placed: dict[Request, tuple[_Group, int, int]] = {}  # group, row in it, first position
        self._streams: Streams | None = None
        self._known: dict[tuple[str, int], Array] = {}

    def want(self, number: int, step: Run, rows: tuple[Row, ...]) -> None:
        """Gathers what a step requests; ``rows`` hold its new tokens, too."""
        self._steps[number] = requests(step, rows)
        for request, count in zip(self._steps[number], step.counts, strict=True):
            length = len(request.row)
            self._starts[request] = min(self._starts.get(request, length), length - count)

    def numbers(self, number: int, kind: str) -> Array:
        found = self._known.get((kind, number))
        if found is None:
            found = self._read(number, kind) if number in self.reads else self._computed(number, kind)
            if kind != "bound_estimate":
                self._known[kind, number] = found
        return found

    @property
    def streams(self) -> Streams:
        if self._streams is None:
            self._streams = Streams(self.program.config, self.program.span, self.indices)
        return self._streams

    def contents(self, rows: Sequence[Row]) -> NDArray[Any]:
        """``(n, rows, s[, width])``: the inputs of a model for rows of one length."""
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
            first = len(request.row) - count - start
            cut = part[:, first : first + count]
            if count < len(there):
                padded = np.full((cut.shape[0], len(there), cut.shape[2]), np.nan)
                padded[:, there] = cut
                cut = padded
            rows.append(cut)
        return np.stack(rows, axis=1)

    def _groups(self) -> Iterator[tuple[Request, tuple[_Group, int, int]]]:
        owners = {request: request for request in self._starts}
        if not self.precision.by_length:  # otherwise the precision of a token depends on the length: nothing is shared
            owners = prefixed(self._starts, changes_at(self.program.config, self.precision))
        starts: dict[Request, int] = {}
        for request, owner in owners.items():
            starts[owner] = min(starts.get(owner, len(request.row)), self._starts[request])
        members: dict[tuple[int, int, int, bool, bool], list[Request]] = defaultdict(list)
        for request, start in starts.items():
            streams = {stream for stream, _position in request.row}
            repeats = any(stream.distribution == "zero_keys" for stream in streams)
            members[len(request.row), start, context_of(request.row), request.needle is None, repeats].append(request)
        homes: dict[Request, tuple[_Group, int, int]] = {}
        for (_length, start, _context, _aimed, repeats), together in members.items():
            group = self._group(together, start, repeats)
            homes |= {request: (group, index, start) for index, request in enumerate(together)}
        for request, owner in owners.items():
            yield request, homes[owner]

    def _group(self, together: list[Request], start: int, repeats: bool) -> _Group:
        config = self.program.config
        if config.profile == "attention":
            return _Attention(config, self.streams, together, start, repeats, self.precision)
        rows = [request.row for request in together]
        return model(config, self.reference, partial(self.contents, rows), start, context_of(rows[0]), self.precision)

    def _read(self, number: int, kind: str) -> Array:
        """Keys and values of each row, ``(n, b, s, 2 g d)``, or how far a stored one may be from them."""
        c, rows = self.program.config, self.reads[number]
        made = np.full((len(self.indices), len(rows), max(map(len, rows)), 2 * c.kv_heads * c.head_dim), np.nan)
        for index, row in enumerate(rows):
            if row:
                _query, *parts = self.streams.split(self.streams.row(row))
                if kind != "value":
                    parts = [self._error(name, part) for name, part in zip(("keys", "values"), parts, strict=True)]
                flat = [part.swapaxes(1, 2).reshape(len(self.indices), len(row), -1) for part in parts]
                made[:, index, : len(row)] = np.concatenate(flat, axis=2)
        return made

    def _error(self, part: str, x: Array) -> Array:
        """How far what is stored may be from keys or values ``(n, g, s, d)``."""
        precision, s = self.precision, x.shape[-2]
        exact_from = s - precision.residual
        return quantisation_error(
            x.astype(np.float64), precision, self.program.config.dtype, part=part, exact_from=exact_from
        )


class _Group(Protocol):
    """Rows of one length, computed together from one position on: ``(n, rows, positions, e)``."""

    def numbers(self, kind: str) -> Array: ...


class _Attention:
    """``repeats``: some keys are equal (all zero), so that rounding errors may add up in one direction."""

    _solved: tuple[Array, Array] | None = None

    def __init__(
        self, config: Config, streams: Streams, together: list[Request], start: int, repeats: bool, precision: Precision
    ) -> None:
        self.config, self.streams, self.requests, self.start = config, streams, together, start
        self.repeats, self.precision = repeats, precision

    def numbers(self, kind: str) -> Array:
        if self._solved is None:
            self._solved = self._solve()
        return self._solved[kind != "value"]

    def _solve(self) -> tuple[Array, Array]:
        c, rows = self.config, len(self.requests)
        parts = self.streams.split(np.concatenate([self.streams.row(request.row) for request in self.requests]))
        query, keys, values = (part.astype(np.float64) for part in parts)  # (rows * n, heads, s, d)
        s = keys.shape[-2]
        query = query[:, :, self.start :]
        needles = [self.streams.needle(request.needle) for request in self.requests if request.needle is not None]
        if needles:
            query = np.broadcast_to(np.concatenate(needles), query.shape).astype(np.float64)
        mask = None
        if any(request.masked for request in self.requests):
            mask = np.ones((rows, 1, 1, s), bool)
            for row, request in enumerate(self.requests):
                mask[row, ..., list(request.masked)] = False
            mask = np.repeat(mask, len(keys) // rows, axis=0)
        exact_from = s - self.precision.residual if self.precision.residual else None
        size = max(1, BLOCK // (len(keys) * c.heads * s))
        pieces = []
        for first in range(0, s - self.start, size):
            piece = query[:, :, first : first + size]
            attended = attention(piece, keys, values, c, mask=mask, at=self.start + first)
            bound = bounds.attention_bound(
                piece, keys, values, attended, c, self.precision, biased=self.repeats, exact_from=exact_from
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


def model(
    config: Config,
    reference: ReferenceForward | None,
    contents: Contents,
    start: int,
    context: int = 0,
    precision: Precision = Precision(),  # noqa: B008 - it is frozen
) -> _Group:
    """What the definition, or a black box's own forward, gives for rows of one length and one context from ``start``
    on."""
    if reference is None:
        return _Decoder(config, contents, start, context, precision)
    told = partial(reference, context=context) if context else reference
    return _BlackBox(config, told, contents, start, precision)


class _Model:
    """Value, and a bound measured from noisy runs. Only the first is made unless the bound itself is needed:
    ``bound_lower`` assumes that the others do not deviate at all."""

    _value: Array | None = None

    def __init__(self, config: Config, contents: Contents, start: int) -> None:
        self.config, self.contents, self.start = config, contents, start
        self._deviations: list[Array] = []

    def exact(self) -> Array:
        """``(n, rows, positions, e)``."""
        raise NotImplementedError

    def noisy(self, first: int, count: int) -> Array:
        """At most ``count`` noisy runs, of the numbers from ``first`` on, ``(runs, n, rows, positions, e)``."""
        raise NotImplementedError

    def bound(self, runs: int) -> Array:
        raise NotImplementedError

    def numbers(self, kind: str) -> Array:
        if self._value is None:
            self._value = self.exact()
        if kind == "value":
            return self._value
        while (made := len(self._deviations)) < (bounds.RUNS if kind == "bound" else 1):
            runs = self.noisy(made, bounds.RUNS - made if made else 1)
            self._deviations.extend(bounds.deviation(runs, self._value))
        return self.bound(len(self._deviations) if kind == "bound_estimate" else bounds.RUNS)


class _Decoder(_Model):
    def __init__(self, config: Config, contents: Contents, start: int, context: int, precision: Precision) -> None:
        super().__init__(config, contents, start)
        self.context = context
        self._cache = bounds.lossy(config, precision)

    def exact(self) -> Array:
        self._tokens = self.contents()
        weights_exact, self._single = _decoder_weights(self.config)
        self._noise = bounds.Noisy(bounds.STORAGE[self.config.dtype], seed=self._tokens.shape[-1], cache=self._cache)
        return decoder(self._tokens, weights_exact, self.config, self.start, context=self.context)  # (n, rows, t, V)

    def noisy(self, first: int, count: int) -> Array:
        """As many as fit in ``STACKED`` numbers at once: on small arrays numpy's calls take longer than its sums."""
        c, s = self.config, self._tokens.shape[-1]
        largest = self._tokens.size * max(c.heads * s, c.vocabulary, c.width, c.mlp)
        runs = min(count, max(1, STACKED // largest))
        tokens = np.broadcast_to(self._tokens, (runs, *self._tokens.shape))
        return decoder(tokens, self._single, c, self.start, self._noise.of(runs), context=self.context)

    def bound(self, runs: int) -> Array:
        return bounds.decoder_bound(self._deviations, runs, self._noise.gain)


class _BlackBox(_Model):
    """The value is what its own forward gives; the bound follows from what that gives when its weights are perturbed by
    noise of the size of the rounding (``bounds.black_box_bound``)."""

    def __init__(
        self, config: Config, reference: ReferenceForward, contents: Contents, start: int, precision: Precision
    ) -> None:
        super().__init__(config, contents, start)
        self._reference, self._noise = reference, bounds.perturbation(config, precision)

    def exact(self) -> Array:
        return self._run(0.0, 0.0, 0)

    def noisy(self, first: int, count: int) -> Array:
        return self._run(self._noise.storage, self._noise.accumulation, first + 1)[None]

    def bound(self, runs: int) -> Array:
        return bounds.black_box_bound(self._deviations, runs, self._noise.gain)

    def _run(self, storage: float, accumulation: float, seed: int) -> Array:
        inputs = self.contents()
        n, m = inputs.shape[:2]
        output = self._reference(inputs.reshape(n * m, *inputs.shape[2:]), storage, accumulation, seed)
        return np.asarray(output, np.float64).reshape(n, m, *output.shape[1:])[:, :, self.start :]


@lru_cache(maxsize=8)
def _decoder_weights(config: Config) -> tuple[dict[str, Array], Mapping[str, Array]]:
    exact: dict[str, Array] = {name: value.astype(np.float64) for name, value in weights(config).items()}
    return exact, bounds.single(exact)
