"""The cache holds the keys and values that were appended, and slots that hold no token have no effect."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from kvconform_specs import situations as reach
from kvconform_specs.any_history import histories
from kvconform_specs.claims import Claims
from kvconform_specs.clause import Case, Clause, Relation, floats
from kvconform_specs.clip import clipped
from kvconform_specs.config import Config
from kvconform_specs.history import Histories
from kvconform_specs.program import (
    AliasHandle,
    Append,
    Close,
    Poison,
    Program,
    ReadCache,
    Reorder,
    Reset,
    Step,
    Truncate,
    called,
)
from kvconform_specs.strategies import Draw, appends, batches, counts, fitted, seeds, splits, steadily


def _read(config: Config, claims: Claims) -> SearchStrategy[Case]:
    return histories(config, claims).map(lambda program: Case((clipped(config, _with_reads(program)),)))


def _held(config: Config, claims: Claims) -> SearchStrategy[Case]:
    """Any history, or small appends up to the capacity, with reads."""

    def made(drawn: tuple[tuple[int, ...], int, int]) -> Case:
        sizes, batch, seed = drawn
        return Case((clipped(config, (*appends("a", sizes, batch, seed), ReadCache("a"))),))

    grown = st.tuples(steadily(config, claims), batches(claims), seeds).map(made)
    return _read(config, claims) | grown if claims.can("window retention") else _read(config, claims)


def _with_reads(program: Program) -> tuple[Step, ...]:
    """The program with a read after every other step, and of every sequence at its end."""
    state, steps = Histories(), []
    for number, step in enumerate(program.steps):
        state.apply(step)
        steps.append(step)
        seq = getattr(step, "seq", "")
        if number % 2 and any(state.rows.get(seq, ())):
            steps.append(ReadCache(seq))
    return (*steps, *(ReadCache(seq) for seq, rows in state.rows.items() if any(rows)))


@st.composite
def _growing(draw: Draw, config: Config, claims: Claims) -> Case:
    """A sequence that grows and whose rows may be permuted, read after every step."""
    sizes: tuple[int, ...] = draw(splits(config, claims, least=2))
    batch, seed = draw(batches(claims)), draw(seeds)
    steps: list[Step] = []
    for number, size in enumerate(sizes):
        if claims.can("reorder") and number and draw(st.integers(0, 3)) == 3:
            steps.append(Reorder("a", tuple((row + 1) % batch for row in range(batch))))
            seed += 17
        steps += [Append("a", (size,) * batch, seed), ReadCache("a")]
    return Case((clipped(config, tuple(steps)),))


@st.composite
def _two_futures(draw: Draw, config: Config, claims: Claims) -> Case:
    """A handle that is kept while its sequence continues, and that then continues with other tokens."""
    sizes: tuple[int, ...] = draw(splits(config, claims, most=3, capacity=config.capacity // 2))
    batch, seed = draw(batches(claims)), draw(seeds)
    steps: list[Step] = [*appends("a", sizes, batch, seed), AliasHandle("a", "b")]
    if claims.can("truncate") and draw(st.integers(0, 2)) == 2:
        steps.append(Truncate("a", draw(st.integers(claims.keeps(sum(sizes)), sum(sizes)))))
    elif claims.can("reset") and draw(st.integers(0, 3)) == 3:
        steps.append(Reset("a"))
    free = dict.fromkeys("ab", config.capacity - sum(sizes))  # at most: a truncation frees more
    for number in range(draw(st.integers(1, 2))):
        for seq, stream in (("a", seed + 77 + number), ("b", seed + 177 + number)):
            count = min(draw(counts(claims)), free[seq])
            free[seq] -= count
            steps += [Append(seq, (count,) * batch, stream)] if count else []
    return Case((clipped(config, tuple(steps)),))


def _poisoned(kinds: tuple[str, ...]) -> Callable[[Config, Claims], SearchStrategy[Case]]:
    @st.composite
    def family(draw: Draw, config: Config, claims: Claims) -> Case:
        """Slots without a token are filled after every step; keys, values or both."""
        sizes: tuple[int, ...] = draw(splits(config, claims))
        batch, seed = draw(batches(claims)), draw(seeds)
        steps: list[Step] = []
        length = mark = 0
        for size in sizes:
            steps.append(Append("a", (size,) * batch, seed))
            length += size
            mark = max(mark, length)
            if claims.can("truncate") and draw(st.integers(0, 4)) == 4:
                length = draw(st.integers(claims.keeps(mark), length))
                seed += 17
                steps.append(Truncate("a", length))
            kind: str = draw(st.sampled_from(kinds))
            keys, values = ((kind, kind), (kind, "none"), ("none", kind))[draw(st.integers(0, 2))]
            steps.append(Poison("a", keys, values))
        if length < config.capacity:
            steps.append(Append("a", (1,) * batch, seed))
        return Case((clipped(config, tuple(steps)),))

    return family


@st.composite
def _nan_removed(draw: Draw, config: Config, claims: Claims) -> Case:
    """Tokens, ordinary ones or NaN, that are truncated, reset or closed away; then others take their slots."""
    ways = [way for way in ("truncate", "reset") if claims.can(way)] + ["close"]
    sizes: tuple[int, ...] = draw(splits(config, claims, most=3, capacity=config.capacity // 2))
    batch, seed, way = draw(batches(claims)), draw(seeds), draw(st.sampled_from(ways))
    kept = sum(sizes) if way == "truncate" else 0
    begun = appends("a", sizes, batch, seed)
    most = config.capacity - sum(sizes)
    most = min(most, claims.rollback or most) if way == "truncate" else most
    removed = appends("a", fitted((draw(counts(claims)), 1), most), batch, seed + 17)
    removal: Step = Truncate("a", kept) if way == "truncate" else Reset("a") if way == "reset" else Close("a")
    name = "b" if way == "close" else "a"
    later = appends(name, fitted(draw(splits(config, claims, most=3)), config.capacity - kept), batch, seed + 34)
    turned = tuple(replace(step, distribution="nan") for step in removed)
    return Case(tuple(clipped(config, (*begun, *tokens, removal, *later)) for tokens in (removed, turned)))


def _are_nan(visit: reach.Visit) -> bool:
    return isinstance(visit.step, Append) and visit.step.distribution == "nan"


def _after_nan(visit: reach.Visit) -> bool:
    return any(isinstance(made, Append) and made.distribution == "nan" for made in visit.earlier) and visit.longest > 0


CLAUSES = (
    Clause(
        name="contents.round-trip",
        text="A read gives the keys and values that were appended, in the order of the tokens, each under its own "
        "head; those of a quantised cache may differ by half a step.",
        why=(
            "https://github.com/nntrainer/nntrainer/pull/3814",
            "https://github.com/huggingface/transformers/issues/34232",
        ),
        strategy=_read,
        relations=(Relation.CONTENTS,),
        profiles=("attention",),
        needs=("contents",),
        situations=(reach.READ, reach.DECODE, *reach.EDITS),
    ),
    Clause(
        name="contents.past-unchanged",
        text="A token's cached keys and values are written once: no later step changes a bit of them, in any layer.",
        why=("https://github.com/huggingface/transformers/pull/24653", "https://github.com/MemTensor/MemOS/pull/2303"),
        strategy=_growing,
        relations=(Relation.STABLE_CONTENTS,),
        needs=("contents", "lossless cache"),
        situations=(reach.READ, reach.DECODE),
    ),
    Clause(
        name="contents.old-handle",
        text="A step on an immutable cache does not change the handle that it was given: the old and the new one both "
        "continue, and neither is affected by what the other appends.",
        why=(
            "https://github.com/huggingface/transformers/issues/37078",
            "https://github.com/MemTensor/MemOS/pull/2303",
        ),
        strategy=_two_futures,
        relations=(Relation.PARITY,),
        needs=("immutable", "two sequences"),
        situations=(
            reach.after_a(
                AliasHandle, "a new handle that continues", lambda v: called(v.step).seq == "a", reach.holds(2)
            ),
            reach.after_a(
                AliasHandle, "an old handle that continues", lambda v: called(v.step).seq == "b", reach.holds(2)
            ),
        ),
    ),
    Clause(
        name="contents.dead-slots",
        text="Slots without a token may hold any finite number, in keys and in values, and no output depends on it.",
        why=("https://github.com/meta-pytorch/gpt-fast/issues/233", "https://github.com/pytorch/pytorch/pull/169222"),
        strategy=_poisoned(("junk",)),
        relations=(Relation.PARITY,),
        needs=("poison",),
        situations=(reach.poisoned("keys"), reach.poisoned("values")),
    ),
    Clause(
        name="contents.poison-safe",
        text="Slots that hold no token may hold NaN and infinities, in keys and in values, where a backend claims so.",
        why=(
            "https://github.com/Dao-AILab/flash-attention/issues/2374",
            "https://github.com/vllm-project/vllm/pull/936",
            "https://github.com/pytorch/pytorch/issues/101967",
        ),
        strategy=_poisoned(("nan", "inf")),
        relations=(Relation.PARITY,),
        needs=("poison", "poison-safe slots"),
        situations=(reach.poisoned("keys"), reach.poisoned("values")),
    ),
    Clause(
        name="contents.nan-removed",
        text="Tokens that held NaN leave nothing behind where a backend claims that unused slots may hold anything: "
        "once they are truncated, reset or closed away, no output depends on them by a bit.",
        why=(
            "https://github.com/vllm-project/vllm/pull/50283",
            "https://github.com/alibaba/rtp-llm/pull/587",
            "https://github.com/flashinfer-ai/flashinfer/pull/942",
        ),
        strategy=_nan_removed,
        relations=(Relation.INSENSITIVE,),
        profiles=("attention", "hidden"),
        needs=("poison-safe slots",),
        applies=floats,
        situations=(
            reach.append("tokens of NaN", _are_nan, reach.holds(2)),
            reach.append("an append behind them", _after_nan, reach.holds(2)),
        ),
    ),
    Clause(
        name="contents.present",
        text="A read gives every token that the cache holds, and no other slot; a cache that evicts gives at least "
        "those that the next query may attend to, and no more than it claims to retain.",
        why=("https://github.com/onnx/onnx/pull/8068", "https://github.com/Blaizzy/mlx-vlm/pull/2036"),
        strategy=_held,
        relations=(Relation.RETAINED_COUNT,),
        needs=("contents",),
        situations=(reach.READ, reach.DECODE, reach.PAST_WINDOW),
    ),
)
