"""How a module with a KV cache is called: the common conventions, by the names that people give to parameters.

A convention is a few Python expressions, so that what runs here, what a person reads and what a reproduction holds are
one text. Names in them: ``module``; ``x``, the new tokens; ``past``, what the caller keeps of a sequence; ``batch``,
``new`` and ``cached``, how many rows, new tokens and cached tokens there are; ``out``, what a call returned.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

TOKENS = frozenset({"input_ids", "ids", "idx", "in_idx", "tokens", "token_ids", "input_tokens", "indices"})
"""First parameters that are token ids; any other is tried as hidden states too."""
SELF = (("query", "key", "value"), ("q", "k", "v"), ("queries", "keys", "values"))
"""Parameters that all take the same hidden states in self-attention."""
PASTS = frozenset(
    {
        "past",
        "past_kv",
        "past_kvs",
        "past_key_values",
        "past_key_value",
        "past_kv_cache",
        "past_cache",
        "past_states",
        "layer_past",
        "layer_pasts",
        "kv",
        "kvs",
        "kv_cache",
        "kv_caches",
        "cache",
        "caches",
        "cached_kv",
        "cache_kv",
        "layer_cache",
        "prev_kv",
        "prev",
        "state",
        "key_value_cache",
        "pasts",
        "presents",
        "memory_kv",
        "kv_past",
        "incremental_state",
        "inference_params",
        "cache_params",
        "kv_state",
        "past_state",
        "kv_memory",
    }
)
PAIRS = (
    ("past_k", "past_v"),
    ("past_key", "past_value"),
    ("past_keys", "past_values"),
    ("k_cache", "v_cache"),
    ("cache_k", "cache_v"),
    ("cached_k", "cached_v"),
    ("key_cache", "value_cache"),
    ("k_past", "v_past"),
    ("prev_k", "prev_v"),
)
"""A past in two parameters."""
FLAGS = frozenset(
    {
        "use_cache",
        "use_kv_cache",
        "use_kv",
        "use_past",
        "return_present",
        "return_presents",
        "return_past",
        "return_kv",
        "return_cache",
        "return_kv_cache",
        "return_past_kv",
        "cache_kv",
        "update_cache",
        "cached",
        "kv_cache",
        "cache",
    }
)
"""Switches; those that may also take a past are switches where their default or annotation is a bool."""
MASKS = frozenset({"attention_mask", "mask", "attn_mask", "causal_mask", "attn_bias", "src_mask", "tgt_mask"})
OFFSETS = frozenset(
    {
        "start_pos",
        "pos",
        "start",
        "start_position",
        "offset",
        "position",
        "past_length",
        "past_len",
        "cur_pos",
        "current_pos",
        "cache_len",
        "cache_length",
        "seq_offset",
        "position_offset",
        "pos_offset",
        "step",
        "start_idx",
    }
)
"""Positions that are usually the number of the first new token."""
POSITIONS = frozenset({"position_ids", "positions", "pos_ids", "cache_position", "cache_positions", "input_pos"})
"""Positions that are usually a tensor with one for each new token."""
RESETS = (
    "reset_kv_cache",
    "reset_cache",
    "reset_kv_caches",
    "reset_caches",
    "clear_kv_cache",
    "clear_cache",
    "clear_caches",
    "empty_cache",
    "flush_cache",
    "reset_past",
    "reset_state",
    "reset",
    "clear",
    "setup_caches",
    "setup_cache",
    "init_kv_cache",
    "init_cache",
    "init_caches",
    "allocate_cache",
    "allocate_kv_cache",
    "enable_cache",
    "set_kv_cache",
    "setup_kv_cache",
    "setup_kv_caches",
    "enable_kv_cache",
    "start_sequence",
    "new_sequence",
)
"""Methods that begin a sequence in a module that owns its cache."""
MAKERS = (
    "make_cache",
    "make_kv_cache",
    "init_cache",
    "init_kv_cache",
    "init_caches",
    "new_cache",
    "create_cache",
    "empty_cache",
    "get_cache",
    "build_cache",
    "allocate_cache",
    "make_caches",
    "new_kv_cache",
    "create_kv_cache",
    "initial_cache",
    "init_state",
    "initial_state",
    "make_empty_cache",
    "empty_past",
    "init_past",
    "make_past",
)
"""Methods, or functions beside the target, that make an empty past."""
OUTPUTS = ("logits", "last_hidden_state", "hidden_states", "output", "out", "y", "x", "attn_output", "hidden")
PRESENTS = (
    "past_key_values",
    "present_key_values",
    "present_key_value",
    "past_key_value",
    "past_kv",
    "present",
    "presents",
    "present_kv",
    "past",
    "cache",
    "kv_cache",
    "kv",
    "new_cache",
    "layer_past",
    "state",
    "caches",
)
"""Fields of a returned dict or object."""

# what is read off the constructor's arguments, attributes and config objects
WIDTHS = (
    "d_model",
    "dim",
    "d_in",
    "embed_dim",
    "emb_dim",
    "hidden_size",
    "n_embd",
    "n_embed",
    "width",
    "model_dim",
    "hidden_dim",
    "d_embed",
    "embedding_dim",
    "dim_model",
    "in_features",
    "d",
    "C",
    "E",
)
CAPACITIES = (
    "context_length",
    "sequence_len",
    "sequence_length",
    "max_seq_len",
    "max_seq_length",
    "block_size",
    "max_len",
    "max_length",
    "n_positions",
    "max_position_embeddings",
    "n_ctx",
    "ctx_len",
    "context_len",
    "max_context",
    "max_context_length",
    "max_positions",
    "max_tokens",
    "cache_len",
    "max_cache_len",
    "seq_len",
    "seq_length",
    "capacity",
)
VOCABULARIES = ("vocab_size", "n_vocab", "vocabulary", "vocabulary_size", "num_tokens", "n_tokens", "vocab")
HEADS = ("n_heads", "num_heads", "n_head", "nheads", "num_attention_heads", "heads", "n_q_heads", "h", "H")
KV_HEADS = (
    "n_kv_heads",
    "num_kv_heads",
    "num_key_value_heads",
    "n_kv_head",
    "kv_heads",
    "n_kv_groups",
    "num_kv_groups",
)
HEAD_DIMS = ("head_dim", "d_head", "head_size", "d_k", "dim_head")
LAYERS = ("n_layers", "num_layers", "n_layer", "num_hidden_layers", "depth", "layers", "L", "n_blocks")
WINDOWS = ("window", "window_size", "sliding_window", "attention_window", "local_window")

ADAPTER = """\
import numpy as np, torch
from kvconform import Claims
from kvconform_specs.config import Config
from my_file import Attention  # yours

class Adapter:  # kvconform.backend.Backend and BlackBox are the whole protocol
    claims = Claims(profiles=("hidden",), abilities=("uncached_forward", "reset"), reference="self")  # "decoder": token ids in
    configs = {"hidden-self": Config("hidden", heads=4, kv_heads=4, head_dim=8, width=32)}
    recognised, assumed, source = "my own call", (), __file__
    def __init__(self, config, weights, device):
        torch.manual_seed(0)
        self.module = Attention().eval().requires_grad_(False)
    def start(self, batch): return None                                  # an empty past
    def step(self, past, x):                                             # (b, t, width), any t
        y, past = self.module(torch.from_numpy(x), past)
        return y.numpy(), past
    def uncached_forward(self, x): return self.step(None, x)[0]                      # without a cache
    def reset(self, past): return None
    def perturbed(self, storage, accumulation, seed):
        from kvconform_backends.targets.black_box import perturbed
        other = Adapter(None, {}, "cpu")
        other.module = perturbed(self.module, storage, accumulation, seed)
        return other
"""
KNOWN = (
    "a past passed and returned (past_kv, past_key_values, layer_past, kv_cache, cache, ... in; (output, present), a "
    "dict or an object out), a past object that is changed in place (made by make_cache(), init_cache() or a class of "
    "the file), a cache in the module (use_cache=True and reset_kv_cache(), reset_cache() or clear_cache()), a cache "
    "in the module by position (start_pos, input_pos)"
)


@dataclass(frozen=True)
class Convention:
    """How one target is called. All but ``takes``, ``arrays``, ``batched`` are Python (see the module's docstring).

    takes: ``tokens``, ids ``(b, t)``, or ``states``, ``(b, t, width)``. arrays: ``torch`` or ``numpy``. batched: False
    where there is no batch axis. begin: run before the first call of a sequence. empty: the past of an empty sequence.
    call: appends ``x``. output, present: read off ``out``; an empty ``present``: the caller keeps nothing.
    whole: the forward without a cache, its output ``whole_output``. always: the module cannot be called without its
    cache, so that ``whole`` runs ``begin`` first. imports: names beside the target that these expressions use.
    """

    takes: str = "states"
    call: str = "module(x)"
    whole: str = "module(x)"
    begin: str = ""
    empty: str = "None"
    output: str = "out"
    present: str = ""
    whole_output: str = "out"
    length: str = ""
    always: bool = False
    arrays: str = "torch"
    batched: bool = True
    imports: tuple[str, ...] = ()

    @property
    def owned(self) -> bool:
        """Whether the cache lives in the module."""
        return not self.present

    def overridden(self, by: Mapping[str, Any]) -> Convention:
        """Raises ValueError where there is no such field."""
        known = {f.name for f in fields(self)}
        for name in by:
            if name not in known:
                raise ValueError(f"convention.{name}: unknown field; known: {', '.join(sorted(known))}")
        return Convention(**{f.name: by.get(f.name, getattr(self, f.name)) for f in fields(self)})


@dataclass(frozen=True)
class Signature:
    """The parameters of a forward, by what they are for. ``unknown``: the others; ``strange``: those of them that must
    be given."""

    text: str
    inputs: tuple[str, ...]
    pasts: tuple[str, ...]
    flags: tuple[str, ...]
    masks: tuple[str, ...]
    positions: tuple[str, ...]
    unknown: tuple[str, ...]
    strange: tuple[str, ...]
    parameters: Mapping[str, inspect.Parameter]

    def required(self, name: str) -> bool:
        return self.parameters[name].default is inspect.Parameter.empty

    def default(self, name: str) -> Any:
        return self.parameters[name].default

    def annotation(self, name: str) -> str:
        noted = self.parameters[name].annotation
        return "" if noted is inspect.Parameter.empty else noted if isinstance(noted, str) else str(noted)


def signature_of(target: Any, name: str, past: str = "") -> Signature:
    """Sorts the parameters of a module's ``forward`` or of a function. Raises ValueError where there are none.
    ``past``: a parameter of any name that takes the past."""
    forward = getattr(target, "forward", target)
    found = inspect.signature(forward).parameters
    named = {k: p for k, p in found.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    text = f"{name}{'.forward' if forward is not target else ''}({', '.join(map(str, found.values()))})"
    if not named:
        raise ValueError(text)
    names = list(named)
    inputs = next((group for group in SELF if set(group) <= set(names) and names[0] == group[0]), (names[0],))
    rest = [n for n in names if n not in inputs]
    flags = tuple(n for n in rest if n in FLAGS and _switch(named[n]))
    pair = next((p for p in PAIRS if set(p) <= set(rest)), ())
    pasts = (past,) if past else pair or tuple(n for n in rest if n in PASTS and n not in flags)[:1]
    masks = tuple(n for n in rest if n in MASKS and n not in pasts)
    positions = tuple(n for n in rest if n in OFFSETS | POSITIONS and n not in pasts)
    known = {*inputs, *flags, *pasts, *masks, *positions}
    unknown = tuple(n for n in rest if n not in known)
    strange = tuple(n for n in unknown if named[n].default is inspect.Parameter.empty)
    return Signature(text, inputs, pasts, flags, masks, positions, unknown, strange, named)


def _switch(parameter: inspect.Parameter) -> bool:
    """Whether a parameter is a bool; a ``cache`` without a word about it is not."""
    if isinstance(parameter.default, bool) or parameter.annotation in (bool, "bool"):
        return True
    return parameter.name not in PASTS and parameter.default in (None, inspect.Parameter.empty)


def position_forms(sig: Signature, name: str) -> tuple[str, ...]:
    """What a position parameter may be given, the likeliest first."""
    number = "cached"
    row = "torch.arange(cached, cached + new, device=x.device)"
    grid = f"{row}.expand(batch, new)"
    noted = sig.annotation(name)
    if "int" in noted or isinstance(sig.default(name), int):
        return number, row, grid
    if "Tensor" in noted or name in ("cache_position", "cache_positions", "input_pos"):
        return row, grid, number
    return (number, row, grid) if name in OFFSETS else (grid, row, number)


def mask_forms(name: str) -> tuple[str, ...]:
    """What a mask parameter may be given where leaving it out is not possible, or shows tokens their future."""
    shape = "new, cached + new"
    seen = f"torch.ones({shape}, dtype=torch.bool, device=x.device).tril(cached)"
    added = f"torch.full(({shape}), -torch.inf, device=x.device).triu(cached + 1)"
    hidden = f"torch.ones({shape}, dtype=torch.bool, device=x.device).triu(cached + 1)"
    rows = ("torch.ones(batch, cached + new, dtype=torch.long, device=x.device)",) if name == "attention_mask" else ()
    square = (seen, added, hidden)
    return (*rows, *square, *(f"{form}[None, None]" for form in square))


def settings(sig: Signature, *, placed: bool = False) -> Iterator[dict[str, str]]:
    """Ways to give masks and positions, the likeliest first: what may be left out is left out. A position whose default
    is a number must be given, since that number is right on an empty cache alone. placed: all positions are given."""
    wanted: list[list[tuple[str, str | None]]] = []
    for name in sig.positions:
        given = placed or sig.required(name) or isinstance(sig.default(name), int)
        wanted.append([(name, form) for form in position_forms(sig, name)] if given else [(name, None)])
    for name in sig.masks:
        wanted.append([(name, None), *((name, form) for form in mask_forms(name))])
        if sig.required(name):
            wanted[-1][0] = (name, "None")
            if name == "attention_mask":
                wanted[-1].append(wanted[-1].pop(0))  # a required one is rarely None
    for choice in _product(wanted):
        yield {name: form for name, form in choice if form is not None}


def _product(lists: list[list[tuple[str, str | None]]]) -> Iterator[tuple[tuple[str, str | None], ...]]:
    if not lists:
        yield ()
        return
    for head in lists[0]:
        for tail in _product(lists[1:]):
            yield (head, *tail)


def written(sig: Signature, given: Mapping[str, str], name: str = "module") -> str:
    """The call in Python: inputs by position, everything else by its name."""
    keyword_only = inspect.Parameter.KEYWORD_ONLY
    inputs = [f"{n}=x" if sig.parameters[n].kind is keyword_only else "x" for n in sig.inputs]
    rest = []
    for n, form in given.items():
        positional = sig.parameters[n].kind is inspect.Parameter.POSITIONAL_ONLY
        rest.append(form if positional else f"{n}={form}")
    return f"{name}({', '.join(inputs + rest)})"


def extended(call: str, name: str, form: str) -> str:
    """The call with one argument more."""
    return f"{call[:-1]}, {name}={form})"


def concrete(expression: str, numbers: Mapping[str, int | str], device: str = "cpu") -> str:
    """The expression with names replaced by what they are at one step; the device is left out where it is the CPU."""
    text = expression if device != "cpu" else expression.replace(", device=x.device", "")
    for name, value in numbers.items():
        text = re.sub(rf"(?<![\w.]){name}(?![\w=])", str(value), text)
    text = re.sub(r"\b(\d+) \+ (\d+)\b", lambda found: str(int(found[1]) + int(found[2])), text)
    return text
