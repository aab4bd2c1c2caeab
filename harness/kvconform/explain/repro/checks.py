"""What broke, as Python source: a comparison of outputs, which prints what came and what must come."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvconform.explain.repro.failure import (
    CLOSE,
    Check,
    Failure,
    compared,
    native,
    same,
    shortened,
    token_of,
    wanted,
    worst,
)
from kvconform.explain.repro.inputs import WRITTEN_OUT, Array, Run, literal
from kvconform.explain.repro.state_checks import TOLD
from kvconform.judging.mismatch import Kind
from kvconform_specs.clause import Relation
from kvconform_specs.program import Append, Generate, ReadCache
from kvconform_specs.reference.oracle import Generation

SHOWN = 32
"""Of a token's outputs, where they are too many to write out, those that are furthest off."""


def check(failure: Failure, runs: Sequence[Run], backend: str) -> list[str]:
    """The last lines of the file; ``runs`` are those of ``failure.observed``."""
    relation = failure.mismatch.relation
    return _shape(failure, runs[-1]) if relation is None else CHECKS[relation](failure, runs, backend)


# --- outputs ---
def _parity(failure: Failure, runs: Sequence[Run], _backend: str) -> list[str]:
    config, want = failure.one.program.config, failure.one.want(failure.step)
    got, value, bound = failure.one.got(failure.step)[0], want.value[0], want.bound[0]
    bound = np.broadcast_to(bound, value.shape)
    name, comment = runs[-1].name("y", failure.step), ""
    if value.size > WRITTEN_OUT:
        row, column = failure.token
        got, value, bound = got[row, column], value[row, column], bound[row, column]
        name, comment = token_of(config, name, row, column), f"  # row {row}, column {column}"
        cut, index = _furthest(np.abs(got - value) - bound)
        got, value, bound, name = got[cut], value[cut], bound[cut], name + index
    else:
        got, value, bound = native(got, config), native(value, config), native(bound, config)
    real = ~np.isnan(value)
    blank = "" if bool(real.all()) else " & ~np.isnan(want)  # a column that holds no token may hold anything"
    lines = [f"got = {name}{comment}", *wanted(got, value, np.where(real, bound, 0.0))]
    return [*lines, f"off = ~(np.abs(got - want) <= bound){blank}", *worst()]


def _furthest(excess: Array) -> tuple[Array, str]:
    """Which numbers ``(e,)`` are compared, all or the ``SHOWN`` of the largest excess, and the index that says so."""
    if excess.size <= WRITTEN_OUT:
        return np.arange(excess.size), ""
    worst_first = np.argsort(-np.nan_to_num(excess, nan=np.inf), kind="stable")
    cut = np.sort(worst_first[:SHOWN])
    return cut, f"[{cut.tolist()}]"


def _agreement(failure: Failure, runs: Sequence[Run], _backend: str) -> list[str]:
    there = failure.other
    return ["# the same token with the same tokens before it", *_within(failure, runs, failure.token, there)]


def _within(failure: Failure, runs: Sequence[Run], place: tuple[int, int], there: tuple[int, int, int]) -> list[str]:
    """Two outputs differ by no more than the sum of their bounds; ``there``: step, row and column of the base's."""
    (row, column), (step, its_row, its_column) = place, there
    mine, its = failure.one.want(failure.step), failure.base.want(step)
    got, was = failure.one.got(failure.step)[0, row, column], failure.base.got(step)[0, its_row, its_column]
    bound = np.broadcast_to(mine.bound[0, row, column] + its.bound[0, its_row, its_column], got.shape)
    config = failure.one.program.config
    cut, index = _furthest(np.abs(got - was) - bound)
    _value, bounds = wanted(got[cut], was[cut], bound[cut])
    return [
        f"got = {token_of(config, runs[-1].name('y', failure.step), row, column)}{index}",
        f"want = {token_of(config, runs[0].name('y', step), its_row, its_column)}{index}",
        bounds,
        "off = ~(np.abs(got - want) <= bound)",
        *worst(),
    ]


def _bitwise(failure: Failure, runs: Sequence[Run], _backend: str) -> list[str]:
    (row, column), (there, its_row, its_column) = failure.token, failure.other
    config = failure.one.program.config
    return [
        "# the same token with the same tokens before it",
        f"got = {token_of(config, runs[-1].name('y', failure.step), row, column)}",
        f"want = {token_of(config, runs[0].name('y', there), its_row, its_column)}",
        *same("to the bit"),
    ]


def _unaffected(failure: Failure, runs: Sequence[Run], _backend: str) -> list[str]:
    row, column = failure.token
    config = failure.one.program.config
    comment = f"# row {row}, column {column}: what differs between the two programs must not be seen here"
    if failure.one.claims.rounding == "shared":
        return [comment, *_within(failure, runs, (row, column), (failure.step, row, column))]
    return [
        comment,
        f"got = {token_of(config, runs[-1].name('y', failure.step), row, column)}",
        f"want = {token_of(config, runs[0].name('y', failure.step), row, column)}",
        *same("to the bit"),
    ]


def _affected(failure: Failure, runs: Sequence[Run], _backend: str) -> list[str]:
    row, column = failure.token
    config, step = failure.one.program.config, failure.step
    want, was = failure.one.want(step), failure.base.want(step)
    moves = np.abs(want.value[0, row, column] - was.value[0, row, column])
    bounds = want.bound[0, row, column] + was.bound[0, row, column]
    least = np.where(moves > bounds, moves - bounds, 0.0)
    moved = np.abs(failure.one.got(step) - failure.base.got(step))[0, row, column]
    cut, index = _furthest(least - moved)
    short = shortened(least / CLOSE, 3)
    least = short if np.array_equal(moved >= short, moved >= least) else least
    got, before = (token_of(config, run.name("y", step), row, column) + index for run in (runs[-1], runs[0]))
    return [
        f"# row {row}, column {column}: what differs between the two programs must be seen here",
        f"got = np.abs({got} - {before})",
        f"want = {literal(least[cut])}",
        "off = ~(got >= want)",
        "if off.any():",
        "    i = int(np.argmax(np.where(off, want, -1)))",
        '    print(f"got:  the output moved by {got[i]:.6g}\\nwant: it moves by {want[i]:.6g} at least")',
        "    sys.exit(1)",
    ]


def _finite(failure: Failure, runs: Sequence[Run], _backend: str) -> list[str]:
    row, column = failure.token
    return [
        f"got = {token_of(failure.one.program.config, runs[-1].name('y', failure.step), row, column)}",
        "off = ~np.isfinite(got)",
        "if off.any():",
        '    print(f"got:  {got[off][0]}\\nwant: finite numbers from finite inputs")',
        "    sys.exit(1)",
    ]


def _same_token(failure: Failure, runs: Sequence[Run], _backend: str) -> list[str]:
    row, column = failure.token
    name = token_of(failure.one.program.config, runs[-1].name("y", failure.step), row, column)
    return compared(
        f"int({name}.argmax())", str(failure.mismatch.want), "got != want", "the largest logit is that of token "
    )


def _generated(failure: Failure, runs: Sequence[Run], _backend: str) -> list[str]:
    want, output = failure.one.expected[failure.step], failure.one.trace[failure.step].output
    assert isinstance(want, Generation) and output is not None
    row, place = failure.token
    numbers = want.along(output)
    value, bound = numbers("value")[0, row, place], np.broadcast_to(numbers("bound"), numbers("value").shape)
    exceeds = value[None] - value[:, None] > bound[0, row, place][None] + bound[0, row, place][:, None]
    allowed = [int(token) for token in np.flatnonzero(~exceeds.any(axis=1))]
    name, before = runs[-1].name("y", failure.step), output[0, row, :place].tolist()
    lines = [
        f"if {name}[{row}, :{place}].tolist() != {before}:",
        '    print("it generates other tokens before this one: nothing to compare")',
        "    sys.exit(0)",
    ]
    return [
        *(lines if before else []),
        *compared(f"int({name}[{row}, {place}])", str(allowed), "got not in want", "of "),
    ]


def _shape(failure: Failure, run: Run) -> list[str]:
    """The output's shape and dtype, as the config and the step demand."""
    step, config = run.program.steps[failure.step], run.program.config
    if isinstance(step, ReadCache):
        width = config.kept
        shown = f"sum(x.shape[0] * x.shape[2] for layer in {run.name('held', failure.step)} for x in layer[0])"
        return compared(shown, str(width), "got != want", "numbers that each token holds: ")
    name = run.name("y", failure.step)
    shape: tuple[int, ...]
    if isinstance(step, Generate):
        shape, dtype = (len(step.counts), step.new), "int64"
        if failure.mismatch.kind is Kind.TOKEN_ID:
            inside = f"0 <= {name}.min() <= {name}.max() < {config.vocabulary}"
            return compared(f"{name}.tolist()", f'"ids of 0..{config.vocabulary - 1}"', f"not {inside}")
    else:
        want = failure.one.expected[failure.step]
        assert want is not None
        b, t, dtype = len(want.counts), max(want.counts), "float32"
        if failure.one.claims.returns == "last" and isinstance(step, Append):
            t = min(t, 1)
        shape = (b, config.heads, t, config.head_dim) if config.profile == "attention" else (b, t, config.outputs)
    return compared(f"np.shape({name}), np.asarray({name}).dtype.name", f"{shape}, {dtype!r}", "got != want")


CHECKS: dict[Relation, Check] = {
    Relation.PARITY: _parity,
    Relation.AGREEMENT: _agreement,
    Relation.INSENSITIVE: _unaffected,
    Relation.SENSITIVE: _affected,
    Relation.BITWISE: _bitwise,
    Relation.FINITE: _finite,
    Relation.SAME_TOKEN: _same_token,
    Relation.GENERATED: _generated,
    **TOLD,
}
