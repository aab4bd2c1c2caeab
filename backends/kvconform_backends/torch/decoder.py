"""The decoder in torch, parameterised by how attention stores and finds its keys and values.

``eager``, ``compiled`` and ``onnx`` run this module in three ways; a cache design is an ``Attend``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from kvconform_backends.rotary import attention_factor, inverse_frequencies
from kvconform_specs.config import Config

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""``(layer, query (b, h, t, d), key (b, g, t, d), value (b, g, t, d))`` to the mixed heads ``(b, h, t, d)``. Key and
value of a layer that reads another one's have no heads."""
Mix = Callable[[int, Tensor], Tensor]
"""``(layer, packed queries, keys and values (b, t, (h + 2 g) * d))`` to ``(b, t, h * d)``."""
Multiply = Callable[[Tensor, Tensor], Tensor]
"""See ``Decoder.multiply``."""
Positions = Tensor | slice
"""Positions of new tokens: a slice if all rows have the same length and grow equally, so that tables are sliced instead
of gathered; else ``(t,)``, or ``(b, t)`` per row."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def visible(i: Tensor, j: Tensor, window: int | None) -> Tensor:
    """Which absolute positions ``j`` ``(s,)`` the tokens at ``i`` see: ``(t, s)`` for positions ``(t,)``, ``(b, 1, t,
    s)`` for positions ``(b, t)``."""
    behind = distance(i, j)
    return behind >= 0 if window is None else (behind >= 0) & (behind < window)


def distance(i: Tensor, j: Tensor) -> Tensor:
    """The distance from the tokens at ``i`` back to the keys at ``j``; shapes as in ``visible``."""
    return (i if i.ndim == 1 else i[:, None])[..., None] - j


def masks(config: Config, i: Tensor, j: Tensor, seen: Tensor | None = None) -> list[Tensor]:
    """Each layer's mask for ``attention``, built once per distinct window; ``i`` and ``j`` as in ``visible``.

    It is bool, True for visible tokens; with ``alibi`` it is float32: the bias, and -inf for hidden tokens. seen: bool
    ``(b, s)``, the caller's mask.
    """
    windows = [config.window_of(layer) for layer in range(config.layers)]
    made = {window: mask_of(config, window, i, j, seen) for window in dict.fromkeys(windows)}
    return [made[window] for window in windows]


def mask_of(config: Config, window: int | None, i: Tensor, j: Tensor, seen: Tensor | None) -> Tensor:
    """The mask for one window, as in ``masks``."""
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
class LayerMask:
    """What a step's tokens see in one layer: slots ``first`` to ``stop``, further restricted by the mask.

    mask: as in ``attention``; None: all of them. causal: as many queries as keys, each sees those up to its own.
    """

    first: int
    stop: int
    mask: Tensor | None = None
    causal: bool = False

    def cut(self, x: Tensor) -> Tensor:
        """A view of the visible slots of keys or values ``(b, g, any, d)``."""
        return x if self.first == 0 and self.stop == x.shape[2] else x[:, :, self.first : self.stop]


class LayerMasks:
    """Chooses each layer's mask: hidden slots are cut off, and a mask is built only if that does not suffice.

    A decode step with rows of equal length needs none; ALiBi's bias is then cut from a table.
    """

    def __init__(self, config: Config, device: str) -> None:
        self.config, self.device = config, device
        self.windows = [config.window_of(layer) for layer in range(config.layers)]
        places = torch.arange(config.capacity, device=device)
        # the newest token's bias on s keys is the end of its bias on ``capacity`` keys, (1, h, 1, capacity)
        self.newest = alibi(config, places[-1:], places) if config.positions == "alibi" else None
        # only SDPA has is_causal; it aligns top-left, so that it is correct only without a past
        self.fused = config.softcap is None and config.sink is None and self.newest is None

    def of(self, at: Positions, s: int, seen: Tensor | None = None) -> list[LayerMask]:
        """The masks of all layers for tokens at ``at``, with at most ``s`` tokens per row including them.

        seen: bool ``(b, s)``, the caller's mask.
        """
        made = {window: self._of(window, at, s, seen) for window in dict.fromkeys(self.windows)}
        return [made[window] for window in self.windows]

    def of_layer(self, layer: int, at: Positions, s: int) -> LayerMask:
        return self._of(self.windows[layer], at, s, None)

    def _of(self, window: int | None, at: Positions, s: int, seen: Tensor | None) -> LayerMask:
        if isinstance(at, Tensor):
            every = torch.arange(s, device=self.device)
            return LayerMask(0, s, mask_of(self.config, window, at, every, seen))
        first = 0 if window is None else max(0, at.start + 1 - window)  # the oldest token that the first new one sees
        if seen is None and s - at.start == 1:
            # contiguous: GPU kernels require an aligned mask
            return LayerMask(first, s, None if self.newest is None else self.newest[..., first - s :].contiguous())
        if seen is None and at.start == 0 and self.fused and (window is None or s <= window):
            return LayerMask(0, s, causal=True)
        new, every = torch.arange(at.start, s, device=self.device), torch.arange(first, s, device=self.device)
        return LayerMask(first, s, mask_of(self.config, window, new, every, None if seen is None else seen[:, first:]))


def attend_to(config: Config, seen: LayerMask, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """``attention`` on the visible part of all keys and values."""
    return attention(config, query, seen.cut(keys), seen.cut(values), seen.mask, seen.causal)


def positive_scale(config: Config) -> tuple[float, float]:
    """Factors of the query and of the scores, whose product is the scale. The second is positive, as kernels require:
    SDPA's on the CPU multiplies scores that it has masked with -inf. The first is 1, -1 or 0, so that it is exact."""
    scale = config.score_scale
    return (1.0, scale) if scale > 0 else (-1.0, -scale) if scale < 0 else (0.0, 1.0)


def attention(
    config: Config, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, causal: bool = False
) -> Tensor:
    """Query ``(b, h, t, d)`` on keys and values ``(b, g, s, d)``: ``(b, h, t, d)``.

    mask: bool, True for visible tokens, or float, added to the scores; it broadcasts to ``(b, h, t, s)``. causal: use
    SDPA's own causal mask instead; requires ``t == s``. A query that sees nothing gives zeros.
    """
    (b, h, t, d), (_, g, s, _) = query.shape, keys.shape
    sign, scale = positive_scale(config)
    query = query if sign == 1 else query * sign
    if config.softcap is None and config.sink is None:
        if t == 1 and h > g:
            # query heads become rows of their KV head: its keys are read once, and no kernel repeats them
            query = query.reshape(b, g, h // g, d)
            mask = mask if mask is None or mask.ndim == 2 or mask.shape[1] == 1 else mask.reshape(-1, g, h // g, s)
        mixed = functional.scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=query.shape[1] > g
        )
        return mixed.reshape(b, h, t, d)
    # SDPA has no softcap and no sink. Scores and weights stay in float32, as inside its kernels.
    scores = query.float().reshape(b, g, h // g * t, d) @ keys.float().mT * scale  # (b, g, h/g * t, s)
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
        weights = weights.masked_fill(scores == -torch.inf, 0.0)  # softmax gives NaN for a query that sees nothing
    return (weights.reshape(b, g, h // g * t, s) @ values.float()).reshape(b, h, t, d).to(query.dtype)


class Block(nn.Module):
    """One layer: ``x += attention(norm(x))``, then ``x += mlp(norm(x))`` if the config has an MLP.

    Matrices with a common input are concatenated, which saves kernel launches and halves the compile time.
    """

    norm_attention: Tensor  # (width,)
    query_key_value: Tensor  # (width, (h + 2 g) * d); (width, h * d) if the layer reads another one's keys and values
    output: Tensor  # (h * d, width)
    norm_mlp: Tensor  # (width,)
    gate_up: Tensor  # (width, 2 * mlp)
    down: Tensor  # (mlp, width)

    def __init__(self, config: Config, number: int, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.config, self.number = config, number
        w = {name.removeprefix(f"layers.{number}."): weight for name, weight in weights.items()}
        self.register_buffer("norm_attention", w["norm_attention"])
        projections = [w[name] for name in ("query", "key", "value") if name in w]
        self.register_buffer("query_key_value", laid_out(torch.cat(projections, dim=1)))
        self.register_buffer("output", laid_out(w["output"]))
        if config.mlp:
            self.register_buffer("norm_mlp", w["norm_mlp"])
            self.register_buffer("gate_up", laid_out(torch.cat([w["gate"], w["up"]], dim=1)))
            self.register_buffer("down", laid_out(w["down"]))

    def forward(self, x: Tensor, mix: Mix, multiply: Multiply = torch.matmul) -> Tensor:
        y = multiply(functional.rms_norm(x, x.shape[-1:], self.norm_attention, 1e-6), self.query_key_value)
        x = x + multiply(mix(self.number, y), self.output)
        if self.config.mlp:
            normed = functional.rms_norm(x, x.shape[-1:], self.norm_mlp, 1e-6)
            gate, up = multiply(normed, self.gate_up).chunk(2, dim=-1)
            x = x + multiply(functional.silu(gate) * up, self.down)
        return x  # (b, t, width)


def mixing(config: Config, rotate: Callable[[Tensor], Tensor], attend: Attend) -> Mix:
    """The attention of the decoder's blocks."""
    h, d = config.heads, config.head_dim

    def mix(layer: int, y: Tensor) -> Tensor:
        g = config.kv_heads if config.source_of(layer) == layer else 0
        heads = y.reshape(*y.shape[:2], h + 2 * g, d).transpose(1, 2)  # (b, h + 2 g, t, d): queries, keys, values
        turned = rotate(heads[:, : h + g])
        mixed = attend(layer, turned[:, :h], turned[:, h:], heads[:, h + g :])  # (b, h, t, d)
        return mixed.transpose(1, 2).flatten(2)

    return mix


class Decoder(nn.Module):
    """Token ids ``(b, t)`` at absolute positions to logits ``(b, t, V)`` in the config's dtype; with ``last_only``,
    only those of the last position, ``(b, 1, V)``.

    Position biases on the scores (ALiBi) are part of ``attend``.
    """

    embed: Tensor
    position: Tensor
    context: Tensor
    cos: Tensor
    sin: Tensor
    norm_final: Tensor
    lm_head: Tensor

    def __init__(self, config: Config, weights: Mapping[str, NDArray[np.float32]], device: str = "cpu") -> None:
        super().__init__()
        self.config, dtype = config, DTYPES[config.dtype]
        # exact: the weights are already rounded to the config's dtype. The copy is independent of the caller.
        held = {name: torch.tensor(weight).to(device, dtype) for name, weight in weights.items()}
        for name, weight in held.items():
            if "." not in name:
                self.register_buffer(name, laid_out(weight) if name == "lm_head" else weight)
        self.blocks = nn.ModuleList(Block(config, number, held) for number in range(config.layers))
        if config.positions == "rope":
            # float32 for every dtype: a rotated head is rounded once, when it is stored
            tables = [torch.tensor(x, dtype=torch.float32, device=device) for x in turn_tables(config)]
            if config.changes_at:  # (lengths + 1, capacity, d): after that many changes
                self.register_buffer("cos", tables[0])
                self.register_buffer("sin", tables[1])
                self.changes = torch.tensor(config.changes_at, device=device)
            else:
                self.register_buffer("cos", tables[0][0])  # (capacity, d)
                self.register_buffer("sin", tables[1][0])

    def forward(
        self, tokens: Tensor, positions: Positions, attend: Attend, last_only: bool = False, context: int = 0
    ) -> Tensor:
        x = functional.embedding(tokens, self.embed)  # (b, t, width)
        if context:
            x = x + self.context[context]
        if self.config.positions == "learned":
            x = x + self.position[positions]
        mix = mixing(self.config, self.rotation(positions), attend)
        for block in self.blocks:
            x = block(x, mix, self.multiply)
        if last_only:
            x = x[:, -1:]
        return self.multiply(functional.rms_norm(x, x.shape[-1:], self.norm_final, 1e-6), self.lm_head)

    def multiply(self, x: Tensor, matrix: Tensor) -> Tensor:
        """``(b, t, in)`` by one of the decoder's matrices ``(in, out)``: ``(b, t, out)``."""
        return x @ matrix

    def rotation(self, positions: Positions) -> Callable[[Tensor], Tensor]:
        """Rotates ``(b, heads, t, d)`` to the positions; pairs are ``(x_i, x_(i + d/2))``."""
        if self.config.positions != "rope" or self.config.changes_at:  # then attention turns them
            return lambda x: x
        cos, sin = self.cos[positions].unsqueeze(-3), self.sin[positions].unsqueeze(-3)  # ([b,] 1, t, d)

        return lambda x: turned(x, cos, sin)

    def turn_all(self, query: Tensor, keys: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
        """Queries at their positions and all ``s`` cached keys, by the angles of each row's whole length."""
        if query.shape[2] == 0:
            return query, keys
        totals = positions.stop if isinstance(positions, slice) else positions.amax(-1) + 1  # (b,) if rows differ
        epoch = torch.bucketize(torch.as_tensor(totals, device=self.cos.device), self.changes, right=True)
        cos, sin = self.cos[epoch], self.sin[epoch]  # ([b,] capacity, d)
        every = slice(0, keys.shape[2])
        turned_keys = turned(keys, cos[..., None, every, :], sin[..., None, every, :])
        if isinstance(positions, slice):
            return turned(query, cos[positions], sin[positions]), turned_keys
        at = positions[..., None].expand(*positions.shape, cos.shape[-1])  # (b, t, d)
        return turned(query, cos.gather(1, at)[:, None], sin.gather(1, at)[:, None]), turned_keys


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs ``(x_i, x_(i + d/2))``; the first half's sines are negative."""
    x32 = x.float()
    other = x32.roll(x.shape[-1] // 2, -1)  # the other number of each pair
    return torch.addcmul(x32 * cos, other, sin).to(x.dtype)


def turn_tables(config: Config) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Cosines and signed sines ``(n, capacity, d)``, for each of the ``n`` lengths at which factors change."""
    cosines, sines = [], []
    for total in (1, *config.changes_at):
        angle = np.arange(config.capacity)[:, None] * inverse_frequencies(config, config.head_dim, total)
        cos, sin = np.cos(angle) * attention_factor(config), np.sin(angle) * attention_factor(config)
        cosines.append(np.tile(cos, 2))
        sines.append(np.concatenate((-sin, sin), axis=1))
    return np.stack(cosines), np.stack(sines)


def laid_out(matrix: Tensor) -> Tensor:
    """The matrix ``(in, out)`` in the memory layout in which a decode step's single-row product reads it fastest.

    On a CPU in float32 that is along the longer axis, like the inner loops; otherwise along ``in``, the order of
    ``nn.Linear``: any other order makes float16 on a CPU fall back to a plain loop. Products of many rows are
    unaffected.
    """
    wide = matrix.shape[1] >= matrix.shape[0]
    if matrix.device.type == "cpu" and matrix.dtype == torch.float32 and wide:
        return matrix
    return matrix.T.contiguous().T
