"""The decoder family in torch, open in one place: how attention stores and finds its keys and values.

``eager``, ``compiled`` and ``onnx`` are this module with three ways of running it; a cache design is an ``Attend``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from kvconform_specs.config import Config

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""``(layer, query (b, h, t, d), key (b, g, t, d), value (b, g, t, d))`` to the mixed heads ``(b, h, t, d)``."""
Multiply = Callable[[Tensor, Tensor], Tensor]
"""As ``Decoder.multiply``."""
Positions = Tensor | slice
"""Of new tokens: a slice where all rows are as long and grow alike, so that tables are cut and not gathered; else
``(t,)``, or ``(b, t)`` of each row."""

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
    windows = [config.window_of(layer) for layer in range(config.layers)]
    made = {window: mask_of(config, window, i, j, seen) for window in dict.fromkeys(windows)}
    return [made[window] for window in windows]


def mask_of(config: Config, window: int | None, i: Tensor, j: Tensor, seen: Tensor | None) -> Tensor:
    """The mask of a layer with that window, as in ``masks``."""
    mask = visible(i, j, window)
    if seen is not None:
        mask = mask & seen[:, None, None]  # (b, 1, t, s)
    return torch.where(mask, alibi(config, i, j), -torch.inf) if config.positions == "alibi" else mask


def alibi(config: Config, i: Tensor, j: Tensor) -> Tensor:
    """The bias on the scores, ``(1 or b, h, t, s)`` in float32 (Press et al. 2021, 2108.12409, section 3)."""
    slopes = [2.0 ** (-8 * (head + 1) / config.heads) for head in range(config.heads)]
    behind = distance(i, j) if i.ndim == 2 else distance(i, j)[None, None]
    return -torch.tensor(slopes, dtype=torch.float32, device=i.device)[:, None, None] * behind


@dataclass(frozen=True, slots=True)
class Sight:
    """What a step's tokens see of one layer: the slots ``first`` to ``stop``, and of these what the mask says.

    mask: as in ``attention``, or None: all of them; causal: as many queries as keys, each sees those up to its own.
    """

    first: int
    stop: int
    mask: Tensor | None = None
    causal: bool = False

    def cut(self, x: Tensor) -> Tensor:
        """A view of the slots that are seen, of keys or values ``(b, g, any, d)``."""
        return x if self.first == 0 and self.stop == x.shape[2] else x[:, :, self.first : self.stop]


class Sights:
    """Chooses what is seen: slots that nobody sees are cut off, and a mask is made only where that is not enough.

    So a decode step, where all rows are as long, never has one; alibi's bias is cut from a table then.
    """

    def __init__(self, config: Config, device: str) -> None:
        self.config, self.device = config, device
        self.windows = [config.window_of(layer) for layer in range(config.layers)]
        places = torch.arange(config.capacity, device=device)
        # the newest token's bias on s keys is the end of its bias on as many as there can be, (1, h, 1, capacity)
        self.newest = alibi(config, places[-1:], places) if config.positions == "alibi" else None
        # SDPA alone knows is_causal, and aligns it top-left: it is right only where there is no past
        self.fused = config.softcap is None and config.sink is None and self.newest is None

    def of(self, at: Positions, s: int, seen: Tensor | None = None) -> list[Sight]:
        """Of each layer, for tokens at ``at`` whose rows hold at most ``s`` tokens with them.

        seen: bool ``(b, s)``, which tokens the caller lets be seen.
        """
        made = {window: self._of(window, at, s, seen) for window in dict.fromkeys(self.windows)}
        return [made[window] for window in self.windows]

    def of_layer(self, layer: int, at: Positions, s: int) -> Sight:
        return self._of(self.windows[layer], at, s, None)

    def _of(self, window: int | None, at: Positions, s: int, seen: Tensor | None) -> Sight:
        if isinstance(at, Tensor):
            every = torch.arange(s, device=self.device)
            return Sight(0, s, mask_of(self.config, window, at, every, seen))
        first = 0 if window is None else max(0, at.start + 1 - window)  # the oldest that the first new token sees
        if seen is None and s - at.start == 1:
            # contiguous: a GPU's kernels ask for a mask that is aligned
            return Sight(first, s, None if self.newest is None else self.newest[..., first - s :].contiguous())
        if seen is None and at.start == 0 and self.fused and (window is None or s <= window):
            return Sight(0, s, causal=True)
        new, every = torch.arange(at.start, s, device=self.device), torch.arange(first, s, device=self.device)
        return Sight(first, s, mask_of(self.config, window, new, every, None if seen is None else seen[:, first:]))


def attend_to(config: Config, sight: Sight, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """As ``attention``, on what is seen of all keys and values that there are."""
    return attention(config, query, sight.cut(keys), sight.cut(values), sight.mask, sight.causal)


def attention(
    config: Config, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, causal: bool = False
) -> Tensor:
    """Query ``(b, h, t, d)`` on keys and values ``(b, g, s, d)``: ``(b, h, t, d)``.

    mask: bool, True where a token is seen, or float, added to the scores; it broadcasts to ``(b, h, t, s)``.
    causal: in place of a mask, of SDPA alone, where ``t == s``. A query that sees nothing gives zeros.
    """
    (b, h, t, d), (_, g, s, _) = query.shape, keys.shape
    if config.softcap is None and config.sink is None:
        if t == 1 and h > g:
            # the query heads of a KV head are rows of it: its keys are read once, and no kernel has to repeat them
            query = query.reshape(b, g, h // g, d)
            mask = mask if mask is None or mask.ndim == 2 or mask.shape[1] == 1 else mask.reshape(-1, g, h // g, s)
        mixed = functional.scaled_dot_product_attention(
            query,
            keys,
            values,
            attn_mask=mask,
            is_causal=causal,
            scale=config.score_scale,
            enable_gqa=query.shape[1] > g,
        )
        return mixed.reshape(b, h, t, d)
    # SDPA has neither. Scores and weights stay in float32, as inside its kernels.
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
        self.register_buffer("query_key_value", laid_out(torch.cat([w["query"], w["key"], w["value"]], dim=1)))
        self.register_buffer("output", laid_out(w["output"]))
        if config.mlp:
            self.register_buffer("norm_mlp", w["norm_mlp"])
            self.register_buffer("gate_up", laid_out(torch.cat([w["gate"], w["up"]], dim=1)))
            self.register_buffer("down", laid_out(w["down"]))

    def forward(
        self, x: Tensor, rotate: Callable[[Tensor], Tensor], attend: Attend, multiply: Multiply = torch.matmul
    ) -> Tensor:
        h, g, d = self.config.heads, self.config.kv_heads, self.config.head_dim
        y = multiply(functional.rms_norm(x, x.shape[-1:], self.norm_attention, 1e-6), self.query_key_value)
        heads = y.reshape(*x.shape[:2], h + 2 * g, d).transpose(1, 2)  # (b, h + 2 g, t, d): queries, keys, values
        turned = rotate(heads[:, : h + g])
        mixed = attend(self.number, turned[:, :h], turned[:, h:], heads[:, h + g :])  # (b, h, t, d)
        x = x + multiply(mixed.transpose(1, 2).flatten(2), self.output)
        if self.config.mlp:
            normed = functional.rms_norm(x, x.shape[-1:], self.norm_mlp, 1e-6)
            gate, up = multiply(normed, self.gate_up).chunk(2, dim=-1)
            x = x + multiply(functional.silu(gate) * up, self.down)
        return x  # (b, t, width)


class Decoder(nn.Module):
    """Token ids ``(b, t)`` at absolute positions to logits ``(b, t, V)`` in the config's dtype; with ``last`` to those
    of the last position alone, ``(b, 1, V)``.

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
                self.register_buffer(name, laid_out(weight) if name == "lm_head" else weight)
        self.blocks = nn.ModuleList(Block(config, number, held) for number in range(config.layers))
        if config.positions == "rope":
            half = config.head_dim // 2
            angle = np.arange(config.capacity)[:, None] * 10000.0 ** (-np.arange(half) / half)
            cos, sin = np.tile(np.cos(angle), 2), np.concatenate((-np.sin(angle), np.sin(angle)), axis=1)
            # float32 in every dtype: a rotated head is rounded once, when it is stored
            self.register_buffer("cos", torch.tensor(cos, dtype=torch.float32, device=device))  # (capacity, d)
            self.register_buffer("sin", torch.tensor(sin, dtype=torch.float32, device=device))

    def forward(self, tokens: Tensor, positions: Positions, attend: Attend, last_only: bool = False) -> Tensor:
        x = functional.embedding(tokens, self.embed)  # (b, t, width)
        if self.config.positions == "learned":
            x = x + self.position[positions]
        rotate = self.rotation(positions)
        for block in self.blocks:
            x = block(x, rotate, attend, self.multiply)
        if last_only:
            x = x[:, -1:]
        return self.multiply(functional.rms_norm(x, x.shape[-1:], self.norm_final, 1e-6), self.lm_head)

    def multiply(self, x: Tensor, matrix: Tensor) -> Tensor:
        """``(b, t, in)`` by one of the decoder's matrices ``(in, out)``: ``(b, t, out)``."""
        return x @ matrix

    def rotation(self, positions: Positions) -> Callable[[Tensor], Tensor]:
        """Turns ``(b, heads, t, d)`` to the positions: pairs are ``(x_i, x_(i + d/2))``."""
        if self.config.positions != "rope":
            return lambda x: x
        cos, sin = self.cos[positions].unsqueeze(-3), self.sin[positions].unsqueeze(-3)  # ([b,] 1, t, d)

        def rotate(x: Tensor) -> Tensor:
            x32 = x.float()
            other = x32.roll(x.shape[-1] // 2, -1)  # each number's partner; the first half's sines are negative
            return torch.addcmul(x32 * cos, other, sin).to(x.dtype)

        return rotate


def laid_out(matrix: Tensor) -> Tensor:
    """The matrix ``(in, out)`` in the order of memory in which a decode step's product of one row reads it fastest.

    On a CPU in float32 that is along the longer axis, since the inner loops are; otherwise along ``in``, the order of
    ``nn.Linear``, without which a CPU's float16 falls back to a plain loop. Products of many rows do not mind.
    """
    wide = matrix.shape[1] >= matrix.shape[0]
    if matrix.device.type == "cpu" and matrix.dtype == torch.float32 and wide:
        return matrix
    return matrix.T.contiguous().T
