"""Faults of quantised caches: wrong scales, and wrong choice of the exact tokens."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from kvconform_backends.faults.planted import Planted
from kvconform_backends.numpy.cache import Array, Cache
from kvconform_backends.numpy.int8 import LARGEST, RESIDUAL, NumpyInt8, Tokens

PROMPT, DECODE, SCALES, NEWEST = (f"quantised.{name}" for name in ("prefill", "decode", "scales", "residual"))


class ScaleIgnored(
    Planted, NumpyInt8, breaks=(PROMPT, DECODE, SCALES), kind="Q1", bug="flashinfer-ai/flashinfer/issues/1023"
):
    """Scales are passed but not applied: attention uses the stored integers."""

    def dequantised(self, x: Tokens) -> Array:
        return self.instead(super().dequantised(replace(x, steps=np.ones_like(x.steps))), super().dequantised(x))


class ScaleInverted(
    Planted, NumpyInt8, breaks=(PROMPT, DECODE, SCALES), kind="Q1", bug="vllm-project/vllm-xpu-kernels/pull/475"
):
    """Both writing and reading divide by the scale."""

    def dequantised(self, x: Tokens) -> Array:
        steps = 1 / np.where(x.steps == 0, np.float32(1), x.steps)
        return self.instead(super().dequantised(replace(x, steps=steps)), super().dequantised(x))


class ValuesByKeyScale(Planted, NumpyInt8, breaks=(SCALES, PROMPT), kind="Q1", bug="sgl-project/sglang/pull/26852"):
    """Values are read with the scale of the keys."""

    def append(self, cache: Cache, layer: int, key: Array, value: Array) -> tuple[Array, Array]:
        keys, values = super().append(cache, layer, key, value)
        crossed = replace(cache.values[layer], steps=cache.keys[layer].steps)
        return keys, self.instead(self.dequantised(crossed), values)


class DecodeByKeyScale(
    Planted, NumpyInt8, breaks=(SCALES, DECODE), kind="Q1", bug="vllm-project/vllm/pull/55557", conditional=True
):
    """A value quantised by a decode step is read with the scale of its key."""

    def append(self, cache: Cache, layer: int, key: Array, value: Array) -> tuple[Array, Array]:
        before = cache.keys[layer].codes.shape[2]
        keys, values = super().append(cache, layer, key, value)
        held = cache.values[layer]
        if key.shape[2] == 1 and held.codes.shape[2] > before:
            mine = cache.keys[layer].steps[:, :, before:]
            cache.values[layer] = replace(held, steps=np.concatenate([held.steps[:, :, :before], mine], axis=2))
            values = self.instead(self.dequantised(cache.values[layer]), values)
        return keys, values


class FirstScaleKept(
    Planted, NumpyInt8, breaks=(DECODE, NEWEST), kind="Q1", bug="sgl-project/sglang/pull/34765", conditional=True
):
    """The scale of the first quantised token is used for every later one, which it may clip."""

    first: Array | None = None

    def grown(self, past: Tokens, new: Array) -> Tokens:
        self.first = past.steps[:, :, :1] if past.steps.shape[2] else None
        return super().grown(past, new)

    def steps(self, x: Array) -> Array:
        right = super().steps(x)
        return right if self.first is None else self.instead(np.broadcast_to(self.first, right.shape), right)

    def quantised(self, x: Array, steps: Array) -> Array:
        safe = np.where(steps == 0, np.float32(1), steps)
        return super().quantised(np.clip(x, -LARGEST * safe, LARGEST * safe), steps)


class OneScaleForPrompt(
    Planted, NumpyInt8, breaks=(PROMPT,), kind="Q1", bug="huggingface/transformers/issues/35185", conditional=True
):
    """Tokens quantised together share the scale of the largest: small ones lose precision."""

    def steps(self, x: Array) -> Array:
        right = super().steps(x)
        return self.instead(np.broadcast_to(right.max(axis=2, keepdims=True, initial=0), right.shape), right)


class PromptQuantisedWhole(
    Planted, NumpyInt8, breaks=(NEWEST, PROMPT), kind="Q2", bug="huggingface/transformers/issues/35185"
):
    """A prompt of several tokens is quantised completely, ignoring the residual window."""

    def grown(self, past: Tokens, new: Array) -> Tokens:
        right = super().grown(past, new)
        if new.shape[2] == 1:
            return right
        steps = self.steps(right.recent)
        self.faulty += 1
        return Tokens(
            np.concatenate([right.codes, self.quantised(right.recent, steps)], axis=2),
            np.concatenate([right.steps, steps], axis=2),
            right.recent[:, :, :0],
        )


class DoubledOnLeaving(Planted, NumpyInt8, breaks=(NEWEST, DECODE), kind="Q2", bug="rajveer43/VeloxQuant-MLX/pull/89"):
    """The token leaving the residual window is lost, and the next one is stored in both places."""

    def grown(self, past: Tokens, new: Array) -> Tokens:
        right = super().grown(past, new)
        leaving = right.codes.shape[2] - past.codes.shape[2]
        if not leaving:
            return right
        recent = np.concatenate([past.recent, new], axis=2)[:, :, 1 : leaving + 1]
        steps = self.steps(recent)
        codes = np.concatenate([past.codes, self.quantised(recent, steps)], axis=2)
        return replace(right, codes=self.instead(codes, right.codes), steps=np.concatenate([past.steps, steps], axis=2))


class WindowOfTheStep(
    Planted, NumpyInt8, breaks=(NEWEST, DECODE), kind="Q2", bug="rajveer43/VeloxQuant-MLX/issues/86", conditional=True
):
    """The residual window is applied to the step's tokens, not the row's: a decode step leaves one exact token."""

    def grown(self, past: Tokens, new: Array) -> Tokens:
        right = super().grown(past, new)
        early = max(right.recent.shape[2] - new.shape[2], 0)
        steps = self.steps(right.recent[:, :, :early])
        self.faulty += early > 0
        return Tokens(
            np.concatenate([right.codes, self.quantised(right.recent[:, :, :early], steps)], axis=2),
            np.concatenate([right.steps, steps], axis=2),
            right.recent[:, :, early:],
        )


class ShortPromptQuantised(
    Planted, NumpyInt8, breaks=(NEWEST,), kind="Q2", bug="huggingface/transformers/issues/35185", conditional=True
):
    """A first step with fewer tokens than the residual window is quantised."""

    def grown(self, past: Tokens, new: Array) -> Tokens:
        right = super().grown(past, new)
        if past.shape[2] or new.shape[2] >= RESIDUAL:
            return right
        steps = self.steps(new)
        self.faulty += 1
        return Tokens(self.quantised(new, steps), steps, new[:, :, :0])


# --- never quantised ---
class NeverQuantised(
    Planted,
    NumpyInt8,
    breaks=("quantised.stored", "accounting.bytes"),
    kind="Q2",
    bug="rajveer43/VeloxQuant-MLX/issues/86",
):
    """No token is quantised, however many there are."""

    def grown(self, past: Tokens, new: Array) -> Tokens:
        recent = np.concatenate([past.recent, new], axis=2)
        self.faulty += recent.shape[2] > RESIDUAL
        return replace(past, recent=recent)


class DecodeNeverQuantises(
    Planted,
    NumpyInt8,
    breaks=("quantised.stored", "accounting.bytes"),
    kind="Q2",
    bug="rajveer43/VeloxQuant-MLX/issues/86",
    conditional=True,
):
    """Only a prompt or a chunk quantises what leaves the residual window: decode steps leave all tokens exact."""

    def grown(self, past: Tokens, new: Array) -> Tokens:
        if new.shape[2] > 1:
            return super().grown(past, new)
        recent = np.concatenate([past.recent, new], axis=2)
        self.faulty += recent.shape[2] > RESIDUAL
        return replace(past, recent=recent)
