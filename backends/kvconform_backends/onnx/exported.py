"""``onnx``: the torch decoder, exported once and run by ONNX Runtime: one graph for prefill, chunk and decode.

The present outputs of a step are bound as the past inputs of the next and never leave the device. They are never
written again, so that a fork is the same handles and an old handle stays good. Truncate and reorder go through numpy,
on CUDA as well.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnxruntime import OrtValue  # type: ignore[import-untyped]

from kvconform_backends.onnx import graphs as onnx_graphs
from kvconform_backends.onnx.backend import OnnxBackend
from kvconform_backends.validation import check_inputs
from kvconform_specs.claims import Claims
from kvconform_specs.config import Config

Array = NDArray[Any]
Past = tuple[OrtValue, ...]
"""Key and value of each layer in turn, ``(b, g, s, d)`` each."""


class OnnxExported(OnnxBackend):
    """Attention is a hand-built ``Attention`` node, the decoder is exported; both keep a functional cache."""

    cache_design = "concatenation"
    claims = Claims(
        profiles=("attention", "decoder"),
        abilities=(
            "uncached_forward",
            "length",
            "free_slots",
            "truncate",
            "fork",
            "reorder",
            "reset",
            "immutable",
            "mask",
            "contents",
            "bytes",
            "refusal",
            "last_only",
        ),
        dtypes=("float32", "float16"),  # bfloat16: ONNX Runtime has no CPU kernels, and numpy has no such type
        devices=("cpu", "cuda"),
        overflow="refused",
        memory="length",
        # measured on 1.31.1: the CPU kernel of Attention rounds float16 scores to float16 before the softmax, whatever
        # softmax_precision says. In float32 the class has the same bound.
        intermediates="storage",
    )

    @classmethod
    def refuses(cls, config: Config, device: str) -> str | None:
        if (device, config.profile, config.dtype) == ("cuda", "attention", "float16") and onnx_graphs.has_bias(config):
            return "ONNX Runtime's kernels of Attention take the bias in the dtype of the query: float16 rounds it"
        return super().refuses(config, device)

    # --- lifecycle ---
    def start(self, batch: int) -> Past:
        empty = self.value(np.zeros((batch, self.config.kv_heads, 0, self.config.head_dim), self.dtype))
        return (empty,) * (2 * self.config.layers)

    def length(self, cache: Past) -> list[int]:
        batch, _, s, _ = cache[0].shape()
        return [s] * batch

    def free_slots(self, cache: Past) -> list[int]:
        return [self.config.capacity - length for length in self.length(cache)]

    def bytes(self, cache: Past) -> int:
        return sum(int(x.tensor_size_in_bytes()) for x in cache)

    def contents(self, cache: Past) -> list[list[tuple[Array, Array]]]:
        held = [self.array(x) for x in cache]
        return [list(zip(*layer, strict=True)) for layer in zip(held[::2], held[1::2], strict=True)]

    def truncate(self, cache: Past, length: int) -> Past:
        s = cache[0].shape()[2]
        if not 0 <= length <= s:
            raise ValueError(f"cannot keep {length} of {s} tokens")
        return tuple(self.value(x.numpy()[:, :, :length].copy()) for x in cache)

    def fork(self, cache: Past) -> Past:
        return cache

    def reorder(self, cache: Past, rows: list[int]) -> Past:
        batch = cache[0].shape()[0]
        if not rows or not all(0 <= row < batch for row in rows):
            raise ValueError(f"want rows of 0..{batch - 1}, got {rows}")
        return tuple(self.value(x.numpy()[rows]) for x in cache)

    def reset(self, cache: Past) -> Past:
        return self.start(cache[0].shape()[0])

    # --- arithmetic ---
    def step(
        self, cache: Past, *inputs: Array, mask: Array | None = None, last_only: bool = False
    ) -> tuple[Array, Past]:
        batch, _, past, _ = cache[0].shape()
        t = check_inputs(self.config, batch, inputs)
        if past + t > self.config.capacity:
            raise ValueError(f"{past} + {t} tokens exceed the capacity of {self.config.capacity}")
        feeds = self.feeds(inputs, past, t, mask, last_only)
        session = self.session(True, onnx_graphs.needs_mask(self.config) or mask is not None)
        output, *present = self.run(session, [*feeds, *cache])
        return self.array(output), tuple(present)

    def try_out(self) -> None:
        _, cache = self.step(self.start(1), *self.probe(2))
        self.step(cache, *self.probe(1))
        self.uncached_forward(*self.probe(2))
        if self.config.profile == "attention":
            self.step(cache, *self.probe(1), mask=np.ones((1, 3), np.bool_))
