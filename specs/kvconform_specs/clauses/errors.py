"""A call with invalid arguments is refused with an exception, and changes nothing."""

from __future__ import annotations

from hypothesis import strategies as st

from kvconform_specs import situations as reach
from kvconform_specs.any_history import malformations, refusals
from kvconform_specs.claims import Claims
from kvconform_specs.clause import Case, Clause, Relation
from kvconform_specs.clip import clipped
from kvconform_specs.config import Config
from kvconform_specs.program import MALFORMED, NAMES, Append, Reject, Reorder, Step, Truncate
from kvconform_specs.strategies import Draw, appends, batches, seeds, splits


@st.composite
def _malformed(draw: Draw, config: Config, claims: Claims) -> Case:
    """An append with malformed inputs, on an empty cache or on one that holds tokens."""
    sizes: tuple[int, ...] = draw(
        splits(config, claims, most=3, capacity=max(config.capacity - 9, config.capacity // 2))
    )
    batch, seed = draw(batches(claims)), draw(seeds)
    steps: list[Step] = [*appends("a", sizes, batch, seed)]
    for wrong in draw(st.lists(st.sampled_from(malformations(config, batch)), min_size=1, max_size=2)):
        size = draw(st.integers(1, min(claims.max_chunk or 4, 4)))
        steps.insert(draw(st.integers(0, len(steps))), Reject(Append("a", (size,) * batch, seed + 77), wrong))
    return Case((clipped(config, tuple(steps)),))


@st.composite
def _refused(draw: Draw, config: Config, claims: Claims) -> Case:
    """The same appends with and without calls in between that must be refused."""
    sizes: tuple[int, ...] = draw(splits(config, claims))
    batch, seed = draw(batches(claims)), draw(seeds)
    fresh = appends("a", sizes, batch, seed)
    steps: list[Step] = []
    length = 0
    sure = draw(st.integers(0, len(fresh) - 1))  # after this append there is a refused call, if any is claimed
    for number, append in enumerate(fresh):
        steps.append(append)
        length += append.counts[0]
        refused = refusals(config, claims, "a", (length,) * batch, seed + 77)
        if refused:
            steps += draw(st.lists(st.sampled_from(refused), min_size=int(number == sure), max_size=2))
    return Case((clipped(config, fresh), clipped(config, tuple(steps))))


def _wrong(kind: str) -> reach.Situation:
    def possible(config: Config, claims: Claims) -> bool:
        return kind in MALFORMED[config.profile] and (kind != "fewer rows" or claims.can("two rows"))

    return reach.refused(
        f"inputs with wrong {kind}", lambda v: isinstance(v.step, Reject) and v.step.wrong == kind, possible
    )


def _call(kind: type[Step], *needs: str) -> reach.Situation:
    def found(visit: reach.Visit) -> bool:
        return isinstance(visit.step, Reject) and not visit.step.wrong and isinstance(visit.step.step, kind)

    return reach.refused(f"a refused {NAMES[kind]}", found, reach.claimed(*needs))


CLAUSES = (
    Clause(
        name="errors.malformed",
        text="Inputs with the wrong dtype, rank, number of heads, head dim, batch (a row too many, or one row for "
        "several) or token id, and keys and values of different lengths, are refused with an exception.",
        why=(
            "https://github.com/microsoft/onnxruntime/issues/26262",
            "https://github.com/pytorch/pytorch/issues/112577",
        ),
        strategy=_malformed,
        relations=(Relation.SHAPE,),
        needs=("refusal",),
        share=0.5,
        situations=tuple(_wrong(wrong) for wrong in sorted({one for kinds in MALFORMED.values() for one in kinds})),
    ),
    Clause(
        name="errors.unchanged",
        text="A refused call of any kind changes nothing, in every layer and every row: everything after it is as if "
        "it had not been made.",
        why=(
            "https://github.com/ggml-org/llama.cpp/pull/9525",
            "https://github.com/mdegans/drama_llama/issues/52",
            "https://github.com/ggml-org/llama.cpp/issues/27052",
        ),
        strategy=_refused,
        relations=(Relation.AGREEMENT, Relation.LENGTHS),
        needs_any=("refusal", "overflow refused", "truncate", "reorder"),
        situations=(
            _call(Append, "overflow refused"),
            _call(Truncate, "truncate"),
            _call(Reorder, "reorder"),
            reach.refused(
                "malformed inputs",
                lambda v: isinstance(v.step, Reject) and v.step.wrong != "",
                reach.both(reach.claimed("refusal"), reach.holds(2)),
            ),
        ),
    ),
)
