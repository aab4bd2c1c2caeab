"""A token attends to every token up to itself that the window allows, and to no later one."""

from __future__ import annotations

from hypothesis import strategies as st

from kvconform_specs import situations as reach
from kvconform_specs.claims import Claims
from kvconform_specs.clause import Case, Clause, Relation
from kvconform_specs.clip import clipped
from kvconform_specs.config import Config
from kvconform_specs.program import Append, Program
from kvconform_specs.strategies import Draw, appends, batches, landing, seeds, splits, straight, swapped


@st.composite
def _one_changed(draw: Draw, config: Config, claims: Claims) -> Case:
    base: Program = draw(straight(config, claims))
    row, position = _token(draw, base)
    return Case((base, swapped(base, "a", row, position, _other(base))))


@st.composite
def _aimed(draw: Draw, config: Config, claims: Claims) -> Case:
    """One token changes; in the attention profile every query points at its key (a needle). Half of the sequences end
    at the capacity, so that every slot is tried."""
    sizes: tuple[int, ...] = draw(splits(config, claims))
    if draw(st.booleans()):
        sizes = landing(list(sizes), config.capacity, claims)
    batch, seed = draw(batches(claims)), draw(seeds)
    position = draw(st.integers(0, sum(sizes) - 1))
    aim = (seed, position) if config.profile == "attention" else None
    base = clipped(config, appends("a", sizes, batch, seed, aim))
    row = draw(st.integers(0, batch - 1))
    return Case((base, swapped(base, "a", row, position, _other(base))))


@st.composite
def _each_changed(draw: Draw, config: Config, claims: Claims) -> Case:
    """A short sequence, and one program for each of its tokens with that token changed: together they show which
    output depends on which token."""
    sizes: tuple[int, ...] = draw(splits(config, claims, capacity=8))
    base = clipped(config, appends("a", sizes, 1, draw(seeds)))
    return Case((base, *(swapped(base, "a", 0, position, _other(base)) for position in range(sum(sizes)))))


def _token(draw: Draw, base: Program) -> tuple[int, int]:
    steps = [step for step in base.steps if isinstance(step, Append)]
    row = draw(st.integers(0, len(steps[0].counts) - 1))
    return row, draw(st.integers(0, sum(step.counts[row] for step in steps) - 1))


def _other(base: Program) -> int:
    """The seed of a stream that the program does not read."""
    step = base.steps[0]
    assert isinstance(step, Append)
    return step.seed + 1_000_003


CLAUSES = (
    Clause(
        name="causality.future-blind",
        text="Changing a token does not change a single bit of an earlier output or of another row's output, neither "
        "within its chunk nor across chunks.",
        why=(
            "https://github.com/Mikyx-1/TinyLLM/issues/17",
            "https://github.com/QwenLM/Qwen/issues/979",
            "https://github.com/tenstorrent/tt-metal/issues/48899",
            "https://github.com/keras-team/keras/issues/23038",
        ),
        strategy=_one_changed,
        relations=(Relation.INSENSITIVE,),
        core=True,
        situations=(reach.EARLIER_IN_CHUNK, reach.EARLIER_STEP, reach.ROWS),
    ),
    Clause(
        name="causality.past-seen",
        text="Every visible token has an effect: when one changes, each output that depends on it changes, wherever "
        "the definition's value changes by more than the bounds.",
        why=(
            "https://github.com/pytorch/pytorch/issues/108108",
            "https://github.com/onnx/onnx/issues/8054",
            "https://github.com/pytorch/executorch/pull/2689",
            "https://github.com/keras-team/keras-hub/pull/1738",
        ),
        strategy=_aimed,
        relations=(Relation.SENSITIVE,),
        core=True,
        situations=(reach.CHANGED_IN_CACHE, reach.DECODE),
    ),
    Clause(
        name="causality.visibility",
        text="The map of which output depends on which token, measured by changing one token at a time, is that of the "
        "definition: an output that must not depend on the token is equal bit for bit, one that must depend on it "
        "changes.",
        why=(
            "https://github.com/lucidrains/x-transformers/issues/187",
            "https://github.com/microsoft/onnxruntime/issues/29020",
            "https://github.com/huggingface/transformers/pull/35691",
            "https://github.com/meta-llama/llama/issues/899",
        ),
        strategy=_each_changed,
        relations=(Relation.INSENSITIVE, Relation.SENSITIVE),
        core=True,
        share=0.75,
        situations=(reach.CHANGED_IN_CACHE, reach.EARLIER_STEP),
    ),
)
