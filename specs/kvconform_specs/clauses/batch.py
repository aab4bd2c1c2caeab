"""The rows of a batch do not affect one another, whatever their lengths."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import zip_longest

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from kvconform_specs import situations as reach
from kvconform_specs.claims import Claims
from kvconform_specs.clause import Case, Clause, Relation, floats, ordinary
from kvconform_specs.clip import clipped
from kvconform_specs.config import Config
from kvconform_specs.program import Append, Reorder, Step, Truncate
from kvconform_specs.rollbacks import apart
from kvconform_specs.strategies import (
    LARGEST_BATCH,
    Draw,
    alone,
    appends,
    arranged,
    batches,
    counts,
    seeds,
    splits,
    uneven,
)


def _largest(claims: Claims) -> int:
    return min(claims.max_batch or LARGEST_BATCH, LARGEST_BATCH)


@st.composite
def rows_alone(draw: Draw, config: Config, claims: Claims) -> Case:
    """A batch, and each of its rows alone."""
    steps: tuple[Append, ...]
    if claims.can("ragged") and draw(st.booleans()):
        steps = draw(uneven(config, claims))
    else:
        steps = appends("a", draw(splits(config, claims)), draw(st.integers(2, _largest(claims))), draw(seeds))
    base, batch = clipped(config, steps), len(steps[0].counts)
    return Case((base, *(one for row in range(batch) if (one := alone(base, row)).steps)))


@st.composite
def _permuted(draw: Draw, config: Config, claims: Claims) -> Case:
    sizes: tuple[int, ...] = draw(splits(config, claims))
    batch, seed = draw(st.integers(2, _largest(claims))), draw(seeds)
    turn = draw(st.integers(1, batch - 1))
    order = tuple((row + turn) % batch for row in range(batch))
    if batch > 2 and draw(st.booleans()):
        order = (order[1], order[0], *order[2:])
    base = clipped(config, appends("a", sizes, batch, seed))
    return Case((base, clipped(config, arranged("a", sizes, order, seed))))


def _uneven(side: str) -> Callable[[Config, Claims], SearchStrategy[Case]]:
    @st.composite
    def family(draw: Draw, config: Config, claims: Claims) -> Case:
        """Ragged appends, then perhaps the longest row is dropped or rows are repeated, and the others continue."""
        first: tuple[Append, ...] = draw(uneven(config, claims, side))
        steps: list[Step] = [*first]
        lengths = [sum(step.counts[row] for step in first) for row in range(len(first[0].counts))]
        seed = first[0].seed + 77
        if claims.can("reorder") and draw(st.integers(0, 2)):
            longest = lengths.index(max(lengths))
            rows = tuple(row for row in range(len(lengths)) if row != longest or len(lengths) == 1)
            rows = rows if draw(st.booleans()) else (*rows[:1], *rows[:1], longest)[: _largest(claims)]
            steps.append(Reorder("a", rows))
            lengths = [lengths[row] for row in rows]
        for number in range(draw(st.integers(0, 2))):
            size = min(draw(counts(claims, 4)), config.capacity - max(lengths))
            if size > 0:
                steps.append(Append("a", (size,) * len(lengths), seed + 17 * number))
                lengths = [length + size for length in lengths]
        return Case((clipped(config, tuple(steps)),))

    return family


@st.composite
def _padded(draw: Draw, config: Config, claims: Claims) -> Case:
    """The same ragged program with other tokens in the columns that hold none."""
    base: tuple[Append, ...] = draw(uneven(config, claims))
    other = tuple(
        Append(s.seq, s.counts, s.seed, pad=None if s.pad is None else (s.pad[0], s.pad[1] + 1_000_003)) for s in base
    )
    return Case((clipped(config, base), clipped(config, other)))


@st.composite
def _arriving(draw: Draw, config: Config, claims: Claims) -> Case:
    """Rows arrive one after another, while those that are there grow or pause; at the end all grow."""
    batch, seed, steps = draw(st.integers(2, _largest(claims))), draw(seeds), []
    for row in range(batch):
        steps.append(tuple(draw(counts(claims)) if r == row else int(r < row) for r in range(batch)))
        for _ in range(draw(st.integers(0, 2))):
            pausing = draw(st.integers(-1, row)) if row else -1  # -1: none
            steps.append(tuple(int(r <= row and r != pausing) for r in range(batch)))
    steps.append((1,) * batch)
    side = claims.padding[draw(st.integers(0, len(claims.padding) - 1))]
    made = [
        Append("a", grown, seed, pad=(side, seed + 31) if len(set(grown)) > 1 else None) for grown in steps
    ]  # at most 9 + 3 * 2 + 2 + 1 tokens a row: within any capacity
    return Case((clipped(config, tuple(made)),))


@st.composite
def _nan_beside(draw: Draw, config: Config, claims: Claims) -> Case:
    """A row of a batch, or another sequence, with NaN and without it, perhaps from a later step on."""
    seed = draw(seeds)
    steps: tuple[Append, ...]
    if (claims.max_sequences or 2) < 2 or (draw(st.booleans()) and (claims.max_batch or 2) > 1):
        if claims.can("ragged") and _roomy(config) and draw(st.booleans()):
            steps = draw(uneven(config, claims))
        else:
            steps = appends("a", draw(splits(config, claims, least=2)), draw(st.integers(2, _largest(claims))), seed)
        row, first = draw(st.integers(0, len(steps[0].counts) - 1)), draw(st.integers(0, len(steps) - 1))
        turned = tuple(replace(step, nan=(row,)) if number >= first else step for number, step in enumerate(steps))
    else:
        mine = appends("a", draw(splits(config, claims, least=2)), draw(batches(claims)), seed)
        other = appends("b", draw(splits(config, claims)), draw(batches(claims)), seed + 77)
        steps = tuple(step for pair in zip_longest(mine, other) for step in pair if step is not None)
        turned = tuple(replace(step, distribution="nan") if step.seq == "b" else step for step in steps)
    return Case((clipped(config, steps), clipped(config, turned)))


def _roomy(config: Config) -> bool:
    return ordinary(config) and config.capacity >= 24


def _two_rows(config: Config, claims: Claims) -> bool:
    return claims.can("two rows") and config.capacity > 1


def _nan_sequence(visit: reach.Visit) -> bool:
    return isinstance(visit.step, Append) and visit.step.distribution == "nan"


def _middle_first(visit: reach.Visit) -> bool:
    return len(visit.after) > 2 and min(visit.after) < visit.after[0] < max(visit.after)


def _pauses(visit: reach.Visit) -> bool:
    step = visit.step
    return isinstance(step, Append) and any(
        count == 0 < was for count, was in zip(step.counts, visit.before, strict=False)
    )


def _on_the_left(visit: reach.Visit) -> bool:
    return isinstance(visit.step, Append) and visit.step.pad is not None and visit.step.pad[0] == "left"


def _truncated_apart(visit: reach.Visit) -> bool:
    return isinstance(visit.step, Truncate) and len(set(visit.after)) > 1


def _apart(visit: reach.Visit) -> bool:
    return len(set(visit.before)) > 1 and any(isinstance(made, Truncate) for made in visit.earlier)


CLAUSES = (
    Clause(
        name="batch.row-solo",
        text="A row's outputs in a batch are those of the row alone.",
        why=(
            "https://github.com/microsoft/onnxruntime/pull/29247",
            "https://github.com/onnx/onnx/pull/8353",
            "https://github.com/Dao-AILab/flash-attention/issues/772",
        ),
        strategy=rows_alone,
        relations=(Relation.AGREEMENT,),
        needs=("two rows",),
        situations=(reach.ROWS, reach.RAGGED, reach.DECODE),
    ),
    Clause(
        name="batch.permutation",
        text="Permuting the rows of a batch permutes the outputs, and changes nothing else.",
        why=("https://github.com/microsoft/onnxruntime/pull/32264", "https://github.com/pytorch/pytorch/issues/162588"),
        strategy=_permuted,
        relations=(Relation.AGREEMENT,),
        needs=("two rows",),
        situations=(reach.ROWS, reach.DECODE),
    ),
    Clause(
        name="batch.ragged",
        text="Each row has its own length: its mask, its slots and its positions follow from its own tokens, and not "
        "from row 0, the longest row or the column, also after rows were dropped or repeated.",
        why=(
            "https://github.com/microsoft/onnxruntime/pull/29752",
            "https://github.com/jundot/omlx/issues/2172",
            "https://github.com/huggingface/optimum/pull/1381",
        ),
        strategy=_uneven(""),
        relations=(Relation.PARITY, Relation.LENGTHS),
        needs=("ragged", "two rows"),
        applies=_roomy,
        situations=(
            reach.RAGGED,
            reach.DECODE,
            reach.append("a row that is neither the longest nor the shortest first", _middle_first, reach.three_rows),
        ),
    ),
    Clause(
        name="batch.padding",
        text="The contents of columns without a token are arbitrary: they do not change a bit of any token's output.",
        why=("https://github.com/unslothai/unsloth/pull/3795", "https://github.com/jax-ml/jax/issues/23349"),
        strategy=_padded,
        relations=(Relation.INSENSITIVE,),
        needs=("ragged", "two rows"),
        applies=_roomy,
        situations=(reach.RAGGED,),
    ),
    Clause(
        name="batch.left-padding",
        text="Columns without a token may come first: the first real token of a row still has position 0, and decoding "
        "continues from the row's own length.",
        why=(
            "https://github.com/thu-nics/C2C/pull/19",
            "https://github.com/huggingface/optimum/pull/1381",
            "https://github.com/unslothai/unsloth/pull/4078",
        ),
        strategy=_uneven("left"),
        relations=(Relation.PARITY,),
        needs=("left padding", "two rows"),
        applies=_roomy,
        situations=(reach.append("columns without a token on the left", _on_the_left), reach.DECODE),
    ),
    Clause(
        name="batch.staggered",
        text="A row may stay empty while others grow, and may pause: its positions are its own, from 0 on.",
        why=("https://github.com/ml-explore/mlx-lm/issues/1776", "https://github.com/jundot/omlx/issues/2172"),
        strategy=_arriving,
        relations=(Relation.PARITY,),
        needs=("ragged at any time", "two rows"),
        applies=_roomy,
        situations=(
            reach.append("a row without a token beside one that has some", lambda v: 0 in v.after),
            reach.append("a row that pauses", _pauses),
        ),
    ),
    Clause(
        name="batch.nan-isolated",
        text="NaN in the tokens of one row or sequence stays there: it does not change a bit of the outputs of any "
        "other row or sequence.",
        why=(
            "https://github.com/flashinfer-ai/flashinfer/pull/942",
            "https://github.com/nod-ai/amd-shark-ai/pull/665",
            "https://github.com/ml-explore/mlx/pull/2608",
        ),
        strategy=_nan_beside,
        relations=(Relation.INSENSITIVE,),
        profiles=("attention", "hidden"),
        needs_any=("two rows", "two sequences"),
        applies=floats,
        situations=(
            reach.append("a row of NaN", lambda v: isinstance(v.step, Append) and v.step.nan != (), _two_rows),
            reach.append("a sequence of NaN", _nan_sequence, reach.claimed("two sequences")),
        ),
    ),
    Clause(
        name="batch.rollback",
        text="A truncation may keep another number of tokens of each row: each then continues from its own length, and "
        "none sees what was removed of it.",
        why=("https://github.com/Blaizzy/mlx-vlm/issues/1155",),
        strategy=apart,
        relations=(Relation.PARITY, Relation.LENGTHS),
        needs=("truncate", "truncate_rows", "two rows"),
        situations=(
            reach.step("rows that are truncated to different lengths", _truncated_apart, reach.holds(2)),
            reach.append("an append to rows that were truncated to different lengths", _apart, reach.holds(3)),
        ),
    ),
)
