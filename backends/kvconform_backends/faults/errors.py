"""Faults of refusals: malformed calls that are accepted, and refused calls that leave a trace."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvconform_backends.faults.configs import DECODERS
from kvconform_backends.faults.planted import Planted
from kvconform_backends.numpy.cache import Array, Cache
from kvconform_backends.numpy.static import Buffers, NumpyStatic

MALFORMED = "errors.malformed"
UNCHANGED = "errors.unchanged"
TRUNCATE_RANGE = "lifecycle.truncate-range"


# --- malformed ---
class AxisGuessed(Planted, breaks=(MALFORMED,), kind="H2", bug="ByteDance-Seed/VeOmni/pull/162"):
    """Inputs that lack the batch axis are broadcast to all rows."""

    def step(self, cache: Cache, *inputs: Array, **options: Any) -> tuple[Array, Cache]:
        axes = 2 if self.config.profile == "decoder" else 4
        if inputs[0].ndim == axes - 1:
            self.faulty += 1
            inputs = tuple(np.broadcast_to(x, (len(cache.lengths), *x.shape)) for x in inputs)
        return super().step(cache, *inputs, **options)


class SurplusHeadsCut(
    Planted, breaks=(MALFORMED,), kind="H1", bug="facebookresearch/lingua/issues/44", conditional=True
):
    """KV heads beyond those of the config are silently dropped."""

    def step(self, cache: Cache, *inputs: Array, **options: Any) -> tuple[Array, Cache]:
        if self.config.profile == "attention" and inputs[1].ndim == 4 and inputs[1].shape[1] > self.config.kv_heads:
            self.faulty += 1
            inputs = (inputs[0], *(x[:, : self.config.kv_heads] for x in inputs[1:]))
        return super().step(cache, *inputs, **options)


# --- unchanged ---
class LengthBeforeCheck(Planted, NumpyStatic, breaks=(UNCHANGED,), kind="C12", bug="ggml-org/llama.cpp/pull/9525"):
    """The length is advanced before the inputs are checked, and not restored if they are refused."""

    def admit(
        self, cache: Any, inputs: tuple[Array, ...], counts: Array | None = None, mask: Array | None = None
    ) -> Array:
        try:
            return super().admit(cache, inputs, counts, mask)
        except (TypeError, ValueError):
            longer = np.minimum(cache.written + 1, self.config.capacity)
            cache.written = self.instead(longer, cache.written)
            raise


class UnknownTokenInLastLayer(
    Planted,
    breaks=(UNCHANGED,),
    kind="C12",
    bug="huggingface/transformers/issues/37078",
    conditional=True,
    configs=DECODERS,
):
    """If a token id is refused, the last layer has already stored a token: each layer advances separately."""

    def step(self, cache: Cache, *inputs: Array, **options: Any) -> tuple[Array, Cache]:
        try:
            return super().step(cache, *inputs, **options)
        except ValueError:
            if inputs[0].ndim == 2 and inputs[0].max() >= self.config.vocabulary and cache.length:
                self.faulty += 1
                for held in (cache.keys, cache.values):
                    held[-1] = np.concatenate([held[-1], held[-1][:, :, -1:]], axis=2)
            raise


class RefusedTruncateGrows(
    Planted,
    NumpyStatic,
    breaks=(UNCHANGED, TRUNCATE_RANGE),
    kind=("C12", "C8"),
    bug="ml-explore/mlx-lm/pull/1868",
    conditional=True,
):
    """Truncate sets the length before checking that the sequence is that long."""

    def truncate(self, cache: Any, length: int) -> Buffers:
        try:
            return super().truncate(cache, length)
        except ValueError:
            if isinstance(length, int) and 0 <= length <= self.config.capacity:
                cache.written = self.instead(np.full_like(cache.written, length), cache.written)
            raise


class NegativeTruncateSlices(
    Planted,
    breaks=(UNCHANGED, TRUNCATE_RANGE),
    kind="C8",
    bug="huggingface/transformers/issues/47433",
    conditional=True,
):
    """A negative length counts from the end, as in a Python slice."""

    def truncate(self, cache: Cache, length: int) -> Cache:
        if -cache.length <= length < 0:
            self.faulty += 1
            length += cache.length
        return super().truncate(cache, length)


class OneRowForAll(
    Planted, breaks=("errors.malformed",), kind="H4", bug="NVIDIA/TransformerEngine/pull/536", conditional=True
):
    """Inputs of one row are broadcast to all rows of the cache."""

    def step(self, cache: Cache, *inputs: Array, **options: Any) -> tuple[Array, Cache]:
        rows = len(cache.lengths)
        if all(x.shape[:1] == (1,) for x in inputs) and rows > 1:
            self.faulty += 1
            inputs = tuple(np.repeat(x, rows, axis=0) for x in inputs)
        return super().step(cache, *inputs, **options)
