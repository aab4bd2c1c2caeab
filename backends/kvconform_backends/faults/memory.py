"""Faults of the caller's memory: inputs that are written or kept, and outputs that are used again."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from kvconform_backends.faults.configs import LAYERS
from kvconform_backends.faults.planted import Planted
from kvconform_backends.numpy.cache import Array, Cache

UNCHANGED = "memory.inputs-unchanged"
REUSED = "memory.inputs-reused"
KEPT = "memory.outputs-kept"


# --- inputs are written ---
class InputsZeroed(Planted, breaks=(UNCHANGED,), kind="C4", bug="tenstorrent/tt-forge-onnx/pull/2672"):
    """A step leaves zeros in the arrays that it was given."""

    def step(self, cache: Cache, *inputs: Array, **options: Any) -> tuple[Array, Cache]:
        output = super().step(cache, *inputs, **options)
        for x in inputs:
            self.faulty += bool(x.any())
            x[...] = 0
        return output


class QueryScaledInPlace(
    Planted, breaks=(UNCHANGED,), kind="C4", bug="huggingface/transformers/pull/41535", conditional=True, configs=LAYERS
):
    """The query of a decode step is scaled in place, where its numbers are dense."""

    def scores(self, query: Array, keys: Array) -> Array:
        right = super().scores(query, keys)
        if self.cached and query.shape[2] == 1 and query.flags.c_contiguous:
            self.faulty += 1
            query *= np.float32(self.config.score_scale)
        return right


class KeysSmoothedInPlace(
    Planted, breaks=(UNCHANGED,), kind="C4", bug="hao-ai-lab/FastVideo/pull/1457", conditional=True, configs=LAYERS
):
    """In a prompt of several tokens the caller's keys lose their mean, after they were stored."""

    def append(self, cache: Cache, layer: int, key: Array, value: Array) -> tuple[Array, Array]:
        attended = super().append(cache, layer, key, value)
        if cache.length == key.shape[2] > 1:
            self.faulty += 1
            key -= key.mean(axis=2, keepdims=True)
        return attended


class WritesOnePast(
    Planted, breaks=(UNCHANGED,), kind="H4", bug="fla-org/flash-linear-attention/issues/1102", configs=LAYERS
):
    """A kernel without a mask for its last block zeroes the number behind its query."""

    def run(self, cache: Cache, inputs: tuple[Array, ...], mask: Array | None = None) -> Array:
        output = super().run(cache, inputs, mask)
        query = inputs[0]
        behind = as_strided(query, (*query.shape[:3], query.shape[3] + 1), query.strides)[-1, -1, -1, -1:]
        self.faulty += 1
        behind[...] = 0
        return output


class KeptKeysScaled(
    Planted, breaks=(UNCHANGED,), kind="C4", bug="hao-ai-lab/FastVideo/pull/1457", conditional=True, configs=LAYERS
):
    """The cache holds the caller's keys of a prompt, as it claims, and the next step scales them where they are."""

    claims = replace(Planted.claims, inputs="kept")

    def append(self, cache: Cache, layer: int, key: Array, value: Array) -> tuple[Array, Array]:
        kept = vars(self).get("_kept")
        attended = super().append(cache, layer, key, value)
        if cache.length == key.shape[2]:
            vars(self)["_kept"] = key if self.cached else None
        elif kept is not None:
            self.faulty += 1
            kept *= np.float32(2)
            vars(self)["_kept"] = None
        return attended


# --- inputs are kept ---
class PromptKept(Planted, breaks=(REUSED,), kind="C7", bug="microsoft/onnxruntime-genai/pull/1225", configs=LAYERS):
    """The keys and values of a prompt are not copied: the cache holds the caller's arrays."""

    def append(self, cache: Cache, layer: int, key: Array, value: Array) -> tuple[Array, Array]:
        if self.cached and not cache.length and self.stored(key) is key:
            self.faulty += 1
            cache.keys[layer], cache.values[layer] = key, value
            return key, value
        return super().append(cache, layer, key, value)


class TokenStoredLate(
    Planted,
    breaks=(REUSED,),
    kind="C7",
    bug="ModelEngine-Group/unified-cache-management/pull/322",
    conditional=True,
    configs=LAYERS,
):
    """The value of a decode step is copied into the cache at the next step, from memory that the caller has by then
    used for something else."""

    def append(self, cache: Cache, layer: int, key: Array, value: Array) -> tuple[Array, Array]:
        values, newest = vars(self).setdefault("_late", (None, None))
        if values is cache.values[layer]:
            held = np.concatenate([values[:, :, :-1], self.stored(newest)], axis=2)
            cache.values[layer] = self.instead(held, values)
        attended = super().append(cache, layer, key, value)
        if key.shape[2] == 1 and self.cached:
            vars(self)["_late"] = cache.values[layer], value
        return attended


# --- outputs are used again ---
class OutputBufferReturned(Planted, breaks=(KEPT,), kind="X1", bug="pytorch/TensorRT/issues/3275"):
    """Every call returns a view of one buffer, which the next call overwrites."""

    def run(self, cache: Cache, inputs: tuple[Array, ...], mask: Array | None = None) -> Array:
        output = super().run(cache, inputs, mask)
        buffer: Array = vars(self).setdefault("_buffer", np.zeros(1 << 16, np.float32))
        view = buffer[: output.size].reshape(output.shape)
        self.faulty += bool(buffer.any())
        view[...] = output
        return view


class DecodeOutputReturned(Planted, breaks=(KEPT,), kind="X1", bug="pytorch/pytorch/issues/144386", conditional=True):
    """A captured decode step writes each result into the output of the first one of that shape."""

    def run(self, cache: Cache, inputs: tuple[Array, ...], mask: Array | None = None) -> Array:
        output = super().run(cache, inputs, mask)
        if inputs[0].shape[2 if len(inputs) == 3 else 1] > 1:
            return output
        captured: dict[tuple[int, ...], Array] = vars(self).setdefault("_captured", {})
        view = captured.setdefault(output.shape, output)
        self.faulty += view is not output
        view[...] = output
        return view
