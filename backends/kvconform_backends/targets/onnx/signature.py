"""The inputs and outputs of a decoder's ONNX graph by purpose, from their names and shapes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from kvconform.errors import BackendUnavailable
from kvconform_backends.targets.onnx.settings import Settings

Array = NDArray[Any]
Slot = tuple[tuple[int, ...], str]
"""The part of the cache that a name refers to: its numbers, starting with the layer, and ``key``, ``value`` or
empty."""

IDS = ("input_ids", "ids", "tokens", "token_ids", "input", "inputs")
STATES = ("inputs_embeds", "hidden_states", "inputs", "input", "x")
OUTPUTS = ("logits", "lm_logits", "last_hidden_state", "hidden_states", "output", "outputs")
POSITIONS, CACHE_POSITION, MASK, BRANCH = "position_ids", "cache_position", "attention_mask", "use_cache_branch"
WINDOW = "_sliding_window_tensor"
"""The end of the names of inputs for the number of tokens in a window, one for each layer, which come back as they are
(transformers' exporter)."""
KEPT = ("num_logits_to_keep", "logits_to_keep")
"""An integer: how many of the last positions give logits; 0 is all."""
PASTS = ("past_key_values", "past_key_value", "past_kvs", "past_kv", "past_states", "kv_cache", "past", "cache")
PRESENTS = ("present_key_values", "present_key_value", "present_kvs", "present_kv", "present_states", "present")
CONVENTIONS = (
    "input_ids or inputs_embeds; attention_mask, position_ids, cache_position, use_cache_branch; "
    "past_key_values.N.key and .value, past.N.key, past_key_N and past_value_N, past_N (2, b, h, s, d); "
    "present likewise; input.past_key_values.layers.N.keys and output.past_key_values.layers.N.keys; logits"
)
TAKEN, GIVEN = "input.", "output."
"""Prefixes of transformers' exporter, for a name that is both an input's and an output's."""
FLOATS = ("float16", "float32", "float64")

_PARTS = {"k": "key", "key": "key", "keys": "key", "v": "value", "value": "value", "values": "value"}
_SILENT = {"layer", "layers", "block", "blocks", "decoder", "self", "attn", "attention", "cache"}


@dataclass(frozen=True)
class Tensor:
    """An input or output; an axis is a size, or the name of a variable axis (empty: unnamed)."""

    name: str
    dtype: str
    axes: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} ({', '.join(str(axis) or '?' for axis in self.axes)})"


@dataclass(frozen=True)
class PastInput:
    """A past input, its batch and token axes, and the slot of the corresponding output.

    ring: the number of tokens that it always holds, as a ring whose first ones are zeros; None: it grows.
    """

    tensor: Tensor
    slot: Slot
    batch: int
    tokens: int
    ring: int | None = None

    def empty(self, batch: int, tokens: int = 0) -> Array:
        """Zeros for ``batch`` rows of ``tokens`` tokens."""
        return np.zeros(self.shape(batch, tokens), self.tensor.dtype)

    def shape(self, batch: Any, tokens: Any) -> tuple[Any, ...]:
        sized = {self.batch: batch, self.tokens: tokens if self.ring is None else self.ring}
        return tuple(sized.get(axis, size) for axis, size in enumerate(self.tensor.axes))

    @property
    def heads(self) -> int:
        """Four axes besides a stack of key and value, ``(b, g, s, d)`` in any order, or three for a single head."""
        inner = self._inner
        return int(inner[0]) if len(inner) > 1 else 1

    @property
    def head_dim(self) -> int:
        return int(self._inner[-1])

    @property
    def layout(self) -> str:
        """Its axes in words, such as ``(batch, 3, past, 8)``."""
        return f"({', '.join(str(size) for size in self.shape('batch', 'past'))})"

    @property
    def _inner(self) -> list[int | str]:
        axes = enumerate(self.tensor.axes)
        return [size for axis, size in axes if axis > self.batch and axis != self.tokens]


@dataclass(frozen=True)
class GraphSignature:
    """Inputs and outputs of one graph by purpose. presents: the names of outputs, by slot. windows: inputs that are
    given the number of tokens in a window, which is ``window``."""

    tokens: Tensor
    output: Tensor
    mask: Tensor | None = None
    positions: Tensor | None = None
    cache_position: Tensor | None = None
    branch: Tensor | None = None
    kept: Tensor | None = None
    pasts: tuple[PastInput, ...] = ()
    presents: tuple[tuple[Slot, str], ...] = ()
    assumed: tuple[str, ...] = ()
    windows: tuple[Tensor, ...] = ()
    window: int = 0

    @property
    def hidden(self) -> bool:
        """Whether it takes hidden states ``(b, t, width)`` instead of token ids ``(b, t)``."""
        return self.tokens.dtype in FLOATS

    @property
    def layers(self) -> int:
        """Tensors that are only numbered are the key and value of each layer in turn."""
        numbered = not any(past.slot[1] or past.batch or len(past.slot[0]) > 1 for past in self.pasts)
        layers = len({past.slot[0][:1] for past in self.pasts})
        return max(1, layers // 2) if numbered else layers

    def present(self, slot: Slot) -> str | None:
        return dict(self.presents).get(slot)

    def feeds(self, x: Array, past: int, branch: bool) -> dict[str, Array]:
        """The inputs except the past for ``t`` new tokens ``x`` after ``past`` others."""
        batch, t = x.shape[:2]
        made = {self.tokens.name: x.astype(self.tokens.dtype, copy=False)}
        counted = np.arange(past, past + t)
        if self.mask is not None:
            made[self.mask.name] = np.ones((batch, past + t), self.mask.dtype)
        for tensor in (self.positions, self.cache_position):
            if tensor is not None:
                shape = (t,) if len(tensor.axes) == 1 else (1 if tensor.axes[0] == 1 else batch, t)
                made[tensor.name] = np.broadcast_to(counted.astype(tensor.dtype), shape)
        if self.branch is not None:
            made[self.branch.name] = np.full((1,) * len(self.branch.axes), branch)
        if self.kept is not None:
            made[self.kept.name] = np.zeros((1,) * len(self.kept.axes), self.kept.dtype)
        return made | {tensor.name: np.array(self.window, tensor.dtype) for tensor in self.windows}


def read(model: onnx.ModelProto, name: str, settings: Settings = Settings()) -> GraphSignature:  # noqa: B008 - frozen
    """The signature of a graph, without its weights; ``settings``: sizes that it may not contain. Raises
    BackendUnavailable if it is not recognised."""
    inputs, outputs = _tensors(model)
    try:
        return _signature(inputs, outputs, settings, rings(model))
    except _Unknown as why:
        raise unknown(model, name, str(why)) from None


def unknown(model: onnx.ModelProto, name: str, why: str) -> BackendUnavailable:
    """An error that lists the graph's inputs and outputs, and the known ones."""
    inputs, outputs = (", ".join(map(str, tensors)) or "none" for tensors in _tensors(model))
    return BackendUnavailable(
        f"{name} is not a recognised decoder with a cache: {why}; inputs: {inputs}; outputs: {outputs}; known names: "
        f"{CONVENTIONS}"
    )


class _Unknown(Exception):
    """What is not recognised about the inputs and outputs."""


def rings(model: onnx.ModelProto) -> dict[str, int]:
    """The inputs that hold the tokens of a window as a ring, by name, with the number of those tokens
    (``sliding_window_cache`` of ``GroupQueryAttention``, inputs 3 and 4)."""
    found: dict[str, int] = {}
    for node in model.graph.node:
        attributes = {one.name: one.i for one in node.attribute}
        if node.op_type == "GroupQueryAttention" and attributes.get("sliding_window_cache"):
            found |= dict.fromkeys(node.input[3:5], attributes["local_window_size"])
    return found


def _signature(
    inputs: Sequence[Tensor], outputs: Sequence[Tensor], settings: Settings, rings: Mapping[str, int]
) -> GraphSignature:
    slots = {tensor.name: slot(tensor.name, PASTS) for tensor in inputs}
    windows = tuple(tensor for tensor in inputs if tensor.name.startswith(TAKEN) and tensor.name.endswith(WINDOW))
    left = [tensor for tensor in inputs if slots[tensor.name] is None and tensor not in windows]
    if windows and settings.window is None:
        raise _Unknown(f"the value of {windows[0].name} is not known; give it by option window")
    named = {name: _take(left, [name]) for name in (MASK, POSITIONS, CACHE_POSITION, BRANCH)}
    kept = _take(left, KEPT)
    others = [tensor.name for tensor in left]
    tokens = _take(left, (*IDS, *others), lambda x: x.dtype in ("int32", "int64") and len(x.axes) == 2)
    tokens = tokens or _take(left, (*STATES, *others), lambda x: x.dtype in FLOATS and len(x.axes) == 3)
    if tokens is None:
        raise _Unknown("no input holds token ids (b, t) or hidden states (b, t, width)")
    if left:
        raise _Unknown(f"unknown input {left[0].name}")
    mask = named[MASK]
    if mask is not None and len(mask.axes) != 2:
        raise _Unknown(f"{mask.name} has {len(mask.axes)} axes, expected 2: batch, past and new tokens")
    for tensor in (named[POSITIONS], named[CACHE_POSITION]):
        if tensor is not None and len(tensor.axes) not in (1, 2):
            raise _Unknown(f"{tensor.name} has {len(tensor.axes)} axes, expected (t) or (b, t)")
    presents = {x.name: slot(x.name, PASTS if x.name.startswith(GIVEN) else PRESENTS) for x in outputs}
    rest = [x for x in outputs if presents[x.name] is None and not x.name.endswith(WINDOW)]
    output = _take(rest, OUTPUTS) or (rest.pop(0) if rest else None)
    if output is None or output.dtype not in FLOATS:
        raise _Unknown("no output holds logits or hidden states")
    sizes = {tensor.name: tensor.axes for tensor in outputs}
    found = {found: name for name, found in presents.items() if found is not None}
    pasts = [tensor for tensor in inputs if slots[tensor.name] is not None]
    assumed: tuple[str, ...] = ()
    if pasts and not found and len(rest) == len(pasts):
        found = {_slot(slots, past): tensor.name for past, tensor in zip(pasts, rest, strict=True)}
        assumed = ("the outputs after the first are the presents, in the order of the pasts",)
    missing = [past.name for past in pasts if _slot(slots, past) not in found]
    if missing:
        raise _Unknown(f"no output is the present of {missing[0]}")
    filled = []
    if windows:
        assumed = (*assumed, f"{windows[0].name} and its like are {settings.window}, from {settings.source}")
    for past in pasts:
        made = _past(past, _slot(slots, past), sizes[found[_slot(slots, past)]], settings.head_dim)
        filled.append(replace(made, ring=rings.get(past.name)))
    if any(isinstance(past.axes[-1], str) for past in pasts) and settings.head_dim in {p.head_dim for p in filled}:
        assumed = (*assumed, f"the head dim is {settings.head_dim}, from {settings.source}")
    return GraphSignature(
        tokens,
        output,
        mask,
        named[POSITIONS],
        named[CACHE_POSITION],
        named[BRANCH],
        kept,
        tuple(filled),
        tuple(found.items()),
        assumed,
        windows,
        settings.window or 0,
    )


def slot(name: str, roots: Sequence[str]) -> Slot | None:
    """``past_key_values.3.key`` is ``((3,), "key")``; None if the name does not belong to a cache."""
    lowered = name.lower().removeprefix(TAKEN).removeprefix(GIVEN)
    root = next((root for root in roots if re.match(rf"{root}(?![a-z])", lowered)), None)
    if root is None:
        return None
    words = re.findall(r"[a-z]+|\d+", lowered[len(root) :])
    numbers = tuple(int(word) for word in words if word.isdigit())
    parts = [_PARTS[word] for word in words if word in _PARTS]
    if len(parts) > 1 or any(not (w.isdigit() or w in _PARTS or w in _SILENT) for w in words):
        return None
    return numbers, "".join(parts)


def _past(tensor: Tensor, slot: Slot, present: tuple[int | str, ...], head_dim: int | None) -> PastInput:
    """Determines which axes grow; sizes missing in the past are taken from its present. A last axis of the same name in
    both does not grow: it is the head dim, which the graph does not tell."""
    if tensor.dtype not in FLOATS:
        raise _Unknown(f"{tensor.name} is {tensor.dtype}, expected one of {', '.join(FLOATS)}")
    axes: list[int | str] = list(tensor.axes)
    if len(present) == len(axes):
        pairs = zip(tensor.axes, present, strict=True)
        axes = [next((size for size in pair if isinstance(size, int)), pair[0]) for pair in pairs]
    batch = 1 if len(axes) == 5 and axes[0] == 2 else 0
    if len(axes) - batch not in (3, 4):
        raise _Unknown(f"{tensor.name} has {len(axes)} axes, expected (b, h, s, d), (b, s, h, d) or (2, b, h, s, d)")
    growing = [axis for axis, size in enumerate(axes) if axis > batch and not isinstance(size, int)]
    last = len(axes) - 1
    if len(growing) > 1 and growing[-1] == last and axes[last] and tensor.axes[last] == present[last]:
        if head_dim is None:
            raise _Unknown(
                f"the size of {axes[last]}, an axis of {tensor.name}, is not known; give it by option head_dim"
            )
        axes[last], growing = head_dim, growing[:-1]
    if not growing:
        raise _Unknown(f"no axis of {tensor.name} grows with the cached tokens")
    if len(growing) > 1:
        raise _Unknown(f"the sizes of {tensor.name} do not distinguish heads, tokens and head dim")
    return PastInput(replace(tensor, axes=tuple(axes)), slot, batch, growing[0])


def _slot(slots: Mapping[str, Slot | None], tensor: Tensor) -> Slot:
    found = slots[tensor.name]
    assert found is not None
    return found


def _take(
    tensors: list[Tensor], names: Sequence[str], fits: Callable[[Tensor], bool] = lambda tensor: True
) -> Tensor | None:
    """Removes the first of these names from the list."""
    by_name = {tensor.name: tensor for tensor in tensors if fits(tensor)}
    found = next((by_name[name] for name in names if name in by_name), None)
    if found is not None:
        tensors.remove(found)
    return found


def _tensors(model: onnx.ModelProto) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs and outputs; names with an initializer are constants, not inputs."""
    given = {initializer.name for initializer in model.graph.initializer}
    inputs = [_tensor(value) for value in model.graph.input if value.name not in given]
    return inputs, [_tensor(value) for value in model.graph.output]


def _tensor(value: onnx.ValueInfoProto) -> Tensor:
    kind = value.type.tensor_type
    axes = tuple(axis.dim_value if axis.HasField("dim_value") else _size(axis.dim_param) for axis in kind.shape.dim)
    dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name if kind.elem_type else "no tensor"
    return Tensor(value.name, dtype, axes)


def _size(name: str) -> int | str:
    """Transformers' exporter gives a fixed size as a name, such as ``"16"``."""
    return int(name) if name.isdecimal() else name
