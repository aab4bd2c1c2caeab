"""The weights of the toy engine without an engine: the second reference that it is judged by (``--model``)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np

from kvconform.backend import BlackBox
from kvconform_backends.servers.toy import HEADS, LAYERS, VOCABULARY, WIDTH, Array, Model, ToyEngine, normed
from kvconform_specs.claims import Claims
from kvconform_specs.config import Config

CONTEXT = ToyEngine.context
ADDRESS = f"{__name__}:ToyForward"


class ToyForward(BlackBox):
    """All tokens in one pass. As a cache it keeps the tokens, and computes all of them again in each step."""

    claims = Claims(profiles=("decoder",), reference="self", abilities=("uncached_forward",), dtypes=("float32",))
    configs: Mapping[str, Config] = {
        "decoder-self": Config(
            "decoder",
            heads=HEADS,
            kv_heads=HEADS,
            head_dim=WIDTH // HEADS,
            capacity=CONTEXT,
            layers=LAYERS,
            width=WIDTH,
            vocabulary=VOCABULARY,
        )
    }
    recognised = "the toy engine's model"

    def __init__(self, config: Config, weights: Mapping[str, Any], device: str = "cpu") -> None:
        self.model = Model(CONTEXT)

    def start(self, batch: int) -> Array:
        return np.zeros((batch, 0), np.int64)

    def step(self, sequence: Any, tokens: Any, counts: Any = None, padding: str = "right") -> tuple[Array, Any]:
        sequence = np.concatenate([sequence, tokens], axis=1)
        return self.uncached_forward(sequence)[:, -tokens.shape[1] :], sequence

    def uncached_forward(self, *inputs: Any, **options: Any) -> Array:
        return np.stack([self._logits(row) for row in inputs[0]])

    def _logits(self, tokens: Any) -> Array:
        m, s = self.model, len(tokens)
        x = m.embedding[tokens] + m.positions[:s]
        for layer in range(LAYERS):
            query, key, value = (part.reshape(s, HEADS, -1).swapaxes(0, 1) for part in normed(x) @ m.qkv[layer])
            scores = query @ key.swapaxes(1, 2) / np.sqrt(np.float32(WIDTH // HEADS))
            scores = np.where(np.tri(s, dtype=bool), scores, -np.inf)
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            mixed = (weights / weights.sum(axis=-1, keepdims=True)) @ value
            x = x + mixed.swapaxes(0, 1).reshape(s, WIDTH) @ m.out[layer]
            x = x + np.maximum(normed(x) @ m.up[layer], 0) @ m.down[layer]
        return np.asarray(normed(x) @ m.head, np.float32)

    def perturbed(self, storage: float, accumulation: float, seed: int) -> ToyForward:
        other, rng = copy.copy(self), np.random.default_rng(seed)
        other.model = copy.copy(self.model)
        for name in ("embedding", "positions", "qkv", "out", "up", "down", "head"):
            weight = getattr(self.model, name)
            terms = 1 if name in ("embedding", "positions") else weight.shape[-2]
            size = storage + accumulation * terms**0.5
            noisy = weight * (1 + size * rng.uniform(-1, 1, weight.shape))
            setattr(other.model, name, noisy.astype(np.float32))
        return other
