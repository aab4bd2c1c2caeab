"""How a module with a KV cache is called, as Python expressions.

The expressions are what runs here, what the user reads and what a reproduction script contains. Names in them:
``module``; ``x``, the new tokens; ``past``, what the caller keeps of a sequence; ``batch``, ``new`` and ``cached``, the
numbers of rows, new tokens and cached tokens; ``context``, the number of the sequence's context; ``out``, the result of
a call.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

ADAPTER = """\
import torch
from kvconform import BlackBox, Claims, Config
from kvconform_backends.targets.black_box import perturbed
from my_file import Attention  # yours

class Adapter(BlackBox):
    claims = Claims(profiles=("hidden",), abilities=("uncached_forward", "reset"), reference="self")
    configs = {"hidden-self": Config("hidden", heads=4, kv_heads=4, head_dim=8, width=32)}  # "decoder": token ids
    recognised, source = "my own call", __file__
    def __init__(self, config, weights, device):
        torch.manual_seed(0)
        self.module = Attention().eval().requires_grad_(False)
    def start(self, batch): return None                           # an empty past
    def step(self, past, x):                                      # (b, t, width), any t
        y, past = self.module(torch.from_numpy(x), past)
        return y.numpy(), past
    def uncached_forward(self, x): return self.step(None, x)[0]
    def reset(self, past): return None
    def perturbed(self, storage, accumulation, seed):
        other = Adapter(None, {}, "cpu")
        other.module = perturbed(self.module, storage, accumulation, seed)
        return other
"""
KNOWN = (
    "a past passed and returned (past_kv, past_key_values, layer_past, kv_cache, cache, ... in; (output, present), a "
    "dict or an object out), a past object modified in place (created by make_cache(), init_cache() or a class of the "
    "file), a cache in the module (use_cache=True and reset_kv_cache(), reset_cache() or clear_cache()), a cache in "
    "the module addressed by position (start_pos, input_pos)"
)


@dataclass(frozen=True)
class Convention:
    """How one target is called. All fields except ``takes``, ``arrays`` and ``batched`` are Python (see the module
    docstring).

    takes: ``tokens``, ids ``(b, t)``, or ``states``, ``(b, t, width)``. arrays: ``torch`` or ``numpy``. batched:
    whether there is a batch axis. begin: run before the first call of a sequence. empty: the past of an empty sequence.
    call: appends ``x``. output, present: read from ``out``; an empty ``present`` means that the caller keeps nothing.
    uncached: the uncached forward, with output ``uncached_output``. always: every call uses the module's cache, so that
    ``uncached`` runs ``begin`` first. tell: run before every call: tells the module the sequence's context. imports:
    names from the target's file that these expressions use.
    """

    takes: str = "states"
    call: str = "module(x)"
    uncached: str = "module(x)"
    begin: str = ""
    empty: str = "None"
    output: str = "out"
    present: str = ""
    uncached_output: str = "out"
    length: str = ""
    always: bool = False
    tell: str = ""
    arrays: str = "torch"
    batched: bool = True
    imports: tuple[str, ...] = ()

    @property
    def owned(self) -> bool:
        """Whether the module owns the cache."""
        return not self.present

    def overridden(self, by: Mapping[str, Any]) -> Convention:
        """Raises ValueError for an unknown field."""
        known = {f.name for f in fields(self)}
        for name in by:
            if name not in known:
                raise ValueError(f"convention.{name}: unknown field; known: {', '.join(sorted(known))}")
        return Convention(**{f.name: by.get(f.name, getattr(self, f.name)) for f in fields(self)})
