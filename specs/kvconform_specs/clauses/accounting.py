"""The cache takes the memory that it claims, and a cached step computes its new tokens only."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import strategies as st

from kvconform_specs import situations as reach
from kvconform_specs.claims import Claims
from kvconform_specs.clause import Case, Clause, Relation
from kvconform_specs.clip import clipped
from kvconform_specs.config import Config
from kvconform_specs.program import Append, Reorder, Reset, Step, Truncate
from kvconform_specs.strategies import Draw, appends, at_once, batches, counts, seeds, splits, steadily


@st.composite
def _resized(draw: Draw, config: Config, claims: Claims) -> Case:
    """A sequence that grows, and shrinks where that is claimed."""
    sizes: tuple[int, ...] = draw(splits(config, claims) | steadily(config, claims))
    batch, seed = draw(batches(claims)), draw(seeds)
    steps: list[Step] = []
    length = mark = 0
    for size in sizes:
        steps.append(Append("a", (size,) * batch, seed))
        length += size
        mark = max(mark, length)
        way = draw(st.integers(0, 7))
        if way == 5 and claims.can("truncate"):
            length = draw(st.integers(claims.keeps(mark), length))
            steps.append(Truncate("a", length))
        elif way == 6 and claims.can("reorder"):
            steps.append(Reorder("a", tuple(range(batch - 1, -1, -1))))
        elif way == 7 and claims.can("reset"):
            length = mark = 0
            steps.append(Reset("a"))
        seed += 17
    return Case((clipped(config, tuple(steps)),))


@st.composite
def _metered(draw: Draw, config: Config, claims: Claims) -> Case:
    past, size, batch, seed = draw(st.integers(0, 24)), draw(counts(claims)), draw(batches(claims)), draw(seeds)
    step = Append("a", (size,) * batch, seed, count_macs=True)
    return Case((clipped(config, (*appends("a", at_once(past, claims), batch, seed), step)),))


@st.composite
def _at_depths(draw: Draw, config: Config, claims: Claims) -> Case:
    """Equal steps at three depths or four, with others in between."""
    size, batch, seed = draw(counts(claims, 4)), draw(batches(claims)), draw(seeds)
    steps: list[Step] = []
    for _ in range(draw(st.integers(3, 4))):
        steps += appends("a", at_once(draw(st.integers(0, 5)), claims), batch, seed)
        steps.append(Append("a", (size,) * batch, seed, count_macs=True))
    return Case((clipped(config, tuple(steps)),))


def _three_depths(walks: Sequence[reach.Walk]) -> bool:
    counted = [visit for one in walks for visit in one if isinstance(visit.step, Append) and visit.step.count_macs]
    return len({visit.past for visit in counted}) > 2 and len({visit.new for visit in counted}) < 3


CLAUSES = (
    Clause(
        name="accounting.bytes",
        text="The cache takes 2 l g s d b numbers of the storage dtype: KV heads, not query heads, and s as claimed: "
        "the length, the capacity, or whole pages; where a window is all that is retained it does not grow for ever, "
        "and quantised numbers take their bits.",
        why=("https://github.com/apple/axlearn/pull/842", "https://github.com/PSAL-POSTECH/ONNXim/pull/34"),
        strategy=_resized,
        relations=(Relation.BYTES,),
        needs=("bytes",),
        share=0.5,
        situations=(reach.DECODE, reach.TRUNCATION, reach.RESET),
    ),
    Clause(
        name="accounting.positions",
        text="A cached step computes its new tokens only, and none of the cached ones.",
        why=("https://github.com/huggingface/transformers/pull/32929",),
        strategy=_metered,
        relations=(Relation.POSITIONS,),
        needs=("macs",),
        share=0.25,
        variants=1,  # the count does not depend on the numbers, and counting is slow
        situations=(
            reach.append(
                "a counted step on a cache",
                lambda v: isinstance(v.step, Append) and v.step.count_macs and v.past > 0,
                reach.holds(2),
            ),
        ),
    ),
    Clause(
        name="accounting.affine",
        text="The multiply-adds of equal steps grow linearly with the depth, by those of attention, by less where a "
        "window is full, or not at all where all slots are read.",
        why=("https://github.com/huggingface/transformers/pull/32929",),
        strategy=_at_depths,
        relations=(Relation.LINEAR_COST,),
        needs=("macs",),
        share=0.25,
        variants=1,  # the count does not depend on the numbers, and counting is slow
        situations=(reach.Situation("counted steps of one size at three depths", _three_depths, reach.holds(3)),),
    ),
)
