"""``onnx``: the exported torch decoder in ONNX Runtime, with one graph for prefill, chunk and decode.

The present outputs of a step are bound as the past inputs of the next and stay on the device. They are never modified,
so that a fork shares them and old handles stay valid. Truncate and reorder copy through numpy, also on CUDA.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnxruntime import OrtValue  # type: ignore[import-untyped]

from kvconform_backends.abilities import BASIC
from kvconform_backends.onnx import graphs as onnx_graphs
from kvconform_backends.onnx.backend import OnnxBackend
from kvconform_backends.validation import check_inputs, check_length, check_rows
from kvconform_specs.claims import Claims
from kvconform_specs.config import Config

Array = NDArray[Any]
Past = tuple[OrtValue, ...]
"""Key and value of each layer in turn, ``(b, g, s, d)`` each."""


class OnnxExported(OnnxBackend):
    """Attention is a hand-built ``Attention`` node, the decoder is exported; both have an immutable cache."""

    cache_design = "concatenation"
    claims = Claims(
        profiles=("attention", "decoder"),
        abilities=(*BASIC, "truncate", "immutable", "mask", "bytes", "last_only"),
        dtypes=("float32", "float16"),  # bfloat16: no CPU kernels in ONNX Runtime, no numpy type
        devices=("cpu", "cuda"),
        overflow="refused",
        memory="length",
        # measured on 1.31.1: the CPU kernel of Attention rounds float16 scores before the softmax, regardless of
        # softmax_precision. In float32 both classes have the same bound.
        intermediates="storage",
    )

    @classmethod
    def refuses(cls, config: Config, device: str) -> str | None:
        if (device, config.profile, config.dtype) == ("cuda", "attention", "float16") and onnx_graphs.has_bias(config):
            return "ONNX Runtime's Attention kernels take the bias in the query's dtype: float16 would round it"
        return super().refuses(config, device)

    # --- lifecycle ---
    def start(self, batch: int) -> Past:
        empty = self.value(np.zeros((batch, self.config.kv_heads, 0, self.config.head_dim), self.dtype))
        return (empty,) * (2 * self.config.layers)

    def length(self, cache: Past) -> list[int]:
        batch, _, s, _ = cache[0].shape()
        return [s] * batch

    def bytes(self, cache: Past) -> int:
        return sum(int(x.tensor_size_in_bytes()) for x in cache)

    def contents(self, cache: Past) -> list[list[tuple[Array, Array]]]:
        held = [self.array(x) for x in cache]
        return [list(zip(*layer, strict=True)) for layer in zip(held[::2], held[1::2], strict=True)]

    def truncate(self, cache: Past, length: int) -> Past:
        s = cache[0].shape()[2]
        check_length(length, s)
        return tuple(self.value(x.numpy()[:, :, :length].copy()) for x in cache)

    def fork(self, cache: Past) -> Past:
        return cache

    def reorder(self, cache: Past, rows: list[int]) -> Past:
        check_rows(rows, cache[0].shape()[0])
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
