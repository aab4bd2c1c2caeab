"""The strategies of programs reach the situations that they claim to reach, as often as one cell of a run needs."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from claims_of_tests import EVERYTHING
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.internal.conjecture import providers
from lanes import slow_except

from kvconform.search.effort import DEFAULT_EFFORT, EFFORTS
from kvconform_specs.claims import Claims
from kvconform_specs.clause import Case
from kvconform_specs.clauses import ALL, BY_NAME
from kvconform_specs.config import Config
from kvconform_specs.configs import CONFIGS
from kvconform_specs.history import Histories
from kvconform_specs.program import (
    LAYOUTS,
    MALFORMED,
    NAMES,
    AliasHandle,
    Append,
    Close,
    Fork,
    Generate,
    Lengths,
    Poison,
    Program,
    Reject,
    Reorder,
    Reset,
    Truncate,
    UncachedForward,
)
from kvconform_specs.strategies import drawn

GQA, WINDOW = CONFIGS["attention-gqa"], CONFIGS["attention-window"]
ROPE = CONFIGS["decoder-rope"]
LONG, SINK = CONFIGS["attention-long"], CONFIGS["attention-sink"]
POOR = Claims(profiles=("attention", "decoder"), max_batch=1, max_chunk=4, max_sequences=1)


def lengths(program: Program) -> list[tuple[Append, tuple[int, ...], tuple[int, ...]]]:
    """Each append with the rows' lengths before and after it."""
    state, found = Lengths(), []
    for step in program.steps:
        if isinstance(step, Append):
            found.append((step, state.of(step.seq) or (0,) * len(step.counts), state.after(step)))
        state.apply(step)
    return found


def chunk_on_a_cache(p: Program) -> bool:
    return any(max(step.counts) > 1 and max(before) > 0 for step, before, _ in lengths(p))


def second_sequence_shorter(p: Program) -> bool:
    totals: dict[str, int] = {}
    for step, _before, after in lengths(p):
        totals[step.seq] = max(after)
    return len(totals) > 1 and list(totals.values())[1] < next(iter(totals.values()))


def two_live_interleaved(p: Program) -> bool:
    names = [s.seq for s in p.steps if isinstance(s, Append)]
    return any(names[i] == names[i + 2] != names[i + 1] for i in range(len(names) - 2))


def not_its_own_inverse(p: Program) -> bool:
    return any(
        isinstance(s, Reorder)
        and len(s.rows) > 2
        and sorted(s.rows) == list(range(len(s.rows)))
        and [s.rows[r] for r in s.rows] != list(range(len(s.rows)))
        for s in p.steps
    )


def repeats_a_row(p: Program) -> bool:
    return any(isinstance(s, Reorder) and len(set(s.rows)) < len(s.rows) for s in p.steps)


def reaches(length: int) -> Callable[[Program], bool]:
    return lambda p: any(max(after) == length for _s, _b, after in lengths(p))


def crosses(length: int, by: int) -> Callable[[Program], bool]:
    """A step on a cache of fewer tokens ends at that length or later; it has one token, or at least ``by``."""
    return append(lambda s, b, a: 0 < max(b) < length <= max(a) and (max(s.counts) >= by > 1 or max(s.counts) == by))


def has(kind: type[Any], that: Callable[[Any], bool] = lambda s: True) -> Callable[[Program], bool]:
    return lambda p: any(isinstance(s, kind) and that(s) for s in p.steps)


def append(that: Callable[[Append, tuple[int, ...], tuple[int, ...]], bool]) -> Callable[[Program], bool]:
    """An append, with the rows' lengths before and after it."""
    return lambda p: any(that(*one) for one in lengths(p))


def row_0_in_the_middle(p: Program) -> bool:
    return any(len(after) > 2 and min(after) < after[0] < max(after) for _s, _b, after in lengths(p))


def a_row_pauses(p: Program) -> bool:
    """A row that holds tokens gets none while another grows, and more in a later step."""
    grown = lengths(p)
    return any(
        count == 0 < before[row] and any(later.counts[row] for later, *_ in grown[number + 1 :])
        for number, (step, before, _after) in enumerate(grown)
        for row, count in enumerate(step.counts)
    )


def two_prompts_of_one_shape(p: Program) -> bool:
    return any(a.counts == b.counts for a, b in pairwise(generations(p)))


def straddles_the_capacity(p: Program) -> bool:
    """A refused append that begins within the capacity and ends beyond it."""
    histories = Histories()
    for step in p.steps:
        if isinstance(step, Reject) and isinstance(step.step, Append) and not step.wrong:
            past = max((len(r) for r in histories.rows.get(step.step.seq, ())), default=0)
            if 0 < past < p.config.capacity and max(step.step.counts) > 1:
                return True
        histories.apply(step)
    return False


def one_more_than_full(p: Program) -> bool:
    histories = Histories()
    for step in p.steps:
        if isinstance(step, Reject) and isinstance(step.step, Append):
            rows = histories.rows.get(step.step.seq, ())
            if any(len(r) + max(step.step.counts) == p.config.capacity + 1 for r in rows):
                return True
        histories.apply(step)
    return False


def other_tokens_after_truncating_to(kept: Callable[[int, int], bool]) -> Callable[[Program], bool]:
    """``kept(tokens kept, tokens before)`` of a truncation that is followed by an append from another stream."""

    def situation(p: Program) -> bool:
        histories = Histories()
        for number, step in enumerate(p.steps[:-1]):
            rows, after = histories.rows.get(getattr(step, "seq", ""), ()), p.steps[number + 1]
            if isinstance(step, Truncate) and isinstance(after, Append) and after.seq == step.seq:
                seeds = {stream.seed for row in rows for stream, _position in row}
                if kept(step.length, len(rows[0])) and after.seed not in seeds:
                    return True
            histories.apply(step)
        return False

    return situation


def needle_among(depth: int) -> Callable[[Program], bool]:
    return lambda p: any(step.needle is not None and max(after) >= depth for step, _before, after in lengths(p))


def sees_nothing(p: Program) -> bool:
    """Some query of some row: everything up to its token is hidden."""
    return any(
        {position for of, position in step.masked if of == row} >= set(range(before[row] + 1))
        for step, before, _after in lengths(p)
        for row in range(len(step.counts))
    )


def generations(p: Program) -> list[Generate]:
    return [step for step in p.steps if isinstance(step, Generate)]


def generates_to(length: int) -> Callable[[Program], bool]:
    return lambda p: any(step.counts[0] + step.new == length for step in generations(p))


def generates_amid_a_sequence(p: Program) -> bool:
    return (
        len(p.steps) > 2 and isinstance(p.steps[0], Append) and isinstance(p.steps[-1], Append) and generations(p) != []
    )


def asked_alone_before_another(p: Program) -> bool:
    """A chunk on a cache gives its last position alone, and a step behind it all of them."""
    grown = [(step, max(before) > 0) for step, before, _after in lengths(p) if isinstance(step, Append)]
    return any(
        a.last_only and cached and max(a.counts) > 1 and not b.last_only and max(b.counts) > 1
        for (a, cached), (b, _) in pairwise(grown)
    )


def nan_before(kind: type[Any]) -> Callable[[Program], bool]:
    """NaN goes away by such a step, and tokens follow."""

    def situation(p: Program) -> bool:
        removal = next((n for n, step in enumerate(p.steps) if isinstance(step, kind)), 0)
        held = any(isinstance(step, Append) and step.distribution == "nan" for step in p.steps[:removal])
        return held and any(isinstance(step, Append) for step in p.steps[removal + 1 :])

    return situation


def reused_by_equal_steps(p: Program) -> bool:
    """Two steps hand over arrays of one size in the same memory, so that every pointer is the same."""
    appends = [step for step in p.steps if isinstance(step, Append)]
    return any(a.reused and b.reused and a.counts == b.counts for a, b in pairwise(appends))


def two_forks_of_one(p: Program) -> bool:
    made = [step.seq for step in p.steps if isinstance(step, Fork)]
    return len(set(made)) < len(made)


def refilled_before_a_step_of_its_fork(p: Program) -> bool:
    """A sequence is reset or truncated and given other tokens before its fork is stepped for the first time."""
    for number, fork in enumerate(p.steps):
        if isinstance(fork, Fork):
            later = p.steps[number + 1 :]
            first = next((n for n, s in enumerate(later) if isinstance(s, Append) and s.seq == fork.into), 0)
            own = [step for step in later[:first] if getattr(step, "seq", "") == fork.seq]
            if any(isinstance(a, Reset | Truncate) and isinstance(b, Append) for a, b in pairwise(own)):
                return True
    return False


W = WINDOW.window or 0
PAGE = EVERYTHING.page or 0
LEARNED = CONFIGS["decoder-learned"]
LONGROPE = CONFIGS["decoder-longrope"]
(SWITCH,) = LONGROPE.changes_at
KINDS = (Truncate, Fork, Reorder, Reset, Reject, Close)
SITUATIONS: tuple[tuple[str, Config, str, Callable[[Program], bool]], ...] = (
    ("shape.output", GQA, "a decode step of one row", append(lambda s, _b, _a: s.counts == (1,))),
    ("shape.length", GQA, "a truncation to nothing", has(Truncate, lambda s: s.length == 0)),
    ("shape.length", GQA, "ragged rows", append(lambda s, _b, _a: len(set(s.counts)) > 1)),
    ("shape.first-step", GQA, "the capacity at once", reaches(GQA.capacity)),
    ("shape.no-specialisation", GQA, "three batch sizes", lambda p: len({len(s.counts) for s, *_ in lengths(p)}) == 3),
    ("causality.future-blind", GQA, "a chunk on a cache", chunk_on_a_cache),
    ("causality.visibility", WINDOW, "one token more than the window", reaches(W + 1)),
    ("equivalence.chunks", WINDOW, "a chunk longer than the window", append(lambda s, _b, _a: max(s.counts) > W)),
    *(("equivalence.chunks", WINDOW, f"length {n}", reaches(n)) for n in (W - 1, W, W + 1, 2 * W, 3 * W)),
    *(("equivalence.path", GQA, NAMES[kind], has(kind)) for kind in KINDS),
    ("equivalence.path", GQA, "a permutation that is not its own inverse", not_its_own_inverse),
    (
        "equivalence.decode",
        GQA,
        "more than five decode steps of three rows",
        lambda p: sum(s.counts == (1,) * 3 for s, *_ in lengths(p)) > 5,
    ),
    (
        "equivalence.full-stable",
        GQA,
        "an uncached forward amid a sequence",
        lambda p: isinstance(p.steps[1], UncachedForward),
    ),
    ("equivalence.generation", ROPE, "prompts of one shape in a row", two_prompts_of_one_shape),
    ("equivalence.generation", ROPE, "amid an open sequence", generates_amid_a_sequence),
    ("equivalence.generation", ROPE, "three prompts of one token", has(Generate, lambda s: s.counts == (1, 1, 1))),
    (
        "equivalence.generation",
        ROPE,
        "eight tokens after half the capacity",
        has(Generate, lambda s: s.new == 8 and s.counts[0] == ROPE.capacity // 2),
    ),
    *(("equivalence.generation", ROPE, f"up to length {n}", generates_to(n)) for n in (ROPE.capacity,)),
    *(("equivalence.generation", LEARNED, f"up to length {n}", generates_to(n)) for n in (4, 5, 6, 10)),
    ("equivalence.last-position", ROPE, "one step alone, then a whole one", asked_alone_before_another),
    ("equivalence.last-position", ROPE, "three rows", has(Append, lambda s: s.last_only and len(s.counts) == 3)),
    ("equivalence.last-position", ROPE, "an uncached forward", has(UncachedForward, lambda s: s.last_only)),
    ("definition.attention", GQA, "two open sequences in turn", two_live_interleaved),
    ("definition.attention", GQA, "a permutation that is not its own inverse", not_its_own_inverse),
    ("definition.attention", GQA, "a row taken twice", repeats_a_row),
    *(("definition.attention", GQA, NAMES[kind], has(kind)) for kind in (*KINDS, AliasHandle)),
    ("definition.decoder", ROPE, "a chunk on a cache", chunk_on_a_cache),
    ("definition.positions", LONGROPE, "a decode step across the switch", crosses(SWITCH, by=1)),
    ("equivalence.chunks", LONGROPE, "a chunk across the switch", crosses(SWITCH, by=2)),
    ("equivalence.decode", LONGROPE, "a decode step across the switch", crosses(SWITCH, by=1)),
    ("equivalence.path", LONGROPE, "a step across the switch", crosses(SWITCH, by=1)),
    ("lifecycle.reset", GQA, "a chunk on a cache", chunk_on_a_cache),
    ("lifecycle.independent", GQA, "two open sequences in turn", two_live_interleaved),
    ("lifecycle.independent", GQA, "the second sequence is shorter", second_sequence_shorter),
    ("capacity.full", GQA, "the capacity", reaches(GQA.capacity)),
    ("capacity.full", GQA, "by a chunk", append(lambda s, _b, a: max(s.counts) > 1 and max(a) == GQA.capacity)),
    ("capacity.overflow", GQA, "one token too many", one_more_than_full),
    ("capacity.overflow", GQA, "a chunk across the capacity", straddles_the_capacity),
    ("batch.ragged", GQA, "row 0 neither longest nor shortest", row_0_in_the_middle),
    ("batch.ragged", GQA, "a row dropped", has(Reorder, lambda s: len(s.rows) < 3)),
    ("batch.left-padding", GQA, "left padding", has(Append, lambda s: s.pad is not None and s.pad[0] == "left")),
    ("batch.staggered", GQA, "an empty row", append(lambda s, b, a: 0 in a)),
    ("batch.staggered", GQA, "a row pauses and goes on", a_row_pauses),
    ("batch.permutation", GQA, "three rows", append(lambda s, _b, _a: len(s.counts) == 3)),
    ("lifecycle.truncate", GQA, "to nothing", other_tokens_after_truncating_to(lambda kept, was: kept == 0 < was)),
    ("lifecycle.truncate", GQA, "to all", other_tokens_after_truncating_to(lambda kept, was: kept == was > 0)),
    (
        "lifecycle.truncate",
        GQA,
        "to all but one",
        other_tokens_after_truncating_to(lambda kept, was: 0 < kept == was - 1),
    ),
    (
        "lifecycle.truncate-range",
        GQA,
        "to a negative length",
        has(Reject, lambda s: isinstance(s.step, Truncate) and s.step.length < 0),
    ),
    (
        "lifecycle.truncate-whole",
        GQA,
        "other tokens after all of none",
        other_tokens_after_truncating_to(lambda kept, was: kept == was == 0),
    ),
    (
        "lifecycle.truncate-whole",
        GQA,
        "other tokens after all of two pages",
        other_tokens_after_truncating_to(lambda kept, was: kept == was == 2 * PAGE),
    ),
    ("lifecycle.fork-outlives", GQA, "a fork of a fork", has(Fork, lambda s: s.seq != "a")),
    ("lifecycle.fork-outlives", GQA, "two forks of one sequence", two_forks_of_one),
    (
        "lifecycle.fork-outlives",
        GQA,
        "no step of a fork before its original is refilled",
        refilled_before_a_step_of_its_fork,
    ),
    ("lifecycle.reorder", GQA, "a permutation that is not its own inverse", not_its_own_inverse),
    ("lifecycle.reorder", GQA, "a row taken twice", repeats_a_row),
    ("lifecycle.reorder", GQA, "a row dropped", has(Reorder, lambda s: len(s.rows) < 3)),
    *(("window.step-by-step", WINDOW, f"length {n}", reaches(n)) for n in (W - 1, W, W + 1, 2 * W)),
    (
        "window.long-chunk",
        WINDOW,
        "a chunk longer than the window, on a cache",
        append(lambda s, b, _a: max(s.counts) > W and max(b) > 0),
    ),
    ("window.hybrid", LEARNED, "one token more than the window", reaches(W + 1)),
    *(
        ("errors.malformed", GQA, f"wrong {wrong}", has(Reject, lambda s, wrong=wrong: s.wrong == wrong))
        for wrong in MALFORMED["attention"]
    ),
    ("errors.unchanged", GQA, "a reorder that is refused", has(Reject, lambda s: isinstance(s.step, Reorder))),
    (
        "layout.equal-sizes",
        GQA,
        "as many tokens as heads",
        append(lambda s, _b, a: max(a) == GQA.heads and max(s.counts) > 1),
    ),
    ("layout.equal-sizes", GQA, "as many new tokens as rows", append(lambda s, _b, _a: s.counts == (3, 3, 3))),
    ("layout.equal-sizes", GQA, "the head dim", append(lambda s, _b, _a: max(s.counts) == GQA.head_dim)),
    *(("layout.strides", GQA, kind, has(Append, lambda s, kind=kind: s.layout == kind)) for kind in LAYOUTS),
    *(
        ("numerics.tiles", LONG, f"length {n}", reaches(n))
        for tile in (16, 64, 128)
        for n in (tile - 1, tile, tile + 1)
    ),
    *(("numerics.long-context", LONG, f"a needle among {n} tokens", needle_among(n)) for n in (1024, 4096)),
    ("numerics.large-scores", GQA, "large queries", has(Append, lambda s: s.distribution == "large_queries")),
    ("numerics.zero-keys", GQA, "zero keys", has(Append, lambda s: s.distribution == "zero_keys")),
    ("quantised.scales", GQA, "small keys", has(Append, lambda s: s.distribution == "small_keys_large_values")),
    *(("numerics.empty-row", config, "a query that sees no key", sees_nothing) for config in (SINK, WINDOW)),
    ("contents.dead-slots", GQA, "junk keys alone", has(Poison, lambda s: s.keys == "junk" and s.values == "none")),
    ("contents.poison-safe", GQA, "NaN values alone", has(Poison, lambda s: s.values == "nan" and s.keys == "none")),
    ("contents.nan-removed", GQA, "NaN, then a truncation", nan_before(Truncate)),
    ("contents.nan-removed", GQA, "NaN, then a reset", nan_before(Reset)),
    ("contents.nan-removed", GQA, "NaN, then another sequence", nan_before(Close)),
    ("batch.nan-isolated", GQA, "a row of NaN beside others", has(Append, lambda s: s.nan != () and len(s.counts) > 1)),
    ("batch.nan-isolated", GQA, "NaN in ragged rows", has(Append, lambda s: s.nan != () and len(set(s.counts)) > 1)),
    ("batch.nan-isolated", GQA, "another sequence of NaN", has(Append, lambda s: s.distribution == "nan")),
    *(
        ("memory.inputs-unchanged", GQA, kind, has(Append, lambda s, kind=kind: s.layout == kind))
        for kind in LAYOUTS[:-1]
    ),
    ("memory.inputs-unchanged", GQA, "a caller's mask", has(Append, lambda s: s.masked != ())),
    ("memory.inputs-unchanged", GQA, "ragged rows", has(Append, lambda s: len(set(s.counts)) > 1)),
    ("memory.inputs-unchanged", GQA, "a call that is refused", has(Reject, lambda s: isinstance(s.step, Append))),
    ("memory.inputs-unchanged", GQA, "an uncached forward", has(UncachedForward)),
    ("memory.inputs-unchanged", ROPE, "a generation", has(Generate)),
    ("memory.inputs-reused", GQA, "equal steps in a row", reused_by_equal_steps),
    ("memory.inputs-reused", GQA, "after a fork", lambda p: has(Fork)(p) and has(Append, lambda s: s.reused)(p)),
    ("memory.outputs-kept", GQA, "two open sequences in turn", two_live_interleaved),
    (
        "memory.outputs-kept",
        GQA,
        "uncached forwards at both ends",
        lambda p: {type(p.steps[0]), type(p.steps[-1])} == {UncachedForward},
    ),
    ("contents.old-handle", GQA, "an old handle", has(AliasHandle)),
    ("paging.boundary", GQA, "a full page", reaches(PAGE)),
    ("paging.boundary", GQA, "one token more than a page", reaches(PAGE + 1)),
    ("paging.copy-on-write", GQA, "fork", has(Fork)),
    ("quantised.residual", GQA, "one token more than the residual window", reaches(EVERYTHING.residual + 1)),
    ("capture.growth", GQA, "two open sequences in turn", two_live_interleaved),
    ("capture.aliasing", GQA, "in place", has(Append, lambda s: s.in_place)),
    ("accounting.affine", GQA, "counted multiply-adds", has(Append, lambda s: s.count_macs)),
)
CELLS = 10
"""Cells of the default effort that are drawn for each clause and config."""
NIGHTLY = EFFORTS["nightly"].structures
LEAST = 0.5
"""The probability with which a cell must reach a situation; Hypothesis' own tests of quality ask for the same."""


@cache
def cells(clause: str, config: Config) -> list[list[Case]]:
    """The cases of ``CELLS`` cells, as many as a run of the default effort draws; the same each time."""
    kind = BY_NAME[clause]
    number = max(2, round(EFFORTS[DEFAULT_EFFORT].structures * kind.share))
    return [drawn(kind.strategy(config, EVERYTHING), number, seed) for seed in range(CELLS)]


def shares(clause: str, config: Config, situation: Callable[[Program], bool]) -> tuple[float, float]:
    """The share of cases with a program in the situation, and the share of cells with such a case."""
    found = [[any(map(situation, case.programs)) for case in cases] for cases in cells(clause, config)]
    return sum(map(sum, found)) / sum(map(len, found)), sum(map(any, found)) / len(found)


def printed(clause: str, config: Config, words: str, situation: Callable[[Program], bool]) -> str:
    of_cases, of_cells = shares(clause, config, situation)
    name = next(name for name, known in CONFIGS.items() if known == config)
    return f"{clause:26} {name:18} {words:44} {of_cases:6.1%} of cases {of_cells:5.0%} of cells"


@pytest.mark.parametrize(
    ("clause", "config", "words", "situation"),
    slow_except(SITUATIONS, 12),
    ids=[f"{clause}: {words}" for clause, _config, words, _situation in SITUATIONS],
)
def test_a_cell_of_the_default_effort_reaches(
    clause: str, config: Config, words: str, situation: Callable[[Program], bool]
) -> None:
    """``pytest -s``, or running this file, prints the shares."""
    print(printed(clause, config, words, situation))
    assert shares(clause, config, situation)[1] >= LEAST


@pytest.mark.slow
def test_a_nightly_run_points_a_needle_at_every_slot() -> None:
    configs = [
        config for config in CONFIGS.values() if config.profile == "attention" and config.capacity == GQA.capacity
    ]
    asked = {
        step.needle[1]
        for seed, config in enumerate(configs)
        for case in drawn(BY_NAME["causality.past-seen"].strategy(config, EVERYTHING), NIGHTLY, seed)
        for step in case.programs[0].steps
        if isinstance(step, Append) and step.needle is not None
    }
    assert asked == set(range(GQA.capacity))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_strategies_stay_within_the_claims(data: st.DataObject) -> None:
    config = data.draw(st.sampled_from(list(CONFIGS.values())), label="config")
    clause = data.draw(
        st.sampled_from([c for c in ALL if c.concerns(config) and not (c.needs or c.needs_any)]), label="clause"
    )
    case: Case = data.draw(clause.strategy(config, POOR), label="case")
    for program in case.programs:
        live: set[str] = set()
        for step in program.steps:
            assert isinstance(step, Append | Close), step
            if isinstance(step, Append):
                live.add(step.seq)
                assert len(step.counts) == 1
                assert step.counts[0] <= 4
            else:
                live.discard(step.seq)
            assert len(live) <= 1


def test_every_clause_concerns_a_config() -> None:
    for clause in ALL:
        assert any(clause.concerns(config) for config in CONFIGS.values()), clause.name


def test_what_is_drawn_depends_on_the_seed_and_not_on_the_modules_that_are_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = st.integers(0, 2**40)
    before = drawn(numbers, 400)
    (tmp_path / "beside.py").write_text(f"NUMBERS = {[10**11 + 7 * n for n in range(300)]}\n")
    monkeypatch.syspath_prepend(tmp_path)
    __import__("beside")
    assert drawn(numbers, 400) == before
    assert hasattr(providers, "_get_local_constants"), "Hypothesis has changed: see strategies._no_local_constants"


if __name__ == "__main__":
    for one in SITUATIONS:
        print(printed(*one))
