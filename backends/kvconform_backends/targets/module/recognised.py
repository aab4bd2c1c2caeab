"""What is known of a target before its first call, and what trials found out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from kvconform_backends.targets.module import conventions
from kvconform_backends.targets.module.conventions import Convention, Signature

Rank = tuple[bool, bool, bool, bool]
"""Whether the prompt ran, one more token ran, it agreed with the whole forward, and so did a chunk after it."""
CAPACITY = 40
"""Most tokens that a sequence is given: programs stay short."""


@dataclass
class Target:
    """What is probed: the object, where it comes from, and what it was built with."""

    module: Any
    name: str
    namespace: Mapping[str, Any]
    init: Mapping[str, Any]
    dtype: torch.dtype = torch.float32

    def told(self, names: tuple[str, ...]) -> Iterator[tuple[int, str]]:
        """Each of these numbers that its arguments, attributes or config objects tell, and its name there."""
        places = list(self._places())
        for name in names:
            for place in places:
                value = place.get(name) if isinstance(place, Mapping) else getattr(place, name, None)
                if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                    yield value, name

    def number(self, names: tuple[str, ...], otherwise: int) -> int:
        return next(self.told(names), (otherwise, ""))[0]

    def _places(self) -> Iterator[Any]:
        holders = [self.module]
        if isinstance(self.module, nn.Module):
            holders += [m for m in self.module.modules() if not type(m).__module__.startswith("torch.")]
        yield from (self.init, *(value for value in self.init.values() if isinstance(value, Mapping)))
        for holder in holders:
            yield holder
            for name in ("config", "cfg", "args", "params"):
                value = getattr(holder, name, None)
                if value is not None and not callable(value):
                    yield value
        if not isinstance(self.module, nn.Module):
            yield self.namespace


@dataclass
class Recognised:
    """A convention, and what trials told. ``vocabulary``: how many token ids there are; ``outputs``: numbers of one
    token's output; ``rows``: the most that are taken, and the ``refusal`` of more; ``given``: what masks and positions
    are given; ``past``: what the past is, in words; ``hints``: what giving what is left out would change."""

    signature: Signature
    convention: Convention
    given: dict[str, str] = field(default_factory=dict)
    width: int = 0
    vocabulary: int = 0
    outputs: int = 0
    whole_last: bool = False
    last_only: bool = False
    rows: int | None = None
    refusal: str = ""
    capacity: int = CAPACITY
    capacity_from: str = ""
    past: str = ""
    layers: int = 1
    heads: int = 1
    kv_heads: int = 1
    head_dim: int = 1
    functional: bool = False
    reserved: tuple[int, ...] = ()
    hints: dict[str, str] = field(default_factory=dict)
    rank: Rank = (False, False, False, False)

    @property
    def batch(self) -> int:
        return 1 if self.rows == 1 or not self.convention.batched else 2

    @property
    def restarts(self) -> bool:
        """Whether there is a way to empty a sequence: an empty past, a method, or a call at position 0."""
        return bool(self.convention.present or self.convention.begin or "cached" in self.convention.call)

    @property
    def words(self) -> str:
        """How it is called, in words."""
        c, names = self.convention, " and ".join(self.signature.pasts)
        if c.present == "past":
            how = f"{names} passed and changed in place, {self.past}"
        elif c.present:
            how = f"{names} passed and returned as {self.past}"
        else:
            how = "the cache lives in the module" + (f" and is emptied by {c.begin}" if c.begin else "")
        one = "" if c.batched else ", without a batch axis"
        arrays = ", numpy arrays" if c.arrays == "numpy" else ""
        kind = "token ids" if c.takes == "tokens" else "hidden states"
        return f"{kind} in{one}{arrays}, {how}; called as {conventions.concrete(c.call, {})}"

    @property
    def assumed(self) -> Iterator[str]:
        """What nobody said, one sentence each."""
        c, sig = self.convention, self.signature
        whole = conventions.concrete(c.whole, {"past": c.empty})
        if c.always:
            begun = f"the first {whole} after {c.begin}" if c.begin else f"{whole} at position 0"
            yield f"the truth is {begun}, in a process of its own: there is no call without the cache"
        else:
            yield f"the truth is {whole}"
        if c.present and c.empty != "None":
            yield f"an empty past is {c.empty}"
        if c.owned and not c.begin:
            yield "nothing empties the cache: a sequence begins with " + (
                "a call at position 0" if sig.positions else "the next call"
            )
        if c.owned:
            yield "one sequence at a time lives in the module"
        for name, form in self.given.items():
            counts = " (cached tokens, new ones)" if "new" in form else " (how many tokens are cached)"
            yield f"{name} is given as {conventions.concrete(form, {})}" + counts * ("cached" in form)
        for name in (*sig.masks, *sig.positions):
            if name not in self.given:
                yield f"{name} is left out{self.hints.get(name, '')}"
        if self.refusal:
            rows = "one row" if self.rows == 1 else f"{self.rows} rows"
            yield f"it takes {rows} at a time: more raised {self.refusal}"
        if self.last_only:
            yield "a call gives the output of its last token alone"
        told = f", by its {self.capacity_from}" if self.capacity_from else ": nothing tells how many it holds"
        yield f"a sequence has at most {self.capacity} tokens{told}"
