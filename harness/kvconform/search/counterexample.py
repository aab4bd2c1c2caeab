"""A counterexample: the smallest programs found that break a clause, as JSON, replayed in a fresh process."""

from __future__ import annotations

import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from kvconform.errors import WorkerDied
from kvconform.files import read_versioned, write_atomically
from kvconform.judging.judge import judge
from kvconform.judging.mismatch import Mismatch, died
from kvconform.judging.observed import Checked
from kvconform.judging.verdict import Outcome
from kvconform.worker.client import WorkerClient
from kvconform_specs.clause import Case, Clause
from kvconform_specs.describe import outline
from kvconform_specs.program import Append, Program, Reject, Reorder, Step, Truncate, UncachedForward
from kvconform_specs.reference.oracle import expect
from kvconform_specs.tensors import derive

SCHEMA = "kvconform-counterexample/2"


class Counterexample(msgspec.Struct, frozen=True, kw_only=True):
    """What a file holds: the smallest programs found that break a clause, and how."""

    schema: str = SCHEMA
    """Name and version of this format."""
    suite: str
    """Version of the suite that found it."""
    clause: str
    """Name of the clause."""
    backend: str
    """Address of the backend that broke it."""
    device: str
    """Device that it ran on."""
    outcome: Outcome
    """What the cell came to: `fail`, `crash`, `timeout` or `refuted`; `pass` of an example that breaks nothing."""
    mismatch: Mismatch | None = None
    """What broke the clause; null in an example."""
    sentence: str
    """The mismatch in words, for people: nothing reads it."""
    before: list[Any]
    """Programs that must run first in the same process (leaked state), oldest first."""
    case: list[Any]
    """The programs of the case."""
    reduced: bool
    """Whether shrinking came to its end."""

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


def steps(case: Case, broken: Mismatch) -> str:
    """The steps of the program that broke the clause, up to the one that did, in words; empty where none was
    running."""
    return "" if broken.program is None else outline(case.programs[broken.program], broken.end)


def attempt(clause: Clause, client: WorkerClient, case: Case, variants: tuple[int, ...]) -> Checked:
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
                        want.numbers("bound_lower")
            expected.append(wants)
            for following in case.programs[number + 1 : number + 2]:
                client.send(following, variants)
                sent += 1
            traces.append(client.receive(program))
        except WorkerDied as death:
            client.discard(case.programs[len(traces) : sent])  # where it was the reference that died
            return Checked(died(death, variants[min(death.variant, len(variants) - 1)], number), 0)
    try:
        judged = judge(case, clause.relations, client.claims, traces, expected)
    except WorkerDied as death:  # of a black box's own forward
        return Checked(died(death), 0)
    if judged.mismatch is None:
        return judged
    return replace(judged, mismatch=msgspec.structs.replace(judged.mismatch, variant=variants[judged.mismatch.variant]))


def replayed(clause: Clause, client: WorkerClient, before: list[Program], case: Case) -> Mismatch | None:
    """What breaks when the programs of a counterexample run, in order, on a fresh worker."""
    client.fresh()
    for program in before:
        try:
            client.run(program, (0,))
        except WorkerDied as death:
            return died(death)
    found = attempt(clause, client, case, (0,)).mismatch
    return None if found is None else msgspec.structs.replace(found, earlier_programs=len(before))
