"""A config: sizes and semantics of one attention layer or decoder that the suite tests.

Axes, everywhere in this project: ``b`` batch, ``h`` query heads, ``g`` KV heads, ``t`` new tokens,
``s`` cached + new tokens, ``d`` head dim, ``l`` layers.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from kvconform_specs.errors import SpecError
from kvconform_specs.rotary import Rotary
from kvconform_specs.typed import checked, take, tuples

PROFILES = ("attention", "decoder", "hidden")
POSITIONS = ("none", "learned", "rope", "alibi")
DTYPES = ("float32", "bfloat16", "float16")
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of a stored number."""


@dataclass(frozen=True, slots=True)
class Config:
    """Sizes and semantics of one layer (profile ``attention``), one decoder (profile ``decoder``), or a map from hidden
    states ``(b, t, width)`` to ``(b, t, width or vocabulary)`` (profile ``hidden``, for black boxes only).

    The sizes of a config are pairwise distinct unless a clause needs them equal, so that a swapped axis is always
    detected. ``init_std`` is 0.3 because nearly uniform attention (0.02) hides wrong positions.

    window: number of visible keys, the token itself included; ``None`` is unlimited. window_every: layers whose number
    it divides have the window, the others have none (2: a sliding layer first, then a full one, and so on).
    softcap: scores become ``softcap * tanh(scores / softcap)``, before bias and mask; ``None`` is off.
    sink: a score without a value in the softmax's denominator, ``sink * (i + 1) / heads`` for query head ``i``;
    ``None`` is none. positions ``alibi``: a bias on the scores, also in the attention profile.
    rotary: how rope's angles are scaled with the context (``rotary.py``); ``None`` is not at all. kv_source: for each
    layer the one whose keys and values it reads: its own number, or an earlier layer that has its own (Gemma 3n, YOCO,
    cross-layer attention); empty: every layer has its own.
    latent, rotary_dim: latent attention (MLA, DeepSeek-V2): a token keeps ``latent`` numbers, from which the keys and
    values of all heads follow, and one key of ``rotary_dim`` numbers that rope turns and all heads share; 0: none.
    scale: factor of the scores, of any sign; ``None`` is ``1 / sqrt(head_dim + rotary_dim)``. capacity: the most tokens
    of a sequence. width, mlp: model width and width of the gated MLP (``mlp=0``: no MLP); used by the decoder only.
    reserved: token ids that no program uses, such as a black box's padding. contexts: the number of contexts (adapters,
    images, encoder states) that a sequence can have; the row of its context in the weight ``context`` is added to the
    embedding of every token, and row 0 is zero. Not in the attention profile.
    """

    profile: str
    heads: int
    kv_heads: int
    head_dim: int
    capacity: int = 40
    window: int | None = None
    window_every: int = 1
    softcap: float | None = None
    sink: float | None = None
    scale: float | None = None
    dtype: str = "float32"
    layers: int = 1
    width: int = 0
    mlp: int = 0
    vocabulary: int = 0
    positions: str = "none"
    seed: int = 0
    init_std: float = 0.3
    reserved: tuple[int, ...] = ()
    rotary: Rotary | None = None
    kv_source: tuple[int, ...] = ()
    latent: int = 0
    rotary_dim: int = 0
    contexts: int = 1

    def __post_init__(self) -> None:
        _one_of("config.profile", self.profile, PROFILES)
        _one_of("config.dtype", self.dtype, DTYPES)
        _one_of("config.positions", self.positions, POSITIONS)
        for name in ("heads", "kv_heads", "head_dim", "capacity", "layers"):
            _at_least(f"config.{name}", getattr(self, name), 1)
        if self.heads % self.kv_heads:
            raise SpecError("config.kv_heads", f"{self.kv_heads} KV heads do not divide {self.heads} query heads")
        _at_least("config.window_every", self.window_every, 1)
        _at_least("config.contexts", self.contexts, 1)
        if self.window is not None:
            _at_least("config.window", self.window, 1)
        if self.softcap is not None and not self.softcap > 0:
            raise SpecError("config.softcap", f"must be positive, got {self.softcap}")
        if self.rotary is not None and self.positions != "rope":
            raise SpecError("config.rotary", f"scales rope, and positions are {self.positions!r}")
        if self.rotary is not None and len(self.rotary.short) not in (0, self.head_dim // 2):
            raise SpecError("config.rotary", f"{len(self.rotary.short)} divisors for {self.head_dim // 2} pairs")
        if self.rotary is not None and self.rotary.kind in ("ntk", "dynamic") and self.head_dim < 4:
            raise SpecError("config.rotary", f"a base that grows needs a head dim of at least 4, got {self.head_dim}")
        self._check_latent()
        for layer, source in enumerate(self.kv_source):
            if len(self.kv_source) != self.layers or source > layer or self.kv_source[source] != source:
                raise SpecError("config.kv_source", f"layer {layer} of {self.layers} cannot read layer {source}")
        if self.profile == "decoder":
            for name in ("width", "vocabulary"):
                _at_least(f"config.{name}", getattr(self, name), 1)
            _at_least("config.mlp", self.mlp, 0)
            if self.positions == "rope" and self.head_dim % 2:
                raise SpecError("config.head_dim", f"rope needs an even head dim, got {self.head_dim}")
            if len({token for token in self.reserved if 0 <= token < self.vocabulary}) == self.vocabulary:
                raise SpecError("config.reserved", f"includes all of {self.vocabulary} tokens")
        elif self.profile == "hidden":
            _at_least("config.width", self.width, 1)
        elif self.contexts > 1:
            raise SpecError("config.contexts", "the attention profile has no contexts")
        elif self.layers != 1 or self.positions not in ("none", "alibi"):
            raise SpecError("config.layers", "the attention profile is one layer without positions or with alibi")

    def _check_latent(self) -> None:
        if not self.latent:
            if self.rotary_dim:
                raise SpecError("config.rotary_dim", "only latent attention has rotary dims of its own")
            return
        _at_least("config.latent", self.latent, 1)
        if self.profile != "decoder" or self.positions != "rope" or self.kv_heads != self.heads:
            raise SpecError("config.latent", "wants a decoder with rope, and as many KV heads as query heads")
        if self.rotary_dim < 2 or self.rotary_dim % 2:
            raise SpecError("config.rotary_dim", f"rope needs an even number of dims, got {self.rotary_dim}")
        if self.kv_source or self.changes_at:
            raise SpecError(
                "config.latent", "is not combined with shared layers or factors that change with the length"
            )

    @property
    def group(self) -> int:
        """Query heads that share one KV head: query head ``i`` reads KV head ``i // group``."""
        return self.heads // self.kv_heads

    @property
    def score_scale(self) -> float:
        return 1.0 / math.sqrt(self.head_dim + self.rotary_dim) if self.scale is None else self.scale

    @property
    def outputs(self) -> int:
        """Numbers in the output of one token: ``h * d``, the vocabulary, or hidden channels."""
        return self.heads * self.head_dim if self.profile == "attention" else self.vocabulary or self.width

    @property
    def changes_at(self) -> tuple[int, ...]:
        """The numbers of tokens at which the outputs of all tokens change: those of the rotary factors."""
        return () if self.rotary is None else self.rotary.changes_at(self.capacity)

    def source_of(self, layer: int) -> int:
        """The layer whose keys and values that layer reads."""
        return self.kv_source[layer] if self.kv_source else layer

    @property
    def caching(self) -> tuple[int, ...]:
        """The layers that have keys and values of their own, in order."""
        return tuple(layer for layer in range(self.layers) if self.source_of(layer) == layer)

    @property
    def kept(self) -> int:
        """The numbers that all layers together keep of each token."""
        return len(self.caching) * (self.latent + self.rotary_dim if self.latent else 2 * self.kv_heads * self.head_dim)

    def window_of(self, layer: int) -> int | None:
        """The window of that layer; None if it has none."""
        return self.window if layer % self.window_every == 0 else None

    def to_json(self) -> dict[str, Any]:
        rotary = None if self.rotary is None else asdict(self.rotary)
        return {
            **{f.name: getattr(self, f.name) for f in fields(self)},  # asdict copies every value, which takes longer
            "reserved": list(self.reserved),
            "kv_source": list(self.kv_source),
            "rotary": rotary and {name: list(v) if isinstance(v, tuple) else v for name, v in rotary.items()},
        }

    @classmethod
    def from_json(cls, data: object, at: str = "config") -> Config:
        known = {name: tuples(v) for name, v in take(data, at, {f.name for f in fields(cls)}).items()}
        if known.get("rotary") is not None:
            taken = take(known["rotary"], f"{at}.rotary", {f.name for f in fields(Rotary)})
            scaling = {name: tuples(v) for name, v in taken.items()}
            checked(Rotary, scaling, f"{at}.rotary")
            known["rotary"] = Rotary(**scaling)
        checked(cls, known, at)
        return cls(**known)


def _one_of(at: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise SpecError(at, f"unknown value {value!r}; known: {', '.join(known)}")


def _at_least(at: str, value: object, least: int) -> None:
    if not isinstance(value, int) or value < least:
        raise SpecError(at, f"want an integer of at least {least}, got {value!r}")
