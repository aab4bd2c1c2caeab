"""``hf:`` targets: a causal language model of transformers as a black box, judged by its own uncached forward.

The target is a local directory with a ``config.json``, or the name of a config class (``LlamaConfig``), of which a tiny
instance is built. Nothing is downloaded. A step does what ``generate`` does between two tokens, for any number of them:
``prepare_inputs_for_generation`` with an attention mask of ones and the corresponding positions, then the model.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from transformers import AutoConfig, DynamicCache, PreTrainedConfig, StaticCache
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

from kvconform.backend import BlackBox
from kvconform.errors import BackendUnavailable, Unavailable
from kvconform_backends.targets import black_box
from kvconform_backends.targets.hf import recipe
from kvconform_backends.targets.hf.recipe import SPREAD, Recipe, config_of, tiny, tokens_of
from kvconform_backends.targets.third_party import ThirdPartyError, guarded
from kvconform_backends.torch import device_time
from kvconform_backends.validation import check_length, check_rows
from kvconform_specs.claims import Claims
from kvconform_specs.config import DTYPES, Config
from kvconform_specs.program import Program

Array = NDArray[Any]

CACHES = ("dynamic", "static")
OPTIONS: Mapping[str, Any] = MappingProxyType(
    {
        "cache": "dynamic",
        "config": {},
        "attn_implementation": None,
        "experts_implementation": None,
        "dtype": "float32",
        "seed": 0,
    }
)
"""Options after the ``?`` of an address, with their defaults. ``config``: fields of the model's config.
``attn_implementation``: None is the model's default. ``experts_implementation``: None is ``BATCHED_EXPERTS`` for a
model with experts. ``seed``: for random weights."""
SLOTTED = {StaticLayer, StaticSlidingWindowLayer}
"""Layers with a slot for each token, also for those that have not come yet."""
BATCHED_EXPERTS = "batched_mm"
"""How experts are computed: one product per token. With transformers' default ``grouped_mm``, the tokens of an expert
share a product, so that other tokens change a token's rounding (116 of 200 tries, at most 4e-6)."""


@dataclass
class HfSequence:
    """A transformers cache, which knows its length but not always its batch size, and its token ids ``(b, s)``."""

    cache: Any
    ids: torch.Tensor

    @property
    def batch(self) -> int:
        return len(self.ids)


class Transformers(BlackBox):
    """One model with one cache design; ``open_hf`` creates a subclass with the class attributes."""

    claims: Claims
    configs: Mapping[str, Config]
    recognised: str
    assumed: tuple[str, ...]
    source: str
    recipe: Recipe
    made: Any

    def __init__(self, config: Config, weights: Mapping[str, NDArray[np.float32]], device: str = "cpu") -> None:
        if device == "cuda" and not torch.cuda.is_available():
            raise Unavailable(f"torch {torch.__version__} finds no CUDA device on this machine")
        torch.set_float32_matmul_precision("highest")  # no TF32
        self.config, self.device = config, device
        self.model: Any = self.made.to(device)
        self.seen_on: str | None = None  # the device of the last logits
        self.takes_positions = "position_ids" in inspect.signature(self.model.forward).parameters

    # --- the cache ---
    def cache(self) -> Any:
        """An empty cache, as created by ``generate``."""
        text = self.model.config.get_text_config(decoder=True)
        if self.recipe.cache == "static":
            return StaticCache(config=text, max_cache_len=self.config.capacity)
        return DynamicCache(config=text)

    def start(self, batch: int) -> HfSequence:
        return HfSequence(self.cache(), torch.zeros(batch, 0, dtype=torch.long, device=self.device))

    @torch.no_grad()
    def step(self, sequence: HfSequence, tokens: Array) -> tuple[Array, HfSequence]:
        new = torch.from_numpy(tokens).to(self.device)
        past, ids = int(sequence.cache.get_seq_length()), torch.cat([sequence.ids, new], 1)
        mask = torch.ones_like(ids)
        positions = {"position_ids": mask.cumsum(-1) - 1} if self.takes_positions else {}
        inputs = self.model.prepare_inputs_for_generation(
            ids,
            next_sequence_length=new.shape[1],
            past_key_values=sequence.cache,
            attention_mask=mask,
            use_cache=True,
            is_first_iteration=past == 0,
            **positions,
        )
        output = self.model(**inputs, return_dict=True)
        sequence.cache, sequence.ids = output.past_key_values, ids
        # a model may drop its cache and compute all tokens again, for example where its rotary factors change
        return self._given(output.logits[:, -new.shape[1] :]), sequence

    def length(self, sequence: HfSequence) -> list[int]:
        return [int(sequence.cache.get_seq_length())] * sequence.batch

    def reset(self, sequence: HfSequence) -> HfSequence:
        sequence.cache.reset()
        sequence.ids = sequence.ids[:, :0]
        return sequence

    def truncate(self, sequence: HfSequence, length: int) -> HfSequence:
        """``crop`` takes the number of tokens to drop, and drops all if there are fewer."""
        held = int(sequence.cache.get_seq_length())
        check_length(length, held)
        if length < held:
            sequence.cache.crop(length - held)
            sequence.ids = sequence.ids[:, :length]
        return sequence

    @torch.no_grad()
    def reorder(self, sequence: HfSequence, rows: list[int]) -> HfSequence:
        """An empty cache keeps its original batch size (transformers#42454): it is created again."""
        check_rows(rows, sequence.batch)
        if not sequence.cache.get_seq_length():
            return self.start(len(rows))
        sequence.cache.reorder_cache(torch.tensor(rows, device=self.device))
        sequence.ids = sequence.ids[rows]
        return sequence

    def fork(self, sequence: HfSequence) -> HfSequence:
        """A deep copy of the cache, as used for prefix reuse in practice."""
        return copy.deepcopy(sequence)

    @torch.no_grad()
    def poison(self, sequence: HfSequence, keys: float | None, values: float | None) -> None:
        """Static layers: a layer with a window has no unused slot from the window on."""
        length = int(sequence.cache.get_seq_length())
        for layer in sequence.cache.layers:
            if layer.is_initialized:
                for number, buffer in ((keys, layer.keys), (values, layer.values)):
                    if number is not None:
                        buffer[:, :, length:] = number

    # --- reference ---
    @torch.no_grad()
    def uncached_forward(self, tokens: Array) -> Array:
        ids = torch.from_numpy(tokens).to(self.device)
        return self._given(self.model(input_ids=ids, use_cache=False, return_dict=True).logits)

    def _given(self, logits: torch.Tensor) -> Array:
        self.seen_on = logits.device.type
        return black_box.widened(logits)

    def perturbed(self, storage: float, accumulation: float, seed: int) -> Transformers:
        other = copy.copy(self)
        other.model = black_box.perturbed(self.model, storage, accumulation, seed)
        return other

    # --- what ran ---
    def runtime_info(self) -> dict[str, Any]:
        cache = self.cache()
        return {
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "model": type(self.model).__name__,
            "cache": type(cache).__name__,
            "layers": [type(layer).__name__ for layer in cache.layers],
            "attention": self.model.config._attn_implementation,
            "experts": _experts(self.model),
            "device": self.seen_on,
            "precision": device_time.precision(self.model.dtype, self.device),
        }

    def synchronise(self) -> None:
        device_time.synchronise(self.device)

    def script_setup(self) -> str:
        return self.recipe.setup(self.config.capacity, self.takes_positions)

    def script(self, program: Program, tag: str) -> str:
        return recipe.steps(program, tag)


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
            if recipe.experts is None and _experts(model) == "grouped_mm":
                recipe = replace(recipe, experts=BATCHED_EXPERTS)
                model.set_experts_implementation(BATCHED_EXPERTS)
                assumption = (
                    f"its experts use {BATCHED_EXPERTS}, since grouped_mm makes rounding depend on other tokens"
                )
                assumed = (*assumed, assumption)
            config = config_of(model.config, str(chosen["dtype"]))
            model(input_ids=torch.tensor([tokens_of(config, 2)]), use_cache=False)
    except ThirdPartyError as words:
        raise BackendUnavailable(
            f"target hf:{target}: transformers {transformers.__version__} raised {words}"
        ) from words
    kind = type(model).__name__
    attributes = {
        "configs": {"decoder-self": config},
        "made": model,
        "recipe": recipe,
        "source": recipe.source,
        "recognised": f"transformers {kind}, {recipe.cache_class}, {model.config._attn_implementation}",
        "assumed": (*assumed, *_assumed(config)),
        "claims": _claims(config, recipe, ()),
        "__module__": __name__,
        "__doc__": f"{kind} of {target}.",
    }
    backend: type[Transformers] = type(kind, (Transformers,), attributes)
    backend.claims = _claims(config, recipe, _offered(backend(config, {})))
    return backend


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
    directory = Path(target).resolve()
    found = (directory / "config.json").is_file()
    kind = getattr(transformers, target, None)
    if found:
        plain = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        held = any(file.suffix == ".safetensors" or file.match("pytorch_model*.bin") for file in directory.iterdir())
        fields = {} if held else {name: SPREAD for name in ("initializer_range", "init_std") if hasattr(plain, name)}
    elif isinstance(kind, type) and issubclass(kind, PreTrainedConfig):
        plain, held = kind(), False
        fields = tiny(plain)
    else:
        raise BackendUnavailable(
            f"target hf:{target}: neither a local directory with a config.json nor a config class of transformers "
            f"{transformers.__version__} such as LlamaConfig; nothing is downloaded"
        )
    for name in options["config"]:
        if not hasattr(plain, name):
            raise BackendUnavailable(f"target hf:{target}: {type(plain).__name__} has no field {name!r}")
    recipe = Recipe(
        origin=str(directory) if found else target,
        directory=found,
        fields={**fields, **options["config"]},
        weights=held,
        cache=options["cache"],
        attention=options["attn_implementation"],
        experts=options["experts_implementation"],
        dtype=options["dtype"],
        seed=options["seed"],
    )
    assumed = [] if found else ["its sizes were chosen here and are tiny"]
    spread = {recipe.fields[name] for name in ("initializer_range", "init_std") if name in recipe.fields}
    if held:
        assumed.append(f"its weights are those in {target}")
    else:
        size = f", of standard deviation {spread.pop():g}, since 0.02 hides errors" if spread else ""
        assumed.append(f"its weights are random (seed {recipe.seed}{size})")
    return recipe, tuple(assumed)


def _assumed(config: Config) -> tuple[str, ...]:
    said = ["it is called like in generate: all token ids, an attention mask of ones and the corresponding positions"]
    if config.reserved:
        said.append(f"tokens {', '.join(map(str, config.reserved))} are special and not used")
    return tuple(said)


def _claims(config: Config, recipe: Recipe, offered: tuple[str, ...]) -> Claims:
    return Claims(
        profiles=("decoder",),
        abilities=("uncached_forward", "length", "reset", "fork", *offered),
        dtypes=(config.dtype,),
        devices=("cpu", "cuda"),
        memory="capacity" if recipe.cache == "static" else "length",
        reference="self",
    )


def _experts(model: Any) -> str | None:
    """The experts implementation of a model; None without experts or choice."""
    names = model.get_experts_implementation() if hasattr(model, "get_experts_implementation") else {}
    return dict(names).get("")


def _offered(backend: Transformers) -> tuple[str, ...]:
    """Optional abilities of this cache. It has slots to poison if all layers are static ones; the others are found by
    trying them on a full cache: sliding layers, which have dropped older tokens, and static ones cannot be cropped. If
    a step raises, none of these is offered, and the clauses report the step."""
    tokens = np.array([tokens_of(backend.config, backend.config.capacity)] * 2)
    offered = ["poison"] if {type(layer) for layer in backend.cache().layers} <= SLOTTED else []
    for ability, attempt in (("truncate", _cropped), ("reorder", _reordered)):
        with suppress(Exception):
            _, sequence = backend.step(backend.start(2), tokens)
            attempt(backend, sequence)
            offered.append(ability)
    return tuple(offered)


def _cropped(backend: Transformers, sequence: HfSequence) -> None:
    backend.truncate(sequence, backend.config.capacity - 1)


def _reordered(backend: Transformers, sequence: HfSequence) -> None:
    backend.reorder(sequence, [1, 0])
