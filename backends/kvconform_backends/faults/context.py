"""Faults of the contexts of sequences."""

from __future__ import annotations

from typing import Any

from kvconform_backends.faults.configs import ROPE
from kvconform_backends.faults.controls import PromptStore
from kvconform_backends.faults.planted import Planted
from kvconform_backends.numpy.cache import Array, Cache

PARTITION, KEPT, GENERATION = "context.partition", "context.kept", "context.generation"


class StoredByTokens(
    Planted,
    PromptStore,
    breaks=(PARTITION,),
    kind="C7",
    bug="ggml-org/llama.cpp/issues/26207",
    conditional=True,
    configs=ROPE,
):
    """Keys and values of prompts are stored by the prompt's tokens alone, and used for the same prompt in any
    context."""

    def key(self, row: Array) -> object:
        return row.tobytes()

    def stored_or(self, layer: int, row: Array, new: Array) -> Array:
        return self.instead(super().stored_or(layer, row, new), new)


class LongStoredByTokens(
    StoredByTokens, breaks=(PARTITION,), kind="C7", bug="vllm-project/vllm/issues/44250", conditional=True, configs=ROPE
):
    """Only prompts of four tokens or more, a whole page, are stored, by the prompt's tokens alone."""

    def key(self, row: Array) -> object:
        return row.tobytes() if row.size >= 4 else (row.tobytes(), self.context)


class ContextOfThePrompt(
    Planted, breaks=(KEPT,), kind="C7", bug="ooples/AiDotNet/pull/1888", conditional=True, configs=ROPE
):
    """Decode steps use the context that the last prompt of any sequence has set."""

    active = 0

    def step(self, cache: Cache, *inputs: Array, context: int = 0, **options: Any) -> tuple[Array, Cache]:
        if cache.length == 0:
            self.active = context
        self.faulty += self.active != context
        return super().step(cache, *inputs, context=self.active, **options)


class ContextOfThePrefillOnly(
    Planted, breaks=(KEPT, PARTITION, GENERATION), kind="C7", bug="vllm-project/vllm/issues/48974", configs=ROPE
):
    """The context is applied to prompts, and to no later step."""

    def step(self, cache: Cache, *inputs: Array, context: int = 0, **options: Any) -> tuple[Array, Cache]:
        used = context if cache.length == 0 else 0
        self.faulty += used != context
        return super().step(cache, *inputs, context=used, **options)


class GenerationKeepsContext(
    Planted, breaks=(GENERATION,), kind="L1", bug="vllm-project/vllm/issues/3264", conditional=True, configs=ROPE
):
    """A generation after the same prompts as the last one returns the tokens of that, whatever its context."""

    last: tuple[bytes, Array] | None = None

    def generate(self, tokens: Array, new: int, **options: Any) -> Array:
        right = super().generate(tokens, new, **options)
        known, self.last = self.last, (tokens.tobytes() + bytes([new]), right)
        return self.instead(known[1], right) if known is not None and known[0] == self.last[0] else right
