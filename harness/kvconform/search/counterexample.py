"""A counterexample: the smallest programs found that break a clause, as JSON, replayed in a fresh process."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from kvconform.errors import WorkerDied
from kvconform.files import read_versioned, write_atomically
from kvconform.judging.judge import Judged, judge
from kvconform.worker.client import WorkerClient
from kvconform_specs.clause import Case, Clause
from kvconform_specs.program import Append, Program, Reject, Reorder, Step, Truncate, UncachedForward
from kvconform_specs.reference.oracle import expect
from kvconform_specs.tensors import derive

SCHEMA = "kvconform-counterexample/1"


@dataclass(frozen=True)
class Broken:
    """One trial that broke its clause. ``kind``: fail, crash or timeout; of the latter two, where the process was.
    ``raised``: a fail that is an exception of a legal step."""

    kind: str
    sentence: str
    variant: int = 0
    program: int = 0
    step: int = -1
    raised: bool = False


class Counterexample(msgspec.Struct, frozen=True, kw_only=True):
    """What a file holds. ``before``: programs that must run first in the same process (leaked state), oldest first.

    ``reduced``: whether shrinking came to its end.
    """

    schema: str = SCHEMA
    suite: str
    clause: str
    backend: str
    device: str
    sentence: str
    outcome: str
    before: list[Any]
    case: list[Any]
    reduced: bool

    def write(self, folder: Path) -> Path:
        programs = (str(self.case) + str(self.before)).encode()
        path = folder / f"{self.clause}-{zlib.crc32(programs):08x}.json"
        write_atomically(path, msgspec.json.format(msgspec.json.encode(self), indent=1))
        return path


def read(path: Path) -> Counterexample:
    """Raises SpecError with one sentence where the file is none."""
    return read_versioned(path, Counterexample, SCHEMA, "counterexample")


def frozen(program: Program, variant: int) -> Program:
    """The program whose variant 0 is this program's variant ``variant``: its seeds are the derived ones."""
    return replace(program, steps=tuple(_frozen(step, variant) for step in program.steps))


def _frozen(step: Step, variant: int) -> Step:
    if isinstance(step, Reject):
        inner = _frozen(step.step, variant)
        assert isinstance(inner, Append | Truncate | Reorder)
        return Reject(inner, step.wrong)
    if isinstance(step, Append | UncachedForward):
        swap = tuple((row, position, derive(seed, variant)) for row, position, seed in step.substitutions)
        step = replace(step, seed=derive(step.seed, variant), substitutions=swap)
        if isinstance(step, Append) and step.needle is not None:
            step = replace(step, needle=(derive(step.needle[0], variant), step.needle[1]))
        if isinstance(step, Append) and step.pad is not None:
            step = replace(step, pad=(step.pad[0], derive(step.pad[1], variant)))
    return step


def attempt(clause: Clause, client: WorkerClient, case: Case, variants: tuple[int, ...]) -> Judged | Broken:
    """Runs a case's programs on the live worker and judges them. The definition is computed while the worker runs, and
    the worker has its next program before it has answered to the last."""
    traces, expected, sent = [], [], 0
    for number, program in enumerate(case.programs):
        try:
            if number == 0:
                client.send(program, variants)
                sent = 1
            own = None if client.reference_forward is None else client.reference_forward(program.config)
            wants = expect(program, variants, client.claims.precision, own)
            if clause.needs_numbers:
                for want in wants:
                    if want is not None:
                        want.numbers("floor")
            expected.append(wants)
            for following in case.programs[number + 1 : number + 2]:
                client.send(following, variants)
                sent += 1
            traces.append(client.receive(program))
        except WorkerDied as death:
            client.discard(case.programs[len(traces) : sent])  # where it was the truth that died
            variant = variants[min(death.variant, len(variants) - 1)]
            return Broken(death.kind, death.words, variant, number, death.step)
    try:
        judged = judge(case, clause.relations, client.claims, traces, expected)
    except WorkerDied as death:  # of a black box's own forward
        return Broken(death.kind, death.words)
    if judged.finding is not None:
        finding = judged.finding
        return Broken("fail", finding.sentence, variants[finding.variant], raised=finding.raised)
    return judged


def sentence(broken: Broken, before: Sequence[Program]) -> str:
    """The one line of fact: what is wrong, and whether it takes earlier programs."""
    if not before:
        return broken.sentence
    plural = "s" if len(before) > 1 else ""
    return f"{broken.sentence} (only after {len(before)} earlier program{plural} in the same process: state leaked)"


def replayed(clause: Clause, client: WorkerClient, before: list[Program], case: Case) -> Judged | Broken:
    """Runs the programs of a counterexample, in order, on a fresh worker."""
    client.fresh()
    for program in before:
        try:
            client.run(program, (0,))
        except WorkerDied as death:
            return Broken(death.kind, death.words)
    return attempt(clause, client, case, (0,))
