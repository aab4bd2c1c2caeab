"""How a module with a KV cache is called, as Python expressions.

The expressions are what runs here, what the user reads and what a reproduction script contains. Names in them:
``module``; ``x``, the new tokens; ``sofar``, all tokens of the sequence with the new ones; ``past``, what the caller
keeps of a sequence; ``batch``, ``new`` and ``cached``, the numbers of rows, new tokens and cached tokens; ``context``,
the number of the sequence's context; ``counts``, how many of the new columns hold tokens in each row; ``length``, how
many tokens a truncation keeps; ``rows``, the numbers of the old rows in their new order; ``out``, the result of a call.
"""

from __future__ import annotations

import builtins
import dis
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from types import CodeType
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
NAMED = (
    "x (the new tokens), sofar (all tokens of the sequence), past (what you keep of a sequence), cached, new and batch "
    "(numbers of cached tokens, new tokens and rows), out (the result)"
)
KNOWN = (
    "a past passed and returned (past_kv, past_key_values, layer_past, kv_cache, cache, ... in; (output, present), a "
    "dict or an object out), a past object modified in place (created by make_cache(), init_cache() or a class of the "
    "file), a cache in the module (use_cache=True and reset_kv_cache(), reset_cache() or clear_cache()), a cache in "
    "the module addressed by position (start_pos, input_pos)"
)


def advice(line: Mapping[str, str], file: str, name: str) -> str:
    """What to do about a target that is called in another way. line: fields to begin with."""
    module = file.removesuffix(".py").rpartition("/")[2]
    return (
        f"Give the call, as Python with the names {NAMED}: --option 'convention={json.dumps(dict(line))}'. "
        "A limit that trials cannot tell from a mistake is claimed by --claim, such as --claim max_chunk=6 or "
        f"--claim max_batch=1. Known without a convention: {KNOWN}. For anything else, write an adapter such as:\n\n"
        + ADAPTER.replace("my_file", module).replace("Attention", name)
    )


@dataclass(frozen=True)
class Convention:
    """How one target is called. All fields except ``takes``, ``arrays``, ``batched`` and ``sequence_first`` are Python
    (see the module docstring).

    takes: ``tokens``, ids ``(b, t)``, or ``states``, ``(b, t, width)``. arrays: ``torch`` or ``numpy``. batched:
    whether there is a batch axis. sequence_first: whether it is the second one, ``(t, b)``. begin: run before the
    first call of a sequence. empty: the past of an empty sequence. call: appends ``x``. output, present: read from
    ``out``; an empty ``present`` means that the caller keeps nothing. uncached: the uncached forward, with output
    ``uncached_output``. always: every call uses the module's cache, so that ``uncached`` runs ``begin`` first.
    tell: run before every call: tells the module the sequence's context. truncate: keeps the first ``length``
    tokens; it changes the past, or gives another one. ragged: the call where rows have different ``counts``. fork: a
    past with the same tokens, apart from ``past``. reorder: puts the ``rows``, a list of their numbers, in another
    order, as ``truncate`` does. one_by_one: after the first call of a sequence, tokens are given one at a time.
    imports: names from the target's file that these expressions use.
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
    sequence_first: bool = False
    truncate: str = ""
    ragged: str = ""
    fork: str = ""
    reorder: str = ""
    one_by_one: bool = False
    imports: tuple[str, ...] = ()

    @property
    def owned(self) -> bool:
        """Whether the module owns the cache."""
        return not self.present

    def overridden(self, by: Mapping[str, Any]) -> Convention:
        """``by``: fields that ``checked`` has accepted."""
        given = {**by, "imports": tuple(by.get("imports", self.imports))}
        return Convention(**{f.name: given.get(f.name, getattr(self, f.name)) for f in fields(self)})


NAMES = frozenset(
    {"module", "x", "sofar", "past", "batch", "new", "cached", "context", "counts", "length", "rows", "out"}
    | {"torch", "np", "copy", "device"}
)
"""The names that expressions can use, beside builtins and ``imports``."""
WORDS = {"takes": ("tokens", "states"), "arrays": ("torch", "numpy")}
"""The fields that are one of a few words."""


def checked(given: object, namespace: Collection[str]) -> dict[str, Any]:
    """Fields of a convention as the user gave them. Raises ValueError with one sentence. ``namespace``: the names in
    the target's file."""
    known = {f.name: f.default for f in fields(Convention)}
    if not isinstance(given, Mapping):
        raise ValueError(f"convention: want an object of fields, got {given!r}; fields: {', '.join(sorted(known))}")
    for name, value in given.items():
        if name not in known:
            raise ValueError(f"convention.{name}: unknown field; known: {', '.join(sorted(known))}")
        if name == "imports":
            absent = [one for one in value if one not in namespace] if isinstance(value, list) else [value]
            if absent:
                raise ValueError(f"convention.imports: want a list of names in the target's file, got {absent[0]!r}")
        elif name in WORDS:
            if value not in WORDS[name]:
                raise ValueError(f"convention.{name}: want one of {', '.join(WORDS[name])}, got {value!r}")
        elif not isinstance(value, type(known[name])):
            kind = "true or false" if isinstance(known[name], bool) else "a Python expression as a string"
            raise ValueError(f"convention.{name}: want {kind}, got {value!r}")
        elif isinstance(value, str) and value:
            _check_expression(name, value, {*NAMES, *given.get("imports", ())})
    return dict(given)


def _check_expression(field: str, text: str, known: Collection[str]) -> None:
    try:
        code = compile(text, "<convention>", "eval")
    except SyntaxError as error:
        raise ValueError(f"convention.{field}: {text!r} is not a Python expression: {error.msg}") from error
    for name in _globals(code):
        if name not in known and not hasattr(builtins, name):
            raise ValueError(
                f"convention.{field}: {text!r} uses {name!r}; known names: {', '.join(sorted(known))}; "
                'name others of the target\'s file in "imports"'
            )


def _globals(code: CodeType) -> list[str]:
    """The global names that an expression reads."""
    loads = {"LOAD_NAME", "LOAD_GLOBAL"}
    found = [str(one.argval) for one in dis.get_instructions(code) if one.opname in loads]
    return found + [name for inner in code.co_consts if isinstance(inner, CodeType) for name in _globals(inner)]
