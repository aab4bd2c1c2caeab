"""The caller's memory stays the caller's: inputs are read and not kept, and outputs belong to the caller."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st

from kvconform_specs import situations as reach
from kvconform_specs.any_history import histories
from kvconform_specs.claims import Claims
from kvconform_specs.clause import Case, Clause, Relation
from kvconform_specs.clip import clipped
from kvconform_specs.config import Config
from kvconform_specs.program import LAYOUTS, Append, Generate, Program, Step, UncachedForward
from kvconform_specs.strategies import Draw, appends, at_once, batches, counts, seeds, splits


@st.composite
def _watched(draw: Draw, config: Config, claims: Claims) -> Case:
    """Any history, its inputs in every layout, perhaps with a caller's mask; and what computes without a cache."""
    program: Program = draw(histories(config, claims))
    layouts = st.sampled_from(LAYOUTS[:-1])
    steps: list[Step] = []
    for step in program.steps:
        if isinstance(step, Append):
            step = replace(step, layout=draw(layouts))
            masked = claims.can("mask") and config.profile == "attention" and step.counts[0] > 0
            step = replace(step, masked=((0, 0),)) if masked and draw(st.booleans()) else step
        steps.append(step)
    return Case((clipped(config, (*steps, *_uncached(config, claims, draw(batches(claims)), draw(seeds)))),))


def _uncached(config: Config, claims: Claims, batch: int, seed: int) -> tuple[Step, ...]:
    """The steps that compute without a cache, as far as they are claimed."""
    steps: list[Step] = []
    if claims.can("uncached_forward"):
        steps.append(UncachedForward("x", (3,) * batch, seed))
    if claims.can("generate") and config.profile == "decoder":
        steps.append(Generate("g", (3,) * batch, seed, new=2))
    return tuple(steps)


@st.composite
def _reused(draw: Draw, config: Config, claims: Claims) -> Case:
    """Prompt, chunks and decode steps, or any history: with inputs of their own, and out of one piece of memory."""
    if draw(st.booleans()):
        program: Program = draw(histories(config, claims))
    else:
        batch, seed = draw(batches(claims)), draw(seeds)
        sizes: tuple[int, ...] = draw(splits(config, claims, most=3, capacity=config.capacity - 3))
        program = clipped(config, appends("a", (*sizes, 1, 1, 1), batch, seed))
    steps = tuple(replace(step, reused=True) if isinstance(step, Append) else step for step in program.steps)
    return Case((program, Program(config, steps)))


@st.composite
def _kept(draw: Draw, config: Config, claims: Claims) -> Case:
    """Steps of equal sizes, perhaps of two sequences in turn, and what computes without a cache."""
    batch, seed, size = draw(batches(claims)), draw(seeds), draw(counts(claims, 3))
    names = ("a", "b") if (claims.max_sequences or 2) > 1 and draw(st.booleans()) else ("a",)
    prompt: int = draw(st.integers(0, max(config.capacity - 3 * size, 0)))
    steps: list[Step] = []
    for number, name in enumerate(names):
        steps += appends(name, at_once(prompt, claims), batch, seed + 17 * number)
    for _ in range(draw(st.integers(2, 3))):
        for number, name in enumerate(names):
            steps += appends(name, (size,), batch, seed + 17 * number)
    extra = _uncached(config, claims, batch, seed)
    steps = [*extra, *steps, *extra]
    if claims.can("copied inputs"):  # an output that is a view of an input changes with it
        steps = [replace(step, reused=True) if isinstance(step, Append) else step for step in steps]
    return Case((clipped(config, tuple(steps)),))


def _behind_reused(visit: reach.Visit) -> bool:
    return visit.past > 0 and any(isinstance(made, Append) and made.reused for made in visit.earlier)


STRIDED = reach.append("inputs that are views", lambda v: isinstance(v.step, Append) and v.step.layout != "contiguous")


CLAUSES = (
    Clause(
        name="memory.inputs-unchanged",
        text="A call only reads the caller's memory: its inputs are bit for bit what they were, whatever their layout, "
        "and nothing is written before them, behind them or between the numbers of a view, also by a call that is "
        "refused.",
        why=(
            "https://github.com/huggingface/transformers/pull/41535",
            "https://github.com/hao-ai-lab/FastVideo/pull/1457",
            "https://github.com/fla-org/flash-linear-attention/issues/1102",
            "https://github.com/pytorch/pytorch/issues/156022",
        ),
        strategy=_watched,
        relations=(Relation.INPUTS,),
        situations=(reach.DECODE, reach.ROWS, STRIDED),
    ),
    Clause(
        name="memory.inputs-reused",
        text="A step keeps no view of its inputs: the caller may overwrite their memory as soon as the step has "
        "returned, and use it for the inputs of the next one.",
        why=(
            "https://github.com/microsoft/onnxruntime-genai/pull/1225",
            "https://github.com/microsoft/onnxruntime/issues/15009",
            "https://github.com/ModelEngine-Group/unified-cache-management/pull/322",
        ),
        strategy=_reused,
        relations=(Relation.INSENSITIVE,),
        needs=("copied inputs",),
        situations=(reach.append("a step behind one whose inputs were overwritten", _behind_reused, reach.holds(2)),),
    ),
    Clause(
        name="memory.outputs-kept",
        text="An output belongs to the caller: no later call changes a bit of it, and neither does the caller who "
        "overwrites the inputs.",
        why=(
            "https://github.com/pytorch/TensorRT/issues/3275",
            "https://github.com/pytorch/pytorch/issues/144386",
            "https://github.com/mlc-ai/relax/pull/89",
        ),
        strategy=_kept,
        relations=(Relation.OUTPUTS,),
        situations=(reach.DECODE,),
    ),
)
