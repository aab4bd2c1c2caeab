"""What a backend is: an adapter to one implementation, numpy in and out.

Masks, positions, layout and ownership of the cache stay inside it. This module needs nothing but numpy, because a
backend lives in a worker that may be another interpreter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kvconform_specs.claims import Claims
from kvconform_specs.config import Config
from kvconform_specs.program import Program

Array = NDArray[Any]
Cache = Any
"""Whatever the backend keeps of one sequence; the harness hands it back and never looks inside."""


class Unavailable(Exception):
    """This backend cannot run on this machine: one sentence that says why, and what to install."""


class Backend(Protocol):
    """One implementation, built for one config: a class with this constructor, and ``claims`` declared on it.

    ``weights`` are float32 arrays named and shaped as in ``kvconform_specs.tensors.weight_shapes`` (none for the
    attention profile), already rounded to ``config.dtype``. The constructor raises ``Unavailable`` where the machine
    lacks something. An optional classmethod ``refuses(config, device)`` returns the reason why a config is not
    supported, or None. An optional attribute ``cache_design`` says what a step moves (``speed.costs.DESIGNS``).
    """

    claims: Claims

    def __init__(self, config: Config, weights: Mapping[str, NDArray[np.float32]], device: str) -> None: ...

    def start(self, batch: int) -> Cache:
        """An empty cache of ``batch`` rows."""
        ...

    def step(self, cache: Cache, *inputs: Array) -> tuple[Array, Cache]:
        """Appends new tokens and returns the output and the cache to go on with (the same object, if mutable).

        Attention profile: query ``(b, h, t, d)``, key and value ``(b, g, t, d)``, output ``(b, h, t, d)``.
        Decoder profile: token ids ``(b, t)`` int64, logits ``(b, t, V)``; ``(b, 1, V)`` where ``returns="last"``.
        Floats are float32 that are exact in ``config.dtype``; outputs are float32 as well (widened where the
        implementation computes in 16 bits). Keywords come only where their ability is claimed and used:

        counts (``ragged``): ``(b,)``, how many of the ``t`` columns hold a token in each row, 0 included.
        padding (``ragged``): ``"left"`` where the columns without a token come first; absent: they come last. What
        they hold is arbitrary; their outputs are not judged.
        mask (``mask``, attention profile): bool ``(b, s)`` over logical positions, True where a query may attend. It
        joins causality and window; a query that sees nothing gives zeros.
        shared (``alias``): True: write the present into the memory of the past; absent: into memory of its own.
        count_macs (``work``): True: count the multiply-adds of this step, for ``work``.
        last (``last``, decoder profile): True: give the last new token's logits alone, ``(b, 1, V)``. What is left in
        the cache is the same; ``counts`` never comes with it.
        """
        ...


class BlackBox(Backend, Protocol):
    """A backend whose weights are its own (claim ``reference="self"``): judged by its own cache-less forward.

    It is built with no weights. Profile ``hidden``: hidden states ``(b, t, width)`` to ``(b, t, config.outputs)``.
    """

    configs: Mapping[str, Config]
    """The configs that it has, by name: ``decoder-self`` or ``hidden-self``."""
    recognised: str
    """How it is called, in words."""
    assumed: tuple[str, ...]
    """What was assumed of it without being told, one sentence each."""
    source: str
    """The file whose change makes earlier results void; empty: none."""

    def uncached_forward(self, *inputs: Array) -> Array:
        """The cache-less forward, the truth that it is judged by; it touches no cache."""
        ...

    def perturbed(self, storage: float, accumulation: float, seed: int) -> Any:
        """The same with perturbed weights; only its ``full`` is called. Each weight, and each hidden state, becomes
        ``w * (1 + (storage + accumulation * sqrt(n)) * xi)`` with ``xi`` uniform in (-1, 1) from the seed and ``n`` the
        number of terms in the sums that it is part of (1 for vectors). The backend itself stays as it is."""
        ...

    def script_setup(self) -> str:
        """Python source, at module level, that imports the target and builds it as this backend was, without this
        package: numpy is imported as ``np`` already. It is part of a reproduction (``repro``)."""
        ...

    def script(self, program: Program, tag: str) -> str:
        """Python source behind ``script_setup`` that runs the program step by step, each call written out.

        The input of step ``i`` is the numpy array ``x<tag><i>``; the output must be assigned to ``y<tag><i>`` as a
        float32 numpy array. A step is told by a comment at its line's end."""
        ...


class Abilities(Protocol):
    """The methods behind ``claims.abilities``: a backend has those that it claims."""

    def uncached_forward(self, *inputs: Array) -> Array:
        """The cache-less forward on whole sequences, inputs and output as in ``step``; touches no cache.

        Keyword ``last`` as in ``step``.
        """
        ...

    def length(self, cache: Cache) -> list[int]:
        """How many tokens each row holds."""
        ...

    def truncate(self, cache: Cache, length: int) -> Cache:
        """Keeps the first ``length`` tokens of each row. ValueError unless ``0 <= length <=`` the length."""
        ...

    def fork(self, cache: Cache) -> Cache:
        """A second cache with the same contents; both go on independently."""
        ...

    def reorder(self, cache: Cache, rows: list[int]) -> Cache:
        """Row ``i`` becomes the old row ``rows[i]``; duplicates are legal."""
        ...

    def reset(self, cache: Cache) -> Cache:
        """Empties every row and keeps the batch."""
        ...

    def free_slots(self, cache: Cache) -> list[int]:
        """How many more tokens each row takes."""
        ...

    def contents(self, cache: Cache) -> list[list[tuple[Array, Array]]]:
        """For each layer, for each row, keys and values ``(g, s, d)`` as float32: the newest ``s`` tokens in logical
        order, all of them unless the claim ``keeps`` is ``window``. Quantised ones are given dequantised."""
        ...

    def poison(self, cache: Cache, keys: float | None, values: float | None) -> None:
        """Fills every slot that holds no token of any sequence, in every layer: keys, values, or both."""
        ...

    def bytes(self, cache: Cache) -> int:
        """Bytes that the keys and values of the sequence take, all layers together."""
        ...

    def macs(self) -> int:
        """Multiply-adds of the last count_macs step."""
        ...

    def graph_count(self) -> int:
        """How many graphs this backend has compiled or captured so far."""
        ...

    def count(self, call: Callable[[], None]) -> Mapping[str, Mapping[str, int]]:
        """Runs the call and counts what it does (optional, claimed by having it): by counter (``COUNTERS`` in
        ``speed/counts.py``), and within it by kind, such as ``{"operators": {"aten.mm": 17}}``."""
        ...

    def counted_by(self) -> Mapping[str, str]:
        """The versions that operators, allocations and graphs hang on (optional)."""
        ...

    def synchronise(self) -> None:
        """Waits until the device has done all that was asked (optional): a timed region ends with it."""
        ...

    def device_ns(self, call: Callable[[int], object], steps: int) -> int | None:
        """The device's own nanoseconds of so many steps (optional); None where they cannot be measured. ``call(copy)``
        makes one step on that copy of the cache, and can be made again."""
        ...

    def allocated(self) -> int | None:
        """By how many bytes the device's allocator has grown at most since this was asked last (optional)."""
        ...

    def generate(self, tokens: Array, new: int) -> Array:
        """Greedy generation (decoder profile): for prompts ``(b, t)`` the ids of the ``new`` tokens after them,
        ``(b, new)``, both int64. No token ends it early. It has a cache of its own and touches no sequence."""
        ...

    def close(self, cache: Cache) -> None:
        """Ends the sequence (optional: without it the cache is dropped)."""
        ...

    def runtime_info(self) -> dict[str, Any]:
        """What really ran since the backend was built (optional, but on a GPU): versions, providers, graphs.

        ``device``: of the outputs, as torch names it (``cpu``, ``cuda``, ``cuda:1``); another than was asked for is a
        fallback, and on a GPU nothing passes and nothing is timed without it. ``precision``: the class in which matrix
        products are computed (``float32``, ``float32 by tf32``); on a GPU no times are compared without it. A key
        ``fallback`` with a sentence says that something else ran than the backend's name promises: whatever was judged
        until then was *not tested*.
        """
        ...
