"""``eager`` and ``eager-static``: PyTorch's scaled dot-product attention over the two common cache designs.

``eager`` grows tuples of past keys and values by concatenation; ``eager-static`` writes into fixed-size buffers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from kvconform.backend import Backend, CacheDesign
from kvconform.errors import Unavailable
from kvconform_backends.abilities import BASIC
from kvconform_backends.greedy import greedy
from kvconform_backends.rotary import lacking
from kvconform_backends.torch import device_time
from kvconform_backends.torch.counting import Counted
from kvconform_backends.torch.decoder import DTYPES, Attend, Decoder, LayerMask, LayerMasks, Positions, attend_to
from kvconform_backends.validation import check_counts, check_inputs, check_length, check_rows
from kvconform_specs.claims import Claims
from kvconform_specs.config import Config

Array = NDArray[Any]
Index = tuple[Any, ...]

COMMON = Claims(
    profiles=("attention", "decoder"),
    abilities=(*BASIC, "truncate", "mask", "bytes", "macs", "generate", "last_only"),
    dtypes=tuple(DTYPES),
    devices=("cpu", "cuda"),
    overflow="refused",
)


class Torch(Counted, Backend):
    """Base class of the torch backends: conversion between numpy and torch, the uncached forward, and runtime_info."""

    claims = COMMON
    family: type[Decoder] = Decoder
    designs: tuple[str, ...] = ()  # see ``rotary.lacking``
    context = 0  # that of this call's sequence

    @classmethod
    def refuses(cls, config: Config, device: str) -> str | None:
        return lacking(config, *cls.designs)

    def __init__(self, config: Config, weights: Mapping[str, NDArray[np.float32]], device: str = "cpu") -> None:
        if device == "cuda" and not torch.cuda.is_available():
            raise Unavailable(f"torch {torch.__version__} finds no CUDA device on this machine")
        torch.set_float32_matmul_precision("highest")  # float32 without TF32 or bf16x3 passes
        if device == "cuda":
            torch.backends.cudnn.allow_tf32 = False
            torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
            torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        self.config, self.device, self.dtype = config, device, DTYPES[config.dtype]
        self.decoder = self.family(config, weights, device).eval() if config.profile == "decoder" else None
        self.layer_masks = LayerMasks(config, device)
        self.seen_on: str | None = None  # the device of the last output
        self.counted = 0  # multiply-adds of the last count_macs step
        self.device_time = device_time.DeviceTime(device, self)
        self.allocator = device_time.Allocator()

    def uncached_forward(self, *inputs: Array, last_only: bool = False) -> Array:
        t = self.admit(inputs, None, 0)
        layer_masks = self.layer_masks.of(slice(0, t), t)
        held: dict[int, tuple[Tensor, Tensor]] = {}  # keys and values by layer

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            source = self.config.source_of(layer)
            held.setdefault(source, (key, value))
            return self.on_all(layer_masks[layer], query, *held[source], slice(0, t))

        return self.run(inputs, slice(0, t), attend, last_only=last_only)

    def on_all(self, seen: LayerMask, query: Tensor, keys: Tensor, values: Tensor, positions: Positions) -> Tensor:
        """Attention on the visible part of all keys and values. Keys whose angles change with the length are cached
        unrotated."""
        if self.config.changes_at:
            assert self.decoder is not None
            query, keys = self.decoder.turn_all(query, keys, positions)
        return attend_to(self.config, seen, query, keys, values)

    def generate(self, tokens: Array, new: int, **options: Any) -> Array:
        return greedy(self, tokens, new, **options)

    def admit(self, inputs: tuple[Array, ...], batch: int | None, length: int) -> int:
        """The number of new tokens. Raises TypeError or ValueError if inputs are malformed or exceed the capacity."""
        t = check_inputs(self.config, batch, inputs)
        self.check_room(length, t)
        return t

    def check_room(self, length: int, t: int) -> None:
        if length + t > self.config.capacity:
            raise ValueError(f"{length} + {t} tokens exceed the capacity of {self.config.capacity}")

    @torch.inference_mode()
    def run(
        self,
        inputs: tuple[Array, ...],
        positions: Positions,
        attend: Attend,
        count_macs: bool = False,
        last_only: bool = False,
    ) -> Array:
        """The output of the new tokens, or of the last one only; attention goes through ``attend``. Attention profile:
        layer 0 only."""
        with self.meter() if count_macs else nullcontext():
            if self.decoder is None:
                query, key, value = (self.tensor(x) for x in inputs)
                output = attend(0, query, key, value)
            else:
                output = self.decoder(self.tensor(inputs[0]), positions, attend, last_only, self.context)
        return self.array(output)

    @contextmanager
    def meter(self) -> Iterator[None]:
        """Counts the multiply-adds of every matrix product (2 * m * n * k FLOPs are m * n * k multiply-adds).

        torch's counter reports 0 FLOPs for the fused CPU attention kernel. A step with ``count_macs`` therefore uses
        SDPA's math backend: two plain matrix products that read the same keys.
        """
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            yield
        self.counted = counter.get_total_flops() // 2

    def macs(self) -> int:
        return self.counted

    def free_slots(self, cache: Any) -> list[int]:
        return [self.config.capacity - length for length in self.length(cache)]

    def synchronise(self) -> None:
        device_time.synchronise(self.device)

    def device_ns(self, call: Callable[[int], object], steps: int) -> int | None:
        return self.device_time.ns(call, steps)

    def allocated(self) -> int | None:
        return self.allocator.grown() if self.device == "cuda" else None

    def tensor(self, x: Array) -> Tensor:
        """Shares the array's memory if possible; it is neither kept nor modified."""
        shared = torch.from_numpy(x if x.flags.writeable else x.copy())  # torch warns about read-only memory
        return shared.to(self.device, self.dtype if shared.is_floating_point() else torch.int64)

    def array(self, x: Tensor) -> Array:
        self.seen_on = x.device.type
        widened: Array = x.float().cpu().numpy()
        return widened

    def seen(self, mask: Array | None, batch: int, s: int) -> Tensor | None:
        """The caller's mask ``(b, s)``. Raises ValueError for a wrong shape, TypeError for a wrong dtype."""
        if mask is None:
            return None
        if mask.dtype != np.bool_:
            raise TypeError(f"the mask is {mask.dtype}, expected bool")
        if mask.shape != (batch, s):
            raise ValueError(f"the mask has shape {mask.shape}, expected {(batch, s)}: rows, cached and new tokens")
        return torch.from_numpy(mask.copy()).to(self.device)

    def runtime_info(self) -> dict[str, Any]:
        c = self.config
        query = torch.zeros(1, c.heads, 2, c.head_dim, dtype=self.dtype, device=self.device)
        keys = torch.zeros(1, c.kv_heads, 2, c.head_dim, dtype=self.dtype, device=self.device)
        mask = torch.ones(2, 2, dtype=torch.bool, device=self.device).tril()
        choice = torch._fused_sdp_choice(query, keys, keys, mask, enable_gqa=c.group > 1)
        unfit = [name for name in ("softcap", "sink") if getattr(c, name) is not None]
        return {
            "torch": torch.__version__,
            "device": self.seen_on,
            "threads": torch.get_num_threads(),
            "sdpa": f"not used: {' and '.join(unfit)}" if unfit else SDPBackend(choice).name,
            "precision": device_time.precision(self.dtype, self.device),
            "device_time": self.device_time.methods,
        }


Past = tuple[tuple[Tensor, Tensor], ...]
"""For each layer the keys and values so far, ``(b, g, s, d)`` each."""


class Eager(Torch):
    """Past tuples: every step concatenates and returns new ones; none is modified."""

    cache_design = "concatenation"
    designs: tuple[str, ...] = ("rotary", "kv_source")
    claims = replace(COMMON, abilities=(*COMMON.abilities, "immutable", "contexts"), memory="length")

    def start(self, batch: int) -> Past:
        c = self.config
        empty = torch.zeros(batch, c.kv_heads, 0, c.head_dim, dtype=self.dtype, device=self.device)
        return ((empty, empty),) * len(c.caching)

    def uncached_forward(self, *inputs: Array, last_only: bool = False, context: int = 0) -> Array:
        self.context = context
        return super().uncached_forward(*inputs, last_only=last_only)

    def step(
        self,
        cache: Past,
        *inputs: Array,
        mask: Array | None = None,
        count_macs: bool = False,
        last_only: bool = False,
        context: int = 0,
    ) -> tuple[Array, Past]:
        self.context = context
        batch, _, past, _ = cache[0][0].shape
        s = past + self.admit(inputs, batch, past)
        layer_masks = self.layer_masks.of(slice(past, s), s, self.seen(mask, batch, s))
        grown: list[tuple[Tensor, Tensor]] = []
        places = {layer: place for place, layer in enumerate(self.config.caching)}

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            place = places[self.config.source_of(layer)]
            if layer in places:
                past_keys, past_values = cache[place]
                grown.append((torch.cat((past_keys, key), dim=2), torch.cat((past_values, value), dim=2)))
            return self.on_all(layer_masks[layer], query, *grown[place], slice(past, s))  # (b, g, s, d) each

        output = self.run(inputs, slice(past, s), attend, count_macs, last_only)
        return output, tuple(grown)

    def length(self, cache: Past) -> list[int]:
        batch, _, s, _ = cache[0][0].shape
        return [s] * batch

    def contents(self, cache: Past) -> list[list[tuple[Array, Array]]]:
        return [[(copied(k), copied(v)) for k, v in zip(*layer, strict=True)] for layer in cache]

    def bytes(self, cache: Past) -> int:
        return sum(x.untyped_storage().nbytes() for layer in cache for x in layer)

    def truncate(self, cache: Past, length: int) -> Past:
        s = cache[0][0].shape[2]
        check_length(length, s)
        # a copy: a view would keep the memory of dropped tokens alive
        return tuple((k[:, :, :length].clone(), v[:, :, :length].clone()) for k, v in cache)

    def fork(self, cache: Past) -> Past:
        return cache

    def reorder(self, cache: Past, rows: list[int]) -> Past:
        check_rows(rows, cache[0][0].shape[0])
        return tuple((k[rows], v[rows]) for k, v in cache)

    def reset(self, cache: Past) -> Past:
        return self.start(cache[0][0].shape[0])


@dataclass
class StaticBuffers:
    """A static cache: keys and values of every layer, ``(b, g, capacity, d)`` each, and each row's length."""

    keys: list[Tensor]
    values: list[Tensor]
    lengths: list[int]

    @property
    def batch(self) -> int:
        return len(self.lengths)


class EagerStatic(Torch):
    """Buffers of ``capacity`` slots, written in place. A step attends to a view of the filled slots."""

    cache_design: CacheDesign | None = "in-place"
    designs: tuple[str, ...] = ("rotary", "kv_source")
    claims = replace(
        COMMON, abilities=(*COMMON.abilities, "ragged", "poison"), padding=("right", "left"), memory="capacity"
    )

    def start(self, batch: int) -> StaticBuffers:
        c = self.config
        shape = (batch, c.kv_heads, c.capacity, c.head_dim)
        # zeros, not empty: ragged rows are read up to the longest, and 0 * NaN from uninitialised memory is NaN
        made = [torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in range(2 * len(c.caching))]
        return StaticBuffers(made[::2], made[1::2], [0] * batch)

    def step(
        self,
        cache: StaticBuffers,
        *inputs: Array,
        counts: Array | None = None,
        padding: str = "right",
        mask: Array | None = None,
        count_macs: bool = False,
        last_only: bool = False,
    ) -> tuple[Array, StaticBuffers]:
        t = check_inputs(self.config, cache.batch, inputs)
        added = [t] * cache.batch if counts is None else check_counts(counts, cache.batch, t)
        lengths = [length + count for length, count in zip(cache.lengths, added, strict=True)]
        for length, count in zip(cache.lengths, added, strict=True):
            self.check_room(length, count)
        s = max(lengths)
        positions, slots, columns = self.place(cache.lengths, added, t, padding)
        layer_masks = self.layer_masks.of(positions, s, self.seen(mask, cache.batch, s))

        places = {layer: place for place, layer in enumerate(self.config.caching)}

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            place = places[self.config.source_of(layer)]
            keys, values = cache.keys[place], cache.values[place]
            if layer in places:
                keys[slots] = key[columns]
                values[slots] = value[columns]
            return self.on_all(layer_masks[layer], query, keys, values, positions)

        output = self.run(inputs, positions, attend, count_macs, last_only)
        cache.lengths = lengths  # last: a step that raises must not change the length
        return output, cache

    def place(self, lengths: list[int], added: list[int], t: int, padding: str) -> tuple[Positions, Index, Index]:
        """Positions of the step's columns, the slots to write, and the columns written to them.

        Positions are a slice if all rows have the same length and grow equally, else ``(b, t)``, 0 for padding.
        """
        every, past = slice(None), lengths[0]
        if len(set(lengths)) == 1 and min(added) == t:
            new = slice(past, past + t)
            return new, (every, every, new), (every,)
        old, count = torch.tensor([lengths, added], device=self.device)[:, :, None]  # (b, 1) each
        # the index of each column among its row's new tokens, (b, t)
        number = torch.arange(t, device=self.device) - (t - count if padding == "left" else 0)
        held = (number >= 0) & (number < count)
        positions = torch.where(held, old + number, 0)
        row, column = held.nonzero(as_tuple=True)
        return positions, (row, every, positions[row, column]), (row, every, column)

    def length(self, cache: StaticBuffers) -> list[int]:
        return list(cache.lengths)

    def contents(self, cache: StaticBuffers) -> list[list[tuple[Array, Array]]]:
        return [
            [(copied(k[row, :, :s]), copied(v[row, :, :s])) for row, s in enumerate(cache.lengths)]
            for k, v in zip(cache.keys, cache.values, strict=True)
        ]

    def poison(self, cache: StaticBuffers, keys: float | None, values: float | None) -> None:
        for number, buffers in ((keys, cache.keys), (values, cache.values)):
            if number is not None:
                for buffer in buffers:
                    for row, length in enumerate(cache.lengths):
                        buffer[row, :, length:] = number

    def bytes(self, cache: StaticBuffers) -> int:
        return sum(x.untyped_storage().nbytes() for x in (*cache.keys, *cache.values))

    def truncate(self, cache: StaticBuffers, length: int) -> StaticBuffers:
        check_length(length, min(cache.lengths))
        cache.lengths = [length] * cache.batch
        return cache

    def fork(self, cache: StaticBuffers) -> StaticBuffers:
        return StaticBuffers([k.clone() for k in cache.keys], [v.clone() for v in cache.values], list(cache.lengths))

    def reorder(self, cache: StaticBuffers, rows: list[int]) -> StaticBuffers:
        check_rows(rows, cache.batch)
        cache.keys = [k[rows] for k in cache.keys]
        cache.values = [v[rows] for v in cache.values]
        cache.lengths = [cache.lengths[row] for row in rows]
        return cache

    def reset(self, cache: StaticBuffers) -> StaticBuffers:
        cache.lengths = [0] * cache.batch
        return cache


def copied(x: Tensor) -> Array:
    """A float32 copy."""
    made: Array = x.to("cpu", torch.float32, copy=True).numpy()
    return made
