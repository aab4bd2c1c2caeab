"""A sequence begins empty, leaves nothing behind when it ends, and is independent of the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from hypothesis import strategies as st

from kvconform_specs import forks
from kvconform_specs import situations as reach
from kvconform_specs.claims import Claims
from kvconform_specs.clause import Case, Clause, Relation
from kvconform_specs.clip import clipped
from kvconform_specs.config import Config
from kvconform_specs.program import Append, Close, Fork, Reject, Reorder, Reset, Step, Truncate, called
from kvconform_specs.rollbacks import refused, repeated, whole
from kvconform_specs.strategies import LARGEST_BATCH, Draw, appends, batches, counts, fitted, seeds, splits


@st.composite
def _reset(draw: Draw, config: Config, claims: Claims) -> Case:
    earlier: tuple[int, ...] = draw(splits(config, claims, most=3))
    sizes: tuple[int, ...] = draw(splits(config, claims, most=3))
    batch, seed = draw(batches(claims)), draw(seeds)
    fresh, again = appends("a", sizes, batch, seed), Reset("a") if claims.can("reset") else Close("a")
    return Case((clipped(config, fresh), clipped(config, (*appends("a", earlier, batch, seed + 77), again, *fresh))))


@st.composite
def _two(draw: Draw, config: Config, claims: Claims) -> Case:
    """Sequences ``a`` and ``b``, interleaved or one after the other, against ``b`` alone and, interleaved, ``a``."""
    first: tuple[int, ...] = draw(splits(config, claims, most=4))
    second: tuple[int, ...] = draw(splits(config, claims, most=4))
    seed = draw(seeds)
    a = appends("a", first, draw(batches(claims)), seed)
    b = appends("b", second, draw(batches(claims)), seed + 77)
    interleaved = (claims.max_sequences or 2) > 1 and draw(st.booleans())
    steps: list[Step] = []
    if interleaved:
        for i in range(max(len(a), len(b))):
            steps += [*a[i : i + 1], *b[i : i + 1]]
    else:
        steps += [*a, Close("a"), *b]
    # alone first: if the other sequence came before both programs, a lasting effect of it would be in both
    alone = a if interleaved and draw(st.booleans()) else b
    return Case((clipped(config, alone), clipped(config, tuple(steps))))


@st.composite
def _forgotten(draw: Draw, config: Config, claims: Claims) -> Case:
    """Appends, a truncation to nothing, to one token, to all but one, to all, or to any length, then other tokens."""
    batch, seed = draw(batches(claims)), draw(seeds)
    steps: list[Step] = []
    length = mark = 0
    for number in range(draw(st.integers(1, 3))):
        sizes: tuple[int, ...] = draw(splits(config, claims, most=3))
        steps += appends("a", fitted(sizes, config.capacity - length), batch, seed + 17 * number)
        length = min(length + sum(sizes), config.capacity)
        mark = max(mark, length)
        least = claims.keeps(mark)
        length = draw(
            st.sampled_from((least, max(min(1, length), least), max(length - 1, least), length))
            | st.integers(least, length)
        )
        steps.append(Truncate("a", length))
    size = min(draw(counts(claims)), config.capacity - length)
    return Case((clipped(config, (*steps, *appends("a", (size,) if size else (), batch, seed + 77))),))


@st.composite
def _out_of_range(draw: Draw, config: Config, claims: Claims) -> Case:
    sizes: tuple[int, ...] = draw(splits(config, claims))
    fresh = appends("a", sizes, draw(batches(claims)), draw(seeds))
    steps: list[Step] = []
    length = 0
    for append in fresh:
        steps.append(append)
        length += append.counts[0]
        wrong = draw(st.integers(0, 3))
        if wrong < 3:
            steps.append(Reject(Truncate("a", (length + 1, -1, length + config.capacity)[wrong])))
    return Case((clipped(config, fresh), clipped(config, tuple(steps))))


@st.composite
def _forked(draw: Draw, config: Config, claims: Claims) -> Case:
    """A sequence, its copy and perhaps a copy of that: they continue in turn, each with its own tokens."""
    sizes: tuple[int, ...] = draw(splits(config, claims, most=3, capacity=config.capacity // 2))
    batch, seed = draw(batches(claims)), draw(seeds)
    steps: list[Step] = [*appends("a", sizes, batch, seed), Fork("a", "b")]
    names = ["a", "b"]
    for number in range(draw(st.integers(2, 5))):
        name = names[draw(st.integers(0, len(names) - 1))]
        steps.append(Append(name, (draw(counts(claims, 3)),) * batch, seed + 77 + 17 * number))
        if number == 1 and (claims.max_sequences or 3) > 2 and draw(st.booleans()):
            steps.append(Fork("b", "c"))
            names.append("c")
        elif number == 2 and draw(st.integers(0, 2)) == 2:
            steps.append(Close(names.pop(0)))
    return Case((clipped(config, (*steps, *(Append(n, (1,) * batch, seed + 7) for n in names))),))


@st.composite
def _turned(draw: Draw, config: Config, claims: Claims) -> Case:
    """Rows with different tokens are permuted by a cycle, or repeated, or dropped, and continue."""
    batch, seed = min(claims.max_batch or LARGEST_BATCH, LARGEST_BATCH), draw(seeds)
    sizes: tuple[int, ...] = draw(splits(config, claims, most=2, capacity=config.capacity // 2))
    steps: list[Step] = [*appends("a", sizes, batch, seed)]
    rows = batch
    for number in range(draw(st.integers(1, 3))):
        kept = rows if draw(st.integers(0, 2)) else draw(st.integers(1, batch))
        cycle = tuple((row + 1) % rows for row in range(rows))
        picked = tuple(draw(st.integers(0, rows - 1)) for _ in range(kept))
        order = cycle if draw(st.booleans()) else picked
        steps.append(Reorder("a", order))
        rows = len(order)
        steps.append(Append("a", (draw(counts(claims, 3)),) * rows, seed + 77 + 17 * number))
    return Case((clipped(config, tuple(steps)),))


def _after_closed(walks: Sequence[reach.Walk]) -> bool:
    return any(
        visit.appends and any(isinstance(made, Close) and made.seq != called(visit.step).seq for made in visit.earlier)
        for one in walks
        for visit in one
    )


def _no_reset(config: Config, claims: Claims) -> bool:
    return not claims.can("reset")


def _any_depth(config: Config, claims: Claims) -> bool:
    return claims.rollback is None


def _several_truncations(visit: reach.Visit) -> bool:
    return isinstance(visit.step, Truncate) and isinstance(visit.earlier[-1], Truncate) and visit.longest < visit.past


def _keeps_all(visit: reach.Visit) -> bool:
    return isinstance(visit.step, Truncate) and visit.after == visit.before


def _behind_all(words: str, that: Callable[[reach.Visit], bool], possible: reach.Possible) -> reach.Situation:
    """An append to a sequence with tokens, right behind a truncation that removed none of them."""

    def reached(walks: Sequence[reach.Walk]) -> bool:
        pairs = (pair for one in walks for pair in pairwise(one))
        return any(_keeps_all(made) and visit.appends and visit.past > 0 and that(visit) for made, visit in pairs)

    return reach.Situation(words, reached, possible)


def _longer_than_a_page(config: Config, claims: Claims) -> bool:
    return claims.page is not None and config.capacity > claims.page


def _too_deep(visit: reach.Visit) -> bool:
    return isinstance(visit.step, Reject) and visit.step.wrong == "depth"


def _can_be_too_deep(config: Config, claims: Claims) -> bool:
    return claims.refuses(config.capacity, 2, config.window) > 1


def _refused_truncation(words: str, wrong: Callable[[int, int], bool]) -> reach.Situation:
    """``wrong(tokens to keep, tokens)`` of some refused truncation."""

    def found(visit: reach.Visit) -> bool:
        call = called(visit.step)
        return isinstance(call, Truncate) and isinstance(call.length, int) and wrong(call.length, visit.past)

    return reach.refused(f"a refused truncation {words}", found, reach.always)


CLAUSES = (
    Clause(
        name="lifecycle.reset",
        text="A sequence that was reset, or closed and opened again where there is no reset, is like a new one: keys, "
        "values, length and positions start from nothing.",
        why=("https://github.com/rasbt/LLMs-from-scratch/pull/925", "https://github.com/Lightning-AI/litgpt/pull/1596"),
        strategy=_reset,
        relations=(Relation.AGREEMENT,),
        core=True,
        situations=(
            reach.RESET,
            reach.step("a close", lambda v: isinstance(v.step, Close), _no_reset),
            reach.after_a(Reset, "a decode step behind a reset", lambda v: v.new == 1, reach.claimed("reset")),
        ),
    ),
    Clause(
        name="lifecycle.independent",
        text="Sequences do not affect one another: neither while both are open, nor when one is opened after another "
        "was closed, whether shorter or longer.",
        why=(
            "https://github.com/rajveer43/VeloxQuant-MLX/pull/59",
            "https://github.com/TrenTorch/TrenTorch/pull/141",
            "https://github.com/ggml-org/llama.cpp/issues/27994",
        ),
        strategy=_two,
        relations=(Relation.AGREEMENT,),
        situations=(reach.IN_TURN, reach.Situation("a sequence behind one that was closed", _after_closed)),
    ),
    Clause(
        name="lifecycle.truncate",
        text="After a truncation to 0, to all but one, to all or to any other length, everything is as if the removed "
        "tokens had never been appended, and other tokens may take their places.",
        why=(
            "https://github.com/huggingface/transformers/issues/47433",
            "https://github.com/ml-explore/mlx-lm/pull/1868",
            "https://github.com/NVIDIA/kvpress/pull/114",
        ),
        strategy=_forgotten,
        relations=(Relation.PARITY, Relation.LENGTHS),
        needs=("truncate",),
        situations=(
            reach.truncated("to nothing", lambda kept, was: kept == 0 < was, _any_depth),
            reach.truncated("to all but one", lambda kept, was: 0 < kept == was - 1, reach.holds(2)),
            reach.after_a(Truncate, "other tokens in the places of removed ones", lambda v: True, reach.always),
            reach.PAST_WINDOW,
        ),
    ),
    Clause(
        name="lifecycle.truncate-range",
        text="The argument of truncate is the number of tokens to keep, from 0 to the length; any other value is "
        "refused with an exception and changes nothing.",
        why=(
            "https://github.com/huggingface/transformers/issues/30312",
            "https://github.com/ml-explore/mlx-lm/pull/1868",
        ),
        strategy=_out_of_range,
        relations=(Relation.AGREEMENT,),
        needs=("truncate",),
        situations=(
            _refused_truncation("to more tokens than there are", lambda kept, was: kept > was),
            _refused_truncation("to a negative length", lambda kept, was: kept < 0),
        ),
    ),
    Clause(
        name="lifecycle.truncate-whole",
        text="A truncation to the length that a sequence has changes nothing, at any length, also at 0, at a length of "
        "whole pages and at the capacity; whatever is appended behind it is computed as if there had been none.",
        why=(
            "https://github.com/huggingface/transformers/issues/30312",
            "https://github.com/Blaizzy/mlx-vlm/pull/2036",
        ),
        strategy=whole,
        relations=(Relation.PARITY, Relation.LENGTHS, Relation.FREE_SLOTS),
        needs=("truncate",),
        situations=(
            reach.step("a truncation of no token to 0", lambda v: _keeps_all(v) and v.past == 0),
            reach.step(
                "a truncation of a full cache to the capacity", lambda v: _keeps_all(v) and v.past == v.config.capacity
            ),
            _behind_all("a decode step behind a truncation that keeps all", lambda v: v.new == 1, reach.holds(2)),
            _behind_all("a chunk behind a truncation that keeps all", lambda v: v.new > 1, reach.chunks(past=1)),
            _behind_all(
                "an append behind a truncation that keeps all of whole pages",
                lambda v: v.past % (v.claims.page or 1) == 0,
                _longer_than_a_page,
            ),
            reach.step(
                "a truncation that keeps all, of more tokens than the window",
                lambda v: _keeps_all(v) and v.past > (v.config.window or 0),
                reach.windowed,
            ),
        ),
    ),
    Clause(
        name="lifecycle.rollback",
        text="Truncations may follow one another, with or without new tokens in between, as long as they do not go "
        "back further than is claimed: a shallow one does not make a deeper one wrong.",
        why=("https://github.com/ml-explore/mlx-lm/issues/1776", "https://github.com/ml-explore/mlx-lm/pull/1109"),
        strategy=repeated,
        relations=(Relation.PARITY, Relation.LENGTHS),
        needs=("truncate",),
        situations=(
            reach.step("truncations that follow one another", _several_truncations, reach.holds(3)),
            reach.after_a(Truncate, "other tokens in the places of removed ones", lambda v: True, reach.holds(2)),
        ),
    ),
    Clause(
        name="lifecycle.rollback-limit",
        text="A truncation that goes back further than the claimed rollback, counted from the largest length since "
        "the sequence was opened or reset, is refused with an exception and changes nothing, where that is claimed or "
        "where the tokens that it needs are not retained.",
        why=("https://github.com/ml-explore/mlx-lm/pull/1109", "https://github.com/ml-explore/mlx-lm/issues/1776"),
        strategy=refused,
        relations=(Relation.AGREEMENT,),
        needs=("limited rollback",),
        situations=(
            reach.refused("a truncation deeper than the rollback", _too_deep, _can_be_too_deep),
            reach.refused(
                "a truncation deeper than the rollback behind another one",
                lambda v: _too_deep(v) and any(isinstance(made, Truncate) for made in v.earlier),
                _can_be_too_deep,
            ),
        ),
    ),
    Clause(
        name="lifecycle.fork",
        text="A fork and its original are independent: each continues as if it were alone, whatever the other appends, "
        "and also after the other is closed.",
        why=(
            "https://github.com/ggml-org/llama.cpp/issues/3802",
            "https://github.com/huggingface/transformers/issues/20299",
        ),
        strategy=_forked,
        relations=(Relation.PARITY,),
        needs=("fork", "two sequences"),
        situations=(
            reach.after_a(
                Fork, "an original that continues after its fork", lambda v: called(v.step).seq == "a", reach.holds(2)
            ),
            reach.after_a(Fork, "a fork that continues", lambda v: called(v.step).seq != "a", reach.holds(2)),
        ),
    ),
    Clause(
        name="lifecycle.fork-outlives",
        text="A fork keeps its tokens, and continues with the definition's values, after the sequence that it was made "
        "from was reset, truncated or grown; also a fork of a fork when the one in the middle is gone, and when a "
        "sequence that was reset is filled again with other tokens.",
        why=(
            "https://github.com/sgl-project/sglang/issues/38319",
            "https://github.com/vllm-project/vllm/issues/44701",
            "https://github.com/ovg-project/kvcached/issues/446",
        ),
        strategy=forks.outlived,
        relations=(Relation.PARITY, Relation.LENGTHS),
        needs=("fork", "two sequences"),
        situations=(
            forks.behind("its original was reset and filled again", forks.refilled, reach.claimed("reset")),
            forks.behind("its original was truncated", forks.shortened, reach.claimed("truncate")),
            forks.behind("its original has grown", forks.grown, reach.always),
            forks.behind("its original, itself a fork, is gone", forks.gone_in_the_middle, reach.always),
        ),
    ),
    Clause(
        name="lifecycle.reorder",
        text="After a reorder row i is the old row rows[i], in every layer, keys and values alike; a row may be taken "
        "twice, its copies being independent, or not at all.",
        why=(
            "https://github.com/huggingface/transformers/issues/46612",
            "https://github.com/PaddlePaddle/PaddleNLP/issues/6672",
            "https://github.com/awslabs/sockeye/pull/731",
        ),
        strategy=_turned,
        relations=(Relation.PARITY,),
        needs=("reorder", "two rows"),
        situations=(
            reach.having("a row taken twice", Reorder, lambda made: len(set(made.rows)) < len(made.rows)),
            reach.having(
                "a permutation",
                Reorder,
                lambda made: len(made.rows) > 1 and sorted(made.rows) == list(range(len(made.rows))) != list(made.rows),
            ),
            reach.after_a(Reorder, "an append behind a reorder", lambda v: True, reach.holds(2)),
        ),
    ),
)
