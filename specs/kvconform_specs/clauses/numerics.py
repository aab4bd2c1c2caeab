"""Outputs are right where scores are large, queries attend to nothing, sizes are odd and contexts are long."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from kvconform_specs import situations as reach
from kvconform_specs.any_history import any_history
from kvconform_specs.claims import Claims
from kvconform_specs.clause import Case, Clause, Relation, long, ordinary
from kvconform_specs.clip import clipped
from kvconform_specs.config import Config
from kvconform_specs.program import Append, ReadCache
from kvconform_specs.strategies import Draw, appends, at_once, batches, counts, growing, landing, seeds, splits

TILES = (16, 64, 128)
DEPTHS = (1024, 4096)


def _distributed(*distributions: str) -> Callable[[Config, Claims], SearchStrategy[Case]]:
    @st.composite
    def family(draw: Draw, config: Config, claims: Claims) -> Case:
        """Appends of one distribution, or of one after another."""
        sizes: tuple[int, ...] = draw(splits(config, claims))
        batch, seed = draw(batches(claims)), draw(seeds)
        kinds = [draw(st.sampled_from(distributions)) for _ in sizes]
        steps = tuple(Append("a", (n,) * batch, seed, distribution=k) for n, k in zip(sizes, kinds, strict=True))
        reads = (ReadCache("a"),) if claims.can("contents") and config.profile == "attention" else ()
        return Case((clipped(config, (*steps, *reads)),))

    return family


@st.composite
def _hidden(draw: Draw, config: Config, claims: Claims) -> Case:
    """A caller's mask on some steps that hides any tokens of any row, cached ones and new ones."""
    sizes: tuple[int, ...] = draw(splits(config, claims))
    batch, seed = draw(batches(claims)), draw(seeds)
    steps, length = [], 0
    for size in sizes:
        length += size
        places = st.tuples(st.integers(0, batch - 1), st.integers(0, length - 1))
        hidden = draw(st.lists(places, max_size=2 * length, unique=True).map(sorted))
        steps.append(Append("a", (size,) * batch, seed, masked=tuple(hidden)))
    return Case((clipped(config, tuple(steps)),))


@st.composite
def _empty(draw: Draw, config: Config, claims: Claims) -> Case:
    """A mask that hides from one row, or from all rows, every token up to some position: earlier queries see no key."""
    sizes: tuple[int, ...] = draw(splits(config, claims))
    batch, seed = draw(batches(claims)), draw(seeds)
    steps, length = [], 0
    for size in sizes:
        length += size
        end, row = draw(st.integers(max(length - size, 1), length)), draw(st.integers(0, batch))
        rows = range(batch) if row == batch else (row,)
        hidden = tuple((r, position) for r in rows for position in range(end))
        steps.append(Append("a", (size,) * batch, seed, masked=hidden if draw(st.integers(0, 3)) else ()))
    return Case((clipped(config, tuple(steps)),))


@st.composite
def _tiled(draw: Draw, config: Config, claims: Claims) -> Case:
    """Lengths and chunks of a kernel's tile, of one token less and of one more, with or without needles."""
    tile: int = draw(st.sampled_from(TILES))
    end = tile + draw(st.integers(-1, 1))
    past = draw(st.sampled_from((0, 1, end // 2, end - 1)))
    chunk = draw(st.sampled_from((0, tile - 1, tile, tile + 1)))
    seed, sizes = draw(seeds), landing([*at_once(past, claims)], end, claims)
    aim = (seed, draw(st.integers(0, end - 1))) if draw(st.booleans()) else None
    steps = appends("a", (*sizes, *at_once(chunk, claims)), draw(batches(claims)), seed, aim)
    return Case((clipped(config, steps),))


@st.composite
def _deep(draw: Draw, config: Config, claims: Claims) -> Case:
    """A long prompt, then decode steps whose queries point at single tokens anywhere in it."""
    depth: int = draw(st.sampled_from(DEPTHS))
    seed, batch = draw(seeds), 1
    steps = [*appends("a", at_once(depth - draw(st.integers(0, 2)), claims), batch, seed)]
    length = sum(step.counts[0] for step in steps)
    for _ in range(draw(st.integers(2, 5))):
        length += 1
        slot = draw(st.integers(0, length - 1) | st.sampled_from((0, depth // 2 - 1, depth // 2, length - 2)))
        steps.append(Append("a", (1,), seed, needle=(seed, slot)))
    size = draw(counts(claims, 3))
    return Case((clipped(config, (*steps, Append("a", (size,), seed))),))


def _hides(cached: bool) -> Callable[[reach.Visit], bool]:
    def found(visit: reach.Visit) -> bool:
        step, before = visit.step, visit.before or (0,) * len(visit.after)
        return isinstance(step, Append) and any((at < before[row]) is cached for row, at in step.masked)

    return found


def _sees_nothing(visit: reach.Visit) -> bool:
    """Some query of some row: everything up to its token is hidden."""
    step, before = visit.step, visit.before or (0,) * len(visit.after)
    return isinstance(step, Append) and any(
        {at for of, at in step.masked if of == row} >= set(range(before[row] + 1)) for row in range(len(step.counts))
    )


def _needle_among(depth: int) -> reach.Situation:
    def found(visit: reach.Visit) -> bool:
        return isinstance(visit.step, Append) and visit.step.needle is not None and visit.longest >= depth

    return reach.append(f"a needle among {depth} tokens", found, reach.holds(depth))


CLAUSES = (
    Clause(
        name="numerics.large-scores",
        text="Scores of several hundred do not overflow: the softmax is that of the scores minus their maximum over "
        "the visible keys.",
        why=("https://github.com/pytorch/pytorch/issues/103749", "https://github.com/onnx/onnx/pull/8068"),
        strategy=_distributed("large_queries", "large_queries", "normal"),
        relations=(Relation.PARITY,),
        profiles=("attention",),
        situations=(reach.distributed("large_queries"), reach.DECODE),
    ),
    Clause(
        name="numerics.zero-keys",
        text="A key that is zero is a key like any other: it has score zero, is part of the softmax, and is counted.",
        why=("https://github.com/huggingface/transformers/issues/30377",),
        strategy=_distributed("zero_keys", "zero_keys", "normal"),
        relations=(Relation.PARITY, Relation.LENGTHS),
        profiles=("attention",),
        situations=(reach.distributed("zero_keys"), reach.DECODE),
    ),
    Clause(
        name="numerics.empty-row",
        text="A query that may attend to no key gives zeros, and neither NaN nor the mean of the values, with or "
        "without a sink; any finite number where no more is claimed.",
        why=(
            "https://github.com/pytorch/pytorch/issues/103749",
            "https://github.com/ml-explore/mlx/pull/2608",
            "https://github.com/microsoft/onnxruntime/pull/28958",
        ),
        strategy=_empty,
        relations=(Relation.PARITY,),
        profiles=("attention",),
        needs=("mask",),
        situations=(reach.append("a query to which the mask leaves no key", _sees_nothing),),
    ),
    Clause(
        name="numerics.caller-mask",
        text="A caller's mask is combined with causality and window: a key is visible if all three allow it. It is "
        "boolean, True attends, and it covers every token that the row holds.",
        why=(
            "https://github.com/keras-team/keras/issues/23038",
            "https://github.com/jax-ml/jax/issues/23349",
            "https://github.com/huggingface/transformers/pull/27114",
        ),
        strategy=_hidden,
        relations=(Relation.PARITY,),
        profiles=("attention",),
        needs=("mask",),
        situations=(
            reach.append("a mask that hides a cached token", _hides(True), reach.holds(2)),
            reach.append("a mask that hides a new token", _hides(False)),
        ),
    ),
    Clause(
        name="numerics.finite",
        text="Finite inputs give finite outputs, whatever was appended, removed, forked or refused before.",
        why=(
            "https://github.com/Dao-AILab/flash-attention/issues/1745",
            "https://github.com/pytorch/pytorch/issues/103963",
        ),
        strategy=any_history,
        relations=(Relation.FINITE,),
        share=0.5,
        situations=(reach.DECODE,),
    ),
    Clause(
        name="numerics.head-dim",
        text="A head dim that is not a multiple of 8 is like any other: padding in a kernel changes neither the scale "
        "nor a sum.",
        why=("https://github.com/pytorch/pytorch/issues/112577", "https://github.com/pytorch/pytorch/pull/184180"),
        strategy=growing,
        relations=(Relation.PARITY,),
        applies=lambda config: ordinary(config) and config.head_dim % 8 != 0,
        share=0.5,
        situations=reach.BASIC,
    ),
    Clause(
        name="numerics.tiles",
        text="Lengths and chunks of a kernel's tile of 16, 64 or 128 tokens, of one token less or of one more are like "
        "any other, in every row of the tile.",
        why=(
            "https://github.com/pytorch/executorch/pull/9105",
            "https://github.com/tenstorrent/tt-metal/issues/48899",
            "https://github.com/pytorch/pytorch/pull/169222",
        ),
        strategy=_tiled,
        relations=(Relation.PARITY,),
        applies=long,
        variants=2,
        situations=tuple(reach.length(tile + more) for tile in TILES for more in (-1, 0, 1)),
    ),
    Clause(
        name="numerics.long-context",
        text="Among 1 024 and among 4 096 tokens, each single one can be retrieved.",
        why=("https://github.com/local-inference-lab/vllm/pull/17", "https://github.com/pytorch/pytorch/pull/169222"),
        strategy=_deep,
        relations=(Relation.PARITY,),
        applies=long,
        share=0.1,
        variants=1,
        situations=tuple(_needle_among(depth) for depth in DEPTHS),
    ),
)
