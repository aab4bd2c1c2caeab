"""The decoder family in torch, open in one place: how attention stores and finds its keys and values.

``eager``, ``compiled`` and ``onnx`` are this module with three ways of running it; a cache design is an ``Attend``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from kvconform_specs.config import Config

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""``(layer, query (b, h, t, d), key (b, g, t, d), value (b, g, t, d))`` to the mixed heads ``(b, h, t, d)``."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def visible(i: Tensor, j: Tensor, window: int | None) -> Tensor:
    """Which absolute positions ``j`` ``(s,)`` the tokens at ``i`` see: ``(t, s)`` for positions ``(t,)``, and
    ``(b, 1, t, s)`` for positions ``(b, t)`` of each row."""
    behind = distance(i, j)
    return behind >= 0 if window is None else (behind >= 0) & (behind < window)


def distance(i: Tensor, j: Tensor) -> Tensor:
    """How far the keys at ``j`` lie behind the tokens at ``i``; shapes as in ``visible``."""
    return (i if i.ndim == 1 else i[:, None])[..., None] - j


def masks(config: Config, i: Tensor, j: Tensor, seen: Tensor | None = None) -> list[Tensor]:
    """Each layer's mask for ``attention``, made once for each window that occurs; ``i`` and ``j`` as in ``visible``.

    It is bool, True where a token is seen; under ``alibi`` it is float32, the bias there and -inf elsewhere.
    seen: bool ``(b, s)``, which tokens the caller lets be seen.
    """
    made: dict[int | None, Tensor] = {}
    for window in dict.fromkeys(config.window_of(layer) for layer in range(config.layers)):
        mask = visible(i, j, window)
        if seen is not None:
            mask = mask & seen[:, None, None]  # (b, 1, t, s)
        made[window] = torch.where(mask, alibi(config, i, j), -torch.inf) if config.positions == "alibi" else mask
    return [made[config.window_of(layer)] for layer in range(config.layers)]


def alibi(config: Config, i: Tensor, j: Tensor) -> Tensor:
    """The bias on the scores, ``(1 or b, h, t, s)`` in float32 (Press et al. 2021, 2108.12409, section 3)."""
    slopes = [2.0 ** (-8 * (head + 1) / config.heads) for head in range(config.heads)]
    behind = distance(i, j) if i.ndim == 2 else distance(i, j)[None, None]
    return -torch.tensor(slopes, dtype=torch.float32, device=i.device)[:, None, None] * behind


def attention(config: Config, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Query ``(b, h, t, d)`` on keys and values ``(b, g, s, d)``: ``(b, h, t, d)``.

    mask: bool, True where a token is seen, or float, added to the scores; it broadcasts to ``(b, h, t, s)``.
    A query that sees nothing gives zeros.
    """
    if config.softcap is None and config.sink is None:
        return functional.scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, scale=config.score_scale, enable_gqa=config.group > 1
        )
    # SDPA has neither. Scores and weights stay in float32, as inside its kernels.
    (b, h, t, d), (_, g, s, _) = query.shape, keys.shape
    scores = query.float().reshape(b, g, h // g * t, d) @ keys.float().mT * config.score_scale  # (b, g, h/g * t, s)
    scores = scores.reshape(b, h, t, s)
    if config.softcap is not None:
        scores = config.softcap * torch.tanh(scores / config.softcap)
    if mask is not None:
        scores = torch.where(mask, scores, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if config.sink is not None:
        sinks = torch.arange(1, h + 1, device=query.device) * (config.sink / h)  # (h,)
        scores = torch.cat((scores, sinks[:, None, None].expand(b, h, t, 1)), dim=-1)
    weights = scores.softmax(-1)[..., :s]
    if mask is not None and config.sink is None:
        weights = weights.masked_fill(scores == -torch.inf, 0.0)  # where a query sees nothing, softmax gave NaN
    return (weights.reshape(b, g, h // g * t, s) @ values.float()).reshape(b, h, t, d).to(query.dtype)


class Block(nn.Module):
    """One layer: ``x += attention(norm(x))``, then ``x += mlp(norm(x))`` where the config has an MLP.

    Matrices with a common input are laid side by side: fewer kernels to launch, and half the time to compile.
    """

    norm_attention: Tensor  # (width,)
    query_key_value: Tensor  # (width, (h + 2 g) * d)
    output: Tensor  # (h * d, width)
    norm_mlp: Tensor  # (width,)
    gate_up: Tensor  # (width, 2 * mlp)
    down: Tensor  # (mlp, width)

    def __init__(self, config: Config, number: int, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.config, self.number = config, number
        w = {name.removeprefix(f"layers.{number}."): weight for name, weight in weights.items()}
        self.register_buffer("norm_attention", w["norm_attention"])
        self.register_buffer("query_key_value", torch.cat([w["query"], w["key"], w["value"]], dim=1))
        self.register_buffer("output", w["output"])
        if config.mlp:
            self.register_buffer("norm_mlp", w["norm_mlp"])
            self.register_buffer("gate_up", torch.cat([w["gate"], w["up"]], dim=1))
            self.register_buffer("down", w["down"])

    def forward(self, x: Tensor, rotate: Callable[[Tensor], Tensor], attend: Attend) -> Tensor:
        h, g, d = self.config.heads, self.config.kv_heads, self.config.head_dim
        y = functional.rms_norm(x, x.shape[-1:], self.norm_attention, 1e-6) @ self.query_key_value
        heads = y.reshape(*x.shape[:2], h + 2 * g, d).transpose(1, 2)  # (b, h + 2 g, t, d): queries, keys, values
        turned = rotate(heads[:, : h + g])
        mixed = attend(self.number, turned[:, :h], turned[:, h:], heads[:, h + g :])  # (b, h, t, d)
        x = x + mixed.transpose(1, 2).flatten(2) @ self.output
        if self.config.mlp:
            gate, up = (functional.rms_norm(x, x.shape[-1:], self.norm_mlp, 1e-6) @ self.gate_up).chunk(2, dim=-1)
            x = x + (functional.silu(gate) * up) @ self.down
        return x  # (b, t, width)


class Decoder(nn.Module):
    """Token ids ``(b, t)`` at absolute positions ``(t,)`` or ``(b, t)`` to logits ``(b, t, V)`` in the config's dtype.

    Positions that are a bias on the scores (alibi) are the business of ``attend``.
    """

    embed: Tensor
    position: Tensor
    cos: Tensor
    sin: Tensor
    norm_final: Tensor
    lm_head: Tensor

    def __init__(self, config: Config, weights: Mapping[str, NDArray[np.float32]], device: str = "cpu") -> None:
        super().__init__()
        self.config, dtype = config, DTYPES[config.dtype]
        # exact: the weights are float32 that were rounded to the config's dtype. The copy parts us from the caller.
        held = {name: torch.tensor(weight).to(device, dtype) for name, weight in weights.items()}
        for name, weight in held.items():
            if "." not in name:
                self.register_buffer(name, weight)
        self.blocks = nn.ModuleList(Block(config, number, held) for number in range(config.layers))
        if config.positions == "rope":
            half = config.head_dim // 2
            angle = np.arange(config.capacity)[:, None] * 10000.0 ** (-np.arange(half) / half)
            # float32 in every dtype: a rotated head is rounded once, when it is stored
            self.register_buffer("cos", torch.tensor(np.cos(angle), dtype=torch.float32, device=device))
            self.register_buffer("sin", torch.tensor(np.sin(angle), dtype=torch.float32, device=device))

    def forward(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        x = functional.embedding(tokens, self.embed)  # (b, t, width)
        if self.config.positions == "learned":
            x = x + self.position[positions]
        rotate = self.rotation(positions)
        for block in self.blocks:
            x = block(x, rotate, attend)
        return functional.rms_norm(x, x.shape[-1:], self.norm_final, 1e-6) @ self.lm_head

    def rotation(self, positions: Tensor) -> Callable[[Tensor], Tensor]:
        """Turns ``(b, heads, t, d)`` to positions ``(t,)`` or ``(b, t)``: pairs are ``(x_i, x_(i + d/2))``."""
        if self.config.positions != "rope":
            return lambda x: x
        cos, sin = self.cos[positions].unsqueeze(-3), self.sin[positions].unsqueeze(-3)  # ([b,] 1, t, d/2)

        def rotate(x: Tensor) -> Tensor:
            a, b = x.float().chunk(2, dim=-1)
            return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)

        return rotate
