"""The decoder of ``examples/hybrid.py``, with a mistake in each of the parts that the definition does not express."""

# mypy: ignore-errors
from __future__ import annotations

import importlib.util

from places import ROOT
from torch.nn import functional

spec = importlib.util.spec_from_file_location("hybrid", ROOT / "examples" / "hybrid.py")
hybrid = importlib.util.module_from_spec(spec)
spec.loader.exec_module(hybrid)

Right = hybrid.Decoder


class StateNotCarried(hybrid.Decoder):
    """The recurrent layer begins each chunk with an empty state; decode steps carry it."""

    def forward(self, input_ids, cache=None):
        if cache is not None and input_ids.shape[1] > 1:
            cache = {**cache, "state": cache["state"] * 0}
        return super().forward(input_ids, cache)


class KeysNormalisedTwice(hybrid.Decoder):
    """Cached keys are normalised along the wrong axis when they come back."""

    def forward(self, input_ids, cache=None):
        if cache is not None and cache["keys"].shape[2] > 1:
            cache = {**cache, "keys": functional.normalize(cache["keys"], dim=2)}
        return super().forward(input_ids, cache)
