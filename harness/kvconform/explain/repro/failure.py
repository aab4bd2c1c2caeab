"""A failure that is to be written as Python source, the places in it, and what every comparison ends with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvconform.errors import WorkerDied
from kvconform.explain.repro.inputs import Run, literal
from kvconform.judging.judge import judge
from kvconform.judging.mismatch import Kind, Mismatch, died
from kvconform.judging.observed import Observed
from kvconform.worker.client import WorkerClient
from kvconform.worker.protocol import Traces
from kvconform_specs.clause import Case, Clause
from kvconform_specs.config import Config
from kvconform_specs.errors import SpecError
from kvconform_specs.history import Histories, Row, seen_by
from kvconform_specs.program import Append, Program, UncachedForward
from kvconform_specs.reference.oracle import Expected, expect

Array = NDArray[Any]
MARGIN = 2.0
"""One bound is written for all numbers if some is off by so many times the largest of them."""
CLOSE = 1.0051
"""A bound is rounded up to three digits; where that would hide the failure it is written to the last digit."""


@dataclass(frozen=True)
class Failure:
    """What broke, and the programs that were compared: one or two, the last of which is the one with the mismatch."""

    mismatch: Mismatch
    observed: tuple[Observed, ...]

    @property
    def one(self) -> Observed:
        return self.observed[-1]

    @property
    def base(self) -> Observed:
        return self.observed[0]

    @property
    def step(self) -> int:
        """The step that is wrong; -1 where none was running."""
        return -1 if self.mismatch.step is None else self.mismatch.step

    @property
    def watched(self) -> int | None:
        """The step that wrote into the memory of the caller's inputs."""
        return self.step if self.mismatch.kind is Kind.INPUTS else None

    @property
    def raised(self) -> bool:
        """Whether a call raised, of a step or of the target's own uncached forward."""
        return self.mismatch.kind is Kind.RAISED or (self._reference and self.mismatch.error is not None)

    @property
    def died(self) -> bool:
        """Whether the process ended or hung, or the target could not be built."""
        return self.mismatch.ending != "" and not self.raised

    @property
    def _reference(self) -> bool:
        return self.mismatch.kind is Kind.REFERENCE_FAILED

    @property
    def accepted(self) -> bool:
        return self.mismatch.kind is Kind.ACCEPTED

    @property
    def token(self) -> tuple[int, int]:
        """Row and column of the token that is wrong."""
        assert self.mismatch.row is not None and self.mismatch.column is not None
        return self.mismatch.row, self.mismatch.column

    @property
    def other(self) -> tuple[int, int, int]:
        """Step, row and column of the base's output that it is compared with."""
        other = self.mismatch.other
        assert other is not None and other.step is not None and other.row is not None and other.column is not None
        return other.step, other.row, other.column


Check = Callable[[Failure, Sequence[Run], str], list[str]]
"""The lines that compare: of a failure, of the runs of ``Failure.observed``, on the backend of that name."""


# --- where a case breaks ---
def located(clause: Clause, client: WorkerClient, before: list[Program], case: Case) -> tuple[Failure, list[Program]]:
    """The first thing that breaks on a fresh process, and the programs that must run before those it is about."""
    found = _failure(clause, client, before, case)
    if found is None:
        raise SpecError("", f"{clause.name} holds on {client.spec.address} now: there is nothing to reproduce")
    failure, ran = found
    alone = [program for program in ran if any(program is one.program for one in failure.observed)]
    if len(alone) < len(ran) and failure.mismatch.relation is not None and not before:
        again = _failure(clause, client, [], Case(tuple(alone)))
        if again is not None and again[0].mismatch.kind is failure.mismatch.kind and len(again[1]) == len(alone):
            return again[0], []
    return failure, [program for program in ran if not any(program is one.program for one in failure.observed)]


def _failure(
    clause: Clause, client: WorkerClient, before: list[Program], case: Case
) -> tuple[Failure, list[Program]] | None:
    """What breaks, and all programs that ran up to there; None where nothing does."""
    if client.log:
        client.fresh()
    traces: list[Traces] = []
    programs = [*before, *case.programs]
    for number, program in enumerate(programs):
        try:
            traces.append(client.run(program, (0,)))
        except WorkerDied as death:
            dead = Observed(program, (), (), (), client.claims)
            return Failure(died(death), (dead,)), programs[: number + 1]
    traces = traces[len(before) :]
    own = None if client.reference_forward is None else client.reference_forward(case.programs[0].config)
    expected = [expect(program, (0,), client.claims.precision, own) for program in case.programs]
    try:
        mismatch = judge(case, clause.relations, client.claims, traces, expected).mismatch
    except WorkerDied as death:  # a black box's own forward
        whole = Observed(_whole(case), (), (), (), client.claims)
        return Failure(died(death), (whole,)), [whole.program]
    if mismatch is None:
        return None
    assert mismatch.program is not None
    two = mismatch.relation is not None and mismatch.relation.compares_two
    numbers = (0, mismatch.program) if two else (mismatch.program,)
    observed = tuple(_observed(case.programs[i], traces[i], expected[i], client) for i in numbers)
    return Failure(mismatch, observed), programs[: len(before) + mismatch.program + 1]


def _observed(program: Program, traces: Traces, wants: Sequence[Expected | None], client: WorkerClient) -> Observed:
    """As relations see it, without what is judged before them."""
    trace = traces.apart()[0]
    asked, outputs = [], []
    for step, done, want in zip(program.steps, trace, wants, strict=False):
        if want is not None and isinstance(step, Append) and client.claims.returns == "last":
            want = want.last()
        got = done.output if isinstance(step, Append | UncachedForward) else None
        if got is not None and program.config.profile == "attention" and got.ndim == 5:
            n, b, _h, t, _d = got.shape
            got = got.swapaxes(2, 3).reshape(n, b, t, -1)
        asked.append(want)
        outputs.append(got)
    return Observed(program, trace, asked, outputs, client.claims)


def _whole(case: Case) -> Program:
    """The longest of its rows, computed without a cache."""
    rows = [row for program in case.programs for seen in seen_by(program) for row in seen or ()]
    row = max(rows, key=len)
    first = row[0][0]
    other = tuple((0, position, stream.seed) for position, (stream, _at) in enumerate(row) if stream != first)
    whole = UncachedForward("a", (len(row),), first.seed, other, distribution=first.distribution)
    return Program(case.programs[0].config, (whole,))


# --- places ---
def rows(one: Observed, step: int, seq: str) -> tuple[Row, ...]:
    """The histories of a sequence behind that step."""
    histories = Histories()
    for done in one.program.steps[: step + 1]:
        histories.apply(done)
    return histories.rows[seq]


def token_of(config: Config, name: str, row: int, column: int) -> str:
    """The output of one token, ``(e,)``."""
    return f"{name}[{row}, :, {column}].ravel()" if config.profile == "attention" else f"{name}[{row}, {column}]"


def native(x: Array, config: Config) -> Array:
    """``(b, t, e)`` as a backend gives it: ``(b, h, t, d)`` in the attention profile."""
    if config.profile != "attention":
        return x
    b, t, _e = x.shape
    return x.reshape(b, t, config.heads, config.head_dim).swapaxes(1, 2)


def wanted(got: Array, value: Array, bound: Array) -> list[str]:
    """``want`` and ``bound``, in as few digits, and of bounds as few, as still tell that ``got`` is off."""
    value, bound = np.asarray(value, np.float64), np.broadcast_to(bound, value.shape)
    short, up = shortened(value, 10), shortened(bound * CLOSE, 3)
    wide = np.max(up, initial=0.0)
    error = np.abs(got - short)
    near = ~(np.abs(short - value) > (CLOSE - 1) * bound)  # else ten digits are too few; NaN: no token
    if bool(near.all()) and not np.all((error <= MARGIN * wide) | np.isnan(short)):
        return [f"want = {literal(short)}", f"bound = {wide}  # the largest of these numbers' bounds"]
    if not (near.all() and np.array_equal(error <= up, np.abs(got - value) <= bound)):
        short, up = value, bound
    return [f"want = {literal(short)}", f"bound = {literal(up) if up.any() else '0.0'}"]


def shortened(x: Array, digits: int) -> Array:
    """The numbers rounded to so many decimal digits."""
    return np.asarray(np.vectorize(lambda n: float(f"{n:.{digits}g}"), otypes=[np.float64])(x))


# --- how a comparison ends ---
def worst() -> list[str]:
    """Behind ``got``, ``want``, ``bound`` and ``off``: the number that is furthest off."""
    return [
        "if off.any():",
        "    bound = np.broadcast_to(bound, off.shape)",
        "    i = np.unravel_index(np.argmax(np.where(off, np.abs(got - want) / (bound + 1e-300), -1)), off.shape)",
        '    print(f"got:  {got[i]:.9g}\\nwant: {want[i]:.9g} ± {bound[i]:.2g}")',
        '    print(f"{off.sum()} of {off.size} numbers are off; this is the worst")',
        "    sys.exit(1)",
    ]


def same(words: str) -> list[str]:
    """Behind ``got`` and ``want``: they are the same to the bit."""
    return [
        "off = ~(got == want)",
        "if off.any():",
        "    i = int(np.argmax(off))",
        f'    print(f"got:  {{got[i]:.9g}}\\nwant: {{want[i]:.9g}}, {words}")',
        "    sys.exit(1)",
    ]


def compared(got: str, want: str, broken: str, words: str = "") -> list[str]:
    """Two expressions and the condition, over ``got`` and ``want``, under which they are a failure."""
    return [
        f"got, want = ({got}), ({want})",
        f"if {broken}:",
        f'    print(f"got:  {{got}}\\nwant: {words}{{want}}")',
        "    sys.exit(1)",
    ]
