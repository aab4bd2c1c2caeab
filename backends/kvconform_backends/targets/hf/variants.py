"""A model of transformers with one thing changed in each variant, as exports have changed it.

They name what another artefact with the same weights computes; no verdict depends on them. Exports that have lost a
window: onnxruntime/mobius#371, labscommunity/cascadia#151.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

Variant = Callable[[torch.Tensor], Any]
"""Token ids ``(b, t)`` to the model's output."""
UNLIMITED = 1 << 20
"""More tokens than any sequence has."""
ALIGNMENTS = (8, 16, 32, 64, 128)
"""What kernels pad a head dim to a multiple of."""


def variants(model: Any) -> Iterator[tuple[str, Variant]]:
    """What completes "what the reference gives ...", and the model changed so."""
    text = model.config.get_text_config(decoder=True)
    types = getattr(text, "layer_types", None) or ()
    if getattr(text, "sliding_window", None) and (not types or set(types) != {"full_attention"}):
        yield "without its window", _forward(_rebuilt(model, sliding_window=UNLIMITED))
    for name, words in (("attn_logit_softcapping", "scores"), ("final_logit_softcapping", "logits")):
        if getattr(text, name, None):
            yield f"without its soft cap of {words}", _forward(_rebuilt(model, **{name: None}))
    factors = getattr(text, "rope_parameters", None) or {}
    if factors.get("rope_type", "default") != "default":
        plain = {"rope_type": "default", "rope_theta": factors.get("rope_theta", 10000.0)}
        yield "without its scaling of rotary factors", _forward(_rebuilt(model, rope_parameters=plain))
    yield from _scaled(model)
    heads, groups = getattr(text, "num_attention_heads", 1), getattr(text, "num_key_value_heads", None) or 1
    mixed = _interleaved(model, heads, groups) if 1 < groups < heads else None
    if mixed is not None:
        yield "with its query heads dealt to the key heads in turn", _forward(mixed)
    yield "with positions that begin at 1", _shifted(model)


def _forward(model: Any) -> Variant:
    return lambda ids: model(input_ids=ids, use_cache=False, return_dict=True)


def _rebuilt(model: Any, **changes: Any) -> Any:
    """A model of another config with the same weights."""
    config = copy.deepcopy(model.config)
    for name, value in changes.items():
        setattr(config.get_text_config(decoder=True), name, value)
    config._attn_implementation = model.config._attn_implementation
    made = type(model)(config).to(model.device, model.dtype).eval()
    made.load_state_dict(model.state_dict())
    return made


def _scaled(model: Any) -> Iterator[tuple[str, Variant]]:
    """Scores scaled by the root of another head dim: the head's own, or one that is padded for a kernel."""
    layers = [module for module in model.modules() if isinstance(getattr(module, "scaling", None), float)]
    if not layers or not hasattr(layers[0], "head_dim"):
        return
    own = int(layers[0].head_dim)
    padded = {-(-own // alignment) * alignment for alignment in ALIGNMENTS}
    for size in sorted({own, *padded}):
        if abs(layers[0].scaling - size**-0.5) > 1e-6:
            changed = copy.deepcopy(model)
            for module in changed.modules():
                if isinstance(getattr(module, "scaling", None), float):
                    module.scaling = size**-0.5
            yield f"with scores scaled by the root of {size}, the head dim being {own}", _forward(changed)


@torch.no_grad()
def _interleaved(model: Any, heads: int, groups: int) -> Any:
    """A model in which query head ``i`` reads key head ``i % groups``, as its query heads are permuted so that it does
    in groups of neighbours. None if it has no projections of its queries that are known."""
    changed = copy.deepcopy(model)
    layers = [module for module in changed.modules() if hasattr(module, "q_proj") and hasattr(module, "o_proj")]
    places = torch.arange(heads).reshape(heads // groups, groups).T.reshape(-1)  # of old heads, in the new order
    for layer in layers:
        query, output = layer.q_proj, layer.o_proj
        if not (isinstance(query, nn.Linear) and isinstance(output, nn.Linear)):
            return None
        rows = query.weight.reshape(heads, -1, query.in_features)
        query.weight.copy_(rows[places].reshape_as(query.weight))
        if query.bias is not None:
            query.bias.copy_(query.bias.reshape(heads, -1)[places].reshape_as(query.bias))
        columns = output.weight.reshape(output.out_features, heads, -1)
        output.weight.copy_(columns[:, places].reshape_as(output.weight))
    return changed if layers else None


def _shifted(model: Any) -> Variant:
    def forward(ids: torch.Tensor) -> Any:
        positions = torch.arange(1, ids.shape[1] + 1, device=ids.device).expand(ids.shape)
        return model(input_ids=ids, position_ids=positions, use_cache=False, return_dict=True)

    return forward
