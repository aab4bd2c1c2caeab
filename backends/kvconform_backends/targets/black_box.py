"""What black boxes in torch share: numpy to torch and back, and weights that are perturbed by noise."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

Array = NDArray[Any]


def perturbed(module: nn.Module, storage: float, accumulation: float, seed: int) -> nn.Module:
    """A copy whose floating-point weights are perturbed (``kvconform.backend.BlackBox.perturbed``).

    Weights that two names share stay shared. Buffers (tables of angles, masks, caches) stay as they are.
    """
    copied = copy.deepcopy(module)
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in copied.parameters():
            if weight.is_floating_point():
                terms = weight.shape[-1] if weight.ndim > 1 else 1
                size = storage + accumulation * math.sqrt(terms)
                xi = torch.rand(weight.shape, generator=noise).to(weight.device) * 2 - 1
                # in 64 bits: the disturbance of a float32 weight is a few of its own last places
                weight.copy_(weight.double() * (1 + size * xi.double()))
    return copied


def disturbed_states(states: Array, storage: float, accumulation: float, seed: int) -> Array:
    """The same for hidden states ``(b, t, width)``, which are a black box's inputs. The noise of a token is the same
    wherever it stands in the batch, as that of weights is."""
    size = storage + accumulation * math.sqrt(states.shape[-1])
    xi = np.random.Generator(np.random.Philox(key=seed)).uniform(-1, 1, states.shape[1:])
    return np.asarray(states * (1 + size * xi), states.dtype)


def widened(x: Tensor) -> Array:
    """Floats as float32 that are nobody else's memory."""
    made: Array = x.detach().to("cpu", torch.float32, copy=True).numpy()
    return made
