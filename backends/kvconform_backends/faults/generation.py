"""Faults of the generation loop: what it feeds, samples and returns, and what it leaves in the cache."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvconform_backends.faults.planted import Planted
from kvconform_backends.numpy.cache import Array, Cache

CLAUSE = ("equivalence.generation",)


class Loop(Planted):
    """The loop of ``greedy`` with two hooks: its initial cache, and the choice of the first token."""

    used: Cache | None = None  # the cache of the previous generation

    def begin(self, batch: int, room: int) -> Cache:
        """A cache of ``batch`` rows with room for ``room`` tokens."""
        return self.start(batch)

    def pick(self, logits: Array) -> Array:
        """``(b, 1)``: the first token of each row, from the prompt's logits ``(b, t, V)``."""
        return np.asarray(logits[:, -1:].argmax(axis=-1))

    def generate(self, tokens: Array, new: int, **options: Any) -> Array:
        logits, cache = self.step(self.begin(len(tokens), tokens.shape[1] + new), tokens, **options)
        picked = [self.pick(logits)]
        while len(picked) < new:
            logits, cache = self.step(cache, picked[-1], **options)
            picked.append(logits[:, -1:].argmax(axis=-1))
        self.used = cache
        return np.concatenate(picked, axis=1)


class FirstTokenDropped(Planted, breaks=CLAUSE, kind="L1", bug="Lightning-AI/litgpt/issues/2307"):
    """The prefill runs twice, and its token is fed but not returned: the output starts with the second token."""

    def generate(self, tokens: Array, new: int, **options: Any) -> Array:
        self.step(self.start(len(tokens)), tokens, **options)
        right = super().generate(tokens, new + 1, **options)
        return self.instead(right[:, 1:], right[:, :-1])


class FirstTokenTwice(Planted, breaks=CLAUSE, kind="L1", bug="AI-Hypercomputer/jetstream-pytorch/issues/173"):
    """The prefill returns its token, and the first decode step returns it again."""

    def generate(self, tokens: Array, new: int, **options: Any) -> Array:
        right = super().generate(tokens, new, **options)
        return self.instead(np.concatenate([right[:, :1], right[:, : new - 1]], axis=1), right)


class LastPromptTokenTwice(Planted, breaks=CLAUSE, kind="L1", bug="oobabooga/textgen/pull/4145"):
    """Decoding starts by feeding the last prompt token, which the prefill has already written."""

    def generate(self, tokens: Array, new: int, **options: Any) -> Array:
        doubled = np.concatenate([tokens, tokens[:, -1:]], axis=1)
        return self.instead(super().generate(doubled, new, **options), super().generate(tokens, new, **options))


class GenerationGoesOn(Loop, breaks=CLAUSE, kind="C6", bug="casper-hansen/AutoAWQ/issues/170", conditional=True):
    """A generation continues on the cache of the previous one if that has as many rows and enough free slots."""

    def begin(self, batch: int, room: int) -> Cache:
        used = self.used
        if used is None or len(used.lengths) != batch or used.length + room > self.config.capacity:
            return self.start(batch)
        self.faulty += 1
        return used


class PickedOneEarly(Loop, breaks=CLAUSE, kind="L1", bug="abetlen/llama-cpp-python/pull/1179", conditional=True):
    """In a batch, the first token is chosen from the logits of the second-to-last prompt token."""

    def pick(self, logits: Array) -> Array:
        right = super().pick(logits)
        return self.instead(super().pick(logits[:, :-1]), right) if min(logits.shape[:2]) > 1 else right


class FirstRowForAll(Loop, breaks=CLAUSE, kind=("L1", "H4"), bug="neuralmagic/deepsparse/pull/1128", conditional=True):
    """Every row gets the first token of row 0."""

    def pick(self, logits: Array) -> Array:
        right = super().pick(logits)
        return self.instead(np.broadcast_to(right[:1], right.shape), right)


class FullCacheRepeats(
    Planted, breaks=CLAUSE, kind="C2", bug="huggingface/transformers/issues/32503", conditional=True
):
    """If prompt and new tokens fill the capacity, the last decode step finds no slot and repeats its input."""

    def generate(self, tokens: Array, new: int, **options: Any) -> Array:
        right = super().generate(tokens, new, **options)
        if tokens.shape[1] + new < self.config.capacity or new < 2:
            return right
        return self.instead(np.concatenate([right[:, :-1], right[:, -2:-1]], axis=1), right)


class GenerationAppends(Planted, breaks=CLAUSE, kind=("C4", "C7"), bug="MemTensor/MemOS/pull/2303", conditional=True):
    """The first prompt token is appended to the last stepped sequence with the same number of rows."""

    last: Cache | None = None
    alone = False

    def step(self, cache: Cache, *inputs: Array, **options: Any) -> tuple[Array, Cache]:
        output, cache = super().step(cache, *inputs, **options)
        self.last = self.last if self.alone or not self.cached else cache
        return output, cache

    def generate(self, tokens: Array, new: int, **options: Any) -> Array:
        self.alone = True
        picked, last = super().generate(tokens, new, **options), self.last
        if last is not None and len(last.lengths) == len(tokens) and last.length < self.config.capacity:
            self.faulty += 1
            last.keys[:], last.values[:] = self.grown(last, tokens[:, :1])
        self.alone = False
        return picked

    def grown(self, cache: Cache, tokens: Array) -> tuple[list[Array], list[Array]]:
        _output, grown = super().step(cache, tokens)
        return grown.keys, grown.values
