"""Shared by black boxes in torch: conversion to numpy, and perturbed weights and states."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kvconform.host import free_memory

Array = NDArray[Any]
Noise = tuple[float, float, int]
"""Storage, accumulation and seed of ``kvconform.backend.BlackBox.perturbed``."""
BLOCK = 1 << 20
"""Weights that are perturbed at once: in float64 they take many times their own memory."""
COPIES, PART = 1 << 30, 4
"""Bytes that all perturbed copies of one module may take together in any case, and the part of the free memory that
they may take where that is more: on a large model, making a copy again takes ten times as long as running it."""


def perturbed(module: nn.Module, storage: float, accumulation: float, seed: int) -> nn.Module:
    """A copy with perturbed floating-point weights (``kvconform.backend.BlackBox.perturbed``).

    Weights shared under two names stay shared. Buffers (tables of angles, masks, caches) are not perturbed.
    """
    return perturb(copy.deepcopy(module), storage, accumulation, seed)


def perturb(copied: nn.Module, storage: float, accumulation: float, seed: int) -> nn.Module:
    """Perturbs the weights of a module in place, as ``perturbed`` does those of a copy."""
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in copied.parameters():
            if weight.is_floating_point():
                terms = weight.shape[-1] if weight.ndim > 1 else 1
                size = storage + accumulation * math.sqrt(terms)
                whole: Any = weight.view(-1)
                for part in whole.split(BLOCK) if weight.is_contiguous() else (weight,):
                    xi = torch.rand(part.shape, generator=noise).to(weight.device) * 2 - 1
                    # in float64: the perturbation of a float32 weight is a few units in its last place
                    part.copy_(part.double() * (1 + size * xi.double()))
    return copied


def room() -> int:
    """Bytes for the perturbed copies of one module."""
    return max(COPIES, (free_memory() or 0) // PART)


class Perturbed:
    """Perturbed copies of a module: at most as many as ``room`` holds, and at least one. Beyond that, the newest one
    makes way: runs that ask for all of them in turn find the older ones."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        size = sum(weight.numel() * weight.element_size() for weight in module.parameters())
        self._most = max(1, room() // max(size, 1))
        self._held: dict[Noise, nn.Module] = {}

    def of(self, noise: Noise) -> nn.Module:
        if noise in self._held:
            return self._held[noise]
        if len(self._held) < self._most:
            made = copy.deepcopy(self._module)
        else:
            _, made = self._held.popitem()
            with torch.no_grad():
                for weight, original in zip(made.parameters(), self._module.parameters(), strict=True):
                    weight.copy_(original)
        self._held[noise] = perturb(made, *noise)
        return made


def perturbed_states(states: Array, storage: float, accumulation: float, seed: int) -> Array:
    """The same for hidden states ``(b, t, width)``, the inputs of a black box. Like that of weights, the noise of a
    token does not depend on its row."""
    size = storage + accumulation * math.sqrt(states.shape[-1])
    xi = np.random.Generator(np.random.Philox(key=seed)).uniform(-1, 1, states.shape[1:])
    return np.asarray(states * (1 + size * xi), states.dtype)


def widened(x: Tensor) -> Array:
    """A float32 copy."""
    made: Array = x.detach().to("cpu", torch.float32, copy=True).numpy()
    return made
