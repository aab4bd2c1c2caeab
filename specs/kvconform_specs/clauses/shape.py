"""Outputs have the right shape, and the cache reports how many tokens it holds."""

from __future__ import annotations

from hypothesis import strategies as st

from kvconform_specs import situations as reach
from kvconform_specs.any_history import any_history
from kvconform_specs.claims import Claims
from kvconform_specs.clause import Case, Clause, Relation
from kvconform_specs.clip import clipped
from kvconform_specs.config import Config
from kvconform_specs.program import Close, Reorder, Step
from kvconform_specs.rollbacks import paused
from kvconform_specs.strategies import LARGEST_BATCH, Draw, appends, at_once, batches, growing, seeds


@st.composite
def _first(draw: Draw, config: Config, claims: Claims) -> Case:
    most = min(claims.max_chunk or config.capacity, config.capacity)
    count = draw(st.integers(1, most) | st.sampled_from((1, most)))
    return Case((clipped(config, appends("a", (count,), draw(batches(claims)), draw(seeds))),))


@st.composite
def sweep(draw: Draw, config: Config, claims: Claims) -> Case:
    """Three sequences with different batch, past and count, one after another on the same artefact."""
    steps: list[Step] = []
    largest = min(claims.max_batch or LARGEST_BATCH, LARGEST_BATCH)
    for seq in "abc":
        batch, past, count = draw(st.integers(1, largest)), draw(st.integers(0, 12)), draw(st.integers(1, 9))
        sizes = (*at_once(past, claims), *at_once(count, claims))
        steps += [*appends(seq, sizes, batch, draw(seeds)), Close(seq)]
    return Case((clipped(config, tuple(steps)),))


MOVED_LENGTHS = reach.step(
    "a reorder that changes which row has which length",
    lambda v: isinstance(v.step, Reorder) and v.after != v.before[: len(v.after)],
    reach.both(reach.claimed("ragged at any time", "reorder", "two rows"), reach.holds(2)),
)


CLAUSES = (
    Clause(
        name="shape.output",
        text="An append of t tokens to b rows gives (b, h, t, d) in the attention profile and (b, t, V) logits in the "
        "decoder profile, as float32, for every batch, count and past, including 1.",
        why=(
            "https://github.com/huggingface/transformers/pull/10651",
            "https://github.com/microsoft/onnxruntime/issues/26262",
        ),
        strategy=growing,
        relations=(Relation.SHAPE,),
        core=True,
        situations=(*reach.BASIC, reach.ROWS),
    ),
    Clause(
        name="shape.length",
        text="After every step the backend reports the number of tokens that each row holds: those appended to it "
        "minus those removed, and not the number of calls, the capacity, the window or the number of heads.",
        why=(
            "https://github.com/huggingface/transformers/pull/38156",
            "https://github.com/fla-org/flash-linear-attention/issues/126",
            "https://github.com/huggingface/transformers/issues/30377",
        ),
        strategy=any_history,
        relations=(Relation.LENGTHS,),
        needs=("length",),
        situations=(reach.DECODE, reach.ROWS, reach.RAGGED, reach.TRUNCATION, reach.RESET, MOVED_LENGTHS),
    ),
    Clause(
        name="shape.first-step",
        text="The first append to an empty cache may have any count up to the capacity, including 1, and gives what "
        "the definition gives.",
        why=("https://github.com/TrenTorch/TrenTorch/pull/192",),
        strategy=_first,
        relations=(Relation.PARITY,),
        core=True,
        situations=(reach.append("a first step of one token", lambda v: v.new == 1 and v.past == 0), reach.PROMPT),
    ),
    Clause(
        name="shape.no-specialisation",
        text="One artefact works for every batch, count and past length: no size with which it was traced, exported, "
        "compiled or captured is built into it.",
        why=(
            "https://github.com/huggingface/transformers/issues/13175",
            "https://github.com/huggingface/optimum/issues/1913",
            "https://github.com/sonos/torch-to-nnef/pull/217",
        ),
        strategy=sweep,
        relations=(Relation.PARITY,),
        situations=reach.SIZES,
    ),
    Clause(
        name="shape.empty-append",
        text="An append without a token gives an output without a column, and changes nothing.",
        why=("https://github.com/huggingface/transformers/issues/36151",),
        strategy=paused,
        relations=(Relation.AGREEMENT, Relation.LENGTHS),
        needs=("empty append",),
        share=0.5,
        situations=(reach.append("an append without a token", lambda v: v.new == 0), reach.DECODE),
    ),
)
