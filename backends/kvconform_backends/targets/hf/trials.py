"""Finds by trial how a model of transformers is called, and what its cache can do."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer
from transformers.generation.utils import ALL_CACHE_NAMES

from kvconform.errors import BackendUnavailable
from kvconform_backends.targets.hf.recipe import Calls, tokens_of
from kvconform_backends.targets.hf.target import HfSequence, Transformers
from kvconform_backends.targets.third_party import ThirdPartyError, guarded, largest
from kvconform_specs.config import Config

PROMPT, MORE = 5, 3
"""Tokens of a trial: the first call, and the next one."""
NEAR = 0.02
"""Outputs of a trial agree if they differ by less than this fraction of their spread. It only decides how a model is
called; its verdict does not depend on it."""
RENAMED = {"mems": "past_key_values", "past_buckets_states": "past_key_values"}
"""Caches that are returned under another name than they are given."""
OTHERS = "its outputs are others"
SLOTTED = {StaticLayer, StaticSlidingWindowLayer}
"""Layers with a slot for each token, also for those that have not come yet."""


def calls_of(model: Any, backend: Callable[[Calls], Transformers]) -> tuple[Calls, tuple[str, ...]]:
    """How the model is called, and what is to be said about it. Raises BackendUnavailable if it is not a decoder."""
    calls = Calls(
        makes_cache=model._supports_default_dynamic_cache(),
        given_as="cache_params" if "mamba" in type(model).__name__.lower() else "past_key_values",
        positions="position_ids" in inspect.signature(model.forward).parameters,
    )
    tried = backend(calls)
    tokens = np.array([tokens_of(tried.config, PROMPT + MORE)] * 2)
    whole = tried.uncached_forward(tokens)
    _refuse_other_models(model, tried, tokens, whole)
    returned, states = _returned(model, tokens[:, :PROMPT], calls)
    calls = replace(calls, returned_as=returned, states=states)
    if not calls.makes_cache:
        calls = replace(calls, given_as=RENAMED.get(returned, returned))
    ways = [calls, replace(calls, positions=False), replace(calls, prepared=False)]
    before: list[str] = []  # what the first way raised
    for way in ways if calls.positions else ways[::2]:
        reasons: list[str] = []
        for one_by_one in ("never", "after the first", "always"):
            candidate: Calls = replace(way, one_by_one=one_by_one)
            try:
                with guarded():
                    near, recurrent = _continued(backend(candidate), tokens, whole)
            except ThirdPartyError as words:
                reasons.append(f"it raises {words}")
                continue
            if near or (way is calls and not recurrent):
                return candidate, _said(candidate, way is not calls and way.prepared, before, reasons)
            reasons.append(OTHERS)
        if OTHERS in reasons:
            break  # a way that runs and is wrong is a mistake, and no reason for another one
        before = before or reasons
    return calls, ()


def longest(model: Any, config: Config) -> int:
    """The most tokens, up to the config's capacity, that the forward takes: position ids may begin above 0."""

    def works(count: int) -> bool:
        with suppress(ThirdPartyError), guarded(), torch.no_grad():
            model(input_ids=torch.tensor([tokens_of(config, count)]), use_cache=False)
            return True
        return False

    return config.capacity if works(config.capacity) else largest(1, config.capacity - 1, works)


def _said(calls: Calls, unplaced: bool, before: list[str], reasons: list[str]) -> tuple[str, ...]:
    """``unplaced``: whether the model takes positions, and works without them only. ``before``: what the likeliest way
    raised; ``reasons``: why this way was not taken for several tokens."""
    said = []
    if calls.states:
        said.append(
            f"its modules keep states in {' and '.join(calls.states)}: it holds one sequence at a time, and the "
            "reference is run in a separate process"
        )
    if unplaced:
        said.append(f"it is given no positions: with them, {before[0]}")
    if not calls.prepared:
        said.append(f"its forward is called directly: with prepare_inputs_for_generation {before[0]}")
    if calls.one_by_one != "never":
        when = "it" if calls.one_by_one == "always" else "after the first call it"
        said.append(f"{when} is given one token at a time: given several, {reasons[0]}")
    return tuple(said)


def _refuse_other_models(model: Any, tried: Transformers, tokens: Any, whole: Any) -> None:
    name = type(model).__name__
    if whole.shape[:2] != tokens.shape:
        raise BackendUnavailable(
            f"{name} is not a decoder: for 2 rows of {tokens.shape[1]} tokens it gives {whole.shape}"
        )
    changed = tokens.copy()
    changed[:, -1] = tokens[:, 0]
    moved = np.abs(tried.uncached_forward(changed) - whole)[:, :-1].max()
    if moved > NEAR * whole.std():
        raise BackendUnavailable(f"{name} is not a decoder: outputs of earlier tokens depend on later ones")


def refuse_without_cache(kind: Any) -> None:
    """Raises BackendUnavailable for a model class whose forward takes no cache."""
    if kind is not None and not set(ALL_CACHE_NAMES) & set(inspect.signature(kind.forward).parameters):
        raise BackendUnavailable(
            f"{kind.__name__} is not a decoder with a cache: its forward takes none of {', '.join(ALL_CACHE_NAMES)}"
        )


def _returned(model: Any, tokens: Any, calls: Calls) -> tuple[str, tuple[str, ...]]:
    """The name of the cache in the model's output, empty if it is only modified in place; and the attributes in which
    the model keeps a state if it does not return its cache."""
    before = _attributes(model)
    with torch.no_grad():
        output = model(input_ids=torch.from_numpy(tokens[:, :1]), use_cache=True, return_dict=True)
    for name in ALL_CACHE_NAMES:
        if getattr(output, name, None) is not None:
            return str(name), ()
    states = {place: value for place, value in _attributes(model).items() if before.get(place) is not value}
    if states and calls.makes_cache:
        return "", tuple(dict.fromkeys(name for _module, name in states))
    raise BackendUnavailable(f"{type(model).__name__} is not a decoder with a cache: its output has none")


def _attributes(model: Any) -> dict[tuple[str, str], torch.Tensor]:
    """The tensors among the attributes of its modules that are neither weights nor buffers."""
    return {
        (path, name): value
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, torch.Tensor)
    }


def _continued(backend: Transformers, tokens: Any, whole: Any) -> tuple[bool, bool]:
    """Whether a prompt and what follows give the outputs of the whole, and whether the cache has recurrent layers."""
    first, sequence = backend.step(backend.start(2), tokens[:, :PROMPT])
    rest, sequence = backend.step(sequence, tokens[:, PROMPT:])
    got = np.concatenate([first, rest], 1)
    near = got.shape == whole.shape and float(np.abs(got - whole).max()) < NEAR * float(whole.std())
    return near, any(getattr(sequence.cache, "is_linear", (True,)))


def offered(backend: Transformers) -> tuple[str, ...]:
    """Optional abilities of this cache. It has slots to poison if all layers are static ones; the others are found by
    trying them on a full cache: sliding layers, which have dropped older tokens, and static ones cannot be cropped. If
    a step raises, none of these is offered, and the clauses report the step."""
    tokens = np.array([tokens_of(backend.config, backend.config.capacity)] * 2)
    layers = {type(layer) for layer in getattr(backend.cache(), "layers", ())}
    found = ["poison"] if layers and layers <= SLOTTED else []
    attempts = {"length": _measured, "truncate": _cropped, "reorder": _reordered, "reset": _emptied}
    for ability, attempt in attempts.items():
        with suppress(ThirdPartyError), guarded():
            _, sequence = backend.step(backend.start(2), tokens)
            attempt(backend, sequence)
            found.append(ability)
    if not (backend.calls.prepared or backend.calls.positions):
        return tuple(found)  # nothing tells it at which position a padded row begins
    with suppress(ThirdPartyError), guarded():
        backend.step(backend.start(2), tokens[:, :PROMPT], np.array([PROMPT, MORE]), "left")
        found.append("ragged")
    return tuple(found)


def _measured(backend: Transformers, sequence: HfSequence) -> None:
    backend.length(sequence)


def _cropped(backend: Transformers, sequence: HfSequence) -> None:
    backend.truncate(sequence, backend.config.capacity - 1)


def _reordered(backend: Transformers, sequence: HfSequence) -> None:
    backend.reorder(sequence, [1, 0])


def _emptied(backend: Transformers, sequence: HfSequence) -> None:
    backend.reset(sequence)
