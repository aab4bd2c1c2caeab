"""Shipped backends as black boxes, addressed as ``tests/support/wrapped_backends.py:eager``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from kvconform.worker.registry import installed, load
from kvconform_specs.claims import Claims
from kvconform_specs.config import Config
from kvconform_specs.configs import CONFIGS
from kvconform_specs.program import Program
from kvconform_specs.tensors import weights

Array = NDArray[Any]
DECODERS = {f"{name}-self": config for name, config in CONFIGS.items() if config.profile == "decoder"}


class Wrapped:
    """The backend of that name, but with its own weights."""

    name: ClassVar[str]
    kind: ClassVar[Any]
    claims: ClassVar[Claims]
    configs = DECODERS
    assumed: tuple[str, ...] = ()
    source = __file__
    recognised = "a shipped backend as a black box"

    def __init__(self, config: Config, given: Mapping[str, Array], device: str) -> None:
        assert not given
        self.config, self.device = config, device
        self.inner = self.kind(config, weights(config), device)

    @classmethod
    def refuses(cls, config: Config, device: str) -> str | None:
        refuses = getattr(cls.kind, "refuses", None)
        return None if refuses is None else refuses(config, device)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def uncached_forward(self, ids: Array, **asked: Any) -> Array:
        if hasattr(self.inner, "uncached_forward"):
            return np.asarray(self.inner.uncached_forward(ids, **asked))
        return np.asarray(self.inner.step(self.inner.start(len(ids)), ids, **asked)[0])

    def perturbed(self, storage: float, accumulation: float, seed: int) -> Any:
        drawn, held = np.random.default_rng(seed), {}
        for name, weight in weights(self.config).items():
            terms = weight.shape[0] if weight.ndim > 1 and name != "embed" else 1  # y = x @ w sums over rows
            size = storage + accumulation * math.sqrt(terms)
            held[name] = np.asarray(weight * (1 + size * drawn.uniform(-1, 1, weight.shape)), np.float32)
        other = object.__new__(type(self))
        other.config, other.device, other.inner = self.config, self.device, self.kind(self.config, held, self.device)
        return other

    def script_setup(self) -> str:
        raise NotImplementedError

    def script(self, program: Program, tag: str) -> str:
        raise NotImplementedError


def __getattr__(name: str) -> type[Wrapped]:
    """The wrapped backend of an installed name; ``numpy_paged`` is ``numpy-paged``."""
    if name.replace("_", "-") not in installed():
        raise AttributeError(name)  # introspection asks for other names
    kind = load(name.replace("_", "-"))
    own = replace(
        kind.claims,
        profiles=("decoder",),
        reference="self",
        dtypes=("float32",),
        abilities=tuple(dict.fromkeys(("uncached_forward", *kind.claims.abilities))),
    )
    return type(name, (Wrapped,), {"name": name, "kind": kind, "claims": own, "__module__": __name__})
