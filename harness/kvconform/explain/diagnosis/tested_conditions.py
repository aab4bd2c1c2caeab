"""A condition is reported where it holds on random programs as well, which it was not found on.

The battery is fixed, so that something that plays no part may separate its wrong outputs from its right ones. A
condition that random programs refute is searched for again with their outputs added, and tested on others. After a few
rounds there is none: a wrong condition misleads more than none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

from kvconform.explain.diagnosis.conditions import NEAR, condition, counted
from kvconform.explain.diagnosis.probes import Probe
from kvconform.explain.diagnosis.record import Condition
from kvconform.explain.diagnosis.symptoms import EARLIER_PROGRAM, OutputCell, Symptom
from kvconform.explain.diagnosis.trials import LONGEST, trials
from kvconform_specs.claimed import claimed
from kvconform_specs.claims import Claims
from kvconform_specs.config import Config
from kvconform_specs.errors import SpecError
from kvconform_specs.program import Append, Program, Truncate, UncachedForward

ROUNDS, TRIALS = 3, 16
"""How often a condition is looked for, and on how many random programs each is tested."""
EXAMPLES, NEIGHBOURS = 2, 8
"""Of how many counterexamples variations are run in the first round, and how many of each at most."""

EARLIER = Condition(predicates=[EARLIER_PROGRAM], wrong=0, right=0, wrong_met=0, right_met=0)
Run = Callable[[Iterable[Probe]], Iterator[Symptom]]
"""Runs probes one after another in one process."""


def tested(
    symptoms: Sequence[Symptom],
    examples: Sequence[Program],
    config: Config,
    claims: Claims,
    run: Run,
    fresh: Callable[[], None],
) -> Condition | None:
    """The condition of the wrong outputs. ``examples``: counterexamples; ``fresh`` starts a new process. Raises
    WorkerDied where a black box's own forward ends its process."""
    known, left_out = _cells(symptoms), frozenset[str]()
    for number in range(ROUNDS):
        probes = [*trials(config, claims, range(number * TRIALS, (number + 1) * TRIALS))]
        if number == 0:
            probes += [one for program in examples[:EXAMPLES] for one in _neighbours(program, claims)]
            probes += _rolled_back(config, claims)
        new = _cells(list(run(probes)))
        cached_only = claims.reference == "self" or not any(
            cell.wrong and cell.facts.get("uncached forward") for cell in (*known, *new)
        )
        if cached_only:  # what cached steps do wrong is not told by how right the uncached forward is
            known, new = ([c for c in cells if not c.facts.get("uncached forward")] for cells in (known, new))
        found = condition(known, config, left_out)
        if EARLIER_PROGRAM not in left_out and _may_be_earlier(found, [*known, *new]):
            if _right_alone(symptoms, run, fresh):
                return counted(found if found and found.predicates else EARLIER, [*known, *new], config)
            left_out = frozenset({EARLIER_PROGRAM})
            found = condition(known, config, left_out)
        if found is not None and _holds(found, new, config):
            return counted(found, [*known, *new], config)
        known = [*known, *new]
    return None


def _may_be_earlier(found: Condition | None, cells: Sequence[OutputCell]) -> bool:
    """Whether the condition names earlier programs, or there is none and all wrong outputs came after some."""
    if found is None or not found.predicates:
        wrong = [cell for cell in cells if cell.wrong]
        return bool(wrong) and all(cell.facts.get(EARLIER_PROGRAM) for cell in wrong)
    return EARLIER_PROGRAM in found.predicates


def _cells(symptoms: Iterable[Symptom]) -> list[OutputCell]:
    return [cell for one in symptoms for cell in one.cells]


def _holds(found: Condition, cells: Sequence[OutputCell], config: Config) -> bool:
    """Whether other outputs do not refute the condition. Where no output meets it or is wrong, it was not tested: two
    predicates are then too many to believe."""
    new = counted(found, cells, config)
    if new.wrong_met < new.wrong:
        return False
    if not found.predicates:
        return new.right <= new.wrong
    met = new.wrong_met + new.right_met
    return new.wrong_met >= NEAR * met if met else len(found.predicates) == 1


def _right_alone(symptoms: Sequence[Symptom], run: Run, fresh: Callable[[], None]) -> bool:
    """Whether probes that were wrong after others are right in processes of their own."""
    wrong = [one.probe for one in symptoms if any(cell.wrong for cell in one.cells)]
    if not wrong:  # what failed was not a probe's output
        return False
    for one in dict.fromkeys((*wrong[:1], *wrong[-1:])):
        fresh()
        if any(cell.wrong for cell in _cells(run([one]))):
            return False
    return True


def _rolled_back(config: Config, claims: Claims) -> Iterator[Probe]:
    """Sequences that were longer once, which tell a length from one that was reached."""
    long = min(config.capacity, LONGEST)
    for number, (left, new) in enumerate(((long // 2, 1), (long // 4, 2), (long // 3, 1))):
        steps = (Append("a", (long,), number), Truncate("a", left), Append("a", (new,), number + 10))
        if left and left + new < long and claims.can("truncate") and claimed(steps, claims):
            yield Probe(f"rolled back {number}", "a sequence that was longer once", Program(config, steps))


def _neighbours(program: Program, claims: Claims) -> Iterator[Probe]:
    """The program without one of its steps, and with other counts of one of its appends."""
    steps = program.steps
    changed = [(*steps[:at], *steps[at + 1 :]) for at in range(len(steps))]
    for at, step in enumerate(steps):
        if isinstance(step, Append) and not (step.substitutions or step.masked or step.needle):
            for by in (1, -1):
                counts = tuple(count and max(count + by, 1) for count in step.counts)
                changed.append((*steps[:at], replace(step, counts=counts), *steps[at + 1 :]))
    made = 0
    for number, others in enumerate(dict.fromkeys(changed)):
        if made == NEIGHBOURS or not any(isinstance(step, Append | UncachedForward) for step in others):
            continue
        try:
            neighbour = Program(program.config, others)
        except SpecError:
            continue
        if neighbour != program and claimed(others, claims):
            made += 1
            yield Probe(f"neighbour {number}", "a program like a counterexample", neighbour)
