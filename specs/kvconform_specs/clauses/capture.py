"""What was compiled, captured or bound once works for every later length, and shares memory only as requested."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st

from kvconform_specs import situations as reach
from kvconform_specs.claims import Claims
from kvconform_specs.clause import Case, Clause, Relation
from kvconform_specs.clauses.shape import sweep
from kvconform_specs.clip import clipped
from kvconform_specs.config import Config
from kvconform_specs.program import AliasHandle, Append, Step
from kvconform_specs.strategies import Draw, appends, at_once, batches, seeds, splits


@st.composite
def _growing(draw: Draw, config: Config, claims: Claims) -> Case:
    """Two sequences at different depths, decoded in turn by steps of one shape, past every power of two in reach."""
    batch, seed = draw(batches(claims)), draw(seeds)
    names = "ab" if claims.can("two sequences") else "a"
    steps: list[Step] = []
    room = {}
    for number, name in enumerate(names):
        past = draw(st.integers(0, 20))
        steps += appends(name, at_once(past, claims), batch, seed + 77 * number)
        room[name] = config.capacity - past
    for _ in range(draw(st.integers(3, 9))):
        for number, name in enumerate(names):
            if room[name] > 0:
                steps += appends(name, (1,), batch, seed + 77 * number)
                room[name] -= 1
    return Case((clipped(config, tuple(steps)),))


@st.composite
def _aliased(draw: Draw, config: Config, claims: Claims) -> Case:
    """The same appends with the present in the memory of the past, in its own, and in either; an old handle is used
    again only where its memory was not written."""
    sizes: tuple[int, ...] = draw(splits(config, claims, least=2))
    steps = appends("a", sizes, draw(batches(claims)), draw(seeds))
    mixed: list[Step] = []
    for step in steps:
        shared = bool(draw(st.booleans()))
        mixed.append(replace(step, in_place=shared))
    last = steps[-1]
    if len(steps) > 1 and claims.can("two sequences"):
        other = replace(last, seq="b", seed=last.seed + 77, in_place=True)  # what it writes must not reach ``a``
        mixed[-1:] = [AliasHandle("a", "b"), replace(last, in_place=False), other]
        if sum(sizes) < config.capacity:
            mixed.append(replace(last, counts=(1,) * len(last.counts)))
    all_shared = tuple(replace(step, in_place=True) for step in steps)
    return Case((clipped(config, steps), clipped(config, all_shared), clipped(config, tuple(mixed))))


CLAUSES = (
    Clause(
        name="capture.growth",
        text="Steps of one shape work as the length grows, in several sequences at once: no captured step uses an old "
        "length, position, mask or address.",
        why=(
            "https://github.com/NVIDIA/TensorRT-LLM/pull/18769",
            "https://github.com/alibaba/rtp-llm/pull/1084",
            "https://github.com/flashinfer-ai/flashinfer/issues/2511",
        ),
        strategy=_growing,
        relations=(Relation.PARITY,),
        share=0.5,
        situations=(reach.DECODE, reach.IN_TURN),
    ),
    Clause(
        name="capture.aliasing",
        text="Outputs do not depend on whether the present is written into the memory of the past or into its own, and "
        "with its own the past does not change.",
        why=(
            "https://github.com/microsoft/onnxruntime/pull/23315",
            "https://github.com/microsoft/onnxruntime/pull/27108",
            "https://github.com/microsoft/onnxruntime-genai/pull/1604",
        ),
        strategy=_aliased,
        relations=(Relation.PARITY,),
        needs=("in_place",),
        situations=(
            reach.append(
                "a present in the memory of the past",
                lambda v: isinstance(v.step, Append) and v.step.in_place and v.past > 0,
                reach.holds(2),
            ),
        ),
    ),
    Clause(
        name="capture.graphs",
        text="Whatever the batch, count and past, no more graphs are compiled or captured than claimed.",
        why=("https://github.com/huggingface/optimum/issues/1913", "https://github.com/paiml/aprender/pull/2030"),
        strategy=sweep,
        relations=(Relation.GRAPH_COUNT,),
        needs=("bound on graphs",),
        share=0.5,
        situations=reach.SIZES,
    ),
)
