"""Evaluates a convention's expressions on a module, function or object, with numpy arrays in and out."""

from __future__ import annotations

import copy
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kvconform_backends.targets import black_box
from kvconform_backends.targets.module.conventions import Convention

Array = NDArray[Any]


@dataclass(frozen=True)
class ModuleSequence:
    """One sequence: the past as the target returned it, and the numbers of rows and tokens. inputs: all its tokens, if
    calls are given them; counts: how many each row holds, if they differ."""

    past: Any
    batch: int
    tokens: int = 0
    inputs: Array | None = None
    counts: tuple[int, ...] = ()

    @property
    def lengths(self) -> list[int]:
        return list(self.counts) or [self.tokens] * self.batch


class Caller:
    """Calls a target by a convention. ``dtype``: of hidden states; ``namespace``: the names in the target's file.

    ``shares``: cached calls get dense inputs in the caller's memory, so that writes to it are found.
    """

    def __init__(
        self,
        module: Any,
        convention: Convention,
        namespace: Mapping[str, Any],
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        shares: bool = False,
    ) -> None:
        self.module, self.convention, self.dtype, self.device = module, convention, dtype, device
        self.shares = shares
        self._fixed = {"torch": torch, "np": np, "copy": copy, "module": module, "device": device}
        self._fixed |= {name: namespace[name] for name in convention.imports}
        self._code: dict[str, types.CodeType] = {}
        self.seen_on: str | None = None  # the device of the last output

    def on(self, module: Any) -> Caller:
        """The same calls on another module."""
        other = copy.copy(self)
        other.module, other._fixed = module, {**self._fixed, "module": module}
        return other

    @torch.no_grad()
    def start(self, batch: int) -> ModuleSequence:
        names = {"batch": batch, "new": 0, "cached": 0}
        if self.convention.begin:
            self._value(self.convention.begin, names)
        return ModuleSequence(self._value(self.convention.empty, names), batch)

    @torch.no_grad()
    def step(
        self, sequence: ModuleSequence, x: Array, context: int = 0, counts: tuple[int, ...] = ()
    ) -> tuple[Array, ModuleSequence]:
        if self.convention.one_by_one and sequence.tokens and x.shape[1] > 1 and not counts:
            return self._one_by_one(sequence, x, context)
        x = x if self.shares and x.flags.c_contiguous and x.flags.writeable else np.array(x)
        ragged = bool(counts or sequence.counts)
        counts = counts or (x.shape[1],) * len(x)
        call = self.convention.ragged if ragged else self.convention.call
        names = self._called(call, sequence, x, context, counts)
        y = self._value(self.convention.output, names)
        past = self._value(self.convention.present, names) if self.convention.present else None
        held = tuple(old + new for old, new in zip(sequence.lengths, counts, strict=True)) if ragged else ()
        inputs = self._sofar(sequence, x) if self.takes_all else None
        return self.numbers(y), ModuleSequence(past, sequence.batch, sequence.tokens + x.shape[1], inputs, held)

    def _one_by_one(self, sequence: ModuleSequence, x: Array, context: int) -> tuple[Array, ModuleSequence]:
        outputs = []
        for token in range(x.shape[1]):
            output, sequence = self.step(sequence, x[:, token : token + 1], context)
            outputs.append(output)
        return np.concatenate(outputs, axis=1), sequence

    @torch.no_grad()
    def fork(self, sequence: ModuleSequence) -> ModuleSequence:
        """A second sequence with the same tokens."""
        return replace(sequence, past=self._value(self.convention.fork, {"past": sequence.past}))

    @torch.no_grad()
    def reorder(self, sequence: ModuleSequence, rows: list[int]) -> ModuleSequence:
        """The sequence with row ``rows[i]`` as its row ``i``."""
        made = self._value(self.convention.reorder, {"past": sequence.past, "rows": rows, "batch": sequence.batch})
        past = made if self.convention.present and leaves(made) else sequence.past
        inputs = None if sequence.inputs is None else sequence.inputs[rows]
        counts = tuple(sequence.counts[row] for row in rows) if sequence.counts else ()
        return ModuleSequence(past, len(rows), sequence.tokens, inputs, counts)

    @torch.no_grad()
    def truncate(self, sequence: ModuleSequence, length: int) -> ModuleSequence:
        """The sequence with its first ``length`` tokens."""
        names = {"past": sequence.past, "length": length, "cached": sequence.tokens, "batch": sequence.batch}
        made = self._value(self.convention.truncate, names)
        past = made if self.convention.present and leaves(made) else sequence.past
        inputs = None if sequence.inputs is None else sequence.inputs[:, :length]
        return ModuleSequence(past, sequence.batch, length, inputs)

    @property
    def takes_all(self) -> bool:
        """Whether calls are given all tokens of the sequence."""
        return "sofar" in self.convention.call

    def _sofar(self, sequence: ModuleSequence, x: Array) -> Array:
        return x if sequence.inputs is None else np.concatenate([sequence.inputs, x], axis=1)

    @torch.no_grad()
    def uncached(self, x: Array, context: int = 0) -> Array:
        """The uncached forward; if there is none, the first call of a sequence."""
        names = self.called(self.convention.uncached, self.first(len(x)), x, context)
        return self.numbers(self._value(self.convention.uncached_output, names))

    @torch.no_grad()
    def first(self, batch: int) -> ModuleSequence:
        """The sequence for ``uncached``: an empty past, or a new sequence if every call uses the cache."""
        if self.convention.always:
            return self.start(batch)
        return ModuleSequence(self._value(self.convention.empty, {"batch": batch, "new": 0, "cached": 0}), batch)

    @torch.no_grad()
    def called(self, expression: str, sequence: ModuleSequence, x: Array, context: int = 0) -> dict[str, Any]:
        """All names after a call on a copy of ``x``, including ``out``."""
        return self._called(expression, sequence, np.array(x), context)  # torch warns about read-only memory

    def _called(
        self, expression: str, sequence: ModuleSequence, x: Array, context: int, counts: tuple[int, ...] = ()
    ) -> dict[str, Any]:
        names = {
            "x": self._into(x),
            "past": sequence.past,
            "batch": x.shape[0],
            "new": x.shape[1],
            "cached": sequence.tokens,
            "context": context,
            "counts": list(counts),
        }
        if self.takes_all:
            names["sofar"] = self._into(self._sofar(sequence, x))
        if self.convention.tell:
            self._value(self.convention.tell, names)
        return {**names, "out": self._value(expression, names)}

    def length(self, sequence: ModuleSequence) -> int:
        """The number of tokens in the past, from its shape."""
        return int(self._value(self.convention.length, {"past": sequence.past})) if sequence.tokens else 0

    def _value(self, expression: str, names: Mapping[str, Any]) -> Any:
        if expression not in self._code:
            self._code[expression] = compile(expression, "<convention>", "eval")
        return eval(self._code[expression], {**self._fixed, **names})

    def _into(self, x: Array) -> Any:
        if not self.convention.batched:
            x = x[0]
        if self.convention.sequence_first:
            x = x.swapaxes(0, 1)
        if self.convention.arrays == "numpy":
            return x
        given = torch.from_numpy(x).to(self.device)
        return given.to(self.dtype) if self.convention.takes == "states" else given

    def numbers(self, y: Any) -> Array:
        """An output ``(b, t, e)`` as float32."""
        self.seen_on = y.device.type if isinstance(y, Tensor) else "cpu"
        made = black_box.widened(y) if isinstance(y, Tensor) else np.array(y, np.float32)
        if self.convention.sequence_first:
            made = made.swapaxes(0, 1)
        return made if self.convention.batched else made[None]


def perturbed(target: Any, storage: float, accumulation: float, seed: int, copied: nn.Module | None = None) -> Any:
    """A copy of any target with perturbed weights (``black_box.perturbed``). The weights of a function are the modules
    and floating-point matrices in its file and its closure; those of another object are among its attributes.

    copied: another build of a module, for one that cannot be copied."""
    noise = storage, accumulation, seed
    if copied is not None:
        return black_box.perturb(copied, *noise)
    if isinstance(target, nn.Module):
        return black_box.perturbed(target, *noise)
    if isinstance(target, types.FunctionType):
        return _rebound(target, {k: _perturbed_value(v, *noise) for k, v in target.__globals__.items()}, noise)
    other = copy.copy(target)
    for name, value in vars(target).items():
        setattr(other, name, _perturbed_value(value, *noise))
    return other


def _perturbed_value(value: Any, storage: float, accumulation: float, seed: int) -> Any:
    if isinstance(value, nn.Module):
        return black_box.perturbed(value, storage, accumulation, seed)
    if isinstance(value, np.ndarray) and value.dtype.kind == "f" and value.ndim > 1:
        made = _perturbed_value(torch.from_numpy(np.array(value)), storage, accumulation, seed)
        return np.asarray(made.numpy(), value.dtype)
    if isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 1:
        held = nn.Module()
        held.weight = nn.Parameter(value.detach().clone(), requires_grad=False)
        return black_box.perturbed(held, storage, accumulation, seed).weight
    if isinstance(value, dict | list) and any(_is_weight(item) for item in _items(value)):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        made = {key: _perturbed_value(item, storage, accumulation, seed) for key, item in pairs}
        return made if isinstance(value, dict) else list(made.values())
    return value


def _items(value: dict[Any, Any] | list[Any]) -> Iterator[Any]:
    yield from value.values() if isinstance(value, dict) else value


def _is_weight(value: Any) -> bool:
    return isinstance(value, nn.Module | Tensor | np.ndarray)


Noise = tuple[float, float, int]


def _rebound(function: types.FunctionType, names: dict[str, Any], noise: Noise) -> types.FunctionType:
    """The function over other globals, together with the functions of its file that it calls."""
    for name, value in function.__globals__.items():
        if isinstance(value, types.FunctionType) and value.__globals__ is function.__globals__:
            names[name] = _over(value, names, noise)
    return _over(function, names, noise)


def _over(function: types.FunctionType, names: dict[str, Any], noise: Noise) -> types.FunctionType:
    closure = function.__closure__
    if closure is not None:
        closure = tuple(types.CellType(_perturbed_value(cell.cell_contents, *noise)) for cell in closure)
    made = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, closure)
    made.__kwdefaults__ = function.__kwdefaults__
    return made


def leaves(value: Any, deep: int = 6) -> list[Any]:
    """Every array in a past of any structure, in order."""
    if isinstance(value, Tensor | np.ndarray):
        return [value]
    if deep == 0 or value is None or isinstance(value, str | int | float | type):
        return []
    if isinstance(value, dict):
        inner = list(value.values())
    elif isinstance(value, list | tuple | set):
        inner = list(value)
    elif isinstance(value, nn.Module):
        inner = [*value.buffers(), *(v for k, v in vars(value).items() if not k.startswith("_"))]
    elif hasattr(value, "__dict__"):
        inner = list(vars(value).values())
    else:
        inner = [getattr(value, name) for name in getattr(value, "__slots__", ()) if hasattr(value, name)]
    return [leaf for item in inner for leaf in leaves(item, deep - 1)]
