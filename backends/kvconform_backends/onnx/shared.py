"""``onnx-shared``: the torch decoder, exported with ``GroupQueryAttention``, whose past and present share a buffer.

A step writes its tokens into the buffers of its cache and reads the filled slots, as ``eager-static`` does. The inputs
of a decode step are bound once per cache and updated in place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnxruntime import InferenceSession, OrtValue  # type: ignore[import-untyped]

from kvconform_backends import rotary
from kvconform_backends.abilities import BASIC
from kvconform_backends.onnx import graphs as onnx_graphs
from kvconform_backends.onnx import runtime as onnx_runtime
from kvconform_backends.onnx import shared_graphs
from kvconform_backends.onnx.backend import OnnxBackend
from kvconform_backends.onnx.graphs import pasts, presents
from kvconform_backends.onnx.shared_graphs import bias, padded
from kvconform_backends.torch import decoder as torch_decoder
from kvconform_backends.torch.decoder import positive_scale
from kvconform_backends.validation import check_inputs, check_length, check_rows
from kvconform_specs.claims import Claims

Array = NDArray[Any]


class CacheBinding:
    """A session's bindings for one cache: the buffers stay bound, and so do inputs that keep their shape."""

    def __init__(self, session: InferenceSession, buffers: list[OrtValue], backend: OnnxShared) -> None:
        self.session, self.device = session, backend.device
        self.binding = session.io_binding()
        self.values: dict[str, tuple[tuple[int, ...], OrtValue]] = {}
        self.output = onnx_runtime.names(session)[1][0]
        self.binding.bind_output(
            self.output, self.device, 0
        )  # outputs are returned in the order in which they were bound first
        for past, present, buffer in zip(pasts(backend.config), presents(backend.config), buffers, strict=True):
            self.binding.bind_ortvalue_input(past, buffer)
            self.binding.bind_ortvalue_output(present, buffer)

    def run(self, feeds: Mapping[str, Array]) -> OrtValue:
        """The first output, in memory of its own. Raises RuntimeError if it is not on the device."""
        for name, x in feeds.items():
            held = self.values.get(name)
            if held is not None and held[0] == x.shape:
                held[1].update_inplace(np.ascontiguousarray(x))
                continue
            # the operator always reads the total on the host
            value = onnx_runtime.value_of(x.copy(), "cpu" if name == "total_sequence_length" else self.device)
            self.values[name] = x.shape, value
            self.binding.bind_ortvalue_input(name, value)
        self.binding.bind_output(self.output, self.device, 0)
        self.session.run_with_iobinding(self.binding)
        return onnx_runtime.given(self.binding, self.device)[0]


@dataclass
class SharedBuffers:
    """Keys and values of each layer in turn, ``(b, g, capacity, d)`` each, ``d`` padded, and the length of the rows."""

    buffers: list[OrtValue]
    batch: int
    length: int = 0
    bound: CacheBinding | None = field(default=None, repr=False)


class OnnxShared(OnnxBackend):
    """Buffers of ``capacity`` slots, written in place by the operator that attends to them."""

    MODULES = (torch_decoder, rotary, onnx_graphs, shared_graphs)
    PREFIX = "decoder-shared-"
    cache_design = "in-place"
    claims = Claims(
        profiles=("attention", "decoder"),
        # not ``bytes``: head dims are padded to a multiple of 8
        abilities=(*BASIC, "truncate", "poison", "last_only"),
        dtypes=("float32", "float16"),
        devices=("cpu", "cuda"),
        overflow="refused",
        memory="capacity",
        unused_slots="any",
        intermediates="storage",  # as ``onnx``, whose uncached graph it uses; ALiBi's bias is in the config's dtype
    )

    # --- lifecycle ---
    def start(self, batch: int) -> SharedBuffers:
        c = self.config
        shape = (batch, c.kv_heads, c.capacity, padded(c))
        return SharedBuffers([self.value(np.zeros(shape, self.dtype)) for _ in range(2 * c.layers)], batch)

    def length(self, cache: SharedBuffers) -> list[int]:
        return [cache.length] * cache.batch

    def contents(self, cache: SharedBuffers) -> list[list[tuple[Array, Array]]]:
        held = [x.numpy()[:, :, : cache.length, : self.config.head_dim].astype(np.float32) for x in cache.buffers]
        return [
            [(keys[row], values[row]) for row in range(cache.batch)]
            for keys, values in zip(held[::2], held[1::2], strict=True)
        ]

    def poison(self, cache: SharedBuffers, keys: float | None, values: float | None) -> None:
        for number, buffers in ((keys, cache.buffers[::2]), (values, cache.buffers[1::2])):
            if number is not None:
                for buffer in buffers:
                    held = buffer.numpy().copy()
                    held[:, :, cache.length :] = number
                    buffer.update_inplace(held)

    def truncate(self, cache: SharedBuffers, length: int) -> SharedBuffers:
        check_length(length, cache.length)
        cache.length = length
        return cache

    def fork(self, cache: SharedBuffers) -> SharedBuffers:
        return SharedBuffers([self.value(x.numpy().copy()) for x in cache.buffers], cache.batch, cache.length)

    def reorder(self, cache: SharedBuffers, rows: list[int]) -> SharedBuffers:
        check_rows(rows, cache.batch)
        return SharedBuffers([self.value(x.numpy()[rows]) for x in cache.buffers], len(rows), cache.length)

    def reset(self, cache: SharedBuffers) -> SharedBuffers:
        cache.length = 0
        return cache

    # --- arithmetic ---
    def step(self, cache: SharedBuffers, *inputs: Array, last_only: bool = False) -> tuple[Array, SharedBuffers]:
        t = check_inputs(self.config, cache.batch, inputs)
        past = cache.length
        if past + t > self.config.capacity:
            raise ValueError(f"{past} + {t} tokens exceed the capacity of {self.config.capacity}")
        if past and t > 1 and cache.batch > 1:  # after a past, the operator takes several tokens only for a single row
            axis = 1 if self.config.profile == "decoder" else 2
            ones = [[x.take([column], axis) for x in inputs] for column in range(t)]
            made = [self.append(cache, one, past + column, False) for column, one in enumerate(ones)]
            output = made[-1] if last_only else np.concatenate(made, axis)
        else:
            output = self.append(cache, inputs, past, last_only)
        cache.length = past + t  # last: a step that raises must not change the length
        return output, cache

    def append(self, cache: SharedBuffers, inputs: Sequence[Array], past: int, last: bool) -> Array:
        """The output of new tokens, whose keys and values are written to the slots from ``past`` on."""
        c, x = self.config, inputs[0]
        t = x.shape[1] if c.profile == "decoder" else x.shape[2]
        if not x.size:  # the operator divides by zero without rows or tokens
            return np.zeros((*x.shape, c.vocabulary) if c.profile == "decoder" else x.shape, np.float32)
        s = past + t
        feeds = {"seqlens_k": np.full(cache.batch, s - 1, np.int32), "total_sequence_length": np.array([s], np.int32)}
        if c.positions == "alibi":
            feeds["attention_bias"] = bias(c, past, t).astype(self.dtype)
        if c.profile == "attention":
            feeds["query_key_value"] = self.side_by_side(inputs)
        else:
            feeds["input_ids"] = x.astype(np.int64, copy=False)
            feeds["logit_positions"] = np.arange(t - 1 if last else 0, t)
            if c.positions in ("rope", "learned"):
                feeds["position_ids"] = np.broadcast_to(np.arange(past, s), (cache.batch, t))
        session = self.session(cached=True, masked=False)
        if cache.bound is None or cache.bound.session is not session:
            cache.bound = CacheBinding(session, cache.buffers, self)
        output = self.array(cache.bound.run(feeds))
        self.seen_on = self.device  # otherwise the run raises
        if c.profile == "decoder":
            return output
        heads: Array = output.reshape(cache.batch, t, c.heads, padded(c))[..., : c.head_dim].transpose(0, 2, 1, 3)
        return heads

    def side_by_side(self, inputs: Sequence[Array]) -> Array:
        """Queries, keys and values ``(b, heads, t, d)`` as padded rows ``(b, t, (h + 2 g) * d)``. The operator reads a
        scale of 0 as none given: the scale's sign is a factor of the queries."""
        sign = np.float32(positive_scale(self.config)[0])
        heads = np.concatenate([inputs[0] * sign, *inputs[1:]], axis=1).astype(self.dtype, copy=False)
        heads = heads.transpose(0, 2, 1, 3)
        wide = np.pad(heads, [(0, 0)] * 3 + [(0, padded(self.config) - self.config.head_dim)])
        return wide.reshape(*wide.shape[:2], -1)

    # --- graphs ---
    def masked(self) -> bool:
        """The operator supports window, softcap and sink; ALiBi's bias is not a mask."""
        return False

    def attention_model(self, cached: bool, masked: bool) -> bytes:
        return shared_graphs.attention_model(self.config) if cached else super().attention_model(cached, masked)

    def decoder_model(self, cached: bool) -> bytes:
        if not cached:
            return super().decoder_model(cached)
        return shared_graphs.decoder_model(self.config, self.weights)

    def try_out(self) -> None:
        _, cache = self.step(self.start(1), *self.probe(2))
        for t in (2, 1):
            self.step(cache, *self.probe(t))
        self.uncached_forward(*self.probe(2))
