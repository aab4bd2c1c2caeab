"""The outputs depend on the tokens only, and not on the steps by which they were appended."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st

from kvconform_specs import situations as reach
from kvconform_specs.claims import Claims, changes_at, edges
from kvconform_specs.clause import Case, Clause, Relation, ordinary
from kvconform_specs.clip import clipped
from kvconform_specs.config import Config
from kvconform_specs.program import Append, Generate, Step, UncachedForward
from kvconform_specs.strategies import (
    LONGEST_CHUNK,
    Draw,
    appends,
    at_once,
    batches,
    counts,
    detours,
    fitted,
    resplit,
    seeds,
    splits,
)


def _whole(
    seq: str, total: int, batch: int, seed: int, config: Config, claims: Claims, since: int = 1
) -> tuple[Step, ...]:
    """All tokens at once: by the cache-less forward if there is one, otherwise by one prefill. Where outputs change
    with the number of tokens, the forward also runs on fewer: on the most of each epoch, from ``since`` tokens on."""
    if claims.can("uncached_forward"):
        ends = {length - 1 for length in changes_at(config, claims) if since < length <= total}
        return tuple(UncachedForward(seq, (end,) * batch, seed) for end in sorted({*ends, total}))
    return appends(seq, at_once(total, claims), batch, seed)


@st.composite
def _decode(draw: Draw, config: Config, claims: Claims) -> Case:
    prompt, new = draw(st.integers(0, 9)), draw(st.integers(1, 8))
    batch, seed = draw(batches(claims)), draw(seeds)
    sizes = (*at_once(prompt, claims), *(1,) * new)
    cached = clipped(config, appends("a", sizes, batch, seed))
    return Case((clipped(config, _whole("a", prompt + new, batch, seed, config, claims, prompt + 1)), cached))


@st.composite
def chunks(draw: Draw, config: Config, claims: Claims) -> Case:
    one: tuple[int, ...] = draw(splits(config, claims))
    other: tuple[int, ...] = draw(resplit(sum(one), claims))
    batch, seed = draw(batches(claims)), draw(seeds)
    whole = _whole("a", sum(one), batch, seed, config, claims, min(one[0], other[0]))
    return Case((clipped(config, whole), *(clipped(config, appends("a", s, batch, seed)) for s in (one, other))))


@st.composite
def _paths(draw: Draw, config: Config, claims: Claims) -> Case:
    sizes: tuple[int, ...] = draw(splits(config, claims))
    batch, seed = draw(batches(claims)), draw(seeds)
    winding: tuple[Step, ...] = draw(detours(config, claims, sizes, batch, seed))
    return Case((clipped(config, appends("a", sizes, batch, seed)), clipped(config, winding)))


@st.composite
def _full(draw: Draw, config: Config, claims: Claims) -> Case:
    """The cache-less forward on a prefix after the sequence, and on more tokens in the middle of it. Where outputs
    change with the number of tokens, it also runs on as many of them, of which other ones follow the prefix."""
    prefix, more = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    changes = changes_at(config, claims)
    if changes:
        prefix += draw(st.sampled_from((0, max(changes[0] - 6, 0))))
        prefix = max(min(prefix, config.capacity - more), 1)
    batch, seed = draw(batches(claims)), draw(seeds)
    first, second = (appends("a", (draw(counts(claims)),), batch, seed + 77) for _ in range(2))
    later = [UncachedForward("f", (prefix,) * batch, seed)]
    if changes:
        others = tuple((row, at, seed + 99 + row) for row in range(batch) for at in range(prefix, prefix + more))
        later.append(UncachedForward("f", (prefix + more,) * batch, seed, substitutions=others))
    after = clipped(config, (*first, *second, *later))
    amid = clipped(config, (*first, UncachedForward("f", (prefix + more,) * batch, seed), *second))
    return Case((after, amid))


@st.composite
def _generations(draw: Draw, config: Config, claims: Claims) -> Case:
    """Several generations, some of which end at a length where something changes (``edges``). In some cases a sequence
    is open meanwhile, and is compared with one that continues without them."""
    half = max(config.capacity // 2, 1)
    ends = st.sampled_from((0, 0, *(edge for edge in edges(config, claims) if edge > 1)))
    prompts, lengths = st.integers(1, half) | st.sampled_from((1, half)), st.integers(1, 8) | st.just(8)
    asked = st.tuples(prompts, lengths, batches(claims), ends)
    seed, steps = draw(seeds), list[Step]()
    for number, (prompt, new, batch, end) in enumerate(draw(st.lists(asked, min_size=1, max_size=3))):
        new = min(new, (end or config.capacity) - 1)
        prompt = end - new if end else min(prompt, config.capacity - new)
        steps.append(Generate("g", (prompt,) * batch, seed + 29 * number, new=new))
    if claims.interface == "generation" or not claims.can("two sequences") or not draw(st.booleans()):
        return Case((clipped(config, tuple(steps)),))
    sizes = fitted((draw(counts(claims)), draw(counts(claims))), config.capacity)
    first, *then = appends("a", sizes, draw(batches(claims)), seed + 77)
    return Case((clipped(config, (first, *then)), clipped(config, (first, *steps, *then))))


@st.composite
def _last(draw: Draw, config: Config, claims: Claims) -> Case:
    """Some steps give their last position only, at least one of them before another step; in between, the cache-less
    forward of other tokens."""
    sizes: tuple[int, ...] = draw(splits(config, claims, least=2))
    batch, seed = draw(batches(claims)), draw(seeds)
    steps: list[Append | UncachedForward] = list(appends("a", sizes, batch, seed))
    sure = draw(st.integers(0, max(len(steps) - 2, 0)))
    alone = [number == sure or draw(st.booleans()) for number in range(len(steps))]
    if claims.can("uncached_forward"):
        place, count = draw(st.integers(0, len(steps))), draw(st.integers(1, min(LONGEST_CHUNK, config.capacity)))
        steps.insert(place, UncachedForward("f", (count,) * batch, seed + 77))
        alone.insert(place, True)
    asked = tuple(replace(step, last_only=last) for step, last in zip(steps, alone, strict=True))
    return Case((clipped(config, tuple(steps)), clipped(config, asked)))


LAST_ON_CACHE = reach.append(
    "a chunk on a cache of which the last position alone is requested",
    lambda v: isinstance(v.step, Append) and v.step.last_only and v.past > 0,
    reach.holds(2),
)
LAST_UNCACHED = reach.having(
    "a cache-less forward of which the last position alone is requested",
    UncachedForward,
    lambda made: made.last_only,
    "uncached_forward",
)


def _to_the_capacity(visit: reach.Visit) -> bool:
    step = visit.step
    return isinstance(step, Generate) and step.counts[0] + step.new == visit.config.capacity


def _several(visit: reach.Visit) -> bool:
    return isinstance(visit.step, Generate) and visit.step.new > 1


def _takes_a_chunk_beyond(config: Config, claims: Claims) -> bool:
    return claims.can("overflow refused") and claims.max_chunk is None and config.capacity > 1


def _amid(visit: reach.Visit) -> bool:
    return isinstance(visit.step, UncachedForward) and any(isinstance(made, Append) for made in visit.earlier)


CLAUSES = (
    Clause(
        name="equivalence.decode",
        text="Decoding one token at a time gives the outputs of one forward over all of these tokens.",
        why=(
            "https://github.com/pytorch/executorch/pull/2010",
            "https://github.com/skyzh/tiny-llm/pull/46",
            "https://github.com/meta-pytorch/gpt-fast/issues/233",
        ),
        strategy=_decode,
        relations=(Relation.AGREEMENT,),
        core=True,
        situations=(reach.DECODE, reach.ROWS, reach.PAST_WINDOW, reach.SWITCH),
    ),
    Clause(
        name="equivalence.chunks",
        text="The same tokens give the same outputs however they are split into chunks.",
        why=(
            "https://github.com/QwenLM/Qwen/issues/979",
            "https://github.com/sgl-project/sgl-kernel-xpu/issues/196",
            "https://github.com/trymirai/lalamo/pull/200",
        ),
        strategy=chunks,
        relations=(Relation.AGREEMENT,),
        core=True,
        situations=(*reach.BASIC, reach.PAST_WINDOW, reach.SWITCH),
    ),
    Clause(
        name="equivalence.path",
        text="Outputs depend on the tokens of the row only, and not on tokens that were appended and removed, or on "
        "forks, reorders, resets and refused calls before them.",
        why=(
            "https://github.com/huggingface/transformers/issues/47433",
            "https://github.com/huggingface/transformers/issues/46612",
            "https://github.com/ggml-org/llama.cpp/pull/9525",
        ),
        strategy=_paths,
        relations=(Relation.AGREEMENT,),
        needs_any=("truncate", "fork", "reorder", "reset"),
        situations=(*reach.EDITS, reach.refused("a refused append", lambda v: v.new > 0, _takes_a_chunk_beyond)),
    ),
    Clause(
        name="equivalence.full-stable",
        text="The backend's own cache-less forward gives a prefix the same outputs alone and as part of more tokens "
        "(of as many other tokens, where they change with the number of tokens as rotary factors may), "
        "also while cached sequences are open, and does not change these.",
        why=(
            "https://github.com/OpenNMT/CTranslate2/pull/1572",
            "https://github.com/huggingface/transformers/pull/27227",
        ),
        strategy=_full,
        relations=(Relation.AGREEMENT,),
        needs=("uncached_forward",),
        situations=(reach.step("a cache-less forward while a sequence is open", _amid),),
    ),
    Clause(
        name="equivalence.generation",
        text="Each token that the backend's own greedy generation gives has the largest logit of the cache-less "
        "forward over the prompt and the tokens generated before it, wherever the lead exceeds the bounds; a "
        "generation does not depend on an earlier one, and does not change open sequences.",
        why=(
            "https://github.com/Lightning-AI/litgpt/issues/2307",
            "https://github.com/nod-ai/amd-shark-ai/pull/338",
            "https://github.com/oobabooga/textgen/pull/4145",
            "https://github.com/casper-hansen/AutoAWQ/issues/170",
            "https://github.com/abetlen/llama-cpp-python/pull/1179",
        ),
        strategy=_generations,
        relations=(Relation.GENERATED, Relation.AGREEMENT),
        profiles=("decoder",),
        needs=("generate",),
        applies=lambda config: ordinary(config) and config.capacity > 1,
        situations=(
            reach.step("a generation of several tokens", _several, reach.holds(3)),
            reach.step("a generation up to the capacity", _to_the_capacity),
        ),
    ),
    Clause(
        name="equivalence.last-position",
        text="If only the last position is requested, a step and the cache-less forward give each row the same logits "
        "of its last new token as among those of all positions, and a step leaves the same cache.",
        why=(
            "https://github.com/pytorch/executorch/pull/16171",
            "https://github.com/mlx-node/mlx-node/pull/47",
            "https://github.com/tenstorrent/tt-xla/issues/5929",
            "https://github.com/Integral2u/SharpMind/issues/57",
            "https://github.com/mobilint/mblt-model-zoo/pull/84",
        ),
        strategy=_last,
        relations=(Relation.AGREEMENT,),
        profiles=("decoder",),
        needs=("last_only",),
        situations=(LAST_ON_CACHE, LAST_UNCACHED),
    ),
)
