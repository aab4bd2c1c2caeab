"""How a transformers model is built, and what is known of its calls."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import torch
import transformers
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedConfig

from kvconform_backends.targets.hf.sizes import POSITIONS, SPECIAL
from kvconform_specs.config import Config

QUANTISED: Mapping[str, int | None] = MappingProxyType({"quanto": 0, "hqq": 1, "fp8": None})
"""The backends of ``QuantizedCache``, and the axis with which the numbers of one token and head share a scale; None:
the backend takes no axis, and all numbers share one."""
RESIDUAL = 4
"""Tokens that a quantised cache keeps exactly before it quantises them: few, so that programs get beyond."""
TOKENS = 512
"""The most tokens of a vocabulary that programs use, and the logits that are compared: a wrong state moves all of them,
and those of 50 000 tokens take longer to compare than to compute."""


def config_of(config: PreTrainedConfig, dtype: str) -> Config:
    """The model's config as a suite config, as far as it can be expressed, with at most ``TOKENS`` tokens."""
    text = config.get_text_config(decoder=True)
    heads, width = _field(text, "num_attention_heads", "num_heads") or 1, _field(text, "hidden_size") or 1
    kv_heads = _field(text, "num_key_value_heads", "num_kv_heads") or heads
    if getattr(text, "multi_query", False) and not getattr(text, "new_decoder_architecture", False):
        kv_heads = 1
    types = set(getattr(text, "layer_types", None) or ())
    window = _field(text, "sliding_window", "attention_chunk_size") if types != {"full_attention"} else None
    limit = _field(text, "max_position_embeddings") or POSITIONS
    tokens: list[int] = []
    for special in SPECIAL:
        token = getattr(text, special, None)
        tokens += token if isinstance(token, list) else [] if token is None else [token]
    vocabulary = min(text.vocab_size, TOKENS)
    return Config(
        "decoder",
        heads=heads,
        kv_heads=kv_heads if heads % kv_heads == 0 else heads,
        head_dim=_field(text, "head_dim") or max(width // heads, 1),
        capacity=min(POSITIONS, limit),
        window=window if window is not None and window < POSITIONS else None,
        window_every=2 if len(types) > 1 else 1,
        dtype=dtype,
        layers=_field(text, "num_hidden_layers") or 1,
        width=width,
        vocabulary=vocabulary,
        reserved=tuple(sorted({token for token in tokens if 0 <= token < vocabulary})),
    )


def model_class(kind: type[PreTrainedConfig]) -> Any:
    """The class of the causal language model that transformers makes of a config class; None if there is none."""
    mapping: Any = MODEL_FOR_CAUSAL_LM_MAPPING
    made = mapping.get(kind, None)
    return made[0] if isinstance(made, tuple) else made


def decoder_part(config: PreTrainedConfig) -> PreTrainedConfig:
    """The part of a composite config that its causal language model is made of, where transformers does not choose it
    itself; otherwise the config."""
    wanted = getattr(model_class(type(config)), "config_class", None)
    if wanted is None or isinstance(config, wanted) or config.sub_configs.get("text_config") is wanted:
        return config
    parts = (getattr(config, name, None) for name in config.sub_configs)
    return next((part for part in parts if isinstance(part, wanted)), config)


def _field(config: PreTrainedConfig, *names: str) -> int | None:
    """The first of these fields that is a positive number; a field that differs from layer to layer is none."""
    for name in names:
        with suppress(AttributeError, RuntimeError):
            value = getattr(config, name, None)
            if isinstance(value, int) and value > 0:
                return value
    return None


def tokens_of(config: Config, count: int) -> list[int]:
    """Tokens that programs may use."""
    allowed = np.setdiff1d(np.arange(config.vocabulary), config.reserved)
    return [int(token) for token in np.resize(allowed, count)]


@dataclass(frozen=True)
class Calls:
    """How a model is called, as found by trial.

    makes_cache: whether the caller makes the first cache; otherwise the model does. given_as, returned_as: the names of
    the cache among the arguments and in the output; empty: it is not returned, and the one that was given is modified
    in place. states: attributes of its modules that keep a state from call to call. positions: whether the model takes
    ``position_ids``. prepared: whether its ``prepare_inputs_for_generation`` chooses the arguments. one_by_one: when
    tokens are given one at a time, since the model does not take several.
    """

    makes_cache: bool = True
    given_as: str = "past_key_values"
    returned_as: str = "past_key_values"
    states: tuple[str, ...] = ()
    positions: bool = True
    prepared: bool = True
    one_by_one: Literal["never", "after the first", "always"] = "never"


@dataclass(frozen=True)
class Recipe:
    """A causal language model, and the cache it is run with.

    origin: a local directory, or the name of a config class. maker: the class of transformers that makes the model.
    fields: changed fields of its config. weights: whether the directory contains weights; else they are random, from
    ``seed``. attention, experts: their implementations; None is the model's default. cache: ``dynamic``, ``static``, or
    a backend of ``QUANTISED``. tokens: how many tokens its embeddings are cut to; None: they are left as they are.
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
    maker: str = "AutoModelForCausalLM"
    tokens: int | None = None

    @property
    def cache_class(self) -> str:
        return {"static": "StaticCache", "dynamic": "DynamicCache"}.get(self.cache, "QuantizedCache")

    def cache_arguments(self, config: Config) -> dict[str, Any]:
        """The arguments of the cache's class, besides the config."""
        if self.cache == "static":
            return {"max_cache_len": config.capacity}
        if self.cache not in QUANTISED:
            return {}
        grouped: dict[str, Any] = {"q_group_size": config.head_dim, "residual_length": RESIDUAL}
        axis = QUANTISED[self.cache]
        return {"backend": self.cache} | ({} if axis is None else {"axis_key": axis, "axis_value": axis, **grouped})

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
        make: Any = getattr(transformers, self.maker)
        if self.weights:
            made = make.from_pretrained(
                self.origin, config=self.config(), local_files_only=True, trust_remote_code=False, **how
            )
        else:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed)
                made = self._from_config(make, self.config(), how)
        if self.experts is not None:
            made.set_experts_implementation(self.experts)
        if self.tokens is not None:
            made.resize_token_embeddings(self.tokens)
        return made.eval()

    def _from_config(self, make: Any, config: PreTrainedConfig, how: Mapping[str, Any]) -> Any:
        if self.maker == "AutoModelForCausalLM":
            return make.from_config(config, trust_remote_code=False, **how)
        return make._from_config(config, **how)
