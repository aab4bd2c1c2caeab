"""``compiled``: the static-cache step under ``torch.compile`` (inductor), one graph for each class of sizes.

torch.compile gives sizes of 1 graphs of their own, and so do we to a chunk of which the last position alone is asked: a
backend has at most six, batch 1 or more by one token, a chunk or its last position. Every other size is dynamic and the
past is only a tensor of positions, so that a decode loop compiles nothing.
A step therefore attends to the whole buffer, of which the mask hides what is not filled: a view of the filled slots is
of another kind when the buffer is full, which costs each class a second graph. On CUDA a decode step of one row has no
dynamic size: inductor records its launches as a CUDA graph, once for each cache, and replays them.
Past its recompile limit torch.compile runs eagerly without a word; the runs of the graphs are counted to notice it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch._dynamo
import torch._inductor.config
import torch._inductor.inductor_prims  # registers torch.ops.prims.inductor_*
from numpy.typing import NDArray
from torch import Tensor
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._dynamo.utils import counters
from torch._inductor.compile_fx import compile_fx
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler
from torch.utils._triton import has_triton

from kvconform.errors import Unavailable
from kvconform_backends.torch.counting import CountedGraphs
from kvconform_backends.torch.decoder import Decoder, attention, masks
from kvconform_backends.torch.eager import Buffers, EagerStatic
from kvconform_specs.config import Config

Array = NDArray[Any]
Step = Callable[[list[Tensor], Tensor, list[Tensor], list[Tensor], bool], Tensor]
"""Inputs, positions ``(t,)`` and each layer's key and value buffers, which it writes, to the output: every token's, or
the last one's alone."""

RECOMPILES = 128
"""Graphs that all backends in one process may have: the limit is per code object, and they share the step's code.
Each config may be asked for in three dtypes, and a decoder makes six graphs in each."""
MATRICES = ("query_key_value", "output", "gate_up", "down", "lm_head")
LEFT_OUT = ("uncached_forward", "ragged", "mask", "macs", "poison")
REPLAYED = {"triton.cudagraphs": True, "triton.cudagraph_skip_dynamic_graphs": True}
"""On CUDA: what ``mode="reduce-overhead"`` sets, for graphs without a dynamic size. Another would be recorded anew for
each size."""


class Looped(Decoder):
    """The decoder whose matrices, where they are large together, are read by loops that inductor writes, where one
    token meets them on a CPU in float32: at nearly the memory's pace; the library's matrix-vector product is slower."""

    large = 16 * 2**20
    """Bytes of matrices that no cache of a core holds, so that a decode step waits for the memory to bring them."""

    def __init__(self, config: Config, weights: Mapping[str, NDArray[np.float32]], device: str = "cpu") -> None:
        super().__init__(config, weights, device)
        held = {
            (module, name): matrix
            for module in (self, *self.blocks)
            for name, matrix in module.named_buffers(recurse=False)
            if name in MATRICES
        }
        much = sum(matrix.nbytes for matrix in held.values()) >= self.large
        self.looped = much and device == "cpu" and self.lm_head.dtype == torch.float32
        if self.looped:
            for (module, name), matrix in held.items():
                setattr(module, name, matrix.T.contiguous().T)  # a row in memory for each number of the output

    def multiply(self, x: Tensor, matrix: Tensor) -> Tensor:
        if not self.looped or x.shape[0] * x.shape[1] > 1:
            return super().multiply(x, matrix)
        # made in full: inductor would compute what x is made of anew for each row of the matrix
        made: Tensor = torch.ops.prims.inductor_force_stride_order(x, x.stride())
        return (made * matrix.T).sum(-1, keepdim=True).mT  # (1, out, in) to (1, 1, out)


class Compiled(CountedGraphs, EagerStatic):
    """The buffers of ``eager-static``, whose rows grow alike here.

    Not claimed: ``full``, ragged rows and the caller's mask, each of which would add graphs to compile;
    ``work``, which torch counts of eager operators only; ``poison``, which the same buffers answer in ``eager-static``.
    """

    cache_design = "capacity"
    family = Looped
    claims = replace(
        EagerStatic.claims,
        abilities=(*(name for name in EagerStatic.claims.abilities if name not in LEFT_OUT), "graph_count"),
        padding=("right",),
        max_graphs=6,
    )

    def __init__(self, config: Config, weights: Mapping[str, NDArray[np.float32]], device: str = "cpu") -> None:
        super().__init__(config, weights, device)
        if device == "cpu":
            try:
                self.compiler = get_cpp_compiler()
            except InvalidCxxCompiler as error:
                raise Unavailable(
                    "torch.compile needs a C++ compiler on the CPU and none was found; "
                    "install one, for example with: apt-get install g++"
                ) from error
        elif has_triton():
            self.compiler = "triton"
        else:
            raise Unavailable("torch.compile needs Triton on CUDA and it is not installed; pip install triton")
        torch._dynamo.config.recompile_limit = RECOMPILES
        # the numbers of a config are constants: dynamic=True would make inputs of them, too
        torch._dynamo.config.specialize_int = torch._dynamo.config.specialize_float = True
        self.places = torch.arange(config.capacity, device=device)
        self.options: dict[str, Any] | None = REPLAYED if device == "cuda" else None
        self.built = self.calls = self.runs = 0
        self.classes: set[tuple[bool, bool, bool]] = set()
        self.fallback: str | None = None
        step = stepper(config, self.decoder, self.places)
        self.compiled: Step = torch.compile(step, backend=self.inductor, dynamic=True, fullgraph=True)

    def inductor(self, graph: torch.fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        """The default backend of torch.compile, with a count of graphs and of their runs."""
        compiled: Any = compile_fx(graph, examples, config_patches=self.options)
        self.built += 1

        def run(*args: Any) -> Any:
            self.runs += 1
            return compiled(*args)

        return run

    def start(self, batch: int) -> Buffers:
        cache = super().start(batch)
        if self.device == "cuda":
            for buffer in (*cache.keys, *cache.values):  # written where they are; another address is recorded anew
                torch._dynamo.mark_static_address(buffer, guard=False)
        return cache

    @torch.no_grad()
    def step(self, cache: Buffers, *inputs: Array, last_only: bool = False) -> tuple[Array, Buffers]:  # type: ignore[override]
        past = cache.lengths[0]
        t = self.admit(inputs, cache.batch, past)
        # clone: canonical strides, also of axes of size 1, where numpy's may be anything and would ask for a new graph
        given = [self.tensor(x).clone(memory_format=torch.contiguous_format) for x in inputs]
        last = last_only and t > 1
        self.prepare(cache.batch, t, last)
        output = self.call(given, past, t, cache, last)
        cache.lengths = [past + t] * cache.batch
        return self.array(output), cache

    def graph_count(self) -> int:
        return self.built

    def prepare(self, batch: int, t: int, last: bool) -> None:
        """Compiles the class of these sizes at its first use, always from the same example.

        From the first real input, two sizes that happen to be equal would be taken for one, and compiled again later.
        """
        kind = (batch == 1, t == 1, last)
        if kind in self.classes:
            return
        c, rows, new = self.config, 1 if batch == 1 else 5, 1 if t == 1 else min(3, self.config.capacity)
        scratch = self.start(rows)
        for buffer in (*scratch.keys, *scratch.values):
            torch._dynamo.mark_static(buffer, [1, 2, 3])  # only the batch changes
        if self.decoder is None:
            heads = (c.heads, c.kv_heads, c.kv_heads)
            given = [torch.zeros(rows, h, new, c.head_dim, dtype=self.dtype, device=self.device) for h in heads]
            for x in given:
                torch._dynamo.mark_static(x, [1, 3])
        else:
            given = [torch.zeros(rows, new, dtype=torch.int64, device=self.device)]
        self.call(given, 0, new, scratch, last)
        self.classes.add(kind)

    def call(self, given: list[Tensor], past: int, t: int, cache: Buffers, last: bool) -> Tensor:
        positions = torch.arange(past, past + t, device=self.device)
        before = self.runs
        self.calls += 1
        if self.device == "cuda":
            # nobody needs the output of the step before: its memory is the recording's
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        try:
            output = self.compiled(given, positions, cache.keys, cache.values, last)
        except FailOnRecompileLimitHit:
            self.fallback = f"torch.compile hit its recompile limit of {RECOMPILES} graphs"
            raise
        if self.runs == before:
            self.fallback = "a step ran eagerly: no compiled graph was executed"
        return output

    def runtime_info(self) -> dict[str, Any]:
        return {
            **super().runtime_info(),
            "compiler": self.compiler,
            "graphs": self.built,
            "recompilations": max(0, self.built - 1),
            "graph_breaks": sum(counters["graph_break"].values()),
            "graphs_from_cache": counters["inductor"]["fxgraph_cache_hit"],
            "calls": self.calls,
            "graph_runs": self.runs,
            **({} if self.fallback is None else {"fallback": self.fallback}),
        }


def stepper(config: Config, decoder: Decoder | None, places: Tensor) -> Step:
    """The step as a function of tensors alone: no Python number changes from call to call, so none
    becomes a guard; ``last`` does, for a graph of its own."""

    def step(given: list[Tensor], positions: Tensor, keys: list[Tensor], values: list[Tensor], last: bool) -> Tensor:
        made = masks(config, positions, places)  # (t, capacity) each

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            keys[layer].index_copy_(2, positions, key)
            values[layer].index_copy_(2, positions, value)
            return attention(config, query, keys[layer], values[layer], made[layer])

        if decoder is None:
            return attend(0, *given)
        output: Tensor = decoder(given[0], positions, attend, last)
        return output

    return step
