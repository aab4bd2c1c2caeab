"""The capacity is reported, usable to the last token, and never exceeded silently."""

from __future__ import annotations

from hypothesis import strategies as st

from kvconform_specs import situations as reach
from kvconform_specs.any_history import any_history
from kvconform_specs.claims import Claims
from kvconform_specs.clause import Case, Clause, Relation
from kvconform_specs.clip import clipped
from kvconform_specs.config import Config
from kvconform_specs.program import Append, Program, Reject, Step, Truncate
from kvconform_specs.strategies import Draw, appends, at_once, batches, landing, seeds, splits


@st.composite
def _to_the_last(draw: Draw, config: Config, claims: Claims) -> Case:
    """Any path to exactly the capacity: by a decode step, by a chunk, or at once."""
    drawn: tuple[int, ...] = draw(splits(config, claims))
    if draw(st.booleans()):
        sizes = landing(list(drawn), config.capacity, claims)
    else:
        sizes = (*drawn, *at_once(config.capacity - sum(drawn), claims))
    return Case((clipped(config, appends("a", sizes, draw(batches(claims)), draw(seeds))),))


@st.composite
def _beyond(draw: Draw, config: Config, claims: Claims) -> Case:
    """Appends that would exceed the capacity, from below it or at it, among appends that do not. In the end the
    capacity is reached, and one token more is refused."""
    drawn: tuple[int, ...] = draw(splits(config, claims, most=3))
    near = max(config.capacity - draw(st.integers(0, 3)), 0)
    sizes = landing(list(drawn), near, claims) if draw(st.booleans()) else drawn
    batch, seed = draw(batches(claims)), draw(seeds)
    fresh = appends("a", sizes, batch, seed)
    steps: list[Step] = []
    length = 0
    for append in (*fresh, None):
        beyond = config.capacity - length + draw(st.integers(1, 3))
        if beyond <= (claims.max_chunk or beyond) and (append is None or draw(st.booleans())):
            steps.append(Reject(Append("a", (beyond,) * batch, seed + 77)))
        if append is not None:
            steps.append(append)
            length += append.counts[0]
    last = appends("a", at_once(config.capacity - length, claims), batch, seed)
    refused = Reject(Append("a", (1,) * batch, seed + 77))
    again: tuple[Step, ...] = ()
    if claims.can("truncate"):  # shows whether the refused token left a trace
        again = Truncate("a", config.capacity - 1), Append("a", (1,) * batch, seed)
    return Case((Program(config, (*fresh, *last, *again)), Program(config, (*steps, *last, refused, *again))))


@st.composite
def _any_room(draw: Draw, config: Config, claims: Claims) -> Case:
    """Any history, or any path to the capacity."""
    case: Case = draw(_to_the_last(config, claims) if draw(st.integers(0, 2)) == 2 else any_history(config, claims))
    return case


def _one_too_many(visit: reach.Visit) -> bool:
    return visit.past == visit.config.capacity and visit.new == 1


def _across(visit: reach.Visit) -> bool:
    return 0 < visit.past < visit.config.capacity < visit.past + visit.new


CLAUSES = (
    Clause(
        name="capacity.full",
        text="A sequence may hold exactly as many tokens as the capacity, and the last one is like any other.",
        why=(
            "https://github.com/pytorch/executorch/pull/5227",
            "https://github.com/huggingface/transformers/issues/32503",
        ),
        strategy=_to_the_last,
        relations=(Relation.PARITY,),
        situations=(
            reach.FULL,
            reach.append(
                "a decode step that reaches the capacity", lambda v: v.longest == v.config.capacity and v.new == 1
            ),
            reach.append(
                "a chunk that reaches the capacity",
                lambda v: v.longest == v.config.capacity and v.new > 1,
                reach.chunks(),
            ),
        ),
    ),
    Clause(
        name="capacity.overflow",
        text="An append that would exceed the capacity is refused with an exception and changes nothing: no token is "
        "clamped, wrapped around or written elsewhere.",
        why=(
            "https://github.com/Dao-AILab/flash-attention/issues/638",
            "https://github.com/huggingface/transformers/issues/30351",
            "https://github.com/pytorch/executorch/pull/5227",
        ),
        strategy=_beyond,
        relations=(Relation.AGREEMENT,),
        needs=("overflow refused",),
        situations=(
            reach.FULL,
            reach.refused("one token more than the capacity, at the capacity", _one_too_many, reach.always),
            reach.refused("a chunk that begins within the capacity and ends beyond it", _across, reach.chunks()),
        ),
    ),
    Clause(
        name="capacity.room",
        text="The backend reports how many more tokens each row takes: the capacity minus the row's length.",
        why=("https://github.com/ROCm/hip-ep/pull/989", "https://github.com/huggingface/transformers/issues/30377"),
        strategy=_any_room,
        relations=(Relation.FREE_SLOTS,),
        needs=("free_slots",),
        share=0.5,
        situations=(reach.DECODE, reach.FULL),
    ),
)
