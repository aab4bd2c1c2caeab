"""Diagnosis: which known mistake the wrong outputs of a backend match, and under which smallest condition they occur.

Detection never depends on it. A fixed battery of probes is run, and each wrong output recorded with its circumstances.
Four kinds of evidence can name a class of mistakes, all from data about which tokens an output sees:

- edits: the reference gives the wrong outputs if the cache or the mask is edited in one way (``edits``);
- the visibility maps show exactly what attention with one edited mask sees, or tokens of other rows or sequences
  (``map_matches``);
- only greedy generation is wrong, and each of its steps is right;
- outputs are wrong exactly where tokens were cached with other rotary factors than those of the length now.

A wrong name is worse than none. Each kind of evidence is silent unless everything that it explains is explained
exactly, and unless all explanations that are equally good stand for one class. If two kinds of evidence name different
classes, no class is named. Without a name, the smallest condition that separates wrong outputs from right ones remains.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import count

from kvconform.errors import WorkerDied
from kvconform.explain.diagnosis import edits, map_matches
from kvconform.explain.diagnosis.conditions import of_stale_factors
from kvconform.explain.diagnosis.disagreements import disagreement
from kvconform.explain.diagnosis.ladder import weakest
from kvconform.explain.diagnosis.mistakes import MISTAKES
from kvconform.explain.diagnosis.probes import Probe, probes
from kvconform.explain.diagnosis.record import Diagnosis, FirstFailure
from kvconform.explain.diagnosis.symptoms import OutputCell, ReferenceOutputs, Symptom, death, symptom
from kvconform.explain.diagnosis.tested_conditions import tested
from kvconform.explain.visibility import Map
from kvconform.judging.render import render
from kvconform.worker.client import WorkerClient
from kvconform_specs.claims import changes_at
from kvconform_specs.clause import Case
from kvconform_specs.config import Config
from kvconform_specs.history import holds_nan
from kvconform_specs.program import Generate

__all__ = ["Diagnosis", "diagnose"]

MAX_DEATHS = 3
"""After so many probes that ended the backend's process, no further one is run."""


def diagnose(
    client: WorkerClient, config: Config, cases: Sequence[Case], maps: Sequence[Map], unstable: bool = False
) -> Diagnosis | None:
    """What the backend's mistake matches. ``cases``: the counterexamples that were found, which serve as probes too;
    ``unstable``: the reference, a black box's own forward, was found to be none.

    None where no probe is wrong, or where the backend cannot be built. Raises WorkerDied where a black box's own
    forward ends its process.
    """
    if config.profile not in client.claims.profiles:
        return None
    another = disagreement(client, config, maps) if client.reference_address and not unstable else None
    if another is not None:
        return Diagnosis(disagreement=another)
    own = client.claims.reference == "self" and not client.reference_address
    if unstable or (map_matches.sees_later(maps) and own):
        return Diagnosis(reference_wrong=True)
    client.fresh()  # without what earlier programs left behind
    try:
        if client.build(config) is not None:
            return None
    except WorkerDied:
        return None
    reference = ReferenceOutputs(client.claims.precision, client.reference_forward)
    shown = (program for case in cases for program in case.programs if not holds_nan(program))
    programs = dict.fromkeys(program for program in shown if program.config == config)
    extra = (
        Probe(f"case {number}", "a counterexample", program)
        for number, program in zip(count(1), programs, strict=False)
    )
    battery = list(_run(client, probes(config, client.claims), reference))
    symptoms = [*battery, *_run(client, extra, reference, client.starts)]
    wrong = [one for one in symptoms if one.wrong]
    if not wrong:
        return None
    reference_forward = None if client.reference_forward is None else client.reference_forward(config)
    by_edits = edits.matches(symptoms, config, client.claims, reference_forward)
    by_maps = map_matches.matches(maps, config, client.claims)
    leak = map_matches.leak(maps)
    generating = all(isinstance(step, Generate) for one in wrong for step in one.probe.program.steps)
    condition = tested(
        symptoms,
        [*programs],
        config,
        client.claims,
        lambda of: _run(client, of, reference, client.starts),
        client.fresh,
    )
    cells = [cell for one in symptoms for cell in one.cells]
    stale_factors = of_stale_factors(condition, cells, changes_at(config, client.claims))
    evidence = [
        edits.named(by_edits),
        map_matches.named(by_maps),
        frozenset(leak.mistakes) if leak is not None else frozenset(),
        frozenset({"L1"}) if generating and _from_the_first(wrong) else frozenset(),
        frozenset({"P5"}) if stale_factors else frozenset(),
    ]
    mistake = decided(evidence)
    unexplained = not mistake and not generating and not (leak or by_maps)
    return Diagnosis(
        mistake=mistake,
        bug=MISTAKES[mistake].bug if mistake else "",
        edit=by_edits[0] if by_edits and by_edits[0].share >= edits.MIN_SHARE else None,
        map=by_maps[0] if by_maps else None,
        leak=leak,
        generation_only=generating,
        condition=condition,
        precision=weakest(symptoms, config, client.claims, reference_forward) if unexplained else None,
        heads=_heads(cells, config),
        first=_first(wrong),
    )


def decided(evidence: Iterable[frozenset[str]]) -> str:
    """The one class that all evidence which names any has in common; empty where there is none, or more than one."""
    speaking = [classes for classes in evidence if classes]
    shared = frozenset.intersection(*speaking) if speaking else frozenset()
    return next(iter(shared)) if len(shared) == 1 else ""


def _run(
    client: WorkerClient, battery: Iterable[Probe], reference: ReferenceOutputs, process: int = -1
) -> Iterator[Symptom]:
    """Runs the probes one after another in one process, as long as it lives. ``process``: the number of the one that
    the last program was run in."""
    deaths = 0
    for probe in battery:
        try:
            trace = client.run(probe.program, (0,)).apart()[0]
        except WorkerDied as died:
            yield death(probe, died, client.claims, earlier=client.starts == process)
            deaths, process = deaths + 1, -1
            if deaths == MAX_DEATHS:
                return
        else:
            yield symptom(probe, trace, reference, client.claims, earlier=client.starts == process)
            process = client.starts


def _from_the_first(wrong: Sequence[Symptom]) -> bool:
    """Whether the first generation of a probe is wrong: later ones may find what earlier ones left behind."""
    return any(one.mismatch is not None and one.mismatch.step == 0 for one in wrong)


def _heads(cells: Sequence[OutputCell], config: Config) -> list[int]:
    heads = {part for cell in cells for part in cell.parts}
    return sorted(heads) if config.profile == "attention" and len(heads) < config.heads else []


def _first(wrong: Sequence[Symptom]) -> FirstFailure:
    """The first probe with a wrong number, else the first that raised, else the first with another violation."""

    def rank(one: Symptom) -> int:
        begins = next((cell for cell in one.cells if cell.wrong), None)
        return 2 if begins is None else int(begins.raised)

    first = min(wrong, key=rank)
    assert first.mismatch is not None
    return FirstFailure(probe=first.probe.words, mismatch=first.mismatch, sentence=render(first.mismatch))
