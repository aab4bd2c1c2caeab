"""``eager`` and ``eager-static``: PyTorch's scaled dot-product attention over the two usual caches.

``eager`` grows tuples of past keys and values by concatenation, ``eager-static`` writes into a buffer of fixed size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention import SDPBackend

from kvconform.backend import Unavailable
from kvconform_backends.torch_decoder import DTYPES, Attend, Decoder, attention, visible
from kvconform_specs.claims import Claims
from kvconform_specs.config import Config

Array = NDArray[Any]

CLAIMS = Claims(
    profiles=("attention", "decoder"),
    abilities=("full", "length", "truncate", "fork", "reorder", "reset"),
    dtypes=("float32", "bfloat16", "float16"),
    devices=("cpu", "cuda"),
    overflow="refused",
)


class Torch:
    """What both caches share: numpy to torch and back, the forward without a cache, and the witness."""

    claims = CLAIMS

    def __init__(self, config: Config, weights: Mapping[str, NDArray[np.float32]], device: str = "cpu") -> None:
        if device == "cuda" and not torch.cuda.is_available():
            raise Unavailable(f"torch {torch.__version__} finds no CUDA device on this machine")
        torch.set_float32_matmul_precision("highest")  # float32 means float32: no TF32, no bf16x3 passes
        if device == "cuda":
            torch.backends.cudnn.allow_tf32 = False
            torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
            torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        self.config, self.device, self.dtype = config, device, DTYPES[config.dtype]
        self.decoder = Decoder(config, weights, device).eval() if config.profile == "decoder" else None
        self.places = torch.arange(config.capacity, device=device)
        self.seen_on: str | None = None  # the device of the last output

    def full(self, *inputs: Array) -> Array:
        t = inputs[0].shape[-1 if self.decoder else -2]
        places = self.places[:t]
        mask = visible(places, places, self.config.window)  # (t, t)
        return self.run(inputs, places, lambda _layer, q, k, v: attention(self.config, q, k, v, mask))

    @torch.inference_mode()
    def run(self, inputs: tuple[Array, ...], positions: Tensor, attend: Attend) -> Array:
        """The new tokens' output, whose attention goes through ``attend``: layer 0 alone, or the decoder's layers."""
        if self.decoder is None:
            query, key, value = (self.tensor(x) for x in inputs)
            return self.array(attend(0, query, key, value))
        return self.array(self.decoder(self.tensor(inputs[0]), positions, attend))

    def tensor(self, x: Array) -> Tensor:
        """Without a copy where torch can share the memory; nothing below keeps or writes it."""
        shared = torch.from_numpy(x if x.flags.writeable else x.copy())  # torch warns of memory it must not write
        return shared.to(self.device, self.dtype if shared.is_floating_point() else None)

    def array(self, x: Tensor) -> Array:
        self.seen_on = x.device.type
        widened: Array = x.float().cpu().numpy()
        return widened

    def admit(self, inputs: tuple[Array, ...], batch: int, length: int) -> int:
        """How many tokens come. Raises ValueError where the rows differ or the capacity is exceeded."""
        t = int(inputs[-1].shape[-2 if len(inputs) == 3 else -1])
        if inputs[-1].shape[0] != batch:
            raise ValueError(f"{inputs[-1].shape[0]} rows for a cache of {batch}")
        if length + t > self.config.capacity:
            raise ValueError(f"{length} + {t} tokens exceed the capacity of {self.config.capacity}")
        return t

    def witness(self) -> dict[str, Any]:
        c = self.config
        query = torch.zeros(1, c.heads, 2, c.head_dim, dtype=self.dtype, device=self.device)
        keys = torch.zeros(1, c.kv_heads, 2, c.head_dim, dtype=self.dtype, device=self.device)
        mask = visible(self.places[:2], self.places[:2], None)
        choice = torch._fused_sdp_choice(query, keys, keys, mask, enable_gqa=c.group > 1)
        return {
            "torch": torch.__version__,
            "device": self.seen_on,
            "threads": torch.get_num_threads(),
            "sdpa": "not used: softcap" if c.softcap is not None else SDPBackend(choice).name,
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
        }


Past = tuple[tuple[Tensor, Tensor], ...]
"""For each layer the keys and values so far, ``(b, g, s, d)`` each."""


class Eager(Torch):
    """Past tuples: every step concatenates and returns new ones, none is ever written again."""

    def start(self, batch: int) -> Past:
        c = self.config
        empty = torch.zeros(batch, c.kv_heads, 0, c.head_dim, dtype=self.dtype, device=self.device)
        return ((empty, empty),) * c.layers

    def step(self, cache: Past, *inputs: Array) -> tuple[Array, Past]:
        batch, _, past, _ = cache[0][0].shape
        s = past + self.admit(inputs, batch, past)
        positions = self.places[past:s]
        mask = self.mask(positions, s)
        grown: list[tuple[Tensor, Tensor]] = []

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            keys = torch.cat((cache[layer][0], key), dim=2)  # (b, g, s, d)
            values = torch.cat((cache[layer][1], value), dim=2)
            grown.append((keys, values))
            return attention(self.config, query, keys, values, mask)

        output = self.run(inputs, positions, attend)
        return output, tuple(grown)

    def mask(self, positions: Tensor, s: int) -> Tensor | None:
        """Never ``is_causal``: torch aligns it top-left, so that on a cache a chunk would see its own future."""
        if len(positions) == 1 and self.config.window is None:
            return None  # the newest token sees all there is
        return visible(positions, self.places[:s], self.config.window)

    def length(self, cache: Past) -> list[int]:
        batch, _, s, _ = cache[0][0].shape
        return [s] * batch

    def truncate(self, cache: Past, length: int) -> Past:
        s = cache[0][0].shape[2]
        if not 0 <= length <= s:
            raise ValueError(f"cannot keep {length} of {s} tokens")
        return tuple((k[:, :, :length], v[:, :, :length]) for k, v in cache)

    def fork(self, cache: Past) -> Past:
        return cache

    def reorder(self, cache: Past, rows: list[int]) -> Past:
        return tuple((k[rows], v[rows]) for k, v in cache)

    def reset(self, cache: Past) -> Past:
        return self.start(cache[0][0].shape[0])


@dataclass
class Buffers:
    """A static cache: keys and values of every layer, ``(b, g, capacity, d)`` each, of which ``length`` is written."""

    keys: list[Tensor]
    values: list[Tensor]
    length: int = 0

    @property
    def batch(self) -> int:
        return self.keys[0].shape[0]


class EagerStatic(Torch):
    """A buffer of ``capacity`` slots, written in place. The mask hides what slots past the length hold."""

    def start(self, batch: int) -> Buffers:
        c = self.config
        shape = (batch, c.kv_heads, c.capacity, c.head_dim)
        # zeros, not empty: a masked slot weighs 0, and 0 * NaN of uninitialised memory is NaN
        made = [torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in range(2 * c.layers)]
        return Buffers(made[::2], made[1::2])

    def step(self, cache: Buffers, *inputs: Array) -> tuple[Array, Buffers]:
        past = cache.length
        s = past + self.admit(inputs, cache.batch, past)
        positions = self.places[past:s]
        mask = visible(positions, self.places, self.config.window)  # (t, capacity): the unwritten tail is future

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            keys, values = cache.keys[layer], cache.values[layer]
            keys[:, :, past:s] = key
            values[:, :, past:s] = value
            return attention(self.config, query, keys, values, mask)

        output = self.run(inputs, positions, attend)
        cache.length = s  # only now: a step that raised has added nothing
        return output, cache

    def length(self, cache: Buffers) -> list[int]:
        return [cache.length] * cache.batch

    def truncate(self, cache: Buffers, length: int) -> Buffers:
        if not 0 <= length <= cache.length:
            raise ValueError(f"cannot keep {length} of {cache.length} tokens")
        cache.length = length
        return cache

    def fork(self, cache: Buffers) -> Buffers:
        return Buffers([k.clone() for k in cache.keys], [v.clone() for v in cache.values], cache.length)

    def reorder(self, cache: Buffers, rows: list[int]) -> Buffers:
        cache.keys = [k[rows] for k in cache.keys]
        cache.values = [v[rows] for v in cache.values]
        return cache

    def reset(self, cache: Buffers) -> Buffers:
        cache.length = 0
        return cache
