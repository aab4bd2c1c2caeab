"""The slots of a target's cache: arrays of constant size in which each token has an index along one axis.

They are found by watching what steps write. Arrays that steps leave alone, such as tables of angles and masks, have no
slots, and neither have those that grow or whose tokens move.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kvconform_backends.targets.module.calls import leaves

Slots = Mapping[str, int]
"""The axis of the tokens, by the name of the array."""


def arrays(module: Any, past: Any) -> dict[str, Tensor]:
    """The tensors of floats that may be a cache, by name: of the past, and of the module its buffers and attributes."""
    found = {f"past[{number}]": leaf for number, leaf in enumerate(leaves(past))}
    if isinstance(module, nn.Module):
        for path, part in module.named_modules():
            held = {**vars(part), **part._buffers}
            found |= {f"{path}.{name}": value for name, value in held.items()}
    return {
        name: value
        for name, value in found.items()
        if isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 1
    }


def copied(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in found.items()}


def slots(states: list[dict[str, Tensor]], ends: tuple[int, ...]) -> Slots:
    """The arrays that steps have filled token by token. ``states``: copies of all arrays after each step; ``ends``: how
    many tokens there were then. An array that appears with the first step was filled with zeros before."""
    found: dict[str, int] = {}
    for name, last in states[-1].items():
        held = [state.get(name) for state in states]
        if any(value is None or value.shape != last.shape for value in held):
            continue
        series = [torch.zeros_like(last), *(value for value in held if value is not None)]
        axes = [axis for axis in range(last.ndim) if _filled(series, (0, *ends), axis)]
        if len(axes) == 1 and last.shape[axes[0]] > ends[-1]:
            found[name] = axes[0]
    return found


def _filled(series: list[Tensor], ends: tuple[int, ...], axis: int) -> bool:
    """Whether each step has changed exactly the indices of its tokens along the axis."""
    for number in range(1, len(ends)):
        changed = (series[number] != series[number - 1]).movedim(axis, 0).flatten(1).any(1)
        if changed.nonzero().flatten().tolist() != list(range(ends[number - 1], ends[number])):
            return False
    return True


@torch.no_grad()
def fill(module: Any, past: Any, slotted: Slots, length: int, number: float) -> None:
    """Fills the slots from ``length`` on."""
    found = arrays(module, past)
    for name, axis in slotted.items():
        if name in found and found[name].shape[axis] > length:
            found[name].narrow(axis, length, found[name].shape[axis] - length).fill_(number)
