"""How a transformers model is built: here, and identically as Python source for a reproduction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from kvconform_specs.config import Config
from kvconform_specs.describe import describe
from kvconform_specs.program import (
    Append,
    Close,
    Fork,
    Program,
    Reject,
    Reorder,
    Reset,
    Step,
    Truncate,
    UncachedForward,
    called,
)

SPREAD = 0.2
"""Standard deviation of random weights: with the usual 0.02, attention is nearly uniform, which hides errors."""
WINDOW = 5
"""Shorter than most prompts of the suite."""
SIZES: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": 97,
        **dict.fromkeys(("hidden_size", "n_embd", "word_embed_proj_dim"), 32),
        **dict.fromkeys(("num_hidden_layers", "n_layer"), 2),
        **dict.fromkeys(("num_attention_heads", "n_head"), 4),
        **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
        **dict.fromkeys(("head_dim", "query_pre_attn_scalar"), 8),
        **dict.fromkeys(("intermediate_size", "ffn_dim", "ffn_hidden_size"), 48),
        "moe_intermediate_size": 24,
        **dict.fromkeys(("num_local_experts", "num_experts"), 4),
        "num_experts_per_tok": 2,
        **dict.fromkeys(("max_position_embeddings", "n_positions"), 40),
        **dict.fromkeys(("sliding_window", "attention_chunk_size"), WINDOW),
        **dict.fromkeys(("initializer_range", "init_std"), SPREAD),
    }
)
"""Values of config fields for a tiny model, for the fields that are set."""
SPECIAL: Mapping[str, int] = MappingProxyType({"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2})
MIXED_LAYERS = 4
"""Layers of a tiny model with several layer types, which alternate."""
CAPACITY = 40
"""Maximum length of a sequence, unless the model has fewer positions: programs stay short."""


def tiny(plain: PreTrainedConfig) -> dict[str, Any]:
    """The fields that make a config of this class tiny."""
    given = plain.to_dict()
    fields = {name: size for name, size in SIZES.items() if given.get(name) is not None}
    fields |= {name: token for name, token in SPECIAL.items() if hasattr(plain, name)}
    types = list(dict.fromkeys(given.get("layer_types") or ()))
    if len(types) > 1:
        fields["num_hidden_layers"] = MIXED_LAYERS
        fields["layer_types"] = [types[layer % len(types)] for layer in range(MIXED_LAYERS)]
    return fields


def config_of(config: PreTrainedConfig, dtype: str) -> Config:
    """The model's config as a suite config, as far as it can be expressed."""
    text = config.get_text_config(decoder=True)
    heads, width = int(text.num_attention_heads), int(text.hidden_size)
    kv_heads = getattr(text, "num_key_value_heads", None) or getattr(text, "num_kv_heads", None) or heads
    if getattr(text, "multi_query", False) and not getattr(text, "new_decoder_architecture", False):
        kv_heads = 1
    types = set(getattr(text, "layer_types", None) or ())
    windows = [getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size")]
    window = next((size for size in windows if size), None) if types != {"full_attention"} else None
    limit = getattr(text, "max_position_embeddings", None) or CAPACITY
    tokens: list[int] = []
    for special in SPECIAL:
        token = getattr(text, special, None)
        tokens += token if isinstance(token, list) else [] if token is None else [token]
    return Config(
        "decoder",
        heads=heads,
        kv_heads=kv_heads if heads % kv_heads == 0 else heads,
        head_dim=getattr(text, "head_dim", None) or width // heads,
        capacity=min(CAPACITY, limit),
        window=window if window is not None and window < CAPACITY else None,
        window_every=2 if len(types) > 1 else 1,
        dtype=dtype,
        layers=text.num_hidden_layers,
        width=width,
        vocabulary=text.vocab_size,
        reserved=tuple(sorted({token for token in tokens if 0 <= token < text.vocab_size})),
    )


def tokens_of(config: Config, count: int) -> list[int]:
    """Tokens that programs may use."""
    allowed = np.setdiff1d(np.arange(config.vocabulary), config.reserved)
    return [int(token) for token in np.resize(allowed, count)]


@dataclass(frozen=True)
class Recipe:
    """A causal language model, and the cache it is run with.

    origin: a local directory, or the name of a config class. fields: changed fields of its config. weights: whether the
    directory contains weights; else they are random, from ``seed``. attention, experts: their implementations; None is
    the model's default. cache: ``dynamic`` or ``static``.
    """

    origin: str
    directory: bool
    fields: Mapping[str, Any]
    weights: bool
    cache: str
    attention: str | None
    experts: str | None
    dtype: str
    seed: int

    @property
    def cache_class(self) -> str:
        return "StaticCache" if self.cache == "static" else "DynamicCache"

    @property
    def source(self) -> str:
        """The file whose modification invalidates earlier results; empty if there is none."""
        return str(Path(self.origin) / "config.json") if self.directory else ""

    def config(self) -> PreTrainedConfig:
        made: PreTrainedConfig
        if self.directory:
            made = AutoConfig.from_pretrained(
                self.origin, local_files_only=True, trust_remote_code=False, **self.fields
            )
        else:
            made = getattr(transformers, self.origin)(**self.fields)
        return made

    def model(self) -> Any:
        """A ``PreTrainedModel``. Raises transformers' exceptions. The global random state is preserved."""
        how = {"attn_implementation": self.attention, "dtype": getattr(torch, self.dtype)}
        make: Any = AutoModelForCausalLM
        if self.weights:
            made = make.from_pretrained(
                self.origin, config=self.config(), local_files_only=True, trust_remote_code=False, **how
            )
        else:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed)
                made = make.from_config(self.config(), trust_remote_code=False, **how)
        if self.experts is not None:
            made.set_experts_implementation(self.experts)
        return made.eval()

    # --- as Python source ---
    def setup(self, capacity: int, positions: bool) -> str:
        """Defines ``model``, ``empty()`` and ``step(cache, ids)``; ``positions``: whether the model takes positions."""
        kind = "AutoConfig" if self.directory else self.origin
        fields = ", ".join(f"{name}={value!r}" for name, value in self.fields.items())
        how = f"attn_implementation={self.attention!r}, dtype=torch.{self.dtype}"
        if self.directory:
            config = f"AutoConfig.from_pretrained({self.origin!r}, local_files_only=True{', ' * bool(fields)}{fields})"
        else:
            config = f"{kind}({fields})"
        if self.weights:
            model = f"from_pretrained({self.origin!r}, config=config, local_files_only=True, {how})"
        else:
            model = f"from_config(config, {how})"
        limit = f", max_cache_len={capacity}" if self.cache == "static" else ""
        return SETUP.format(
            names=", ".join(sorted({"AutoModelForCausalLM", kind, self.cache_class})),
            config=config,
            model=model,
            seed="" if self.weights else f"torch.manual_seed({self.seed})\n",
            limit=limit,
            cache=self.cache_class,
            experts="" if self.experts is None else f"model.set_experts_implementation({self.experts!r})\n",
            positions="position_ids=mask.cumsum(-1) - 1, " if positions else "",
        )


SETUP = '''\
import copy
from types import SimpleNamespace

import torch
from transformers import {names}

torch.set_grad_enabled(False)
{seed}config = {config}
model = AutoModelForCausalLM.{model}.eval()
{experts}

def empty():
    return SimpleNamespace(cache={cache}(config=model.config.get_text_config(decoder=True){limit}), ids=None)


def step(held, x):
    """Like ``generate``: appends tokens (b, t) to the cache and returns their logits (b, t, V)."""
    new, past = torch.from_numpy(x), int(held.cache.get_seq_length())
    ids = new if held.ids is None else torch.cat([held.ids, new], 1)
    mask = torch.ones_like(ids)
    inputs = model.prepare_inputs_for_generation(
        ids, next_sequence_length=new.shape[1], past_key_values=held.cache, attention_mask=mask,
        {positions}use_cache=True, is_first_iteration=past == 0
    )
    output = model(**inputs)
    held.cache, held.ids = output.past_key_values, ids
    return output.logits[:, -new.shape[1]:].float().numpy()
'''


def steps(program: Program, tag: str) -> str:
    """The program's steps as Python source after ``Recipe.setup``; sequences are entries of a dict."""
    lines, held = [f"caches{tag} = {{}}"], dict[str, int]()
    for number, step in enumerate(program.steps):
        call = called(step)
        if isinstance(call, Append) and call.seq not in held:
            lines.append(f"caches{tag}[{call.seq!r}] = empty()")
        lines.append(f"{_line(step, number, tag, held)}  # step {number}: {describe(program, number)}")
        if isinstance(call, Append):
            held[call.seq] = held.get(call.seq, 0) + call.counts[0]
        elif isinstance(call, Fork):
            held[call.into] = held[call.seq]
        elif isinstance(call, Close):
            del held[call.seq]
        elif isinstance(call, Truncate | Reset) and not isinstance(step, Reject):
            held[call.seq] = call.lengths(1)[0] if isinstance(call, Truncate) else 0
    return "\n".join(lines) + "\n"


def _line(step: Step, number: int, tag: str, held: Mapping[str, int]) -> str:
    """``held``: the length of each sequence."""
    call = called(step)
    if isinstance(call, UncachedForward):
        return f"y{tag}{number} = model(torch.from_numpy(x{tag}{number}), use_cache=False).logits.float().numpy()"
    cache = f"caches{tag}[{call.seq!r}]"
    if isinstance(step, Reject):
        return "pass  # refused by the backend, so that nothing is called:"
    if isinstance(call, Append):
        return f"y{tag}{number} = step({cache}, x{tag}{number})"
    if isinstance(call, Truncate):
        (length,) = call.lengths(1)
        return f"{cache}.cache.crop({length - held[call.seq]}); {cache}.ids = {cache}.ids[:, :{length}]"
    if isinstance(call, Reorder):
        rows = list(call.rows)
        if not held[call.seq]:
            return f"{cache} = empty()"
        return f"{cache}.cache.reorder_cache(torch.tensor({rows})); {cache}.ids = {cache}.ids[{rows}]"
    if isinstance(call, Fork):
        return f"caches{tag}[{call.into!r}] = copy.deepcopy({cache})"
    if isinstance(call, Reset):
        return f"{cache}.cache.reset(); {cache}.ids = None"
    if isinstance(call, Close):
        return f"del {cache}"
    raise ValueError(f"steps[{number}]: transformers has no call for {type(call).__name__}")
