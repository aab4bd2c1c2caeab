"""Reducers of our own, for what Hypothesis cannot shrink: failures that cost a new process for each try.

Hypothesis shrinks what fails; a death is reduced here, step by step, since a process that dies tells where it was.
So is the list of programs that a leaked state needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from kvconform.judging.mismatch import Mismatch
from kvconform_specs.clause import Case
from kvconform_specs.errors import SpecError
from kvconform_specs.program import Append, Program, Step, UncachedForward

Try = Callable[[Case], Mismatch | None]
"""Runs a case; returns what broke, or None, also where no more tries are allowed."""


def reduced_death(case: Case, broken: Mismatch, dies: Try) -> tuple[Case, Mismatch]:
    """The program that killed the process alone, cut behind the fatal step, then greedily made smaller."""
    if broken.program is None or broken.step is None:
        return case, broken
    program = case.programs[broken.program]
    best, found = case, broken
    current = replace(program, steps=program.steps[: broken.step + 1])
    again = dies(Case((current,)))
    if again is None or again.ending != broken.ending:
        return best, found
    best, found = Case((current,)), again
    candidates = smaller(current)
    while (candidate := next(candidates, None)) is not None:
        again = dies(Case((candidate,)))
        if again is not None and again.ending == broken.ending:
            best, found = Case((candidate,)), again
            candidates = smaller(candidate)
    return best, found


def smaller(program: Program) -> Iterator[Program]:
    """Legal programs with a step less, with one row, or with shorter appends."""
    steps = program.steps
    drafts = [steps[:i] + steps[i + 1 :] for i in range(len(steps) - 1)]
    runs = [i for i, step in enumerate(steps) if isinstance(step, Append | UncachedForward)]
    if any(len(_run(steps[i]).counts) > 1 for i in runs):
        drafts.insert(
            0, tuple(_resized(step, _run(step).counts[:1]) if i in runs else step for i, step in enumerate(steps))
        )
    for i in runs:
        counts = _run(steps[i]).counts
        for count in sorted({1, max(counts) // 2, max(counts) - 1} - {0}):
            if count < max(counts):
                shorter = tuple(min(count, c) for c in counts)
                drafts.append((*steps[:i], _resized(steps[i], shorter), *steps[i + 1 :]))
    for draft in drafts:
        try:
            yield replace(program, steps=draft)
        except SpecError:
            continue  # a step that another one needs cannot go


def _run(step: Step) -> Append | UncachedForward:
    assert isinstance(step, Append | UncachedForward)
    return step


def _resized(step: Step, counts: tuple[int, ...]) -> Step:
    shorter = replace(_run(step), counts=counts, substitutions=())
    if isinstance(shorter, Append):
        shorter = replace(shorter, nan=tuple(row for row in shorter.nan if row < len(counts)))
    return shorter


def reduced_list(
    programs: list[Program], broken: Mismatch, fails: Callable[[list[Program]], Mismatch | None]
) -> tuple[list[Program], Mismatch]:
    """Leaves out every program, and every step at the end of one, that the failure does not need."""
    kept = list(programs)
    for program in programs:
        shorter = [other for other in kept if other is not program]
        if shorter and (still := fails(shorter)) is not None:
            kept, broken = shorter, still
    for index, program in enumerate(kept):
        while len(kept[index].steps) > 1:
            shorter = [*kept]
            shorter[index] = replace(program, steps=kept[index].steps[:-1])
            if (still := fails(shorter)) is None:
                break
            kept, broken = shorter, still
    return kept, broken
