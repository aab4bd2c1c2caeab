"""Counts a call's operators, allocated bytes and multiply-adds at torch's dispatcher.

The counts depend on the program, not on the machine. Memory that a kernel allocates and frees internally is not
counted, nor are compiler-generated kernels inside a compiled graph; what such a graph allocates is taken from torch's
allocator.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

Counts = dict[str, Mapping[str, int]]
"""As returned by ``Counting.count`` (``kvconform.backend``): counter, then kind, then amount."""

FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
"""The fused CPU attention, for which torch's counter has no formula."""


class Dispatched(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts dispatched operators while it is active. Composite operators are counted as their parts, with and without
    gradients, so that ``inference_mode`` changes nothing."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operators: Counter[str] = Counter()
        self.allocated: Counter[str] = Counter()
        self.multiply_adds: Counter[str] = Counter()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Lets torch.compile run its graphs under this mode."""
        return True

    def __torch_dispatch__(
        self, function: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with self:
            output = function.decompose(*args, **kwargs)
        if output is not NotImplemented:
            return output
        output = function(*args, **kwargs)
        packet, name = function._overloadpacket, str(function._overloadpacket)
        self.operators[name] += 1
        known = set(storages((args, kwargs)))
        self.allocated[name] += sum(size for place, size in storages(output).items() if place not in known)
        if packet is FLASH:
            self.multiply_adds[name] += attended(args[0], args[1])
        elif packet in flop_registry:
            flops: int = flop_registry[packet](*args, **kwargs, out_val=output)
            self.multiply_adds[name] += flops // 2
        return output

    def counts(self) -> Counts:
        return {
            "operators": dict(self.operators),
            "allocated": dict(+self.allocated),
            "multiply_adds": dict(self.multiply_adds),
        }


def storages(values: Any) -> dict[int, int]:
    """The memory of all tensors in ``values``: bytes by address. Views share a storage; empty ones are omitted."""
    found = [x.untyped_storage() for x in tree_leaves(values) if isinstance(x, Tensor)]
    return {storage.data_ptr(): storage.nbytes() for storage in found if storage.nbytes()}


def attended(query: Tensor, keys: Tensor) -> int:
    """Multiply-adds of attention: query ``(b, h, t, d)`` on keys ``(b, g, s, d)``, two products of ``b h t s d``."""
    return 2 * math.prod(query.shape) * keys.shape[2]


class Counted:
    """Adds the methods ``count`` and ``counted_by`` to a torch backend."""

    def count(self, call: Callable[[], None]) -> Counts:
        mode = Dispatched()
        with mode:
            call()
        return mode.counts()

    def counted_by(self) -> dict[str, str]:
        return {"torch": torch.__version__}


class CountedGraphs(Counted):
    """The same for a backend that compiles: its graphs allocate without the dispatcher."""

    device: str

    def count(self, call: Callable[[], None]) -> Counts:
        found: list[Counts] = []
        taken = handed_out(lambda: found.append(super(CountedGraphs, self).count(call)), self.device)
        return {**found[0], "allocated": {"allocator": taken}}

    def counted_by(self) -> dict[str, str]:
        """Includes the processor, since the compiler's choice of operators depends on it."""
        cuda = self.device == "cuda"
        unit = torch.cuda.get_device_name() if cuda else torch.backends.cpu.get_cpu_capability()
        return {**super().counted_by(), "unit": unit}


def handed_out(call: Callable[[], None], device: str) -> int:
    """Bytes that torch's allocator allocates during a call, including those freed meanwhile."""
    if device == "cuda":
        before = torch.cuda.memory_stats()["allocated_bytes.all.allocated"]
        call()
        return int(torch.cuda.memory_stats()["allocated_bytes.all.allocated"] - before)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    return allocations(profiled)


def allocations(profiled: profile) -> int:
    """The sum of all allocations in a profile: releases are events with negative bytes."""
    seen: Any = profiled.profiler
    return sum(max(0, event.nbytes()) for event in seen.kineto_results.events() if event.name() == "[memory]")
