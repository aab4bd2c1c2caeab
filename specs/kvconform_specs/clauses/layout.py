"""Inputs are read by their axes, whatever their memory layout, and also where sizes are equal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from hypothesis import strategies as st

from kvconform_specs import situations as reach
from kvconform_specs.claims import Claims
from kvconform_specs.clause import Case, Clause, Relation
from kvconform_specs.clip import clipped
from kvconform_specs.config import Config
from kvconform_specs.program import LAYOUTS
from kvconform_specs.strategies import Draw, arranged, at_once, batches, counts, fitted, seeds, splits
from kvconform_specs.strategies import appends as plain


@st.composite
def _laid(draw: Draw, config: Config, claims: Claims) -> Case:
    """Inputs that are views: of transposed arrays, of every other element, of one row that all rows share."""
    sizes: tuple[int, ...] = draw(splits(config, claims))
    batch, seed = draw(batches(claims)), draw(seeds)
    shared = draw(st.integers(0, 2)) == 2
    steps = arranged("a", sizes, (0,) * batch, seed) if shared else plain("a", sizes, batch, seed)
    known = LAYOUTS if shared else LAYOUTS[:-1]
    laid = tuple(replace(step, layout=draw(st.sampled_from(known))) for step in steps)
    return Case((clipped(config, laid),))


@st.composite
def _equal(draw: Draw, config: Config, claims: Claims) -> Case:
    """As many tokens, new or cached, as there are rows, query heads, KV heads or numbers in a head."""
    batch = draw(batches(claims))
    traps = sorted({batch, config.heads, config.kv_heads, config.head_dim})
    past = draw(st.sampled_from((0, *traps)))
    new = draw(st.sampled_from(traps))
    sizes = fitted((*at_once(past, claims), *at_once(new, claims), draw(counts(claims))), config.capacity)
    return Case((clipped(config, plain("a", sizes, batch, draw(seeds))),))


def _equal_to(words: str, size: Callable[[reach.Visit], int]) -> reach.Situation:
    def possible(config: Config, claims: Claims) -> bool:
        sizes = {"query heads": config.heads, "KV heads": config.kv_heads, "numbers in a head": config.head_dim}
        new = max(sizes.get(words, 1), 1)
        return new <= config.capacity and claims.longest(new) == new

    return reach.append(f"as many new tokens as {words}", lambda visit: visit.new == size(visit), possible)


CLAUSES = (
    Clause(
        name="layout.strides",
        text="Inputs may be views: transposed, sliced out of larger arrays, or expanded from one row with a stride of "
        "0; the same numbers give the same outputs.",
        why=(
            "https://github.com/pytorch/pytorch/issues/112577",
            "https://github.com/huggingface/transformers/pull/35342",
            "https://github.com/pytorch/pytorch/issues/191937",
        ),
        strategy=_laid,
        relations=(Relation.PARITY,),
        share=0.5,
        situations=tuple(reach.laid_out(kind) for kind in LAYOUTS),
    ),
    Clause(
        name="layout.equal-sizes",
        text="An axis is identified by its place: where the number of tokens equals that of rows, heads or head dims, "
        "no two axes are confused.",
        why=(
            "https://github.com/ByteDance-Seed/VeOmni/pull/162",
            "https://github.com/fla-org/flash-linear-attention/issues/126",
            "https://github.com/vllm-project/vllm-ascend/pull/2758",
        ),
        strategy=_equal,
        relations=(Relation.PARITY,),
        situations=(
            _equal_to("rows", lambda v: len(v.after)),
            _equal_to("query heads", lambda v: v.config.heads),
            _equal_to("KV heads", lambda v: v.config.kv_heads),
            _equal_to("numbers in a head", lambda v: v.config.head_dim),
        ),
    ),
)
