"""Wrong modules in the styles of ``module_spellings``: one mistake each, modelled on a public report.

Addressed as ``tests/support/faulty_spellings.py:Name``.
"""

# mypy: ignore-errors
from __future__ import annotations

import torch
from module_spellings import (
    LAYERS,
    Buffers,
    CacheWithUpdate,
    ChunkOfOne,
    ChunkOfSix,
    Core,
    CroppableCache,
    Ragged,
    RollbackCache,
    SeqFirst,
    WholeSequence,
)
from torch import Tensor


class StaleCrop(CroppableCache):
    """Crops the first layer only."""

    def crop(self, max_length: int) -> None:
        key, value = self.pairs[0]
        self.pairs[0] = key[:, :, :max_length], value[:, :, :max_length]


class CropsOneLayer(CacheWithUpdate):
    def forward(self, ids, cache: StaleCrop | None = None):
        return super().forward(ids, cache)


class KeepsValues(CroppableCache):
    """Crops keys to the first tokens and values to the last ones."""

    def crop(self, max_length: int) -> None:
        self.pairs = {n: (k[:, :, :max_length], v[:, :, v.shape[2] - max_length :]) for n, (k, v) in self.pairs.items()}


class CropsWrongValues(CacheWithUpdate):
    def forward(self, ids, cache: KeepsValues | None = None):
        return super().forward(ids, cache)


class EmptiesOnNothing(RollbackCache):
    """``[:-0]`` is empty: removing no token removes all."""

    def rollback(self, n: int) -> None:
        self.pairs = {layer: (key[:, :, :-n], value[:, :, :-n]) for layer, (key, value) in self.pairs.items()}


class RollsBackNothing(CacheWithUpdate):
    def forward(self, ids, cache: EmptiesOnNothing | None = None):
        return super().forward(ids, cache)


class SilentOverflow(Buffers):
    """A token beyond the buffer is dropped: one number broadcasts into an empty slice
    (Dao-AILab/flash-attention/issues/638)."""

    def __init__(self) -> None:
        super().__init__()
        self.max_seq_len, self.length = 1 << 30, 21


class PaddingSeen(Ragged):
    """Later calls see the padding of earlier ones."""

    def forward(self, ids, cache=None, lengths=None):
        if cache is not None and lengths is not None:
            held = cache["valid"].clone()
            held[:, :-1] |= True
            cache = {**cache, "valid": held}
        return super().forward(ids, cache, lengths)


class SixDropsOldest(ChunkOfSix):
    """A chunk of six forgets the oldest token."""

    def forward(self, ids, past=None, use_cache=False):
        if past is not None and ids.shape[1] == 6:
            past = [(key[:, :, 1:], value[:, :, 1:]) for key, value in past]
        return super().forward(ids, past, use_cache)


class OneDropsOldest(ChunkOfOne):
    """From the tenth token on the oldest one is forgotten."""

    def forward(self, ids, past=None):
        if past is not None and past[0][0].shape[2] == 9:
            past = [(key[:, :, 1:], value[:, :, 1:]) for key, value in past]
        return super().forward(ids, past)


class SeqFirstSharesRow(SeqFirst):
    """Every row reads the keys of the first one, once something is cached."""

    def forward(self, ids, past=None):
        if past is not None:
            past = [(key[:1].expand_as(key), value) for key, value in past]
        return super().forward(ids, past)


class WholeForgets(WholeSequence):
    """The last token that was cached is forgotten if more than five are."""

    def forward(self, ids, past=None):
        logits, presents = super().forward(ids, past)
        if past is not None and past[0][0].shape[2] > 5:
            held = past[0][0].shape[2]
            cut = [(key.clone(), value.clone()) for key, value in past]
            for key, _value in cut:
                key[:, :, held - 1] = 0
            logits, _presents = self.run(ids[:, held:], cut)
        return logits, presents


class Int8(Core):
    """Keys and values are rounded to 8 bits, one scale for each token and head. ``wrong``: from the eighth token on,
    with a quarter of it."""

    wrong = False

    def forward(self, ids, past=None, use_cache=False):
        if not use_cache:
            return self.run(ids, past)[0], None
        held = 0 if past is None else past[0][0].shape[2]
        x, presents = self.embed(ids), []
        for layer in range(LAYERS):
            query, *pair = self.heads(layer, x)
            pair = [self.rounded(part, held) for part in pair]
            if past is not None:
                pair = [torch.cat(both, 2) for both in zip(past[layer], pair, strict=True)]
            presents.append(tuple(pair))
            x = x + self.attend(query, *pair)
        return self.head(x), presents

    def rounded(self, x: Tensor, held: int) -> Tensor:
        scale = x.abs().amax(-1, keepdim=True) / 127
        if self.wrong and held > 7:
            scale = scale / 4
        return (x / scale).round().clamp(-127, 127) * scale


class Int8WrongScale(Int8):
    wrong = True
