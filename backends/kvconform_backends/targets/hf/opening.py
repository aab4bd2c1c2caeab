"""Opens an ``hf:`` target: builds the model, tries how it is called, and states what the backend claims."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedConfig

from kvconform.errors import BackendUnavailable
from kvconform_backends.targets.hf import trials
from kvconform_backends.targets.hf.recipe import (
    QUANTISED,
    Calls,
    Recipe,
    config_of,
    decoder_part,
    model_class,
    tokens_of,
)
from kvconform_backends.targets.hf.sizes import SPECIAL, SPREADS, spread, tiny
from kvconform_backends.targets.hf.target import Transformers, experts
from kvconform_backends.targets.third_party import ThirdPartyError, guarded
from kvconform_specs.claims import Claims
from kvconform_specs.config import DTYPES, Config
from kvconform_specs.quantisers import PLAIN, Quantiser

CACHES = ("dynamic", "static", *QUANTISED)
OPTIONS: Mapping[str, Any] = MappingProxyType(
    {
        "cache": "dynamic",
        "config": {},
        "attn_implementation": None,
        "experts_implementation": None,
        "dtype": "float32",
        "seed": 0,
        "all_tokens": False,
    }
)
"""Options after the ``?`` of an address, with their defaults. ``config``: fields of the model's config.
``attn_implementation``: None is the model's default. ``experts_implementation``: None is ``BATCHED_EXPERTS`` for a
model with experts. ``seed``: for random weights. ``all_tokens``: whether the logits of all tokens are kept, rather than
those of the first ``TOKENS``."""

QUANTISERS: Mapping[str, Quantiser] = MappingProxyType(
    {"quanto": Quantiser(zero_point="integer"), "hqq": Quantiser(zero_point="integer"), "fp8": Quantiser("float8_e4m3")}
)
"""How each quantised cache codes numbers, by its own defaults."""
BATCHED_EXPERTS = "batched_mm"
"""How experts are computed: one product per token. With transformers' default ``grouped_mm``, the tokens of an expert
share a product, so that other tokens change a token's rounding (116 of 200 tries, at most 4e-6)."""


def open_hf(target: str, options: Mapping[str, Any]) -> type[Transformers]:
    """The backend around a target. Raises BackendUnavailable."""
    for name in options:
        if name not in OPTIONS:
            raise BackendUnavailable(f"target hf:{target}: unknown option {name!r}; known: {', '.join(OPTIONS)}")
    chosen = {**OPTIONS, **options}
    for name, known in (("cache", CACHES), ("dtype", DTYPES)):
        if chosen[name] not in known:
            raise BackendUnavailable(f"target hf:{target}: {name} is {chosen[name]!r}; known: {', '.join(known)}")
    try:
        with guarded(), torch.no_grad():
            recipe, assumed = _recipe(target, chosen)
            model = recipe.model()
            if recipe.experts is None and experts(model) == "grouped_mm":
                recipe = replace(recipe, experts=BATCHED_EXPERTS)
                model.set_experts_implementation(BATCHED_EXPERTS)
                assumption = (
                    f"its experts use {BATCHED_EXPERTS}, since grouped_mm makes rounding depend on other tokens"
                )
                assumed = (*assumed, assumption)
            config = config_of(model.config, str(chosen["dtype"]))
            whole = model.config.get_text_config(decoder=True).vocab_size
            if chosen["all_tokens"]:
                config = replace(config, vocabulary=whole)
            if whole > config.vocabulary:
                recipe, model = _cut(recipe, model, config)
            config = replace(config, capacity=trials.longest(model, config))

            def backend(calls: Calls) -> Transformers:
                return _made(target, model, config, recipe, calls)(config, {})

            backend(Calls()).cache()  # the reason, where it cannot be made for this model or on this machine
            calls, said = trials.calls_of(model, backend)
            if recipe.cache != "dynamic" and not calls.makes_cache:
                raise BackendUnavailable(f"target hf:{target}: {type(model).__name__} makes its own cache")
    except ThirdPartyError as words:
        raise BackendUnavailable(
            f"target hf:{target}: transformers {transformers.__version__} raised {words}"
        ) from words
    made = _made(target, model, config, recipe, calls)
    made.assumed = (*assumed, *said, *_assumed(whole, config, calls))
    made.claims = _claims(config, recipe, calls, trials.offered(made(config, {})))
    return made


def _made(target: str, model: Any, config: Config, recipe: Recipe, calls: Calls) -> type[Transformers]:
    kind = type(model).__name__
    cache = recipe.cache_class if calls.makes_cache else "a cache of its own"
    cache += f" ({recipe.cache})" if recipe.cache in QUANTISED else ""
    cache += " and states in the module" if calls.states else ""
    attributes = {
        "configs": {"decoder-self": config},
        "made": model,
        "recipe": recipe,
        "calls": calls,
        "source": recipe.source,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "recognised": f"transformers {kind}, {cache}, {model.config._attn_implementation}",
        "assumed": (),
        "claims": _claims(config, recipe, calls, ()),
        "__module__": __name__,
        "__doc__": f"{kind} of {target}.",
    }
    return type(kind, (Transformers,), attributes)


@lru_cache(maxsize=1)
def gpt2() -> type[Transformers]:
    """The published design ``gpt2-transformers``: GPT-2 through transformers with its default cache. Published: 124
    million parameters, 1000 new tokens; here: a tiny model, since correctness does not depend on the size."""
    return open_hf("GPT2Config", {})


def __getattr__(name: str) -> Any:
    """Builds ``GPT2`` on demand: importing builds nothing."""
    if name == "GPT2":
        return gpt2()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _recipe(target: str, options: Mapping[str, Any]) -> tuple[Recipe, tuple[str, ...]]:
    """How the target is built, and the assumptions made."""
    directory, whole = Path(target).resolve(), None
    found = (directory / "config.json").is_file()
    kind = getattr(transformers, target, None)
    if found:
        plain = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        held = any(file.suffix == ".safetensors" or file.match("pytorch_model*.bin") for file in directory.iterdir())
        fields = {} if held else spread(plain.to_dict())
    elif isinstance(kind, type) and issubclass(kind, PreTrainedConfig):
        trials.refuse_without_cache(model_class(kind))
        plain, held = kind(), False
        whole, plain = plain, decoder_part(plain)
        fields = tiny(plain)
    else:
        raise BackendUnavailable(
            f"target hf:{target}: neither a local directory with a config.json nor a config class of transformers "
            f"{transformers.__version__} such as LlamaConfig; nothing is downloaded"
        )
    for name in options["config"]:
        if not hasattr(plain, name):
            raise BackendUnavailable(f"target hf:{target}: {type(plain).__name__} has no field {name!r}")
    parted = not found and whole is not None and plain is not whole
    recipe = Recipe(
        origin=str(directory) if found else type(plain).__name__,
        directory=found,
        fields={**fields, **options["config"]},
        weights=held,
        cache=options["cache"],
        attention=options["attn_implementation"],
        experts=options["experts_implementation"],
        dtype=options["dtype"],
        seed=options["seed"],
        maker=model_class(type(whole)).__name__ if parted and whole is not None else "AutoModelForCausalLM",
    )
    assumed = [] if found else [f"its sizes were scaled down: {_sizes(fields)}"]
    if parted:
        assumed.insert(0, f"it is made of the {type(plain).__name__} in the {target}")
    deviations = {recipe.fields[name] for name in SPREADS if name in recipe.fields}
    if held:
        assumed.append(f"its weights are those in {target}")
    else:
        size = f", of standard deviation {deviations.pop():g}, since 0.02 hides errors" if deviations else ""
        assumed.append(f"its weights are random (seed {recipe.seed}{size})")
    return recipe, tuple(assumed)


def _sizes(fields: Mapping[str, Any], path: str = "") -> str:
    """The changed numbers of a config, and the kinds of its layers."""
    said = [f"{path}{name}={value}" for name, value in fields.items() if type(value) is int and name not in SPECIAL]
    for name, value in fields.items():
        if name == "layer_types":
            said.append(f"{path}{name}={', '.join(dict.fromkeys(value))}")
        elif isinstance(value, dict):
            said += [_sizes(value, f"{path}{name}.")] if any(type(v) is int for v in value.values()) else []
    return ", ".join(said)


def _cut(recipe: Recipe, model: Any, config: Config) -> tuple[Recipe, Any]:
    """The model with the embeddings of those tokens alone that programs use, where their logits stay the same: of a
    small model they are most of its weights."""
    ids = torch.tensor([tokens_of(config, 8)])
    before = model(input_ids=ids, use_cache=False).logits[..., : config.vocabulary]
    with suppress(ThirdPartyError), guarded():
        model.resize_token_embeddings(config.vocabulary)
        after = model(input_ids=ids, use_cache=False).logits
        if after.shape == before.shape and bool((after - before).abs().max() < trials.NEAR * before.std()):
            return replace(recipe, tokens=config.vocabulary), model
    return recipe, recipe.model()


def _assumed(whole: int, config: Config, calls: Calls) -> tuple[str, ...]:
    how = "it is called like in generate: all token ids" if calls.prepared else "it is given the new token ids"
    said = [
        f"{how}, an attention mask and the corresponding positions; rows of different lengths have their padding on "
        "the left"
    ]
    if whole > config.vocabulary:
        said.append(f"of its {whole} tokens the first {config.vocabulary} are used, and their logits are compared")
    if config.reserved:
        said.append(f"tokens {', '.join(map(str, config.reserved))} are special and not used")
    return tuple(said)


def _claims(config: Config, recipe: Recipe, calls: Calls, offered: tuple[str, ...]) -> Claims:
    """A model that keeps states in its modules holds one sequence, which a call without a cache ends."""
    return Claims(
        profiles=("decoder",),
        abilities=offered if calls.states else ("uncached_forward", "fork", *offered),
        max_sequences=1 if calls.states else None,
        padding=("left",),
        ragged_appends="first",
        dtypes=(config.dtype,),
        devices=("cpu", "cuda"),
        memory="capacity" if recipe.cache == "static" else "length",
        reference="self",
        kv_bits=0 if recipe.cache not in QUANTISED else 8 if recipe.cache == "fp8" else 4,
        quantiser=QUANTISERS.get(recipe.cache, PLAIN),
    )
