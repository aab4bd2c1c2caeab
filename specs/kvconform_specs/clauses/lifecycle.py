"""A sequence begins empty, ends for good, and belongs to itself."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import strategies as st

from kvconform_specs.claims import Claims
from kvconform_specs.clause import Case, Clause, Relation
from kvconform_specs.config import Config
from kvconform_specs.families import appends, batches, seeds, splits
from kvconform_specs.program import Close, Program, Reset, Step


@st.composite
def _reset(draw: Callable[..., int], config: Config, claims: Claims) -> Case:
    earlier: tuple[int, ...] = draw(splits(config, claims, most=3))  # type: ignore[assignment]
    sizes: tuple[int, ...] = draw(splits(config, claims, most=3))  # type: ignore[assignment]
    batch, seed = draw(batches(claims)), draw(seeds)
    fresh = appends("a", sizes, batch, seed)
    return Case(
        (Program(config, fresh), Program(config, (*appends("a", earlier, batch, seed + 77), Reset("a"), *fresh)))
    )


@st.composite
def _two(draw: Callable[..., int], config: Config, claims: Claims) -> Case:
    """Sequences ``a`` and ``b``, interleaved or one after the other, against ``b`` alone and, interleaved, ``a``."""
    first: tuple[int, ...] = draw(splits(config, claims, most=4))  # type: ignore[assignment]
    second: tuple[int, ...] = draw(splits(config, claims, most=4))  # type: ignore[assignment]
    seed = draw(seeds)
    a = appends("a", first, draw(batches(claims)), seed)
    b = appends("b", second, draw(batches(claims)), seed + 77)
    interleaved = (claims.max_sequences or 2) > 1 and draw(st.booleans())
    steps: list[Step] = []
    if interleaved:
        for i in range(max(len(a), len(b))):
            steps += [*a[i : i + 1], *b[i : i + 1]]
    else:
        steps += [*a, Close("a"), *b]
    # alone first: what the other sequence changes for good would change both programs if it came before them
    alone = a if interleaved and draw(st.booleans()) else b
    return Case((Program(config, alone), Program(config, tuple(steps))))


CLAUSES = (
    Clause(
        name="lifecycle.reset",
        text="A sequence that was reset is a fresh one: keys, values, length and positions begin anew.",
        why=(
            "https://github.com/rasbt/LLMs-from-scratch/pull/925",
            "https://github.com/Lightning-AI/litgpt/pull/1596",
        ),
        family=_reset,
        relations=(Relation.AGREEMENT,),
        needs=("reset",),
        core=True,
    ),
    Clause(
        name="lifecycle.independent",
        text="Sequences do not see one another: neither while both are open, nor the next one after the last was "
        "closed, shorter or longer.",
        why=(
            "https://github.com/rajveer43/VeloxQuant-MLX/pull/59",
            "https://github.com/TrenTorch/TrenTorch/pull/141",
            "https://github.com/ggml-org/llama.cpp/issues/27994",
        ),
        family=_two,
        relations=(Relation.AGREEMENT,),
    ),
)
