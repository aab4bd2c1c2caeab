"""Diagnosis: what a broken backend behaves like, and under which smallest condition. Detection never depends on it.

A fixed battery of probes says what is off (``symptoms``) and when (``signature``). The faults of the catalogue that
show the same pattern are run on the same programs, each in a worker of its own: where one gives the backend's outputs,
bad ones included, the backend behaves exactly like it. A black box has other weights, so that patterns must do. Where
the bad outputs are what the truth gives on other tokens (``edits``), that is said, whether anybody planted it or not.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

import msgspec

from kvconform.errors import BackendUnavailable, WorkerDied
from kvconform.explain.diagnosis.edits import MIN_SHARE, Explanation, explanations, kinds
from kvconform.explain.diagnosis.fingerprints import (
    SHORT_CONFIGS,
    Match,
    Prints,
    catalogue,
    decided,
    exactly,
    named,
    nearest,
)
from kvconform.explain.diagnosis.probe_run import SIGHT, Examination, examine
from kvconform.explain.diagnosis.probes import SEEN, Probe, changes, probes
from kvconform.explain.diagnosis.remedies import ADVICE
from kvconform.explain.diagnosis.signature import condition, first, generating, loop, sighted, told
from kvconform.explain.diagnosis.symptoms import Truth, alike, symptom
from kvconform.explain.visibility import FORBIDDEN, Map
from kvconform.worker.client import WorkerClient, WorkerSpec
from kvconform.worker.execute import StepResult, Trace
from kvconform_specs.clause import Case
from kvconform_specs.config import Config
from kvconform_specs.configs import CONFIGS
from kvconform_specs.program import Program

SECONDS = 10.0
"""After so many seconds no further fault is run beside the backend."""
DEATHS = 3
"""After so many probes in which the backend's process died no further one is run."""
FAULT_TIMEOUT = 5.0
"""Seconds without progress after which a fault's step is given up."""


class Diagnosis(msgspec.Struct, frozen=True, kw_only=True):
    """What a backend that broke clauses under one config behaves like.

    named: the id of the class of mistakes (``M1``), empty where none stands out; fault: the planted fault that it
    behaves like, empty where the tokens that it sees are all that names it; bug: its real-world upstream bug, a link.
    exactly: whether its outputs are that fault's, within the bounds.
    signature: first bad step, position, row, head or logit, and the smallest condition that separates bad outputs from
    good ones, in words. sentence: all of it in one sentence, with what to do about it.
    """

    named: str = ""
    fault: str = ""
    bug: str = ""
    exactly: bool = False
    signature: str = ""
    sentence: str = ""


def diagnose(client: WorkerClient, config: Config, cases: Sequence[Case], maps: Sequence[Map]) -> Diagnosis | None:
    """What the backend behaves like, from probes of its own; ``cases`` are the small counterexamples that were found.
    None where no probe shows anything. Raises WorkerDied where a black box's own forward does."""
    if config.profile not in client.claims.profiles:
        return None
    client.fresh()  # what ran before must not show
    try:
        if client.build(config) is not None:
            return None
    except WorkerDied:
        return None  # there is nothing to probe
    truth = Truth(client.claims.precision, client.reference_forward)
    run = ProbeRunner(client)
    examination = examine(run, config, client.claims, truth)
    programs = dict.fromkeys(program for case in cases for program in case.programs if program.config == config)
    extra = [
        Probe(f"case {number}", "a counterexample", program)
        for number, program in zip(count(1), programs, strict=False)
    ]
    found = [symptom(probe, run(probe.program), truth, client.claims) for probe in extra]
    whole = Examination((*examination.symptoms, *found), examination.pattern)
    if not whole.off and not any(one.off for one in found):
        return None
    own = None if client.reference_forward is None else client.reference_forward(config)
    explained = explanations(whole.symptoms, config, client.claims, own)
    likened = None
    if examination.off and run.deaths < DEATHS:
        likened = _match(client, config, whole)
    return _said(whole, config, likened, explained, across(maps))


def across(maps: Sequence[Map]) -> str:
    """``C7`` where open sequences see each other's tokens, ``C6`` where one sees those of sequences before it, empty
    where none does, or the maps do not show it."""
    seen = [
        (found.place(query)[0], found.place(key)[0])
        for found in maps
        if found.schedule == "sequences"
        for query, key, kind in found.differences
        if kind == FORBIDDEN
    ]
    if any(query < key for query, key in seen):
        return "C7"
    return "C6" if any(query > key for query, key in seen) else ""


class ProbeRunner:
    """Runs programs on the backend; where its process dies, the program's trace says so."""

    def __init__(self, client: WorkerClient) -> None:
        self.client, self.deaths = client, 0

    def __call__(self, program: Program) -> Trace:
        if self.deaths >= DEATHS:
            return ()
        try:
            return self.client.run(program, (0,)).apart()[0]
        except WorkerDied as death:
            self.deaths += 1
            return (StepResult(error=death.words),)


# --- which fault it is ---
@dataclass(frozen=True)
class _Likened:
    """The class of mistakes that a backend shows, the fault that it is like, and whether its outputs are the same."""

    kind: str
    match: Match
    exact: bool


def _match(client: WorkerClient, config: Config, whole: Examination) -> _Likened | None:
    matches = nearest(whole.pattern, _comparable(config, client.claims.reference == "self"))
    if client.claims.reference == "definition":
        began = time.monotonic()

        def same(match: Match) -> bool:
            return time.monotonic() - began < SECONDS and _same(match.found.entry.address, config, whole)

        exact = exactly(matches, same)
        if exact is not None:
            return _Likened(exact.found.entry.classes[0], exact, True)
    found = named(matches)
    return None if found is None else _Likened(*found, False)


def _comparable(config: Config, own_truth: bool) -> Prints:
    """The catalogue's patterns under this config if it has them, else under those of the same kind; nobody knows
    whether a black box has a window."""
    own = [name for name in SHORT_CONFIGS if CONFIGS[name] == config]
    alike = [
        name
        for name in SHORT_CONFIGS
        if (CONFIGS[name].profile == config.profile or config.profile == "hidden")
        and (own_truth or (CONFIGS[name].window is None) == (config.window is None))
    ]
    return Prints(list(catalogue().prints(own or alike or SHORT_CONFIGS)))


def _same(address: str, config: Config, whole: Examination) -> bool:
    """Whether a fault does on every program that is off what the backend did, and on all others that it can run."""
    try:
        with WorkerClient(WorkerSpec(address, step_timeout=FAULT_TIMEOUT)) as fault:
            if fault.build(config) is not None:
                return False
            asked = {probe.name for probe in probes(config, fault.claims)}
            off, truth = 0, Truth(fault.claims.precision)
            for one in whole.symptoms:
                if one.probe.name not in asked and not one.probe.name.startswith("case "):
                    if one.off:
                        return False
                    continue
                trace = fault.run(one.probe.program, (0,)).apart()[0]
                if not alike(one, symptom(one.probe, trace, truth, fault.claims)):
                    return False
                if one.probe.name == SEEN:  # a fault may keep something of them, as the backend may have
                    for _position, program in (*changes(one.probe), (0, one.probe.program)):
                        fault.run(program, (0,))
                off += one.off
            return off > 0
    except (WorkerDied, BackendUnavailable):
        return False


# --- words ---
ACROSS = {
    "C6": "a sequence sees tokens of one that ran before it",
    "C7": "sequences that are open together see each other's tokens",
}


def _said(
    whole: Examination, config: Config, likened: _Likened | None, explained: Sequence[Explanation], other: str
) -> Diagnosis:
    cells = [cell for one in whole.symptoms for cell in one.cells]
    numbers = [cell for cell in cells if cell.status != "raised"]
    when = told(condition(cells, config) or condition(numbers, config)) or generating(whole)
    sight = sighted(whole.pattern.get(SIGHT, ""))
    why = explained[0].words if explained and explained[0].share >= MIN_SHARE else ""
    foreign = ACROSS.get(other, "")
    signature = "; ".join(words for words in (why, foreign, when, sight, first(whole)) if words)
    by_tokens = kinds(explained) or frozenset(filter(None, [other or loop(whole)]))
    kind = decided(likened.kind if likened else "", likened is not None and likened.exact, by_tokens)
    if not kind:
        return Diagnosis(signature=signature, sentence=f"like no known mistake: {signature}")
    mistake = catalogue().classes[kind].partition(": ")[2]
    details = [words for words in (why, foreign, sight, when) if words]
    if not sight and when in ("", generating(whole)) and not (explained and explained[0].share == 1):
        details.append(first(whole))
    if likened is not None and kind == likened.kind:
        entry = likened.match.found.entry
        how = "behaves exactly like" if likened.exact else f"behaves like (to {likened.match.likeness:.0%})"
        which, known = f"{kind}, {entry.bug}", Diagnosis(fault=entry.name, bug=entry.bug, exactly=likened.exact)
    else:
        how = "the tokens that it sees are those of" if explained or foreign else "what it generates is that of"
        which, known = kind, Diagnosis()
    sentence = f'{how} "{mistake}" ({which}): {"; ".join(details)}. {ADVICE[kind]}'
    return msgspec.structs.replace(known, named=kind, signature=signature, sentence=sentence)
