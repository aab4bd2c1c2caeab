"""The rotary factors of the backends, written as in transformers' ``modeling_rope_utils``: by wavelengths."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvconform_specs.config import Config

Array = NDArray[Any]


def inverse_frequencies(config: Config, d: int, total: int) -> Array:
    """``(d / 2,)``: the angle of each pair for one position, with ``total`` tokens in the context."""
    scaling, exponents = config.rotary, np.arange(0, d, 2) / d
    inverse: Array = 1.0 / 10000.0**exponents
    if scaling is None:
        return inverse
    match scaling.kind:
        case "linear":
            return np.asarray(inverse / scaling.factor)
        case "ntk":
            return np.asarray(1.0 / (10000.0 * scaling.factor ** (d / (d - 2))) ** exponents)
        case "dynamic":
            seen = max(total, scaling.original)
            growth = scaling.factor * seen / scaling.original - (scaling.factor - 1)
            return np.asarray(1.0 / (10000.0 * growth ** (d / (d - 2))) ** exponents)
        case "longrope":
            return np.asarray(inverse / np.array(scaling.short if total <= scaling.original else scaling.long))
    low, high = (
        d * math.log(scaling.original / (rotations * 2 * math.pi)) / (2 * math.log(10000.0))
        for rotations in (scaling.beta_fast, scaling.beta_slow)
    )
    low, high = max(math.floor(low), 0), min(math.ceil(high), d - 1)
    ramp = np.clip((np.arange(d // 2) - low) / (high - low or 0.001), 0.0, 1.0)
    return inverse / scaling.factor * ramp + inverse * (1.0 - ramp)


def attention_factor(config: Config) -> float:
    """What cosines and sines are multiplied by."""
    scaling = config.rotary
    if scaling is not None and scaling.kind == "yarn":
        return 0.1 * math.log(scaling.factor) + 1.0
    if scaling is not None and scaling.kind == "longrope":
        return math.sqrt(1.0 + math.log(scaling.factor) / math.log(scaling.original))
    return 1.0


def lacking(config: Config, *designs: str) -> str | None:
    """Why a cache that has only these designs (``rotary``, ``kv_source``, ``latent``) cannot run a config, or None."""
    if config.changes_at and "rotary" not in designs:
        return "it caches rotated keys, and the config's rotary factors change with the number of tokens"
    if config.kv_source and "kv_source" not in designs:
        return "each of its layers has keys and values of its own"
    if config.latent and "latent" not in designs:
        return "its layers keep keys and values, and not a latent"
    return None
