"""Programs for backends that compile each shape of a step (claim ``static_shapes``): every append is split into appends
of the claimed sizes, the largest first, so that it leaves the same tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from hypothesis.strategies import SearchStrategy

from kvconform_specs.claims import Claims
from kvconform_specs.clause import Case
from kvconform_specs.config import Config
from kvconform_specs.program import Append, Lengths, Program, Reject, Step

Strategy = Callable[[Config, Claims], SearchStrategy[Case]]


def with_static_shapes(strategy: Strategy) -> Strategy:
    """The strategy; for a backend that claims ``static_shapes``, its programs are split."""

    def drawn(config: Config, claims: Claims) -> SearchStrategy[Case]:
        cases = strategy(config, claims)
        if not claims.static_shapes:
            return cases
        return cases.map(lambda case: Case(tuple(in_static_shapes(program, claims) for program in case.programs)))

    return drawn


def in_static_shapes(program: Program, claims: Claims) -> Program:
    """The program with its appends split into claimed sizes; itself where the backend claims none."""
    if not claims.static_shapes:
        return program
    lengths, split = Lengths(), []
    for step in program.steps:
        for part in _parts(step, lengths, claims):
            split.append(part)
            lengths.apply(part)
    return Program(program.config, tuple(split))


def sizes_of(count: int, claims: Claims) -> tuple[int, ...]:
    """``count`` as a sum of claimed sizes, the largest first; as one size where the backend claims none."""
    sizes: list[int] = []
    while count > sum(sizes):
        sizes.append(claims.longest(count - sum(sizes)) if claims.static_shapes else count)
    return tuple(sizes)


def _parts(step: Step, lengths: Lengths, claims: Claims) -> Iterator[Step]:
    if isinstance(step, Reject) and isinstance(step.step, Append) and step.wrong:  # it is otherwise legal
        most = claims.longest(max(step.step.counts))
        yield replace(step, step=replace(step.step, counts=tuple(min(count, most) for count in step.step.counts)))
    elif isinstance(step, Append) and max(step.counts) and not claims.ragged_prompt(step.counts):
        yield from _split(step, lengths.of(step.seq) or (0,) * len(step.counts), claims)
    else:
        yield step


def _split(step: Append, lengths: tuple[int, ...], claims: Claims) -> Iterator[Append]:
    sizes, left = sizes_of(max(step.counts), claims), step.counts
    for number, size in enumerate(sizes):
        counts = tuple(min(count, size) for count in left)
        ends = tuple(length + count for length, count in zip(lengths, counts, strict=True))
        yield replace(
            step,
            counts=counts,
            substitutions=tuple(s for s in step.substitutions if s[1] < ends[s[0]]),
            masked=tuple((row, at) for row, at in step.masked if at < ends[row]),
            last_only=step.last_only and number == len(sizes) - 1,
        )
        left, lengths = tuple(count - new for count, new in zip(left, counts, strict=True)), ends
