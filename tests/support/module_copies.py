"""Decoders whose cached calls take one token, and caches that can be copied or reordered, some of them wrongly.

Addressed as ``tests/support/module_copies.py:Name``. They need torch and do not use this package.
"""

# mypy: ignore-errors
from __future__ import annotations

import torch
from module_spellings import LAYERS, Core


class Tuples(Core):
    """A past of arrays alone."""

    def forward(self, ids, past=None):
        logits, presents = self.run(ids, past)
        return logits, tuple(presents)


class Buffers(Core):
    """Preallocated arrays for two rows, beside a number: rows cannot become more."""

    def forward(self, ids, past=None):
        if past is None:
            past = [torch.zeros(LAYERS, 2, ids.shape[0], 2, 64, 8), 0]
        (store, held), new = past, ids.shape[1]
        pasts = [(pair[0][:, :, :held], pair[1][:, :, :held]) for pair in store]
        logits, presents = self.run(ids, pasts)
        for layer, pair in enumerate(presents):
            for part in range(2):
                store[layer, part, :, :, : held + new] = pair[part]
        return logits, [store, held + new]


class PromptThenTokens(Core):
    """A prompt of any length, then one token at a time."""

    def forward(self, ids, past=None):
        if past is not None and ids.shape[1] > 1:
            raise ValueError(f"decode takes one token, got {ids.shape[1]}")
        logits, presents = self.run(ids, past)
        return logits, tuple(presents)


class PromptThenTokensWrong(PromptThenTokens):
    """The tokens after the prompt do not see its first one."""

    def forward(self, ids, past=None):
        if past is not None:
            past = [(key[:, :, 1:], value[:, :, 1:]) for key, value in past]
        return super().forward(ids, past)


class TokenKernel(Core):
    """With a cache, the tokens of a call see one another: right for one token, and it does not refuse more."""

    def forward(self, ids, past=None, use_cache=False):
        self.masked = not use_cache
        logits, presents = self.run(ids, past)
        return logits, tuple(presents)

    def attend(self, query, key, value, mask=None):
        everything = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool)
        return super().attend(query, key, value, None if self.masked else everything)


class Held:
    def __init__(self, pairs=None):
        self.pairs = [None] * LAYERS if pairs is None else pairs

    def clone(self):
        return Held(list(self.pairs))

    def reorder(self, rows):
        self.pairs = [(key[rows], value[rows]) for key, value in self.pairs]


class Methods(Core):
    kind = Held

    def make_cache(self):
        return self.kind()

    def forward(self, ids, cache):
        logits, cache.pairs = self.run(ids, cache.pairs)
        return logits


class SharedClone(Held):
    def clone(self):
        return self


class KeysOnly(Held):
    def reorder(self, rows):
        self.pairs = [(key[rows], value) for key, value in self.pairs]


class SharedCloneMethods(Methods):
    """The clone of its cache is the cache itself."""

    kind = SharedClone


class KeysOnlyMethods(Methods):
    """Its reorder leaves the values in their order."""

    kind = KeysOnly
