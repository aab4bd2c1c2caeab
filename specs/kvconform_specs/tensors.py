"""Tensors from seeds: the only module that turns a program's contents into numbers.

Every number comes from the counter-based generator Philox-4x64 (Salmon et al., "Parallel random numbers: as easy as
1, 2, 3", SC 2011): the key is the seed, the counter is the position. A token is therefore the same however the
program is split into steps, and on every machine: a raw 64-bit word becomes a number by integer arithmetic and one
rounding. Arrays are float32, already rounded to the config's dtype: definition and backend get the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvconform_specs.config import Config
from kvconform_specs.errors import SpecError
from kvconform_specs.history import Row, Stream, Token, requests
from kvconform_specs.program import DISTRIBUTIONS, Append, Run

Array = NDArray[np.float32]

_WEIGHTS, _ATTENTION, _TOKENS = 1, 2, 3  # second word of the key: one generator for each purpose
_SPREAD = np.float32(1.0 / (65536.0 * np.sqrt(4.0 / 12.0)))  # 1 / sd of the sum of four 16-bit uniform integers
NEEDLE_SCORE = 24.0
"""The score of a needle with its key: e^24 outweighs 4 096 other keys unless one is nearly parallel."""

_FACTORS = {
    "normal": (1, 1, 1),
    "large_queries": (64, 1, 1),
    "zero_keys": (1, 0, 1),
    "small_keys_large_values": (1, 0.25, 16),
}
"""Factors of query, key and value in each distribution of finite numbers; powers of two, which no dtype rounds."""

_philox = np.random.Philox(key=0)
_state = _philox.state


def derive(seed: int, index: int) -> int:
    """The seed of the ``index``-th variant of a program. Rows stay neighbours: ``derive(s + r) = derive(s) + r``."""
    return seed + (index << 32)


def raw(seed: int, purpose: int, start: int, words: int) -> NDArray[np.uint64]:
    """``words`` 64-bit words of stream ``seed``, from counter ``start`` on (a counter holds four words)."""
    _state["state"]["key"][:] = (seed, purpose)
    _state["state"]["counter"][:] = (start, 0, 0, 0)
    _state["buffer_pos"] = 4
    _philox.state = _state
    return np.asarray(_philox.random_raw(words))


def normal(words: NDArray[np.uint64]) -> Array:
    """Numbers of mean 0 and variance 1 from raw words: the sum of four 16-bit uniforms (Irwin-Hall, |x| < 3.47)."""
    total = words.view(np.uint16).reshape(*words.shape, 4).sum(axis=-1, dtype=np.int32)
    return np.asarray((total - 131070).astype(np.float32) * _SPREAD)


def rounded(x: NDArray[np.floating], dtype: str) -> Array:
    """``x`` rounded to nearest even in ``dtype``, held as float32."""
    if dtype == "float16":
        return x.astype(np.float16).astype(np.float32)
    single = np.ascontiguousarray(x, dtype=np.float32)
    if dtype == "float32":
        return single
    bits = single.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


class Streams:
    """The contents of a program's streams for ``n`` variants (``indices``) at once, up to position ``span``."""

    def __init__(self, config: Config, span: int, indices: Sequence[int]) -> None:
        self.config, self.span, self.indices = config, span, tuple(indices)
        self._tapes: dict[Stream, NDArray[np.generic]] = {}

    def tape(self, seed: int, distribution: str = "normal") -> NDArray[np.generic]:
        """The contents of one stream, positions ``0..span - 1``. Attention: ``(n, span, (h + 2 g) d)`` floats; query,
        key and value side by side. Decoder: ``(n, span)`` ids. Hidden: ``(n, span, width)`` floats."""
        return self._tape(Stream(seed, distribution))

    def _tape(self, stream: Stream) -> NDArray[np.generic]:
        tape = self._tapes.get(stream)
        if tape is None:
            tape = self._tapes[stream] = self._make(stream)
        return tape

    def _make(self, stream: Stream) -> NDArray[np.generic]:
        c = self.config
        key = stream.seed + (DISTRIBUTIONS.index(stream.distribution) << 48)  # seeds are smaller (program.MAX_SEED)
        seeds = [derive(key, index) for index in self.indices]
        if c.profile == "decoder":
            words = np.stack([raw(s, _TOKENS, 0, 4 * self.span)[::4] for s in seeds])  # one counter a token
            if not c.reserved:
                return (words % np.uint64(c.vocabulary)).astype(np.int64)
            allowed = np.setdiff1d(np.arange(c.vocabulary), c.reserved)
            return np.asarray(allowed[words % np.uint64(len(allowed))])
        width = c.width if c.profile == "hidden" else (c.heads + 2 * c.kv_heads) * c.head_dim
        padded = -(-width // 4) * 4
        words = np.stack([raw(s, _ATTENTION, 0, padded * self.span) for s in seeds])
        made = normal(words.reshape(len(seeds), self.span, padded)[..., :width])
        if stream.distribution == "nan":
            return np.full_like(made, np.nan)
        if c.profile == "hidden":
            return rounded(made, c.dtype)
        factors = _FACTORS[stream.distribution]
        if factors != (1, 1, 1):
            sizes = (c.heads * c.head_dim, c.kv_heads * c.head_dim, c.kv_heads * c.head_dim)
            made *= np.repeat(np.array(factors, np.float32), sizes)
        return rounded(made, c.dtype)

    def row(self, tokens: Iterable[Token]) -> NDArray[np.generic]:
        """The contents of these tokens, in order: ``(n, len(tokens), ...)``."""
        pieces = [self._tape(stream)[:, start:stop] for stream, start, stop in _runs(tokens)]
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate(pieces, axis=1) if pieces else self.tape(0)[:, :0]

    def split(self, row: NDArray[np.generic]) -> tuple[Array, Array, Array]:
        """Attention: query ``(n, h, t, d)``, key and value ``(n, g, t, d)`` of a row of contents."""
        c, (n, t) = self.config, row.shape[:2]
        heads = row.reshape(n, t, c.heads + 2 * c.kv_heads, c.head_dim).swapaxes(1, 2)
        return tuple(  # type: ignore[return-value]
            np.asarray(part) for part in np.split(heads, [c.heads, c.heads + c.kv_heads], axis=1)
        )

    def needle(self, target: Token) -> Array:
        """The query ``(n, h, 1, d)`` whose score with that token's key is ``NEEDLE_SCORE`` in every head, unless the
        scale is 0."""
        c = self.config
        _query, key, _value = self.split(self.row([target]))
        key = np.repeat(key, c.group, axis=1)
        norm = np.maximum(np.sum(key * key, axis=-1, keepdims=True), np.float32(1e-3))
        return rounded(key * np.float32(NEEDLE_SCORE / (c.score_scale or 1.0)) / norm, c.dtype)

    def inputs(self, step: Run, grown: tuple[Row, ...]) -> tuple[NDArray[np.generic], ...]:
        """The inputs of ``step``, with ``n`` variants in front; ``grown`` are the rows after the step.

        Attention: query ``(n, b, h, t, d)``, key and value ``(n, b, g, t, d)``. Decoder: token ids ``(n, b, t)``.
        Hidden: hidden states ``(n, b, t, width)``.
        Ragged rows are filled to ``t = max(counts)`` columns, on the side and with the stream that the step names.
        """
        t = max(step.counts)
        side, filling = (step.pad if isinstance(step, Append) else None) or ("right", None)
        rows = []
        for index, (history, count) in enumerate(zip(grown, step.counts, strict=True)):
            row = self.row(history[len(history) - count :])
            if count < t:
                pad = self.tape(step.seed if filling is None else filling + index, step.distribution)[:, : t - count]
                pad = np.zeros_like(pad) if filling is None else pad
                row = np.concatenate([row, pad] if side == "right" else [pad, row], axis=1)
            rows.append(row)
        if self.config.profile != "attention":
            return (np.stack(rows, axis=1),)
        parts = [self.split(row) for row in rows]
        query, key, value = (np.stack([part[i] for part in parts], axis=1) for i in range(3))
        if isinstance(step, Append) and step.needle is not None:
            needles = [self.needle(asked.needle) for asked in requests(step, grown) if asked.needle is not None]
            query = np.broadcast_to(np.stack(needles, axis=1), query.shape)
        return query, key, value


def mask(step: Append, grown: tuple[Row, ...]) -> NDArray[np.bool_]:
    """The caller's mask ``(b, s)`` over logical positions, True where a query may attend."""
    seen = np.ones((len(grown), max(map(len, grown))), bool)
    for row, position in step.masked:
        seen[row, position] = False
    return seen


def laid(x: NDArray[np.generic], layout: str, new: Callable[..., NDArray[Any]] = np.empty) -> NDArray[np.generic]:
    """A copy of the numbers in a layout of ``program.LAYOUTS``. Raises SpecError if rows must be equal and are not.

    new: gives memory for an array of that shape and dtype.
    """
    if layout == "contiguous":
        view = new(x.shape, x.dtype)
    elif layout == "expanded":
        if not (x == x[:1]).all():
            raise SpecError("layout", "expanded inputs need rows with equal tokens")
        one = new((1, *x.shape[1:]), x.dtype)
        one[...] = x[:1]
        return np.ndarray(x.shape, x.dtype, one, strides=(0, *one.strides[1:]))
    elif layout == "transposed":
        axes = (-3, -2) if x.ndim > 2 else (0, 1)
        view = new(x.swapaxes(*axes).shape, x.dtype).swapaxes(*axes)
    else:
        wide = new((*x.shape[:-1], 2 * x.shape[-1] + 1), x.dtype)
        wide.fill(7)
        view = wide[..., 1::2]
    view[...] = x
    return view


def malformed(inputs: tuple[NDArray[np.generic], ...], wrong: str, config: Config) -> tuple[NDArray[np.generic], ...]:
    """The inputs of one step, malformed in one way of ``program.MALFORMED``."""
    if wrong == "dtype":
        return tuple(x.astype(np.float32 if config.profile == "decoder" else np.int32) for x in inputs)
    if wrong == "rank":
        return tuple(x[0] for x in inputs)
    if wrong == "batch":
        return tuple(np.concatenate([x, x[:1]]) for x in inputs)
    if wrong == "fewer rows":
        return tuple(x[:1] for x in inputs)
    if wrong == "vocabulary":
        return tuple(np.where(np.arange(x.shape[1]) == x.shape[1] - 1, config.vocabulary, x) for x in inputs)
    if wrong == "width":
        return (inputs[0][..., :-1],)
    query, key, value = inputs
    if wrong == "heads":
        return query, np.concatenate([key, key[:, :1]], axis=1), np.concatenate([value, value[:, :1]], axis=1)
    if wrong == "head dim":
        return query, key[..., :-1], value
    return query, key, value[:, :, :-1]


def weight_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a decoder's weights; matrices multiply from the right, ``y = x @ w``."""
    c = config
    if c.profile != "decoder":
        return {}
    shapes: dict[str, tuple[int, ...]] = {"embed": (c.vocabulary, c.width)}
    if c.positions == "learned":
        shapes["position"] = (c.capacity, c.width)
    for layer in range(c.layers):
        at = f"layers.{layer}."
        shapes[at + "norm_attention"] = (c.width,)
        shapes[at + "query"] = (c.width, c.heads * (c.head_dim + c.rotary_dim))
        if c.latent:
            shapes[at + "down"] = (c.width, c.latent + c.rotary_dim)
            shapes[at + "norm_latent"] = (c.latent,)
            shapes[at + "up"] = (c.latent, c.heads * 2 * c.head_dim)
        elif c.source_of(layer) == layer:
            shapes[at + "key"] = (c.width, c.kv_heads * c.head_dim)
            shapes[at + "value"] = (c.width, c.kv_heads * c.head_dim)
        shapes[at + "output"] = (c.heads * c.head_dim, c.width)
        if c.mlp:
            shapes[at + "norm_mlp"] = (c.width,)
            shapes[at + "gate"] = (c.width, c.mlp)
            shapes[at + "up"] = (c.width, c.mlp)
            shapes[at + "down"] = (c.mlp, c.width)
    shapes["norm_final"] = (c.width,)
    shapes["lm_head"] = (c.width, c.vocabulary)
    if c.contexts > 1:
        shapes["context"] = (c.contexts, c.width)  # the last, so that the others are the same with one context
    return shapes


def weights(config: Config) -> dict[str, Array]:
    """The decoder's weights from ``config.seed``: ``init_std`` times a normal, gains ``1 +`` that, context 0 zero."""
    made = {}
    for number, (name, shape) in enumerate(weight_shapes(config).items()):
        size = int(np.prod(shape))
        words = raw(config.seed * 4096 + number, _WEIGHTS, 0, -(-size // 4) * 4)[:size]
        value = normal(words).reshape(shape) * np.float32(config.init_std)
        made[name] = rounded(value + np.float32(1) if len(shape) == 1 else value, config.dtype)
    if "context" in made:
        made["context"][0] = 0
    return made


def _runs(tokens: Iterable[Token]) -> Iterator[tuple[Stream, int, int]]:
    """Consecutive tokens of one stream as ``(stream, start, stop)``."""
    stream, start, stop = Stream(-1), 0, 0
    for of, position in tokens:
        if position != stop or (of is not stream and of != stream):
            if stop > start:
                yield stream, start, stop
            stream, start = of, position
        stop = position + 1
    if stop > start:
        yield stream, start, stop
